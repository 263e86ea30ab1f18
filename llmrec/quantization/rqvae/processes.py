"""Processes: what the processes of one fit share. One process alone computes as if none of this were there."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llmrec.exceptions import TokenizerError

Precision = Literal["no", "bf16", "fp16"]


class Processes:
    """accelerate's processes as the training loop needs them: parts of a batch, sums, and what the first one decides.

    Attributes:
        number: P.
        index: 0 to P - 1.
        first: whether this is process 0, which writes files, shows the bar and places codes.
        device: this process's.
        accelerator: accelerate's own object.
    """

    def __init__(self, mixed_precision: Precision) -> None:
        """Raises TokenizerError if accelerate cannot run as asked."""
        from accelerate import Accelerator

        try:
            self.accelerator: Any = Accelerator(mixed_precision=mixed_precision, cpu=_spread_on_cpu())
        except ValueError as error:
            raise TokenizerError(
                f"accelerate cannot run with mixed_precision {mixed_precision!r} here ({error}). Use 'no', or 'bf16' "
                "in a process that has not used accelerate before."
            ) from error
        self.number: int = self.accelerator.num_processes
        if self.number != _started():
            raise TokenizerError(
                f"{_started()} processes were started, and accelerate was set up for {self.number} before this fit. "
                "Set ACCELERATE_USE_CPU=true for processes without a GPU, or fit before other uses of accelerate."
            )
        self.index: int = self.accelerator.process_index
        self.first: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """The network, moved to the device, with autocast, and its optimiser; all processes begin with the first's."""
        # Not wrapped for distributed training: between the plain epochs and the others it would have to look for
        # unused parameters, and averages that are no parameters have to be summed anyhow.
        model = self.accelerator.prepare_model(network, evaluation_mode=True)
        self.copy_first(list(network.state_dict().values()))
        return model, self.accelerator.prepare_optimizer(optimizer)

    def add_gradients(self, network: nn.Module) -> None:
        """Replaces the gradients by their sums over the processes."""
        if self.number == 1:
            return
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        total = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def part(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows of a batch that this process works on: consecutive ones, sizes differ by at most one."""
        return np.array_split(rows, self.number)[self.index]

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over the processes, to the last bit the same in all of them."""
        if self.number == 1:
            return tensor
        total: Tensor = self.accelerator.reduce(tensor, "sum")
        return total

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites the tensors with those of process 0."""
        if self.number == 1:
            return
        for tensor in tensors:
            torch.distributed.broadcast(tensor.detach(), src=0)

    def agree(self, number: int) -> bool:
        """Whether all processes say the same number."""
        own = torch.tensor([number], device=self.device)
        first = own.clone()
        self.copy_first([first])
        return int(self.sum((own != first).long())) == 0


def is_first_process() -> bool:
    """Whether this is process 0 of those that accelerate or torch.distributed.run started, or the only one."""
    from accelerate import PartialState

    return bool(PartialState(cpu=_spread_on_cpu()).is_main_process)


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _spread_on_cpu() -> bool:
    """Whether several processes have no GPU: accelerate would take each of them for the only one unless told."""
    return _started() > 1 and not torch.accelerator.is_available()
