"""GenerativeTrainer: transformers' Trainer for models that generate items."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from llmrec.exceptions import BackboneError, DataError
from llmrec.training.batches import Collator, check_restarts, choose_layout
from llmrec.training.checkpoints import WholeCheckpoints
from llmrec.training.exact_means import ExactMeans
from llmrec.training.head import HeadLoss, LossVocabulary
from llmrec.training.packing import Bins, EndlessStream, ShareOfRows, ShareOfStream, row_lengths
from llmrec.training.patience import KeptPatience
from llmrec.training.randomness import OwnRandomState
from llmrec.training.step_mean import StepMean

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class GenerativeTrainer(ExactMeans, StepMean, OwnRandomState, KeptPatience, WholeCheckpoints, Trainer):
    """Trains a causal LM on rows of token ids and labels, and loses no time on what no label asks for.

    What is another than in transformers' Trainer:

    * The loss is computed at labelled tokens only, by `HeadLoss`: summed, and divided by the labelled tokens of the
      whole step, so that accumulated and distributed batches are one large batch.
    * Short rows share a line of a batch (`batches`), whose size may be a number of tokens.
    * Losses of the tasks are logged as `loss/TASK` beside `loss`, if there are several; evaluations have
      `eval_loss/TASK`. All are means over tokens, exact over the whole set and over all processes.
    * Ranking metrics (`RankingCallback`) are part of an evaluation: they are logged with it, and early stopping and
      the choice of the best checkpoint can go by them in any order of the callbacks.
    * Checkpoints are whole or not there (`WholeCheckpoints`); a training that had ended takes no step more when it is
      resumed, and early stopping keeps its patience (`KeptPatience`).
    * Everything logged is a line of `log.jsonl` in the output folder.
    """

    shifts_labels = True

    def __init__(
        self,
        model: "PreTrainedModel",
        args: TrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        layout: str = "auto",
        max_tokens_per_batch: int | None = None,
        loss_vocabulary: LossVocabulary = "all",
        semantic_ids: Sequence[int] | None = None,
        tasks: Sequence[str] | None = None,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> None:
        """
        Args:
            model: a causal LM, maybe in PEFT's wrapper.
            args: transformers' training arguments.
            train_dataset: rows with `input_ids`, `labels` and maybe `task`: a `datasets.Dataset`, a stream, or a list.
            eval_dataset: the same.
            layout: "padded", "folded", "packed", or "auto" (`choose_layout`; padded where rows cannot share a line).
            max_tokens_per_batch: of a process's batch, its filling included; then `per_device_train_batch_size` is 1,
                and the training rows have a length. None for batches of `per_device_train_batch_size` rows.
            loss_vocabulary: "all", or "semantic_ids" for a softmax over `semantic_ids` alone.
            semantic_ids: the token ids that spell items.
            tasks: the names of all tasks, for rows that are a stream; else they are looked up.
            processing_class: the tokenizer, which is saved with every checkpoint.
            callbacks: further callbacks.
            options: further arguments of transformers' Trainer.

        Raises:
            BackboneError: if the options do not go together, several GPUs were given to one process, or labels are to
                be smoothed.
            DataError: if a row is longer than `max_tokens_per_batch`.
        """
        self.check_arguments(args)
        if loss_vocabulary not in ("all", "semantic_ids") or (loss_vocabulary == "semantic_ids" and not semantic_ids):
            raise BackboneError(
                f"The loss vocabulary is {loss_vocabulary!r}, with {len(semantic_ids or ())} tokens of semantic IDs. "
                "Give 'all', or 'semantic_ids' with their tokens."
            )
        attention = str(getattr(model.config, "_attn_implementation", None) or "eager")
        self.layout, reason = choose_layout(layout, attention)
        if max_tokens_per_batch is not None:
            if args.per_device_train_batch_size != 1 or not hasattr(train_dataset, "__len__"):
                raise BackboneError(
                    f"max_tokens_per_batch is {max_tokens_per_batch} beside a per_device_train_batch_size of "
                    f"{args.per_device_train_batch_size}. Say 1 there, and give rows that are no stream."
                )
            train_dataset = Bins(train_dataset, max_tokens_per_batch, self.layout, args.seed)
        sources = [*(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]), train_dataset]
        self.tasks = tuple(tasks) if tasks is not None else _tasks(sources)
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator("padded"),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **options,
        )
        self._checked_restarts = self.layout == "padded"
        if layout == "auto" and self.layout == "folded":
            try:
                if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
                    raise BackboneError("The parameters are not here yet, so folding cannot be tried.")
                check_restarts(model, args.device)
                self._checked_restarts = True
            except BackboneError as error:
                self.layout, reason, self._checked_restarts = "padded", str(error), True
        logger.info("batches are %s: %s", self.layout, reason)
        pad = getattr(processing_class, "pad_token_id", None)
        self.data_collator = Collator(self.layout, self.tasks, 0 if pad is None else pad)
        self._head_loss = HeadLoss(model, semantic_ids if loss_vocabulary == "semantic_ids" else None)
        self._parameters: int | None = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the step's mean loss per labelled token.

        Args:
            model: as it was prepared.
            inputs: of the collator.
            return_outputs: whether a dictionary comes back, too, with each token's loss.
            num_items_in_batch: labelled tokens of the whole step, over all its batches and processes; None: of this
                batch.
        """
        given = dict(inputs)
        labels, tasks = given.pop("labels"), given.pop("tasks")
        if not self._checked_restarts:
            check_restarts(model, labels.device)
            self._checked_restarts = True
        found = self._head_loss(model, given, labels)
        self._count(found.each, tasks.reshape(-1).index_select(0, found.places), model.training)
        loss = self.share_of_step(found.total, len(found.each), num_items_in_batch)
        return (loss, {"losses": found.each}) if return_outputs else loss

    def _zeros(self) -> Tensor:
        """(2, 1 + tasks): sums of losses and numbers of tokens, of all and of each task."""
        return torch.zeros((2, 1 + len(self.tasks)), dtype=torch.float64, device=self.args.device)

    def _count(self, each: Tensor, tasks: Tensor, training: bool) -> None:
        """Adds losses to the sums, on the device: nothing waits for it until something is logged."""
        if training and len(self.tasks) < 2:
            return
        sums = self._sums[training]
        both = torch.stack([each.double(), torch.ones_like(each, dtype=torch.float64)])
        sums[:, 0] += both.sum(1)
        if len(self.tasks) > 1:
            # A token without a task falls into the place before the first task's, which is not kept.
            sums[:, 1:] += torch.zeros_like(sums).index_add_(1, tasks + 1, both)[:, 1:]

    def _means(self, training: bool) -> dict[str, float]:
        """The mean losses since the last call, over all processes: `loss`, and `loss/TASK` if there are several."""
        sums = self.accelerator.reduce(self._sums[training], "sum").cpu()
        self._sums[training] = self._zeros()
        names = ["loss", *(f"loss/{task}" for task in self.tasks)] if len(self.tasks) > 1 else ["loss"]
        totals, counts = sums.tolist()
        return {name: total / count for name, total, count in zip(names, totals, counts, strict=False) if count}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with the tasks' losses beside the training loss."""
        if len(self.tasks) > 1 and "loss" in logs:
            means = self._means(training=True)
            logs |= {name: mean for name, mean in means.items() if name != "loss"}
        super().log(logs, start_time)

    def get_train_dataloader(self) -> "DataLoader[Any]":
        """The Trainer's; of a stream each process takes its own batches, because they cannot be cut from a larger one.

        Rows of other batches have other lengths, and folded ones other numbers of lines. Every pass over a stream has
        the stream's own order: the Trainer would deal out its shards anew for each, and resume at the wrong row.
        """
        from torch.utils.data import DataLoader

        if self.train_dataset is None or hasattr(self.train_dataset, "__len__"):
            prepared: DataLoader[Any] = super().get_train_dataloader()
            return prepared
        size = self._train_batch_size
        share = ShareOfStream(EndlessStream(self.train_dataset), size, self.args.process_index, self.args.world_size)
        workers = self.args.dataloader_num_workers
        return DataLoader(share, size, collate_fn=self.data_collator, num_workers=workers)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> "DataLoader[Any]":
        """Each process's batches of the rows; see `ShareOfRows`."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]
        if chosen is None:
            raise DataError("There are no rows to evaluate. Give an eval_dataset, or set eval_strategy to 'no'.")
        return self._share(chosen)

    def get_test_dataloader(self, test_dataset: Any) -> "DataLoader[Any]":
        """As `get_eval_dataloader`."""
        return self._share(test_dataset)

    def _share(self, dataset: Any) -> "DataLoader[Any]":
        from torch.utils.data import DataLoader

        place = (self.args.eval_batch_size, self.args.process_index, self.args.world_size)
        if not hasattr(dataset, "__len__"):
            return DataLoader(ShareOfStream(dataset, *place), place[0], collate_fn=self.data_collator)
        share = ShareOfRows(dataset, *place)
        return DataLoader(
            share,
            batch_sampler=share.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )

    def floating_point_ops(self, inputs: Mapping[str, Tensor]) -> int:
        """An estimate of 6 operations per token and parameter; the parameters are counted once."""
        if self._parameters is None:
            self._parameters = int(self.model.num_parameters(exclude_embeddings=True))
        return 6 * inputs["input_ids"].numel() * self._parameters

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "task", "rows"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's; rows are grouped by lengths that are read off at once."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        from transformers.trainer_pt_utils import LengthGroupedSampler

        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(batch, lengths=row_lengths(dataset).tolist())


def _tasks(sources: Iterable[Any]) -> tuple[str, ...]:
    """The tasks named in data sets that have a length, in alphabetical order; none of a stream."""
    names: set[str] = set()
    for source in sources:
        if isinstance(source, Bins):
            source = source.dataset
        if source is None or not hasattr(source, "__len__"):
            continue
        if hasattr(source, "column_names"):
            names |= set(source.unique("task")) if "task" in source.column_names else set()
        else:
            names |= {row.get("task") for row in source}
    return tuple(sorted(names - {None}))
