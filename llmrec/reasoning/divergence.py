"""How much the steps of a line of thought disagree about the next item: the sum of their pairwise KL divergences."""

from typing import Any

import torch
from torch import Tensor

from llmrec.exceptions import BackboneError
from llmrec.losses.full_softmax import CHUNK_SCORES
from llmrec.losses.products import in_wide_type


def step_divergence(
    queries: Tensor, table: Tensor, weights: Tensor | None = None, chunk_scores: int = CHUNK_SCORES
) -> Tensor:
    """The weighted sum over tokens of Σ_{i<j} KL(ŷ⁽ⁱ⁾ ‖ ŷ⁽ʲ⁾), ŷ⁽ᵏ⁾ = softmax(q_k · tableᵀ), never all of them held.

    Equal in value and gradient to the sum over all pairs of steps of `F.kl_div(log ŷ⁽ʲ⁾, log ŷ⁽ⁱ⁾, log_target=True)`.
    Gradients are made in the forward pass, chunk by chunk, as `full_softmax_loss` makes them.

    Args:
        queries: (T, K + 1, D), of the steps in their order.
        table: (N, D) the items.
        weights: (T,); None: 1 each.
        chunk_scores: how many scores are held at once; at least those of one token.

    Returns:
        A scalar in float32 at least, 0 or more; 0 for a single step, or without tokens.

    Raises:
        BackboneError: if `chunk_scores` is not positive.
    """
    if chunk_scores < 1:
        raise BackboneError(f"A divergence with {chunk_scores} scores at once has no value. Allow at least one.")
    queries, table, exact = in_wide_type(queries, table)
    weights = queries.new_ones(len(queries), dtype=exact) if weights is None else weights.to(exact)
    chunk = max(1, chunk_scores // max(1, len(table) * queries.shape[1]))
    with torch.autocast(queries.device.type, enabled=False):
        total: Tensor = _StepDivergence.apply(queries, table, weights.detach(), chunk, torch.is_grad_enabled())
    return total


class _StepDivergence(torch.autograd.Function):
    """With l_k = log ŷ⁽ᵏ⁾ and A_i = Σ_{j>i} (l_i - l_j), a token's sum is Σ_i ŷ⁽ⁱ⁾ · A_i. Its slope by the scores of
    step i is ŷ⁽ⁱ⁾ (A_i - ŷ⁽ⁱ⁾ · A_i) from the pairs in which i comes first, and Σ_{j<i} (ŷ⁽ⁱ⁾ - ŷ⁽ʲ⁾) from the rest.

    Step by step and in place: what this costs is how often the scores are gone through, not the products.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, table: Tensor, weights: Tensor, chunk: int, learning: bool) -> Tensor:
        exact, steps = weights.dtype, queries.shape[1]
        sums = torch.zeros_like(weights)
        for_queries = torch.zeros_like(queries) if learning and ctx.needs_input_grad[0] else None
        for_table = torch.zeros_like(table, dtype=exact) if learning and ctx.needs_input_grad[1] else None
        for begin in range(0, len(queries) if steps > 1 else 0, chunk):
            part = slice(begin, begin + chunk)
            states, counts = queries[part], weights[part, None]
            logs = [(states[:, step] @ table.T).to(exact).log_softmax(dim=1) for step in range(steps)]
            shares = [own.exp() for own in logs]
            later = torch.zeros_like(logs[0])  # Σ_{j>i} l_j
            means = []  # of the steps from the last to the first: (chunk, 1) ŷ⁽ⁱ⁾ · A_i
            for step in reversed(range(steps)):
                own = logs[step]
                ahead = logs[step] = (steps - 1 - step) * own - later  # A_i
                later += own
                means.append((shares[step][:, None] @ ahead[..., None])[:, 0])
            sums[part] = torch.cat(means, dim=1).sum(dim=1)
            if for_queries is None and for_table is None:
                continue
            earlier = torch.zeros_like(later)  # Σ_{j<i} ŷ⁽ʲ⁾
            for step, (slopes, share, mean) in enumerate(zip(logs, shares, reversed(means), strict=True)):
                slopes.add_(step - mean).mul_(share).sub_(earlier)
                earlier += share
                found = slopes.to(table.dtype)
                if for_queries is not None:
                    for_queries[part, step] = (found @ table) * counts
                if for_table is not None:
                    for_table += found.T @ (states[:, step] * counts).to(table.dtype)
        ctx.save_for_backward(for_queries, None if for_table is None else for_table.to(table.dtype))
        return (sums * weights).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        for_queries, for_table = (
            None if saved is None else saved * slope.to(saved.dtype) for saved in ctx.saved_tensors
        )
        return for_queries, for_table, None, None, None
