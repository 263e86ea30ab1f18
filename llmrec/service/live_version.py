"""LiveVersion: one version of a catalog in a server's memory, the requests that use it, the files that they name."""

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from llmrec.artefact_parts import RequestEncoder
from llmrec.catalog import Catalog, Softmax
from llmrec.service.attributes import Attributes
from llmrec.service.filters import Filters, Matching, key, matching

if TYPE_CHECKING:
    import polars as pl

# A filter that leaves at most so many items is sent with each request; others become a file that requests share.
INLINE_ROWS = 1_000
MAX_PARTS, MAX_PART_BYTES = 64, 4 << 30


class Indexes(Protocol):
    """Where an engine finds what it searches, by name: `IndexFiles` on disk, or a sequence engine's `LiveItems`.

    Whoever asks for a name holds it until it is released as often as it was asked for.
    """

    def index_of(self, catalog: Catalog, softmax: Softmax = "vocabulary") -> str:
        """The name of a catalog version's live items, held."""
        ...

    def subset_of(self, index: str, rows: npt.NDArray[np.int64]) -> str:
        """The name of a part of a version, held: its live items of these rows alone."""
        ...

    def size(self, name: str) -> int:
        """Bytes that a name takes; 0 if it is gone."""
        ...

    def release(self, name: str, keep: bool = False) -> None:
        """Gives a name up; the last who does removes what it names, unless it is to be found again (`keep`)."""
        ...


@dataclass(frozen=True, eq=False)
class ServedCatalog:
    """One version of one catalog, ready to serve; never changed.

    Attributes:
        name: of the catalog.
        catalog: the version's items.
        encoder: makes prompts of them.
        index: the name of its live items for the engine (`Indexes`).
        attributes: what filters may name.
    """

    name: str
    catalog: Catalog
    encoder: RequestEncoder
    index: str
    attributes: Attributes

    @property
    def version(self) -> str:
        """The version's name, as answers have it."""
        return self.catalog.version

    @cached_property
    def words(self) -> "list[pl.Series]":
        """Ids and titles, case-folded, by row; made when asked, seconds for a million items."""
        import polars as pl

        titles = (self.catalog.title(row) for row in range(len(self.catalog)))
        return [pl.Series(map(folded, texts), dtype=pl.String) for texts in (self.catalog.ids, titles)]


@dataclass(frozen=True)
class Part:
    """What a filter leaves of a version.

    Attributes:
        left: the items.
        subset: the file of their trie; "" where they are all that are live, or few.
    """

    left: Matching
    subset: str


class LiveVersion:
    """Counts the requests that use a version, and makes and removes the files of its parts.

    Used on the event loop's thread alone; files are read and written in others.

    Attributes:
        served: what requests see.
    """

    def __init__(self, served: ServedCatalog, files: Indexes) -> None:
        self.served = served
        self._files = files
        self._numbers = itertools.count()
        self._pins: set[int] = set()
        self._parts: OrderedDict[str, Part] = OrderedDict()  # the least recently used first
        self._making: dict[str, asyncio.Task[Part]] = {}
        self._leaving: list[tuple[int, str]] = []  # files, and the number of the first request that does not name them

    @property
    def pinned(self) -> bool:
        """Whether somebody uses it."""
        return bool(self._pins)

    @contextmanager
    def pin(self) -> Iterator[ServedCatalog]:
        """Keeps the version and its files until the block is left."""
        number = next(self._numbers)
        self._pins.add(number)
        try:
            yield self.served
        finally:
            self._pins.discard(number)
            self._part_with()

    def _part_with(self) -> None:
        """Releases the files that no request names any more."""
        first = min(self._pins, default=next(self._numbers))
        while self._leaving and self._leaving[0][0] <= first:
            self._files.release(self._leaving.pop(0)[1])

    async def part(self, filters: Filters) -> Part:
        """What a filter leaves, from memory, or made by a thread, once for all that ask for it meanwhile.

        Raises:
            FilterError: if the filter cannot be read, or items have no such attribute.
        """
        name = key(filters)
        part = self._parts.get(name)
        if part is not None and (not part.subset or self._files.size(part.subset)):
            self._parts.move_to_end(name)
            return part
        if name not in self._making:
            self._making[name] = asyncio.create_task(self._make(name, filters))
        # Who goes away does not end what others wait for.
        return await asyncio.shield(self._making[name])

    async def _make(self, name: str, filters: Filters) -> Part:
        served = self.served

        def work() -> Part:
            left = matching(filters, served.catalog, served.attributes)
            if INLINE_ROWS < left.count < served.catalog.num_live:
                return Part(left, self._files.subset_of(served.index, left.rows()))
            return Part(left, "")

        with self.pin():  # else its file could come after the version has been cleared away
            try:
                part = await asyncio.to_thread(work)
                self._give_up(self._parts.pop(name, None))
                self._parts[name] = part
                self._shrink()
                return part
            finally:
                del self._making[name]

    def _shrink(self) -> None:
        """Gives up the least recently used parts beyond the bounds; the newest stays."""
        sizes = {name: self._files.size(part.subset) if part.subset else 0 for name, part in self._parts.items()}
        total = sum(sizes.values())
        while len(self._parts) > 1 and (len(self._parts) > MAX_PARTS or total > MAX_PART_BYTES):
            name, part = self._parts.popitem(last=False)
            total -= sizes[name]
            self._give_up(part)

    def _give_up(self, part: Part | None) -> None:
        """Releases a part's file when the requests that are there now have gone."""
        if part is not None and part.subset:
            self._leaving.append((next(self._numbers), part.subset))

    def clear(self, keep: bool) -> None:
        """Releases its files, when nobody uses it any more; `keep` says that its index will be asked for again."""
        for part in self._parts.values():
            self._give_up(part)
        self._parts.clear()
        self._part_with()
        self._files.release(self.served.index, keep)


def folded(text: str) -> str:
    """A text as searches compare it; half a character, which no column holds, becomes a question mark."""
    return text.casefold().encode("utf-8", "replace").decode("utf-8")
