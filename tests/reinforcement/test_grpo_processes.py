"""Two processes of half the groups train as one of all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_rollouts import weights
from train_groups import train

SCRIPT = Path(__file__).parent / "train_groups.py"


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward" in line]


@pytest.mark.slow
@pytest.mark.parametrize("counted", ["alike", "weighted"])
def test_two_processes_train_as_one(checkout, tmp_path, counted):
    one = train(tmp_path / "one", 32, counted == "weighted")
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "train/accelerate/ddp.yaml"]
    argv += ["--main_process_port", "0", "--num_processes", "2", str(SCRIPT), str(tmp_path / "two"), "16", counted]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=checkout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # Neither of them says what TRL would like to say of rollout_func and of vLLM.
    assert "experimental feature" not in done.stderr
    assert "TRL currently supports" not in done.stderr
    expected, found = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("reward", "rewards/mixed/mean", "rewards/exact/mean", "kl", "entropy", "groups_without_signal"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    trained = load_file(tmp_path / "two" / "end.safetensors")
    for name, weight in weights(one.model).items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-5)
    assert {path.name for path in (tmp_path / "two" / "checkpoint-2").glob("proposed_*")} == {
        "proposed_0.pt",
        "proposed_1.pt",
    }
