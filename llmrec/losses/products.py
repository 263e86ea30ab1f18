"""Inner products of queries and items with gradients, of which never all are held at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def in_wide_type(queries: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both in the wider of their types, and the type of sums: float32 at least."""
    wide = torch.promote_types(queries.dtype, vectors.dtype)
    return queries.to(wide), vectors.to(wide), torch.promote_types(wide, torch.float32)


def distinct(rows: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """The rows that occur in `rows` (…), each once, in order: (U,); and where each stands there: (…).

    As `rows.unique(return_inverse=True)`, without sorting millions of draws from a catalogue of thousands.
    """
    there = torch.zeros(num_items, dtype=torch.bool, device=rows.device)
    there[rows.flatten()] = True
    return there.nonzero()[:, 0], (there.cumsum(0) - 1)[rows]


def own_products(queries: Tensor, vectors: Tensor, places: Tensor) -> Tensor:
    """The product of each query with candidates of its own; (T, C, D) is never there, neither forwards nor backwards.

    Args:
        queries: (T, D).
        vectors: (U, D).
        places: (T, C) int64 rows of `vectors`.

    Returns:
        (T, C) in the wider type, float32 at least.
    """
    queries, vectors, exact = in_wide_type(queries, vectors)
    with torch.autocast(queries.device.type, enabled=False):
        products: Tensor = _OwnProducts.apply(queries.to(exact), vectors.to(exact), places)
    return products


class _OwnProducts(torch.autograd.Function):
    """A bag of vectors with weights w is Σ_c w_c v_c, made without its terms. The slope of ⟨q, Σ_c w_c v_c⟩ by w_c is
    ⟨q, v_c⟩: the products come from the bag's backward pass, and their own backward from its forward."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, vectors: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(queries, vectors, places)
        with torch.enable_grad():
            shares = torch.zeros_like(places, dtype=queries.dtype).requires_grad_()
            bags = F.embedding_bag(places, vectors.detach(), mode="sum", per_sample_weights=shares)
        products: Tensor = torch.autograd.grad(bags, shares, queries)[0]
        return products

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        queries, vectors, places = ctx.saved_tensors
        with torch.enable_grad():
            vectors = vectors.detach().requires_grad_(ctx.needs_input_grad[1])
            bags = F.embedding_bag(places, vectors, mode="sum", per_sample_weights=slopes)
        for_vectors = torch.autograd.grad(bags, vectors, queries)[0] if ctx.needs_input_grad[1] else None
        return bags.detach(), for_vectors, None


def logsumexp_of_others(
    queries: Tensor,
    columns: Tensor,
    biases: Tensor,
    column_items: Tensor,
    targets: Tensor,
    chunk_scores: int,
) -> Tensor:
    """log Σ exp(query · column + bias) over the columns that hold another item than the query's target.

    Args:
        queries: (T, D).
        columns: (M, D) vectors of the negatives that all queries share.
        biases: (M,) added to the products; without gradient.
        column_items: (M,) their item rows.
        targets: (T,) item rows.
        chunk_scores: how many products are held at once; at least one query's M.

    Returns:
        (T,) in the wider type, float32 at least; -inf where no column is left.
    """
    queries, columns, exact = in_wide_type(queries, columns)
    with torch.autocast(queries.device.type, enabled=False):
        sums: Tensor = _LogSumExp.apply(
            queries, columns, biases.to(exact), column_items, targets, max(1, chunk_scores // max(1, len(columns)))
        )
    return sums


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, columns: Tensor, biases: Tensor, items: Tensor, targets: Tensor, chunk: int
    ) -> Tensor:
        sums = torch.empty(len(queries), dtype=biases.dtype, device=queries.device)
        for begin in range(0, len(queries), chunk):
            part = slice(begin, begin + chunk)
            sums[part] = _others(queries[part], columns, biases, items, targets[part]).logsumexp(dim=1)
        ctx.save_for_backward(queries, columns, biases, items, targets, sums)
        ctx.chunk = chunk
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        queries, columns, biases, items, targets, sums = ctx.saved_tensors
        for_queries = torch.empty_like(queries)
        for_columns = torch.zeros_like(columns, dtype=biases.dtype)
        # Where no column is left every score is -inf, and exp(-inf - 0) is the 0 that it should be.
        sums = sums.masked_fill(sums.isneginf(), 0)
        for begin in range(0, len(queries), ctx.chunk):
            part = slice(begin, begin + ctx.chunk)
            scores = _others(queries[part], columns, biases, items, targets[part])
            shares = scores.sub_(sums[part, None]).exp_().mul_(slopes[part, None]).to(columns.dtype)
            for_queries[part] = shares @ columns
            for_columns += shares.T @ queries[part]
        return for_queries, for_columns.to(columns.dtype), None, None, None, None


def _others(queries: Tensor, columns: Tensor, biases: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """(t, M) products with biases, -inf where the column is the target."""
    scores = (queries @ columns.T).to(biases.dtype) + biases
    return scores.masked_fill_(targets[:, None] == items, -torch.inf)
