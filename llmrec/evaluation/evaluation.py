"""Evaluation: one system on one part of one split, case by case, and the document that says what came out."""

import json
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec import __version__
from llmrec.data.split import Part, Split
from llmrec.evaluation.diversity import coverage, gini, novelty
from llmrec.evaluation.metrics import Metric, TieRule, duplicate_rate, invalid_rate, values
from llmrec.evaluation.ranks import Lists, Ranks, Rows, Score, rank_scores
from llmrec.evaluation.slices import ALWAYS, slices_of
from llmrec.evaluation.uncertainty import bootstrap_means
from llmrec.exceptions import DataError
from llmrec.storage import atomic_path, write_json

Recommend = Callable[[Sequence[npt.NDArray[np.int32]], int], Lists]
Mask = npt.NDArray[np.bool_]

METRICS: tuple[Metric, ...] = ("HR", "NDCG", "MRR")
FOLDER = "evaluation"


@dataclass(frozen=True)
class Evaluation:
    """Where every case's target stands in one system's ranking, and what is known of the system.

    Attributes:
        system: its name.
        user_ids: (C,) whose case it is.
        targets: (C,) item ids.
        ranks: the targets' places.
        counted: (C,) the headline cases.
        slices: the cases of each slice.
        ks: cut-offs.
        facts: what else the document says: split, protocol, part, items, rates, seeds, cost, settings, versions.
    """

    system: str
    user_ids: list[str] = field(repr=False)
    targets: list[str] = field(repr=False)
    ranks: Ranks = field(repr=False)
    counted: Mask = field(repr=False)
    slices: Mapping[str, Mask] = field(repr=False)
    ks: tuple[int, ...]
    facts: Mapping[str, Any] = field(repr=False)

    @property
    def metric_names(self) -> list[str]:
        """`HR@5`, `NDCG@5`, … in the order of `table`'s columns."""
        return [f"{metric}@{k}" for k in self.ks for metric in METRICS]

    def table(self, ties: TieRule = "expected") -> npt.NDArray[np.float64]:
        """(C, metrics) every case's value of every metric."""
        return np.stack([values(self.ranks, metric, k, ties) for k in self.ks for metric in METRICS], axis=1)

    def user_places(self) -> npt.NDArray[np.int64]:
        """(C,) users numbered in order of first appearance: the cases of one are resampled together."""
        number = {user: place for place, user in enumerate(dict.fromkeys(self.user_ids))}
        return np.array([number[user] for user in self.user_ids], dtype=np.int64)

    def document(self, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """The flat JSON document: facts, metrics with 95 % bootstrap intervals over users, slices.

        Metrics are expectations over a random order of tied candidates. If there are any ties in the ranking, the
        bounds of the best and the worst order stand beside them, as `HR@10 ties` and so on.

        Raises:
            DataError: if every case is kept apart.
        """
        if not self.counted.any():
            raise DataError(
                f"All {len(self.counted)} cases are of users or items that training does not hold, so there is no "
                "headline figure. Give training a longer span, or split by leave-one-out."
            )
        names, table, users = self.metric_names, self.table(), self.user_places()
        found = bootstrap_means(table[self.counted], users[self.counted], resamples, seed)
        document: dict[str, Any] = {"system": self.system, **self.facts}
        document["users"] = len(np.unique(users[self.counted]))
        document["cases"] = int(self.counted.sum())
        document["cases_kept_apart"] = int((~self.counted).sum())
        document |= {name: float(mean) for name, mean in zip(names, found.mean, strict=True)}
        for place, name in enumerate(names):
            document[f"{name} interval95"] = [float(found.low[place]), float(found.high[place])]
        if self.ranks.ties[self.counted].any():
            bounds = [self.table(rule)[self.counted].mean(axis=0) for rule in ("pessimistic", "optimistic")]
            for place, name in enumerate(names):
                document[f"{name} ties"] = [float(bound[place]) for bound in bounds]
        document["beyond_list_share"] = float((self.ranks.better[self.counted] < 0).mean())
        document["slices"] = {
            name: {
                "cases": int(mask.sum()),
                "share": float(mask.sum() / len(mask)),
                **{
                    metric: float(table[mask, place].mean()) if mask.any() else None
                    for place, metric in enumerate(names)
                },
            }
            for name, mask in self.slices.items()
        }
        return document

    def save(self, folder: str | Path, document: Mapping[str, Any] | None = None) -> Path:
        """Writes `folder/evaluation/SYSTEM.json` and, case by case, `SYSTEM.parquet`; returns the former's path."""
        path = Path(folder) / FOLDER / f"{self.system}.json"
        frame = pl.DataFrame(
            {
                "user_id": self.user_ids,
                "target": self.targets,
                "better": self.ranks.better,
                "ties": self.ranks.ties,
                "counted": self.counted,
                **{f"slice {name}": mask for name, mask in self.slices.items()},
            }
        )
        with atomic_path(path.with_suffix(".parquet")) as temporary:
            frame.write_parquet(temporary)
        write_json(path, {**(document or self.document()), "ks": list(self.ks)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> tuple[Self, dict[str, Any]]:
        """What `save` wrote: the evaluation and its document.

        Raises:
            DataError: if one of the two files is missing or is no evaluation.
        """
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            frame = pl.read_parquet(path.with_suffix(".parquet"), glob=False)
            slices = {c.removeprefix("slice "): frame[c].to_numpy() for c in frame.columns if c.startswith("slice ")}
            evaluation = cls(
                system=document["system"],
                user_ids=frame["user_id"].to_list(),
                targets=frame["target"].to_list(),
                ranks=Ranks(frame["better"].to_numpy(), frame["ties"].to_numpy()),
                counted=frame["counted"].to_numpy(),
                slices=slices,
                ks=tuple(document["ks"]),
                facts={name: document[name] for name in ("split", "protocol", "part", "items")},
            )
        except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
            raise DataError(
                f"{path} is no evaluation that can be read: {type(error).__name__}: {str(error).splitlines()[0]}. "
                "Evaluate the system again; the .json and the .parquet file of its name belong together."
            ) from error
        return evaluation, document


def check_name(system: str) -> None:
    """Raises DataError if a system's name cannot name its files."""
    if not re.fullmatch(r"\w[\w .=+-]*", system):
        raise DataError(
            f"{system!r} cannot name a file. Name the system by letters, digits, '_', '-', '.', '=' or '+'."
        )


def evaluate(
    system: str,
    split: Split,
    part: Part = "test",
    *,
    recommend: Recommend | None = None,
    scores: Score | None = None,
    ks: Sequence[int] = (5, 10, 20),
    cases: npt.NDArray[np.integer[Any]] | None = None,
    exclude_seen: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Ranks the target of every case with a system, over the full catalog.

    Items of the history are no candidates, for any system: they are taken out of scores and lists, a target among
    them is a miss, and `repeated_share` says how many such targets there are. From scores, equal scores are ties; a
    list has the order that its system gave it. All rates are of the headline cases.

    Args:
        system: its name.
        split: where histories and targets come from.
        part: which cases.
        recommend: histories, k -> ranked item rows per history, best first. What a list does not hold is missed.
        scores: histories -> (B, N) a score for every item; this or `recommend`. -inf is no candidate.
        ks: cut-offs.
        cases: the places of the cases to rank; default: all.
        exclude_seen: whether items of the history are no candidates; if not, `recommend` has to list them itself.
        facts: further facts for the document: seeds, settings, cost.

    Raises:
        DataError: if the name cannot name a file, there is not exactly one of `recommend` and `scores`, no cut-off or
            no case to rank.
    """
    check_name(system)
    if (recommend is None) == (scores is None):
        raise DataError(f"{system} is given by both lists and scores, or by neither. Give one of them.")
    if not ks or min(ks) < 1:
        raise DataError(f"The cut-offs are {list(ks)}. Give one or more, from 1 on.")
    chosen = np.arange(len(split.positions[part])) if cases is None else np.asarray(cases)
    if not len(chosen):
        raise DataError(f"The {part} part has no cases, so nothing can be ranked. Choose other cases.")
    all_histories = split.histories(part)
    histories = [all_histories[case] for case in chosen]
    targets = split.targets(part)[chosen]
    counted = split.headline(part)[chosen]
    rated: list[int] = (np.flatnonzero(counted) if counted.any() else np.arange(len(chosen))).tolist()
    begun = time.perf_counter()
    lists: Lists
    if scores is not None:
        ranks, lists = rank_scores(scores, histories, targets, split.num_items, exclude_seen, max(ks))
        milliseconds = 1000 * (time.perf_counter() - begun) / len(chosen)
        rates = {"invalid_rate": 0.0, "duplicate_rate": 0.0, "seen_rate": 0.0}
        shown = lists[rated]
    else:
        assert recommend is not None
        lists = recommend(histories, max(ks))
        milliseconds = 1000 * (time.perf_counter() - begun) / len(chosen)
        some = [lists[place] for place in rated]
        rates = {
            "invalid_rate": invalid_rate(some, split.num_items),
            "duplicate_rate": duplicate_rate(some),
            "seen_rate": _seen_rate(some, [histories[place] for place in rated]),
        }
        if exclude_seen:
            lists = [_unseen(one, history) for one, history in zip(lists, histories, strict=True)]
        ranks = Ranks.from_lists(lists, targets)
        shown = _padded([lists[place] for place in rated], max(ks), split.num_items)
    counts = split.train_counts
    beyond: dict[str, float] = {}
    for k in ks:
        beyond[f"coverage@{k}"] = coverage(shown[:, :k], split.num_items)
        beyond[f"gini@{k}"] = gini(shown[:, :k], split.num_items)
        beyond[f"novelty@{k}"] = novelty(shown[:, :k], counts)
    repeated = [targets[place] in histories[place] for place in rated]
    given = dict(facts or {})
    cost = {"fit_seconds": None, "parameters": None, "ms_per_request": round(milliseconds, 4), "device": "cpu"}
    users = split.case_users(part)[chosen]
    return Evaluation(
        system=system,
        user_ids=[split.all_users[user] for user in users.tolist()],
        targets=[split.item_ids[row] for row in targets.tolist()],
        ranks=ranks,
        counted=counted,
        slices={n: m for n, mask in slices_of(split, part).items() if (m := mask[chosen]).any() or n in ALWAYS},
        ks=tuple(ks),
        facts={
            "split": split.content_hash,
            "protocol": dict(split.protocol),
            "part": part,
            "items": split.num_items,
            "exclude_seen": exclude_seen,
            "ties": "expected" if scores is not None else "as listed",
            "repeated_share": float(np.mean(repeated)),
            **rates,
            **beyond,
            "seeds": given.pop("seeds", {}),
            "settings": given.pop("settings", {}),
            "cost": cost | given.pop("cost", {}),
            "versions": {"llmrec": __version__, "python": platform.python_version(), "numpy": np.__version__}
            | given.pop("versions", {}),
            **given,
        },
    )


def _unseen(one: Sequence[int] | Rows, history: npt.NDArray[np.int32]) -> Rows:
    """A list without the items of the history."""
    rows = np.asarray(one, dtype=np.int64)
    return rows[~np.isin(rows, history)]


def _seen_rate(lists: Lists, histories: Sequence[npt.NDArray[np.int32]]) -> float:
    """The share of recommended slots that hold an item of the history; 0 if there are no slots."""
    slots = sum(len(one) for one in lists)
    left = sum(len(_unseen(one, history)) for one, history in zip(lists, histories, strict=True))
    return 1 - left / slots if slots else 0.0


def _padded(lists: Lists, k: int, num_items: int) -> npt.NDArray[np.int64]:
    """(B, k) the first k of every list, -1 for padding and for what is no item."""
    padded = np.full((len(lists), k), -1, dtype=np.int64)
    for place, one in enumerate(lists):
        rows = np.asarray(one, dtype=np.int64)[:k]
        padded[place, : len(rows)] = np.where(rows < num_items, rows, -1)
    return padded
