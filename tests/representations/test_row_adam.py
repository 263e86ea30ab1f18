"""RowAdam against AdamW where all rows are used, and row by row where they are not; clipping; saved states."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import BackboneError
from llmrec.representations.id_table import IdTable
from llmrec.representations.row_adam import RowAdam

N, D = 6, 3


def table(sparse: bool) -> IdTable:
    torch.manual_seed(0)
    return IdTable(N, D, sparse=sparse, initializer_range=1.0).double()


def use(items: IdTable, rows: list[int], factor: float = 1.0) -> None:
    """One backward pass that reaches these rows, some perhaps twice."""
    slopes = torch.randn(len(rows), D, dtype=torch.float64, generator=torch.Generator().manual_seed(len(rows)))
    items.zero_grad()
    (items(torch.tensor(rows)) * slopes * factor).sum().backward()


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.7, 100.0])
def test_where_all_rows_are_used_it_is_adamw(max_grad_norm: float) -> None:
    rows = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0, 0, 3], [0, 1, 2, 3, 4, 5, 5]]
    mine, theirs = table(True), table(False)
    flags: dict[str, Any] = {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.2}
    lazy = RowAdam(mine.parameters(), **flags, max_grad_norm=max_grad_norm)
    exact = torch.optim.AdamW(theirs.parameters(), **flags)
    for step, some in enumerate(rows * 3):
        for items in (mine, theirs):
            use(items, some, factor=step + 1)
        assert mine.items.weight.grad is not None
        assert mine.items.weight.grad.is_sparse
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
        lazy.step()
        exact.step()
        torch.testing.assert_close(mine.table(), theirs.table(), atol=1e-12, rtol=1e-12)
        # The gradient is still there, as with any optimizer, and clipped.
        assert mine.items.weight.grad is not None
        torch.testing.assert_close(mine.items.weight.grad.to_dense(), theirs.items.weight.grad)


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=5), min_size=1, max_size=6))
def test_rows_by_definition(steps: list[list[int]]) -> None:
    items = table(True)
    lr, first, second, eps, decay = 0.1, 0.7, 0.9, 1e-3, 0.2
    optimizer = RowAdam(items.parameters(), lr, (first, second), eps, decay)
    values = items.table().detach().clone()
    averages, squares = torch.zeros_like(values), torch.zeros_like(values)
    for number, rows in enumerate(steps, start=1):
        use(items, rows)
        slopes = items.items.weight.grad.to_dense()  # type: ignore[union-attr]
        for row in set(rows):
            averages[row] = first * averages[row] + (1 - first) * slopes[row]
            squares[row] = second * squares[row] + (1 - second) * slopes[row] ** 2
            move = averages[row] / (1 - first**number) / ((squares[row] / (1 - second**number)).sqrt() + eps)
            values[row] = values[row] * (1 - lr * decay) - lr * move
        optimizer.step()
        torch.testing.assert_close(items.table().detach(), values, atol=1e-12, rtol=1e-12)


def test_dense_gradients_and_parameters_beside_it_are_adamws() -> None:
    mine, theirs = table(True), table(False)
    beside = [torch.nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2)]
    lazy = RowAdam([{"params": mine.parameters(), "lr": 0.2}, {"params": [beside[0]]}], max_grad_norm=0.5)
    exact = torch.optim.AdamW([{"params": theirs.parameters(), "lr": 0.2}, {"params": [beside[1]]}], weight_decay=0)
    for dense in (False, True, False):
        for items, own, optimizer in ((mine, beside[0], lazy), (theirs, beside[1], exact)):
            optimizer.zero_grad()
            looked = items.table() if dense else items(torch.arange(N))
            (looked.sin().sum() + own.square().sum()).backward()
        assert mine.items.weight.grad is not None
        assert mine.items.weight.grad.is_sparse != dense
        torch.nn.utils.clip_grad_norm_([*theirs.parameters(), beside[1]], 0.5)
        lazy.step()
        exact.step()
        torch.testing.assert_close(mine.table(), theirs.table(), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(*beside, atol=1e-12, rtol=1e-12)


def test_a_saved_state_continues() -> None:
    whole, cut = table(True), table(True)
    first, second = RowAdam(whole.parameters(), 0.1), RowAdam(cut.parameters(), 0.1)
    for items, optimizer in ((whole, first), (cut, second)):
        use(items, [1, 2])
        optimizer.step()
    again = RowAdam(cut.parameters(), 0.5)
    again.load_state_dict(second.state_dict())
    for items, optimizer in ((whole, first), (cut, again)):
        use(items, [2, 4, 4])
        optimizer.step()
    assert torch.equal(whole.table(), cut.table())


def test_a_schedule_a_closure_and_nothing_to_do() -> None:
    items = table(True)
    optimizer = RowAdam(items.parameters(), 0.1, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    before = items.table().detach().clone()
    optimizer.step()
    assert torch.equal(items.table(), before)

    def closure() -> float:
        use(items, [0])
        return 4.5

    assert optimizer.step(closure) == 4.5
    moved = items.table().detach().clone()
    assert (moved != before).any(dim=1).tolist() == [True, *[False] * 5]
    schedule.step()
    use(items, [1])
    optimizer.step()
    assert torch.equal(items.table(), moved)


@pytest.mark.parametrize("max_grad_norm", [-1.0, float("nan")])
def test_impossible_norms(max_grad_norm: float) -> None:
    with pytest.raises(BackboneError, match="max_grad_norm"):
        RowAdam(table(True).parameters(), max_grad_norm=max_grad_norm)
