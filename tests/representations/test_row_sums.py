"""Sums of codes' and hashes' rows, piece by piece; hashes that are the same everywhere."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import DataError
from llmrec.representations.hashed import HashedIds
from llmrec.representations.hashing import hash_codes, hash_ids
from llmrec.representations.item_features import ItemFeatures
from llmrec.representations.semantic_ids import SemanticIdSums


def coded(codes: list[list[int]]) -> ItemFeatures:
    return ItemFeatures([str(row) for row in range(len(codes))], codes=np.array(codes))


CODES = [[0, 3, 1], [2, 3, 1], [2, 0, 0], [2, 3, 0], [0, 3, 1]]
SIZES = [3, 4, 2]


def pieces_of(code: list[int], pieces: str) -> list[tuple[int, ...]]:
    """Each piece with its place: the parts that are summed."""
    places = range(len(code))
    if pieces == "prefix":
        return [tuple(code[: place + 1]) for place in places]
    size = 1 if pieces == "unigram" else 2
    return [(place, *code[place : place + size]) for place in places if place + size <= len(code)]


@pytest.mark.parametrize("pieces", ["unigram", "bigram", "prefix"])
def test_items_are_the_sums_of_their_pieces(pieces: str) -> None:
    sums = SemanticIdSums(5, 4, SIZES, pieces)  # type: ignore[arg-type]
    sums.set_items(coded(CODES))
    rows: dict[tuple[int, ...], int] = {}
    for item, code in enumerate(CODES):
        own = pieces_of(code, pieces)
        assert sums.rows.shape[1] == len(own)
        for piece, row in zip(own, sums.rows[item].tolist(), strict=True):
            assert rows.setdefault(piece, row) == row  # equal pieces share a row,
        expected = sum(sums.tables.weight[rows[piece]] for piece in own)
        torch.testing.assert_close(sums.table()[item], expected)
    assert len(set(rows.values())) == len(rows)  # and different ones do not
    assert max(rows.values()) < len(sums.tables.weight)
    assert sums.sizes == {"unigram": (3, 4, 2), "bigram": (12, 8), "prefix": (3, 12, 24)}[pieces]


@settings(max_examples=30, deadline=None)
@given(
    codes=st.lists(st.tuples(*[st.integers(0, 255)] * 9), min_size=2, max_size=30, unique=True),
    table_size=st.integers(1, 500),
)
def test_hashed_pieces_stay_in_their_tables_and_follow_the_piece_alone(
    codes: list[tuple[int, ...]], table_size: int
) -> None:
    # 256⁹ values are more than an int64 counts.
    sums = SemanticIdSums(len(codes), 2, [256] * 9, "prefix", table_size)
    sums.set_items(coded([list(code) for code in codes]))
    local = sums.rows.numpy() - np.cumsum([0, *sums.sizes[:-1]])
    assert local.min() >= 0
    assert (local < sums.sizes).all()
    assert sums.sizes == (min(256, table_size), *[table_size] * 8)
    seen: dict[tuple[int, ...], int] = {}
    for code, rows in zip(codes, local.tolist(), strict=True):
        for level, row in enumerate(rows):
            assert seen.setdefault(code[: level + 1], row) == row
    alone = SemanticIdSums(1, 2, [256] * 9, "prefix", table_size)
    alone.set_items(coded([list(codes[-1])]))
    assert torch.equal(alone.rows[0], sums.rows[-1])


@pytest.mark.parametrize("codes", [[[0, 4, 0]], [[-1, 0, 0]], [[0, 0]]])
def test_codes_outside_the_codebooks(codes: list[list[int]]) -> None:
    with pytest.raises(DataError, match="codebooks have"):
        SemanticIdSums(1, 4, SIZES).set_items(coded(codes))


def test_hashes_spread_evenly_and_independently() -> None:
    ids = [f"item-{row}" for row in range(20_000)]
    hashes = hash_ids(ids, 3)
    assert len(np.unique(hashes)) == hashes.size
    for column in hashes.T:
        counts = np.bincount((column % np.uint64(16)).astype(np.int64), minlength=16)
        assert abs(counts - 1250).max() < 6 * np.sqrt(1250)
    # Two hashes fall together as often as chance has it.
    both = ((hashes[:, 0] % np.uint64(16)) == (hashes[:, 1] % np.uint64(16))).mean()
    assert abs(both - 1 / 16) < 6 * np.sqrt(1 / 16 / len(ids))
    codes = np.stack(np.unravel_index(np.arange(20_000), (20, 20, 50)), axis=1)
    found = hash_codes(codes)
    assert len(np.unique(found)) == len(found)
    counts = np.bincount((found % np.uint64(16)).astype(np.int64), minlength=16)
    assert abs(counts - 1250).max() < 6 * np.sqrt(1250)
    assert hash_codes(np.array([[1, 2]]))[0] != hash_codes(np.array([[2, 1]]))[0]


def test_hashes_are_the_same_in_every_process() -> None:
    program = (
        "import numpy as np; from llmrec.representations.hashing import hash_codes, hash_ids;"
        "print(hash_ids(['a', '\\ud800'], 2, -5).tolist(), hash_codes(np.array([[1, 2], [3, 4]])).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = hash_ids(["a", "\ud800"], 2, -5).tolist(), hash_codes(np.array([[1, 2], [3, 4]])).tolist()
    assert done.stdout.strip() == f"{expected[0]} {expected[1]}"


def test_splitmix_by_plain_integers() -> None:
    # Python's own integers, so that no overflow of numpy's is taken on trust.
    def mixed(word: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            word = ((word ^ (word >> shift)) * factor) % 2**64
        return word ^ (word >> 31)

    for code in ([5, 7, 0], [255, 255, 255]):
        expected = 0
        for value in code:
            expected = mixed((expected + value + 0x9E3779B97F4A7C15) % 2**64)
        assert int(hash_codes(np.array([code]))[0]) == expected


def test_hashed_ids_follow_the_id_alone() -> None:
    first = HashedIds(4, 3, 50, num_hashes=3, seed=1)
    first.set_items(ItemFeatures(["a", "b", "c", "d"]))
    other = first.with_items(ItemFeatures(["d", "new", "a"]), np.array([3, -1, 0]))
    torch.testing.assert_close(other.table()[[0, 2]], first.table()[[3, 0]])
    seeded = HashedIds(4, 3, 50, num_hashes=3, seed=2)
    seeded.set_items(ItemFeatures(["a", "b", "c", "d"]))
    assert not torch.equal(seeded.rows, first.rows)
    # Each hash has a table of its own.
    assert ((first.rows // 50) == torch.arange(3)).all()
