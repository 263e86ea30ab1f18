"""Flags of a loss: each builds what it says, and those that do not fit are refused."""

from typing import Any

import numpy as np
import pytest
import torch

from llmrec.exceptions import BackboneError, RecipeError
from llmrec.losses.arguments import LossArguments
from llmrec.losses.binary import BinaryCrossEntropy
from llmrec.losses.full_softmax import FullSoftmax
from llmrec.losses.sampled_softmax import OwnNegativesSoftmax, SharedNegativesSoftmax

COUNTS = np.array([3, 0, 5])


def test_the_default_is_the_full_softmax() -> None:
    assert isinstance(LossArguments().build(COUNTS), FullSoftmax)
    assert isinstance(LossArguments().build(COUNTS[:1]), FullSoftmax)


@pytest.mark.parametrize(("negatives", "ends"), [("uniform", [1, 2, 3]), ("popularity", [3, 4, 9])])
def test_own_and_shared_draws(negatives: Any, ends: list[int]) -> None:
    flags = LossArguments("sampled_softmax", 7, negatives, log_q=False)
    loss = flags.build(COUNTS)
    assert isinstance(loss, OwnNegativesSoftmax)
    assert (loss.sampler.ends.tolist(), loss.num_negatives, loss.log_q) == (ends, 7, False)
    shared = LossArguments("sampled_softmax", 7, negatives, shared_negatives=True, cross_process=True).build(COUNTS)
    assert isinstance(shared, SharedNegativesSoftmax)
    assert shared.sampler is not None
    assert (shared.sampler.ends.tolist(), shared.num_negatives) == (ends, 7)
    assert (shared.targets, shared.log_q, shared.cross_process) == (None, True, True)


@pytest.mark.parametrize(("negatives", "drawn"), [("in_batch", None), ("mixed", [1, 2, 3])])
def test_the_batch_as_negatives(negatives: Any, drawn: list[int] | None) -> None:
    loss = LossArguments("sampled_softmax", 4, negatives).build(COUNTS)
    assert isinstance(loss, SharedNegativesSoftmax)
    assert loss.targets is not None
    assert loss.targets.ends.tolist() == [3, 4, 9]
    assert (None if loss.sampler is None else loss.sampler.ends.tolist()) == drawn
    assert not loss.cross_process


def test_binary_losses() -> None:
    plain = LossArguments("bce", 1, "popularity").build(COUNTS)
    assert isinstance(plain, BinaryCrossEntropy)
    assert (plain.beta, plain.sampler.ends.tolist()) == (1, [3, 4, 9])
    calibrated = LossArguments("gbce", 1, gbce_t=0.5).build(COUNTS)
    assert isinstance(calibrated, BinaryCrossEntropy)
    assert calibrated.beta == pytest.approx(0.75)  # the rate is 1/2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_negatives": 0}, "num_negatives is 0"),
        ({"loss": "gbce", "gbce_t": 1.5}, "gbce_t is 1.5"),
        ({"loss": "bce", "negatives": "in_batch"}, "shares no negatives"),
        ({"cross_process": True}, "shares no negatives"),
        ({"negatives": "popularity"}, "draws no negatives"),
        ({"loss": "sampled_softmax", "cross_process": True}, "of its own"),
        ({"loss": "sampled_softmax", "negatives": "mixed", "shared_negatives": True}, "in any case"),
        ({"loss": "hinge"}, "'hinge'"),
        ({"loss": "sampled_softmax", "negatives": "hard"}, "'hard'"),
    ],
)
def test_flags_that_do_not_fit(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        LossArguments(**flags).build(COUNTS)


def test_one_item_has_no_negatives() -> None:
    with pytest.raises(BackboneError, match="softmax"):
        LossArguments("sampled_softmax").build(COUNTS[:1])


def test_buffers_follow_the_loss() -> None:
    loss = LossArguments("sampled_softmax", 4, "mixed").build(COUNTS).to("meta")
    assert {buffer.device for buffer in loss.buffers()} == {torch.device("meta")}
