"""CTRTrainer: transformers' Trainer for ranking models: binary cross-entropy of several labels, AUC on the way."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from llmrec.ctr.dataset import Cases, Windows, collate
from llmrec.ctr.model import CTRModel
from llmrec.ctr.rows import MISSING
from llmrec.exceptions import BackboneError
from llmrec.rating import measures
from llmrec.training.checkpoints import WholeCheckpoints
from llmrec.training.patience import KeptPatience
from llmrec.training.randomness import OwnRandomState
from llmrec.training.step_mean import StepMean

logger = logging.getLogger(__name__)


def multi_task_loss(logits: Tensor, labels: Tensor, weights: Tensor, label_weights: Tensor) -> Tensor:
    """The weighted sum of the binary cross-entropies of the labels that are known, in float32 at least.

    Args:
        logits: (P, K).
        labels: (P, K) 0, 1 or `MISSING`.
        weights: (P,) what each place counts.
        label_weights: (K,) what each label counts.
    """
    known = labels != MISSING
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.binary_cross_entropy_with_logits(exact, labels.clamp_min(0).to(exact.dtype), reduction="none")
    total: Tensor = (losses * known * weights[:, None] * label_weights).sum()
    return total


class CTRTrainer(StepMean, OwnRandomState, KeptPatience, WholeCheckpoints, Trainer):
    """Trains a `CTRModel` on `Cases` or `Windows`.

    * The loss of a step is the weighted sum over its known labels by their number, over all accumulated batches and
      processes, so that these are one large batch.
    * An evaluation has, of the first label, `eval_AUC`, `eval_UAUC` and `eval_log_loss`, of several labels each also
      as `eval_AUC/LABEL`; `eval_loss` is the mean over all known labels, unweighted.
    * Everything logged is a line of `log.jsonl`; checkpoints are whole or not there.
    """

    def __init__(
        self,
        model: CTRModel,
        args: TrainingArguments,
        train: Cases | Windows,
        valid: Cases | None = None,
        *,
        label_weights: Sequence[float] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> None:
        """
        Args:
            model: to be trained.
            args: transformers' training arguments.
            train: the training data.
            valid: what evaluations ask for; None if there are none.
            label_weights: (K,) of the loss; None: 1 each.
            callbacks: further callbacks.
            options: further arguments of transformers' Trainer.

        Raises:
            BackboneError: if the weights do not fit the labels, the data does not fit the model's layout, several GPUs
                were given to one process, or labels are to be smoothed.
        """
        weights = [1.0] * len(model.labels) if label_weights is None else list(label_weights)
        if len(weights) != len(model.labels) or not all(0 <= weight < float("inf") for weight in weights):
            raise BackboneError(
                f"The label weights are {weights}, and the labels {', '.join(model.labels)}. Give each a number from "
                "0 on."
            )
        if isinstance(train, Windows) and model.config.layout != "interleaved":
            raise BackboneError(
                f"The layout is {model.config.layout!r}, and whole histories are learnt in one pass by interleaved "
                "models alone. Train on cases."
            )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=valid,
            data_collator=collate,
            callbacks=callbacks,
            **options,
        )
        self.label_weights = torch.tensor(weights, device=args.device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the step's mean loss per known label.

        Args:
            model: as it was prepared.
            inputs: of `collate`.
            return_outputs: whether the logits (P, K) come back, too.
            num_items_in_batch: known labels of the whole step; None: of this batch.
        """
        labels = inputs["labels"]
        places = (labels != MISSING).any(dim=-1)
        given = {name: inputs[name] for name in ("items", "mask", "timestamps", "actions")}
        logits = model(**given, places=places)
        total = multi_task_loss(logits, labels[places], inputs["weights"][places], self.label_weights)
        loss = self.share_of_step(total, (labels != MISSING).sum(), num_items_in_batch)
        return (loss, {"logits": logits}) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The candidates' logits (B, K) and labels (B, K)."""
        inputs = self._prepare_inputs(inputs)
        given = {name: inputs[name] for name in ("items", "mask", "timestamps", "actions")}
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**given)
        last = inputs["mask"].sum(dim=1) - 1
        labels = inputs["labels"][torch.arange(len(last), device=last.device), last]
        return None, logits.float(), labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's, with the measures of all cases; every process has them."""
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        cases: Cases = dataloader.dataset
        users = cases.rows.users[cases.chosen[by_length(cases)]]
        found = measures_of(
            output.label_ids, output.predictions, users, self.accelerator.unwrap_model(self.model).labels
        )
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def logits(self, cases: Cases) -> npt.NDArray[np.float64]:
        """(C, K) the logits of cases, each process its share; all have all of them afterwards."""
        output = super().evaluation_loop(self.get_test_dataloader(cases), "Scoring", False)
        logits = np.empty(output.predictions.shape, dtype=np.float64)
        logits[by_length(cases)] = output.predictions
        return logits

    def floating_point_ops(self, inputs: Any) -> int:
        """An estimate of 6 operations per event and parameter of the encoder."""
        own: CTRModel = self.accelerator.unwrap_model(self.model)
        parameters = sum(one.numel() for one in own.encoder.parameters())
        return 6 * int(inputs["items"].numel()) * int(parameters)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Cases by length: the measures do not depend on their order. Processes share the batches afterwards."""
        order: list[int] = by_length(eval_dataset).tolist()
        return order

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's; rows are grouped by lengths that are read off at once."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        from transformers.trainer_pt_utils import LengthGroupedSampler

        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(batch, lengths=dataset.lengths().tolist())


def by_length(cases: Cases) -> npt.NDArray[np.int64]:
    """The order in which cases are evaluated: longest first, so that little is padded; equal ones as they stand."""
    return np.argsort(-cases.lengths(), kind="stable")


def measures_of(
    labels: npt.NDArray[np.int64], logits: npt.NDArray[np.floating], users: npt.NDArray[np.int64], names: Sequence[str]
) -> dict[str, float]:
    """What an evaluation logs: the loss and each label's AUC, UAUC and log-loss, those that there are.

    Args:
        labels: (C, K) 0, 1 or `MISSING`.
        logits: (C, K).
        users: (C,).
        names: of the labels.
    """
    exact = np.asarray(logits, dtype=np.float64)
    known = labels != MISSING
    # -log P(label) = softplus of the logit of the other one.
    losses = np.logaddexp(0, np.where(labels == 1, -exact, exact))
    found = {"loss": float(losses[known].mean())} if known.any() else {}
    probabilities = np.exp(-np.logaddexp(0, -exact))
    for column, name in enumerate(names):
        there = known[:, column]
        if not there.any():
            continue
        all_of_it = measures(labels[there, column], probabilities[there, column], users[there])
        for metric in ("AUC", "UAUC", "log_loss"):
            if all_of_it[metric] is not None:
                found |= {metric: all_of_it[metric]} if column == 0 else {}
                found |= {f"{metric}/{name}": all_of_it[metric]} if len(names) > 1 else {}
    return found
