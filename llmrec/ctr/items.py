"""CandidateItems: the items that a ranking model has rows for, and one row for all others."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from llmrec.ctr.rows import LabelledRows, Numbers
from llmrec.exceptions import ArtefactError, DataError
from llmrec.storage import write_json

ITEMS_FILE = "items.json"
UNKNOWN_ITEM = 0


class CandidateItems:
    """Item ids -> rows 1..N-1 of a model; `UNKNOWN_ITEM` is the row of every item that is not here.

    A new item has to have some probability, too. In training some items are taken for unknown at random
    (`CTRConfig.unknown_rate`), so this row's vector stands for an item of which nothing is known.

    >>> CandidateItems(["a", "b"]).rows(["b", "c"]).tolist()
    [2, 0]
    """

    def __init__(self, ids: Sequence[str]) -> None:
        """
        Args:
            ids: different ones; the first gets row 1.

        Raises:
            DataError: if an id is empty or there twice.
        """
        self.ids = tuple(ids)
        self._rows = {item: row for row, item in enumerate(self.ids, start=1)}
        if len(self._rows) != len(self.ids) or "" in self._rows:
            raise DataError(
                f"{len(self.ids)} item ids name {len(self._rows)} items. Give each id once, and none empty."
            )

    def __len__(self) -> int:
        """N, the unknown item's row included."""
        return len(self.ids) + 1

    def rows(self, ids: Iterable[str]) -> Numbers:
        """(n,) the rows of ids."""
        return np.array([self._rows.get(item, UNKNOWN_ITEM) for item in ids], dtype=np.int64)

    @classmethod
    def of_training(cls, rows: LabelledRows, train: Numbers, min_count: int = 1) -> "CandidateItems":
        """The items that at least `min_count` of the training rows (places in `rows`) are about, in order of ids."""
        counts = np.bincount(rows.items[train], minlength=len(rows.item_ids))
        return cls([rows.item_ids[item] for item in np.flatnonzero(counts >= max(1, min_count))])

    def save(self, folder: str | Path) -> None:
        """Writes `items.json`."""
        write_json(Path(folder) / ITEMS_FILE, {"version": 1, "ids": list(self.ids)})

    @classmethod
    def load(cls, folder: str | Path) -> "CandidateItems":
        """Reads what `save` wrote.

        Raises:
            ArtefactError: if it is missing or something else.
        """
        path = Path(folder) / ITEMS_FILE
        try:
            ids = json.loads(path.read_text(encoding="utf-8"))["ids"]
            if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
                raise ValueError("ids are no list of text")
            return cls(ids)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtefactError(f"{path} cannot be read: {error}. Save the ranking model again.") from error
