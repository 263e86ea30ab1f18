"""Residual k-means against its definition, computed directly in float64."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization import ResidualKMeans
from llmrec.quantization import residual_kmeans as module

OPTIONS = (
    {},
    {"init": "k-means++"},
    {"normalise_residuals": True},
    {"balanced": True},
    {"init": "k-means++", "normalise_residuals": True, "balanced": True},
)


def brute_force_nearest(vectors: np.ndarray, centroids: np.ndarray, prices: np.ndarray | float = 0.0) -> np.ndarray:
    differences = vectors[:, None, :].astype(np.float64) - centroids[None].astype(np.float64)
    return ((differences**2).sum(axis=2) + prices).argmin(axis=1)


def brute_force_encode(quantizer: ResidualKMeans, vectors: np.ndarray) -> np.ndarray:
    residuals, codes = vectors.astype(np.float64), []
    for level, codebook in enumerate(quantizer.codebooks):
        if quantizer.normalise_residuals:
            residuals = np.stack([(row - row.mean()) / np.sqrt(row.var() + 1e-5) for row in residuals])
        codes.append(brute_force_nearest(residuals, codebook, quantizer.prices[level] if quantizer.balanced else 0.0))
        residuals = residuals - codebook[codes[-1]].astype(np.float64)
    return np.stack(codes, axis=1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(5))
def test_encode_is_the_greedy_nearest_centroid_of_every_level(
    monkeypatch: pytest.MonkeyPatch, seed: int, options: dict
) -> None:
    monkeypatch.setattr(module, "BLOCK", (8192, 64)[seed % 2])
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(300, 7)).astype(np.float32)
    quantizer = ResidualKMeans(3, 16, seed=seed, **options).fit(vectors)
    unseen = generator.normal(size=(200, 7))
    for points in (vectors, unseen):
        codes = quantizer.encode(points)
        assert codes.dtype == np.int32
        np.testing.assert_array_equal(codes, brute_force_encode(quantizer, points))


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


@pytest.mark.parametrize("options", OPTIONS)
def test_saved_and_loaded(tmp_path, options: dict) -> None:
    vectors = np.random.default_rng(4).normal(size=(100, 5))
    quantizer = ResidualKMeans(2, 16, niter=7, seed=3, points_per_code=9, **options).fit(vectors)
    quantizer.save(tmp_path)
    loaded = ResidualKMeans.from_pretrained(tmp_path)
    for name in ("num_levels", "codebook_size", "niter", "seed", *module.OPTIONS):
        assert getattr(loaded, name) == getattr(quantizer, name)
    codes = quantizer.encode(vectors)
    np.testing.assert_array_equal(loaded.encode(vectors), codes)
    np.testing.assert_array_equal(loaded.decode(codes), quantizer.decode(codes))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codebooks.safetensors", "quantizer.json"]


def test_folders_from_before_the_options_are_read(tmp_path) -> None:
    vectors = np.random.default_rng(4).normal(size=(40, 5))
    quantizer = ResidualKMeans(2, 4).fit(vectors)
    quantizer.save(tmp_path)
    manifest = json.loads((tmp_path / "quantizer.json").read_text())
    old = {key: value for key, value in manifest.items() if key not in module.OPTIONS}
    assert old != manifest
    (tmp_path / "quantizer.json").write_text(json.dumps(old))
    loaded = ResidualKMeans.from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.encode(vectors), quantizer.encode(vectors))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder, _: (folder / "codebooks.safetensors").write_bytes(b"torn"),
        lambda folder, _: (folder / "codebooks.safetensors").write_bytes(
            (folder / "codebooks.safetensors").read_bytes()[:-9]
        ),
        lambda folder, _: (folder / "codebooks.safetensors").unlink(),
        lambda folder, _: (folder / "quantizer.json").write_text("{"),
        lambda folder, _: (folder / "quantizer.json").write_text("[]"),
        lambda folder, manifest: (folder / "quantizer.json").write_text(json.dumps({**manifest, "num_levels": 3})),
        lambda folder, manifest: (folder / "quantizer.json").write_text(json.dumps({**manifest, "quantizer": "fsq"})),
        lambda folder, manifest: (folder / "quantizer.json").write_text(json.dumps({**manifest, "balanced": True})),
        lambda folder, _: save_file(
            {f"level_{level}": np.full((4, 5), np.nan, dtype=np.float32) for level in range(2)},
            folder / "codebooks.safetensors",
        ),
        lambda folder, _: save_file(
            {"level_0": np.zeros((4, 5), dtype=np.float32), "level_1": np.zeros((4, 6), dtype=np.float32)},
            folder / "codebooks.safetensors",
        ),
        lambda folder, _: save_file(
            {f"level_{level}": np.zeros((4, 5)) for level in range(2)}, folder / "codebooks.safetensors"
        ),
    ],
)
def test_damaged_and_foreign_folders_are_refused(tmp_path, damage) -> None:
    ResidualKMeans(2, 4).fit(np.random.default_rng(4).normal(size=(40, 5))).save(tmp_path)
    damage(tmp_path, json.loads((tmp_path / "quantizer.json").read_text()))
    with pytest.raises(ArtefactError, match="holds no residual k-means"):
        ResidualKMeans.from_pretrained(tmp_path)


def test_without_options_it_is_faiss_on_the_residuals() -> None:
    import faiss

    vectors = np.random.default_rng(6).normal(size=(700, 9))
    quantizer = ResidualKMeans(3, 20, niter=11, seed=5).fit(vectors)
    residuals = vectors
    for level, codebook in enumerate(quantizer.codebooks):
        trainer = faiss.Kmeans(9, 20, niter=11, seed=5 + level, min_points_per_centroid=1)
        trainer.train(residuals.astype(np.float32))
        np.testing.assert_array_equal(trainer.centroids.reshape(20, 9), codebook)
        residuals = residuals - codebook[brute_force_nearest(residuals, codebook)]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_are_deterministic_and_lower_the_error_level_by_level(options: dict) -> None:
    vectors = np.random.default_rng(2).normal(size=(500, 8))
    first, again = (ResidualKMeans(3, 32, **options).fit(vectors) for _ in range(2))
    codes = first.encode(vectors)
    np.testing.assert_array_equal(codes, again.encode(vectors))
    np.testing.assert_array_equal(first.decode(codes), again.decode(codes))
    partial, errors = np.zeros_like(vectors), [(vectors**2).sum()]
    for level in range(3):
        partial += first.level_points(level)[codes[:, level]]
        errors.append(((vectors - partial) ** 2).sum())
    np.testing.assert_allclose(first.decode(codes), partial, atol=1e-5)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.35 * errors[0]


@pytest.mark.parametrize("normalise", [False, True])
def test_balanced_levels_have_codes_of_equal_size(normalise: bool) -> None:
    generator = np.random.default_rng(8)
    # Nearly all items lie close together, which plain k-means gives few codes.
    vectors = generator.normal(size=(1003, 6)) * np.where(np.arange(1003) < 900, 0.1, 3)[:, None]
    quantizer = ResidualKMeans(3, 10, balanced=True, normalise_residuals=normalise).fit(vectors)
    sizes = [np.bincount(level, minlength=10) for level in quantizer.encode(vectors).T]
    for size in sizes:
        assert sorted(size.tolist()) == [100] * 7 + [101] * 3
    plain = ResidualKMeans(3, 10).fit(vectors).encode(vectors)
    assert np.bincount(plain[:, 0], minlength=10).max() > 200


def test_balanced_equal_embeddings_count_as_one() -> None:
    generator = np.random.default_rng(9)
    different = generator.normal(size=(60, 4))
    vectors = different[generator.permutation(np.concatenate([np.arange(60), np.zeros(200, dtype=int)]))]
    quantizer = ResidualKMeans(2, 6, balanced=True).fit(vectors)
    for level in quantizer.encode(different).T:
        assert np.bincount(level).tolist() == [10] * 6
    few = ResidualKMeans(2, 256, balanced=True).fit(np.ones((20, 4)))
    assert few.codebook_sizes == (1, 1)


def test_balanced_codes_of_new_items_are_nearly_balanced() -> None:
    vectors = np.random.default_rng(10).normal(size=(12_000, 5)).astype(np.float32)
    quantizer = ResidualKMeans(2, 8, niter=5, balanced=True, points_per_code=500).fit(vectors[:4000])
    for level in quantizer.encode(vectors[4000:]).T:
        assert np.abs(np.bincount(level, minlength=8) - 1000).max() < 150


def test_normalised_residuals_do_not_see_an_items_scale_and_decode_to_means() -> None:
    vectors = np.random.default_rng(11).normal(size=(400, 16))
    quantizer = ResidualKMeans(2, 8, normalise_residuals=True).fit(vectors)
    codes = quantizer.encode(vectors)
    np.testing.assert_array_equal(quantizer.encode(5 * vectors + 3)[:, 0], codes[:, 0])
    means = np.stack([vectors[codes[:, 0] == code].mean(axis=0) for code in range(8)])
    np.testing.assert_allclose(quantizer.level_points(0), means, atol=1e-6)
    left = vectors - quantizer.level_points(0)[codes[:, 0]]
    means = np.stack([left[codes[:, 1] == code].mean(axis=0) for code in range(8)])
    np.testing.assert_allclose(quantizer.level_points(1), means, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("vectors", [np.zeros((5, 3)), np.full((30, 2), 0.1), np.ones((1, 4)), [[1, 2], [3, 5]]])
def test_few_and_constant_embeddings_are_answered(options: dict, vectors) -> None:
    quantizer = ResidualKMeans(2, 8, **options).fit(vectors)
    codes = quantizer.encode(vectors)
    distinct = len(np.unique(vectors, axis=0))
    assert len(np.unique(codes, axis=0)) == distinct
    np.testing.assert_allclose(quantizer.decode(codes), vectors, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_sample_is_learnt_from(options: dict) -> None:
    vectors = np.random.default_rng(12).normal(size=(2000, 6))
    most = ResidualKMeans(2, 8, points_per_code=30, **options).fit(vectors)
    assert not np.array_equal(most.codebooks[0], ResidualKMeans(2, 8, **options).fit(vectors).codebooks[0])
    errors = ((vectors - most.decode(most.encode(vectors))) ** 2).sum(axis=1)
    whole = ResidualKMeans(2, 8, **options).fit(vectors)
    assert errors.mean() < 1.2 * ((vectors - whole.decode(whole.encode(vectors))) ** 2).sum(axis=1).mean()


def test_a_memory_map_is_not_held_in_memory(tmp_path) -> None:
    path = tmp_path / "vectors.npy"
    stored = np.lib.format.open_memmap(path, "w+", np.float32, (60_000, 128))
    generator = np.random.default_rng(13)
    for begin in range(0, 60_000, 6000):
        stored[begin : begin + 6000] = generator.normal(size=(6000, 128))
    stored.flush()
    mapped = np.load(path, mmap_mode="r")
    tracemalloc.start()
    quantizer = ResidualKMeans(2, 8, niter=3, points_per_code=100).fit(mapped)
    codes = quantizer.encode(mapped)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(codes) == 60_000
    assert peak < 0.5 * 60_000 * 128 * 8  # half of the float64 copy that there must not be


def test_every_level_uses_its_codes_on_item_texts(shared_data) -> None:
    from llmrec.embedding import static_embeddings

    with gzip.open(shared_data / "amazon-scientific" / "items.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [str(json.loads(line).get("title") or "") for line, _ in zip(file, range(800), strict=False)]
    vectors = static_embeddings(texts, 64)
    for options in OPTIONS:
        quantizer = ResidualKMeans(3, 128, niter=5, **options).fit(vectors)
        assert [len(np.unique(level)) >= 0.95 * 128 for level in quantizer.encode(vectors).T] == [True] * 3


def test_a_level_without_different_residuals_says_so(caplog: pytest.LogCaptureFixture) -> None:
    vectors = np.repeat(np.eye(4), 10, axis=0)
    quantizer = ResidualKMeans(2, 8).fit(vectors)
    assert len(np.unique(quantizer.encode(vectors)[:, 0])) == 4
    assert "Level 0 uses 4 of 8 codes" in caplog.text


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
    with pytest.raises(TokenizerError, match="points_per_code is -1"):
        ResidualKMeans(points_per_code=-1)
    with pytest.raises(TokenizerError, match="no init 'first'"):
        ResidualKMeans(init="first")
    with pytest.raises(TokenizerError, match="no codebooks yet"):
        ResidualKMeans().encode(np.ones((2, 2)))
    quantizer = ResidualKMeans(2, 2).fit(np.eye(3))
    with pytest.raises(TokenizerError, match="2 wide, the codebooks 3"):
        quantizer.encode(np.ones((2, 2)))
    for codes in ([[0, 2]], [[-1, 0]], [[0, 0, 0]]):
        with pytest.raises(TokenizerError):
            quantizer.decode(np.array(codes))
