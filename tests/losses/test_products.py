"""Products in bounded memory against plain float64 definitions, gradients too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.losses.products import distinct, logsumexp_of_others, own_products


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, 9), max_size=30), wide=st.booleans())
def test_distinct_is_unique(rows: list[int], wide: bool) -> None:
    given_rows = torch.tensor(rows, dtype=torch.int64)
    given_rows = given_rows[:, None].expand(-1, 2) if wide else given_rows
    expected, places = given_rows.unique(return_inverse=True)
    found, found_places = distinct(given_rows, 10)
    assert torch.equal(found, expected)
    assert torch.equal(found_places, places.view_as(given_rows))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(0, 9), candidates=st.integers(1, 6), vectors=st.integers(1, 5))
def test_own_products(seed: int, tokens: int, candidates: int, vectors: int) -> None:
    torch.manual_seed(seed)
    queries = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    table = torch.randn(vectors, 3, dtype=torch.float64, requires_grad=True)
    places = torch.randint(vectors, (tokens, candidates))
    slopes = torch.randn(tokens, candidates, dtype=torch.float64)
    expected = (table[places] * queries[:, None]).sum(dim=-1)
    found = own_products(queries, table, places)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    exact = torch.autograd.grad(expected, (queries, table), slopes)
    for mine, definition in zip(torch.autograd.grad(found, (queries, table), slopes), exact, strict=True):
        torch.testing.assert_close(mine, definition, atol=1e-12, rtol=1e-12)


def test_own_products_of_frozen_parts_and_without_gradients() -> None:
    queries, table = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    places = torch.randint(5, (4, 2))
    both = torch.autograd.grad(own_products(queries, table, places).sum(), (queries, table))
    torch.testing.assert_close(
        torch.autograd.grad(own_products(queries, table.detach(), places).sum(), queries)[0], both[0]
    )
    torch.testing.assert_close(
        torch.autograd.grad(own_products(queries.detach(), table, places).sum(), table)[0], both[1]
    )
    with torch.no_grad():
        alone = own_products(queries, table, places)
    assert not alone.requires_grad
    torch.testing.assert_close(alone, own_products(queries, table, places).detach())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(0, 9), columns=st.integers(0, 7), chunk=st.integers(1, 40))
def test_logsumexp_of_others(seed: int, tokens: int, columns: int, chunk: int) -> None:
    torch.manual_seed(seed)
    queries = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(columns, 3, dtype=torch.float64, requires_grad=True)
    biases = torch.randn(columns, dtype=torch.float64)
    items, targets = torch.randint(4, (columns,)), torch.randint(4, (tokens,))
    found = logsumexp_of_others(queries, vectors, biases, items, targets, chunk)
    # Token by token, over the columns that are left.
    left = [[column for column in range(columns) if items[column] != target] for target in targets.tolist()]
    alone = torch.tensor([not some for some in left], dtype=torch.bool)
    assert torch.equal(found.isneginf(), alone)
    scores = [(vectors[some] @ queries[token] + biases[some]).logsumexp(0) for token, some in enumerate(left) if some]
    expected = torch.stack(scores) if scores else queries.sum(dim=1)[:0]
    torch.testing.assert_close(found[~alone], expected, atol=1e-12, rtol=1e-12)
    slopes = torch.randn(tokens, dtype=torch.float64)
    # Where nothing is left, softplus sends back a slope of 0.
    slopes[alone] = 0
    mine = torch.autograd.grad(found, (queries, vectors), slopes)
    exact = torch.autograd.grad(
        expected, (queries, vectors), slopes[~alone], materialize_grads=True, allow_unused=True
    )
    for one, definition in zip(mine, exact, strict=True):
        torch.testing.assert_close(one, definition, atol=1e-12, rtol=1e-12)


def test_scores_are_never_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrec.losses import products

    sizes = []
    real = products._others

    def spy(queries: torch.Tensor, columns: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        sizes.append((len(queries), len(columns)))
        return real(queries, columns, *rest)

    monkeypatch.setattr(products, "_others", spy)
    queries, columns = torch.randn(25, 3, requires_grad=True), torch.randn(9, 3)
    items, targets = torch.arange(9), torch.zeros(25, dtype=torch.int64)
    logsumexp_of_others(queries, columns, torch.zeros(9), items, targets, 95).sum().backward()
    assert sizes == [(10, 9), (10, 9), (5, 9)] * 2


def test_halves_are_summed_in_single() -> None:
    queries, table = torch.randn(4, 3).bfloat16(), torch.randn(5, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = own_products(queries, table, torch.arange(5).expand(4, -1))
        sums = logsumexp_of_others(queries, table.float(), torch.zeros(5), torch.arange(5), torch.full((4,), 9), 99)
    assert found.dtype == sums.dtype == torch.float32
    exact = queries.double() @ table.double().T
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sums.double(), exact.logsumexp(dim=1), atol=1e-6, rtol=1e-6)
