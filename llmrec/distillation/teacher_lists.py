"""TeacherLists: the most probable items after training histories, searched once by all processes and kept on disk."""

import hashlib
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
_SHARD = 256  # histories of one file: what a run that was killed has to do again, and what processes share out


class TeacherLists:
    """A language model's most probable items after the histories of training interactions.

    Histories are shown as they are served: their last `max_history` items by the artefact's prompt, with events if it
    shows them. Items of the history are candidates too. What was computed is kept in files of some hundred histories,
    each whole or not there, in a folder whose name is a hash of all that decides them.

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
        key = hashlib.sha256(
            "\n".join([_FORMAT, identity, split.content_hash, teacher.catalog.content_hash, str(width)]).encode()
            + repr((teacher.settings.max_history, teacher.settings.softmax, teacher.prompt.source)).encode()
            + np.ascontiguousarray(places, dtype="<i8").tobytes()
        ).hexdigest()
        self.places, self.width = places, width
        self.shards = -(-len(places) // _SHARD)
        self._teacher, self._split, self._folder = teacher, split, Path(folder) / key[:32]
        self._events = LoggedEvents(split) if teacher.prompt.attributes & set(EVENT_COLUMNS) else None

    def search(self, first: int = 0, step: int = 1, progress: bool = False) -> None:
        """Makes the files `first`, `first + step`, … that are not there: its share of one process among `step`.

        Args:
            first: the process's number.
            step: how many processes there are.
            progress: whether a bar is shown.
        """
        mine = range(first, self.shards, step)
        total = sum(len(self._places_of(shard)) for shard in mine)
        with tqdm(total=total, desc="teacher's items", unit="history", disable=not progress) as bar:
            for shard in mine:
                self._made(shard)
                bar.update(len(self._places_of(shard)))

    def distributions(self, rest: Rest = "uniform") -> ItemDistributions:
        """All lists as distributions; what is not on this disk is searched first.

        Args:
            rest: see `ItemDistributions`.
        """
        found = [self._made(shard) for shard in range(self.shards)]
        nothing = np.zeros((0, self.width))
        rows = np.concatenate([one["rows"] for one in found]) if found else nothing
        scores = np.concatenate([one["scores"] for one in found]) if found else nothing
        live = ~self._teacher.catalog.retired
        return ItemDistributions(self.places, rows.astype(np.int64), scores.astype(np.float32), live, rest)

    def _places_of(self, shard: int) -> Numbers:
        return self.places[shard * _SHARD : (shard + 1) * _SHARD]

    def _made(self, shard: int) -> dict[str, npt.NDArray[np.generic]]:
        """What a file holds, searched if it is not there."""
        some, path = self._places_of(shard), self._folder / f"{shard:06d}.safetensors"
        found = _held(path, len(some), self.width)
        if found is None:
            begins, most = self._split.offsets[:-1][self._split.owner], self._teacher.settings.max_history
            spans = [(max(int(begins[place]), int(place) - most), int(place)) for place in some]
            found = _searched(self._teacher, self._split, spans, self.width, self._events)
            with atomic_path(path) as temporary:
                save_file(found, temporary)
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


def _held(path: Path, count: int, width: int) -> dict[str, npt.NDArray[np.generic]] | None:
    """A shard that lies there whole; None: it has to be made."""
    if not path.is_file():
        return None
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be read and is made again: %s", path, error)
        return None
    return found if {name: one.shape for name, one in found.items()} == _shapes(count, width) else None


def _shapes(count: int, width: int) -> dict[str, tuple[int, int]]:
    return {"rows": (count, width), "scores": (count, width)}
