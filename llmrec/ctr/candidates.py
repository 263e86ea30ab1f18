"""M-FALCON: many candidates behind one history, of which each layer's keys and values are made once.

HSTU (arXiv 2402.17152), section 3.4: b_m candidates at a time are appended to the history, none of which sees another,
so m of them cost O(n² d + m n d) instead of O(m n² d); the history's keys and values are kept for the next
micro-batch, and between requests. Scores are those of one forward pass for each candidate alone.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.ctr.dataset import case_tensors
from llmrec.ctr.histories import Events
from llmrec.ctr.model import CTRModel
from llmrec.exceptions import RequestError

Scores = npt.NDArray[np.float64]


class _Read(NamedTuple):
    """A history that was read, and what the encoder keeps of it."""

    events: Events
    cache: Any


class CandidateScorer:
    """Scores candidates for users, and keeps what it read of their histories.

    Histories of users with a `key` stay, the least recently used go first. A history that begins with what is there
    costs its new events alone; one that lost its oldest events, because it is longer than `max_history`, or was
    changed, is read anew. For one thread at a time, and for a model whose weights stay.

    Attributes:
        reused: events that were found in the cache, since the scorer was made.
        read: events that were not.
    """

    def __init__(self, model: CTRModel, microbatch: int = 256, max_cached_events: int = 100_000) -> None:
        """
        Args:
            model: in evaluation mode from here on.
            microbatch: candidates that are scored at once.
            max_cached_events: events of all users' histories that are kept; 0 keeps none.

        Raises:
            RequestError: if a number makes no sense.
        """
        if microbatch < 1 or max_cached_events < 0:
            raise RequestError(
                f"{microbatch} candidates at once and {max_cached_events} events kept make no sense. Give at least 1 "
                "and at least 0."
            )
        self.model = model.eval()
        self.microbatch, self.max_cached_events = microbatch, max_cached_events
        self.incremental = model.encoder.causal and all(hasattr(model.encoder, name) for name in ("prefill", "extend"))
        self.reused = self.read = 0
        self._users: OrderedDict[str, _Read] = OrderedDict()
        self._held = 0

    @torch.inference_mode()
    def logits(
        self, history: Events, candidates: Sequence[int], timestamp: int | None = None, key: str | None = None
    ) -> Scores:
        """The logits (m, K) of candidates, each as if it stood alone behind the history.

        Args:
            history: of model rows; its most recent `max_history` events count.
            candidates: (m,) model rows; may hold one twice.
            timestamp: of the request; None: unknown.
            key: whose history it is, to keep what was read of it; None keeps nothing.

        Raises:
            RequestError: if a row, an action or the history's shape is none of the model's.
        """
        self._check(history, candidates)
        history = history.last(self.model.config.max_history)
        time = UNKNOWN_TIME if timestamp is None else int(timestamp)
        chunks = [candidates[begin : begin + self.microbatch] for begin in range(0, len(candidates), self.microbatch)]
        if not chunks:
            return np.zeros((0, len(self.model.labels)))
        if not self.incremental or not history:
            found = [self._one_by_one(history, chunk, time) for chunk in chunks]
        else:
            cache = self._cache(history, key)
            found = [self._isolated(cache, chunk, time) for chunk in chunks]
        logits: Scores = torch.cat(found).double().cpu().numpy()
        return logits

    def probabilities(
        self, history: Events, candidates: Sequence[int], timestamp: int | None = None, key: str | None = None
    ) -> Scores:
        """The probabilities (m, K) of label 1; arguments as of `logits`."""
        logits = self.logits(history, candidates, timestamp, key)
        probabilities: Scores = np.exp(-np.logaddexp(0, -logits))
        return probabilities

    def forget(self, key: str | None = None) -> None:
        """Drops what is kept of a user, or of all."""
        for user in list(self._users) if key is None else [key] * (key in self._users):
            self._held -= len(self._users.pop(user).events.items)

    def _one_by_one(self, history: Events, candidates: Sequence[int], time: int) -> Tensor:
        """The definition: a sequence for each candidate."""
        count = len(candidates)
        tensors = case_tensors([history] * count, candidates, [time] * count, self.model.config.asked)
        logits: Tensor = self.model(**{name: tensor.to(self.model.device) for name, tensor in tensors.items()})
        return logits

    def _isolated(self, cache: Any, candidates: Sequence[int], time: int) -> Tensor:
        """All candidates of a micro-batch behind what was read."""
        model = self.model
        rows = torch.tensor([list(candidates)], device=model.device)  # (1, m)
        represented = model.representation(rows)
        actions = torch.full_like(rows, model.config.asked)
        tokens = model.tokens(represented, torch.ones_like(rows, dtype=torch.bool), None, actions)
        inputs = tokens.representations[:, :: 2 if model.config.layout == "interleaved" else 1]
        states, _ = model.encoder.extend(cache, inputs, torch.full_like(rows, time), isolated=True)
        logits: Tensor = model.scorer(states[0], represented[0])
        return logits

    def _cache(self, history: Events, key: str | None) -> Any:
        """What the encoder keeps of a history, read as far as it is not there yet."""
        known = None if key is None else self._users.pop(key, None)
        if known is not None:
            self._held -= len(known.events.items)
            if not _begins_with(history, known.events):
                known = None
        begin = 0 if known is None else len(known.events.items)
        self.reused += begin
        self.read += len(history.items) - begin
        cache = None if known is None else known.cache
        if begin < len(history.items):
            tokens = self._tokens(Events(*(column[begin:] for column in history)))
            if cache is None:
                _, cache = self.model.encoder.prefill(tokens.representations, None, tokens.timestamps)
            else:
                _, cache = self.model.encoder.extend(cache, tokens.representations, tokens.timestamps)
        if key is not None and len(history.items) <= self.max_cached_events:
            self._users[key] = _Read(Events(*(column.copy() for column in history)), cache)
            self._held += len(history.items)
            while self._held > self.max_cached_events:
                self._held -= len(self._users.popitem(last=False)[1].events.items)
        return cache

    def _tokens(self, events: Events) -> Any:
        items, actions, times = (torch.from_numpy(column)[None].to(self.model.device) for column in events)
        mask = torch.ones_like(items, dtype=torch.bool)
        return self.model.tokens(self.model.representation(items), mask, times, actions)

    def _check(self, history: Events, candidates: Sequence[int]) -> None:
        config, shapes = self.model.config, {column.shape for column in history}
        if len(shapes) != 1 or history.items.ndim != 1:
            raise RequestError(f"The history's columns have the shapes {sorted(shapes)}. Give one of each per event.")
        for name, values, limit in (
            ("history's items", history.items, config.num_items),
            ("candidates", np.asarray(candidates, dtype=np.int64), config.num_items),
            ("history's actions", history.actions, config.num_actions),
        ):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < limit:
                raise RequestError(
                    f"The {name} are {int(values.min())}..{int(values.max())}, and the model knows 0..{limit - 1}. "
                    "Give rows of its items, and actions of its labels."
                )


def _begins_with(history: Events, beginning: Events) -> bool:
    count = len(beginning.items)
    return all(np.array_equal(new[:count], old) for new, old in zip(history, beginning, strict=True))
