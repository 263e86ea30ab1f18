"""What each variant of a study changed against its reference: paired by test case, over the seeds that both have."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.evaluation.comparison import LEVEL
from llmrec.evaluation.evaluation import FOLDER, Evaluation
from llmrec.evaluation.metrics import Metric, values
from llmrec.evaluation.uncertainty import holm, over_seeds, paired_difference
from llmrec.exceptions import DataError
from llmrec.study.place import RunPlace
from llmrec.study.plan import StudyPlan

_RESAMPLES = 1000


def differences(plan: StudyPlan, places: Sequence[RunPlace], seed: int = 0) -> dict[str, Any] | None:
    """Every cell beside the reference variant's cell of the same axes, JSON-ready; None for a study without one.

    A case's value is its mean over the seeds, of which the same are taken for both. Intervals and tests are over
    users, for these trained models; the seeds' own spread stands beside them. Holm's correction spans all tests of the
    document, so it changes while a study is under way.

    Args:
        plan: the study.
        places: of all its runs.
        seed: of the resampling.

    Returns:
        `reference`, `level`, `tests`, `resamples`, `seed` and `cells`: by the cell's name its reference's (`against`),
        the `seeds`, the number of `users`, and `metrics`: of each of the plan's, as far as both have its cases,
        `before` (the reference's), `after`, `difference`, `difference interval95`, `by_seed`, `sd_over_seeds`,
        `p_value` and `p_holm`. Without cells that can be compared it is empty; one that is of another split than its
        reference, or whose cases are gone, stands under `not_compared` with the reason.
    """
    if not plan.reference:
        return None
    done = {(place.run.cell, place.run.seed): place for place in places if place.metrics() is not None}
    pairs: dict[tuple[str, str], list[int]] = {}
    for run in plan.runs:
        against = plan.reference_of(run)
        if run.cell != against and (run.cell, run.seed) in done and (against, run.seed) in done:
            pairs.setdefault((run.cell, against), []).append(run.seed)
    # Enough for the smallest p-value to survive the correction of all that may still be tested.
    tests = max(1, (len(plan.cells) - 1) * len(plan.metrics))
    resamples = max(_RESAMPLES, 2 * int(np.ceil(tests / LEVEL)))
    cells: dict[str, Any] = {}
    not_compared: dict[str, str] = {}
    read: dict[RunPlace, Evaluation] = {}
    for (cell, against), seeds in pairs.items():
        try:
            both = [[_read(done[name, one], read) for one in seeds] for name in (against, cell)]
            cells[cell] = {"against": against, "seeds": seeds} | _compared(both, plan.metrics, resamples, seed)
        except DataError as error:
            not_compared[cell] = str(error)
    found = [metric for one in cells.values() for metric in one["metrics"].values()]
    for metric, corrected in zip(found, holm([metric["p_value"] for metric in found]), strict=True):
        metric["p_holm"] = float(corrected)
    return {
        "reference": plan.reference,
        "level": LEVEL,
        "tests": len(found),
        "resamples": resamples,
        "seed": seed,
        "cells": cells,
        "not_compared": not_compared,
    }


def _read(place: RunPlace, read: dict[RunPlace, Evaluation]) -> Evaluation:
    """The evaluation of a run's test; every file is read once."""
    if place not in read:
        found, document = Evaluation.load(place.folder / FOLDER / f"{place.run.cell}.json")
        # A loaded evaluation does not say what its candidates were; its document does.
        read[place] = replace(found, facts={**found.facts, "exclude_seen": document.get("exclude_seen")})
    return read[place]


def _compared(
    both: Sequence[Sequence[Evaluation]], metrics: Sequence[str], resamples: int, seed: int
) -> dict[str, Any]:
    """`both` are the reference's evaluations and the cell's, by seed."""
    first = both[0][0]
    for evaluation in (one for side in both for one in side):
        if not _alike(first, evaluation):
            raise DataError(
                f"{evaluation.system} and {first.system} were tested on different cases or candidates, so they cannot "
                "be paired. Train both on the same interactions and split."
            )
    users = first.user_places()
    found: dict[str, Any] = {}
    for metric in metrics:
        columns = [[_values(one, metric) for one in side] for side in both]
        mask = _mask(first, metric)
        if mask is None or not mask.any() or any(column is None for side in columns for column in side):
            continue
        table = np.array(columns)[:, :, mask]  # (2, S, C)
        before, after = table.mean(axis=1)
        gap = paired_difference(after[:, None], before[:, None], users[mask], resamples, seed)
        by_seed = (table[1] - table[0]).mean(axis=1)
        found[metric] = {
            "cases": int(mask.sum()),
            "before": float(before.mean()),
            "after": float(after.mean()),
            "difference": float(gap.mean[0]),
            "difference interval95": [float(gap.low[0]), float(gap.high[0])],
            "by_seed": by_seed.tolist(),
            "sd_over_seeds": over_seeds(by_seed)[1],
            "p_value": float(gap.p_value[0]),
        }
    return {"users": len(np.unique(users[first.counted])), "metrics": found}


def _alike(one: Evaluation, other: Evaluation) -> bool:
    """Whether two evaluations are of the same cases and candidates."""
    facts = all(one.facts.get(name) == other.facts.get(name) for name in ("split", "part", "items", "exclude_seen"))
    counted = np.array_equal(one.counted, other.counted)
    return facts and counted and (one.user_ids, one.targets) == (other.user_ids, other.targets)


def _mask(evaluation: Evaluation, metric: str) -> npt.NDArray[np.bool_] | None:
    """The cases that a metric is over, the slice's or the headline's, as the study's own table has them."""
    name = metric.rpartition(" ")[0]
    found = evaluation.slices.get(name) if name else evaluation.counted
    return None if found is None else np.asarray(found, dtype=np.bool_)


def _values(evaluation: Evaluation, metric: str) -> npt.NDArray[np.float64] | None:
    """(C,) every case's value; None beyond the cut-offs that were evaluated."""
    name, _, k = metric.rpartition(" ")[2].partition("@")
    kinds: dict[str, Metric] = {"HR": "HR", "NDCG": "NDCG", "MRR": "MRR"}
    return values(evaluation.ranks, kinds[name], int(k)) if int(k) in evaluation.ks else None
