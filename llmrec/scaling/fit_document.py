"""The document of a fit: all that `llmrec scale fit --json` writes, and a report shows."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.scaling.bootstrap import LEVEL
from llmrec.scaling.performance_law import PerformanceLaw
from llmrec.scaling.power_law import PowerLaw
from llmrec.scaling.scaling_fit import ScalingFit, ends_of_draws
from llmrec.scaling.verdict import advice_of

Table = npt.NDArray[np.float64]


def fit_document(found: ScalingFit) -> dict[str, Any]:
    """JSON-ready, all numbers finite or None.

    Returns:
        Of the Performance Law: law {name, parameters}, r2, mae, leave_one_out {r2, mae, rmse}. power_law, chinchilla:
        the same and interval of their parameters. chosen: the law that predicts. optimum {depth, width, metric}: by
        the closed form, None beyond reach. interval {depth, width, metric, parameters, open}: 90 %, cut at the end of
        the reach, which `open` says for both ends. determined {depth, width, data, negatives}, reasons; form, axes
        {depth, width: kind, effect_p, peak_p}, verdict, advice; base, gains, gains_power_law; reach; n, cells (a row
        each, with what the laws say), encoder, resamples, seed, points.
    """
    law, main, reach = found.performance_law, found.candidates[PerformanceLaw.name], found.reach
    peak, doubled = law.peak, found.gains()
    reached = {axis: _within(peak[axis], reach.bounds(axis)) for axis in peak}
    optimum: dict[str, float | None] = {**reached, "metric": None}
    interval: dict[str, Any] = {axis: list(ends) for axis, ends in found.peak_intervals.items()}
    interval["open"] = {
        axis: [ends[0] <= reach.bounds(axis)[0], ends[1] >= reach.bounds(axis)[1]]
        for axis, ends in found.peak_intervals.items()
    }
    if (depth := reached["depth"]) is not None and (width := reached["width"]) is not None:
        place = (depth, width, *found.most)
        optimum["metric"] = float(law.predict(*place))
        interval["metric"] = ends_of_draws(law.predict_many(main.resampled.parameters, *place))
    own = main.document()
    interval["parameters"] = own.pop("interval")
    others = {name: entry.document() for name, entry in found.candidates.items() if name != PerformanceLaw.name}
    return {
        "law": {"name": PerformanceLaw.name, "parameters": own.pop("parameters")},
        **own,
        **others,
        "chosen": found.chosen,
        "optimum": optimum,
        "interval": interval,
        "level": LEVEL,
        "determined": dict(found.determined),
        "reasons": found.reasons(),
        "form": found.form,
        "axes": {
            axis: {"kind": entry.kind, "effect_p": entry.effect_p, "peak_p": entry.peak_p}
            for axis, entry in found.evidence.items()
        },
        "verdict": found.verdict(),
        "advice": advice_of(doubled),
        "base": {"depth": found.base[0], "width": found.base[1]},
        "gains": {name: gain.document() for name, gain in doubled.items()},
        "gains_power_law": {name: gain.document() for name, gain in found.gains(PowerLaw.name).items()},
        "reach": {"factor": reach.factor, "ends": {axis: list(ends) for axis, ends in reach.ends.items()}},
        "n": len(found.points),
        "cells": _cells(found),
        "encoder": found.points.encoder,
        "resamples": found.resamples,
        "seed": found.seed,
        "points": found.points.records(),
    }


def summary(document: Mapping[str, Any]) -> str:
    """One line: the law's R² on the points and on cells left out, beside the power law's."""
    power = document["power_law"]
    return (
        f"{document['n']} trainings in {len(document['cells'])} cells. Performance Law: R² {document['r2']:.3f}, left "
        f"out {document['leave_one_out']['r2']:.3f}; power law: R² {power['r2']:.3f}, left out "
        f"{power['leave_one_out']['r2']:.3f}."
    )


def _cells(found: ScalingFit) -> list[dict[str, Any]]:
    """Every cell with its mean and what the laws say."""
    grid = found.grid
    names = ("depth", "width", "effective", "negatives")
    columns: dict[str, Table] = {name: values for name in names if (values := grid.axis(name)) is not None}
    columns |= {"metric": grid.mean, "seeds": grid.count}
    columns |= {name: entry.law.fitted.at(grid) for name, entry in found.candidates.items()}
    return [{name: float(values[row]) for name, values in columns.items()} for row in range(len(grid))]


def _within(value: float, bounds: tuple[float, float]) -> float | None:
    return value if math.isfinite(value) and bounds[0] <= value <= bounds[1] else None
