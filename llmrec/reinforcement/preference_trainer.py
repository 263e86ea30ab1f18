"""PreferenceTrainer: transformers' Trainer for DPO and S-DPO on items."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from llmrec.catalog import Catalog, Softmax
from llmrec.examples import IGNORED
from llmrec.exceptions import BackboneError, PromptError, RecipeError
from llmrec.reinforcement.item_logprobs import ItemLogProbs, Layout
from llmrec.reinforcement.preference_loss import preference_loss, preference_measures
from llmrec.reinforcement.preferences import PreferenceCases
from llmrec.training.checkpoints import WholeCheckpoints
from llmrec.training.exact_means import ExactMeans
from llmrec.training.packing import ShareOfRows
from llmrec.training.patience import KeptPatience
from llmrec.training.randomness import OwnRandomState
from llmrec.training.step_mean import StepMean

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)

_MEASURES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl")


class PreferenceRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Preference cases as a Trainer's rows, with what the reference thinks of their items.

    Attributes:
        preferences: the cases.
        items: (C, 1 + n) the target and the negatives.
        reference: (C, 1 + n) float64 log-probabilities; None until they are known.
    """

    def __init__(self, preferences: PreferenceCases) -> None:
        self.preferences = preferences
        self.items = preferences.items
        self.reference: npt.NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.preferences)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """A prompt as `input_ids`; `labels` is the target, and says by -100 that a row does not count."""
        items = self.items[place]
        known = np.zeros(len(items)) if self.reference is None else self.reference[place]
        prompt = self.preferences.cases.prompts[place]
        return {"input_ids": prompt, "items": items, "reference": known, "labels": [int(items[0])]}


class PreferenceTrainer(ExactMeans, StepMean, OwnRandomState, KeptPatience, WholeCheckpoints, Trainer):
    """Trains a causal LM to prefer the items that were taken (`preference_loss`).

    * The reference is the model as it is given, or, of a model with an adapter, the model without it. Its
      log-probabilities are computed once, before the first step, and kept; no second model is held.
    * Nothing is dropped out: policy and reference are the same function, until the weights differ.
    * The loss is the mean over the cases of the whole step, so that accumulated and distributed batches are one large
      batch; `per_device_train_batch_size` counts cases, of 1 + n items each.
    * With `loss` the means of `preference_measures` are logged, in evaluations with `eval_` before their names. Means
      are exact, over all processes. Ranking metrics (`RankingCallback`) are part of an evaluation.
    * Checkpoints are whole or not there, a resumed training goes on as it was, and everything logged is a line of
      `log.jsonl`: as `GenerativeTrainer`.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        preferences: PreferenceCases,
        valid: PreferenceCases | None = None,
        *,
        catalog: Catalog,
        softmax: Softmax = "vocabulary",
        beta: float = 0.1,
        layout: Layout = "auto",
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> None:
        """
        Args:
            model: the policy with the weights that it starts from, also where a checkpoint is then resumed; a causal
                LM, maybe in PEFT's wrapper.
            args: transformers' training arguments.
            preferences: to train on.
            valid: held out, for evaluations.
            catalog: with token ids.
            softmax: what probabilities are over, the artefact's `Settings.softmax`.
            beta: see `preference_loss`.
            layout: see `ItemLogProbs`.
            processing_class: the tokenizer, which is saved with every checkpoint.
            callbacks: further callbacks.
            options: further arguments of transformers' Trainer.

        Raises:
            RecipeError: if beta is no finite number above 0.
            PromptError: if a prompt and an item are longer than the model reads.
            BackboneError: if the options do not go together, several GPUs were given to one process, labels are to be
                smoothed, or the model's log-probabilities are no numbers.
        """
        self.check_arguments(args)
        if not (math.isfinite(beta) and beta > 0):
            raise RecipeError(f"beta is {beta}. Give a finite number above 0, such as 0.1.")
        for one in (preferences, valid):
            if one is not None:
                _check_lengths(one, catalog, model)
        drop_nothing(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collated,
            train_dataset=PreferenceRows(preferences),
            eval_dataset=None if valid is None else PreferenceRows(valid),
            processing_class=processing_class,
            callbacks=callbacks,
            **options,
        )
        self.beta = beta
        self._logprobs = ItemLogProbs(model, catalog, softmax, layout)
        logger.info("items are scored by %s: %s", self._logprobs.layout, self._logprobs.reason)
        for rows in (self.train_dataset, self.eval_dataset):
            if rows is not None:
                rows.reference = self._reference(model, rows)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the step's mean loss per case.

        Args:
            model: as it was prepared.
            inputs: of the collator.
            return_outputs: whether a dictionary comes back, too, with each case's loss.
            num_items_in_batch: cases of the whole step, over all its batches and processes; None: of this batch.
        """
        counted = inputs["labels"] != IGNORED
        policy = self._logprobs(model, inputs)
        reference = inputs["reference"].to(policy.dtype)
        losses = preference_loss(policy, reference, self.beta) * counted
        self._count(losses.detach(), policy.detach(), reference, counted, model.training)
        loss = self.share_of_step(losses.sum(), counted.sum(), num_items_in_batch)
        return (loss, {"losses": losses.detach()}) if return_outputs else loss

    def _collated(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self._logprobs.batch([row["input_ids"] for row in rows], np.stack([row["items"] for row in rows]))
        batch["reference"] = torch.from_numpy(np.stack([row["reference"] for row in rows]))
        batch["labels"] = torch.tensor([row["labels"][0] for row in rows])
        return batch

    @torch.no_grad()
    def _reference(self, model: Any, rows: PreferenceRows) -> npt.NDArray[np.float64]:
        """(C, 1 + n) the log-probabilities of the starting model, each process its share, gathered."""
        args = self.args
        share = ShareOfRows(rows, args.eval_batch_size, args.process_index, args.world_size)
        found = torch.zeros(rows.items.shape, dtype=torch.float64)
        device = next(model.parameters()).device  # not yet the Trainer's own where that shards the model later
        training = model.training
        model.eval()
        from tqdm.auto import tqdm

        shown = not args.disable_tqdm and args.process_index == 0
        try:
            with _without_adapter(model), self.accelerator.autocast():
                for places in tqdm(share.batches, desc="Reference", leave=False, disable=not shown):
                    batch = self._collated([share[place] for place in places])
                    own = self._logprobs(model, {name: one.to(device) for name, one in batch.items()})
                    if places[0] >= 0:  # else it only keeps step with the other processes
                        found[places] = own.double().cpu()
        finally:
            model.train(training)
        if args.world_size > 1:
            gathered = found.to(args.device)
            torch.distributed.all_reduce(gathered)
            found = gathered.cpu()
        if not bool(found.isfinite().all()):
            raise BackboneError(
                f"The starting model gives {int((~found.isfinite()).sum())} item(s) log-probabilities that are no "
                "numbers. Its weights are broken or its dtype overflows; load it in float32."
            )
        return found.numpy()

    def _zeros(self) -> Tensor:
        """(1 + measures,): the number of cases, and the sum of each measure over them."""
        return torch.zeros(1 + len(_MEASURES), dtype=torch.float64, device=self.args.device)

    def _count(self, losses: Tensor, policy: Tensor, reference: Tensor, counted: Tensor, training: bool) -> None:
        """Adds a batch to the sums, on the device: nothing waits for it until something is logged."""
        measured = {"loss": losses.double(), **preference_measures(policy, reference, self.beta)}
        kept = counted.double()
        self._sums[training] += torch.stack([kept.sum(), *((measured[name] * kept).sum() for name in _MEASURES)])

    def _means(self, training: bool) -> dict[str, float]:
        """The means of the measures since the last call, over all processes and all cases that counted."""
        count, *totals = self.accelerator.reduce(self._sums[training], "sum").cpu().tolist()
        self._sums[training] = self._zeros()
        return {name: total / count for name, total in zip(_MEASURES, totals, strict=True) if count}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with the measures beside the training loss."""
        if "loss" in logs:
            logs |= {name: mean for name, mean in self._means(training=True).items() if name != "loss"}
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> "DataLoader[Any]":
        """Each process's batches of the rows; see `ShareOfRows`."""
        from torch.utils.data import DataLoader

        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(rows, PreferenceRows) or rows.reference is None:
            raise RecipeError("There are no held-out preferences to evaluate. Give them as `valid`.")
        share = ShareOfRows(rows, self.args.eval_batch_size, self.args.process_index, self.args.world_size)
        return DataLoader(share, batch_sampler=share.batches, collate_fn=self.data_collator)

    def floating_point_ops(self, inputs: Any) -> int:
        """An estimate of 6 operations per token and parameter, as the layout has it."""
        prompts, answers = inputs["input_ids"], inputs["answers"]
        runs = 1 if self._logprobs.layout == "branches" else answers.shape[1]
        parameters = int(self.model.num_parameters(exclude_embeddings=True))
        return int(6 * (runs * prompts.numel() + answers.numel()) * parameters)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "items", "reference", "labels"]


def drop_nothing(model: torch.nn.Module) -> None:
    """Sets all dropout of a model to 0, for as long as it lives; its configuration is left as it is."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


@contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """A model in PEFT's wrapper computes as its base does; any other as it is."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield


def _check_lengths(preferences: PreferenceCases, catalog: Catalog, model: Any) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(prompt) for prompt in preferences.cases.prompts), default=0)
    if limit is not None and longest + catalog.num_levels > limit:
        raise PromptError(
            f"A prompt of {longest} tokens and {catalog.num_levels} of an item exceed the model's {limit} positions. "
            "Lower --max_history, or take a template that shows less of every item."
        )
