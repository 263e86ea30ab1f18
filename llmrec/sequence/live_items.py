"""LiveItems: the catalog versions, and the parts of them, that a sequence engine searches, by name, in memory.

It stands where a language model's engine has `IndexFiles`: whoever asks for a version or a part holds it until it is
released as often as it was asked for. A version whose items are the model's own shares its table; one with new items
has a model and a table of its own, made from the features that the version brings.
"""

import hashlib
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrec.catalog import Catalog, Softmax
from llmrec.exceptions import CatalogError
from llmrec.sequence.index import ItemIndex, ItemPool, Retrieval, open_index
from llmrec.sequence.new_items import model_of

if TYPE_CHECKING:
    from llmrec.sequence.model import SequenceModel


@dataclass(frozen=True, eq=False)
class Table:
    """A model and its items' vectors, ready to be searched."""

    model: "SequenceModel"
    index: ItemIndex


@dataclass(frozen=True, eq=False)
class LivePool:
    """Items that may be returned, and the table that they are rows of."""

    table: Table
    pool: ItemPool


class LiveItems:
    """What one engine searches. Used by several threads."""

    def __init__(self, model: "SequenceModel", retrieval: Retrieval = "exact") -> None:
        """Makes the model's own table; raises as `open_index` does."""
        self._model, self._retrieval = model, retrieval
        self._own = self._table_of(model)
        self._building = threading.Lock()
        self._counting = threading.Lock()  # never held for long
        self._holders: Counter[str] = Counter()
        self._known: dict[str, LivePool] = {}

    def index_of(self, catalog: Catalog, softmax: Softmax = "vocabulary") -> str:
        """The name of a catalog version's live items, held.

        Args:
            catalog: the version.
            softmax: there is but one.

        Raises:
            CatalogError: if the model does not know its items (`model_of`).
        """
        name = f"{catalog.version}-{catalog.content_hash}"  # a version's name says its features too
        with self._building:
            found = self._known.get(name)
            if found is None:
                model = model_of(self._model, catalog)
                table = self._own if model is self._model else self._table_of(model)
                live = torch.from_numpy(~catalog.retired).to(model.device)
                found = LivePool(table, ItemPool(live))
            self._hold(name, found)
        return name

    def subset_of(self, index: str, rows: "np.ndarray[Any, np.dtype[np.int64]]") -> str:
        """The name of a part of a version, held: of its live items those of these catalog rows alone.

        Raises:
            CatalogError: if the version is not held.
        """
        digest = hashlib.sha256(np.unique(rows).astype("<i8").tobytes()).hexdigest()[:16]
        name = f"{index}-{digest}"
        whole = self.find(index)
        with self._building:
            self._hold(name, self._known.get(name) or LivePool(whole.table, whole.pool.subset(rows)))
        return name

    def find(self, name: str) -> LivePool:
        """What a name means; raises CatalogError for one that nobody holds."""
        found = self._known.get(name)
        if found is None:
            raise CatalogError(f"{name[:80]!r} is no version in use. Name one that index_of or subset_of gave.")
        return found

    def size(self, name: str) -> int:
        """Bytes that a name alone takes, beside its table; 0 if nobody holds it."""
        found = self._known.get(name)
        return 0 if found is None else found.pool.mask.nbytes

    def release(self, name: str, keep: bool = False) -> None:
        """Gives a name up; the last who does forgets it. `keep` is for engines that keep files."""
        with self._counting:
            self._holders[name] -= 1
            if self._holders[name] <= 0:
                del self._holders[name]
                self._known.pop(name, None)

    def _hold(self, name: str, found: LivePool) -> None:
        with self._counting:
            self._holders[name] += 1
            self._known[name] = found

    def _table_of(self, model: "SequenceModel") -> Table:
        with torch.inference_mode():
            return Table(model, open_index(model.table(), self._retrieval))
