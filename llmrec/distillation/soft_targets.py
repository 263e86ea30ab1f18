"""The divergence of a student's softmax from its teacher's, chunk by chunk: no logits are held as a whole.

With temperature T, of logits z of the student and z' of the teacher over the same n choices:

    q = softmax(z / T),  p = softmax(z' / T)
    forward: KL(p ‖ q) = Σ p (log p - log q),   dKL/dz = (q - p) / T
    reverse: KL(q ‖ p) = Σ q (log q - log p),   dKL/dz = q (log q - log p - KL) / T

Values and gradients are made together from these closed forms, so that both are exactly 0 where z and z' are equal (of
a table of probabilities, which has no z', up to rounding).
What is returned is T² KL (Hinton, Vinyals and Dean 2015, arXiv 1503.02531), whose gradient does not shrink with T.
"""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from llmrec.training.loss import PIECE, Shape

Direction = Literal["forward", "reverse"]


class Teaching(Protocol):
    """What a teacher says at M places."""

    def log_probabilities(self, begin: int, end: int, temperature: float, dtype: torch.dtype) -> Tensor:
        """(end - begin, n) log p at places begin … end - 1, at a temperature; -inf for what it holds impossible."""
        ...

    def divergence(
        self, own: Tensor, begin: int, end: int, temperature: float, direction: Direction
    ) -> tuple[Tensor, Tensor]:
        """The divergence (c,) of a student's log q (c, n) from these c places, and its slope (c, n), as `divergence`.

        `own` may be written over; its type is that of all sums, also under autocast.
        """
        return divergence(own, self.log_probabilities(begin, end, temperature, own.dtype), direction)


class LinearTeaching(Teaching):
    """Teaching by states and a head: softmax(shape(states · weightᵀ + bias) / T).

    Attributes:
        states: (M, D').
        weight: (n, D').
    """

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None = None, shape: Shape | None = None) -> None:
        self.states, self.weight = states.detach(), weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.shape = shape or Shape()

    def log_probabilities(self, begin: int, end: int, temperature: float, dtype: torch.dtype) -> Tensor:
        """See `Teaching.log_probabilities`."""
        logits = _logits(self.states[begin:end], self.weight, self.bias, self.shape, dtype)
        return _softened(logits, temperature)


def soft_target_loss(
    states: Tensor,
    weight: Tensor,
    teaching: Teaching,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    shape: Shape | None = None,
    weights: Tensor | None = None,
    direction: Direction = "forward",
    piece: int = PIECE,
) -> Tensor:
    """The weighted sum over M places of T² KL between teacher and student, over n choices.

    Args:
        states: (M, D), the student's, of which `weight` makes logits; M may be 0.
        weight: (n, D), the head's rows of the choices, or the items' vectors.
        teaching: the teacher at the same places, over the same choices in the same order.
        temperature: T, above 0.
        bias: (n,), the head's.
        shape: what makes logits of the head's products; nothing by default.
        weights: (M,) what each place counts; None: 1 each.
        direction: "forward" KL(teacher ‖ student), which covers all that the teacher holds possible; "reverse"
            KL(student ‖ teacher), which keeps to what the teacher holds probable.
        piece: logits that are held at once, at least one place's.

    Returns:
        A scalar, float32 at least, that can be differentiated once.
    """
    wanted = torch.ones(len(states), device=states.device) if weights is None else weights
    total: Tensor = _SoftTargets.apply(
        states,
        weight,
        bias,
        wanted,
        teaching,
        temperature,
        shape or Shape(),
        direction,
        max(1, piece // max(1, len(weight))),
        torch.is_grad_enabled(),
    )
    return total


class _SoftTargets(torch.autograd.Function):
    """See `soft_target_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        teaching: Teaching,
        temperature: float,
        shape: Shape,
        direction: Direction,
        step: int,
        differentiable: bool,
    ) -> Tensor:
        exact = torch.promote_types(torch.promote_types(states.dtype, weight.dtype), torch.float32)
        needed = [differentiable and one for one in ctx.needs_input_grad[:3]]
        for_states = torch.zeros(states.shape, dtype=exact, device=states.device) if needed[0] else None
        for_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if needed[1] else None
        for_bias = torch.zeros(len(weight), dtype=exact, device=weight.device) if needed[2] else None
        total = torch.zeros((), dtype=exact, device=states.device)
        for begin in range(0, len(states), step):
            end = min(begin + step, len(states))
            some = states[begin:end]
            logits = _logits(some, weight, bias, shape, exact)
            own = _softened(logits, temperature)
            each, slope = teaching.divergence(own, begin, end, temperature, direction)
            counts = weights[begin:end].to(exact)
            total += temperature**2 * (each * counts).sum()
            if not any(needed):
                continue
            slope *= temperature * counts[:, None]  # T² · 1/T
            if shape.softcap is not None:
                slope *= 1 - (logits / shape.softcap).square()  # of the tanh
            if shape.scale != 1.0:
                slope *= shape.scale
            if for_states is not None:
                for_states[begin:end] = slope @ weight.to(exact)
            if for_weight is not None:
                for_weight.addmm_(slope.T, some.to(exact))
            if for_bias is not None:
                for_bias += slope.sum(0)
        ctx.gradients = [for_states, for_weight, for_bias]
        ctx.dtypes = [states.dtype, weight.dtype, None if bias is None else bias.dtype]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return (*found, *(None,) * 7)


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, dtype: torch.dtype) -> Tensor:
    """(c, n) logits in `dtype`, also under autocast: what teacher and student make alike must come out alike."""
    with torch.autocast(states.device.type, enabled=False):
        products = states.to(dtype) @ weight.to(dtype).T
        if bias is not None:
            products = products + bias.to(dtype)
    return shape.apply(products)


def _softened(logits: Tensor, temperature: float) -> Tensor:
    """(c, n) log-probabilities at a temperature, in new memory."""
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(dim=-1)


def divergence(own: Tensor, other: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """(c,) the divergence of each place, and its slope (c, n) with respect to the student's logits over T.

    Args:
        own: (c, n) log q, the student's.
        other: (c, n) log p, the teacher's.
        direction: see `soft_target_loss`.

    What has no probability adds nothing to a sum; of the reverse direction it adds infinity where the student holds it
    possible, which a divergence from a truncated teacher would: that is for the caller to refuse.
    """
    if direction == "reverse":
        q = own.exp()
        gap = own - other
        each = torch.where(q > 0, q * gap, 0.0).sum(dim=-1)
        return each, torch.where(q > 0, q * (gap - each[:, None]), 0.0)
    p = other.exp()
    each = torch.where(p > 0, p * (other - own), 0.0).sum(dim=-1)
    return each, own.exp() - p
