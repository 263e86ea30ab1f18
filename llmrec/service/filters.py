"""Filters: conditions on items' attributes, and which items of a catalog a request may be answered with.

A condition compares an attribute with values of its own kind: a number with numbers, a flag with true and false, a
text or an entry of a list with texts. Numbers are equal as float64: 1 is 1.0, and neither "1" nor true. Texts are
equal character by character. A value of another kind is refused, not taken for unequal, because it is a mistake.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from llmrec.catalog import Catalog
from llmrec.exceptions import FilterError, RequestError
from llmrec.service.attributes import Attributes, Kind, Mask, number
from llmrec.service.schema import Condition

Filters = Mapping[str, Condition | Mapping[str, Any]]
Rows = npt.NDArray[np.int64]

_VALUES = {"text": "texts", "list": "texts", "number": "numbers", "flag": "true or false"}


class Matching:
    """The live items that a filter leaves, as one bit per catalog row: servers keep many of them.

    Attributes:
        count: how many there are.
    """

    def __init__(self, mask: Mask) -> None:
        """`mask` (N,) says which rows match."""
        self._bits = np.packbits(mask)
        self._length = len(mask)
        self.count = int(mask.sum())
        # Few rows are kept beside the bits, in no more memory than these: requests would look for them one by one.
        self._few = np.flatnonzero(mask) if self.count * 64 <= len(mask) else None

    def holds(self, rows: Rows) -> Mask:
        """Which of some catalog rows match."""
        return np.asarray((self._bits[rows >> 3] >> (7 - (rows & 7)).astype(np.uint8)) & 1, dtype=bool)

    def rows(self) -> Rows:
        """The catalog rows that match, ascending."""
        if self._few is not None:
            return self._few.copy()
        return np.flatnonzero(np.unpackbits(self._bits, count=self._length))


@dataclass(frozen=True)
class Candidates:
    """The live items that a request may be answered with.

    Attributes:
        allowed: where there is an allow list, ascending the very rows that may be recommended; else None: all live
            rows that match the filters, but for those excluded.
        excluded: ascending catalog rows, all of them live and matching; empty beside `allowed`.
        count: how many items may be recommended.
        left: what the filters left; None where there are none.
    """

    allowed: Rows | None
    excluded: Rows
    count: int
    left: Matching | None = None

    @property
    def searched(self) -> Rows | None:
        """The rows whose part of the trie a search walks; None for all of it."""
        return self.allowed if self.left is None or self.allowed is not None else self.left.rows()


def read(filters: Filters) -> dict[str, Condition]:
    """Conditions by attribute, as objects of the schema, from mappings too; raises FilterError if one is none."""
    found = {}
    for name, condition in filters.items():
        try:
            found[name] = condition if isinstance(condition, Condition) else Condition.model_validate(condition)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise FilterError(
                f"The filter on {name!r} cannot be read ({place}{': ' if place else ''}{first['msg']}). "
                "Give any_of, none_of, min or max."
            ) from error
    return found


def matches(filters: Filters, attributes: Attributes) -> Mask:
    """(N,) which items fulfil all conditions; an item without an attribute fails each condition on it.

    Raises:
        FilterError: if there is no such attribute, or a condition does not fit its kind.
    """
    found = np.ones(len(attributes), dtype=bool)
    for name, condition in read(filters).items():
        if name not in attributes.kinds:
            raise FilterError(_unknown(name, attributes))
        kind = attributes.kinds[name]
        any_of, none_of = (_of_kind(name, kind, values) for values in (condition.any_of, condition.none_of))
        if kind != "number" and (condition.min is not None or condition.max is not None):
            raise FilterError(
                f"The filter on {name!r} has a min or max, and the attribute is a {kind}, not a number. "
                "Use any_of or none_of."
            )
        column = attributes.column(name)
        found &= column.present
        if any_of is not None:
            found &= column.one_of(any_of)
        if none_of is not None:
            found &= ~column.one_of(none_of)
        if kind == "number":
            found &= column.between(condition.min, condition.max)
    return found


def key(filters: Filters) -> str:
    """A hash of what filters mean: the order of names and values, and repeats, do not count.

    >>> one = key({"brand": {"any_of": ["a", "b"]}, "price": {"max": 1, "any_of": [1]}})
    >>> one == key({"price": {"any_of": [1.0, 1], "max": 1.0}, "brand": {"any_of": ["b", "a", "b"]}})
    True
    """
    said = {}
    for name, condition in read(filters).items():
        ends = [_signless(condition.min), _signless(condition.max)]
        said[name] = [_canonical(condition.any_of), _canonical(condition.none_of), *ends]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def matching(filters: Filters, catalog: Catalog, attributes: Attributes) -> Matching:
    """The live items that fulfil all conditions; raises as `matches` does."""
    return Matching(matches(filters, attributes) & ~catalog.retired)


def candidates(
    catalog: Catalog,
    left: Matching | None = None,
    allow: Sequence[str] | None = None,
    deny: Sequence[str] = (),
    seen: Sequence[int] | Rows = (),
) -> Candidates:
    """The items that may be recommended: live, left by the filters, allowed, not denied and not seen.

    Args:
        catalog: with the items.
        left: what the filters left (`matching`); None where there are none.
        allow: item ids; None for all. Ids that the catalog lacks are passed over, here and in `deny`.
        deny: item ids.
        seen: catalog rows.

    Raises:
        RequestError: if a list is a string.
    """
    for name, ids in (("allow", allow), ("deny", deny)):
        if isinstance(ids, str):
            raise RequestError(f"{name} is the string {ids[:80]!r}. Give a list of item ids.")
    denied = np.array(catalog.rows(deny, ignore_unknown=True), dtype=np.int64)
    gone = np.unique(np.concatenate([np.asarray(seen, dtype=np.int64), denied]))
    gone = _counting(gone, catalog, left)
    if allow is not None:
        rows = np.unique(np.array(catalog.rows(allow, ignore_unknown=True), dtype=np.int64))
        rows = np.setdiff1d(_counting(rows, catalog, left), gone, assume_unique=True)
        return Candidates(rows, gone[:0], len(rows), left)
    return Candidates(None, gone, (catalog.num_live if left is None else left.count) - len(gone), left)


def require(count: int, least: int) -> None:
    """Raises FilterError if fewer items than `least` may be recommended."""
    if count < least:
        raise FilterError(
            f"{count} item(s) may be recommended here, and the request asks for at least {least}. "
            "Loosen its filters or lists, or its min_candidates."
        )


def _counting(rows: Rows, catalog: Catalog, left: Matching | None) -> Rows:
    """Those of `rows` that are live and match."""
    return rows[~catalog.retired[rows] if left is None else left.holds(rows)]


def _of_kind(name: str, kind: Kind, values: Sequence[Any] | None) -> list[str | float | bool] | None:
    """The values as a column of this kind has them."""
    if values is None:
        return None
    fits: dict[str, Any] = {"text": str, "list": str, "flag": bool, "number": int | float}
    for value in values:
        if not isinstance(value, fits[kind]) or (kind == "number" and isinstance(value, bool)):
            shown = json.dumps(value)
            raise FilterError(
                f"The filter on {name!r} compares a {kind} with {shown[:80]}. Give {_VALUES[kind]} for this attribute."
            )
    # A number that float64 does not have equals none.
    return [found for value in values if (found := number(value) if kind == "number" else value) is not None]


def _canonical(values: Sequence[Any] | None) -> list[str] | None:
    if values is None:
        return None
    plain = (value if isinstance(value, str | bool) else _signless(number(value)) for value in values)
    return sorted({json.dumps(value) for value in plain})


def _signless(value: float | None) -> float | None:
    """-0.0 as 0.0."""
    return None if value is None else value + 0.0


def _unknown(name: str, attributes: Attributes) -> str:
    known = list(attributes.kinds)[:1000]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0) if len(name) <= 200 else []
    listed = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    guess = f" The nearest is {near[0]!r}." if near else ""
    return (
        f"Items of this catalog have no attribute {name[:80]!r}.{guess} Filter by one of {listed}."
        if known
        else f"Items of this catalog have no attributes, and {name[:80]!r} is none. Leave the filter out."
    )
