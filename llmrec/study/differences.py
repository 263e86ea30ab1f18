"""What each variant of a study changed against its reference: paired by test case, over the seeds that both have."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmrec.evaluation.comparison import LEVEL
from llmrec.evaluation.evaluation import FOLDER, Evaluation
from llmrec.evaluation.metrics import Metric, values
from llmrec.evaluation.uncertainty import Table, holm, over_seeds, paired_difference
from llmrec.exceptions import DataError
from llmrec.study.place import RunPlace
from llmrec.study.plan import StudyPlan

_FEWEST, _MOST = 1000, 10_000  # resamples


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
        `reference`, `level`, `tests`, `resamples`, `seed`, `left_out` (sentences: seeds that cannot be paired, and
        why) and `cells`: by the cell's name its reference's (`against`), the `seeds`, the number of `users`, and
        `metrics`: of each of the plan's, as far as both have its cases, `cases`, `before` (the reference's), `after`,
        `difference`, `difference interval95`, `by_seed`, `sd_over_seeds`, `p_value` and `p_holm`.
    """
    if not plan.reference:
        return None
    done = {(place.run.cell, place.run.seed): place for place in places if place.metrics() is not None}
    read: dict[RunPlace, Evaluation | str] = {}
    pairs: dict[str, list[Pair]] = {}
    left_out: list[str] = []
    for run in plan.runs:
        against = plan.reference_of(run)
        if run.cell == against or (run.cell, run.seed) not in done or (against, run.seed) not in done:
            continue
        both = [_read(done[name, run.seed], read) for name in (against, run.cell)]
        wrong = [f"{name}, seed {run.seed}: {one}" for name, one in zip((against, run.cell), both, strict=True)
                 if isinstance(one, str)]  # fmt: skip
        found = [one for one in both if isinstance(one, Evaluation)]
        if len(found) == 2 and not _alike(*found):
            wrong = [
                f"{run.cell}, seed {run.seed}, was tested on other cases or candidates than {against}: train both on "
                "the same interactions and split."
            ]
        elif len(found) == 2 and run.cell in pairs and not _alike(pairs[run.cell][0].before, found[0]):
            wrong = [
                f"{run.cell} and {against}, seed {run.seed}, were tested on other cases or candidates than with seed "
                f"{pairs[run.cell][0].seed}: train all seeds on the same interactions and split."
            ]
        left_out += [one for one in wrong if one not in left_out]
        if not wrong:
            pairs.setdefault(run.cell, []).append(Pair(run.seed, *found))
    cells: dict[str, Any] = {}
    for cell in plan.cells:
        if cell in pairs:
            first = pairs[cell][0].before
            cells[cell] = {
                "against": first.system,
                "seeds": [pair.seed for pair in pairs[cell]],
                "users": len(np.unique(first.user_places()[first.counted])),
                "metrics": {},
            }
    resamples = _resamples((len(plan.cells) - 1) * len(plan.metrics))
    _compare(pairs, plan.metrics, cells, resamples, seed)
    tested = [metric for one in cells.values() for metric in one["metrics"].values()]
    for metric, corrected in zip(tested, holm([metric["p_value"] for metric in tested]), strict=True):
        metric["p_holm"] = float(corrected)
    return {
        "reference": plan.reference,
        "level": LEVEL,
        "tests": len(tested),
        "resamples": resamples,
        "seed": seed,
        "left_out": left_out,
        "cells": cells,
    }


class Pair(NamedTuple):
    """One seed's two evaluations of the same cases: the reference's and the cell's."""

    seed: int
    before: Evaluation
    after: Evaluation


def _resamples(tests: int) -> int:
    """So many that a p-value which just survives the correction of all tests is seen twenty times; within bounds."""
    return int(min(max(np.ceil(20 * tests / LEVEL), _FEWEST), max(np.ceil(2 * tests / LEVEL), _MOST)))


def _read(place: RunPlace, read: dict[RunPlace, Evaluation | str]) -> Evaluation | str:
    """The evaluation of a run's test, or why there is none; every file is read once."""
    if place not in read:
        path = place.folder / FOLDER / f"{place.run.cell}.json"
        try:
            found, document = Evaluation.load(path)
        except DataError:
            # Without its own words, which name this machine's folders.
            read[place] = f"{place.folder.name}/{FOLDER} holds no evaluation that can be read. Train it again."
        else:
            # A loaded evaluation does not say what its candidates were; its document does.
            read[place] = replace(found, facts={**found.facts, "exclude_seen": document.get("exclude_seen", True)})
    return read[place]


def _compare(
    pairs: Mapping[str, Sequence[Pair]], metrics: Sequence[str], cells: dict[str, Any], resamples: int, seed: int
) -> None:
    """Writes every cell's metrics. All that is over the same cases is resampled at once: draws are the same anyway."""
    together: dict[bytes, list[tuple[str, str, Table]]] = {}  # by the owners of the cases
    for cell, some in pairs.items():
        first = some[0].before
        users = first.user_places()
        for metric in metrics:
            mask = _mask(first, metric)
            columns = [
                [_values(one, metric) for one in side] for side in ([p.before for p in some], [p.after for p in some])
            ]
            if mask is None or not mask.any() or any(column is None for side in columns for column in side):
                continue
            cells[cell]["metrics"][metric] = {}  # in the plan's order
            table = np.array(columns)[:, :, mask]  # (2, S, C)
            together.setdefault(users[mask].tobytes(), []).append((cell, metric, table))
    for owners, found in together.items():
        before, after = (np.stack([table[side].mean(axis=0) for *_, table in found], axis=1) for side in (0, 1))
        gaps = paired_difference(after, before, np.frombuffer(owners, dtype=np.int64), resamples, seed)
        for place, (cell, metric, table) in enumerate(found):
            by_seed = (table[1] - table[0]).mean(axis=1)
            cells[cell]["metrics"][metric] |= {
                "cases": table.shape[2],
                "before": float(before[:, place].mean()),
                "after": float(after[:, place].mean()),
                "difference": float(gaps.mean[place]),
                "difference interval95": [float(gaps.low[place]), float(gaps.high[place])],
                "by_seed": by_seed.tolist(),
                "sd_over_seeds": over_seeds(by_seed)[1],
                "p_value": float(gaps.p_value[place]),
            }


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
