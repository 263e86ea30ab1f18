"""Sequence models that think: training asks at every place what serving answers there, and steps learn."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from thinking_models import ACTIONS, NUM_ITEMS, items, log, model
from transformers import AutoModel

from llmrec import Recommender
from llmrec.artefact_parts import Settings
from llmrec.catalog import Catalog
from llmrec.data.interactions import Interactions
from llmrec.data.protocols import leave_one_out
from llmrec.evaluation.evaluation import evaluate
from llmrec.examples import IGNORED
from llmrec.losses.full_softmax import FullSoftmax
from llmrec.reasoning.losses import EnsembleLoss, ProgressiveLoss, ReasoningLoss, TaskLoss
from llmrec.reasoning.steps import evaluate_steps
from llmrec.reasoning.tasks import StepTask
from llmrec.sequence.events import EventConfig
from llmrec.sequence.histories import LoggedHistories, collate
from llmrec.sequence.model import SequenceModel, register
from llmrec.sequence.recommender import SequenceRecommender
from llmrec.sequence.scores import CaseScores
from llmrec.sequence.trainer import SequenceTrainer
from llmrec.sequence.windows import TrainingWindows
from llmrec.training.arguments import StageArguments

LAYOUTS: dict[str, EventConfig] = {
    "plain": EventConfig(),
    "before": EventConfig(actions=ACTIONS, action_tokens="before", request_time=True),
    "after": EventConfig(actions=ACTIONS, action_tokens="after"),
}
MODELS: dict[str, dict[str, Any]] = {
    "erl": {"kind": "erl"},
    "prl": {"kind": "prl", "encoder": "hstu"},
    "block": {"kind": "block", "block": 3},
    "gru": {"kind": "erl", "encoder": "gru4rec"},
}


def batch_of(made: SequenceModel, numbers: tuple[int, ...] = (0, 3, 5), **options: Any) -> tuple[Any, Any]:
    windows = TrainingWindows(LoggedHistories(log(), made.events), 10, **options)
    batch = windows.__getitems__([(0, number) for number in numbers])
    return windows, batch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_training_asks_at_every_place_what_serving_answers_there(name: str, layout: str) -> None:
    made = model(events=LAYOUTS[layout], similarity="cosine", temperature=0.2, **MODELS[name])
    windows, batch = batch_of(made)
    labels = batch["labels"]
    given = {key: value for key, value in batch.items() if key not in ("labels", "first_items")}
    found = made(**given)
    places = torch.tensor([[1], [0], [2]])
    torch.testing.assert_close(made(**given, places=places)[:, 0], found[[0, 1, 2], places[:, 0]])
    total = torch.zeros(()).double()
    for row, number in enumerate((0, 3, 5)):
        window = windows.windows[number]
        for place in range(int(batch["mask"][row].sum())):
            asked = collate([windows.histories.before(window.begin, window.begin + place + 1)], 10)
            answer = made.last(**asked)[0]
            torch.testing.assert_close(found[row, place], answer, atol=1e-9, rtol=0)
            if labels[row, place] != IGNORED:
                total = total - (made.table() @ answer).log_softmax(dim=0)[labels[row, place]]
    torch.testing.assert_close(made(**batch, loss=FullSoftmax()), total)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_loss_hears_every_step(layout: str) -> None:
    """Against the steps of `thinking`, which knows nothing of labelled places or losses."""
    heard: list[Any] = []

    class Heard(ReasoningLoss):
        noise = 0.09
        tasks = (StepTask(None), StepTask(1))

        def of_steps(self, queries: Any, targets: Any, items: Any, weights: Any = None) -> torch.Tensor:
            heard.append((queries, targets, weights))
            return torch.as_tensor(queries.steps.sum())

    events = LAYOUTS[layout]
    made = model("prl", encoder="hstu", events=events, similarity="cosine", temperature=0.2)
    _, batch = batch_of(made, action_weights=[1.0, 2.0, 0.5] if layout != "plain" else None)
    torch.manual_seed(0)
    made(**batch, loss=Heard(FullSoftmax()))
    ((queries, targets, weights),) = heard
    asked = batch["labels"] != IGNORED
    assert torch.equal(targets, batch["labels"][asked])
    assert weights is None if layout == "plain" else torch.equal(weights, batch["weights"][asked])
    given = {key: value for key, value in batch.items() if key not in ("labels", "first_items", "weights")}
    for steps in range(3):
        with made.encoder.thinking(steps):
            torch.testing.assert_close(queries.steps[:, steps], made(**given)[asked], atol=1e-9, rtol=0)
    torch.testing.assert_close(queries.served, queries.steps[:, -1])
    torch.testing.assert_close(queries.keys, queries.steps[:, 1:] * 0.2)  # unit vectors, as items are
    torch.testing.assert_close(queries.keys.norm(dim=-1), torch.ones(queries.keys.shape[:2]).double())
    assert queries.noised.shape == queries.keys.shape
    assert 1e-3 < (queries.noised * 0.2 - queries.keys).norm(dim=-1).mean() < 1.5
    # The second task is the next item that was bought, if actions have numbers.
    assert torch.equal(queries.labels[:, 0], targets)
    found = queries.labels[:, 1]
    if layout == "plain":
        assert (found == IGNORED).all()
    else:
        own = batch["next_actions"][asked] == 1
        assert torch.equal(found[own], targets[own])
        assert not torch.equal(found, targets)


@torch.no_grad()
def test_last_thinks_at_the_last_place_alone_and_new_users_have_their_own_query() -> None:
    made = model("erl", steps=3)
    counted: list[Any] = []
    reason = made.encoder.reason

    def counting(places: torch.Tensor, *given: Any, **options: Any) -> Any:
        counted.append(tuple(places.shape))
        return reason(places, *given, **options)

    made.encoder.reason = counting
    histories = LoggedHistories(log(), made.events).cases("test")[:5]
    empty = histories[0]._replace(rows=np.zeros(0, dtype=np.int64), timestamps=None, actions=None)
    found = made.last(**collate([*histories, empty], 10))
    assert counted == [(6, 1)]
    torch.testing.assert_close(found[5], made.start)
    torch.testing.assert_close(found[2], made.last(**collate([histories[2]], 10))[0])


def test_a_batch_without_labels_gives_every_weight_a_gradient() -> None:
    made = model("prl")
    _, batch = batch_of(made)
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    made(**batch, loss=ProgressiveLoss(FullSoftmax())).backward()
    gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
    assert all(slope is not None for slope in gradients.values())
    assert not any(bool(slope.any()) for name, slope in gradients.items() if slope is not None and name != "start")


@pytest.mark.parametrize("name", MODELS)
def test_saved_as_an_artefact_it_recommends_alike(name: str, tmp_path: Any) -> None:
    register()
    made = model(**MODELS[name])
    made.save_pretrained(tmp_path / "plain")
    loaded = AutoModel.from_pretrained(tmp_path / "plain", dtype=torch.float64).eval()
    assert isinstance(loaded, SequenceModel)
    assert loaded.encoder.config.to_dict() == made.encoder.config.to_dict()
    histories = LoggedHistories(log(), made.events).cases("test")
    with torch.no_grad():
        assert torch.equal(loaded.last(**collate(histories, 10)), made.last(**collate(histories, 10)))
    catalog = Catalog.of_rows([{"item_id": item, "title": item} for item in items().ids])
    SequenceRecommender(made, catalog, Settings(max_history=10, num_beams=1)).save_pretrained(tmp_path / "artefact")
    recommender = Recommender.from_pretrained(tmp_path / "artefact", device="cpu")
    found = recommender.recommend(["i1", "i2", "i3"], k=5)
    with torch.no_grad():
        rows = np.array([1, 2, 3])
        query = made.last(torch.from_numpy(rows)[None], torch.ones(1, 3).bool())[0]
        scores = (made.table() @ query).log_softmax(dim=0)
    scores[rows] = -torch.inf
    expected = scores.topk(5)
    assert [one.item_id for one in found] == [f"i{row}" for row in expected.indices.tolist()]
    np.testing.assert_allclose([one.log_probability for one in found], expected.values.numpy(), atol=1e-6)


def test_every_step_s_evaluation_is_that_of_the_model_that_thinks_so_far() -> None:
    made, split = model("prl"), log()
    found = evaluate_steps(made, split, "valid", system="m", cases=np.array([1, 2, 5, 7]))
    assert [one.system for one in found] == ["m-steps=0", "m-steps=1", "m-steps=2"]
    for steps, one in enumerate(found):
        with made.encoder.thinking(steps):
            cases = LoggedHistories(split, made.events).cases("valid", [1, 2, 5, 7])
            expected = evaluate("m", split, "valid", scores=CaseScores(made, cases), cases=np.array([1, 2, 5, 7]))
        assert one.ranks.better.tolist() == expected.ranks.better.tolist()
    assert len({tuple(one.ranks.better.tolist()) for one in found}) > 1


def ring() -> Any:
    """Users who walk along a ring of items."""
    import polars as pl

    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{(start + step) % NUM_ITEMS}", 1_500_000_000 + 60 * step)
        for user, start in enumerate(rng.integers(0, NUM_ITEMS, 100))
        for step in range(int(rng.integers(4, 8)))
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return leave_one_out(Interactions.from_frame(frame), items())


def trainer_of(folder: Any, kind: str, encoder: str = "sasrec", **options: Any) -> SequenceTrainer:
    split = ring()
    made = model(kind, encoder=encoder, block=2 if kind == "block" else 1).float()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.div_(3)
        made.start.zero_()
    histories = LoggedHistories(split, made.events)
    loss = {
        "erl": EnsembleLoss(FullSoftmax(), 0.01), "prl": ProgressiveLoss(FullSoftmax(), 1.2),
        "block": TaskLoss(FullSoftmax()),
    }[kind]  # fmt: skip
    defaults: dict[str, Any] = {
        "num_train_epochs": 12, "per_device_train_batch_size": 16, "learning_rate": 0.01, "use_cpu": True,
        "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 5,
    }  # fmt: skip
    args = StageArguments(output_dir=str(folder), **(defaults | options))
    windows = TrainingWindows(histories, 10)
    return SequenceTrainer(made, args, windows, loss, histories.cases("valid"), split.targets("valid"))


@pytest.mark.parametrize(
    ("kind", "encoder"),
    [("erl", "sasrec"), ("prl", "sasrec"), ("block", "sasrec"), ("prl", "hstu"), ("erl", "gru4rec")],
)
def test_it_learns_to_walk_along_a_ring(tmp_path: Any, kind: str, encoder: str) -> None:
    trainer = trainer_of(tmp_path, kind, encoder, num_train_epochs=20 if encoder == "gru4rec" else 12)
    begun = trainer.evaluate()["eval_NDCG@10"]
    before = trainer.model.encoder.step_vectors.detach().clone()
    trainer.train()
    assert begun < 0.6
    assert trainer.evaluate()["eval_NDCG@10"] > 0.8
    assert not torch.equal(before, trainer.model.encoder.step_vectors)


def test_accumulated_batches_of_thoughts_are_one_large_batch(tmp_path: Any) -> None:
    """Of all but PRL's contrast, which is among the places of a batch."""
    found = []
    for size, steps in ((16, 1), (4, 4)):
        sizes: Any = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3}
        trainer = trainer_of(tmp_path / str(size), "erl", **sizes)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        found.append(trainer.model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_a_restart_changes_no_bit_of_a_noised_training(tmp_path: Any) -> None:
    saved: Any = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole = trainer_of(tmp_path / "whole", "prl", **saved)
    whole.train()
    again = trainer_of(tmp_path / "whole", "prl", **saved)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)


def test_the_noise_and_the_temperature_of_training_are_no_part_of_serving() -> None:
    made = model("prl")
    histories = LoggedHistories(log(), made.events).cases("test")[:3]
    with torch.no_grad():
        first, second = (made.last(**collate(histories, 10)) for _ in range(2))
        states = made.encoder(made.representation(torch.tensor([[1, 2, 3]])))[0, -1]
        query = made.last(torch.tensor([[1, 2, 3]]), torch.ones(1, 3).bool())[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(query, states)
    assert F.cosine_similarity(query, states, dim=0) > 0.999
