"""Cross-entropy of a linear layer's products, which are never held as a whole.

For M tokens and V words the last layer of a language model makes (M, V) numbers. Here they are made a piece at a time,
and each piece gives its part of the loss and of the gradients at once. Values and gradients are those of cross-entropy
over all logits, or over a range of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmrec.exceptions import DataError

# So many logits are held at once: a piece that stays near the processor's cache and still feeds its matrix unit.
PIECE = 1 << 22
_FEWEST_TOKENS = 256  # in a piece; with fewer, adding up the head's gradient would take as long as its product


@dataclass(frozen=True)
class Shape:
    """What a model makes of its head's products z: logits = softcap * tanh(scale * z / softcap), or scale * z.

    Attributes:
        scale: factor; Cohere's and Granite's models have one.
        softcap: bound of the logits' size; Gemma 2 has one.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, products: Tensor) -> Tensor:
        """The logits, in place."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        return products if self.softcap is None else products.div_(self.softcap).tanh_().mul_(self.softcap)


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    shape: Shape | None = None,
    trained: tuple[Tensor, Tensor] | None = None,
    piece: int = PIECE,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits `hidden @ weight.T + bias`, which are never held as a whole.

    The gradients are made beside the values, while a piece of logits is at hand: nothing is computed twice. They are
    scaled in place by the backward pass, so that there can be only one.

    Args:
        hidden: (M, D), states that predict.
        weight: (V, D), the head's; in float32 below autocast, it is cast as a linear layer would cast it.
        targets: (M,), from 0 to V - 1.
        bias: (V,), the head's.
        shape: what makes logits of products; nothing by default.
        trained: rows (R, D) that stand in `weight` already, and their places (R,): they get gradients instead of
            `weight`, which costs what R rows cost.
        piece: logits that are held at once.

    Returns:
        The sum, float32 (or float64 where the computation is in float64), and each token's loss (M,), detached.
    """
    rows, places = trained if trained is not None else (None, None)
    total, each = _CrossEntropy.apply(
        hidden, weight, bias, rows, places, targets, shape or Shape(), piece, torch.is_grad_enabled()
    )
    return total, each


def id_range_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_ids: Tensor,
    bias: Tensor | None = None,
    shape: Shape | None = None,
    piece: int = PIECE,
) -> tuple[Tensor, Tensor]:
    """`token_loss` with a softmax over `token_ids` alone: the head's other rows are not even multiplied.

    It is the negative log-likelihood of the target given that the next token is one of `token_ids`.

    Args:
        hidden, weight, bias, shape, piece: as for `token_loss`.
        targets: (M,), each of them in `token_ids`.
        token_ids: (C,), ascending without repeats.

    Raises:
        DataError: if a target is none of `token_ids`.
    """
    rows = weight.index_select(0, token_ids)
    offsets = None if bias is None else bias.index_select(0, token_ids)
    return token_loss(hidden, rows, columns_of(targets, token_ids), offsets, shape, piece=piece)


def columns_of(targets: Tensor, token_ids: Tensor) -> Tensor:
    """The places (M,) of `targets` among the ascending `token_ids`; raises DataError for one that is not there."""
    found = torch.searchsorted(token_ids, targets).clamp_(max=len(token_ids) - 1)
    other = token_ids[found] != targets
    if bool(other.any()):
        raise DataError(
            f"The token {int(targets[other][0])} is a label and is no token of a semantic ID. "
            "Rows that answer with text need the loss vocabulary 'all'."
        )
    return found


class _CrossEntropy(torch.autograd.Function):
    """The sum and the values of the tokens' cross-entropy; see `token_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        places: Tensor | None,
        targets: Tensor,
        shape: Shape,
        piece: int,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        wanted = [differentiable and needed for needed in ctx.needs_input_grad[:4]]
        cast = weight.to(dtype)
        each = hidden.new_empty(len(hidden), dtype=exact)
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight: Tensor | None = None
        of_bias = torch.zeros(weight.shape[0], dtype=exact, device=weight.device) if wanted[2] else None
        of_rows = (
            torch.zeros(rows.shape, dtype=exact, device=weight.device) if rows is not None and wanted[3] else None
        )
        step = max(_FEWEST_TOKENS, piece // max(1, weight.shape[0]))
        for begin in range(0, len(hidden), step):
            end = min(begin + step, len(hidden))
            states = hidden[begin:end].to(dtype)
            products = states @ cast.T
            if bias is not None:
                products += bias.to(dtype)
            logits = shape.apply(products.to(exact))
            target = targets[begin:end, None]
            steepness = None
            if shape.softcap is not None and any(wanted):
                steepness = 1 - (logits / shape.softcap).square_()  # of the tanh
            logits -= logits.amax(1, keepdim=True)
            at_target = logits.gather(1, target)
            mass = logits.exp_().sum(1, keepdim=True)
            each[begin:end] = (mass.log() - at_target)[:, 0]
            if not any(wanted):
                continue
            slope = logits.div_(mass)
            slope.scatter_add_(1, target, -torch.ones_like(at_target))
            if steepness is not None:
                slope *= steepness
            if shape.scale != 1.0:
                slope *= shape.scale
            if of_bias is not None:
                of_bias += slope.sum(0)
            slope = slope.to(dtype)
            if of_hidden is not None:
                of_hidden[begin:end] = slope @ cast
            if wanted[1]:
                of_weight = _add_product(of_weight, slope.T, states, exact)
            if wanted[3] and places is not None:
                of_rows = _add_product(of_rows, slope.index_select(1, places).T, states, exact)
        if not len(hidden):  # wrappers wait for a gradient of each weight, be it zero
            of_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if wanted[1] else None
            of_rows = torch.zeros_like(rows, dtype=exact) if rows is not None and wanted[3] else None
        # As attributes and not by save_for_backward, because the backward pass changes them in place.
        ctx.gradients = [of_hidden, of_weight, of_bias, of_rows]
        ctx.dtypes = [tensor if tensor is None else tensor.dtype for tensor in (hidden, weight, bias, rows)]
        ctx.spent = False
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("This loss was differentiated before. Compute it again for a second backward pass.")
        found = [
            gradient if gradient is None else gradient.mul_(upstream[0]).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients, ctx.spent = None, True
        return (*found, None, None, None, None, None)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right in place; sums of half-precision products are kept in `dtype`."""
    if total is None:
        return (left @ right).to(dtype)
    if left.dtype == dtype:
        return total.addmm_(left, right)
    total += left @ right
    return total
