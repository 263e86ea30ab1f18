"""KeptShards: what a model has to say of many rows before a training, made once by all processes and kept on disk."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from llmrec.storage import atomic_path

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

SHARD = 256  # rows of one file: what a run that was killed has to do again, and what processes share out

Arrays = dict[str, npt.NDArray[Any]]


class KeptShards:
    """Arrays of many rows in files of some hundred rows, each whole or not there; who asks again goes on.

    Attributes:
        folder: of the files. Its name has to tell all that decides them.
        rows: how many there are.
        shards: how many files there are when all is done.
    """

    def __init__(
        self,
        folder: str | Path,
        rows: int,
        make: Callable[[int, int], Arrays],
        columns: Mapping[str, int],
        what: str = "rows",
        size: int = SHARD,
    ) -> None:
        """
        Args:
            folder: made when it is needed.
            rows: how many.
            make: begin, end -> the arrays (end - begin, columns) of these rows.
            columns: of each array, by its name.
            what: the bar's name for it all.
            size: rows of a file.
        """
        self.folder, self.rows, self.shards = Path(folder), rows, -(-rows // size)
        self._make, self._columns, self._what, self._size = make, dict(columns), what, size

    def missing(self) -> list[int]:
        """The files that are not there, or not whole."""
        return [shard for shard in range(self.shards) if self._held(shard) is None]

    def search(self, shards: Sequence[int], first: int = 0, step: int = 1, progress: bool = False) -> None:
        """Makes the files `shards[first]`, `shards[first + step]`, …: the share of one process among `step`.

        Args:
            shards: of `missing`, the same for all processes.
            first: the process's number.
            step: how many processes there are.
            progress: whether a bar is shown, of this process's share.
        """
        mine = shards[first::step]
        total = sum(end - begin for begin, end in map(self._span, mine))
        with tqdm(total=total, desc=self._what, unit="row", disable=not progress) as bar:
            for shard in mine:
                self._made(shard, first)
                begin, end = self._span(shard)
                bar.update(end - begin)

    def share_out(self, training: "TrainingArguments") -> None:
        """Makes all that is missing, by all processes of a training; each waits for the slowest.

        On machines without a common disk each makes what it lacks, by its own processes.
        """
        from accelerate import PartialState

        processes = PartialState()
        shares = [(training.process_index, training.world_size)]
        if training.world_size > 1:  # what other machines made may lie on their disks alone
            local = int(os.environ.get("LOCAL_WORLD_SIZE", str(training.world_size)))
            shares.append((training.local_process_index, local))
        for number, count in shares:
            missing = self.missing()
            processes.wait_for_everyone()  # until all have looked
            self.search(missing, number, count, progress=training.process_index == 0 and not training.disable_tqdm)
            processes.wait_for_everyone()

    def load(self) -> Arrays:
        """All rows, one array by name; what is not on this disk is made first."""
        found = []
        for shard in range(self.shards):
            held = self._held(shard)
            found.append(self._made(shard, 0) if held is None else held)
        if not found:
            return {name: np.zeros((0, columns)) for name, columns in self._columns.items()}
        return {name: np.concatenate([one[name] for one in found]) for name in self._columns}

    def _span(self, shard: int) -> tuple[int, int]:
        return shard * self._size, min((shard + 1) * self._size, self.rows)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.safetensors"

    def _held(self, shard: int) -> Arrays | None:
        """What a file holds; None if it has to be made."""
        path, (begin, end) = self._path(shard), self._span(shard)
        if not path.is_file():
            return None
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            logger.warning("%s cannot be read and is made again: %s", path, error)
            return None
        shapes = {name: (end - begin, columns) for name, columns in self._columns.items()}
        return found if {name: one.shape for name, one in found.items()} == shapes else None

    def _made(self, shard: int, process: int) -> Arrays:
        """Makes what a file holds, and writes it with the number of the process that did."""
        found = self._make(*self._span(shard))
        with atomic_path(self._path(shard)) as temporary:
            save_file(found, temporary, {"process": str(process)})
        return found
