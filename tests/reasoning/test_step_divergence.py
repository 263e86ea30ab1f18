"""The divergence of steps against the KL divergences of torch, pair by pair, in value and gradient."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import BackboneError
from llmrec.reasoning.divergence import step_divergence


def definition(queries: torch.Tensor, table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    logs = (queries @ table.T).log_softmax(dim=-1)
    total = 0 * (queries.sum() + table.sum())  # where there is no pair, gradients are zeros
    for i, j in itertools.combinations(range(queries.shape[1]), 2):
        pair = F.kl_div(logs[:, j], logs[:, i], log_target=True, reduction="none").sum(dim=1)  # KL(i || j)
        total = total + (pair * weights).sum()
    return total


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), tokens=st.integers(0, 7), steps=st.integers(1, 5), items=st.integers(1, 9),
    chunk=st.integers(1, 200),
)  # fmt: skip
def test_it_is_the_sum_over_pairs(seed: int, tokens: int, steps: int, items: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn: Any = {"generator": generator, "dtype": torch.float64}
    queries = (2 * torch.randn(tokens, steps, 4, **drawn)).requires_grad_()
    table = torch.randn(items, 4, **drawn).requires_grad_()
    weights = torch.rand(tokens, **drawn)
    expected = definition(queries, table, weights)
    found = step_divergence(queries, table, weights, chunk)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    assert float(found.detach()) >= -1e-12
    slopes = [torch.autograd.grad(3 * one, (queries, table)) for one in (found, expected)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_equal_steps_do_not_diverge_and_one_has_no_pair() -> None:
    query = torch.randn(3, 1, 4)
    table = torch.randn(6, 4)
    assert float(step_divergence(query, table)) == 0
    assert float(step_divergence(query.expand(-1, 3, -1), table)) == pytest.approx(0, abs=1e-6)
    # KL of (3/4, 1/4) from (1/2, 1/2), and not the other way round.
    logits = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64) * torch.tensor(3.0).double().log()
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    assert float(step_divergence(logits, torch.eye(2).double())) == pytest.approx(float(expected))


def test_half_precision_is_summed_in_full() -> None:
    queries, table = torch.randn(5, 3, 8), torch.randn(20, 8)
    found = step_divergence(queries.bfloat16(), table.bfloat16())
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(step_divergence(queries, table)), rel=0.1)
    with pytest.raises(BackboneError, match="0 scores at once"):
        step_divergence(queries, table, chunk_scores=0)
