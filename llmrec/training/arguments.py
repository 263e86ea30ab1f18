"""The flags of a training: transformers' own, with the defaults that fit here, and what llmrec adds."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from llmrec.exceptions import RecipeError

_ANSWERS_OF_TEXT = ("id_to_item", "history_to_title", "yes_no")
# What of transformers' flags decides the weights of any training here, beside the seed and what chooses a checkpoint.
# The record of a training names them, and its own ones.
OPTIMISATION = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha", "bf16", "fp16", "world_size"),
)
# Likewise, but named only where they are not as they are by default.
_SELDOM = ("data_seed", "dataloader_drop_last")
UNNAMED = "trainer_output"  # transformers' word for an output folder that was not given


def recorded(training: TrainingArguments, own: Sequence[str]) -> dict[str, Any]:
    """What a record of a training says of its flags: the `own` ones of its script, and those of every training."""
    fields = TrainingArguments.__dataclass_fields__
    seldom = [name for name in _SELDOM if getattr(training, name) != fields[name].default]
    return {name: getattr(training, name) for name in (*own, *OPTIMISATION, *seldom)}


@dataclass
class StageArguments(TrainingArguments):
    """What all trainings here have in common."""

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Leave this as it is: rows have columns that models do not take."}
    )
    early_stopping: int = field(
        default=0,
        metadata={"help": "Stop after so many evaluations without a better metric_for_best_model; 0: never."},
    )

    def __post_init__(self) -> None:
        if self.metric_for_best_model and self.greater_is_better is None:
            # The Trainer goes by the name's end, and takes eval_loss/next_item for something that should be large.
            self.greater_is_better: bool | None = "loss" not in self.metric_for_best_model
        super().__post_init__()
        if self.deepspeed_plugin is not None:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            # Else ZeRO-3 would split a model as it is made, before its embeddings are extended and its base is saved;
            # the Trainer splits it later.
            unset_hf_deepspeed_config()
        self._check_reports()
        if self.early_stopping < 0:
            raise RecipeError(f"early_stopping is {self.early_stopping}. Give 0 or more.")
        if self.early_stopping and not (self.load_best_model_at_end and self.metric_for_best_model):
            raise RecipeError(
                f"early_stopping is {self.early_stopping}, but nothing says which model is the best. "
                "Set load_best_model_at_end: true and metric_for_best_model: eval_NDCG@10."
            )
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise RecipeError(f"--num_train_epochs is {self.num_train_epochs}. Train for more than none.")
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.world_size:
            raise RecipeError(
                f"{launched} processes were launched, and each would train for itself: there is no GPU for them. "
                "Add --use_cpu true to let them work together on the CPU, or launch one process."
            )

    def _check_reports(self) -> None:
        """Raises RecipeError for a package of `report_to` that is not installed, before any row is built."""
        from transformers.integrations.integration_utils import get_available_reporting_integrations

        named = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        known = {"none", "all", "flyte", *get_available_reporting_integrations()}
        if lacking := sorted(set(named) - known):
            raise RecipeError(
                f"--report_to names {lacking[0]}, which is not installed. Install it, or leave it out: the course of "
                "the training is in log.jsonl and training.html in any case."
            )


@dataclass
class FineTuningArguments(StageArguments):
    """How a recommender is fine-tuned."""

    new_tokens_epochs: float = field(
        default=0.0,
        metadata={"help": "Epochs of a first stage that trains the new tokens' embeddings alone; 0: no such stage."},
    )
    new_tokens_learning_rate: float | None = field(
        default=None, metadata={"help": "Of that stage; left out, ten times --learning_rate."}
    )
    loss_vocabulary: Literal["all", "semantic_ids"] = field(
        default="all",
        metadata={
            "help": "Softmax of the loss, and then of all scores: over the whole vocabulary, or over the catalog's "
            "tokens alone, which costs less where the vocabulary is large.",
        },
    )
    batching: Literal["auto", "padded", "folded", "packed"] = field(
        default="auto",
        metadata={
            "help": "padded: a row a line; folded: short rows share the lines that the longest row needs; packed: all "
            "rows in one line. Attention and positions begin anew with each row. auto: packed with flash attention, "
            "else folded.",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
            raise RecipeError(
                "use_liger_kernel is true, and liger-kernel is not installed; it needs a GPU. "
                "Install llmrec[gpu] there, or leave it out."
            )
        if self.new_tokens_epochs < 0:
            raise RecipeError(f"new_tokens_epochs is {self.new_tokens_epochs}. Give 0 or more.")

    def check_metric(self, tasks: Sequence[str], ranked: bool) -> None:
        """Raises RecipeError if no evaluation measures `metric_for_best_model`.

        Args:
            tasks: names.
            ranked: whether validation users are ranked.
        """
        if not self.metric_for_best_model:
            return
        known = ["eval_loss"]
        known += ["eval_loss/next_item"] if set(tasks) != {"next_item"} else []  # the task that is validated
        known += ["eval_HR@10", "eval_NDCG@10"] if ranked else []
        if f"eval_{self.metric_for_best_model.removeprefix('eval_')}" not in known:
            raise RecipeError(
                f"metric_for_best_model is {self.metric_for_best_model!r}, and an evaluation has {', '.join(known)}"
                f"{'' if ranked else ' (and ranks no users, as --eval_users is 0)'}. Name one of these."
            )

    def check_tasks(self, tasks: Sequence[str], titles: bool) -> None:
        """Raises RecipeError if the loss's vocabulary does not hold the answers of these tasks.

        Args:
            tasks: names.
            titles: whether items are spelt as titles, by tokens that new items may extend.
        """
        worded = [task for task in tasks if task in _ANSWERS_OF_TEXT]
        if self.loss_vocabulary == "semantic_ids" and (worded or titles):
            why = f"the task {worded[0]!r} answers with text" if worded else "items are spelt as titles"
            raise RecipeError(
                f"loss_vocabulary is 'semantic_ids', and {why}. Say --loss_vocabulary all, or leave that out."
            )
