"""One phase's training, from its newest whole checkpoint to its best model."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback

from llmrec.training.checkpoints import checkpoint_to_resume
from llmrec.training.phases import Phase
from llmrec.training.ranking import RankingCallback
from llmrec.training.shutdown import ShutdownCallback
from llmrec.training.trainer import GenerativeTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def fit(
    phase: Phase,
    model: Any,
    rows: Any,
    valid: Any,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    ranking: RankingCallback | None,
    semantic_ids: Sequence[int],
    tasks: Sequence[str],
    described: Any,
    fresh: bool = False,
) -> GenerativeTrainer:
    """Trains a phase's model; returns the trainer, which holds it.

    Args:
        phase: how.
        model: of `model_of`.
        rows, valid: of training and validation, as `GenerativeTrainer` takes them.
        tokenizer: goes into checkpoints.
        ranking: ranks validation users at every evaluation; None for the loss alone.
        semantic_ids: the token ids that spell items, for a loss over these alone.
        tasks: the names of all tasks.
        described: what makes this run this run; checkpoints of another one are removed, not continued.
        fresh: begin anew.

    Raises:
        SystemExit: with 143 or 130 after SIGTERM or Ctrl-C, once a checkpoint is saved.
        BackboneError: if a checkpoint cannot be written, or the options do not go together.
    """
    arguments = phase.arguments
    arguments.dataloader_pin_memory = arguments.device.type == "cuda"
    if (deepspeed := getattr(arguments, "hf_deepspeed_config", None)) is not None:
        from transformers.integrations.deepspeed import set_hf_deepspeed_config

        set_hf_deepspeed_config(deepspeed)  # which the Trainer itself does only without --deepspeed
    shutdown = ShutdownCallback()
    callbacks: list[TrainerCallback] = [ranking] if ranking else []
    if arguments.early_stopping:
        callbacks.append(EarlyStoppingCallback(arguments.early_stopping))
    trainer = GenerativeTrainer(
        model,
        arguments,
        rows,
        valid,
        layout=arguments.batching,
        loss_vocabulary=arguments.loss_vocabulary,
        semantic_ids=semantic_ids,
        tasks=sorted(tasks),
        processing_class=tokenizer,
        callbacks=[*callbacks, shutdown],
    )
    resume = checkpoint_to_resume(arguments.output_dir, [described, phase.method], fresh=fresh)
    if resume is not None:
        logger.info("continuing from %s", resume)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    shutdown.exit_if_stopped()
    if arguments.deepspeed_plugin is not None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        # With ZeRO-3, a model that one process loads from here on would wait for the others to take their shares.
        unset_hf_deepspeed_config()
    trainer.accelerator.wait_for_everyone()
    return trainer
