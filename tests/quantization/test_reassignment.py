"""Reassignment among few candidates against the assignment among all last codes."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from llmrec.quantization import reassignment as module
from llmrec.quantization.reassignment import last_level_costs, reassign
from llmrec.quantization.residual_kmeans import ResidualKMeans


class Bent:
    """A quantizer whose decoder is no sum: the last code's point depends on the prefix."""

    def __init__(self, generator: np.random.Generator, sizes: tuple[int, ...], width: int) -> None:
        self.codebook_sizes = sizes
        self._tables = [generator.normal(size=(size, width)) for size in sizes]
        self.decoded = 0

    def decode(self, codes: np.ndarray) -> np.ndarray:
        self.decoded += len(codes)
        total = sum(table[codes[:, level]] for level, table in enumerate(self._tables))
        return (2 * np.tanh(total) + 0.1 * total).astype(np.float32)


def additive(generator: np.random.Generator, sizes: tuple[int, ...], width: int) -> ResidualKMeans:
    quantizer = ResidualKMeans(len(sizes), max(sizes))
    quantizer.codebooks = tuple(generator.normal(size=(size, width)).astype(np.float32) for size in sizes)
    return quantizer


def all_costs(vectors: np.ndarray, codes: np.ndarray, quantizer) -> np.ndarray:
    costs = np.empty((len(vectors), quantizer.codebook_sizes[-1]))
    for row, code in enumerate(codes):
        candidates = np.repeat(code[None], costs.shape[1], axis=0)
        candidates[:, -1] = np.arange(costs.shape[1])
        costs[row] = ((vectors[row] - quantizer.decode(candidates).astype(np.float64)) ** 2).sum(axis=1)
    return costs


@pytest.mark.parametrize("make", [additive, Bent])
@pytest.mark.parametrize("sizes", [(5,), (3, 7), (2, 3, 12)])
def test_costs_are_those_of_the_decoded_points(monkeypatch: pytest.MonkeyPatch, make, sizes: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    quantizer = make(generator, sizes, 6)
    codes = generator.integers(0, sizes, size=(40, len(sizes)))
    vectors = generator.normal(size=(40, 6))
    for entries in (1, 200, 4_000_000):
        monkeypatch.setattr(module, "ENTRIES", entries)
        np.testing.assert_allclose(
            last_level_costs(vectors, codes, quantizer), all_costs(vectors, codes, quantizer), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("make", [additive, Bent])
@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_among_all_codes(monkeypatch: pytest.MonkeyPatch, make, seed: int) -> None:
    generator = np.random.default_rng(seed)
    quantizer = make(generator, (6, 30), 3)
    # Items crowd around few points, so that many want the same codes: groups of 2 to 30 items.
    prefixes = np.repeat(np.arange(6), [2, 3, 5, 9, 17, 30])
    codes = np.column_stack([prefixes, generator.integers(0, 2, len(prefixes))]).astype(np.int32)
    vectors = quantizer.decode(codes) + generator.normal(scale=0.3, size=(len(codes), 3))
    if seed % 2:  # exact ties, and duplicates
        vectors = vectors.round(1)
        vectors[1::2] = vectors[::2][: len(vectors[1::2])]
    shuffled = generator.permutation(len(codes))
    codes, vectors, prefixes = codes[shuffled], vectors[shuffled].astype(np.float32), prefixes[shuffled]
    monkeypatch.setattr(module, "ENTRIES", 4_000_000 if seed % 3 else 40 * 30)
    groups = [np.flatnonzero(prefixes == prefix) for prefix in range(1, 6)]
    resolved = reassign(codes, vectors, quantizer, groups)
    np.testing.assert_array_equal(resolved[:, 0], codes[:, 0])
    np.testing.assert_array_equal(resolved[prefixes == 0], codes[prefixes == 0])  # not asked for
    costs = all_costs(vectors.astype(np.float64), codes, quantizer)
    for rows in groups:
        assert len(np.unique(resolved[rows, 1])) == len(rows)
        items, chosen = linear_sum_assignment(costs[rows])
        assert costs[rows, resolved[rows, 1]].sum() == pytest.approx(costs[rows][items, chosen].sum(), rel=1e-12)


def test_sums_need_few_points_to_be_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    quantizer = additive(generator, (50, 200), 8)
    codes = np.column_stack([np.repeat(np.arange(50), 2), np.zeros(100, dtype=int)]).astype(np.int32)
    decoded, plain = [], quantizer.decode
    monkeypatch.setattr(quantizer, "decode", lambda codes: decoded.append(len(codes)) or plain(codes))
    reassign(codes, generator.normal(size=(100, 8)), quantizer, list(np.arange(100).reshape(50, 2)))
    assert sum(decoded) <= 50 * 2 * 2


def test_groups_that_are_far_from_the_origin_keep_what_rounding_leaves_possible() -> None:
    # The sum's float32 rounding hides which code is nearer; what is decoded decides.
    quantizer = ResidualKMeans(2, 4)
    quantizer.codebooks = (
        np.array([[1000.1]], dtype=np.float32),
        np.array([[0.0], [2e-5], [4e-5], [5.0]], dtype=np.float32),
    )
    vectors = np.array([[1000.1], [1000.1]])
    resolved = reassign(np.zeros((2, 2), dtype=np.int32), vectors, quantizer, [np.array([0, 1])])
    costs = all_costs(vectors, np.zeros((2, 2), dtype=int), quantizer)
    items, chosen = linear_sum_assignment(costs)
    assert costs[[0, 1], resolved[:, 1]].sum() == costs[items, chosen].sum()
