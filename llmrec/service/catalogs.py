"""LiveCatalogs: the catalogs that a server recommends from, each of which may go to another version under load.

A request pins the version that it began with (`using`) and is answered by it, whatever is swapped meanwhile. A swap
makes the new version ready beside the old one and then changes one reference. What nobody uses any more is removed.

All but the reading and writing of files happens on the event loop's thread, so there are no locks: between two
`await`s nothing changes.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from llmrec.artefact_parts import PromptEncoder, RequestEncoder, Settings
from llmrec.catalog import Catalog
from llmrec.catalog_versions import CatalogVersions
from llmrec.exceptions import ArtefactError, BusyError, CatalogError, LLMRecError, UnknownCatalogError
from llmrec.prompt import Prompt
from llmrec.service.attributes import Attributes
from llmrec.service.filters import Filters, candidates
from llmrec.service.index_files import IndexFiles
from llmrec.service.live_version import Indexes, LiveVersion, ServedCatalog, folded
from llmrec.service.schema import CatalogItem, CatalogItems, CatalogState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrec.tasks.templates import Templates

__all__ = ["Constraint", "LiveCatalogs", "ServedCatalog", "require_tokens"]

logger = logging.getLogger(__name__)

Parts = tuple["PreTrainedTokenizerBase", Prompt, Settings, "Templates"]
Check = Callable[[ServedCatalog], Awaitable[object]]
MakeEncoder = Callable[[Catalog], RequestEncoder]

CURRENT = "current"
_SWAP_SECONDS = 5.0


@dataclass(frozen=True)
class Constraint:
    """What a search is told of the items that it may return.

    Attributes:
        subset, allowed, excluded: of `SearchParameters`.
        candidates: how many live items they leave.
    """

    subset: str
    allowed: list[int] | None
    excluded: list[int]
    candidates: int


class LiveCatalogs:
    """The catalogs of one server by name, the default one first."""

    def __init__(
        self,
        folders: Mapping[str, Path],
        parts: Parts,
        index_folder: Path,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Reads all catalogs and writes their index files where they are missing: call it in a thread.

        Args:
            folders: by name the folder of each catalog (`CatalogVersions`).
            parts: tokenizer, prompt, settings and templates of the artefact, which all catalogs share.
            index_folder: see `IndexFiles`.
            versions: by name the version to begin with; default: the current one.

        Raises:
            CatalogError: if a folder holds no catalog, or a version is not there or is damaged.
            ArtefactError: if a catalog's token ids are not the tokenizer's, or a version's file was altered.
        """
        tokenizer, prompt, settings, templates = parts

        def encoder_of(catalog: Catalog) -> RequestEncoder:
            require_tokens(catalog, tokenizer)
            return PromptEncoder(tokenizer, catalog, prompt, settings, templates)

        self._begin(folders, IndexFiles(index_folder), encoder_of, versions)

    @classmethod
    def of(
        cls,
        folders: Mapping[str, Path],
        files: Indexes,
        encoder_of: MakeEncoder,
        versions: Mapping[str, str] | None = None,
    ) -> Self:
        """The catalogs of an engine of another kind.

        Args:
            folders, versions: as for a language model's.
            files: where the engine finds what it searches.
            encoder_of: makes the encoder of a version, or raises CatalogError or ArtefactError if it is of no use.
        """
        made = cls.__new__(cls)
        made._begin(folders, files, encoder_of, versions)
        return made

    def _begin(
        self,
        folders: Mapping[str, Path],
        files: Indexes,
        encoder_of: MakeEncoder,
        versions: Mapping[str, str] | None,
    ) -> None:
        if not folders:
            raise CatalogError("A server was given no catalog. Name at least one folder.")
        self.files, self._encoder_of = files, encoder_of
        self._folders = {name: CatalogVersions(folder) for name, folder in folders.items()}
        self._swapping: set[str] = set()
        self._now: dict[str, LiveVersion] = {}
        self._before: list[LiveVersion] = []  # versions that were in use and that requests may still be answered by
        for name in folders:
            self._now[name] = LiveVersion(self._read(name, (versions or {}).get(name, CURRENT)), self.files)

    @property
    def names(self) -> list[str]:
        """The catalogs, the default one first."""
        return list(self._now)

    @contextmanager
    def using(self, name: str | None = None) -> Iterator[ServedCatalog]:
        """The version of a catalog that is in use now; it stays whole until the block is left.

        Raises:
            UnknownCatalogError: if there is no catalog of that name.
        """
        version = self._now[self._known(name)]
        try:
            with version.pin() as served:
                yield served
        finally:
            self._tidy()

    async def swap(self, name: str | None, version: str = CURRENT, check: Check | None = None) -> tuple[str, str]:
        """Sends requests that begin from now on to another version, older or newer; returns it, and the one before.

        While the new version is read and checked, the old one goes on. Whatever fails, it stays in use. A swap that
        has begun is brought to its end, also if who asked for it goes away.

        Args:
            name: of the catalog; None for the default one.
            version: one that `states` lists, or "current" for the one that the folder says.
            check: awaited with the new version before it is used; an exception of it ends the swap.

        Raises:
            UnknownCatalogError: if there is no such catalog, or no such version.
            BusyError: if this catalog is being swapped already.
            CatalogError, ArtefactError: if the version is damaged.
        """
        name = self._known(name)
        if name in self._swapping:
            raise BusyError(
                f"Catalog {name!r} is being swapped already. Ask again when that is done.", retry_after=_SWAP_SECONDS
            )
        self._swapping.add(name)
        task = asyncio.create_task(self._swap(name, version, check))
        task.add_done_callback(_seen)
        return await asyncio.shield(task)

    def states(self) -> list[CatalogState]:
        """What is in use of each catalog, and what it could be sent to."""
        found = []
        for name, version in self._now.items():
            served = version.served
            found.append(
                CatalogState(
                    name=name,
                    version=served.version,
                    items=len(served.catalog),
                    live=served.catalog.num_live,
                    levels=served.catalog.num_levels,
                    attributes=dict(served.attributes.kinds),
                    versions=[row["version"] for row in self._folders[name].log() if row["damaged"] is None],
                )
            )
        return found

    async def constrain(
        self,
        served: ServedCatalog,
        filters: Filters | None = None,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] = (),
        seen_rows: Sequence[int] = (),
    ) -> Constraint:
        """What to tell a search so that it finds live items that match, are allowed, not denied and not seen, alone.

        A filter that leaves more than `live_version.INLINE_ROWS` items becomes a file, made once by a thread and then
        shared by all requests with the same filter, whatever the order of its words. Fewer items, and allow lists, are
        rows in the request itself. The file is there until the block of `using` is left.

        Args:
            served: as `using` gave it.
            filters: conditions by attribute, in any form that `filters.read` takes.
            allow, deny, seen_rows: see `filters.candidates`.

        Raises:
            FilterError: if a filter cannot be read, or items have no such attribute.
        """
        part = await self._version(served).part(filters) if filters else None
        found = candidates(served.catalog, None if part is None else part.left, allow, deny, seen_rows)
        allowed = found.allowed
        if allowed is None and part is not None and not part.subset and part.left.count < served.catalog.num_live:
            allowed = np.setdiff1d(part.left.rows(), found.excluded, assume_unique=True)
        if allowed is not None:
            return Constraint("", allowed.tolist(), [], found.count)
        return Constraint("" if part is None else part.subset, None, found.excluded.tolist(), found.count)

    def page(self, served: ServedCatalog, search: str = "", offset: int = 0, limit: int = 50) -> CatalogItems:
        """Items whose id or title holds `search`, whatever the case, by row: `limit` of them from the `offset`-th on.

        The first search of a version folds all its titles, seconds for a million: call it in a thread.
        """
        catalog = served.catalog
        if search:
            ids, titles = (words.str.contains(folded(search), literal=True) for words in served.words)
            rows = (ids | titles).arg_true().to_numpy()
        else:
            rows = np.arange(len(catalog))
        items = [
            CatalogItem(
                id=catalog.ids[row],
                title=catalog.title(row),
                semantic_id=catalog.codes[row].tolist(),
                retired=bool(catalog.retired[row]),
                attributes=served.attributes.of(row),
            )
            for row in rows[offset : offset + limit].tolist()
        ]
        return CatalogItems(items=items, total=len(rows))

    async def _swap(self, name: str, version: str, check: Check | None) -> tuple[str, str]:
        old = self._now[name]
        try:
            asked = await asyncio.to_thread(self._exact, name, version)
            if asked == old.served.version:
                return asked, asked
            made = await asyncio.to_thread(self._read, name, asked, old.served.attributes.made)
            new = LiveVersion(made, self.files)
            self._before.append(new)  # until it is in use, it is cleared away like one that was
            try:
                if check is not None:
                    with new.pin() as served:
                        await check(served)
                self._before.remove(new)
                self._before.append(old)
                self._now[name] = new
            finally:
                self._tidy()
        finally:
            self._swapping.discard(name)
        logger.info("catalog %s: version %s is in use, after %s", name, asked, old.served.version)
        return asked, old.served.version

    def _version(self, served: ServedCatalog) -> LiveVersion:
        return next(version for version in (*self._now.values(), *self._before) if version.served is served)

    def _tidy(self) -> None:
        """Releases the files of versions that were in use and are not any more."""
        for version in [version for version in self._before if not version.pinned]:
            self._before.remove(version)
            version.clear(keep=self._is_current(version.served))

    def _is_current(self, served: ServedCatalog) -> bool:
        """Whether the folder says that a version is the current one, so that the next start begins with it."""
        try:
            return self._folders[served.name].current == served.version
        except LLMRecError:
            return True

    def _exact(self, name: str, version: str) -> str:
        """A version's name; raises UnknownCatalogError if the catalog has none that is called so."""
        folder = self._folders[name]
        known = [str(row["version"]) for row in folder.log()]
        asked = folder.current if version == CURRENT else version
        if asked not in known:
            raise UnknownCatalogError(
                f"Catalog {name!r} has no version {version!r}. Name one of {', '.join(known[-20:])}, or current."
            )
        return asked

    def _read(self, name: str, version: str, columns: Sequence[str] = ()) -> ServedCatalog:
        """A version, ready to serve, with these columns of attributes made, as far as it has them."""
        catalog = self._folders[name].load(None if version == CURRENT else version)
        encoder = self._encoder_of(catalog)
        attributes = Attributes(catalog.items)
        for column in columns:
            if column in attributes.kinds:
                attributes.column(column)
        index = self.files.index_of(catalog, encoder.settings.softmax)
        return ServedCatalog(name, catalog, encoder, index, attributes)

    def _known(self, name: str | None) -> str:
        if name is None:
            return next(iter(self._now))
        if name not in self._now:
            raise UnknownCatalogError(
                f"The server has no catalog {name[:80]!r}. Name one of {', '.join(self._now)}, or none for the first."
            )
        return name


def require_tokens(catalog: Catalog, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ArtefactError if a catalog is not spelt with this tokenizer's ids, CatalogError if it has none."""
    if catalog.spelling is not None:
        catalog.spelling.require(tokenizer)
        return
    for strings, ids in zip(catalog.token_strings(), catalog.require_tokens(), strict=True):
        if tokenizer.convert_tokens_to_ids(strings) != ids.tolist():
            raise ArtefactError(
                f"The server's tokenizer spells {strings[0]!r} otherwise than a catalog of version {catalog.version}. "
                "Serve catalogs that were built for this artefact's tokenizer."
            )


def _seen(task: "asyncio.Task[tuple[str, str]]") -> None:
    """Takes note of how a swap ended that nobody waits for any more."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.warning("a catalog was not swapped: %s", error)
