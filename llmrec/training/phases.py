"""The phases of a fine-tuning, one after another: which weights each begins with, trains and hands on.

One phase is the rule. With `new_tokens_epochs` there are two: the new tokens' rows alone, while all else is frozen,
and then what the method says, from a base that has these rows. Before every phase whose method is an adapter, its base
is saved, because the adapter means nothing without it.
"""

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmrec.artefact import MANIFEST
from llmrec.backbones.adapters import adapt
from llmrec.backbones.bits import load_quantised
from llmrec.backbones.causal_lm import BackboneArguments, attention_for
from llmrec.exceptions import ArtefactError, BackboneError
from llmrec.export import base_hash, save_extended_base
from llmrec.extended_base import BASE_FILE
from llmrec.storage import write_json
from llmrec.training.arguments import FineTuningArguments
from llmrec.training.ranking import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

NEW_TOKENS = "new_tokens"
_DONE = "done.json"


@dataclass(frozen=True)
class Phase:
    """One training.

    Attributes:
        backbone: with the phase's method.
        arguments: with the phase's folder of checkpoints, epochs and learning rate.
        base: the folder of the extended base that an adapter is trained on; None if the model itself is trained.
        result: the folder that the trained base of a phase before the last one is saved in; None for the last.
    """

    backbone: BackboneArguments
    arguments: FineTuningArguments
    base: Path | None
    result: Path | None

    @property
    def method(self) -> str:
        return self.backbone.method

    def done_rows(self, identity: str) -> list[int] | None:
        """The new rows of the phase's result, if it lies there whole and from this very run; else None."""
        if self.result is None:
            return None
        try:
            done = json.loads((Path(self.arguments.output_dir) / _DONE).read_text(encoding="utf-8"))
            same = done["run"] == identity and done["base"] == base_hash(self.result)
            return [int(row) for row in done["new_rows"]] if same else None
        except (OSError, ValueError, KeyError, TypeError, ArtefactError):
            return None

    def finish(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        new_rows: Sequence[int],
        identity: str,
    ) -> None:
        """Saves the trained base of a phase that is not the last; called by one process."""
        if self.result is not None:
            saved = save_extended_base(model, tokenizer, self.result)
            record = {"run": identity, "base": saved, "new_rows": list(new_rows)}
            write_json(Path(self.arguments.output_dir) / _DONE, record)


def plan_phases(
    backbone: BackboneArguments, training: FineTuningArguments, artefact: Path, stream: bool = False
) -> list[Phase]:
    """The phases of a run; the last one's checkpoints lie in `output_dir` itself, and `max_steps` is its alone.

    Raises:
        BackboneError: if a first phase is asked for that would train what the second does, or frozen random weights,
            or whose epochs have no end because the rows are a stream.
        ArtefactError: if a folder that the run would replace holds something else than what it writes there.
    """
    base = artefact.with_name(f"{artefact.name}.base")
    adapted = backbone.method != "full"
    adapter = artefact.with_name(f"{artefact.name}.adapter")
    for folder, mark in [(artefact, MANIFEST), *([(base, BASE_FILE), (adapter, MANIFEST)] if adapted else [])]:
        if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / mark).is_file())):
            raise ArtefactError(
                f"{folder} holds something else than an earlier run's result (it has no {mark}), and would be "
                "replaced. Give another --artefact, or move it away."
            )
    last = Phase(backbone, training, base if adapted else None, None)
    if not training.new_tokens_epochs:
        return [last]
    if backbone.backbone is None or backbone.method == NEW_TOKENS:
        raise BackboneError(
            f"new_tokens_epochs is {training.new_tokens_epochs:g}, and a model from scratch, or one of which nothing "
            "else is trained, has no such phase. Leave it at 0."
        )
    if stream:
        raise BackboneError(
            f"new_tokens_epochs is {training.new_tokens_epochs:g}, and a stream's epochs cannot be counted. "
            "Leave --stream out, or new_tokens_epochs at 0."
        )
    first = copy.copy(training)
    first.max_steps = -1
    first.output_dir = str(Path(training.output_dir) / NEW_TOKENS)
    first.num_train_epochs = training.new_tokens_epochs
    first.learning_rate = training.new_tokens_learning_rate or 10 * training.learning_rate
    alone = replace(backbone, method=NEW_TOKENS, lora_rank=None)
    folder = Path(first.output_dir)
    return [Phase(alone, first, folder / "base", folder / "result"), last]


def model_of(
    phase: Phase,
    model: "PreTrainedModel",
    new_rows: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    compute_dtype: torch.dtype | None,
) -> tuple[Any, str]:
    """The model that a phase trains, and the hash of its base, "" if it has none. Called by every process.

    Args:
        phase: which.
        model: the plain model that it begins with.
        new_rows: which rows of its embeddings are new.
        tokenizer: saved with the base.
        compute_dtype: of autocast, if there is one; a quantised base computes in it.
    """
    if phase.base is None:
        return model, ""
    from transformers import set_seed

    with phase.arguments.main_process_first(desc="saving the extended base"):
        if phase.arguments.process_index == 0:
            identity = save_extended_base(model, tokenizer, phase.base)
            logger.info("extended base saved to %s", phase.base)
        else:
            identity = base_hash(phase.base)
    if phase.backbone.quantised:
        attention = attention_for(phase.backbone, model.config, compute_dtype)
        del model
        model = load_quantised(phase.base, phase.method, compute_dtype or torch.float32, attention)
    # An adapter starts the same whether the phase before it was trained just now or in an earlier start.
    set_seed(phase.arguments.seed)
    return adapt(phase.backbone, model, new_rows), identity


def load_result(phase: Phase, result: Path, compute_dtype: torch.dtype | None) -> "PreTrainedModel":
    """The base that an earlier phase trained, in the format and with the attention of the phase that goes on."""
    from transformers import AutoConfig, AutoModelForCausalLM

    attention = attention_for(phase.backbone, AutoConfig.from_pretrained(result), compute_dtype)
    dtype = getattr(torch, phase.backbone.dtype)
    return AutoModelForCausalLM.from_pretrained(result, dtype=dtype, attn_implementation=attention)


def whole_model(trainer: Any, phase: Phase, new_rows: Sequence[int]) -> Any:
    """The trained model with all its parameters, on the first process; None elsewhere. Called by every process.

    Args:
        trainer: after its training.
        phase: which it was.
        new_rows: as for `model_of`.

    Raises:
        BackboneError: if parameters that were sharded over the processes cannot be put together again.
    """
    from transformers import AutoModelForCausalLM

    model = trainer.accelerator.unwrap_model(trainer.model)
    if not is_sharded(trainer.model):
        return model if trainer.is_world_process_zero() else None
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return None
    if phase.base is None:
        gathered: Any = AutoModelForCausalLM.from_config(model.config)
    else:
        plain = AutoModelForCausalLM.from_pretrained(phase.base, dtype=getattr(torch, phase.backbone.dtype))
        gathered = adapt(phase.backbone, plain, new_rows)
    missing, unexpected = gathered.load_state_dict(state, strict=False)
    tied = set(getattr(gathered, "all_tied_weights_keys", None) or {})
    if lacking := [*unexpected, *(set(missing) - tied)]:
        raise BackboneError(
            f"The processes' parts of the model do not make one: {sorted(lacking)[0]!r} does not fit. "
            "Train with train/accelerate/ddp.yaml."
        )
    return gathered
