"""Tuning: a grid search on the validation part, with a stated budget."""

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from llmrec.data.split import Split
from llmrec.evaluation.baselines.named import Baseline, Grid, fit_on
from llmrec.evaluation.baselines.popularity import Popularity
from llmrec.evaluation.baselines.ranking import Rows
from llmrec.evaluation.metrics import Metric, values
from llmrec.evaluation.ranks import Ranks
from llmrec.exceptions import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried.

    Attributes:
        place: its place in the grid's order.
        parameters: its values.
        value: the metric's mean over the headline cases of the validation part.
        seconds: fit, where one was needed, and ranking.
    """

    place: int
    parameters: Mapping[str, Any]
    value: float
    seconds: float


@dataclass(frozen=True)
class Tuning:
    """What a search tried and found.

    Attributes:
        metric: by which it chose.
        grid: what it could try.
        configurations: how many that are.
        budget: the most that it would try.
        budget_seconds: after which it began no other trial; None without such a limit.
        seed: of the sample, where the grid is larger than the budget.
        trials: in the order of the grid.
        best: the trial with the highest value; the first in the grid's order among equals.
        model: fitted on the training part alone with the best values, like one that was not tuned.
        fit_seconds: what this last fit took.
    """

    metric: str
    grid: Grid
    configurations: int
    budget: int
    budget_seconds: float | None
    seed: int
    trials: Sequence[Trial]
    best: Trial
    model: Baseline
    fit_seconds: float

    def document(self) -> dict[str, Any]:
        """The search as JSON: metric, grid, budget, what was left out, trials, the values that were chosen."""
        return {
            "metric": f"validation {self.metric}",
            "grid": [{name: list(tried) for name, tried in part.items()} for part in self.grid],
            "configurations": self.configurations,
            "budget": self.budget,
            "budget_seconds": self.budget_seconds,
            "not_tried": self.configurations - len(self.trials),
            "seed": self.seed,
            "trials": [
                {"parameters": dict(t.parameters), self.metric: t.value, "seconds": round(t.seconds, 3)}
                for t in self.trials
            ],
            "chosen": dict(self.best.parameters),
            "refitted": "on the training part alone",
        }


def configurations(grid: Grid) -> list[dict[str, Any]]:
    """All configurations of a grid: grid by grid, the last parameter changing fastest, none twice.

    >>> configurations([{"a": [1, 2], "b": [0]}, {"a": [2, 3], "b": [0]}])
    [{'a': 1, 'b': 0}, {'a': 2, 'b': 0}, {'a': 3, 'b': 0}]
    """
    found: list[dict[str, Any]] = []
    for part in grid:
        for chosen in product(*part.values()):
            if (one := dict(zip(part, chosen, strict=True))) not in found:
                found.append(one)
    return found


def tune(
    make: Callable[..., Baseline],
    grid: Grid,
    split: Split,
    metric: str = "NDCG@10",
    budget: int = 20,
    seconds: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Tuning:
    """Tries configurations on the validation part and returns the best one's model, fitted on training alone.

    It looks at training and at the validation part's histories and targets, never at the test part. A grid of more
    than `budget` configurations is sampled with the seed; its first one, by convention the defaults, is always among
    them and is tried first. Configurations that differ only in what a fitted model may change (the class's
    `query_parameters`) share one fit and are tried one after another.

    Args:
        make: a configuration's values -> a baseline that is not fitted.
        grid: see `llmrec.evaluation.baselines.named.Grid`.
        split: with a validation part.
        metric: HR, NDCG or MRR with a cut-off.
        budget: the most configurations that are tried.
        seconds: no trial begins later than that after the start; the first one always does.
        seed: of the sample.
        progress: show a bar.

    Raises:
        DataError: if the grid or the budget is empty, the metric unknown, or the validation part without a case.
    """
    name, k = _parsed(metric)
    everything = configurations(grid)
    if not everything or budget < 1:
        raise DataError(f"{len(everything)} configurations and a budget of {budget} leave nothing to try.")
    cases = split.headline("valid")
    if not cases.any():
        raise DataError("The validation part has no case that counts. Split so that it has, or leave tuning out.")
    histories = [history for history, counts in zip(split.histories("valid"), cases, strict=True) if counts]
    targets = split.targets("valid")[cases]
    chosen = np.arange(len(everything))
    if len(everything) > budget:
        drawn = np.random.default_rng(seed).permutation(np.arange(1, len(everything)))[: budget - 1]
        chosen = np.sort(np.append(0, drawn))
        logger.warning("The grid has %d configurations, of which a sample of %d is tried", len(everything), budget)
    with _said_once():
        trials = _tried(
            make, everything, chosen.tolist(), split, histories, targets, (metric, name, k), seconds, progress
        )
        trials.sort(key=lambda trial: trial.place)
        best = max(trials, key=lambda trial: trial.value)  # the first among equals
        begun = time.perf_counter()
        model = fit_on(make(**best.parameters), split)
        fit_seconds = time.perf_counter() - begun
    return Tuning(metric, grid, len(everything), budget, seconds, seed, trials, best, model, fit_seconds)


@contextmanager
def _said_once() -> Iterator[None]:
    """Lets a warning of a baseline through once, which every fit on the same data would repeat."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        before = len(said)
        said.add(record.getMessage())
        return len(said) > before

    warned = logging.getLogger(Popularity.__module__)  # the only one that warns
    warned.addFilter(is_new)
    try:
        yield
    finally:
        warned.removeFilter(is_new)


def _tried(
    make: Callable[..., Baseline],
    everything: Sequence[Mapping[str, Any]],
    chosen: Sequence[int],
    split: Split,
    histories: Sequence[Rows],
    targets: Rows,
    metric: tuple[str, Metric, int],
    seconds: float | None,
    progress: bool,
) -> list[Trial]:
    """The trials of the chosen places, in the order in which they ran, until the time is over."""
    label, name, k = metric
    begun = time.perf_counter()
    trials: list[Trial] = []
    fitted: Baseline | None = None
    key: Mapping[str, Any] = {}
    with tqdm(total=len(chosen), desc="Tuning", unit="trial", disable=not progress) as bar:
        for place in _grouped(chosen, everything, make):
            start = time.perf_counter()
            if trials and seconds is not None and start - begun >= seconds:
                logger.warning("Tuning stopped after %.0f s, with %d of %d trials", seconds, len(trials), len(chosen))
                break
            model = make(**everything[place])
            needed = _fit_key(model, everything[place])
            if fitted is None or needed != key:
                fitted = None  # may be large, and its successor needs the room
                fitted, key = fit_on(model, split), needed
            else:
                fitted = _with_query(fitted, model)
            ranks = Ranks.from_lists(fitted.recommend(histories, k), targets)
            value = float(values(ranks, name, k).mean())
            trials.append(Trial(place, everything[place], value, time.perf_counter() - start))
            bar.set_postfix_str(f"best {label} {max(trial.value for trial in trials):.4f}")
            bar.update()
    return trials


def _parsed(metric: str) -> tuple[Metric, int]:
    name, _, k = metric.partition("@")
    known: tuple[Metric, ...] = get_args(Metric)
    for one in known:
        if name == one and k.isascii() and k.isdigit() and int(k) > 0:
            return one, int(k)
    raise DataError(f"{metric!r} is no metric to tune by. Give {', '.join(known)} with a cut-off, such as NDCG@10.")


def _fit_key(model: Baseline, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration that a fit depends on, the defaults of `make` being the same for all."""
    free: frozenset[str] = getattr(model, "query_parameters", frozenset())
    return {name: getattr(model, name) for name in parameters if name not in free}


def _grouped(
    chosen: Sequence[int], everything: Sequence[Mapping[str, Any]], make: Callable[..., Baseline]
) -> list[int]:
    """The chosen places, those that share a fit side by side, groups in the order of their first place."""
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for place in chosen:
        key = _fit_key(make(**everything[place]), everything[place])
        for known, members in groups:
            if known == key:
                members.append(place)
                break
        else:
            groups.append((key, [place]))
    return [place for _, members in groups for place in members]


def _with_query(fitted: Baseline, model: Baseline) -> Baseline:
    """A copy of a fitted model with another one's query parameters; what was fitted is shared."""
    changed = copy.copy(fitted)
    for name in getattr(model, "query_parameters", ()):
        setattr(changed, name, getattr(model, name))
    return changed
