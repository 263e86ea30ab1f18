"""Runs: the evaluations found in run folders, and which of them may stand in one table, as one row or as two."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.evaluation.evaluation import FOLDER, Evaluation
from llmrec.evaluation.metrics import Metric, values
from llmrec.exceptions import DataError

# What may differ between two runs of one system besides the seed: where its files lie.
_PLACES = ("artefact", "out", "output_dir", "device")
# Seeds of the evaluation, not of the model: another one makes no second model.
_OTHER_SEEDS = ("bootstrap", "users", "tuning")


@dataclass(frozen=True)
class Run:
    """One evaluation that was found in a run folder."""

    folder: str
    path: Path
    evaluation: Evaluation = field(repr=False)
    document: Mapping[str, Any] = field(repr=False)

    @property
    def seeds(self) -> str:
        """The seeds of the model as one string; empty if the document names none."""
        named = self.document.get("seeds") or {}
        known = {name: seed for name, seed in named.items() if name not in _OTHER_SEEDS and seed is not None}
        return json.dumps(known, sort_keys=True) if known else ""

    def repeats(self, other: "Run") -> bool:
        """Whether it is the same evaluation again: every target at the same place, and no seed that says otherwise.

        Models of two seeds are two, also where they rank alike: both may have kept what they began with.
        """
        if self.seeds and other.seeds and self.seeds != other.seeds:
            return False
        mine, theirs = self.evaluation.ranks, other.evaluation.ranks
        return np.array_equal(mine.better, theirs.better) and np.array_equal(mine.ties, theirs.ties)


@dataclass
class Entry:
    """One row of the card: a system, by one run or by several that differ in their seeds."""

    name: str
    runs: list[Run]
    folders: list[str]

    def values(self, metric: Metric, k: int) -> npt.NDArray[np.float64]:
        """(S, C) the value of every case, by seed."""
        return np.stack([values(run.evaluation.ranks, metric, k) for run in self.runs])


def find_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Reads every evaluation below the folders, in their order and then by name; a folder given twice is read once.

    Raises:
        DataError: if a folder holds none, one cannot be read, or a document disagrees with its cases.
    """
    runs: list[Run] = []
    seen: set[Path] = set()
    for folder in folders:
        paths = sorted((Path(folder) / FOLDER).glob("*.json"))
        if not paths:
            raise DataError(
                f"{folder} has no {FOLDER}/*.json, so there is nothing to compare. Give run folders that hold an "
                "evaluation, as train/score.py and `llmrec baseline` write them."
            )
        for path in paths:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                evaluation, document = Evaluation.load(path)
                _check_document(path, evaluation, document)
                runs.append(Run(str(folder), path, evaluation, document))
    return runs


def _advice(one: Run, other: Run) -> str:
    """What to do about two splits or parts."""
    cases = [(run.evaluation.user_ids, run.evaluation.targets) for run in (one, other)]
    if one.document["part"] == other.document["part"] and cases[0] == cases[1]:
        return (
            "They ask the same of the same users, so perhaps of two item tables: give --items to both trainings, or "
            "to none."
        )
    return "Evaluate both on the same one, or compare them apart."


def check_comparable(runs: Sequence[Run]) -> None:
    one = runs[0]
    for other in runs[1:]:
        for key, what in (("split", "the split"), ("part", "the part")):
            mine, theirs = str(one.document[key])[:12], str(other.document[key])[:12]
            if one.document[key] != other.document[key]:
                raise DataError(
                    f"{one.folder} ({one.path.name}) was evaluated on {what} {mine}, {other.folder} "
                    f"({other.path.name}) on {what} {theirs}: their numbers do not belong in one table. "
                    f"{_advice(one, other)}"
                )
        a, b = one.evaluation, other.evaluation
        same = a.user_ids == b.user_ids and a.targets == b.targets and np.array_equal(a.counted, b.counted)
        if not same:
            raise DataError(
                f"{one.folder} ({one.path.name}) was evaluated on {len(a.targets)} cases of the split "
                f"{str(one.document['split'])[:12]}, {other.folder} ({other.path.name}) on {len(b.targets)} cases of "
                f"the split {str(other.document['split'])[:12]}, and they are not the same users. "
                "Evaluate both on all users, or on users drawn with the same seed."
            )
        if one.document.get("exclude_seen", True) != other.document.get("exclude_seen", True):
            raise DataError(
                f"{one.folder} ({one.path.name}) and {other.folder} ({other.path.name}) rank different candidates, "
                f"both on the split {str(one.document['split'])[:12]}: one of them leaves the items of the history "
                "out. Evaluate both in the same way."
            )


def merged(runs: Sequence[Run]) -> tuple[list[Entry], list[str]]:
    """The rows of the card in the order in which their systems were found, and what has to be said about them."""
    notes = []
    by_system: dict[str, list[Entry]] = {}
    for run in runs:
        distinct = by_system.setdefault(run.evaluation.system, [])
        for entry in distinct:
            if run.repeats(entry.runs[0]):
                entry.folders.append(run.folder)
                notes.append(
                    f"{run.evaluation.system} was found in {entry.runs[0].folder} and in {run.folder} with equal "
                    "ranks, and is shown once."
                )
                break
        else:
            distinct.append(Entry(run.evaluation.system, [run], [run.folder]))
    entries: list[Entry] = []
    for name, distinct in by_system.items():
        groups: dict[str, list[Entry]] = {}
        for entry in distinct:
            groups.setdefault(settings_key(entry.runs[0].document.get("settings")), []).append(entry)
        rows: list[Entry] = []
        for group in groups.values():
            seeds = [entry.runs[0].seeds for entry in group]
            if len(set(seeds)) == len(seeds) and (all(seeds) or len(seeds) == 1):
                rows.append(Entry(name, [e.runs[0] for e in group], [f for e in group for f in e.folders]))
            else:
                rows += group
                notes.append(
                    f"{len(group)} runs of {name} have equal settings and rank differently, but not every one names a "
                    "seed of its own: they are no mean over seeds and are shown apart."
                )
        if len(rows) > 1:
            folders = [row.runs[0].folder for row in rows]
            for row in rows:
                run = row.runs[0]
                row.name = f"{name} ({run.folder if folders.count(run.folder) == 1 else run.path})"
        entries += rows
    return entries, notes


def settings_key(settings: Any) -> str:
    """Settings without seeds and places of files, as one string.

    The hash of a model's weights (`weights`) is left out as well, where that of its own settings (`settings`) stands
    beside it: of models that differ by seeds alone the one is alike, the other not.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            left_out = (*_PLACES, "weights") if "settings" in value else _PLACES
            return {k: kept(v) for k, v in value.items() if "seed" not in str(k) and k not in left_out}
        return [kept(v) for v in value] if isinstance(value, list) else value

    return json.dumps(kept(settings or {}), sort_keys=True)


def _check_document(path: Path, evaluation: Evaluation, document: Mapping[str, Any]) -> None:
    """The document's figures must be those of the cases beside it."""
    if not evaluation.counted.any():
        return
    means = evaluation.table()[evaluation.counted].mean(axis=0)
    for name, mean in zip(evaluation.metric_names, means, strict=True):
        said = document.get(name)
        if not isinstance(said, int | float) or abs(said - mean) > 1e-9:
            raise DataError(
                f"{path} says {name} = {said}, the cases in {path.with_suffix('.parquet').name} give {mean:.6f}. "
                "The two files are of different evaluations: evaluate the system again."
            )
