"""Fifty trainings, each killed at a random moment: a whole checkpoint stays, and in the end the model is the same."""

import json
import os
import random
import signal
import time
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import SlowTrainer, die_at, finish, result_of, same_weights, start, train_to_the_end

from llmrec.storage import write_json
from llmrec.training.checkpoints import newest_whole_checkpoint

KILLS = 50
# One checkpoint is kept: a rotation that comes too early leaves none.
OPTIONS = {"save_steps": 1, "save_total_limit": 1, "max_steps": 12, "logging_steps": 3, "kind": SlowTrainer}


def load(checkpoint):
    """Reads all that a resumed training would read."""
    load_file(checkpoint / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(checkpoint / name, weights_only=True)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert checkpoint.name == f"checkpoint-{state['global_step']}"


def kill_many(folder, report):
    """Trains in one forked process after another, of which fifty are killed; begins anew when one got to its end."""
    chance, kills, finished = random.Random(0), [], 0
    run, result = folder / "run-0", folder / "result-0"
    result.mkdir()
    while len(kills) < KILLS or not (result / "result.json").exists():
        if (result / "result.json").exists():
            finished += 1
            run, result = folder / f"run-{finished}", folder / f"result-{finished}"
            result.mkdir()
        # By the clock, at one of the changes to the folder that saving is made of, or not at all.
        how = chance.choice(["clock", "change"]) if len(kills) < KILLS else None
        change, seconds = chance.randrange(5, 120), chance.uniform(0.1, 1.2)
        process = os.fork()
        if process == 0:
            try:
                if how == "change":
                    die_at(str(run), change)
                train_to_the_end(run, result, OPTIONS)
                os._exit(0)
            finally:
                os._exit(1)
        if how == "clock":
            time.sleep(seconds)
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            newest = newest_whole_checkpoint(run)
            if newest is not None:
                load(newest)
            saving = any(run.glob(".saving/checkpoint-*/*"))
            kills.append({"run": finished, "how": how, "saving": saving, "step": newest and int(newest.name[11:])})
        else:
            assert status == 0
    write_json(report, kills)


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    (tmp_path / "whole").mkdir()
    processes = [start(train_to_the_end, tmp_path / "run", tmp_path / "whole", OPTIONS)]
    processes.append(start(kill_many, tmp_path, tmp_path / "kills.json"))
    assert finish(processes, seconds=500) == [0, 0]
    kills = json.loads((tmp_path / "kills.json").read_text())
    assert len(kills) == KILLS
    # They met what they were to meet: saves as well as steps, by the clock and change by change.
    assert sum(kill["saving"] for kill in kills) >= 10
    assert {kill["how"] for kill in kills} == {"clock", "change"}
    for before, after in pairwise(kills):
        if before["run"] == after["run"]:
            assert (after["step"] or 0) >= (before["step"] or 0)
    losses, weights = result_of(tmp_path / "whole")
    assert [entry["step"] for entry in losses] == [3, 6, 9, 12]
    results = sorted(tmp_path.glob("result-*"))
    assert any(kill["step"] for kill in kills)
    for result in results:
        found, trained = result_of(result)
        assert found == losses
        assert same_weights(trained, weights)
