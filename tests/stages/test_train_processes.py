"""Every accelerate configuration trains the same model: two processes of half the batch against one of the whole."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from ring import write_ring
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    return write_ring(tmp_path_factory.mktemp("ring"), users=96)


def train(ring, artefact, config, *flags):
    """The log of a run, and its weights."""
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"train/accelerate/{config}.yaml"]
    argv += ["--main_process_port", "0", "train/sft.py", "--config", "train/recipes/debug.yaml"]
    argv += ["--semantic_ids", str(ring / "ids"), "--interactions", str(ring / "log.csv"), "--artefact", str(artefact)]
    argv += ["--max_steps", str(STEPS), "--logging_steps", "1", "--eval_steps", str(STEPS), "--eval_users", "35"]
    argv += ["--save_strategy", "no", "--use_cpu", "true", "--train_sampling_strategy", "sequential", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (artefact.parent / f"{artefact.name}.checkpoints" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], load_file(artefact / "model.safetensors"), done.stderr


@pytest.fixture(scope="module")
def one_process(ring, tmp_path_factory):
    batch = ["--per_device_train_batch_size", "8"]
    return train(ring, tmp_path_factory.mktemp("one") / "artefact", "single", *batch)


@pytest.mark.parametrize("config", ["ddp", "fsdp", "deepspeed_zero2", "deepspeed_zero3"])
def test_two_processes_train_as_one(ring, one_process, tmp_path, config):
    if config.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    expected, weights, _ = one_process
    found, trained, said = train(ring, tmp_path / "artefact", config, "--per_device_train_batch_size", "4")
    of = lambda lines, name: [line[name] for line in lines if name in line]  # noqa: E731
    assert len(of(found, "loss")) == STEPS
    np.testing.assert_allclose(of(found, "loss"), of(expected, "loss"), rtol=0, atol=1e-5)
    np.testing.assert_allclose(of(found, "eval_loss"), of(expected, "eval_loss"), rtol=0, atol=1e-5)
    # No user is dropped or counted twice in the evaluation; and no rank says again what the first one said.
    for metric in ("eval_HR@10", "eval_NDCG@10"):
        assert of(found, metric) == of(expected, metric)
    assert said.count("validation users") == 1
    assert set(trained) == set(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-4)


def test_processes_that_would_train_apart_are_refused(ring, tmp_path):
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "train/sft.py"]
    argv += ["--config", "train/recipes/debug.yaml", "--semantic_ids", str(ring / "ids")]
    argv += ["--interactions", str(ring / "log.csv"), "--artefact", str(tmp_path / "artefact")]
    if torch.cuda.is_available():
        pytest.skip("two processes find GPUs here")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    assert "Add --use_cpu true" in done.stderr
