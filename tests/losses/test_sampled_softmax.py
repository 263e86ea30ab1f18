"""Sampled softmaxes against float64 loops over the same draws; their tendency to the full softmax; two processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmrec.losses.loss import ItemLoss
from llmrec.losses.negatives import NegativeSampler
from llmrec.losses.sampled_softmax import OwnNegativesSoftmax, SharedNegativesSoftmax, all_rows

N, D, T = 8, 3, 6
COUNTS = np.array([9, 0, 4, 1, 30, 2, 2, 7])
SHARES = np.maximum(COUNTS, 1) / np.maximum(COUNTS, 1).sum()


class Table:
    """Candidates of a loss, as they are."""

    def __init__(self, seed: int, num_items: int = N) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(num_items, D, dtype=torch.float64, generator=generator).requires_grad_()
        self.num_items = num_items

    def table(self) -> Tensor:
        return self.weight

    def vectors(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.weight)


def batch(seed: int, tokens: int = T, num_items: int = N) -> tuple[Tensor, Tensor, Table, Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)
    queries = torch.randn(tokens, D, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(num_items, (tokens,), generator=generator)
    return queries, targets, Table(seed, num_items), torch.rand(tokens, dtype=torch.float64, generator=generator)


def by_loops(
    queries: Tensor, targets: Tensor, items: Table, weights: Tensor, negatives: list[list[tuple[int, float]]]
) -> Tensor:
    """Token by token: -s_t + log(exp(s_t) + Σ exp(s_c) / E_c) over its (c, E_c) that are not t."""
    total = torch.zeros((), dtype=torch.float64)
    for query, target, weight, own in zip(queries, targets.tolist(), weights, negatives, strict=True):
        wanted = (query @ items.weight[target]).exp()
        others = [(query @ items.weight[row]).exp() / expected for row, expected in own if row != target]
        total = total + weight * -(wanted / torch.stack([wanted, *others]).sum()).log()
    return total


def check(found: Tensor, expected: Tensor, queries: Tensor, items: Table) -> None:
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    exact = torch.autograd.grad(3 * expected, (queries, items.weight))
    for mine, definition in zip(torch.autograd.grad(3 * found, (queries, items.weight)), exact, strict=True):
        torch.testing.assert_close(mine, definition, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("log_q", [True, False])
@pytest.mark.parametrize("popular", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_own_negatives(log_q: bool, popular: bool, seed: int) -> None:
    queries, targets, items, weights = batch(seed)
    sampler = NegativeSampler(COUNTS if popular else np.ones_like(COUNTS))
    torch.manual_seed(seed)
    drawn = sampler.draw_others(targets, 5).tolist()
    shares = SHARES if popular else np.full(N, 1 / N)
    negatives = [
        [(row, 5 * shares[row] / (1 - shares[target]) if log_q else 1.0) for row in rows]
        for target, rows in zip(targets.tolist(), drawn, strict=True)
    ]
    torch.manual_seed(seed)
    found = OwnNegativesSoftmax(sampler, 5, log_q)(queries, targets, items, weights)
    check(found, by_loops(queries, targets, items, weights, negatives), queries, items)


@pytest.mark.parametrize("log_q", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "popularity", "in_batch", "mixed"])
@pytest.mark.parametrize("tokens", [1, 2, T])
def test_shared_negatives(log_q: bool, kind: str, tokens: int) -> None:
    queries, targets, items, weights = batch(7, tokens)
    sampler = NegativeSampler(COUNTS if kind == "popularity" else np.ones_like(COUNTS))
    torch.manual_seed(1)
    drawn = [] if kind == "in_batch" else sampler.draw(5).tolist()
    others = targets.tolist() if kind in ("in_batch", "mixed") else []
    from_draws = SHARES if kind == "popularity" else np.full(N, 1 / N)
    expected = len(drawn) * from_draws + max(0, len(others) - 1) * SHARES
    own = [(row, float(expected[row]) if log_q else 1.0) for row in drawn + others]
    loss = SharedNegativesSoftmax(
        None if kind == "in_batch" else sampler,
        5,
        NegativeSampler(COUNTS) if kind in ("in_batch", "mixed") else None,
        log_q,
        chunk_scores=13,
    )
    torch.manual_seed(1)
    found = loss(queries, targets, items, weights)
    check(found, by_loops(queries, targets, items, weights, [own] * tokens), queries, items)


def losses_of(log_q: bool) -> dict[str, ItemLoss]:
    uniform, popular = NegativeSampler(np.ones_like(COUNTS)), NegativeSampler(COUNTS)
    return {
        "own": OwnNegativesSoftmax(popular, 4, log_q),
        "shared": SharedNegativesSoftmax(popular, 4, None, log_q),
        "in_batch": SharedNegativesSoftmax(None, 4, popular, log_q),
        "mixed": SharedNegativesSoftmax(uniform, 4, popular, log_q),
    }


@pytest.mark.parametrize("log_q", [True, False])
@pytest.mark.parametrize("name", ["own", "shared", "in_batch", "mixed"])
def test_no_token_and_no_weights(name: str, log_q: bool) -> None:
    queries, targets, items, _ = batch(0, 0)
    loss = losses_of(log_q)[name]
    nothing = loss(queries, targets, items)
    assert nothing.item() == 0
    for slope in torch.autograd.grad(nothing, (queries, items.weight)):
        assert not slope.any()
    queries, targets, items, _ = batch(0)
    torch.manual_seed(0)
    alone = loss(queries, targets, items)
    torch.manual_seed(0)
    torch.testing.assert_close(alone, loss(queries, targets, items, torch.ones(T)))
    assert alone.dtype == torch.float64
    halves = loss(queries.bfloat16(), targets, items, torch.ones(T).bfloat16())
    assert halves.dtype == torch.float64


def test_equal_targets_have_no_negatives_in_the_batch() -> None:
    queries, _, items, _ = batch(0)
    targets = torch.full((T,), 4)
    found = losses_of(True)["in_batch"](queries, targets, items)
    assert found.item() == 0
    for slope in torch.autograd.grad(found, (queries, items.weight)):
        assert not slope.any()


def full(queries: Tensor, targets: Tensor, items: Table) -> Tensor:
    return F.cross_entropy(queries @ items.weight.T, targets, reduction="sum")


@pytest.mark.parametrize("kind", ["own uniform", "own popular", "shared uniform", "shared popular", "mixed"])
def test_corrected_losses_tend_to_the_full_softmax(kind: str) -> None:
    queries, targets, items, _ = batch(3)
    with torch.no_grad():
        exact = full(queries, targets, items).item()

        def mistake(number: int) -> float:
            sampler = NegativeSampler(COUNTS if "popular" in kind else np.ones_like(COUNTS))
            torch.manual_seed(number)
            if kind.startswith("own"):
                loss: ItemLoss = OwnNegativesSoftmax(sampler, number)
            else:
                loss = SharedNegativesSoftmax(sampler, number, NegativeSampler(COUNTS) if kind == "mixed" else None)
            return abs(loss(queries, targets, items).item() - exact)

        assert mistake(200_000) < 0.01 * exact
        assert np.mean([mistake(number) for number in range(5, 25)]) > 0.02 * exact


@pytest.mark.parametrize("name", ["own", "shared", "mixed"])
def test_the_sum_in_a_corrected_loss_is_unbiased(name: str) -> None:
    # exp(loss) - 1 = Σ_c exp(s_c) / E_c / exp(s_t), whose expectation is the full softmax's.
    queries, targets, items, _ = batch(5, 1)
    with torch.no_grad():
        exact = math.exp(full(queries, targets, items).item()) - 1
        torch.manual_seed(0)
        loss = losses_of(True)[name]
        found = np.array([math.exp(loss(queries, targets, items).item()) - 1 for _ in range(3000)])
    assert abs(found.mean() - exact) < 5 * found.std() / math.sqrt(len(found))
    assert found.std() > 0.01 * exact


def test_in_batch_estimates_are_unbiased_over_batches() -> None:
    # The first token's estimate, over batches whose other targets come in the shares of the counts.
    queries, _, items, _ = batch(6, 3)
    loss = losses_of(True)["in_batch"]
    sampler = NegativeSampler(COUNTS)
    torch.manual_seed(0)
    first = torch.tensor([1.0, 0, 0])
    with torch.no_grad():
        found = np.array([
            math.exp(loss(queries, torch.cat([torch.tensor([2]), sampler.draw(2)]), items, first).item()) - 1
            for _ in range(4000)
        ])  # fmt: skip
        exact = math.exp(full(queries[:1], torch.tensor([2]), items).item()) - 1
    assert abs(found.mean() - exact) < 5 * found.std() / math.sqrt(len(found))


def test_gathering_in_one_process_changes_nothing() -> None:
    rows = torch.tensor([3, 1, 3])
    assert torch.equal(all_rows(rows), rows)


def _in_two_processes(folder: Path) -> None:
    """Tokens 0..3 are the first process's, 4..5 the second's; then all the first's."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {}
    for name, mine in (("uneven", slice(0, 4) if rank == 0 else slice(4, 6)), ("empty", slice(0, 6 * (1 - rank)))):
        for kind in ("in_batch", "mixed"):
            queries, targets, items, weights = batch(9)
            loss = _crossing(kind)
            torch.manual_seed(rank)
            total = loss(queries[mine], targets[mine], items, weights[mine])
            slopes = torch.autograd.grad(total, (queries, items.weight))
            found[f"{name} {kind}"] = [total.item(), *(slope.tolist() for slope in slopes)]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def _crossing(kind: str) -> SharedNegativesSoftmax:
    sampler = NegativeSampler(np.ones_like(COUNTS)) if kind == "mixed" else None
    return SharedNegativesSoftmax(sampler, 3, NegativeSampler(COUNTS), cross_process=True)


def test_two_processes_together_are_one_with_the_joined_batch(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(tmp_path)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name in first:
        queries, targets, items, weights = batch(9)
        drawn: list[int] = []
        if name.endswith("mixed"):
            for rank in (0, 1):
                torch.manual_seed(rank)
                drawn += NegativeSampler(np.ones_like(COUNTS)).draw(3).tolist()
        expected = len(drawn) / N + (T - 1) * SHARES
        own = [(row, float(expected[row])) for row in drawn + targets.tolist()]
        exact = by_loops(queries, targets, items, weights, [own] * T)
        slopes = torch.autograd.grad(exact, (queries, items.weight))
        for mine, theirs, definition in zip(first[name], second[name], [exact.detach(), *slopes], strict=True):
            together = torch.tensor(mine, dtype=torch.float64) + torch.tensor(theirs, dtype=torch.float64)
            torch.testing.assert_close(together, definition, atol=1e-11, rtol=1e-11)


if __name__ == "__main__":
    _in_two_processes(Path(sys.argv[1]))
