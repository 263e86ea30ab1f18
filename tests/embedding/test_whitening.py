"""Whitening against the singular value decomposition, and what must hold of variances and distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.embedding import whitening
from llmrec.embedding.whitening import Whitening
from llmrec.exceptions import ArtefactError, DataError


def vectors_of(seed: int, count: int, width: int, rank: int | None = None) -> np.ndarray:
    """Correlated columns of differing variance far from the origin, float64."""
    generator = np.random.default_rng(seed)
    rank = min(count, width) if rank is None else rank
    spread = np.geomspace(3, 0.1, rank) if rank else np.zeros(0)
    return 7 + generator.normal(size=(count, rank)) * spread @ generator.normal(size=(rank, width))


def defined(vectors: np.ndarray, dim: int | None, power: float) -> np.ndarray:
    """U·S of the centred vectors, each column divided by its standard deviation to the power; signs by directions."""
    centred = vectors - vectors.mean(axis=0)
    left, singular, right = np.linalg.svd(centred, full_matrices=False)
    deviations = singular / np.sqrt(len(vectors))
    kept = deviations**2 > 1e-10 * deviations[0] ** 2
    left, deviations, right = left[:, kept][:, :dim], deviations[kept][:dim], right[kept][:dim]
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    return left * deviations * np.sqrt(len(vectors)) * deviations**-power * signs


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    count=st.integers(2, 30),
    width=st.integers(1, 12),
    rank=st.integers(1, 12),
    dim=st.none() | st.integers(1, 14),
    power=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    block=st.sampled_from([1, 7, 2048]),
)
def test_it_is_the_svd_of_the_centred_vectors(seed, count, width, rank, dim, power, block) -> None:
    vectors = vectors_of(seed, count, width, min(rank, count, width))
    expected = defined(vectors, dim, power)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whitening, "BLOCK", block)
        fitted = Whitening.fit(vectors, dim, power)
        found = fitted.transform(vectors)
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (count, fitted.dimension)
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, np.abs(expected).max()))
    np.testing.assert_allclose(fitted.directions.T @ fitted.directions, np.eye(fitted.dimension), atol=1e-9)
    extremes = fitted.directions[np.abs(fitted.directions).argmax(axis=0), np.arange(fitted.dimension)]
    assert (extremes > 0).all()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dim", [None, 5])
@pytest.mark.parametrize("count", [400, 20, 8])
def test_the_covariance_is_diagonal_with_variances_to_the_rest_of_the_power(count, dim, power) -> None:
    vectors = vectors_of(1, count, 10)
    found = Whitening.fit(vectors, dim, power).transform(vectors).astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(vectors.T, bias=True))[::-1][: found.shape[1]]
    assert found.shape[1] == min(dim or 10, count - 1)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-5)
    expected = np.diag(values ** (1 - power))  # the identity for a power of 1
    np.testing.assert_allclose(np.cov(found.T, bias=True), expected, atol=1e-5 * max(1, values[0]))


def test_distances_are_kept_by_pca_alone_at_full_width() -> None:
    for count in (200, 6):
        vectors = vectors_of(2, count, 12)
        found = Whitening.fit(vectors, power=0).transform(vectors).astype(np.float64)
        before = np.linalg.norm(vectors[:, None] - vectors, axis=2)
        np.testing.assert_allclose(np.linalg.norm(found[:, None] - found, axis=2), before, rtol=1e-5, atol=1e-5)


def test_directions_without_variance_are_dropped() -> None:
    vectors = vectors_of(3, 300, 10, rank=4)
    assert Whitening.fit(vectors, power=1).dimension == 4
    # In float32 the other directions hold the numbers' rounding, however far off the origin they lie.
    for offset in (0, 30_000):
        fitted = Whitening.fit((vectors + offset).astype(np.float32), power=1)
        assert fitted.dimension == 4
    assert Whitening.fit(vectors, dim=2).dimension == 2
    assert Whitening.fit(vectors, dim=100).dimension == 4


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 / 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("count", "width"), [(1, 5), (4, 5), (5000, 5)])
def test_vectors_that_are_all_alike_become_one_zero(count, width, dtype, value) -> None:
    vectors = np.full((count, width), value, dtype=dtype)
    for power in (0.0, 1.0):
        fitted = Whitening.fit(vectors, dim=3, power=power)
        np.testing.assert_array_equal(fitted.transform(vectors), np.zeros((count, 1)))
        np.testing.assert_array_equal(fitted.transform(vectors + 1), np.zeros((count, 1)))
        assert fitted.explained == 1


def test_explained_is_the_kept_share_of_the_variance() -> None:
    vectors = vectors_of(4, 100, 6)
    values = np.linalg.eigvalsh(np.cov(vectors.T, bias=True))[::-1]
    for dim in range(1, 7):
        assert Whitening.fit(vectors, dim).explained == pytest.approx(values[:dim].sum() / values.sum())


def test_new_items_get_what_old_ones_at_their_place_got(tmp_path) -> None:
    vectors = vectors_of(5, 90, 8).astype(np.float32)
    fitted = Whitening.fit(vectors, 6, 0.5)
    fitted.save(tmp_path / "whitening")
    loaded = Whitening.from_pretrained(tmp_path / "whitening")
    np.testing.assert_array_equal(loaded.transform(vectors), fitted.transform(vectors))
    np.testing.assert_allclose(loaded.transform(vectors[40:41]), fitted.transform(vectors)[40:41], atol=1e-5)
    assert (loaded.power, loaded.explained) == (fitted.power, fitted.explained)
    new = vectors_of(6, 3, 8).astype(np.float32)
    expected = (new - vectors.mean(axis=0, dtype=np.float64)) @ fitted.directions / fitted.variances**0.25
    np.testing.assert_allclose(loaded.transform(new), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["whitening.json", "whitening.safetensors"])
def test_torn_and_missing_files_are_named(name: str, tmp_path) -> None:
    Whitening.fit(vectors_of(7, 20, 4)).save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5])
    with pytest.raises(ArtefactError, match="holds no fitted whitening"):
        Whitening.from_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtefactError, match="holds no fitted whitening"):
        Whitening.from_pretrained(tmp_path)


def test_a_memory_map_gives_the_same_bits(tmp_path) -> None:
    vectors = vectors_of(8, 5000, 6).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    fitted, from_map = Whitening.fit(vectors, 4), Whitening.fit(mapped, 4)
    np.testing.assert_array_equal(fitted.directions, from_map.directions)
    np.testing.assert_array_equal(fitted.transform(vectors), from_map.transform(mapped))


def test_half_precision_and_whole_numbers_are_taken() -> None:
    vectors = np.random.default_rng(9).integers(-4, 5, (50, 3))
    expected = Whitening.fit(vectors.astype(np.float64), power=1).transform(vectors)
    for dtype in (np.float16, np.float32, np.int64):
        found = Whitening.fit(vectors.astype(dtype), power=1).transform(vectors.astype(dtype))
        np.testing.assert_array_equal(found, expected)


def test_misuse_is_refused() -> None:
    vectors = vectors_of(10, 3000, 4)
    with pytest.raises(DataError, match="0 principal components"):
        Whitening.fit(vectors, 0)
    for power in (-0.1, 1.5, float("nan")):
        with pytest.raises(DataError, match="whitening power"):
            Whitening.fit(vectors, power=power)
    for shape in ((0, 3), (3, 0), (3,)):
        with pytest.raises(DataError, match="cannot be whitened"):
            Whitening.fit(np.zeros(shape))
    for value in (np.nan, -np.inf, 1e200):
        vectors[2900, 1] = value
        with pytest.raises(DataError, match="row 2900 holds NaN"):
            Whitening.fit(vectors)
    with pytest.raises(DataError, match="whitening of vectors 4 wide"):
        Whitening.fit(vectors[:50]).transform(np.zeros((2, 5)))
