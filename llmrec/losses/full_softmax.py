"""FullSoftmax: the softmax over all items, exact, chunk by chunk."""

from typing import Any

import torch
from torch import Tensor

from llmrec.exceptions import BackboneError
from llmrec.losses.loss import ItemLoss, ItemVectors

# Scores that a loss holds at once, 16 MB in float32: small enough for a CPU's cache, large enough for its matmul.
CHUNK_SCORES = 1 << 22
_LEAST, _MOST = 1 << 21, 1 << 26  # of a CPU, by the table's size


class FullSoftmax(ItemLoss):
    """-log softmax(query · tableᵀ)[target], over all N items."""

    def forward(self, queries: Tensor, targets: Tensor, items: ItemVectors, weights: Tensor | None = None) -> Tensor:
        """See `ItemLoss.forward`."""
        return full_softmax_loss(queries, targets, items.table(), weights)


def full_softmax_loss(
    queries: Tensor,
    targets: Tensor,
    table: Tensor,
    weights: Tensor | None = None,
    chunk_scores: int | None = None,
) -> Tensor:
    """The weighted sum over tokens of -log softmax(query · tableᵀ)[target], without ever holding all T × N scores.

    Equal to `(F.cross_entropy(queries @ table.T, targets, reduction="none") * weights).sum()` in value and gradient.
    Gradients are made in the forward pass, chunk by chunk, so nothing is computed twice; they cannot be differentiated
    again. Products are in the wider type of queries and table, also under autocast (a small temperature makes large
    logits, of which bfloat16 keeps too little); sums are in float32 at least.

    Args:
        queries: (T, D); T may be 0.
        targets: (T,) rows of the table.
        table: (N, D).
        weights: (T,); None: 1 each.
        chunk_scores: how many scores are held at once; at least one token's N. None: `CHUNK_SCORES`; on a CPU as
            many as the table has numbers, but from 2²¹ to 2²⁶.

    Returns:
        A scalar in float32 at least.

    Raises:
        BackboneError: if `chunk_scores` is not positive.
    """
    if chunk_scores is None:
        # With fewer tokens at once than D, adding up the table's gradient would take longer than to make it.
        on_cpu = min(max(_LEAST, table.numel()), _MOST)
        chunk_scores = on_cpu if table.device.type == "cpu" else CHUNK_SCORES
    if chunk_scores < 1:
        raise BackboneError(f"A loss with {chunk_scores} scores at once has no value. Allow at least one.")
    wide = torch.promote_types(queries.dtype, table.dtype)
    exact = torch.promote_types(wide, torch.float32)
    weights = queries.new_ones(len(queries), dtype=exact) if weights is None else weights.to(exact)
    with torch.autocast(queries.device.type, enabled=False):
        # Inside the function gradients are always off, and its context does not say whether anyone wants them.
        loss: Tensor = _FullSoftmax.apply(
            queries.to(wide),
            targets,
            table.to(wide),
            weights,
            max(1, chunk_scores // len(table)),
            torch.is_grad_enabled(),
        )
    return loss


class _FullSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, targets: Tensor, table: Tensor, weights: Tensor, chunk: int, learning: bool
    ) -> Tensor:
        exact = weights.dtype
        losses = torch.empty_like(weights)
        for_queries = torch.empty_like(queries) if learning and ctx.needs_input_grad[0] else None
        for_table = torch.zeros_like(table, dtype=exact) if learning and ctx.needs_input_grad[2] else None
        room = queries.new_empty(min(chunk, len(targets)), len(table))  # pages that are new to a process cost time
        for begin in range(0, len(targets), chunk):
            part = slice(begin, begin + chunk)
            states, wanted, counts = queries[part], targets[part, None], weights[part, None]
            scores = torch.mm(states, table.T, out=room[: len(states)]).to(exact)  # (chunk, N)
            own, peaks = scores.gather(1, wanted), scores.amax(dim=1, keepdim=True)
            powers = scores.sub_(peaks).exp_()
            sums = powers.sum(dim=1, keepdim=True)
            losses[part] = (peaks - own + sums.log())[:, 0]
            if for_queries is None and for_table is None:
                continue
            # The gradient of a token's loss with respect to its scores: weight × (softmax - onehot(target)).
            slopes = powers.mul_(counts / sums).scatter_add_(1, wanted, -counts).to(table.dtype)
            if for_queries is not None:
                torch.mm(slopes, table, out=for_queries[part])
            if for_table is not None:
                for_table += slopes.T @ states
        ctx.save_for_backward(
            for_queries,
            None if for_table is None else for_table.to(table.dtype),
            losses if ctx.needs_input_grad[3] else None,
        )
        return (losses * weights).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        for_queries, for_table, for_weights = (
            None if saved is None else saved * slope.to(saved.dtype) for saved in ctx.saved_tensors
        )
        return for_queries, None, for_table, for_weights, None, None
