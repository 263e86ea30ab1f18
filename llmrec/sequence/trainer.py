"""SequenceTrainer: transformers' Trainer for sequence models, with any of the item losses."""

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from llmrec.evaluation.metrics import ranking_metrics
from llmrec.examples import IGNORED
from llmrec.exceptions import RecipeError
from llmrec.losses.loss import ItemLoss
from llmrec.representations.row_adam import RowAdam
from llmrec.sequence.histories import History
from llmrec.sequence.model import SequenceModel
from llmrec.sequence.scores import CaseScores
from llmrec.sequence.windows import EpochBatches, TrainingWindows
from llmrec.training.arguments import StageArguments
from llmrec.training.checkpoints import WholeCheckpoints
from llmrec.training.patience import KeptPatience
from llmrec.training.randomness import OwnRandomState
from llmrec.training.step_mean import StepMean

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)


def check_metric(training: StageArguments) -> None:
    """Raises RecipeError if no evaluation of a `SequenceTrainer` measures `metric_for_best_model`."""
    known = ["eval_loss", *(f"eval_{name}@{k}" for k in (10, 50) for name in ("HR", "NDCG"))]
    wanted = training.metric_for_best_model
    if wanted and f"eval_{wanted.removeprefix('eval_')}" not in known:
        raise RecipeError(f"metric_for_best_model is {wanted!r}. Name one of {', '.join(known)}.")


class SequenceTrainer(StepMean, OwnRandomState, KeptPatience, WholeCheckpoints, Trainer):
    """Trains a `SequenceModel` on windows of histories.

    * Batches are planned for each epoch (`EpochBatches`), the same whatever is restarted and however many processes.
    * The loss is a sum over the labelled places of the whole step, divided by their number, so that accumulated and
      distributed batches are one large batch.
    * An evaluation ranks held-out cases over all items: `eval_HR@k`, `eval_NDCG@k`, and `eval_loss`, the softmax's
      over all items whatever the training loss is, so that losses can be compared.
    * Everything logged is a line of `log.jsonl`; checkpoints are whole or not there.
    """

    def __init__(
        self,
        model: SequenceModel,
        args: TrainingArguments,
        windows: TrainingWindows,
        loss: ItemLoss,
        cases: Sequence[History] = (),
        targets: Sequence[int] | np.ndarray = (),
        *,
        budget: int = 0,
        ks: Sequence[int] = (10, 50),
        callbacks: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> None:
        """
        Args:
            model: to be trained.
            args: transformers' training arguments; `per_device_train_batch_size` counts windows.
            windows: the training data.
            loss: any item loss.
            cases: held-out histories that evaluations rank, each with its item in `targets`.
            targets: (C,) rows.
            budget: see `EpochBatches`; 0 for batches of `per_device_train_batch_size` windows.
            ks: the cut-offs of evaluations.
            callbacks: further callbacks.
            options: further arguments of transformers' Trainer.

        Raises:
            BackboneError: if several GPUs were given to one process, or labels are to be smoothed.
        """
        self.check_arguments(args)
        self.sparse = any(isinstance(one, torch.nn.Embedding) and one.sparse for one in model.modules())
        self.largest_gradient = args.max_grad_norm
        if self.sparse:
            args.max_grad_norm = 0.0  # the optimizer's own task: what torch has for it takes no sparse gradients
        super().__init__(
            model=model,
            args=args,
            train_dataset=windows,
            eval_dataset=list(range(len(cases))),
            callbacks=callbacks,
            **options,
        )
        self.windows, self.loss, self.cases, self.ks = windows, loss.to(args.device), list(cases), tuple(ks)
        self.case_targets = np.asarray(targets, dtype=np.int64)
        self.budget = budget

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's; for an item table with sparse gradients, `RowAdam` with the Trainer's rates."""
        made: torch.optim.Optimizer | None = getattr(self, "optimizer", None)
        if self.sparse and made is None:
            args = self.args
            self.optimizer = RowAdam(
                [parameter for parameter in self.model.parameters() if parameter.requires_grad],
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
                max_grad_norm=self.largest_gradient,
            )
        chosen: torch.optim.Optimizer = super().create_optimizer()
        return chosen

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The Trainer's, which torch computes of no sparse gradients."""
        if not self.sparse:
            return super()._get_grad_norm(model, grad_norm)
        gradients = (one.grad for one in model.parameters() if one.grad is not None)
        squares = [(one.coalesce().values() if one.is_sparse else one).double().square().sum() for one in gradients]
        return float(torch.stack(squares).sum().sqrt())

    def get_train_dataloader(self) -> "DataLoader[Any]":
        """Batches that are planned for each epoch; each process takes its own share of them."""
        batches = EpochBatches(
            self.windows.lengths,
            self.args.per_device_train_batch_size,
            self.budget,
            self.args.seed,
            self.args.process_index,
            self.args.world_size,
        )
        workers = self.args.dataloader_num_workers
        return EpochLoader(self.windows, batch_sampler=batches, collate_fn=_as_it_is, num_workers=workers)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the step's mean loss per labelled place (`SequenceModel.forward` with labels)."""
        total = model(**inputs, loss=self.loss)
        loss = self.share_of_step(total, (inputs["labels"] != IGNORED).sum(), num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Ranks the held-out cases, each process its share, and gathers what was found."""
        own: SequenceModel = self.accelerator.unwrap_model(self.model)
        process, processes = self.args.process_index, self.args.world_size
        mine = np.arange(process, len(self.cases), processes)
        found = torch.zeros((2, len(self.cases)), dtype=torch.float64)
        scorer, begin = CaseScores(own, [], self.args.per_device_eval_batch_size), 0
        from tqdm.auto import tqdm

        shown = not self.args.disable_tqdm and process == 0
        with tqdm(total=len(mine), desc="Ranking", leave=False, disable=not shown) as bar:
            for scores in scorer.batches([self.cases[case] for case in mine]):
                some = mine[begin : begin + len(scores)]
                better, lost = places_of_targets(
                    scores, [self.cases[case].rows for case in some], self.case_targets[some]
                )
                found[0, some] = better.double().cpu() + 1
                found[1, some] = lost.double().cpu()
                begin += len(scores)
                bar.update(len(some))
        if processes > 1:
            gathered = found.to(self.args.device, dtype=torch.float32 if self.args.device.type == "mps" else None)
            torch.distributed.all_reduce(gathered)
            found = gathered.cpu()
        metrics = ranking_metrics(found[0].numpy().astype(np.int64) - 1, ks=self.ks)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        mean = float(found[1].mean()) if len(self.cases) else math.nan
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": mean, **named}, len(self.cases))

    def floating_point_ops(self, inputs: Any) -> int:
        """An estimate of 6 operations per item of a history and parameter of the encoder."""
        own: SequenceModel = self.accelerator.unwrap_model(self.model)
        return 6 * int(inputs["items"].numel()) * int(own.encoder.num_parameters())


class EpochLoader(torch.utils.data.DataLoader[Any]):
    """A DataLoader that tells its batches which epoch it is."""

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next."""
        batches = self.batch_sampler
        assert isinstance(batches, EpochBatches)
        batches.set_epoch(epoch)


def places_of_targets(scores: Tensor, histories: Sequence[Any], targets: np.ndarray) -> tuple[Tensor, Tensor]:
    """Each target's place among all items that are not in its history, from 0, and its negative log-probability.

    Of equal scores the lower row comes first. A target that is in the history has place -1: it is absent; and so is
    one among whose scores any is no number, so that a model that broke looks like the worst, not the best.

    Args:
        scores: (B, N), written to.
        histories: B arrays of rows.
        targets: (B,) rows.

    Returns:
        (B,) int64 and (B,): the latter of the softmax over all items, those of the history included.
    """
    wanted = torch.from_numpy(targets).to(scores.device)[:, None]
    own = scores.gather(1, wanted)
    lost = scores.logsumexp(dim=1) - own[:, 0]
    owner = np.repeat(np.arange(len(histories)), [len(one) for one in histories])
    rows = np.concatenate([np.asarray(one, dtype=np.int64) for one in histories])
    scores[torch.from_numpy(owner).to(scores.device), torch.from_numpy(rows).to(scores.device)] = -math.inf
    earlier = torch.arange(scores.shape[1], device=scores.device) < wanted
    better = (scores > own).sum(dim=1) + ((scores == own) & earlier).sum(dim=1)
    seen = scores.gather(1, wanted)[:, 0] == -math.inf
    return better.masked_fill(seen | lost.isnan(), -1), lost


def _as_it_is(batch: Any) -> Any:
    return batch
