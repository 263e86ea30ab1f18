"""What a recommendation is asked for with, and what comes back; the words are those of the HTTP API."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llmrec.catalog import Catalog
from llmrec.exceptions import RequestError
from llmrec.selection import Draw, PrefixCap
from llmrec.service import schema

NORMALIZATIONS = ("vocabulary", "legal")

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        item_id: as in the catalog.
        rank: 1 for the best.
        log_probability: natural logarithm of the item's probability given the history.
        title: for reading.
        semantic_id: the item's codes.
        level_log_probabilities: per level; they add up to `log_probability`. Behind a title's end they are 0.
    """

    item_id: str
    rank: int
    log_probability: float
    title: str
    # What follows from the item, and from the score: two recommendations are equal without it.
    semantic_id: tuple[int, ...] = field(default=(), compare=False, repr=False)
    level_log_probabilities: tuple[float, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Selection:
    """How items are chosen among their scores.

    Attributes:
        renormalize: scores over the legal continuations in the place of the vocabulary.
        cap: on items of one branch, or None.
        draw: in the place of the best items, or None.
    """

    renormalize: bool = False
    cap: PrefixCap | None = None
    draw: Draw | None = None


def read_selection(
    normalize: str = "vocabulary",
    prefix_cap: schema.PrefixCap | Mapping[str, Any] | None = None,
    sampling: schema.Sampling | Mapping[str, Any] | None = None,
) -> Selection:
    """A request's options, as objects of the HTTP API's schema or as mappings like its JSON.

    Raises:
        RequestError: if one cannot be read.
    """
    if normalize not in NORMALIZATIONS:
        raise RequestError(f"normalize is {normalize!r}. Give one of {', '.join(NORMALIZATIONS)}.")
    cap = _read("prefix_cap", schema.PrefixCap, prefix_cap)
    drawn = _read("sampling", schema.Sampling, sampling)
    return Selection(
        normalize == "legal",
        None if cap is None else PrefixCap(cap.levels, cap.most),
        None if drawn is None else Draw(drawn.temperature, drawn.seed),
    )


def check_request(k: int, num_beams: int) -> int:
    """The beams of a search for `k` items; raises RequestError if k or the beams are below 1."""
    if k < 1 or k != int(k):
        raise RequestError(f"k is {k}, and a recommendation has a whole number of items, from 1 on. Ask for k >= 1.")
    if num_beams < 1:
        raise RequestError(f"num_beams is {num_beams}. Search with at least one beam.")
    return max(k, num_beams)


def check_asker(history: Sequence[str] | None, text: str | None, given: Mapping[str, Any]) -> None:
    """Raises RequestError unless there is one of history and text, and nothing beside a text that it would replace.

    Args:
        history: item ids.
        text: the whole prompt.
        given: what else the prompt would show, such as events; None counts as not given.
    """
    if isinstance(history, str):
        raise RequestError(f"The history is the string {history[:80]!r}. Give a list of item ids.")
    if (history is None) == (text is None):
        both = "both a history and a text" if text is not None else "neither a history nor a text"
        raise RequestError(f"The request has {both}. Give exactly one of them.")
    if text is not None and (beside := [name for name, value in given.items() if value is not None]):
        raise RequestError(f"{', '.join(beside)} came with a text, which is the whole prompt. Write it into the text.")


def rows_to_score(catalog: Catalog, items: Sequence[str]) -> list[int]:
    """The rows of items whose scores are asked for, in their order.

    Raises:
        RequestError: if there are none, or one is unknown, retired or named twice.
    """
    if isinstance(items, str) or not len(items):
        raise RequestError(f"The items to score are {items[:80]!r}. Give a list with at least one item id.")
    if repeated := [item for item, count in Counter(items).items() if count > 1]:
        raise RequestError(f"{_shown(repeated)} to score are named more than once. Name every item once.")
    known = {item: catalog.rows([item], ignore_unknown=True) for item in items}
    if unknown := [item for item, rows in known.items() if not rows]:
        raise RequestError(f"{_shown(unknown)} to score are not in the catalog. Name items that it holds.")
    if retired := [item for item, rows in known.items() if catalog.retired[rows[0]]]:
        raise RequestError(f"{_shown(retired)} to score are retired. Name items that may be recommended.")
    return [row for rows in known.values() for row in rows]


def _read(name: str, kind: type[_Model], value: _Model | Mapping[str, Any] | None) -> _Model | None:
    try:
        return value if value is None or isinstance(value, kind) else kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise RequestError(
            f"{name} is {str(value)[:80]!r} ({'.'.join(map(str, first['loc']))}: {first['msg']}). "
            f"Give {' and '.join(kind.model_fields)}."
        ) from error


def _shown(items: Sequence[str]) -> str:
    short = ", ".join(repr(item if len(item) <= 100 else item[:100] + "…") for item in items[:5])
    return f"{len(items)} item(s) ({short}{', …' if len(items) > 5 else ''})"
