"""Random logs with known flaws, for the tests of the guard."""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import leave_one_out
from llmrec.data.split import Split

START = 1_600_000_000 // 86_400 * 86_400
DAY = 86_400
Rows = list[tuple[str, str, float | None]]


def split_of(
    sequences: Sequence[Sequence[int]],
    times: Sequence[Sequence[float | None]] | None = None,
    held_out: int = 2,
    num_items: int | None = None,
) -> Split:
    """Leave-one-out of sequences of item rows; users of fewer than three interactions are all training."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    asked = lengths >= 3
    train_ends = offsets[1:] - held_out * asked
    rows = np.array([item for sequence in sequences for item in sequence], dtype=np.int32)
    flat = [time for user in times for time in user] if times is not None else None
    number = num_items if num_items is not None else int(rows.max(initial=0)) + 1
    return Split(
        all_users=[f"u{place}" for place in range(len(sequences))],
        item_ids=[f"i{place}" for place in range(number)],
        rows=rows,
        offsets=offsets,
        train_ends=train_ends,
        positions={"valid": offsets[1:][asked] - 2, "test": offsets[1:][asked] - 1},
        protocol={"split": "leave-one-out", "min_history": 3},
        timestamps=None if flat is None else np.array([np.nan if t is None else t for t in flat], dtype=np.float64),
    )


def shop(seed: int, users: int = 300, items: int = 120, days: bool = False) -> Rows:
    """A clean log: unequal tastes, no repeats, ids that say nothing; times are seconds, or whole days with ties."""
    generator = np.random.default_rng(seed)
    names = np.array([f"p{number:04d}" for number in generator.permutation(items)])
    weights = 1 / np.arange(1, items + 1) ** 0.7
    weights /= weights.sum()
    found: Rows = []
    for user in range(users):
        length = int(generator.integers(6, 16))
        taken = names[generator.choice(items, size=length, replace=False, p=weights)]
        begin = START + int(generator.integers(0, 300)) * DAY
        if days:
            times = begin + np.cumsum(generator.random(length) < 0.5) * DAY
        else:
            times = begin + np.cumsum(generator.integers(60, 5 * DAY, length))
        found += [(f"u{user:04d}", str(item), int(time)) for item, time in zip(taken, times, strict=True)]
    return found


def by_user(rows: Rows) -> dict[str, Rows]:
    grouped: dict[str, Rows] = {}
    for row in rows:
        grouped.setdefault(row[0], []).append(row)
    return grouped


def inside_days(rows: Rows, key: Callable[[str], object]) -> Rows:
    """The log with every user's items of one day ordered by a key; times stay where they are."""
    found: Rows = []
    for own in by_user(rows).values():
        days = [time // DAY for _, _, time in own]  # type: ignore[operator]
        for day in sorted(set(days)):
            here = [row for row, when in zip(own, days, strict=True) if when == day]
            items = sorted((item for _, item, _ in here), key=key)  # type: ignore[arg-type, type-var]
            found += [(user, item, time) for (user, _, time), item in zip(here, items, strict=True)]
    return found


def logged(rows: Rows, timed: bool = True) -> tuple[Interactions, Items, Split]:
    """Interactions, a table of items with titles, and leave-one-out."""
    columns = {"user_id": [row[0] for row in rows], "item_id": [row[1] for row in rows]}
    frame = pl.DataFrame(columns)
    if timed:
        frame = frame.with_columns(pl.Series("timestamp", [row[2] for row in rows]))
    interactions = Interactions.from_frame(frame)
    ids = sorted({row[1] for row in rows})
    items = Items.from_frame(pl.DataFrame({"item_id": ids, "title": [f"Thing called {item}" for item in ids]}))
    return interactions, items, leave_one_out(interactions, items)


def random_split(seed: int, users: int = 40, items: int = 7) -> Split:
    generator = np.random.default_rng(seed)
    sequences, times = [], []
    for _ in range(users):
        length = int(generator.integers(1, 9))
        sequences.append(generator.integers(0, items, length).tolist())
        own = np.sort(generator.integers(0, 60, length)) * 10_000.0 + START
        times.append([None if generator.random() < 0.1 else float(t) for t in own])
    return split_of(sequences, times, num_items=items + 2)
