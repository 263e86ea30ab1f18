"""ItemDistributions: what a language model holds probable after every training history, item by item, kept on disk.

A constrained search finds the W most probable items of a history with their log-probabilities. The probability that
these do not have, of items that the search did not reach and of what spells no item, is spread by a stated rule:
"uniform" gives it in equal parts to all other items that may be recommended; "none" drops it, and the found ones are
scaled up to 1. At a temperature T every probability is taken to the power 1 / T, and all are scaled to 1 again.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from llmrec.exceptions import DataError
from llmrec.prompt import EVENT_COLUMNS
from llmrec.storage import atomic_path
from llmrec.tasks.events import LoggedEvents

if TYPE_CHECKING:
    from llmrec.data.split import Split
    from llmrec.recommender import Recommender

logger = logging.getLogger(__name__)

Rest = Literal["uniform", "none"]
Numbers = npt.NDArray[np.int64]

_FORMAT = "llmrec item distributions 1"
_SHARD = 1024  # histories of one file: what a run that was killed has to do again


class ItemDistributions:
    """The distributions of C training interactions, each a target with the history before it.

    Attributes:
        places: (C,) the interactions, ascending places of `Split.rows`.
        rows: (C, W) int64 item rows, the most probable first; -1 behind the end of a shorter list.
        scores: (C, W) float32 log-probabilities; -inf there.
        live: (N,) which items may be recommended.
        rest: how what is left is spread.
    """

    def __init__(
        self,
        places: Numbers,
        rows: Numbers,
        scores: npt.NDArray[np.float32],
        live: npt.NDArray[np.bool_],
        rest: Rest = "uniform",
    ) -> None:
        """Raises DataError if arrays do not fit, places are not ascending, or there is no such rule."""
        if rest not in ("uniform", "none"):
            raise DataError(f"The rest of a distribution is spread by {rest!r}. Choose 'uniform' or 'none'.")
        if rows.shape != scores.shape or len(rows) != len(places) or (np.diff(places) <= 0).any():
            raise DataError(
                f"{len(places)} places, rows {rows.shape} and scores {scores.shape} are no distributions. Give one "
                "list per place, places ascending and each once."
            )
        self.places, self.rows, self.scores, self.live, self.rest = places, rows, scores, live, rest

    def __len__(self) -> int:
        return len(self.places)

    def at(self, asked: Tensor) -> tuple["TableTeaching", Tensor]:
        """The distributions of the interactions `asked` (M,), and which (M,) of them there are."""
        wanted = asked.cpu().numpy()
        found = np.searchsorted(self.places, wanted)
        there = found < len(self.places)
        there[there] = self.places[found[there]] == wanted[there]
        chosen = found[there]
        return TableTeaching(self, chosen, asked.device), torch.from_numpy(there).to(asked.device)


class TableTeaching:
    """The distributions of some places as a `Teaching`."""

    def __init__(self, table: ItemDistributions, chosen: Numbers, device: torch.device) -> None:
        self._rest = table.rest
        self._rows = torch.from_numpy(table.rows[chosen]).to(device)
        self._scores = torch.from_numpy(table.scores[chosen]).to(device)
        self._live = torch.from_numpy(table.live).to(device)

    def log_probabilities(self, begin: int, end: int, temperature: float, dtype: torch.dtype) -> Tensor:
        """See `Teaching.log_probabilities`; over all N items."""
        rows, scores = self._rows[begin:end], self._scores[begin:end].double() / temperature
        named = rows >= 0
        scores = scores.masked_fill(~named, -torch.inf)
        share = torch.full((len(rows), 1), -torch.inf, dtype=torch.float64, device=rows.device)  # of each other item
        others = (self._live.sum() - named.sum(dim=1, keepdim=True)).double()
        if self._rest == "uniform":
            left = (1 - (scores * temperature).exp().sum(dim=1, keepdim=True)).clamp(min=0.0)
            share = (left / others.clamp(min=1)).log() / temperature
        # W + 1 numbers say what all N sum up to.
        total = torch.cat([scores, share + others.clamp(min=0).log()], dim=1).logsumexp(dim=1, keepdim=True)
        # What stands behind the end of a shorter list goes to a column behind the items.
        found = torch.empty((len(rows), len(self._live) + 1), dtype=dtype, device=rows.device)
        found[:] = (share - total).to(dtype)
        found[:, :-1].masked_fill_(~self._live, -torch.inf)
        found.scatter_(1, rows.where(named, len(self._live)), (scores - total).to(dtype))
        return found[:, :-1]


def training_places(split: "Split", most: int = 0, seed: int = 0) -> Numbers:
    """The training interactions that have one before them, ascending; with `most` so many, drawn with the seed."""
    begins = split.offsets[:-1][split.owner]
    places = np.flatnonzero(split.in_training & (np.arange(len(split.rows)) > begins))
    if most and most < len(places):
        places = np.sort(np.random.default_rng(seed).permutation(places)[:most])
    return places.astype(np.int64)


def teacher_distributions(
    teacher: "Recommender",
    split: "Split",
    places: Numbers,
    width: int,
    folder: str | Path,
    identity: str,
    rest: Rest = "uniform",
    progress: bool = False,
) -> ItemDistributions:
    """A language model's distributions over items after the histories of training interactions.

    Histories are shown as they are served: their last `max_history` items by the artefact's prompt, with events if it
    shows them. Items of the history are candidates too. What was computed is kept in files of some hundred histories,
    each whole or not there; the same call goes on where another stopped.

    Args:
        teacher: of the split's own items.
        split: of the interactions.
        places: of `training_places`.
        width: W, of items and of beams.
        folder: holds a folder per content.
        identity: of the teacher's weights, such as their hash.
        rest: see `ItemDistributions`.
        progress: whether a bar is shown.

    Raises:
        DataError: if the teacher's items are not the split's, its prompt shows more than a history and its events, or
            W is below 1.
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
            f"The teacher's prompt shows {', '.join(needed)} beside the history, which training histories do not have "
            "here. Distil from a model whose prompt shows the history alone."
        )
    key = hashlib.sha256(
        "\n".join([_FORMAT, identity, split.content_hash, teacher.catalog.content_hash, str(width)]).encode()
        + repr((teacher.settings.max_history, teacher.settings.softmax, teacher.prompt.source)).encode()
        + np.ascontiguousarray(places, dtype="<i8").tobytes()
    ).hexdigest()
    shards = Path(folder) / key[:32]
    events = LoggedEvents(split) if teacher.prompt.attributes & set(EVENT_COLUMNS) else None
    begins = split.offsets[:-1][split.owner]
    rows, scores = [], []
    from tqdm.auto import tqdm

    with tqdm(total=len(places), desc="teacher's items", unit="history", disable=not progress) as bar:
        for first in range(0, len(places), _SHARD):
            some = places[first : first + _SHARD]
            path = shards / f"{first // _SHARD:06d}.safetensors"
            found = _held(path, len(some), width)
            if found is None:
                spans = [(max(int(begins[p]), int(p) - teacher.settings.max_history), int(p)) for p in some]
                found = _searched(teacher, split, spans, width, events)
                with atomic_path(path) as temporary:
                    save_file(found, temporary)
            rows.append(found["rows"].astype(np.int64))
            scores.append(found["scores"])
            bar.update(len(some))
    nothing = np.zeros((0, width))
    return ItemDistributions(
        places,
        np.concatenate(rows) if rows else nothing.astype(np.int64),
        np.concatenate(scores) if scores else nothing.astype(np.float32),
        ~teacher.catalog.retired,
        rest,
    )


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
