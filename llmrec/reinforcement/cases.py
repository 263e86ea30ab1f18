"""RolloutCases: training interactions as questions, each with the prompt that serving would ask it by."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError, PromptError
from llmrec.prompt import EVENT_COLUMNS, Event
from llmrec.tasks.task import hashed
from llmrec.tasks.task_data import TaskData

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RolloutCases:
    """C questions: after this history, which item?

    Attributes:
        prompts: C lists of token ids, as the recommender asks when it serves this history. They are never text:
            items' text is untrusted, and read again it could turn into control tokens.
        histories: per case all that its user did before (catalog rows, oldest first); the prompt shows the last of
            it, and all of it counts as seen.
        targets: (C,) int64 catalog rows of what came next.
        later: per case the target and what followed it (catalog rows, oldest first), within training.
        users: (C,) int64 places in the split's `all_users`.
        times: (C,) unix seconds of the targets, NaN where one is unknown; None without a clock.
        places: (C,) int64 places of the targets in the split's `rows`; None if the cases are of no split.
    """

    prompts: list[list[int]] = field(repr=False)
    histories: list[Rows] = field(repr=False)
    targets: Rows = field(repr=False)
    later: list[Rows] = field(repr=False)
    users: Rows = field(repr=False)
    times: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    places: Rows | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def content_hash(self) -> str:
        """A hash of what is asked and what was taken: prompts, histories and targets."""
        digest = hashlib.sha256(np.asarray(self.targets, dtype="<i8").tobytes())
        for prompt, history in zip(self.prompts, self.histories, strict=True):
            asked = [len(prompt), *prompt, len(history), *history.tolist()]
            digest.update(np.asarray(asked, dtype="<i8").tobytes())
        return digest.hexdigest()[:32]

    def select(self, chosen: Sequence[int] | Rows) -> Self:
        """The cases at these places, in this order."""
        places = np.asarray(chosen, dtype=np.int64)
        return type(self)(
            [self.prompts[place] for place in places.tolist()],
            [self.histories[place] for place in places.tolist()],
            self.targets[places],
            [self.later[place] for place in places.tolist()],
            self.users[places],
            None if self.times is None else self.times[places],
            None if self.places is None else self.places[places],
        )

    @classmethod
    def of(
        cls,
        held: TaskData,
        per_user: int = 0,
        max_cases: int = 0,
        seed: int = 0,
        later_items: int = 1,
        *,
        min_history: int = 1,
        repeats: bool = True,
    ) -> Self:
        """Draws cases from the training interactions, of which nothing else is read: no validation, no test.

        Drawn without replacement, each user's first, then among all users. With one seed fewer cases of a user are
        among the more of them, and so are fewer of all. They come in the order of the log.

        Left out are interactions whose item is retired, because no search can return it, and such as the served
        prompt cannot ask: where it needs a preference and none was known then, or items and there were none.

        Args:
            held: split, catalog, tokenizer and prompt.
            per_user: the most cases of one user; 0 for all.
            max_cases: the most cases; 0 for all.
            seed: of the draw.
            later_items: how many items `later` holds, the target among them; at least 1.
            min_history: the fewest items of a history; with 0 a user's first item is asked for too.
            repeats: whether items are asked for that their history holds already. A search that excludes what was
                seen never finds them.

        Raises:
            DataError: if a number is out of range, or there is no such case.
            PromptError: if the prompt uses what the interactions do not have.
        """
        least = {"per_user": 0, "max_cases": 0, "later_items": 1, "min_history": 0}
        given = {"per_user": per_user, "max_cases": max_cases, "later_items": later_items, "min_history": min_history}
        for name, value in given.items():
            if value < least[name]:
                raise DataError(f"{name} is {value}. It counts from {least[name]}.")
        split = held.split
        needs_preference, needs_history = _needs(held)
        age = np.arange(len(split.rows)) - held.begins
        fits = split.in_training & (age >= max(min_history, int(needs_history))) & ~held.catalog.retired[split.rows]
        places = np.flatnonzero(fits)
        if needs_preference:
            places = places[[held.preference(place) is not None for place in places.tolist()]]
        if not repeats:
            begins = held.begins[places].tolist()
            new = [
                split.rows[place] not in split.rows[begin:place]
                for begin, place in zip(begins, places.tolist(), strict=True)
            ]
            places = places[new]
        places = _drawn(places, split.owner, per_user, max_cases, seed)
        if not len(places):
            raise DataError(
                f"No training interaction has {max(min_history, int(needs_history))} or more before it of which the "
                "prompt can ask. Give longer histories, or a prompt that needs less."
            )
        ends = np.minimum(places + later_items, split.train_ends[split.owner[places]])
        rows = split.rows.astype(np.int64)
        times = held.logged.times
        return cls(
            [_prompt(held, place) for place in places.tolist()],
            [rows[begin:end] for begin, end in zip(held.begins[places].tolist(), places.tolist(), strict=True)],
            rows[places],
            [rows[begin:end] for begin, end in zip(places.tolist(), ends.tolist(), strict=True)],
            split.owner[places].astype(np.int64),
            None if times is None else np.asarray(times, dtype=np.float64)[places],
            places,
        )


def _drawn(places: Rows, owner: Rows, per_user: int, max_cases: int, seed: int) -> Rows:
    """Some of the places, ascending: the best of a permutation, within each user and then of all."""
    order = np.random.default_rng(hashed(seed, "rollout cases")).permutation(len(places))
    drawn = places[order]
    if per_user:
        grouped = np.argsort(owner[drawn], kind="stable")
        users = owner[drawn][grouped]
        turn = np.empty(len(drawn), dtype=np.int64)
        turn[grouped] = np.arange(len(drawn)) - np.searchsorted(users, users, side="left")
        drawn = drawn[turn < per_user]
    return np.sort(drawn[: max_cases or None])


def _prompt(held: TaskData, place: int) -> list[int]:
    """Token ids of what serving asks after the history before a place of the log."""
    begin, end = held.history(place)
    events = held.events(begin, end) if held.prompt.attributes & set(EVENT_COLUMNS) else None
    said = held.preference(place) if "preference" in held.prompt.variables else None
    variables = {} if said is None else {"preference": said}
    rows = held.split.rows[begin:end].tolist()
    return held.prompt.encode(held.catalog, rows, held.text, held.start, events, **variables)


def _needs(held: TaskData) -> tuple[bool, bool]:
    """Whether the prompt cannot be rendered without a preference, and whether not without a history."""
    prompt = held.prompt
    if unknown := prompt.variables - {"history", "preference"}:
        raise PromptError(
            f"The served prompt uses {', '.join(sorted(unknown))}, which a training interaction does not have. Use a "
            "prompt of history and preference."
        )
    said = {"preference": "example"} if "preference" in prompt.variables else {}
    known = held.event_columns
    event = Event(
        "action" if "action" in known else None,
        "domain" if "domain" in known else None,
        0.0 if "gap" in known else None,
    )

    def renders(length: int, variables: Mapping[str, str]) -> bool:
        try:
            prompt.render(held.catalog, [0] * length, [event] * length, **variables)
        except PromptError:
            return False
        return True

    without_history = renders(0, said)
    if not without_history:
        prompt.render(held.catalog, [0], [event], **said)  # whose error says what is missing
    return bool(said) and not renders(1, {}), not without_history
