"""DistillationTrainer: the trainer of language models that generate items, with a lesson beside the labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrec.distillation.lessons import Lesson, TaughtHeadLoss
from llmrec.exceptions import DataError
from llmrec.training.batches import Collator, Row, padded
from llmrec.training.trainer import GenerativeTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments


class DistillationTrainer(GenerativeTrainer):
    """A `GenerativeTrainer` whose training loss is a lesson's; evaluations measure cross-entropy alone.

    The lesson's parts are logged as `distillation/NAME`, means over the labelled tokens.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        args: "TrainingArguments",
        train_dataset: Any,
        eval_dataset: Any,
        *,
        lesson: Lesson | None,
        paired: bool = False,
        loss_vocabulary: Any = "all",
        semantic_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            model: the student.
            args, train_dataset, eval_dataset, loss_vocabulary, semantic_ids, options: as for `GenerativeTrainer`.
            lesson: what the teacher adds; None: nothing, which is the control.
            paired: whether training rows bear the teacher's own tokens (`PairedRows`); then batches are padded.

        Raises:
            BackboneError: as `GenerativeTrainer`.
        """
        if paired:
            options["layout"] = "padded"
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            loss_vocabulary=loss_vocabulary,
            semantic_ids=semantic_ids,
            **options,
        )
        self._taught: TaughtHeadLoss | None = None
        if lesson is not None:
            tokens = semantic_ids if loss_vocabulary == "semantic_ids" else None
            self._taught = TaughtHeadLoss(model, tokens, lesson, self.accelerator.autocast)
            self._head_loss = self._taught
        if paired:
            assert isinstance(self.data_collator, Collator)
            self.data_collator: Any = PairedCollator(self.data_collator)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with the lesson's parts beside the training loss."""
        if "loss" in logs and self._taught is not None:
            for name, (total, count) in self._taught.means().items():
                both = torch.tensor([total, float(count)], device=self.args.device)
                summed = self.accelerator.reduce(both, "sum").tolist()
                if summed[1]:
                    logs[f"distillation/{name}"] = summed[0] / summed[1]
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*(self._signature_columns or []), "teacher"]


class PairedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """The student's training rows, each with the teacher's row of the same case: `teacher`."""

    def __init__(self, student: Any, teacher: Any) -> None:
        """
        Args:
            student, teacher: rows of one mixture and one seed over one split, in the tokens of either.

        Raises:
            DataError: if there are not as many of both.
        """
        if len(student) != len(teacher):
            raise DataError(
                f"The student has {len(student)} training rows and the teacher {len(teacher)}. Build both from one "
                "mixture."
            )
        self._student, self._teacher = student, teacher

    def __len__(self) -> int:
        return len(self._student)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {**self._student[place], "teacher": dict(self._teacher[place])}


@dataclass(frozen=True)
class PairedCollator:
    """Batches of `PairedRows`: the student's, and `teacher_input_ids` and `teacher_labels` of the same rows."""

    collator: Collator

    def __call__(self, items: Sequence[Row]) -> dict[str, Tensor]:
        batch = self.collator([{name: value for name, value in item.items() if name != "teacher"} for item in items])
        if all("teacher" in item for item in items):
            theirs = padded([item["teacher"] for item in items])
            batch |= {f"teacher_{name}": theirs[name] for name in ("input_ids", "labels")}
        return batch
