"""Hashed codes: uniform, independent of what they stand for, and the same everywhere."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2

from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization import resolve_collisions
from llmrec.quantization.hashed import HashedCodes

IDS = [f"B{number:06d}" for number in range(20_000)]


def fitted(items: int = 20_000, levels: int = 3, size: int = 16, seed: int = 0) -> HashedCodes:
    return HashedCodes(levels, size, seed).fit(np.random.default_rng(0).normal(size=(items, 3)))


def codes_of(quantizer: HashedCodes, kind: str) -> np.ndarray:
    """20,000 codes: of ids that count up, of vectors on a line, or of vectors whose numbers are small integers."""
    if kind == "ids":
        return quantizer.encode_ids(IDS)
    numbers = np.arange(20_000, dtype=np.float64)
    if kind == "line":
        return quantizer.encode(numbers[:, None] * np.array([1e-3, 1e-3, 1e-3]))
    return quantizer.encode(np.column_stack([numbers // 1000, numbers // 20 % 50, numbers % 20]).astype(np.float32))


def is_uniform(cells: np.ndarray, count: int) -> bool:
    expected = len(cells) / count
    observed = np.bincount(cells, minlength=count)
    statistic = ((observed - expected) ** 2 / expected).sum()
    return bool(chi2.sf(statistic, count - 1) > 1e-4 and len(observed) == count)


@pytest.mark.parametrize("kind", ["ids", "line", "integers"])
@pytest.mark.parametrize("size", [16, 7])
def test_codes_are_uniform_over_the_whole_space(kind: str, size: int) -> None:
    codes = codes_of(fitted(size=size), kind)
    assert (codes.dtype, codes.shape) == (np.dtype(np.int32), (20_000, 3))
    for level in range(3):
        assert is_uniform(codes[:, level], size)
    # Pairs of levels and all three together: levels are independent of each other.
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert is_uniform(codes[:, one] * size + codes[:, other], size**2)
    assert is_uniform((codes[:, 0] * size + codes[:, 1]) * size + codes[:, 2], size**3)


@pytest.mark.parametrize("kind", ["ids", "line", "integers"])
def test_neighbours_and_seeds_have_nothing_in_common(kind: str) -> None:
    first, other = (codes_of(fitted(seed=seed), kind) for seed in (0, 1))
    for left, right in ((first[:-1], first[1:]), (first, other), (first[:, :-1], first[:, 1:])):
        agreement = (left == right).mean()
        assert abs(agreement - 1 / 16) < 5 * np.sqrt(1 / 16 * 15 / 16 / left.size)


def test_codes_depend_on_the_item_and_the_seed_alone() -> None:
    quantizer, bigger = fitted(), HashedCodes(5, 16).fit(np.random.default_rng(1).normal(size=(16, 3)))
    codes = quantizer.encode_ids(IDS)
    np.testing.assert_array_equal(quantizer.encode_ids(IDS[::-1])[::-1], codes)
    np.testing.assert_array_equal(bigger.encode_ids(IDS)[:, :3], codes)
    # Pinned: they are the same on every machine and in every version, or saved catalogs could not grow.
    assert quantizer.encode_ids(["a", "ä😀|/", ""]).tolist() == [[6, 15, 8], [2, 13, 3], [4, 1, 8]]
    assert quantizer.encode(np.array([[0.0, 1.0, -2.5]])).tolist() == [[2, 0, 15]]


def test_ids_by_the_definition() -> None:
    def code(item: str, level: int, size: int, seed: int) -> int:
        key = seed.to_bytes(8, "little", signed=True)
        state = int.from_bytes(hashlib.blake2b(item.encode(), digest_size=8, key=key).digest(), "little")
        state = (state + (level + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        return (state ^ state >> 31) // 2**32 * size // 2**32

    expected = [[code(item, level, 7, -3) for level in range(4)] for item in IDS[:300]]
    np.testing.assert_array_equal(fitted(levels=4, size=7, seed=-3).encode_ids(IDS[:300]), expected)


def test_equal_rows_hash_alike_whatever_their_type() -> None:
    quantizer = fitted()
    vectors = np.random.default_rng(2).normal(size=(5000, 3)).astype(np.float16)
    codes = quantizer.encode(vectors)
    for kind in (np.float32, np.float64):
        np.testing.assert_array_equal(quantizer.encode(vectors.astype(kind)), codes)
    np.testing.assert_array_equal(quantizer.encode(vectors[3000:]), codes[3000:])
    np.testing.assert_array_equal(quantizer.encode(np.asfortranarray(vectors)), codes)
    np.testing.assert_array_equal(
        quantizer.encode(np.array([[0.0, -0.0, 1.0]])), quantizer.encode(np.array([[-0.0, 0.0, 1.0]]))
    )
    # Columns have keys of their own: a row and its permutation are different items.
    assert (quantizer.encode(vectors) != quantizer.encode(vectors[:, ::-1])).any(axis=1).mean() > 0.99


def test_every_code_stands_for_the_mean() -> None:
    vectors = np.random.default_rng(3).normal(size=(100, 4)) + 7
    quantizer = HashedCodes(2, 8).fit(vectors)
    points = quantizer.decode(quantizer.encode(vectors))
    np.testing.assert_allclose(points, np.tile(vectors.mean(axis=0), (100, 1)), rtol=1e-6)
    np.testing.assert_allclose(quantizer.level_points(0)[:1] + quantizer.level_points(1)[7:], points[:1], rtol=1e-6)
    assert quantizer.level_points(1).shape == (8, 4)
    assert ((vectors - points) ** 2).sum(axis=1).mean() == pytest.approx(vectors.var(axis=0).sum())
    report = resolve_collisions(quantizer.encode(vectors), vectors, quantizer).report
    assert report.added_distortion == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("items", [1, 3])
def test_small_catalogs_have_as_many_codes_as_items(items: int, caplog: pytest.LogCaptureFixture) -> None:
    quantizer = HashedCodes(2, 256).fit(np.ones((items, 2)))
    assert quantizer.codebook_sizes == (items, items)
    assert f"{items} items: codebooks have {items} codes, not 256" in caplog.text
    codes = quantizer.encode_ids(IDS[:500])
    assert set(codes.ravel().tolist()) == set(range(items))
    resolved = resolve_collisions(quantizer.encode(np.ones((items, 2))), np.ones((items, 2)), quantizer)
    assert len(np.unique(resolved.codes, axis=0)) == items


def test_saved_and_loaded(tmp_path: Path) -> None:
    quantizer = HashedCodes(2, 64, seed=-5).fit(np.random.default_rng(4).normal(size=(50, 3)))
    quantizer.save(tmp_path)
    loaded = HashedCodes.from_pretrained(tmp_path)
    assert (loaded.num_levels, loaded.codebook_size, loaded.seed, loaded.codebook_sizes) == (2, 64, -5, (50, 50))
    np.testing.assert_array_equal(loaded.encode_ids(IDS), quantizer.encode_ids(IDS))
    np.testing.assert_array_equal(loaded.decode(np.array([[1, 2]])), quantizer.decode(np.array([[1, 2]])))
    document = json.loads((tmp_path / "quantizer.json").read_text())
    for change in ({"size": 0}, {"size": 65}, {"size": "3"}, {"quantizer": "product"}, {"seed": 2**70}):
        (tmp_path / "quantizer.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(ArtefactError, match="holds no"):
            HashedCodes.from_pretrained(tmp_path)
    (tmp_path / "quantizer.json").write_text(json.dumps(document))
    (tmp_path / "codebooks.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtefactError, match="holds no hashed"):
        HashedCodes.from_pretrained(tmp_path)


def test_misuse_is_refused() -> None:
    for name in ("num_levels", "codebook_size"):
        with pytest.raises(TokenizerError, match=f"{name} is -1"):
            HashedCodes(**{name: -1})
    with pytest.raises(TokenizerError, match="does not fit into 64 bits"):
        HashedCodes(seed=2**63)
    for use in (lambda q: q.encode(np.ones((2, 2))), lambda q: q.encode_ids(["a"]), lambda q: q.codebook_sizes):
        with pytest.raises(TokenizerError, match="no codebooks yet"):
            use(HashedCodes())
    with pytest.raises(TokenizerError, match="NaN"):
        HashedCodes().fit(np.array([[np.nan]]))
    with pytest.raises(TokenizerError, match="2 wide, the codebooks 3"):
        fitted(30).encode(np.ones((2, 2)))
    with pytest.raises(TokenizerError, match="outside the codebooks"):
        fitted(30).decode(np.array([[0, 0, 16]]))
