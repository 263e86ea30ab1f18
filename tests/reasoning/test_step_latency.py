"""The timing of steps: what is timed, in which order, and how it is summed up. No time is asserted."""

from typing import Any

import numpy as np
import pytest
from thinking_models import log, model

from llmrec.backbones.sasrec import SASRecConfig
from llmrec.exceptions import BackboneError, DataError
from llmrec.reasoning.latency import step_latency
from llmrec.reasoning.steps import thinker
from llmrec.sequence.histories import LoggedHistories
from llmrec.sequence.model import SequenceModel, sequence_config


def test_medians_and_ratios_are_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a step moves by as many seconds as it has thoughts, and more in later rounds."""
    made = model("prl", steps=2)
    histories = LoggedHistories(log(), made.events).cases("test")[:3]
    now, asked = [0.0], []
    last = made.last

    def slow(*given: Any, **batch: Any) -> Any:
        steps = made.encoder.steps
        asked.append((len(batch["items"]), steps))
        now[0] += (1.0 + steps) * (1 + len(asked) // 9)
        return last(*given, **batch)

    monkeypatch.setattr(made, "last", slow)
    monkeypatch.setattr("llmrec.reasoning.latency.time.perf_counter", lambda: now[0])
    found = step_latency(made, histories, batches=(1, 2), rounds=5)
    assert [row["histories"] for row in found["batches"]] == [1, 2]
    assert len(asked) == 2 * 7 * 3
    for begin in range(0, len(asked), 3):
        assert sorted(steps for _, steps in asked[begin : begin + 3]) == [0, 1, 2]
    assert len({steps for _, steps in asked[::3]}) == 3  # each of them is first at times
    assert {size for size, _ in asked[:21]} == {1}
    for row in found["batches"]:
        assert row["ratio"][0] == 1
        assert 1 < row["ratio"][1] < row["ratio"][2]
        assert all(value > 0 for value in row["milliseconds"])
    rounds = np.zeros((5, 3))
    for number, (_, steps) in enumerate(asked[:21]):
        if number >= 6:
            rounds[number // 3 - 2, steps] = 1000 * (1.0 + steps) * (1 + (number + 1) // 9)
    assert found["batches"][0]["milliseconds"] == pytest.approx(np.median(rounds, axis=0).tolist())
    assert found["batches"][0]["ratio"] == pytest.approx(np.median(rounds / rounds[:, :1], axis=0).tolist())
    assert made.encoder.steps == 2
    assert found["rounds"] == 5


def test_models_that_do_not_think_have_no_steps() -> None:
    plain = SequenceModel(sequence_config(SASRecConfig(max_position_embeddings=10), 9, 10))
    for made in (plain, model("prl", steps=0)):
        with pytest.raises(BackboneError, match=r"answers without a step of thought\. Train one"):
            thinker(made)
    with pytest.raises(DataError, match="have no time"):
        step_latency(model(), [])
