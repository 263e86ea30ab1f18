"""Outcome: what a further training changed, case by case: whether it helped, hurt, or made no difference to be seen.

It knows of two evaluations of the same cases, before and after, and of nothing that lay between them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmrec.evaluation.comparison import LEVEL
from llmrec.evaluation.evaluation import Evaluation
from llmrec.evaluation.metrics import Metric, values
from llmrec.evaluation.uncertainty import holm, over_seeds, paired_difference
from llmrec.exceptions import DataError

Verdict = Literal["helped", "hurt", "no difference"]

PRIMARY = 10  # NDCG at this cut-off decides
_METRICS: tuple[Metric, ...] = ("HR", "NDCG")


def outcome(
    before: Evaluation,
    after: Evaluation,
    ks: Sequence[int] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """What changed from `before` to `after`, JSON-ready.

    All figures are of the headline cases, with ties in expectation; differences are paired by case, users are
    resampled whole (`paired_difference`), and Holm's correction spans all metrics of this document. HR@1 is NDCG@1
    and is tested once, under the latter name.

    Args:
        before: of the system that the training began with.
        after: of its result.
        ks: cut-offs; default: 1, 5, 10, 20 and 50, so far as the lists go. NDCG@10 is always among the metrics if the
            lists are that long.
        resamples: of the bootstrap and of the test; with a thousand a corrected p near the level hangs on the draw.
        seed: of both.

    Returns:
        `systems` (their two names), `split`, `part`, `users`, `cases`, `seeds` (of training: 1), `primary` (the metric
        that decides: NDCG@10, or NDCG at the end of shorter lists), `tests`, `level`, `resamples`, `seed`, `metrics`
        (by name: `before`, `after`, `difference`, `difference interval95`, `p_value`, `p_holm`), `verdict` ("helped"
        or "hurt" if the primary metric's corrected p-value is below `level`, else "no difference") and `sentence`.

    Raises:
        DataError: if the two are of different splits, parts, cases or candidates, no case counts for the headline, a
            cut-off is below 1 or beyond the lists, or so few resamples could show nothing.
    """
    return outcome_over_seeds([(before, after)], ks, resamples, seed)


def outcome_over_seeds(
    pairs: Sequence[tuple[Evaluation, Evaluation]],
    ks: Sequence[int] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """`outcome` of a training that was run with several seeds: a case's value is its mean over them.

    Each metric has besides `by_seed` (the difference of each pair) and `sd_over_seeds` (theirs). Intervals and tests
    are over users all the same, and hold for these trained models: how much another seed would change, the standard
    deviation says.

    Args:
        pairs: (before, after) of each seed; all of the same cases. One `before` may stand in several.
        ks: as for `outcome`.
        resamples: likewise.
        seed: of the resampling.

    Raises:
        DataError: as `outcome`, or if there is no pair.
    """
    if not pairs:
        raise DataError(
            "There is no pair of evaluations, so nothing has an outcome. Give one (before, after) or more."
        )
    first = pairs[0][0]
    for evaluation in (one for pair in pairs for one in pair):
        _check_same(first, evaluation)
    counted = first.counted
    if not counted.any():
        raise DataError(
            f"All {len(counted)} cases are of users or items that training does not hold, so there is no headline "
            "figure. Give training a longer span, or split by leave-one-out."
        )
    chosen = _chosen(ks, min(max(one.ks) for pair in pairs for one in pair))
    names = [f"{metric}@{k}" for metric, k in chosen]
    if len(names) / (resamples + 1) >= LEVEL:
        raise DataError(
            f"With {resamples} resamples and {len(names)} metrics no corrected p-value can fall below {LEVEL}, so "
            f"nothing could be found to help. Ask for {int(np.ceil(len(names) / LEVEL))} resamples or more."
        )
    # (2, S, C, M): before and after, by seed.
    table = np.stack([[_values(pair[side], chosen)[counted] for pair in pairs] for side in (0, 1)])
    old, new = table.mean(axis=1)
    users = first.user_places()[counted]
    gaps = paired_difference(new, old, users, resamples=resamples, seed=seed)
    corrected = holm(gaps.p_value)
    by_seed = (table[1] - table[0]).mean(axis=1)  # (S, M)
    metrics: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(names):
        metrics[name] = {
            "before": float(old[:, place].mean()),
            "after": float(new[:, place].mean()),
            "difference": float(gaps.mean[place]),
            "difference interval95": [float(gaps.low[place]), float(gaps.high[place])],
            "p_value": float(gaps.p_value[place]),
            "p_holm": float(corrected[place]),
        }
        if len(pairs) > 1:
            metrics[name]["by_seed"] = by_seed[:, place].tolist()
            metrics[name]["sd_over_seeds"] = over_seeds(by_seed[:, place])[1]
    document: dict[str, Any] = {
        "systems": [first.system, pairs[0][1].system],
        "split": first.facts.get("split"),
        "part": first.facts.get("part"),
        "users": len(np.unique(users)),
        "cases": int(counted.sum()),
        "seeds": len(pairs),
        "primary": _primary(chosen),
        "tests": len(names),
        "level": LEVEL,
        "resamples": resamples,
        "seed": seed,
        "metrics": metrics,
    }
    document["verdict"] = _verdict(metrics[document["primary"]])
    document["sentence"] = _sentence(document)
    return document


def outcome_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of an outcome's table, as text: what a page, a card or a terminal shows."""
    header = ["metric", *document["systems"], "difference", "95 % interval", "p", "p (Holm)"]
    if len(set(header)) < len(header):  # two systems of one name
        header[1:3] = ["before", "after"]
    rows = []
    for name, found in document["metrics"].items():
        low, high = found["difference interval95"]
        rows.append(
            [
                name,
                *(f"{found[side]:.4f}" for side in ("before", "after")),
                f"{found['difference']:+.4f}",
                f"[{low:+.4f}, {high:+.4f}]",
                *(f"{found[key]:.3f}" for key in ("p_value", "p_holm")),
            ]
        )
    return header, rows


def outcome_table(document: Mapping[str, Any]) -> str:
    """The closing table of an outcome as lines of plain text, its sentence last."""
    header, rows = outcome_rows(document)
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, document["sentence"]])


def _check_same(one: Evaluation, other: Evaluation) -> None:
    """Raises DataError if two evaluations do not ask the same of the same users."""
    for key, what in (("split", "split"), ("part", "part"), ("exclude_seen", "candidates (exclude_seen)")):
        # A loaded evaluation does not say what its candidates were; then its document does.
        if key in one.facts and key in other.facts and one.facts[key] != other.facts[key]:
            raise DataError(
                f"{one.system} was evaluated on the {what} {str(one.facts[key])[:12]}, {other.system} on "
                f"{str(other.facts[key])[:12]}, so nothing can be paired. Evaluate both alike."
            )
    mine, theirs = ((e.user_ids, e.targets, e.counted.tolist()) for e in (one, other))
    if mine != theirs:
        raise DataError(
            f"{one.system} was evaluated on {len(one.targets)} cases and {other.system} on {len(other.targets)}, and "
            "they are not the same ones. Evaluate both on all users, or on users drawn with the same seed."
        )


def _chosen(ks: Sequence[int] | None, deepest: int) -> list[tuple[Metric, int]]:
    """Metrics with their cut-offs, each once, by rising cut-off."""
    if ks is None:
        asked = [k for k in (1, 5, 10, 20, 50) if k <= deepest]
    else:
        asked = sorted(set(ks))
        if not asked or asked[0] < 1:
            raise DataError(f"The cut-offs are {list(ks)}. Give one or more, from 1 on.")
        if asked[-1] > deepest:
            raise DataError(
                f"The cut-off {asked[-1]} looks deeper than the evaluations, of which one ended at {deepest}. Give a "
                "smaller cut-off, or evaluate with a larger one."
            )
    decides = min(PRIMARY, deepest)
    return [
        (metric, k)
        for k in sorted({*asked, decides})
        for metric in _METRICS
        if metric == "NDCG" or (k > 1 and k in asked)
    ]


def _primary(chosen: Sequence[tuple[Metric, int]]) -> str:
    """NDCG@10; where lists end before, NDCG at their end."""
    return f"NDCG@{max(k for metric, k in chosen if metric == 'NDCG' and k <= PRIMARY)}"


def _values(evaluation: Evaluation, chosen: Sequence[tuple[Metric, int]]) -> npt.NDArray[np.float64]:
    """(C, M) every case's value of every metric."""
    return np.stack([values(evaluation.ranks, metric, k) for metric, k in chosen], axis=1)


def _verdict(primary: Mapping[str, Any]) -> Verdict:
    if primary["p_holm"] >= LEVEL or primary["difference"] == 0:
        return "no difference"
    return "helped" if primary["difference"] > 0 else "hurt"


def _sentence(document: Mapping[str, Any]) -> str:
    """The verdict in plain words."""
    name = document["primary"]
    found = document["metrics"][name]
    low, high = found["difference interval95"]
    before, after = document["systems"]
    said = {
        "helped": f"{after} is better than {before}",
        "hurt": f"{after} is worse than {before}",
        "no difference": f"{after} cannot be told from {before}",
    }[document["verdict"]]
    seeds = f", mean of {document['seeds']} seeds" if document["seeds"] > 1 else ""
    return (
        f"{said}: {name} {found['before']:.4f} before, {found['after']:.4f} after, {found['difference']:+.4f} "
        f"[{low:+.4f}, {high:+.4f}], p {found['p_holm']:.3f} after Holm's correction of {document['tests']} tests; "
        f"{document['users']:,} users of the {document['part']} part{seeds}."
    )
