"""A shop whose items are of kinds: codes, texts, vectors and a log that follow them, and ways to spoil each."""

import numpy as np

from llmrec.data.split import Split
from llmrec.diagnostics.identifiers import SemanticIDs

KINDS, SORTS, PIECES = 24, 5, 5
ITEMS = KINDS * SORTS * PIECES
SIZES = (KINDS, SORTS, PIECES)


def codes() -> np.ndarray:
    """(600, 3): kind, sort, piece; no two alike, every code equally common."""
    return np.stack(np.unravel_index(np.arange(ITEMS), SIZES), axis=1).astype(np.int32)


def ids_of(table: np.ndarray, sizes: tuple[int, ...] | None = None, **facts: object) -> SemanticIDs:
    names = [f"i{row}" for row in range(len(table))]
    sizes = tuple(int(size) for size in table.max(axis=0) + 1) if sizes is None else sizes
    return SemanticIDs(names, table, sizes, [f"Title {name}" for name in names], **facts)


def texts(seed: int = 0) -> np.ndarray:
    """(600, 16) near the centre of each item's kind."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(KINDS, 16))
    return centres[codes()[:, 0]] + 0.3 * generator.normal(size=(ITEMS, 16))


def log(kinds: np.ndarray, seed: int = 0, users: int = 400, length: int = 8) -> Split:
    """Users who each take items of one kind, with the last item as test and the one before as validation."""
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
    rows = [generator.choice(members[user % len(members)], length, replace=False) for user in range(users)]
    offsets = np.arange(users + 1) * length
    return Split(
        all_users=[f"u{user}" for user in range(users)],
        item_ids=[f"i{row}" for row in range(len(kinds))],
        rows=np.concatenate(rows).astype(np.int32),
        offsets=offsets,
        train_ends=offsets[1:] - 2,
        positions={"valid": offsets[1:] - 2, "test": offsets[1:] - 1},
        protocol={"split": "leave-one-out"},
    )


class Points:
    """A quantizer whose points are given, as sums over the levels."""

    def __init__(self, *tables: np.ndarray) -> None:
        self.tables = tables

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(len(table) for table in self.tables)

    def level_points(self, level: int) -> np.ndarray:
        return self.tables[level]

    def decode(self, chosen: np.ndarray) -> np.ndarray:
        return sum(table[level] for table, level in zip(self.tables, chosen.T, strict=True))


def kind_points() -> Points:
    """The kinds' mean texts for the first code, nothing for the others."""
    vectors, kind = texts(), codes()[:, 0]
    means = np.stack([vectors[kind == one].mean(axis=0) for one in range(KINDS)])
    return Points(means, np.zeros((SORTS, 16)), np.zeros((PIECES, 16)))
