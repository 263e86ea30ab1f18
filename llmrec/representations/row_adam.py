"""RowAdam: AdamW that leaves alone the rows of a table that a step did not use."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from llmrec.exceptions import BackboneError


class RowAdam(torch.optim.AdamW):
    """AdamW, which for sparse gradients updates only the rows that they name ("lazy Adam").

    A row's moments, its weight decay and its value stay as they are in steps that do not use it, so a step costs what
    its rows cost and not what the table holds. Where every row is used in every step, and for dense gradients, it is
    AdamW. A parameter may have sparse gradients in some steps and dense ones in others.

    `torch.nn.utils.clip_grad_norm_`, which transformers' Trainer uses, does not take sparse gradients, so clipping is
    done here: give the Trainer `max_grad_norm` 0. NCCL does not reduce sparse gradients across processes; gloo does.

    Args:
        parameters: as of any optimizer of torch.
        lr: learning rate.
        betas: of the moments.
        eps: of the denominator.
        weight_decay: decoupled, as AdamW's.
        max_grad_norm: all gradients together are scaled down to this Euclidean norm; 0: they are not.

    Raises:
        BackboneError: if max_grad_norm is negative or no number.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
    ) -> None:
        if not max_grad_norm >= 0:
            raise BackboneError(f"max_grad_norm is {max_grad_norm}. Give a positive number, or 0 for no clipping.")
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gradients are clipped in place."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        sparse: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.coalesce()
                    sparse.append((parameter, parameter.grad))
        if self.max_grad_norm:
            self._clip()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._update_rows(parameter, parameter.grad, group)
                    parameter.grad = None
        super().step()
        for parameter, gradient in sparse:
            parameter.grad = gradient
        return result

    def _clip(self) -> None:
        """Scales all gradients so that their common norm is no more than `max_grad_norm`."""
        gradients = [
            parameter.grad
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        values = [gradient.values() if gradient.is_sparse else gradient for gradient in gradients]
        if not values:
            return
        norms = [value.norm(dtype=torch.promote_types(value.dtype, torch.float32)) for value in values]
        norm = torch.stack([one.to(norms[0].device) for one in norms]).norm()
        factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for value in values:
            value.mul_(factor.to(value.device, value.dtype))

    def _update_rows(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        rows, slopes = gradient.indices()[0], gradient.values()
        first, second = group["betas"]
        averages = state["exp_avg"][rows].lerp_(slopes, 1 - first)
        squares = state["exp_avg_sq"][rows].mul_(second).addcmul_(slopes, slopes, value=1 - second)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = averages, squares
        steps = float(state["step"])
        scale = squares.sqrt_().div_(math.sqrt(1 - second**steps)).add_(group["eps"])
        values = parameter[rows] * (1 - group["lr"] * group["weight_decay"])
        parameter[rows] = values.addcdiv_(averages, scale, value=-group["lr"] / (1 - first**steps))
