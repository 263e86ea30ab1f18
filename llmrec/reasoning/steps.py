"""A model after each number of steps: what it ranks when it thinks less than it has learnt to."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmrec.backbones.reasoning import ReasoningEncoder
from llmrec.data.split import Part, Split
from llmrec.evaluation.evaluation import Evaluation, evaluate
from llmrec.exceptions import BackboneError
from llmrec.sequence.histories import LoggedHistories
from llmrec.sequence.scores import CaseScores

if TYPE_CHECKING:
    from llmrec.sequence.model import SequenceModel


def thinker(model: "SequenceModel") -> ReasoningEncoder:
    """The model's encoder; raises BackboneError if it does not think."""
    if not isinstance(model.encoder, ReasoningEncoder) or not model.encoder.config.steps:
        raise BackboneError(
            f"The encoder is a {model.encoder.config.model_type}, which answers without a step of thought. Train one "
            "that thinks with train/seqrec.py --reasoning prl."
        )
    return model.encoder


def evaluate_steps(
    model: "SequenceModel",
    split: Split,
    part: Part = "test",
    *,
    system: str = "model",
    ks: Sequence[int] = (10,),
    cases: npt.NDArray[np.integer[Any]] | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[Evaluation]:
    """The evaluation of a model after 0, 1, …, K steps, named `SYSTEM-steps=k`, as `evaluate` makes it.

    Args:
        model: of an encoder that thinks.
        split: of its items.
        part: which cases.
        system: its name.
        ks: cut-offs.
        cases: the places of the cases to rank; default: all.
        facts: for the evaluations' documents.
        progress: whether bars are shown.

    Raises:
        BackboneError: if the encoder does not think.
        DataError: as `evaluate`.
    """
    encoder = thinker(model)
    chosen = None if cases is None else np.asarray(cases, dtype=np.int64)
    logged = LoggedHistories(split, model.events).cases(part, chosen)
    found = []
    for steps in range(encoder.config.steps + 1):
        with encoder.thinking(steps):
            scores = CaseScores(model, logged, progress=f"{steps} steps" if progress else "")
            found.append(
                evaluate(f"{system}-steps={steps}", split, part, scores=scores, ks=ks, cases=cases, facts=facts)
            )
    return found
