import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import random_rows, tiny
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from llmrec.training.curve import log_curve, read_log
from llmrec.training.ranking import RankingCallback, is_sharded
from llmrec.training.trainer import GenerativeTrainer


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
        def lists(users, k):
            asked.append((users, k))
            return [[7, 8], [1, 2]]

        return lists

    callback = RankingCallback(recommend, np.array([8, 9]), k=2)
    model, state, metrics = Model(), State(), {"eval_loss": 1.5}
    callback.on_evaluate(None, state, None, model=model, metrics=metrics)
    # One of two users is hit, in second place: HR 1/2, NDCG 1/log2(3)/2.
    assert metrics == {"eval_loss": 1.5, "eval_HR@2": 0.5, "eval_NDCG@2": pytest.approx(0.5 / np.log2(3))}
    assert asked == [([0, 1], 2)]
    assert model.modes == ["eval", True]
    (row,) = log_curve(state.log_history)
    assert row["step"] == 5
    assert row["eval_HR@2"] == 0.5


def test_metrics_that_are_there_are_not_made_again():
    callback = RankingCallback(lambda model: pytest.fail("asked twice"), np.array([1]), k=2)
    state, metrics = State(), {"eval_loss": 1.5, "eval_HR@2": 0.5, "eval_NDCG@2": 0.25}
    callback.on_evaluate(None, state, None, model=Model(), metrics=metrics)
    assert state.log_history == []


def test_a_failing_search_leaves_the_models_mode():
    def recommend(model):
        raise ValueError("broken")

    model = Model()
    with pytest.raises(ValueError, match="broken"):
        RankingCallback(recommend, np.array([1])).measure(model)
    assert model.modes == ["eval", True]


def ranked_by(weight):
    """(model) -> lists in which every target is found, the further back the smaller the weight."""

    def recommend(model):
        value = weight(model)
        return lambda users, k: [[99] * value + [3 + user] for user in users]

    return recommend


def planted(folder, metric, places, callbacks=(), first=(), kind=GenerativeTrainer, **options):
    """A run of five evaluations whose losses fall throughout while the target's place in the lists is planted."""
    rows = random_rows(0, 8)
    arguments = TrainingArguments(
        str(folder), max_steps=len(places), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        per_device_train_batch_size=8, learning_rate=3e-3, lr_scheduler_type="constant", logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, metric_for_best_model=metric, load_best_model_at_end=True,
        greater_is_better=not metric.endswith("loss"), dataloader_pin_memory=False, **options,
    )  # fmt: skip
    asked = iter(places)
    ranking = RankingCallback(ranked_by(lambda model: next(asked)), np.array([3]))
    callbacks = [*first, ranking, *callbacks]
    trainer = kind(tiny(dtype=torch.float32), arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


PLACES = [5, 1, 3, 12, 4]  # the best is the second


def test_the_best_checkpoint_is_the_rankings_where_the_loss_disagrees(tmp_path):
    by_loss = planted(tmp_path / "loss", "eval_loss", PLACES)
    losses = [row["eval_loss"] for row in log_curve(by_loss.state.log_history)]
    assert losses == sorted(losses, reverse=True)
    assert Path(by_loss.state.best_model_checkpoint).name == "checkpoint-5"
    by_rank = planted(tmp_path / "rank", "eval_NDCG@10", PLACES)
    assert Path(by_rank.state.best_model_checkpoint).name == "checkpoint-2"
    assert by_rank.state.best_metric == pytest.approx(1 / np.log2(3))
    # Loss and ranking are logged together, once for each evaluation.
    lines = [line for line in read_log(tmp_path / "rank" / "log.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["eval_HR@10"] for line in lines] == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert len([entry for entry in by_rank.state.log_history if "eval_HR@10" in entry]) == 5


@pytest.mark.parametrize("where", ["before", "after"])
def test_early_stopping_goes_by_the_ranking_in_any_order(tmp_path, where):
    stop = {"first" if where == "before" else "callbacks": [EarlyStoppingCallback(2)]}
    trainer = planted(tmp_path, "eval_NDCG@10", PLACES, **stop)
    assert trainer.state.global_step == 4
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    falling = planted(tmp_path / "falling", "eval_loss", PLACES, **stop)
    assert falling.state.global_step == 5


def test_behind_transformers_trainer_it_comes_before_early_stopping(tmp_path):
    class Padding(Trainer):
        def __init__(self, *args, **kwargs):
            from llmrec.training.batches import padded

            def collate(rows):
                return {name: value for name, value in padded(rows).items() if name != "tasks"}

            super().__init__(*args, data_collator=collate, **kwargs)

    trainer = planted(tmp_path, "eval_NDCG@10", PLACES, [EarlyStoppingCallback(2)], kind=Padding)
    assert trainer.state.global_step == 4


USERS = 701  # more than are asked for at once, and odd


def of_users(seen, delay=0):
    """Lists that hold each user's target at a place of its own, or not at all; notes who was asked for."""
    rng = np.random.default_rng(0)
    places = rng.integers(0, 20, USERS)

    def recommend(model):
        def lists(some, k):
            seen.extend(some)
            if delay:  # a sharded model computes only where all processes do
                torch.distributed.all_reduce(torch.zeros(1))
            found = [[5000] * int(places[user]) + [2000 + user] for user in some]
            return [one[:k] for one in found]

        return lists

    return RankingCallback(recommend, 2000 + np.arange(USERS))


def in_two_processes(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {}
    for name in ("whole", "sharded"):
        model = torch.nn.Linear(8, 8)
        if name == "sharded":
            model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        seen: list[int] = []
        metrics = of_users(seen, delay=name == "sharded").measure(model, progress=True)
        found[name] = {"sharded": is_sharded(model), "seen": seen, "metrics": metrics}
    (folder / f"{rank}.json").write_text(json.dumps(found, default=int))
    torch.distributed.destroy_process_group()


def test_two_processes_rank_each_user_once_and_sharded_ones_keep_step(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(tmp_path)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone: list[int] = []
    expected = of_users(alone).measure(torch.nn.Linear(8, 8))
    assert alone == list(range(USERS))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name in ("whole", "sharded"):
        assert first[name]["metrics"] == second[name]["metrics"] == expected
        assert first[name]["sharded"] is (name == "sharded")
    assert sorted(first["whole"]["seen"] + second["whole"]["seen"]) == list(range(USERS))
    assert abs(len(first["whole"]["seen"]) - len(second["whole"]["seen"])) == 1
    assert first["sharded"]["seen"] == second["sharded"]["seen"] == list(range(USERS))
    assert done.stderr.count("Ranking: 100%") <= 2  # one bar for each model


if __name__ == "__main__":
    in_two_processes(Path(sys.argv[1]))
