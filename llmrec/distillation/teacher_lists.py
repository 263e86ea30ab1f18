"""TeacherLists: the most probable items after training histories, searched once by all processes and kept on disk."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from llmrec.distillation.item_distributions import ItemDistributions, Numbers, Rest
from llmrec.exceptions import DataError
from llmrec.prompt import EVENT_COLUMNS
from llmrec.storage import atomic_path
from llmrec.tasks.events import LoggedEvents

if TYPE_CHECKING:
    from llmrec.data.split import Split
    from llmrec.recommender import Recommender

logger = logging.getLogger(__name__)

_FORMAT = "llmrec item distributions 2"
_TENSORS = ("rows", "scores")
_SHARD = 256  # histories of one file: what a run that was killed has to do again, and what processes share out


class TeacherLists:
    """A language model's most probable items after the histories of training interactions.

    Histories are shown as they are served: their last `max_history` items by the artefact's prompt, with events if it
    shows them. Items of the history are candidates too. What was computed is kept in files of some hundred histories,
    each whole or not there, in a folder whose name is a hash of what decides them: the teacher, its number type, the
    split, the places, and what its prompt shows of items and events. Devices round differently and are not in it.

    Several processes: each calls `search` with its number, all of them the same, and waits for the others; then
    `missing` tells what is not on its disk.

    Attributes:
        places: (C,) the interactions.
        width: W, of items and of beams.
        shards: how many files there are when all is done.
    """

    def __init__(
        self, teacher: "Recommender", split: "Split", places: Numbers, width: int, folder: str | Path, identity: str
    ) -> None:
        """
        Args:
            teacher: of the split's own items.
            split: of the interactions.
            places: of `training_places`.
            width: W.
            folder: holds a folder per content.
            identity: of the teacher's weights, such as their hash.

        Raises:
            DataError: if the teacher's items are not the split's, its prompt shows more than a history and its events,
                or W is below 1.
        """
        if width < 1:
            raise DataError(f"--soft_items is {width}. Ask for one item or more.")
        if teacher.catalog.ids != split.item_ids:
            raise DataError(
                f"The teacher's catalog has {len(teacher.catalog)} items and the split {split.num_items}, or others. "
                "Split the interactions over the teacher's own items."
            )
        if needed := sorted(teacher.prompt.variables - {"history"}):
            raise DataError(
                f"The teacher's prompt shows {', '.join(needed)} beside the history, which training histories do not "
                "have here. Distil from a model whose prompt shows the history alone."
            )
        self.places, self.width = places, width
        self.shards = -(-len(places) // _SHARD)
        self._teacher, self._split = teacher, split
        self._events = LoggedEvents(split) if teacher.prompt.attributes & set(EVENT_COLUMNS) else None
        self._folder = Path(folder) / self._key(identity)

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
        total = sum(len(self._places_of(shard)) for shard in mine)
        with tqdm(total=total, desc="teacher's items", unit="history", disable=not progress) as bar:
            for shard in mine:
                self._make(shard, first)
                bar.update(len(self._places_of(shard)))

    def distributions(self, rest: Rest = "uniform") -> ItemDistributions:
        """All lists as distributions; what is not on this disk is searched first.

        Args:
            rest: see `ItemDistributions`.
        """
        found = []
        for shard in range(self.shards):
            held = self._held(shard)
            found.append(self._make(shard) if held is None else held)
        nothing = np.zeros((0, self.width))
        rows = np.concatenate([one["rows"] for one in found]) if found else nothing
        scores = np.concatenate([one["scores"] for one in found]) if found else nothing
        live = ~self._teacher.catalog.retired
        return ItemDistributions(self.places, rows.astype(np.int64), scores.astype(np.float32), live, rest)

    def _key(self, identity: str) -> str:
        """The name of the folder."""
        teacher, split = self._teacher, self._split
        settings, prompt, catalog = teacher.settings, teacher.prompt, teacher.catalog
        digest = hashlib.sha256()
        told = [_FORMAT, identity, split.content_hash, catalog.content_hash, self.width, settings.max_history]
        told += [settings.softmax, prompt.source, str(teacher.model.dtype)]
        shown = sorted(prompt.attributes)
        told.append([[repr(item.get(name)) for name in shown] for item in catalog.items])
        if self._events is not None:
            for column in (split.actions, split.domains):
                told.append(None if column is None else column.to_list())
            times = split.timestamps
            digest.update(b"" if times is None else np.ascontiguousarray(times, dtype="<f8").tobytes())
        digest.update(json.dumps(told, default=repr).encode())
        digest.update(np.ascontiguousarray(self.places, dtype="<i8").tobytes())
        return digest.hexdigest()[:32]

    def _places_of(self, shard: int) -> Numbers:
        return self.places[shard * _SHARD : (shard + 1) * _SHARD]

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard:06d}.safetensors"

    def _held(self, shard: int) -> dict[str, npt.NDArray[np.generic]] | None:
        """What a file holds; None if it has to be made."""
        path, shape = self._path(shard), (len(self._places_of(shard)), self.width)
        if not path.is_file():
            return None
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            logger.warning("%s cannot be read and is made again: %s", path, error)
            return None
        return found if {name: one.shape for name, one in found.items()} == dict.fromkeys(_TENSORS, shape) else None

    def _make(self, shard: int, process: int = 0) -> dict[str, npt.NDArray[np.generic]]:
        """Searches what a file holds, and writes it with the number of the process that did."""
        some, split = self._places_of(shard), self._split
        begins, most = split.offsets[split.owner[some]], self._teacher.settings.max_history
        spans = [
            (max(begin, place - most), place) for begin, place in zip(begins.tolist(), some.tolist(), strict=True)
        ]
        found = _searched(self._teacher, split, spans, self.width, self._events)
        with atomic_path(self._path(shard)) as temporary:
            save_file(found, temporary, {"process": str(process)})
        return found


def _searched(
    teacher: "Recommender",
    split: "Split",
    spans: Sequence[tuple[int, int]],
    width: int,
    events: LoggedEvents | None,
) -> dict[str, npt.NDArray[np.generic]]:
    histories = [split.rows[begin:end].tolist() for begin, end in spans]
    told = None if events is None else [events.between(begin, end) for begin, end in spans]
    lists, scores = teacher.recommend_rows(histories, width, exclude_seen=False, num_beams=width, events=told)
    rows = np.full((len(spans), width), -1, dtype=np.int32)
    values = np.full((len(spans), width), -np.inf, dtype=np.float32)
    for place, (items, logs) in enumerate(zip(lists, scores, strict=True)):
        rows[place, : len(items)], values[place, : len(logs)] = items, logs
    return {"rows": rows, "scores": values}
