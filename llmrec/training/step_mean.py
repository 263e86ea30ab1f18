"""StepMean: the loss of a step is one mean, however the step is cut into batches and spread over processes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from llmrec.exceptions import BackboneError
from llmrec.training.curve import LOG_FILE, LogLines

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object


class StepMean(Trainer):
    """A mixin over `transformers.Trainer` for trainers with a loss of their own; first of all but `ExactMeans`.

        class MyTrainer(StepMean, OwnRandomState, KeptPatience, WholeCheckpoints, transformers.Trainer): ...

    Losses are sums over what counts in a batch (labelled tokens, places, cases); `share_of_step` divides them by the
    number in the whole step, over accumulated batches and all processes. Everything logged is a line of `log.jsonl` in
    the output folder.

    Attributes:
        shifts_labels: whether a row's first label is never asked for, as of causal LMs.
    """

    shifts_labels: ClassVar[bool] = False

    def __init__(
        self,
        *,
        args: TrainingArguments,
        callbacks: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> None:
        """
        Args:
            args: transformers' training arguments.
            callbacks: further callbacks.
            options: further arguments of transformers' Trainer.

        Raises:
            BackboneError: see `check_arguments`.
        """
        self.check_arguments(args)
        super().__init__(args=args, callbacks=[LogLines(Path(args.output_dir) / LOG_FILE), *callbacks], **options)
        # The base class counts a step's labels for whoever accepts their number, and divides no further.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = self.shifts_labels

    @staticmethod
    def check_arguments(args: TrainingArguments) -> None:
        """Called at once, and first of all by a trainer that changes model, arguments or data before.

        Raises:
            BackboneError: if several GPUs were given to one process, or labels are to be smoothed.
        """
        if args.n_gpu > 1:
            raise BackboneError(
                f"One process was given {args.n_gpu} GPUs. Start with `accelerate launch`, which gives each its own."
            )
        if args.label_smoothing_factor:
            raise BackboneError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, and this loss has none. Leave it out."
            )

    def share_of_step(self, total: Tensor, own: Tensor | int, whole: Tensor | int | None) -> Tensor:
        """A batch's share of the step's mean loss.

        Args:
            total: () the batch's sum.
            own: what counts in the batch.
            whole: what counts in the step, over all its batches and processes; None: the batch is all there is.
        """
        count = torch.as_tensor(own if whole is None else whole, device=total.device)
        share = total / count.clamp(min=1)
        if whole is not None and self.args.average_tokens_across_devices:
            share = share * self.accelerator.num_processes  # whose gradients are averaged
        return share
