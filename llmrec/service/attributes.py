"""Attributes: what filters know of a catalog's items, as columns made of the item table's fields.

Every field beside an item's id and title is an attribute, and of one kind for all items of a catalog version:

- **number**: all values are numbers, kept as float64. NaN, and what float64 has no finite number for, is no value.
- **flag**: all values are true or false.
- **list**: some value is a list. Its entries are texts, and a value that is no list counts as a list of one.
- **text**: all else. Among texts, and in lists, numbers and flags count as texts too: as JSON writes them.

Null and objects are no values, and an entry of a list that is null, an object or a list is left out. An empty list is
a value. A field of which no item has a value is no attribute.
"""

import json
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["text", "number", "flag", "list"]
Value = str | float | bool | list[str]
Mask = npt.NDArray[np.bool_]

_NO_ATTRIBUTES = ("item_id", "title")


@dataclass(frozen=True)
class Column:
    """One attribute of N items.

    Attributes:
        kind: of all values.
        present: (N,) which items have a value.
        values: number: (N,) float64, NaN where absent. Flag: (N,) int8, 1 for true, -1 where absent. Text: (N,) int32
            places in `words`, -1 where absent. List: the same of all entries, item after item.
        words: the different texts, and their places; empty for numbers and flags.
        starts: list: (N + 1,) int64, the entries of item `i` are values[starts[i] : starts[i + 1]]; else empty.
    """

    kind: Kind
    present: Mask
    values: npt.NDArray[Any]
    words: Mapping[str, int]
    starts: npt.NDArray[np.int64]

    def one_of(self, values: Iterable[str | float | bool]) -> Mask:
        """(N,) which items have one of these values, of the column's own kind; of a list, an entry that is one."""
        if self.kind == "number":
            return np.isin(self.values, np.array(list(values), dtype=np.float64))
        if self.kind == "flag":
            return np.isin(self.values, np.array([int(value) for value in values], dtype=np.int8))
        wanted = np.zeros(len(self.words) + 1, dtype=bool)  # the last place, which -1 names, stays false
        wanted[[self.words[value] for value in values if isinstance(value, str) and value in self.words]] = True
        hit: Mask = wanted[self.values]
        if self.kind == "text":
            return hit
        before = np.concatenate([[0], np.cumsum(hit)])
        return np.asarray(before[self.starts[1:]] > before[self.starts[:-1]])

    def between(self, least: float | None, most: float | None) -> Mask:
        """(N,) which items of a column of numbers have one of at least `least` and at most `most`; None for no end."""
        inside = self.present.copy()
        if least is not None:
            inside &= self.values >= least
        if most is not None:
            inside &= self.values <= most
        return inside

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays; the texts are the items' own."""
        return self.present.nbytes + self.values.nbytes + self.starts.nbytes


class Attributes:
    """The attributes of a catalog's items; a column is made when it is first asked for, by one thread at a time.

    Attributes:
        kinds: per name the kind, in the order in which the items name them.

    >>> known = Attributes([{"item_id": "a", "price": 2, "tags": ["new"]}, {"item_id": "b", "price": None}])
    >>> known.kinds, known.of(0), known.of(1)
    ({'price': 'number', 'tags': 'list'}, {'price': 2.0, 'tags': ['new']}, {})
    """

    def __init__(self, items: Sequence[Mapping[str, Any]]) -> None:
        self._items = items
        self._columns: dict[str, Column] = {}
        self._lock = threading.Lock()
        # In two passes without a statement in the loop: a catalog has millions of items.
        names = dict.fromkeys(chain.from_iterable(items))
        types: dict[str, set[type]] = {}
        for name, kind in {(name, value.__class__) for item in items for name, value in item.items()}:
            types.setdefault(name, set()).add(kind)
        found = {name: _kind(types[name]) for name in names if name not in _NO_ATTRIBUTES}
        self.kinds: dict[str, Kind] = {name: kind for name, kind in found.items() if kind is not None}

    def __len__(self) -> int:
        return len(self._items)

    @property
    def made(self) -> list[str]:
        """The names of the columns that somebody has asked for."""
        return list(self._columns)

    def column(self, name: str) -> Column:
        """A column; raises KeyError for a name that is no attribute."""
        kind = self.kinds[name]
        with self._lock:
            if name not in self._columns:
                self._columns[name] = _column(kind, [item.get(name) for item in self._items])
            return self._columns[name]

    def of(self, row: int) -> dict[str, Value]:
        """The attributes that one item has, as filters see them."""
        item = self._items[row]
        found = ((name, plain(item[name], kind)) for name, kind in self.kinds.items() if name in item)
        return {name: value for name, value in found if value is not None}


def plain(value: Any, kind: Kind) -> Value | None:
    """A field's value as filters see it in a column of this kind; None for no value.

    >>> plain(1, "number"), plain(1, "text"), plain(True, "list"), plain(["a", 2, None], "list"), plain({}, "text")
    (1.0, '1', ['true'], ['a', '2'], None)
    """
    if kind == "flag":
        return value if isinstance(value, bool) else None
    if kind == "number":
        return number(value)
    if kind == "text":
        return _word(value)
    if isinstance(value, list | tuple):
        return [word for entry in value if (word := _word(entry)) is not None]
    word = _word(value)
    return None if word is None else [word]


def number(value: Any) -> float | None:
    """The finite float64 of a number; None for anything else, and for numbers that have none.

    >>> number(3), number(True), number("3"), number(10**400), number(float("nan"))
    (3.0, None, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _word(value: Any) -> str | None:
    """A text, number or flag as a text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or (isinstance(value, int | float) and number(value) is not None):
        return json.dumps(value)
    return None


def _kind(types: set[type]) -> Kind | None:
    """The kind of a column whose values have these types; None if they all say nothing."""
    scalars = {
        "flag" if issubclass(kind, bool) else "number" if issubclass(kind, int | float) else "text"
        for kind in types
        if issubclass(kind, str | int | float)
    }
    if any(issubclass(kind, list | tuple) for kind in types):
        return "list"
    if scalars == {"flag"}:
        return "flag"
    if scalars == {"number"}:
        return "number"
    return "text" if scalars else None


def _column(kind: Kind, raw: Sequence[Any]) -> Column:
    starts = np.zeros(0, dtype=np.int64)
    if kind == "number":
        numbers = _numbers(raw)
        return Column(kind, ~np.isnan(numbers), numbers, {}, starts)
    values = _plain_values(kind, raw)
    present = np.fromiter((value is not None for value in values), dtype=bool, count=len(values))
    if kind == "flag":
        flags = np.fromiter((-1 if value is None else value is True for value in values), np.int8, len(values))
        return Column(kind, present, flags, {}, starts)
    entries: Iterable[Any] = values
    if kind == "list":
        starts = np.zeros(len(values) + 1, dtype=np.int64)
        np.cumsum([0 if value is None else len(value) for value in values], out=starts[1:])
        entries = chain.from_iterable(filter(None, values))
    words: dict[Any, int] = {}
    places = np.fromiter((-1 if entry is None else words.setdefault(entry, len(words)) for entry in entries), np.int32)
    return Column(kind, present, places, words, starts)


def _plain_values(kind: Kind, raw: Sequence[Any]) -> Sequence[Any]:
    """`plain` of all values; most columns are so already, which the types tell at once."""
    types = set(map(type, raw))
    if kind == "text" and types <= {str, type(None)}:
        return raw
    if kind == "list" and types <= {list, type(None)}:
        entries = chain.from_iterable(value for value in raw if value is not None)
        if set(map(type, entries)) <= {str}:
            return raw
    return [plain(value, kind) for value in raw]


def _numbers(raw: Sequence[Any]) -> npt.NDArray[np.float64]:
    """(N,) `number` of all values, NaN for none."""
    if set(map(type, raw)) <= {int, float, type(None)}:
        try:
            found = np.array(raw, dtype=np.float64)  # None becomes NaN
        except OverflowError:
            pass
        else:
            return np.where(np.isfinite(found), found, np.nan)
    return np.array([number(value) for value in raw], dtype=np.float64)
