import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from llmrec.training.checkpoints import checkpoint_to_resume, newest_whole_checkpoint
from llmrec.training.curve import log_curve
from llmrec.training.ranking import RankingCallback


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    save_file({"weight": np.zeros(3)}, path / "model.safetensors")
    torch.save({}, path / "optimizer.pt")
    torch.save({}, path / "scheduler.pt")
    return path


def test_the_newest_by_number_not_by_name(tmp_path):
    for step in (90, 100, 9):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("file", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt"])
@pytest.mark.parametrize("tear", ["cut", "gone"])
def test_torn_checkpoints_are_passed_over(tmp_path, file, tear):
    whole, torn = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    content = (torn / file).read_bytes()
    if tear == "cut":
        (torn / file).write_bytes(content[: len(content) // 2])
    else:
        (torn / file).unlink()
    assert newest_whole_checkpoint(tmp_path) == whole


def test_nothing_to_resume(tmp_path):
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None


def test_only_the_same_run_is_resumed(tmp_path):
    assert checkpoint_to_resume(tmp_path, ["one"]) is None
    path = checkpoint(tmp_path, 10)
    assert checkpoint_to_resume(tmp_path, ["one"]) == path
    assert checkpoint_to_resume(tmp_path, ["two"]) is None
    assert not path.exists()
    path = checkpoint(tmp_path, 10)
    assert checkpoint_to_resume(tmp_path, ["two"], fresh=True) is None
    assert not path.exists()


class Model:
    def __init__(self):
        self.training, self.modes = True, []

    def eval(self):
        self.modes.append("eval")

    def train(self, mode):
        self.modes.append(mode)


class State:
    def __init__(self):
        self.global_step, self.epoch, self.is_world_process_zero, self.log_history = 5, 0.5, True, []


def test_ranking_metrics_join_the_evaluation():
    asked = []

    def recommend(model):
        def lists(histories, k):
            asked.append((histories, k))
            return [[7, 8], [1, 2]]

        return lists

    callback = RankingCallback(recommend, [np.array([1, 2]), np.array([3])], np.array([8, 9]), k=2)
    model, state, metrics = Model(), State(), {"eval_loss": 1.5}
    callback.on_evaluate(None, state, None, model=model, metrics=metrics)
    # One of two users is hit, in second place: HR 1/2, NDCG 1/log2(3)/2.
    assert metrics == {"eval_loss": 1.5, "eval_HR@2": 0.5, "eval_NDCG@2": pytest.approx(0.5 / np.log2(3))}
    assert asked == [([[1, 2], [3]], 2)]
    assert model.modes == ["eval", True]
    (row,) = log_curve(state.log_history)
    assert row["step"] == 5
    assert row["eval_HR@2"] == 0.5
