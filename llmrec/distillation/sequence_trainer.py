"""SequenceDistillationTrainer: the trainer of sequence models, with a lesson beside the labels."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrec.distillation.item_lessons import ItemLesson, TaughtItemLoss
from llmrec.sequence.trainer import SequenceTrainer

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from llmrec.losses.loss import ItemLoss
    from llmrec.sequence.model import SequenceModel
    from llmrec.sequence.windows import TrainingWindows


class SequenceDistillationTrainer(SequenceTrainer):
    """A `SequenceTrainer` whose training loss is a lesson's; evaluations rank and measure as always.

    The lesson's parts are logged as `distillation/NAME`, means over the labels.
    """

    def __init__(
        self,
        model: "SequenceModel",
        args: "TrainingArguments",
        windows: "TrainingWindows",
        loss: "ItemLoss",
        *given: Any,
        lesson: ItemLesson | None,
        **options: Any,
    ) -> None:
        """
        Args:
            model: the student.
            args, windows, loss, given, options: as for `SequenceTrainer`; `loss` is the hard one.
            lesson: what the teacher adds; None: nothing, which is the control.
        """
        self.lesson = lesson
        self.taught = None if lesson is None else TaughtItemLoss(loss, lesson)
        super().__init__(model, args, windows, self.taught or loss, *given, **options)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the step's mean loss per label."""
        read = {name: value for name, value in inputs.items() if name != "asked"}
        if self.lesson is None:
            return super().compute_loss(model, read, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():  # the teacher reads as the student does
            self.lesson.prepare(inputs)
        with self.lesson.watching():
            return super().compute_loss(model, read, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with the lesson's parts beside the training loss."""
        if "loss" in logs and self.taught is not None:
            for name, value in self.taught.sums.items():
                both = torch.tensor([float(value), float(self.taught.places)], device=self.args.device)
                total, count = self.accelerator.reduce(both, "sum").tolist()
                if count:
                    logs[f"distillation/{name}"] = total / count
            self.taught.sums, self.taught.places = {}, 0
        super().log(logs, start_time)
