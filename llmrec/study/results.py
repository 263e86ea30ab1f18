"""What a study's runs came to: one document of all runs, their means over seeds, and what each variant changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.evaluation.uncertainty import over_seeds
from llmrec.storage import write_json
from llmrec.study.differences import differences
from llmrec.study.place import RunPlace
from llmrec.study.plan import StudyPlan

RESULTS = "results.json"
_FEWEST = 3  # seeds of an interval


@dataclass(frozen=True)
class Mean:
    """A metric over seeds.

    Attributes:
        value: the mean.
        low, high: of the 95 % interval of the mean by Student's t, which takes the seeds' values for normal; None for
            fewer than three seeds.
        seeds: how many.
    """

    value: float
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True)
class Cell:
    """All seeds of what differs in its seed alone.

    Attributes:
        name: as `StudyRun.cell`.
        variant: its variant.
        axes: the axes' values.
        means: by metric; none if no run is done.
        planned: how many seeds it shall have.
        parameters: of the model; None if no run is done.
        seconds: mean of the done runs.
        published: by metric.
        curve: the validation of the first done run: a row per evaluation.
    """

    name: str
    variant: str
    axes: Mapping[str, Any]
    means: Mapping[str, Mean]
    planned: int
    parameters: int | None
    seconds: float | None
    published: Mapping[str, float]
    curve: Sequence[Mapping[str, float]]


def collect(plan: StudyPlan, places: Sequence[RunPlace]) -> dict[str, Any]:
    """The study's document, JSON-ready: what was planned, of every run its state and, if done, its results, and the
    `differences` from the reference variant, if there is one.
    """
    runs = []
    for place in places:
        run, found, record = place.run, place.metrics(), place.record()
        document: dict[str, Any] = {
            "cell": run.cell,
            "variant": run.variant,
            "axes": dict(run.axes),
            "seed": run.seed,
            "state": place.state(),
            "folder": place.folder.name,
            "flags": dict(run.flags),
            "seconds": record.get("seconds"),
            "failed": None if found is not None else record.get("failed"),
        }
        if found is not None:
            test = found["test"]
            document |= {
                "split": found["split"],
                "test": tested(test),
                "cases": test["cases"],
                "validation": [_plain(row) for row in found["validation"]],
                "parameters": found["cost"]["parameters"],
                "device": found["cost"]["device"],
                "versions": found["versions"],
            }
        runs.append(document)
    return {
        "title": plan.title,
        "note": plan.note,
        "metrics": list(plan.metrics),
        "seeds": list(plan.seeds),
        "splits": sorted({run["split"] for run in runs if "split" in run}),
        "devices": sorted({run["device"] for run in runs if "device" in run}),
        "published": {name: dict(values) for name, values in plan.published.items()},
        "differences": differences(plan, places),
        "runs": runs,
    }


def save(document: Mapping[str, Any], folder: str | Path) -> None:
    """Writes results.json."""
    write_json(Path(folder) / RESULTS, document)


def cells_of(document: Mapping[str, Any]) -> list[Cell]:
    """The study's cells in the order of the plan, with means over the runs that are done."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for run in document["runs"]:
        grouped.setdefault(run["cell"], []).append(run)
    found = []
    for name, runs in grouped.items():
        done = [run for run in runs if run["state"] == "done"]
        metrics = [metric for metric in document["metrics"] if done and all(metric in run["test"] for run in done)]
        published = {**document["published"].get(runs[0]["variant"], {}), **document["published"].get(name, {})}
        found.append(
            Cell(
                name,
                runs[0]["variant"],
                runs[0]["axes"],
                {metric: mean_of([run["test"][metric] for run in done]) for metric in metrics},
                len(runs),
                done[0]["parameters"] if done else None,
                sum(run["seconds"] for run in done) / len(done) if done else None,
                published,
                done[0]["validation"] if done else (),
            )
        )
    return found


def mean_of(values: Sequence[float]) -> Mean:
    """The mean over seeds, with Student's interval for three or more.

    >>> mean_of([0.25, 0.75])
    Mean(value=0.5, low=None, high=None, seeds=2)
    >>> mean = mean_of([0.1, 0.2, 0.3])
    >>> round(mean.low, 4), round(mean.high, 4)
    (-0.0484, 0.4484)
    """
    value, deviation = over_seeds(values)
    if len(values) < _FEWEST or deviation is None:
        return Mean(value, None, None, len(values))
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
    return Mean(value, value - half, value + half, len(values))


def tested(test: Mapping[str, Any]) -> dict[str, Any]:
    """The ranking metrics of an evaluation's document, those of its slices with the slice's name before them.

    >>> tested({"HR@10": 0.5, "cases": 4, "slices": {"later_day": {"HR@10": 0.25}, "cold": {"HR@10": None}}})
    {'HR@10': 0.5, 'later_day HR@10': 0.25}
    """
    parts = {"": test, **{f"{name} ": values for name, values in test.get("slices", {}).items()}}
    return {
        before + name: value
        for before, values in parts.items()
        for name, value in values.items()
        if name.partition("@")[0] in ("HR", "NDCG", "MRR") and value is not None
    }


def _plain(row: Mapping[str, Any]) -> dict[str, float]:
    """An evaluation's numbers without what says how long it took."""
    return {name: value for name, value in row.items() if "_per_second" not in name and "runtime" not in name}
