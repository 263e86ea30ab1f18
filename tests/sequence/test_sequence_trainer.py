"""The trainer of sequence models: what it learns, what it measures, and that a restart changes nothing."""

import json
import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sequence_logs import random_split, small_model

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import leave_one_out
from llmrec.evaluation.evaluation import evaluate
from llmrec.evaluation.ranks import rank_scores
from llmrec.exceptions import BackboneError
from llmrec.losses.arguments import LossArguments
from llmrec.representations.row_adam import RowAdam
from llmrec.sequence.histories import LoggedHistories
from llmrec.sequence.scores import CaseScores
from llmrec.sequence.trainer import SequenceTrainer, places_of_targets
from llmrec.sequence.windows import TrainingWindows
from llmrec.training.arguments import StageArguments


def ring(users=120, items=30, seed=0):
    """Users who walk along a ring of items."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user}", f"i{(start + step) % items}", 1_500_000_000 + 60 * step)
        for user, start in enumerate(rng.integers(0, items, users))
        for step in range(int(rng.integers(4, 9)))
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    table = Items.from_frame(pl.DataFrame({"item_id": [f"i{row}" for row in range(items)]}))
    return leave_one_out(Interactions.from_frame(frame), table)


def trainer_of(folder, split=None, encoder="sasrec", loss="softmax", budget=0, **options):
    split = split or ring()
    model = small_model(encoder, items=split.num_items, dropout=0.1)
    for parameter in model.parameters():
        parameter.data.div_(3)
    model.start.data.zero_()
    histories = LoggedHistories(split, model.events)
    windows = TrainingWindows(histories, 10, hidden_share=0.0 if model.causal else 0.3)
    defaults = {
        "num_train_epochs": 4, "per_device_train_batch_size": 16, "learning_rate": 0.01, "eval_strategy": "epoch",
        "save_strategy": "epoch", "use_cpu": True, "disable_tqdm": True, "logging_steps": 5, "report_to": "none",
    }  # fmt: skip
    args = StageArguments(output_dir=str(folder), **(defaults | options))
    loss = LossArguments(loss=loss, num_negatives=8).build(split.train_counts)
    cases, targets = histories.cases("valid"), split.targets("valid")
    return SequenceTrainer(model, args, windows, loss, cases, targets, budget=budget)


@pytest.mark.parametrize(
    ("encoder", "loss", "budget"),
    [
        ("sasrec", "softmax", 0), ("sasrec", "sampled_softmax", 0), ("sasrec", "bce", 0),
        ("hstu", "softmax", 100), ("gru4rec", "softmax", 0), ("bert4rec", "softmax", 0), ("llama", "softmax", 0),
    ],
)  # fmt: skip
def test_it_learns_to_walk_along_a_ring(tmp_path, encoder, loss, budget):
    trainer = trainer_of(
        tmp_path,
        encoder=encoder,
        loss=loss,
        budget=budget,
        num_train_epochs=15 if loss.endswith("softmax") and encoder != "bert4rec" else 30,
        eval_strategy="no",
        save_strategy="no",
    )
    begun = trainer.evaluate()["eval_HR@10"]
    trainer.train()
    assert begun < 0.7
    assert trainer.evaluate()["eval_HR@10"] > 0.9


def test_sparse_gradients_learn_too_and_are_clipped_by_their_optimizer(tmp_path):
    split = ring()
    histories = LoggedHistories(split, small_model().events)
    model = small_model(items=split.num_items, dropout=0.1, representation={"kind": "ids", "sparse": True})
    args = StageArguments(
        output_dir=str(tmp_path), num_train_epochs=15, per_device_train_batch_size=16, learning_rate=0.01,
        use_cpu=True, disable_tqdm=True, max_grad_norm=0.5, save_strategy="no",
    )  # fmt: skip
    loss = LossArguments(loss="sampled_softmax", num_negatives=8).build(split.train_counts)
    cases, targets = histories.cases("valid"), split.targets("valid")
    trainer = SequenceTrainer(model, args, TrainingWindows(histories, 10), loss, cases, targets)
    trainer.train()
    optimizer = trainer.optimizer.optimizer  # in accelerate's wrapper
    assert isinstance(optimizer, RowAdam)
    assert optimizer.max_grad_norm == 0.5
    trainer.training_step(model.train(), next(iter(trainer.get_train_dataloader())))
    assert model.representation.items.weight.grad.is_sparse
    assert trainer.evaluate()["eval_HR@10"] > 0.9


def test_an_evaluation_is_what_evaluate_says(tmp_path):
    split = random_split()
    trainer = trainer_of(tmp_path, split)
    metrics = trainer.evaluate()
    cases = LoggedHistories(split, trainer.model.events).cases("valid")
    expected = evaluate("model", split, "valid", scores=CaseScores(trainer.model, cases, batch_size=7), ks=(10, 50))
    document = expected.document()
    for name in ("HR@10", "NDCG@10", "HR@50"):
        assert metrics[f"eval_{name}"] == pytest.approx(document[name], abs=1e-9)
    scores = torch.cat(list(CaseScores(trainer.model, []).batches(cases)))
    loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(split.targets("valid")).long())
    assert metrics["eval_loss"] == pytest.approx(float(loss), abs=1e-5)


@given(seed=st.integers(0, 10**6), items=st.integers(1, 12), cases=st.integers(1, 6))
def test_places_are_those_of_the_stable_ranking(seed, items, cases):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (cases, items)).astype(np.float32)  # many ties
    histories = [rng.integers(0, items, rng.integers(0, 4)) for _ in range(cases)]
    targets = rng.integers(0, items, cases)
    better, lost = places_of_targets(torch.from_numpy(scores.copy()), histories, targets)
    _, lists = rank_scores(lambda given: scores.copy(), histories, targets, items, k=items)
    for case, target in enumerate(targets):
        place = np.flatnonzero(lists[case] == target)
        assert better[case] == (place[0] if len(place) else -1)
        assert lost[case] == pytest.approx(math.log(np.exp(scores[case] - scores[case, target]).sum()), abs=1e-5)


def test_a_model_whose_scores_are_no_numbers_finds_nothing():
    scores = torch.zeros(3, 5)
    scores[0] = math.nan
    scores[1, 1] = math.nan
    scores[2, 3] = 1.0
    better, _ = places_of_targets(scores, [np.array([0])] * 3, np.array([3, 3, 3]))
    assert better.tolist() == [-1, -1, 0]


def test_cases_must_come_in_their_order():
    split = random_split()
    model = small_model()
    scores = CaseScores(model, LoggedHistories(split, model.events).cases("test"))
    with pytest.raises(RuntimeError, match="order"):
        scores(split.histories("test")[::-1])


def test_labels_are_not_smoothed_in_silence(tmp_path):
    with pytest.raises(BackboneError, match=r"label_smoothing_factor is 0\.1"):
        trainer_of(tmp_path, label_smoothing_factor=0.1)


def test_a_restart_changes_no_bit(tmp_path):
    def weights(trainer):
        return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    whole = trainer_of(tmp_path / "whole")
    whole.train()
    steps = len(whole.get_train_dataloader())
    cut = trainer_of(tmp_path / "cut", save_strategy="steps", save_steps=steps + 2)
    cut.args.max_steps = -1

    class KillError(Exception):
        pass

    original = cut.training_step

    def until(model, inputs, *rest):
        if cut.state.global_step == steps + 4:
            raise KillError
        return original(model, inputs, *rest)

    cut.training_step = until
    with pytest.raises(KillError):
        cut.train()
    again = trainer_of(tmp_path / "cut", save_strategy="steps", save_steps=steps + 2)
    again.train(resume_from_checkpoint=True)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(again)[name], tensor, rtol=0, atol=0)
    logged = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in logged if "loss" in line] == [line["loss"] for line in expected if "loss" in line]


def test_processes_draw_differently(tmp_path, monkeypatch):
    drawn = []
    for process in (0, 1, 0):
        monkeypatch.setattr(StageArguments, "process_index", property(lambda _, process=process: process))
        sampler = trainer_of(tmp_path, loss="bce", seed=5).loss.sampler
        drawn.append(sampler.draw(20))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_accumulated_batches_are_one_large_batch(tmp_path):
    found = []
    for size, steps in ((16, 1), (4, 4)):
        trainer = trainer_of(
            tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=3
        )
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        found.append(trainer.model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5)
