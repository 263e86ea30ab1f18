"""OccupiedCodes: which codes of a product of codebooks are given, as ascending numbers."""

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import TokenizerError
from llmrec.quantization.codebooks import check_codes

# Codes become numbers of 64 bits if there are fewer than this, else Python's integers, which do the same more slowly.
MOST_KEYS = 2**62

Rows = npt.NDArray[np.int64]


class OccupiedCodes:
    """The codes that are given, as ascending numbers of mixed radix: codes that begin alike lie together."""

    def __init__(self, codes: npt.NDArray[np.integer], sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.kind: type = np.int64 if prod(sizes) < MOST_KEYS else object
        self.keys = np.sort(self.pack(check_codes(codes, sizes)))
        if repeated := int((self.keys[1:] == self.keys[:-1]).sum()):
            raise TokenizerError(
                f"{repeated} of the {len(self.keys)} taken codes are given twice. "
                "Give each code once, those of retired items too."
            )

    def pack(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[Any]:
        """(n, l) first codes -> (n,) numbers."""
        keys: npt.NDArray[Any] = np.zeros(len(codes), dtype=self.kind)
        for size, level in zip(self.sizes, codes.T, strict=False):
            keys = keys * size + level
        return keys

    def add(self, codes: npt.NDArray[np.integer]) -> None:
        self.keys = np.sort(np.concatenate([self.keys, self.pack(codes)]), kind="stable")

    def spans(self, prefixes: npt.NDArray[Any]) -> tuple[Rows, Rows]:
        """(g,) numbers of L' - 1 codes -> where the keys of each begin and end."""
        size = self.sizes[-1]
        return np.searchsorted(self.keys, prefixes * size), np.searchsorted(self.keys, (prefixes + 1) * size)

    def free(self, prefixes: npt.NDArray[Any]) -> Iterator[Rows]:
        """The free last codes of each prefix, ascending."""
        for prefix, begin, end in zip(prefixes, *self.spans(prefixes), strict=True):
            free = np.ones(self.sizes[-1], dtype=bool)
            free[(self.keys[begin:end] - prefix * self.sizes[-1]).astype(np.int64)] = False
            yield np.flatnonzero(free)

    def full(self, depth: int) -> npt.NDArray[Any]:
        """The numbers of all beginnings of `depth` codes below which no code is free, ascending."""
        below = prod(self.sizes[depth:])
        if below > len(self.keys):
            return self.keys[:0]
        beginnings = self.keys // below
        # Keys do not repeat: a beginning is full if it is the same `below` keys in a row.
        first = beginnings[: len(beginnings) - below + 1]
        return np.asarray(first[first == beginnings[below - 1 :]])
