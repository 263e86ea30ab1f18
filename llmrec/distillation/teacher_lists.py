"""TeacherLists: a language model's most probable items after training histories, as they are kept on disk."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmrec.distillation.item_distributions import ItemDistributions, Numbers, Rest
from llmrec.exceptions import DataError
from llmrec.prompt import EVENT_COLUMNS
from llmrec.tasks.events import LoggedEvents
from llmrec.training.kept_shards import SHARD, Arrays, KeptShards

if TYPE_CHECKING:
    from llmrec.data.split import Split
    from llmrec.recommender import Recommender

_FORMAT = "llmrec item distributions 2"


class TeacherLists:
    """A language model's most probable items after the histories of training interactions.

    Histories are shown as they are served: their last `max_history` items by the artefact's prompt, with events if it
    shows them. Items of the history are candidates too. The files lie in a folder whose name is a hash of what decides
    them: the teacher, its number type, the split, the places, and what its prompt shows of items and events. Devices
    round differently and are not in it.

    Attributes:
        places: (C,) the interactions.
        width: W, of items and of beams.
        kept: the files.
    """

    def __init__(
        self,
        teacher: "Recommender",
        split: "Split",
        places: Numbers,
        width: int,
        folder: str | Path,
        identity: str,
        size: int = SHARD,
    ) -> None:
        """
        Args:
            teacher: of the split's own items.
            split: of the interactions.
            places: of `training_places`.
            width: W.
            folder: holds a folder per content.
            identity: of the teacher's weights, such as their hash.
            size: histories of a file.

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
        self._teacher, self._split = teacher, split
        self._events = LoggedEvents(split) if teacher.prompt.attributes & set(EVENT_COLUMNS) else None
        columns = {"rows": width, "scores": width}
        kept = Path(folder) / self._key(identity)
        self.kept = KeptShards(kept, len(places), self._search, columns, "teacher's items", size)

    def distributions(self, rest: Rest = "uniform") -> ItemDistributions:
        """All lists as distributions; what is not on this disk is searched first.

        Args:
            rest: see `ItemDistributions`.
        """
        found, live = self.kept.load(), ~self._teacher.catalog.retired
        rows, scores = found["rows"].astype(np.int64), found["scores"].astype(np.float32)
        return ItemDistributions(self.places, rows, scores, live, rest)

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

    def _search(self, begin: int, end: int) -> Arrays:
        some, split = self.places[begin:end], self._split
        begins, most = split.offsets[split.owner[some]], self._teacher.settings.max_history
        spans = [
            (max(begin, place - most), place) for begin, place in zip(begins.tolist(), some.tolist(), strict=True)
        ]
        return _searched(self._teacher, split, spans, self.width, self._events)


def _searched(
    teacher: "Recommender",
    split: "Split",
    spans: Sequence[tuple[int, int]],
    width: int,
    events: LoggedEvents | None,
) -> Arrays:
    histories = [split.rows[begin:end].tolist() for begin, end in spans]
    told = None if events is None else [events.between(begin, end) for begin, end in spans]
    lists, scores = teacher.recommend_rows(histories, width, exclude_seen=False, num_beams=width, events=told)
    rows = np.full((len(spans), width), -1, dtype=np.int32)
    values = np.full((len(spans), width), -np.inf, dtype=np.float32)
    for place, (items, logs) in enumerate(zip(lists, scores, strict=True)):
        rows[place, : len(items)], values[place, : len(logs)] = items, logs
    return {"rows": rows, "scores": values}
