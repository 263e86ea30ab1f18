"""The flags of reasoning: what they make, and what they refuse."""

from typing import Any

import numpy as np
import pytest

from llmrec.backbones.reasoning import ReasoningConfig
from llmrec.exceptions import RecipeError
from llmrec.losses.arguments import LossArguments
from llmrec.losses.full_softmax import FullSoftmax
from llmrec.reasoning.arguments import ReasoningArguments
from llmrec.reasoning.losses import EnsembleLoss, ProgressiveLoss, TaskLoss
from llmrec.reasoning.tasks import StepTask
from llmrec.sequence.arguments import EncoderArguments
from llmrec.sequence.events import EventConfig

EVENTS = EventConfig(actions=["buy", "like"])


@pytest.mark.parametrize("flags", [{}, {"reasoning": "prl", "reasoning_steps": 0}], ids=["none", "no-steps"])
def test_without_steps_nothing_is_wrapped(flags: dict[str, Any]) -> None:
    arguments = ReasoningArguments(**flags)
    arguments.check()
    config = arguments.config(EncoderArguments(), 20)
    assert config.to_dict() == EncoderArguments().config(20).to_dict()
    loss = FullSoftmax()
    assert arguments.loss(loss, EVENTS) is loss


@pytest.mark.parametrize(("kind", "block"), [("erl", None), ("prl", None), ("block", 3)])
@pytest.mark.parametrize("encoder", ["sasrec", "hstu", "llama", "gpt2", "gru4rec"])
def test_the_encoder_has_positions_for_thoughts_too(kind: Any, block: int | None, encoder: Any) -> None:
    arguments = ReasoningArguments(reasoning=kind, reasoning_steps=3, reasoning_block=block)
    arguments.check()
    flags = EncoderArguments(encoder=encoder, hidden_size=32)
    if encoder == "gru4rec" and block:
        with pytest.raises(RecipeError, match="reads one after another"):
            arguments.config(flags, 20)
        return
    config = arguments.config(flags, 20)
    assert isinstance(config, ReasoningConfig)
    assert (config.steps, config.kind, config.block_size) == (3, kind, block or 1)
    assert config.max_position_embeddings == 20
    assert config.encoder_config().max_position_embeddings == 20 + 3 * (block or 1)


def test_each_kind_has_its_loss() -> None:
    ensemble = ReasoningArguments(reasoning="erl", reasoning_diversity=0.2).loss(FullSoftmax(), EVENTS)
    assert isinstance(ensemble, EnsembleLoss)
    assert ensemble.diversity == 0.2
    flags = {"reasoning_alpha": 1.5, "reasoning_noise": 0.04, "reasoning_contrast": 0.3}
    progressive = ReasoningArguments(reasoning="prl", **flags).loss(FullSoftmax(), EVENTS)  # type: ignore[arg-type]
    assert isinstance(progressive, ProgressiveLoss)
    assert (progressive.sharpening, progressive.noise, progressive.contrast) == (1.5, 0.04, 0.3)
    tasks = ReasoningArguments(reasoning="block", reasoning_tasks=["any=1", "buy=0.5"])
    tasks.check()
    assert tasks.actions == ["buy"]
    found = tasks.loss(FullSoftmax(), EVENTS)
    assert isinstance(found, TaskLoss)
    assert found.tasks == (StepTask(None, 1.0), StepTask(1, 0.5))
    assert ReasoningArguments(reasoning="block").loss(FullSoftmax(), EVENTS).tasks == ()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"reasoning": "cot"}, "none, erl, prl or block"),
        ({"reasoning_steps": 2}, "--reasoning_steps is given"),
        ({"reasoning": "prl", "reasoning_block": 2}, "--reasoning_block is given.*--reasoning block"),
        ({"reasoning": "erl", "reasoning_alpha": 2.0}, "--reasoning_alpha is given"),
        ({"reasoning": "prl", "reasoning_diversity": 2.0}, "--reasoning_diversity is given"),
        ({"reasoning": "prl", "reasoning_steps": -1}, "--reasoning_steps is -1"),
        ({"reasoning": "prl", "reasoning_noise": 0.0}, "--reasoning_noise is 0"),
        ({"reasoning": "block", "reasoning_tasks": ["any=1"]}, "1 tasks for 2 steps"),
        ({"reasoning": "block", "reasoning_tasks": ["any=1", "buy"]}, "ACTION=NUMBER"),
        ({"reasoning": "block", "reasoning_tasks": ["any=1", "buy=-2"]}, "ACTION=NUMBER"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        ReasoningArguments(**flags).check()


def test_what_a_loss_or_an_encoder_cannot_do_is_refused() -> None:
    bce = LossArguments(loss="bce", num_negatives=3).build(np.ones(9, dtype=np.int64))
    with pytest.raises(RecipeError, match=r"--reasoning erl: .* judges each item for itself"):
        ReasoningArguments(reasoning="erl").loss(bce, EVENTS)
    assert isinstance(ReasoningArguments(reasoning="prl").loss(bce, EVENTS), ProgressiveLoss)
    with pytest.raises(RecipeError, match="both sides"):
        ReasoningArguments(reasoning="prl").config(EncoderArguments(encoder="bert4rec"), 20)
    with pytest.raises(RecipeError, match=r"'share'.*buy, like"):
        ReasoningArguments(reasoning="block", reasoning_tasks=["any=1", "share=1"]).loss(FullSoftmax(), EVENTS)
