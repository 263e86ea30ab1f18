"""The chunked softmax against F.cross_entropy: values, gradients, weights, no tokens, half precision."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import BackboneError
from llmrec.losses.full_softmax import FullSoftmax, full_softmax_loss
from llmrec.representations.id_table import IdTable


def random_loss(seed: int, tokens: int, num_items: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries, targets, table, weights."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(tokens, 4, generator=generator, dtype=dtype)
    table = torch.randn(num_items, 4, generator=generator, dtype=dtype)
    targets = torch.randint(num_items, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator, dtype=dtype) * 3
    return queries.requires_grad_(), targets, table.requires_grad_(), weights.requires_grad_()


def definition(queries: torch.Tensor, targets: torch.Tensor, table: torch.Tensor, weights: Any = 1) -> torch.Tensor:
    return (F.cross_entropy(queries @ table.T, targets, reduction="none") * weights).sum()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(0, 20),
    num_items=st.integers(1, 9),
    chunk=st.integers(1, 200),
    factor=st.sampled_from([1.0, -2.5]),
    weighted=st.booleans(),
)
def test_it_is_cross_entropy_with_its_gradients(
    seed: int, tokens: int, num_items: int, chunk: int, factor: float, weighted: bool
) -> None:
    queries, targets, table, weights = random_loss(seed, tokens, num_items, torch.float64)
    learnt = (queries, table, weights) if weighted else (queries, table)
    expected = definition(queries, targets, table, weights if weighted else 1)
    slopes = torch.autograd.grad(factor * expected, learnt)
    found = full_softmax_loss(queries, targets, table, weights if weighted else None, chunk)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    for mine, exact in zip(torch.autograd.grad(factor * found, learnt), slopes, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-11, rtol=1e-11)


def test_by_hand() -> None:
    # Scores (0, ln 3) and target 1: the loss is ln(4 / 3), the softmax (1/4, 3/4); everything twice.
    queries = torch.tensor([[1.0]], requires_grad=True)
    table = torch.tensor([[0.0], [np.log(3.0)]], dtype=torch.float32, requires_grad=True)
    loss = full_softmax_loss(queries, torch.tensor([1]), table, torch.tensor([2.0]))
    loss.backward()
    assert loss.item() == pytest.approx(2 * np.log(4 / 3))
    assert table.grad is not None
    assert queries.grad is not None
    np.testing.assert_allclose(table.grad.numpy(), [[0.5], [-0.5]], atol=1e-6)
    np.testing.assert_allclose(queries.grad.numpy(), [[-0.5 * np.log(3)]], atol=1e-6)


def test_frozen_parts() -> None:
    queries, targets, table, _ = random_loss(0, 50, 9, torch.float64)
    expected = torch.autograd.grad(definition(queries, targets, table), (queries, table))
    (for_queries,) = torch.autograd.grad(full_softmax_loss(queries, targets, table.detach(), None, 20), queries)
    (for_table,) = torch.autograd.grad(full_softmax_loss(queries.detach(), targets, table, None, 20), table)
    torch.testing.assert_close((for_queries, for_table), expected)


def test_autocast_keeps_the_precision_of_its_inputs() -> None:
    queries, targets, table, _ = (tensor.detach() for tensor in random_loss(0, 50, 9, torch.float32))
    exact = definition(20 * queries.double(), targets, table.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = full_softmax_loss(20 * queries, targets, table)
        mixed = full_softmax_loss((20 * queries).bfloat16(), targets, table)
    assert found.dtype == mixed.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
    rounded = definition((20 * queries).bfloat16().double(), targets, table.double())
    assert mixed.item() == pytest.approx(rounded.item(), rel=1e-5)


def test_half_precision_sums_in_single() -> None:
    queries, targets, table, _ = random_loss(0, 50, 9, torch.float64)
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (queries, table)]
    loss = full_softmax_loss(half[0], targets, half[1], None, 20)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(definition(half[0].double(), targets, half[1].double()).item(), rel=0.01)
    loss.backward()
    assert half[1].grad is not None
    (for_table,) = torch.autograd.grad(definition(queries, targets, table), table)
    torch.testing.assert_close(half[1].grad.double(), for_table, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("learning", [True, False])
def test_scores_are_never_all_there(monkeypatch: pytest.MonkeyPatch, learning: bool) -> None:
    sizes, slopes = [], []
    exp_, scatter_add_ = torch.Tensor.exp_, torch.Tensor.scatter_add_

    def spy(scores: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(scores.shape))
        return exp_(scores)

    def spy_slopes(scores: torch.Tensor, *arguments: Any) -> torch.Tensor:
        slopes.append(tuple(scores.shape))
        return scatter_add_(scores, *arguments)

    monkeypatch.setattr(torch.Tensor, "exp_", spy)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", spy_slopes)
    queries, targets, table, _ = random_loss(0, 25, 9, torch.float32)
    with torch.set_grad_enabled(learning):
        loss = full_softmax_loss(queries, targets, table, chunk_scores=95)
    assert loss.requires_grad == learning
    assert sizes == [(10, 9), (10, 9), (5, 9)]
    # An evaluation makes no gradients that nobody asks for.
    assert slopes == (sizes if learning else [])


def test_by_itself_it_holds_as_many_scores_as_the_table_has_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, exp_ = [], torch.Tensor.exp_

    def spy(scores: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(scores.shape))
        return exp_(scores)

    monkeypatch.setattr(torch.Tensor, "exp_", spy)
    full_softmax_loss(torch.zeros(70, 32), torch.zeros(70, dtype=torch.long), torch.zeros(70_000, 32))
    assert sizes == [(32, 70_000), (32, 70_000), (6, 70_000)]


def test_no_room_for_scores_is_refused() -> None:
    queries, targets, table, _ = random_loss(0, 1, 3, torch.float32)
    with pytest.raises(BackboneError, match="with 0 scores"):
        full_softmax_loss(queries, targets, table, None, 0)


def test_the_module_reads_the_whole_table() -> None:
    queries, targets, _, weights = random_loss(1, 6, 7, torch.float32)
    items = IdTable(7, 4)
    found = FullSoftmax()(queries, targets, _Scored(items), weights)
    torch.testing.assert_close(found, definition(queries, targets, items.table(), weights))
    found.backward()
    assert items.items.weight.grad is not None
    assert (items.items.weight.grad != 0).all()


class _Scored:
    """A representation as the candidates of a loss."""

    def __init__(self, items: IdTable) -> None:
        self.items = items
        self.num_items = items.num_items

    def table(self) -> torch.Tensor:
        return self.items.table()

    def vectors(self, rows: torch.Tensor) -> torch.Tensor:
        return self.items(rows)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    queries, targets, table, _ = random_loss(3, 40, 9, torch.float32)
    large = (queries.detach() * 3e3).requires_grad_()
    loss = full_softmax_loss(large, targets, table)
    expected = definition(large.double(), targets, table.double())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, exact in zip(
        torch.autograd.grad(loss, (large, table)), torch.autograd.grad(expected, (large, table)), strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-3, atol=1e-3)
