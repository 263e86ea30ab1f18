"""HistoryEncoder: requests to a sequence model's prompt, a list of whole numbers, and back to a `History`.

A prompt is what is asked for (when, under which action, of which domain) and then, per event, item row, time, action
and domain. So a sequence model has the same kind of prompt as a language model, and is searched by the same service.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from llmrec.artefact_parts import RequestEncoder, Settings
from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.catalog import Catalog
from llmrec.exceptions import RequestError
from llmrec.prompt import Event
from llmrec.sequence.events import EventConfig
from llmrec.sequence.histories import History

ASKED, PER_EVENT = 3, 4  # whole numbers of what is asked for, and of each event
_LATEST = 2**53  # seconds; differences of such times are far from int64's ends
_TARGET = "target"


class HistoryEncoder(RequestEncoder):
    """Requests to prompts of a sequence model.

    Beside the history there is one variable, `target`: what is known of the event that is asked for, as an `Event` or
    a mapping with some of its attributes. Its action must be one that the model knows. What is not said of it is as
    the model's configuration has it: the target action, the last item's domain, and the last item's time.
    """

    def __init__(self, catalog: Catalog, settings: Settings, events: EventConfig) -> None:
        """
        Args:
            catalog: of the requests.
            settings: of which `max_history` counts.
            events: what the model is told of events; unknown names of a history's actions and domains are 0.
        """
        self.catalog, self.settings, self.templates = catalog, settings, {}
        self._events = events

    def encode(
        self,
        rows: Sequence[int],
        events: Sequence[Event | Mapping[str, Any]] | None = None,
        prompt: None = None,
        **variables: Any,
    ) -> list[int]:
        """The prompt for the last `max_history` of `rows`, oldest first.

        Args:
            rows: catalog rows.
            events: one per row.
            prompt: there is but one.
            variables: `target`, or nothing.

        Raises:
            RequestError: if there are not as many events as rows, the target's action or domain is unknown, a
                timestamp is beyond 2^53, or there are other variables.
            PromptError: if an event cannot be read.
        """
        self.prompt_with(variables)
        if events is not None and len(events) != len(rows):
            raise RequestError(f"{len(rows)} items came with {len(events)} events. Give one event per item.")
        recent = list(rows)[-self.settings.max_history :]
        told = [Event()] * len(recent) if events is None else [Event.of(one) for one in events[-len(recent) :]]
        if not recent:
            told = []
        numbers: list[int] = []
        for row, event in zip(recent, told, strict=True):
            action, domain = self._events.action(event.action), self._events.domain(event.domain)
            numbers += [row, _seconds(event.timestamp), action, domain]
        return [*self._asked(variables.get(_TARGET), numbers), *numbers]

    def prompt_with(self, variables: Collection[str]) -> None:
        """Raises RequestError for variables but `target`: a sequence model reads no words."""
        if strange := sorted(set(variables) - {_TARGET}):
            raise RequestError(
                f"A sequence model reads items and their events, and has no place for {', '.join(strange)}. Leave it "
                "out."
            )

    def example(self) -> list[int]:
        """A prompt of two items of which nothing more is known."""
        return self.encode([0, len(self.catalog) // 2])

    def encode_query(self, query: str) -> list[int]:
        """Raises RequestError."""
        raise RequestError("A sequence model reads items, and cannot search for words. Search with a language model.")

    def encode_text(self, text: str) -> list[int]:
        """Raises RequestError."""
        raise RequestError("A sequence model reads items, and no text. Send a history of item ids.")

    def _asked(self, target: Event | Mapping[str, Any] | None, numbers: Sequence[int]) -> list[int]:
        """Time, action and domain of what is asked for, all of them known: no other request's change them."""
        event = Event() if target is None else Event.of(target)
        for what, name, names in (
            ("action", event.action, self._events.actions),
            ("domain", event.domain, self._events.domains),
        ):
            if name and name not in names:
                raise RequestError(
                    f"The target's {what} is {name[:80]!r}, and the model knows {', '.join(names[:20]) or 'none'}. "
                    "Name one of these, or none."
                )
        last_time, _, last_domain = numbers[-PER_EVENT + 1 :] if numbers else (UNKNOWN_TIME, 0, 0)
        moment = _seconds(event.timestamp)
        return [
            last_time if moment == UNKNOWN_TIME else moment,
            self._events.action(event.action or self._events.target_action),
            self._events.domain(event.domain) if event.domain else last_domain,
        ]


def history_of(prompt: Sequence[int], num_items: int) -> History:
    """The history that a prompt of `HistoryEncoder` says.

    Raises:
        RequestError: if it is no such prompt, or names a row outside a catalog of `num_items`.
    """
    numbers = np.array(prompt, dtype=np.int64)
    if len(numbers) < ASKED or (len(numbers) - ASKED) % PER_EVENT:
        raise RequestError(
            f"A prompt has {len(numbers)} numbers, and a sequence model's has {ASKED}, and {PER_EVENT} for each "
            "event. Make it with HistoryEncoder."
        )
    rows, times, actions, domains = np.ascontiguousarray(numbers[ASKED:].reshape(-1, PER_EVENT).T)
    if len(rows) and not 0 <= rows.min() <= rows.max() < num_items:
        raise RequestError(
            f"A prompt names rows from {rows.min()} to {rows.max()}, and the catalog has {num_items}. "
            "Make it with this catalog's encoder."
        )
    moment, action, domain = numbers[:ASKED].tolist()
    return History(rows, times, actions, domains, moment, action, domain)


def _seconds(timestamp: float | None) -> int:
    """Whole seconds of a moment, rounded down; `UNKNOWN_TIME` for None and NaN."""
    if timestamp is None or math.isnan(timestamp):
        return UNKNOWN_TIME
    if not abs(timestamp) < _LATEST:
        raise RequestError(f"A timestamp is {timestamp}, which is no moment. Give unix seconds.")
    return math.floor(timestamp)
