"""Comparisons that are fair: finished evaluations beside each other, with paired tests, on the same cases alone."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.evaluation.baselines.named import BASELINES
from llmrec.evaluation.evaluation import METRICS
from llmrec.evaluation.metrics import Metric
from llmrec.evaluation.runs import Entry, Run, check_comparable, find_runs, merged
from llmrec.evaluation.uncertainty import bootstrap_means, holm, over_seeds, paired_difference
from llmrec.exceptions import DataError

Table = npt.NDArray[np.float64]

LEVEL = 0.05  # of the tests, after Holm's correction

# With one target per case these are the same numbers.
_ALIASES: dict[str, Metric] = {"RECALL": "HR", "MAP": "MRR"}


def compare(
    folders: Sequence[str | Path],
    metrics: Sequence[str] = (),
    reference: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The comparison card of finished evaluations, JSON-ready; `llmrec.evaluation.card` shows it.

    All numbers are made anew from the places of the targets, for the headline cases, with ties in expectation. Runs of
    one system whose settings are equal and whose seeds differ become one row: a case's value is its mean over seeds.
    Runs that equal another one rank for rank, and do not name another seed, are shown once. Intervals and tests
    resample users whole: they hold the chance of who was sampled. A test between systems of one seed each is about
    these two trained models, not about two methods.

    Args:
        folders: run folders, each with evaluation/NAME.json and evaluation/NAME.parquet.
        metrics: such as "HR@10" (or "Recall@10") and "NDCG@10"; default: both at 5 and 10.
        reference: the system that the others are tested against; default: the best baseline, or the first system.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        split, protocol, part, users, cases, items, metrics, primary (the metric of the slices), reference, tests (how
        many p-values Holm's correction spans), systems (best first by `primary`) and notes (sentences).

    Raises:
        DataError: if runs are of different splits, parts, cases or candidates, a metric's k exceeds what was
            evaluated, or the reference is unknown.
    """
    runs = find_runs(folders)
    if not runs:
        raise DataError("No run folder was given, so there is nothing to compare. Give one or more.")
    check_comparable(runs)
    first = runs[0].evaluation
    counted = first.counted
    if not counted.any():
        raise DataError(
            f"{runs[0].path} has no case that counts for the headline: all are of users or items that training lacks. "
            "Split so that some are known."
        )
    chosen = _parse(metrics, runs)
    names = [f"{metric}@{k}" for metric, k in chosen]
    entries, notes = merged(runs)
    per_seed = [np.stack([entry.values(metric, k) for metric, k in chosen], axis=2) for entry in entries]
    primary = names.index("NDCG@10") if "NDCG@10" in names else 0
    best = sorted(range(len(entries)), key=lambda e: -per_seed[e][:, counted, primary].mean())
    entries, per_seed = [entries[e] for e in best], [per_seed[e] for e in best]
    base = _reference(entries, reference)
    # Systems' metrics are columns beside each other, so that one bootstrap draws the same users for all of them.
    table = np.concatenate([seeds.mean(axis=0) for seeds in per_seed], axis=1)
    users = first.user_places()
    width = len(names)
    whole = bootstrap_means(table[counted], users[counted], resamples=resamples, seed=seed)
    others = [e for e in range(len(entries)) if e != base]
    columns = [e * width + m for e in others for m in range(width)]
    against = [base * width + m for _ in others for m in range(width)]
    systems = [_facts(entry) for entry in entries]
    for e, system in enumerate(systems):
        for m, name in enumerate(names):
            single = per_seed[e][:, counted, m].mean(axis=1)
            column = e * width + m
            system["metrics"][name] = {
                "mean": float(whole.mean[column]),
                "interval95": [float(whole.low[column]), float(whole.high[column])],
                "sd_over_seeds": over_seeds(single)[1],
                "by_seed": single.tolist(),
            }
    if others:
        gaps = paired_difference(
            table[counted][:, columns], table[counted][:, against], users[counted], resamples=resamples, seed=seed
        )
        corrected = holm(gaps.p_value)
        for place, column in enumerate(columns):
            found = systems[column // width]["metrics"][names[column % width]]
            found["difference"] = float(gaps.mean[place])
            found["difference interval95"] = [float(gaps.low[place]), float(gaps.high[place])]
            found["p_value"] = float(gaps.p_value[place])
            found["p_holm"] = float(corrected[place])
            found["significant"] = bool(corrected[place] < LEVEL)
    for name, mask in _slices(runs).items():
        part = table[:, primary::width][mask]
        interval = bootstrap_means(part, users[mask], resamples=resamples, seed=seed)
        for e, system in enumerate(systems):
            system["slices"][name] = {
                "cases": int(mask.sum()),
                "share": float(mask.mean()),
                names[primary]: float(interval.mean[e]),
                f"{names[primary]} interval95": [float(interval.low[e]), float(interval.high[e])],
            }
    head = runs[0].document
    return {
        **{key: head[key] for key in ("split", "protocol", "part", "items")},
        "users": len(np.unique(users[counted])),
        "cases": int(counted.sum()),
        "cases_kept_apart": int((~counted).sum()),
        "exclude_seen": head.get("exclude_seen", True),
        "metrics": names,
        "primary": names[primary],
        "reference": entries[base].name,
        "tests": len(columns),
        "level": LEVEL,
        "resamples": resamples,
        "seed": seed,
        "systems": systems,
        "notes": notes + _cautions(entries, len(columns), resamples),
    }


def _parse(metrics: Sequence[str], runs: Sequence[Run]) -> list[tuple[Metric, int]]:
    """Names and cut-offs, each once; the lists behind the evaluations hold max(ks) items."""
    deepest = min(max(run.evaluation.ks) for run in runs)
    if not metrics:
        ks = [k for k in (5, 10) if k <= deepest] or [deepest]
        return [(metric, k) for k in ks for metric in METRICS[:2]]
    parsed: list[tuple[Metric, int]] = []
    for text in metrics:
        name, _, k = text.strip().partition("@")
        name = _ALIASES.get(name.upper(), name.upper())
        if name not in METRICS or not (k.isascii() and k.isdigit()) or int(k) < 1:
            raise DataError(
                f"{text!r} is no metric of a comparison. Give {', '.join(METRICS)} (or Recall, MAP) with a cut-off, "
                "such as NDCG@10."
            )
        if int(k) > deepest:
            raise DataError(
                f"{text} looks deeper than the evaluations, of which one ended at {deepest}. Give a smaller cut-off, "
                "or evaluate with a larger one."
            )
        if (metric := (name, int(k))) not in parsed:
            parsed.append(metric)
    return parsed


def _reference(entries: Sequence[Entry], asked: str | None) -> int:
    """The place of the system that the others are tested against; `entries` are sorted, the best first."""
    if asked is not None:
        for place, entry in enumerate(entries):
            if entry.name == asked:
                return place
        raise DataError(
            f"There is no system {asked!r} to be the reference. Give one of {', '.join(e.name for e in entries)}."
        )
    for place, entry in enumerate(entries):
        name = entry.runs[0].evaluation.system.replace("_", "-").lower()
        if any(name == known or name.startswith((f"{known}-", f"{known} ")) for known in BASELINES):
            return place
    return 0


def _facts(entry: Entry) -> dict[str, Any]:
    """What the documents of a row's runs say besides the metrics; numbers are means over the seeds."""
    documents = [run.document for run in entry.runs]
    keys = ("coverage@", "gini@", "novelty@", "diversity@", "invalid_rate", "duplicate_rate", "beyond_list_share")
    costs = [document.get("cost") or {} for document in documents]
    return {
        "name": entry.name,
        "system": entry.runs[0].evaluation.system,
        "seeds": [document.get("seeds") or {} for document in documents],
        "runs": list(dict.fromkeys(entry.folders)),
        "metrics": {},
        "slices": {},
        "beyond": {
            key: _merged([document.get(key) for document in documents])
            for key in documents[0]
            if key.startswith(keys) and not key.endswith("interval95")
        },
        "id_level": _id_level(documents),
        "cost": {key: _merged([cost.get(key) for cost in costs]) for key in costs[0]},
        "settings": documents[0].get("settings") or {},
        "ties": _merged([document.get("ties", "as listed") for document in documents]),
        "versions": _merged_versions(document.get("versions") or {} for document in documents),
        "commits": sorted({str(document["commit"]) for document in documents if document.get("commit")}),
    }


def _id_level(documents: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `Levels.document` left in the documents' "id_level", by metric; intervals are those of a single run."""
    levels = [document.get("id_level") or {} for document in documents]
    return {
        name: {
            "item_level": _merged([level.get(name) for level in levels]),
            "id_level": _merged([level.get(key) for level in levels]),
            "inflation": _merged([level.get(f"{name} inflation") for level in levels]),
            "inflation interval95": levels[0].get(f"{name} inflation interval95") if len(levels) == 1 else None,
            "ratio": _merged([level.get(f"{name} ratio") for level in levels]),
        }
        for key in levels[0]
        if (name := key.removesuffix(" (ID level)")) != key
    }


def _merged(found: Sequence[Any]) -> Any:
    """The mean of numbers; of anything else the common value, or all of them in words."""
    known = [value for value in found if value is not None]
    if not known:
        return None
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        mean = float(np.mean(known))
        return int(mean) if all(isinstance(value, int) for value in known) and mean.is_integer() else mean
    return known[0] if all(value == known[0] for value in known) else ", ".join(sorted({str(v) for v in known}))


def _merged_versions(found: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    versions: dict[str, set[str]] = {}
    for one in found:
        for package, version in one.items():
            versions.setdefault(package, set()).add(str(version))
    return {package: ", ".join(sorted(known)) for package, known in sorted(versions.items())}


def _slices(runs: Sequence[Run]) -> dict[str, npt.NDArray[np.bool_]]:
    """Every slice that some run knows: the cases are the same for all, so its mask holds for all."""
    slices: dict[str, npt.NDArray[np.bool_]] = {}
    for run in runs:
        for name, mask in run.evaluation.slices.items():
            if mask.any():
                slices.setdefault(name, mask)
    return slices


def _cautions(entries: Sequence[Entry], tests: int, resamples: int) -> list[str]:
    """What a reader must know before believing the card."""
    notes = []
    single = [entry.name for entry in entries if len(entry.runs) == 1]
    if single:
        notes.append(
            f"One seed: {', '.join(single)}. Intervals and tests are over users and say nothing of how much another "
            "seed would change."
        )
    rules = {entry.name: {run.document.get("ties", "as listed") for run in entry.runs} for entry in entries}
    if len(set.union(*rules.values())) > 1:
        notes.append(
            "Tied items are treated in two ways: "
            + "; ".join(f"{name} {' and '.join(sorted(rule))}" for name, rule in rules.items())
            + ". Evaluate all by lists, or all with expected ties, where ties are many."
        )
    smallest = 1 / (resamples + 1)
    if tests and tests * smallest >= LEVEL:
        notes.append(
            f"With {resamples} resamples and {tests} tests no corrected p-value can fall below "
            f"{tests * smallest:.2g}, so nothing can be significant. "
            f"Ask for {int(np.ceil(tests / LEVEL))} resamples or more."
        )
    shares = {entry.name: _merged([run.document.get("beyond_list_share") for run in entry.runs]) for entry in entries}
    beyond = [f"{name} {100 * share:.1f} %" for name, share in shares.items() if share]
    if beyond:
        notes.append(f"A target beyond the end of the list is a miss: {', '.join(beyond)} of the cases.")
    return notes
