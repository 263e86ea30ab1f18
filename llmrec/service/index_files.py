"""IndexFiles: the folder of tries that searches read, one file per catalog version, and more for parts of them.

The side that takes requests writes them, the engine's workers map them by name (`SearchParameters.index`). A name
tells the version and a hash of all else that the file depends on, so a file under a name is the right one or torn.
"""

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmrec.catalog import Catalog, Softmax
from llmrec.exceptions import ArtefactError, CatalogError
from llmrec.trie_tensors import TrieTensors

logger = logging.getLogger(__name__)

_ENDING = ".trie.safetensors"


class IndexFiles:
    """The files of one folder, which belongs to one server: its processes share it, other servers have their own.

    Whoever asks for a file holds it, until it is released as often as it was asked for; then it is removed. One
    process of the server writes and removes, the others read.

    Attributes:
        folder: it is made if need be, readable by its owner alone.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._building = threading.Lock()
        self._counting = threading.Lock()  # never held for long
        self._holders: Counter[str] = Counter()

    def path(self, name: str) -> Path:
        """Where a file of this name is or would be; raises CatalogError for what is no name of an index."""
        if Path(name).name != name or name.startswith(".") or not name.endswith(_ENDING):
            raise CatalogError(f"{name[:80]!r} is no name of an index file. Name one that index_of or subset_of gave.")
        return self.folder / name

    def index_of(self, catalog: Catalog, softmax: Softmax = "vocabulary") -> str:
        """The name of the file with a catalog version's trie, held; it is written if it is not there whole.

        Raises:
            CatalogError: if the catalog has no token ids yet, or there is no such softmax range for its items.
        """
        digest = hashlib.sha256(f"{catalog.version}\n{catalog.content_hash}\n{softmax}\n".encode())
        for level in catalog.require_tokens():
            digest.update(np.ascontiguousarray(level, dtype="<i8").tobytes())
        name = f"{catalog.version}-{digest.hexdigest()[:16]}{_ENDING}"
        with self._held(name):
            if not self._whole(name):
                TrieTensors.of(catalog, softmax).save(self.path(name), version=_version(name))
        return name

    def subset_of(self, index: str, rows: npt.NDArray[np.int64]) -> str:
        """The name of the file with a part of an index, held: the leaves of these catalog rows (in any order) alone.

        Raises:
            ArtefactError: if the index itself is not there whole.
        """
        digest = hashlib.sha256(np.unique(rows).astype("<i8").tobytes()).hexdigest()[:16]
        name = f"{index.removesuffix(_ENDING)}-{digest}{_ENDING}"
        with self._held(name):
            if not self._whole(name):
                whole = TrieTensors.map(self.path(index), version=_version(index))
                whole.subset(np.unique(rows)).save(self.path(name), version=_version(name))
        return name

    def load(self, name: str) -> TrieTensors:
        """A file's trie, mapped; raises ArtefactError if it is not there whole."""
        return TrieTensors.map(self.path(name), version=_version(name))

    def size(self, name: str) -> int:
        """Bytes of a file; 0 if there is none."""
        try:
            return self.path(name).stat().st_size
        except FileNotFoundError:  # nor asked beforehand: it may go between two questions
            return 0

    def release(self, name: str, keep: bool = False) -> None:
        """Gives a file up; the last who does removes it, unless it is to be found again (`keep`).

        Who has mapped it may read on.
        """
        with self._counting:
            self._holders[name] -= 1
            if self._holders[name] <= 0:
                del self._holders[name]
                if not keep:
                    self.path(name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """All files of the folder, by name; also those of versions and filters that nobody asks for any more."""
        return sorted(path.name for path in self.folder.glob(f"[!.]*{_ENDING}"))

    @contextmanager
    def _held(self, name: str) -> Iterator[None]:
        """One file is built at a time; held from before it is looked for, so that nobody removes it meanwhile."""
        with self._counting:
            self._holders[name] += 1
        try:
            with self._building:
                yield
        except BaseException:
            self.release(name)
            raise

    def _whole(self, name: str) -> bool:
        path = self.path(name)
        if not path.exists():
            return False
        try:
            TrieTensors.map(path, version=_version(name))
        except (ArtefactError, CatalogError) as error:
            logger.warning("the index file %s is made again: %s", name, error)
            path.unlink()
            return False
        return True


def _version(name: str) -> str:
    """What a file records as its version: its name, which says all that it depends on."""
    return name.removesuffix(_ENDING)
