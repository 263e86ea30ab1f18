"""Ranker: a trained ranking model with its items, as it is saved and asked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from llmrec.artefact import resolve, write_manifest
from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.ctr.candidates import CandidateScorer
from llmrec.ctr.histories import Events
from llmrec.ctr.items import CandidateItems
from llmrec.ctr.model import CTRModel, action_of
from llmrec.ctr.rows import MISSING
from llmrec.exceptions import ArtefactError, RequestError
from llmrec.storage import atomic_folder, write_json

SETTINGS_FILE = "ctr.json"


@dataclass(frozen=True)
class Ranked:
    """One candidate's answer.

    Attributes:
        item_id: as it was asked.
        rank: 1 for the likeliest of the first label; equal ones in the order in which they were asked.
        probabilities: label -> probability.
        known: whether the model has a row for the item; else it was scored as an unknown one.
    """

    item_id: str
    rank: int
    probabilities: dict[str, float]
    known: bool


class Ranker:
    """A ranking model that is asked with ids."""

    def __init__(
        self, model: CTRModel, items: CandidateItems, settings: dict[str, Any] | None = None, microbatch: int = 256
    ) -> None:
        """
        Args:
            model: for as many items as there are.
            items: its rows.
            settings: how it was trained, JSON-ready.
            microbatch: candidates that are scored at once.

        Raises:
            ArtefactError: if the model is one of another number of items.
        """
        if model.config.num_items != len(items):
            raise ArtefactError(
                f"The model has {model.config.num_items} item rows, and there are {len(items)}. "
                "Use the items that it was trained with."
            )
        self.model, self.items, self.settings = model.eval(), items, dict(settings or {})
        self.scorer = CandidateScorer(model, microbatch)

    def rank(
        self,
        history: Sequence[str],
        candidates: Sequence[str],
        labels: Sequence[Sequence[int | None] | int | None] | None = None,
        timestamps: Sequence[int | None] | None = None,
        timestamp: int | None = None,
        user: str | None = None,
    ) -> list[Ranked]:
        """Candidates by falling probability of the first label.

        Args:
            history: item ids, oldest first; those that the model does not know are read as unknown items.
            candidates: item ids.
            labels: what came of each event: a label, or one for each of the model's labels; None: not known. Left out:
                a model that was trained on liked or given histories takes every item as liked, another as not known.
            timestamps: of each event, unix seconds.
            timestamp: of the request.
            user: a name under which what is read of the history is kept for the next request.

        Raises:
            RequestError: if lengths differ, or a label is none.
        """
        if timestamps is not None and len(timestamps) != len(history):
            raise RequestError(f"{len(timestamps)} times for {len(history)} events. Give one per event.")
        times = [UNKNOWN_TIME if time is None else int(time) for time in timestamps or [None] * len(history)]
        events = Events(self.items.rows(history), self._actions(labels, len(history)), np.array(times, dtype=np.int64))
        rows = self.items.rows(candidates)
        found = self.scorer.probabilities(events, rows.tolist(), timestamp, user)
        order = np.argsort(-found[:, 0], kind="stable").tolist()
        names = self.model.labels
        return [
            Ranked(
                candidates[place], rank, dict(zip(names, found[place].tolist(), strict=True)), bool(rows[place] > 0)
            )
            for rank, place in enumerate(order, start=1)
        ]

    def _actions(self, labels: Sequence[Any] | None, count: int) -> Any:
        import torch

        num_labels = len(self.model.labels)
        if labels is None:
            liked = self.settings.get("history") in ("liked", "given")
            labels = [[1 if liked else None] * num_labels] * count
        if len(labels) != count:
            raise RequestError(f"{len(labels)} labels for {count} events. Give one per event.")
        each = [list(one) if isinstance(one, list | tuple) else [one] for one in labels]
        known = [value for one in each for value in one]
        if any(len(one) != num_labels for one in each) or any(value not in (0, 1, None) for value in known):
            raise RequestError(
                f"The labels of events are 0, 1 or nothing, and {num_labels} of each: {', '.join(self.model.labels)}. "
                "Mend the history's labels."
            )
        table = [[MISSING if value is None else int(value) for value in one] for one in each]
        return action_of(torch.tensor(table, dtype=torch.int64).reshape(count, num_labels)).numpy()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the artefact: model, items, settings, and the list of its files with hashes."""
        with atomic_folder(folder) as temporary:
            self.model.save_pretrained(temporary)
            self.items.save(temporary)
            write_json(temporary / SETTINGS_FILE, {"version": 1, **self.settings})
            write_manifest(temporary)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, revision: str | None = None, device: str | None = None, microbatch: int = 256
    ) -> Self:
        """Loads an artefact that `save_pretrained` wrote, from a folder or the Hub.

        Raises:
            ArtefactError: if it is missing, torn, altered, or another kind of artefact.
        """
        path = resolve(str(folder), revision)
        try:
            settings = json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtefactError(
                f"{path} is no ranking model: its {SETTINGS_FILE} cannot be read ({error}). Train one with "
                "train/rank.py."
            ) from error
        model = CTRModel.from_pretrained(path)
        if device is not None:
            model.to(device)
        return cls(model, CandidateItems.load(path), settings, microbatch)
