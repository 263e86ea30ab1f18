"""The losses of steps against their definitions in float64."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmrec.examples import IGNORED
from llmrec.exceptions import BackboneError
from llmrec.losses.binary import BinaryCrossEntropy
from llmrec.losses.full_softmax import FullSoftmax
from llmrec.losses.negatives import NegativeSampler
from llmrec.losses.sampled_softmax import OwnNegativesSoftmax, SharedNegativesSoftmax
from llmrec.reasoning.losses import EnsembleLoss, ProgressiveLoss, StepQueries, TaskLoss
from llmrec.reasoning.tasks import StepTask

T, K, D, N = 6, 3, 5, 11


class Items:
    """A table."""

    num_items = N

    def __init__(self) -> None:
        self.rows = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def table(self) -> torch.Tensor:
        return self.rows

    def vectors(self, rows: torch.Tensor) -> torch.Tensor:
        return self.rows[rows]


def asked(seed: int = 0, noised: bool = False, labels: torch.Tensor | None = None) -> tuple[StepQueries, Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    steps, noise, keys = (torch.randn(T, n, D, generator=generator).double() for n in (K + 1, K, K))
    targets = torch.randint(0, N, (T,), generator=generator)
    weights = torch.rand(T, generator=generator).double()
    return StepQueries(steps.mean(dim=1), steps, noise if noised else None, keys, labels), targets, weights


def cross_entropy(queries: torch.Tensor, targets: torch.Tensor, weights: Any, table: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor((F.cross_entropy(queries @ table.T, targets, reduction="none") * weights).sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_the_ensemble_is_its_mean_and_its_disagreement(weighted: bool) -> None:
    items = Items()
    queries, targets, weights = asked()
    given = weights if weighted else None
    weights = weights if weighted else torch.ones(T).double()
    found = EnsembleLoss(FullSoftmax(), 0.3, chunk_scores=20).of_steps(queries, targets, items, given)
    expected = cross_entropy(queries.steps.mean(dim=1), targets, weights, items.rows)
    logs = (queries.steps @ items.rows.T).log_softmax(dim=-1)
    for i, j in itertools.combinations(range(K + 1), 2):
        expected = expected - 0.3 * ((logs[:, i].exp() * (logs[:, i] - logs[:, j])).sum(dim=1) * weights).sum()
    torch.testing.assert_close(found, expected)
    plain = EnsembleLoss(FullSoftmax(), 0.0).of_steps(queries, targets, items, given)
    torch.testing.assert_close(plain, cross_entropy(queries.served, targets, weights, items.rows))


@pytest.mark.parametrize("kind", ["own", "shared", "in_batch"])
def test_where_the_loss_samples_so_does_the_disagreement(kind: str) -> None:
    items = Items()
    queries, targets, _ = asked()
    sampler = NegativeSampler(np.ones(N, dtype=np.int64))
    loss = (
        OwnNegativesSoftmax(sampler, 4)
        if kind == "own"
        else SharedNegativesSoftmax(sampler, 4)
        if kind == "shared"
        else SharedNegativesSoftmax(None, 4, sampler)
    )
    torch.manual_seed(3)
    found = EnsembleLoss(loss, 0.5).of_steps(queries, targets, items)
    torch.manual_seed(3)
    expected = loss(queries.served, targets, items)
    drawn = [] if kind == "in_batch" else sampler.draw(4).tolist()
    rows = sorted({*drawn, *targets.tolist()})
    logs = (queries.steps @ items.rows[rows].T).log_softmax(dim=-1)
    for i, j in itertools.combinations(range(K + 1), 2):
        expected = expected - 0.5 * (logs[:, i].exp() * (logs[:, i] - logs[:, j])).sum()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_progress_is_every_step_at_its_temperature_and_the_contrast(weighted: bool) -> None:
    items = Items()
    queries, targets, weights = asked(noised=True)
    given = weights if weighted else None
    weights = weights if weighted else torch.ones(T).double()
    loss = ProgressiveLoss(FullSoftmax(), sharpening=1.5, noise=0.04, contrast=0.7, chunk_scores=10)
    assert loss.noise == 0.04
    found = loss.of_steps(queries, targets, items, given)
    expected = torch.zeros(()).double()
    for step in range(K + 1):
        softer = queries.steps[:, step] / 1.5 ** (K - step)
        expected = expected + cross_entropy(softer, targets, weights, items.rows)
    without = expected.clone()
    assert queries.noised is not None
    for step in range(K):
        scores = queries.noised[:, step] @ queries.keys[:, step].T  # (T, T), the right one on the diagonal
        expected = expected + 0.7 * ((scores.logsumexp(dim=1) - scores.diagonal()) * weights).sum()
    torch.testing.assert_close(found, expected)
    plain = ProgressiveLoss(FullSoftmax(), sharpening=1.5, contrast=0.0)
    assert plain.noise == 0
    torch.testing.assert_close(plain.of_steps(queries._replace(noised=None), targets, items, given), without)


def test_many_places_are_contrasted_in_equal_groups() -> None:
    items = Items()
    queries, targets, weights = asked(noised=True)
    assert queries.noised is not None
    given: Any = {"sharpening": 1.5, "noise": 0.04}
    found = ProgressiveLoss(FullSoftmax(), **given, contrast=0.7, among=4).of_steps(queries, targets, items, weights)
    expected = ProgressiveLoss(FullSoftmax(), **given, contrast=0.0).of_steps(
        queries._replace(noised=None), targets, items, weights
    )
    for step, part in itertools.product(range(K), (slice(0, 3), slice(3, 6))):
        scores = queries.noised[part, step] @ queries.keys[part, step].T
        expected = expected + 0.7 * ((scores.logsumexp(dim=1) - scores.diagonal()) * weights[part]).sum()
    torch.testing.assert_close(found, expected)
    with pytest.raises(BackboneError, match="groups of 0 places"):
        ProgressiveLoss(FullSoftmax(), among=0)


@pytest.mark.parametrize("kind", ["erl", "prl", "block"])
def test_the_table_of_a_batch_is_made_once(kind: str) -> None:
    loss = {
        "erl": EnsembleLoss(FullSoftmax(), 0.1), "prl": ProgressiveLoss(FullSoftmax()),
        "block": TaskLoss(FullSoftmax()),
    }[kind]  # fmt: skip

    class Counted(Items):
        made = 0

        def table(self) -> torch.Tensor:
            self.made += 1
            return super().table()

    items = Counted()
    queries, targets, weights = asked(noised=kind == "prl")
    for batch in (1, 2):  # and anew for the next batch, whose weights are others
        loss.of_steps(queries, targets, items, weights)
        assert items.made == batch


def test_bce_progresses_and_tasks_take_any_loss() -> None:
    items = Items()
    queries, targets, _ = asked()
    bce = BinaryCrossEntropy(NegativeSampler(np.ones(N, dtype=np.int64)), 3)
    torch.manual_seed(1)
    found = ProgressiveLoss(bce, sharpening=2.0, contrast=0.0).of_steps(queries, targets, items)
    torch.manual_seed(1)
    parts = [bce(queries.steps[:, step] / 2.0 ** (K - step), targets, items) for step in range(K + 1)]
    torch.testing.assert_close(found, torch.stack(parts).sum())


def test_each_step_finds_the_item_of_its_task() -> None:
    items = Items()
    labels = torch.tensor([[1, 2, 3], [4, IGNORED, 5], [6, 7, IGNORED], [8, 9, 1], [2, 2, 2], [0, IGNORED, IGNORED]])
    queries, targets, weights = asked(labels=labels)
    tasks = [StepTask(None, 1.0), StepTask(1, 0.5), StepTask(2, 2.0)]
    loss = TaskLoss(FullSoftmax(), tasks)
    assert loss.tasks == tuple(tasks)
    found = loss.of_steps(queries, targets, items, weights)
    expected = torch.zeros(()).double()
    for place, step in itertools.product(range(T), range(K)):
        if (label := int(labels[place, step])) != IGNORED:
            logs = (items.rows @ queries.steps[place, step + 1]).log_softmax(dim=0)
            expected = expected - tasks[step].weight * weights[place] * logs[label]
    torch.testing.assert_close(found, expected)
    alike = TaskLoss(FullSoftmax()).of_steps(queries._replace(labels=None), targets, items)
    parts = [
        cross_entropy(queries.steps[:, step + 1], targets, torch.ones(T).double(), items.rows) for step in range(K)
    ]
    torch.testing.assert_close(alike, torch.stack(parts).sum())


@pytest.mark.parametrize("kind", ["erl", "prl", "block"])
def test_a_batch_without_labels_is_0_with_gradients(kind: str) -> None:
    loss = {
        "erl": EnsembleLoss(FullSoftmax(), 0.1), "prl": ProgressiveLoss(FullSoftmax()),
        "block": TaskLoss(FullSoftmax()),
    }[kind]  # fmt: skip
    steps = torch.zeros(0, K + 1, D, dtype=torch.float64, requires_grad=True)
    noised = torch.zeros(0, K, D, dtype=torch.float64) if kind == "prl" else None
    queries = StepQueries(steps.mean(dim=1), steps, noised, steps[:, 1:], None)
    found = loss.of_steps(queries, torch.zeros(0, dtype=torch.long), Items())
    assert float(found.detach()) == 0
    found.backward()
    assert steps.grad is not None


def test_of_plain_queries_each_is_the_wrapped_loss() -> None:
    items = Items()
    queries, targets, weights = asked()
    for loss in (EnsembleLoss(FullSoftmax(), 0.1), ProgressiveLoss(FullSoftmax()), TaskLoss(FullSoftmax())):
        found = loss(queries.served, targets, items, weights)
        torch.testing.assert_close(found, FullSoftmax()(queries.served, targets, items, weights))


def test_what_makes_no_sense_is_refused() -> None:
    bce = BinaryCrossEntropy(NegativeSampler(np.ones(N, dtype=np.int64)), 3)
    with pytest.raises(BackboneError, match="judges each item for itself"):
        EnsembleLoss(bce, 0.1)
    assert EnsembleLoss(bce, 0.0).diversity == 0
    for broken, said in (
        (lambda: EnsembleLoss(FullSoftmax(), -1), "-1"),
        (lambda: ProgressiveLoss(FullSoftmax(), sharpening=0), "alpha 0"),
        (lambda: ProgressiveLoss(FullSoftmax(), noise=0, contrast=1), "the noise is 0"),
        (lambda: TaskLoss(FullSoftmax(), [StepTask(None, 0.0)]), "one of them something"),
    ):
        with pytest.raises(BackboneError, match=said):
            broken()
    queries, targets, _ = asked()
    with pytest.raises(BackboneError, match="1 tasks for 3 steps"):
        TaskLoss(FullSoftmax(), [StepTask()]).of_steps(queries, targets, Items())
