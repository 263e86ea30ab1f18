"""Residual k-means against its definition, computed directly in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization import ResidualKMeans
from llmrec.quantization import residual_kmeans as module
from llmrec.quantization.residual_kmeans import nearest


def brute_force_nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    differences = vectors[:, None, :].astype(np.float64) - centroids[None].astype(np.float64)
    return (differences**2).sum(axis=2).argmin(axis=1)


def brute_force_encode(quantizer: ResidualKMeans, vectors: np.ndarray) -> np.ndarray:
    residuals, codes = vectors.astype(np.float64), []
    for codebook in quantizer.codebooks:
        codes.append(brute_force_nearest(residuals, codebook))
        residuals = residuals - codebook[codes[-1]].astype(np.float64)
    return np.stack(codes, axis=1)


@pytest.mark.parametrize("seed", range(5))
def test_encode_is_the_greedy_nearest_centroid_of_every_level(seed: int) -> None:
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(300, 7)).astype(np.float32)
    quantizer = ResidualKMeans(3, 16, seed=seed).fit(vectors)
    unseen = generator.normal(size=(200, 7))
    for points in (vectors, unseen):
        codes = quantizer.encode(points)
        assert codes.dtype == np.int32
        np.testing.assert_array_equal(codes, brute_force_encode(quantizer, points))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_nearest_breaks_ties_by_the_lowest_index(data: st.DataObject) -> None:
    # Points on a coarse grid, far from the origin: many exact ties, and large norms whose rounding could turn them.
    dimension = data.draw(st.integers(1, 4))
    point = st.lists(st.integers(-2, 2), min_size=dimension, max_size=dimension)
    vectors = np.array(data.draw(st.lists(point, min_size=1, max_size=8)), dtype=np.float64)
    centroids = np.array(data.draw(st.lists(point, min_size=1, max_size=12)), dtype=np.float64)
    offset = data.draw(st.sampled_from([0.0, 0.1, 1000.3]))
    np.testing.assert_array_equal(
        nearest(vectors + offset, centroids + offset), brute_force_nearest(vectors + offset, centroids + offset)
    )


def test_nearest_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    vectors, centroids = generator.normal(size=(50, 5)), generator.normal(size=(9, 5))
    whole = nearest(vectors, centroids)
    monkeypatch.setattr(module, "CHUNK", 7)
    np.testing.assert_array_equal(nearest(vectors, centroids), whole)


def test_well_separated_clusters_are_found() -> None:
    offsets = np.array([[5, 0], [-5, 0]], dtype=np.float64)
    vectors = np.concatenate([offsets + 0, offsets + 100])
    quantizer = ResidualKMeans(2, 2, seed=0).fit(vectors)
    codes = quantizer.encode(vectors)
    a, b, c, d = codes[:, 0]
    assert a == b != c == d
    assert len(np.unique(codes, axis=0)) == 4
    np.testing.assert_allclose(quantizer.decode(codes), vectors, atol=1e-4)


def test_decode_sums_the_centroids_and_every_level_lowers_the_error() -> None:
    vectors = np.random.default_rng(1).normal(size=(400, 6))
    quantizer = ResidualKMeans(3, 32).fit(vectors)
    codes = quantizer.encode(vectors)
    a, b, c = quantizer.codebooks
    np.testing.assert_allclose(
        quantizer.decode(codes), a[codes[:, 0]] + b[codes[:, 1]] + c[codes[:, 2]], rtol=1e-5, atol=1e-6
    )
    residuals, errors = vectors, [(vectors**2).sum()]
    for level, codebook in enumerate(quantizer.codebooks):
        residuals = residuals - codebook[codes[:, level]]
        errors.append((residuals**2).sum())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


def test_same_seed_same_codebooks_other_seed_others() -> None:
    vectors = np.random.default_rng(2).normal(size=(500, 8))
    first, again, other = (ResidualKMeans(2, 32, seed=seed).fit(vectors) for seed in (0, 0, 1))
    for left, right in zip(first.codebooks, again.codebooks, strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(first.codebooks[0], other.codebooks[0])


@pytest.mark.parametrize("items", [1, 2, 10])
def test_small_catalogs_have_as_many_codes_as_items(items: int, caplog: pytest.LogCaptureFixture) -> None:
    vectors = np.random.default_rng(3).normal(size=(items, 4))
    quantizer = ResidualKMeans(3, 256).fit(vectors)
    assert quantizer.codebook_sizes == (items,) * 3
    assert f"{items} items: codebooks have {items} codes, not 256" in caplog.text
    assert len(np.unique(quantizer.encode(vectors), axis=0)) == items
    np.testing.assert_allclose(quantizer.decode(quantizer.encode(vectors)), vectors, atol=1e-5)


def test_equal_items_share_one_code() -> None:
    quantizer = ResidualKMeans(3, 8).fit(np.ones((20, 4)))
    codes = quantizer.encode(np.ones((20, 4)))
    assert len(np.unique(codes, axis=0)) == 1
    np.testing.assert_allclose(quantizer.decode(codes), 1, atol=1e-5)


def test_saved_and_loaded(tmp_path) -> None:
    vectors = np.random.default_rng(4).normal(size=(100, 5))
    quantizer = ResidualKMeans(2, 16, niter=7, seed=3).fit(vectors)
    quantizer.save(tmp_path)
    loaded = ResidualKMeans.from_pretrained(tmp_path)
    assert (loaded.num_levels, loaded.codebook_size, loaded.niter, loaded.seed) == (2, 16, 7, 3)
    np.testing.assert_array_equal(loaded.encode(vectors), quantizer.encode(vectors))
    (tmp_path / "codebooks.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtefactError, match="holds no residual k-means"):
        ResidualKMeans.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        (np.zeros(3), r"shape \(3,\)"),
        (np.array([[0.0, 1.0], [np.nan, 0.0]]), "row 1 first"),
        (np.array([[np.inf, 1.0], [0.0, 0.0]]), "row 0 first"),
    ],
)
def test_bad_embeddings_are_refused(vectors: np.ndarray, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        ResidualKMeans().fit(vectors)


def test_misuse_is_refused() -> None:
    with pytest.raises(TokenizerError, match="num_levels is 0"):
        ResidualKMeans(num_levels=0)
    with pytest.raises(TokenizerError, match="no codebooks yet"):
        ResidualKMeans().encode(np.ones((2, 2)))
    quantizer = ResidualKMeans(2, 2).fit(np.eye(3))
    with pytest.raises(TokenizerError, match="2 wide, the codebooks 3"):
        quantizer.encode(np.ones((2, 2)))
    for codes in ([[0, 2]], [[-1, 0]], [[0, 0, 0]]):
        with pytest.raises(TokenizerError):
            quantizer.decode(np.array(codes))
