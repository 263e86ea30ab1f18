"""Probe: what a short training took on a machine, and the seconds that other trainings will take there.

No speed is assumed: an estimate comes from probes of the same encoder on the same device, or not at all.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llmrec.exceptions import DataError
from llmrec.scaling.cost import Cost
from llmrec.scaling.language import LanguageShape
from llmrec.storage import write_json


@dataclass(frozen=True)
class Probe:
    """A training of some steps, measured.

    Attributes:
        encoder: whose it was: a `Shape`'s encoder, or "lm:" and a `LanguageShape`'s model type.
        depth, width: of the model.
        seconds_per_step: mean after the first steps.
        startup_seconds: from the start of the process to its first step.
        tokens_per_step: events that a step learnt.
        flops_per_step: operations that these events cost, padding left out.
        flops_per_second: of the training.
        peak: operations per second of a large matrix product on the same devices, measured.
        mfu: flops_per_second / peak, the utilisation.
        device: its name.
        dtype: what products are computed in.
        steps: that were measured.
        processes: of the training.
    """

    encoder: str
    depth: int
    width: int
    seconds_per_step: float
    startup_seconds: float
    tokens_per_step: float
    flops_per_step: float
    flops_per_second: float
    peak: float
    mfu: float
    device: str
    dtype: str
    steps: int
    processes: int = 1

    def __post_init__(self) -> None:
        """Raises DataError for a measurement that is none."""
        for name in ("seconds_per_step", "tokens_per_step", "flops_per_step", "flops_per_second", "peak", "mfu"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise DataError(f"{name} of a probe is {value!r}. Measure it again.")

    def save(self, path: str | Path) -> None:
        """Writes the probe as JSON, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Probe":
        """A saved probe.

        Raises:
            DataError: if there is none, or it is not one.
        """
        try:
            found: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            known = {entry.name for entry in fields(cls)}
            return cls(**{name: value for name, value in found.items() if name in known})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is no probe: {error}. Measure again, with another folder.") from error


def encoder_name(cost: Cost) -> str:
    """By what probes and costs are told to belong together."""
    shape = cost.shape
    return f"lm:{shape.model_type}" if isinstance(shape, LanguageShape) else shape.encoder


def seconds_per_step(cost: Cost, probes: Sequence[Probe], tokens_per_step: float | None = None) -> float:
    """Seconds that a step of a model is expected to take.

    Between two probes the logarithm of the seconds is a straight line over the logarithm of the operations. A step of
    fewer operations than any probe's takes as long as the smallest's, whose time may be overhead alone; one of more
    runs at the largest's rate. Both err on the long side where larger steps are better used.

    Args:
        cost: of the model.
        probes: of the same encoder, on one device in one type; others of them are not looked at.
        tokens_per_step: events of a step; None: the probes' mean.

    Raises:
        DataError: if no probe is of this encoder, or they are of several devices, types or numbers of processes.
    """
    own = _own(cost, probes)
    tokens = _tokens(own) if tokens_per_step is None else tokens_per_step
    wanted = math.log(cost.flops_per_token * tokens)
    # Of probes of equal operations, the mean of the logarithms.
    found: dict[float, list[float]] = {}
    for probe in own:
        found.setdefault(math.log(probe.flops_per_step), []).append(math.log(probe.seconds_per_step))
    places = sorted(found)
    times = [sum(found[place]) / len(found[place]) for place in places]
    if wanted <= places[0]:
        return math.exp(times[0])
    if wanted >= places[-1]:
        return math.exp(times[-1] + wanted - places[-1])
    above = next(number for number, place in enumerate(places) if place >= wanted)
    share = (wanted - places[above - 1]) / (places[above] - places[above - 1])
    return math.exp(times[above - 1] + share * (times[above] - times[above - 1]))


def seconds(
    cost: Cost, tokens: float, epochs: float, probes: Sequence[Probe], tokens_per_step: float | None = None
) -> float:
    """Seconds of a training: the start of its process, and its steps. Evaluations and the test come on top.

    Args:
        cost: of the model.
        tokens: events that are learnt in an epoch.
        epochs: how often.
        probes: see `seconds_per_step`.
        tokens_per_step: likewise.

    Raises:
        DataError: if the probes do not fit, or there is nothing to train on.
    """
    cost.flops(tokens, epochs)  # refuses what is no training
    own = _own(cost, probes)
    each = _tokens(own) if tokens_per_step is None else tokens_per_step
    start = sum(probe.startup_seconds for probe in own) / len(own)
    return start + tokens * epochs / each * seconds_per_step(cost, own, each)


def _own(cost: Cost, probes: Sequence[Probe]) -> list[Probe]:
    name = encoder_name(cost)
    own = [probe for probe in probes if probe.encoder == name]
    if not own:
        others = ", ".join(sorted({probe.encoder for probe in probes})) or "none"
        raise DataError(f"No probe is of {name} (there are: {others}), and no speed is assumed. Measure one.")
    machines = {(probe.device, probe.dtype, probe.processes) for probe in own}
    if len(machines) > 1:
        named = "; ".join(f"{device}, {dtype}, {processes}" for device, dtype, processes in sorted(machines))
        raise DataError(f"The probes are of several machines ({named} processes). Give those of one.")
    return own


def _tokens(own: Sequence[Probe]) -> float:
    return sum(probe.tokens_per_step for probe in own) / len(own)
