"""FullSoftmax: the softmax over all items, exact, chunk by chunk."""

from typing import Any

import torch
from torch import Tensor

from llmrec.exceptions import BackboneError
from llmrec.losses.loss import ItemLoss, ItemVectors

# Scores that a loss holds at once, 16 MB in float32: small enough for a CPU's cache, large enough for its matmul.
CHUNK_SCORES = 1 << 22


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
    chunk_scores: int = CHUNK_SCORES,
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
        chunk_scores: how many scores are held at once; at least one token's N.

    Returns:
        A scalar in float32 at least.

    Raises:
        BackboneError: if `chunk_scores` is not positive.
    """
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
        for begin in range(0, len(targets), chunk):
            part = slice(begin, begin + chunk)
            states, wanted = queries[part], targets[part, None]
            scores = (states @ table.T).to(exact)  # (chunk, N)
            norms = scores.logsumexp(dim=1, keepdim=True)
            losses[part] = (norms - scores.gather(1, wanted))[:, 0]
            if for_queries is None and for_table is None:
                continue
            # The gradient of a token's loss with respect to its scores: weight × (softmax - onehot(target)).
            slopes = scores.sub_(norms).exp_()
            slopes.scatter_add_(1, wanted, slopes.new_full(wanted.shape, -1))
            slopes = slopes.mul_(weights[part, None]).to(table.dtype)
            if for_queries is not None:
                for_queries[part] = slopes @ table
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
