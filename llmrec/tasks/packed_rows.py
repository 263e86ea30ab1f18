"""Rows laid one behind another in flat arrays: what a cache holds, and what becomes a data set without a copy."""

import json
import logging
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from llmrec.examples import IGNORED, Row
from llmrec.storage import atomic_folder, sha256_of, write_json

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_ROWS_FILE, _MANIFEST_FILE = "rows.safetensors", "rows.json"
# Arrow's lists count their values in 31 bits; so many tokens are in one piece of a table.
_TOKENS_A_PIECE = 1 << 30


class PackedRows:
    """R rows of T tokens in all.

    Attributes:
        tokens: (T,) int32, the rows' `input_ids`.
        answers: (T,) bool, whether a token is its own label; all others have none.
        ends: (R,) int64, where each row ends in `tokens`.
        owners: (R,) int16, the place of each row's task in `tasks`.
        tasks: their names, in order of first appearance.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        answers: npt.NDArray[np.bool_],
        ends: npt.NDArray[np.int64],
        owners: npt.NDArray[np.int16],
        tasks: list[str],
    ) -> None:
        self.tokens, self.answers, self.ends, self.owners, self.tasks = tokens, answers, ends, owners, tasks

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "PackedRows":
        """Packs rows whose labels are their tokens or -100."""
        tokens, answers, ends, owners = array("i"), bytearray(), array("q"), array("h")
        places: dict[str, int] = {}
        for row in rows:
            tokens.extend(row["input_ids"])
            answers.extend(label != IGNORED for label in row["labels"])
            ends.append(len(tokens))
            owners.append(places.setdefault(row["task"], len(places)))
        return cls(
            _view(tokens, np.int32),
            _view(answers, np.bool_),
            _view(ends, np.int64),
            _view(owners, np.int16),
            list(places),
        )

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        span = slice(int(self.ends[place - 1]) if place else 0, int(self.ends[place]))
        tokens = self.tokens[span]
        labels = np.where(self.answers[span], tokens, IGNORED)
        return {"input_ids": tokens.tolist(), "labels": labels.tolist(), "task": self.tasks[self.owners[place]]}

    def __iter__(self) -> Iterator[Row]:
        return (self[place] for place in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(R,) tokens of every row."""
        return np.diff(self.ends, prepend=0)

    def report(self) -> dict[str, dict[str, int]]:
        """By task: "rows", "tokens", "answer_tokens" (those that the loss looks at) and "longest" row."""
        answers = np.diff(np.concatenate([[0], np.cumsum(self.answers)])[np.concatenate([[0], self.ends])])
        found = {}
        for place, task in enumerate(self.tasks):
            mine = self.owners == place
            found[task] = {
                "rows": int(mine.sum()),
                "tokens": int(self.lengths[mine].sum()),
                "answer_tokens": int(answers[mine].sum()),
                "longest": int(self.lengths[mine].max()),
            }
        return found

    def dataset(self) -> "datasets.Dataset":
        """The rows as a data set in memory, with the columns input_ids, labels and task."""
        import datasets
        import pyarrow as pa  # type: ignore[import-untyped]

        labels = np.where(self.answers, self.tokens, np.int32(IGNORED))
        pieces: list[pa.Table] = []
        for begin, end in self._spans():
            origin = int(self.ends[begin - 1]) if begin else 0
            offsets = pa.array(np.concatenate([[0], self.ends[begin:end] - origin]).astype(np.int32))
            span = slice(origin, int(self.ends[end - 1]) if end else 0)
            columns = [pa.ListArray.from_arrays(offsets, pa.array(values[span])) for values in (self.tokens, labels)]
            names = pa.array([self.tasks[owner] for owner in self.owners[begin:end].tolist()], type=pa.string())
            pieces.append(pa.table([*columns, names], names=["input_ids", "labels", "task"]))
        return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(pieces)))

    def _spans(self, most: int = _TOKENS_A_PIECE) -> list[tuple[int, int]]:
        """Ranges of rows of at most so many tokens, though of one row at least; one empty range if there are none."""
        spans = []
        begin = 0
        while begin < len(self):
            origin = int(self.ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(self.ends, origin + most, side="right")))
            spans.append((begin, end))
            begin = end
        return spans or [(0, 0)]

    def save(self, folder: str | Path, key: str) -> None:
        """Writes the rows under a key that says what decided them; whole or not at all."""
        with atomic_folder(folder) as temporary:
            arrays = {"tokens": self.tokens, "answers": self.answers, "ends": self.ends, "owners": self.owners}
            save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, temporary / _ROWS_FILE)
            manifest = {"key": key, "tasks": self.tasks, "sha256": sha256_of(temporary / _ROWS_FILE)}
            write_json(temporary / _MANIFEST_FILE, manifest)

    @classmethod
    def load(cls, folder: str | Path, key: str) -> "PackedRows | None":
        """What `save` wrote under this key; None if there is nothing, another key's, or files that were altered."""
        folder = Path(folder)
        if not folder.is_dir():
            return None
        try:
            manifest = json.loads((folder / _MANIFEST_FILE).read_text(encoding="utf-8"))
            if manifest["key"] != key or manifest["sha256"] != sha256_of(folder / _ROWS_FILE):
                raise ValueError("its files are not those that were written")
            arrays = load_file(folder / _ROWS_FILE)
            tokens, answers, ends, owners = (arrays[name] for name in ("tokens", "answers", "ends", "owners"))
            return cls(tokens, answers, ends, owners, list(manifest["tasks"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, RecursionError) as error:
            logger.warning("the cached rows in %s cannot be used (%s): they are built again", folder, error)
            return None


def _view(values: "array[int] | bytearray", kind: type[np.generic]) -> npt.NDArray[Any]:
    return np.frombuffer(values, dtype=kind) if len(values) else np.zeros(0, dtype=kind)
