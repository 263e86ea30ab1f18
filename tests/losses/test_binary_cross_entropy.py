"""BCE and gBCE against loops in float64 over the same draws, and what gBCE's calibration promises."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmrec.exceptions import BackboneError
from llmrec.losses.binary import BinaryCrossEntropy
from llmrec.losses.negatives import NegativeSampler

N, D, T = 9, 3, 6


class Table:
    """Candidates of a loss, as they are."""

    def __init__(self, seed: int) -> None:
        self.weight = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.weight.requires_grad_()
        self.num_items = N

    def table(self) -> Tensor:
        return self.weight

    def vectors(self, rows: Tensor) -> Tensor:
        return nn.functional.embedding(rows, self.weight)


@pytest.mark.parametrize("popular", [True, False])
@pytest.mark.parametrize(("calibration", "negatives"), [(0.0, 1), (0.0, 4), (0.75, 4), (1.0, 3), (1.0, 20)])
@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_the_definition(popular: bool, calibration: float, negatives: int, weighted: bool) -> None:
    sampler = NegativeSampler(np.arange(N) ** 2 if popular else np.ones(N, dtype=np.int64))
    torch.manual_seed(4)
    queries = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    targets, weights, items = torch.randint(N, (T,)), torch.rand(T, dtype=torch.float64), Table(1)
    loss = BinaryCrossEntropy(sampler, negatives, calibration)
    rate = min(1, negatives / (N - 1))
    beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)  # gSASRec, section 5
    torch.manual_seed(11)
    drawn = sampler.draw_others(targets, negatives)
    expected = torch.zeros((), dtype=torch.float64)
    for query, target, rows, weight in zip(queries, targets, drawn, weights, strict=True):
        own = torch.sigmoid(query @ items.weight[target]).pow(beta).log()
        for row in rows:
            own = own + (1 - torch.sigmoid(query @ items.weight[row])).log()
        expected = expected - (weight if weighted else 1) * own / (negatives + 1)
    torch.manual_seed(11)
    found = loss(queries, targets, items, weights if weighted else None)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    exact = torch.autograd.grad(2 * expected, (queries, items.weight))
    for mine, definition in zip(torch.autograd.grad(2 * found, (queries, items.weight)), exact, strict=True):
        torch.testing.assert_close(mine, definition, atol=1e-11, rtol=1e-11)


def test_no_token() -> None:
    queries, items = torch.zeros(0, D, dtype=torch.float64, requires_grad=True), Table(0)
    loss = BinaryCrossEntropy(NegativeSampler(np.ones(N, dtype=np.int64)), 4, 0.5)
    found = loss(queries, torch.zeros(0, dtype=torch.int64), items)
    assert found.item() == 0
    assert not torch.autograd.grad(found, items.weight)[0].any()


def test_large_scores_stay_finite() -> None:
    queries, items = torch.full((1, D), 1e4, dtype=torch.float64), Table(0)
    loss = BinaryCrossEntropy(NegativeSampler(np.ones(N, dtype=np.int64)), 4, 0.5)
    assert math.isfinite(loss(queries, torch.tensor([2]), items).item())


@pytest.mark.parametrize("calibration", [0.0, 1.0])
def test_full_calibration_makes_scores_probabilities(calibration: float) -> None:
    # A prior without any query, trained to the optimum: with t = 1 each sigmoid is the item's probability, without
    # it is far above.
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0], dtype=torch.float64)
    number = len(probabilities)
    negatives, rate = 2, 2 / 4
    beta = BinaryCrossEntropy(NegativeSampler(np.ones(number, dtype=np.int64)), negatives, calibration).beta
    # The expected loss of an item's score s: p β softplus(-s) + (1 - p) rate softplus(s).
    shares = beta * probabilities / (beta * probabilities + (1 - probabilities) * rate)
    if calibration == 1:
        torch.testing.assert_close(shares, probabilities)
    else:
        assert beta == 1
        assert (shares[:4] > probabilities[:4] + 0.05).all()


@pytest.mark.parametrize("calibration", [-0.1, 1.5, math.nan])
def test_impossible_calibrations(calibration: float) -> None:
    with pytest.raises(BackboneError, match="gBCE's t"):
        BinaryCrossEntropy(NegativeSampler(np.ones(N, dtype=np.int64)), 4, calibration)
