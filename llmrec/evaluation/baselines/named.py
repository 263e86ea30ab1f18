"""The baselines by name: what makes each, and the values that are tried when it is tuned."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from llmrec.data.split import Split
from llmrec.evaluation.baselines.ease import EASE
from llmrec.evaluation.baselines.item_cf import ItemCF
from llmrec.evaluation.baselines.markov import Markov
from llmrec.evaluation.baselines.popularity import Popularity
from llmrec.evaluation.baselines.ranking import Places, Rows, Scores
from llmrec.evaluation.baselines.text_knn import TextKNN
from llmrec.exceptions import DataError

Name = Literal["item-cf", "popularity", "popularity-recent", "ease", "markov", "text-knn"]
# Each grid is a product; a list of grids is their union. The first value of everything is the default.
Grid = Sequence[Mapping[str, Sequence[Any]]]


class Baseline(Protocol):
    """What all baselines can do; each class's docstring has its definition and its rule for ties."""

    def fit(self, train: Sequence[Rows], num_items: int) -> Any:
        """Learns from training sequences of item rows."""

    def recommend(self, histories: Sequence[Rows], k: int, exclude_seen: bool = True) -> list[Places]:
        """The k best item rows per history, best first."""

    def scores(self, histories: Sequence[Rows]) -> Scores:
        """(B, N) a score for every item."""

    @property
    def parameters(self) -> int:
        """Stored numbers that are not 0."""


@dataclass(frozen=True)
class Entry:
    """How a baseline is made.

    Attributes:
        make: its parameters, by keyword -> a baseline that is not fitted.
        fixed: the parameters that make its name, where none is given.
        grid: the values that tuning tries.
    """

    make: Callable[..., Baseline]
    fixed: Mapping[str, Any]
    grid: Grid

    def types(self) -> dict[str, type]:
        """The parameters that a user may give, and the type of each (of `int | None`: int); not the embeddings."""
        found: dict[str, type] = {}
        for name, parameter in inspect.signature(self.make, eval_str=True).parameters.items():
            if name != "embeddings":
                found[name] = next(t for t in (int, float) if t in (parameter.annotation, *_members(parameter)))
        return found

    def parsed(self, given: Sequence[str]) -> dict[str, Any]:
        """Parameters from `key=value` texts.

        Raises:
            DataError: if one is not of that form, is named twice or unknown, or has no such value.

        >>> BASELINES["item-cf"].parsed(["window=3", "decay=0.5"])
        {'window': 3, 'decay': 0.5}
        """
        types = self.types()
        values: dict[str, Any] = {}
        for text in given:
            name, equals, value = (part.strip() for part in text.partition("="))
            if not equals or name not in types or name in values:
                raise DataError(
                    f"{text!r} gives no parameter of this baseline, or one again. "
                    + (f"Write NAME=VALUE once, with {', '.join(types)}." if types else "It has none.")
                )
            try:
                values[name] = types[name](value)
            except ValueError as error:
                raise DataError(f"{text!r}: {value!r} is no {types[name].__name__}. Give a number.") from error
            if not math.isfinite(values[name]):
                raise DataError(f"{text!r}: {value!r} is no finite number. Give a number that is.")
        return values

    def narrowed(self, given: Mapping[str, Any]) -> Grid:
        """The grid for what is left when some parameters are given: the parts that know all of these, without them."""
        known = {name for part in self.grid for name in part} & set(given)
        return [
            {name: tried for name, tried in part.items() if name not in given}
            for part in self.grid
            if known <= set(part)
        ]


def _members(parameter: inspect.Parameter) -> tuple[Any, ...]:
    return get_args(parameter.annotation)


def _all_time() -> Popularity:
    return Popularity()


BASELINES: Mapping[Name, Entry] = {
    "item-cf": Entry(ItemCF, {}, [{"window": [5, 10, 2], "backward": [0.7, 0.3, 1.0], "decay": [0.8, 0.6, 0.4]}]),
    "popularity": Entry(_all_time, {}, [{}]),
    "popularity-recent": Entry(
        Popularity,
        {"half_life_days": 365.0},
        [{"half_life_days": [365.0, 7.0, 30.0, 90.0, 1095.0]}, {"last_share": [0.05, 0.1, 0.2, 0.4]}],
    ),
    "ease": Entry(EASE, {}, [{"regularisation": [100.0, 300.0, 30.0, 1000.0, 10.0], "decay": [1.0, 0.7, 0.5]}]),
    "markov": Entry(
        Markov,
        {},
        [
            {"order": [1, 2]},
            {"order": [1], "max_history": [10], "smoothing": [1.0, 10.0, 50.0], "decay": [0.8, 0.5, 0.3]},
        ],
    ),
    "text-knn": Entry(TextKNN, {}, [{"max_history": [20, 1, 5], "decay": [0.8, 0.5, 0.3]}]),
}


def fit_on(model: Baseline, split: Split) -> Baseline:
    """Fits a baseline on the training part of a split, with its times where the model needs them; returns it."""
    if isinstance(model, Popularity) and model.needs_times:
        times = None
        if split.timestamps is not None:
            ends = zip(split.offsets[:-1].tolist(), split.train_ends.tolist(), strict=True)
            times = [split.timestamps[start:end] for start, end in ends]
        return model.fit(split.train, split.num_items, times)
    fitted: Baseline = model.fit(split.train, split.num_items)
    return fitted
