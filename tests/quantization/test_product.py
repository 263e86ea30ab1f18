"""Product quantisation against its definition, optimised rotations against plain ones, and the order-free use."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization import product as module
from llmrec.quantization import resolve_collisions
from llmrec.quantization.codebooks import sampled_rows
from llmrec.quantization.product import Attempt, ProductQuantizer, unordered_scores


def mixture(items: int, seed: int, dimension: int = 12) -> np.ndarray:
    """Clusters of correlated columns, away from the origin."""
    generator = np.random.default_rng(seed)
    centres = 3 * generator.normal(size=(20, dimension))
    mixing = generator.normal(size=(dimension, dimension)) * np.linspace(2, 0.1, dimension)
    return (centres[generator.integers(0, 20, items)] + generator.normal(size=(items, dimension))) @ mixing + 5


def error_of(quantizer: ProductQuantizer, vectors: np.ndarray) -> float:
    points = quantizer.decode(quantizer.encode(vectors)).astype(np.float64)
    return float(((vectors - points) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(("dimension", "levels"), [(12, 4), (7, 3), (3, 3), (5, 1)])
def test_encode_is_the_nearest_of_all_combinations(rotate: bool, dimension: int, levels: int) -> None:
    vectors = mixture(300, seed=dimension, dimension=dimension)
    quantizer = ProductQuantizer(levels, 5, rotate, rounds=3).fit(vectors)
    every = np.stack(np.meshgrid(*[np.arange(5)] * levels, indexing="ij"), axis=-1).reshape(-1, levels)
    points = quantizer.decode(every).astype(np.float64)
    unseen = mixture(80, seed=99, dimension=dimension)
    codes = quantizer.encode(unseen)
    assert (codes.dtype, codes.shape) == (np.dtype(np.int32), (80, levels))
    best = ((unseen[:, None] - points[None]) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(codes, every[best])


@pytest.mark.parametrize("rotate", [False, True])
def test_decode_and_encode_are_idempotent(rotate: bool) -> None:
    quantizer = ProductQuantizer(3, 32, rotate, rounds=3).fit(mixture(500, seed=0))
    codes = quantizer.encode(mixture(500, seed=1))
    np.testing.assert_array_equal(quantizer.encode(quantizer.decode(codes)), codes)
    points = sum(quantizer.level_points(level)[codes[:, level]] for level in range(3))
    np.testing.assert_allclose(points, quantizer.decode(codes), rtol=1e-5, atol=1e-5)


def test_plain_sub_vectors_are_columns_side_by_side() -> None:
    vectors = mixture(200, seed=3, dimension=7)
    quantizer = ProductQuantizer(3, 8, rotate=False).fit(vectors)
    np.testing.assert_array_equal(quantizer.rotation, np.eye(7))
    assert [codebook.shape for codebook in quantizer.codebooks] == [(8, 3), (8, 2), (8, 2)]
    codes = quantizer.encode(vectors)
    parts = [codebook[codes[:, level]] for level, codebook in enumerate(quantizer.codebooks)]
    np.testing.assert_allclose(
        quantizer.decode(codes), np.concatenate(parts, axis=1) + vectors.mean(axis=0), rtol=1e-5
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_rotation_is_orthogonal_and_never_worse(seed: int) -> None:
    vectors = mixture(600, seed)
    plain, rotated = (ProductQuantizer(4, 16, rotate, seed=seed).fit(vectors) for rotate in (False, True))
    np.testing.assert_allclose(rotated.rotation @ rotated.rotation.T, np.eye(12), atol=1e-9)
    assert error_of(rotated, vectors) <= error_of(plain, vectors) * (1 + 1e-6)


def test_the_rotation_unites_what_belongs_together() -> None:
    # Two planes with three points each, hidden by a rotation: 9 places, which OPQ finds and PQ cannot.
    generator = np.random.default_rng(5)
    corners = np.array([[0, 0], [8, 1], [2, 9]], dtype=np.float64)
    vectors = np.concatenate(
        [corners[generator.integers(0, 3, 400)], 3 * corners[generator.integers(0, 3, 400)]], axis=1
    )
    hidden = np.linalg.qr(generator.normal(size=(4, 4)))[0]
    vectors = vectors @ hidden + 0.01 * generator.normal(size=(400, 4))
    assert error_of(ProductQuantizer(2, 3, rotate=True).fit(vectors), vectors) < 0.01
    assert error_of(ProductQuantizer(2, 3, rotate=False).fit(vectors), vectors) > 1


def test_rotations_beyond_the_first_improve() -> None:
    vectors = mixture(800, seed=7)
    few, many = (ProductQuantizer(4, 16, rounds=rounds).fit(vectors) for rounds in (1, 12))
    assert error_of(many, vectors) < error_of(few, vectors)


@pytest.mark.parametrize("good", [1, 2, 4, 7])
def test_the_best_attempt_is_kept(good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1: no rotation, 2: the parametric one, then five rounds. All but one are made to look worse.
    attempts: list[Attempt] = []
    trained = ProductQuantizer._trained

    def spoilt(self: ProductQuantizer, *arguments: object) -> Attempt:
        attempt = trained(self, *arguments)
        attempts.append(attempt if len(attempts) + 1 == good else attempt._replace(error=attempt.error * 100))
        return attempts[-1]

    monkeypatch.setattr(ProductQuantizer, "_trained", spoilt)
    quantizer = ProductQuantizer(3, 8, rounds=5).fit(mixture(300, seed=8))
    assert len(attempts) == 8
    assert quantizer.codebooks is attempts[good - 1].codebooks
    assert quantizer.rotation is attempts[good - 1].rotation


def test_variance_is_shared_out_evenly() -> None:
    variances = np.array([64.0, 32, 16, 8, 4, 2])
    vectors = np.random.default_rng(0).normal(size=(5000, 6)) * np.sqrt(variances)
    quantizer = ProductQuantizer(2, 4)
    rotation = quantizer._balanced((vectors - vectors.mean(axis=0)).astype(np.float32))
    spread = ((vectors @ rotation.T).var(axis=0)).reshape(2, 3)
    # In turns 64 | 32, 16 (the lesser product), 8, then whatever room is left: both products are alike.
    np.testing.assert_allclose(np.sort(spread.ravel()), variances[::-1], rtol=0.1)
    assert 0.2 < spread[0].prod() / spread[1].prod() < 5


def test_same_seed_same_codes_other_seed_others() -> None:
    vectors = mixture(400, seed=2)
    first, again, other = (ProductQuantizer(3, 16, rounds=2, seed=seed).fit(vectors) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.rotation, again.rotation)
    for left, right in zip(first.codebooks, again.codebooks, strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(first.codebooks[0], other.codebooks[0])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_tokens_come_back_from_any_order(data: st.DataObject) -> None:
    quantizer = ProductQuantizer(3, 4, rotate=False).fit(np.random.default_rng(0).normal(size=(9, 6)))
    code = st.lists(st.integers(0, 3), min_size=3, max_size=3)
    codes = np.array(data.draw(st.lists(code, min_size=1, max_size=6)))
    tokens = quantizer.as_tokens(codes)
    assert tokens.tolist() == [[a, 4 + b, 8 + c] for a, b, c in codes.tolist()]
    shuffled = np.array([data.draw(st.permutations(row)) for row in tokens.tolist()])
    np.testing.assert_array_equal(quantizer.from_tokens(shuffled), codes)


@pytest.mark.parametrize("tokens", [[[0, 1, 8]], [[0, 4, 12]], [[-1, 4, 8]], [[0, 4]], [[4, 8, 9]]])
def test_tokens_that_are_no_code_are_refused(tokens: list[list[int]]) -> None:
    quantizer = ProductQuantizer(3, 4, rotate=False).fit(np.random.default_rng(0).normal(size=(9, 6)))
    with pytest.raises(TokenizerError, match="holds one of each of 3 sub-spaces"):
        quantizer.from_tokens(np.array(tokens))


def test_unordered_scores_are_sums_of_what_each_place_says() -> None:
    generator = np.random.default_rng(1)
    predicted = [generator.normal(size=(5, size)) for size in (3, 4, 2)]
    codes = np.column_stack([generator.integers(0, size, 11) for size in (3, 4, 2)])
    expected = [[sum(predicted[level][b, codes[n, level]] for level in range(3)) for n in range(11)] for b in range(5)]
    np.testing.assert_allclose(unordered_scores(predicted, codes), expected)
    assert ProductQuantizer.ordered is False
    with pytest.raises(TokenizerError, match="outside the codebooks"):
        unordered_scores(predicted, codes + 2)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("items", [1, 2, 6])
def test_small_catalogs_have_as_many_codes_as_items(
    rotate: bool, items: int, caplog: pytest.LogCaptureFixture
) -> None:
    vectors = np.random.default_rng(3).normal(size=(items, 4))
    quantizer = ProductQuantizer(2, 256, rotate).fit(vectors)
    assert quantizer.codebook_sizes == (items, items)
    assert f"{items} items: codebooks have {items} codes, not 256" in caplog.text
    np.testing.assert_allclose(quantizer.decode(quantizer.encode(vectors)), vectors, atol=1e-5)


@pytest.mark.parametrize("vectors", [np.ones((20, 4)), np.zeros((20, 4)), np.repeat(np.eye(4), 5, axis=0)])
def test_equal_items_share_one_code_that_can_be_resolved(vectors: np.ndarray) -> None:
    quantizer = ProductQuantizer(2, 8).fit(vectors)
    codes = quantizer.encode(vectors)
    assert len(np.unique(codes, axis=0)) == len(np.unique(vectors, axis=0))
    np.testing.assert_allclose(quantizer.decode(codes), vectors, atol=1e-5)
    assert len(np.unique(resolve_collisions(codes, vectors, quantizer).codes, axis=0)) == 20


def test_half_precision_and_batches_give_the_same_codes() -> None:
    vectors = mixture(300, seed=4).astype(np.float16)
    quantizer = ProductQuantizer(3, 16, rounds=2).fit(vectors)
    whole = quantizer.encode(vectors)
    np.testing.assert_array_equal(whole, quantizer.encode(vectors.astype(np.float32)))
    np.testing.assert_array_equal(whole[100:], quantizer.encode(vectors[100:]))


def test_fit_learns_from_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = mixture(2000, seed=0)
    whole = ProductQuantizer(2, 8, rounds=1).fit(vectors)
    monkeypatch.setattr(module, "ITEMS_PER_CENTROID", 5)
    few = ProductQuantizer(2, 8, rounds=1).fit(vectors)
    expected = ProductQuantizer(2, 8, rounds=1).fit(vectors[sampled_rows(2000, 40, 0)])
    assert error_of(few, vectors) > 1.05 * error_of(whole, vectors)
    assert error_of(few, vectors) == pytest.approx(error_of(expected, vectors), rel=0.2)
    np.testing.assert_array_equal(few.mean, whole.mean)


def test_saved_and_loaded(tmp_path: Path) -> None:
    vectors = mixture(100, seed=6)
    quantizer = ProductQuantizer(3, 16, niter=7, rounds=2, seed=3).fit(vectors)
    quantizer.save(tmp_path / "codebooks")
    assert sorted(path.name for path in (tmp_path / "codebooks").iterdir()) == [
        "codebooks.safetensors",
        "quantizer.json",
    ]
    loaded = ProductQuantizer.from_pretrained(tmp_path / "codebooks")
    assert (loaded.num_levels, loaded.codebook_size, loaded.rotate) == (3, 16, True)
    assert (loaded.niter, loaded.rounds, loaded.seed) == (7, 2, 3)
    np.testing.assert_array_equal(loaded.encode(vectors), quantizer.encode(vectors))
    np.testing.assert_array_equal(loaded.decode(loaded.encode(vectors)), quantizer.decode(quantizer.encode(vectors)))


def test_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    def saved() -> None:
        ProductQuantizer(2, 4, rounds=1).fit(np.random.default_rng(0).normal(size=(9, 6))).save(tmp_path)

    saved()
    tensors, manifest = tmp_path / "codebooks.safetensors", tmp_path / "quantizer.json"
    for part in (0, 5, 100, -1):
        tensors.write_bytes(tensors.read_bytes()[:part])
        with pytest.raises(ArtefactError, match="holds no"):
            ProductQuantizer.from_pretrained(tmp_path)
        saved()
    document = json.loads(manifest.read_text())
    for change in ({"quantizer": "scalar"}, {"num_levels": 3}, {"num_levels": 0}, {"unknown": 1}, {"niter": "x"}):
        manifest.write_text(json.dumps({**document, **change}))
        with pytest.raises(ArtefactError, match="holds no"):
            ProductQuantizer.from_pretrained(tmp_path)
    manifest.unlink()
    with pytest.raises(ArtefactError, match="holds no"):
        ProductQuantizer.from_pretrained(tmp_path)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(9, 6))
    for name, value in (("rotation", np.eye(5)), ("mean", np.full(6, np.nan)), ("mean", np.zeros(7))):
        quantizer = ProductQuantizer(2, 4, rounds=1).fit(vectors)
        setattr(quantizer, name, value)
        quantizer.save(tmp_path)
        with pytest.raises(ArtefactError, match="holds no"):
            ProductQuantizer.from_pretrained(tmp_path)


def test_misuse_is_refused() -> None:
    for name in ("num_levels", "codebook_size", "niter", "rounds"):
        with pytest.raises(TokenizerError, match=f"{name} is 0"):
            ProductQuantizer(**{name: 0})
    for use in (lambda q: q.encode(np.ones((2, 2))), lambda q: q.codebook_sizes, lambda q: q.save("nowhere")):
        with pytest.raises(TokenizerError, match="no codebooks yet"):
            use(ProductQuantizer())
    with pytest.raises(TokenizerError, match="3 wide cannot be cut into 4"):
        ProductQuantizer(4).fit(np.ones((5, 3)))
    with pytest.raises(TokenizerError, match="row 1 first"):
        ProductQuantizer(1).fit(np.array([[0.0], [np.nan]]))
    quantizer = ProductQuantizer(2, 2).fit(np.eye(3))
    with pytest.raises(TokenizerError, match="2 wide, the codebooks 3"):
        quantizer.encode(np.ones((2, 2)))
    with pytest.raises(TokenizerError, match=r"2 row\(s\) .* such as row 1 \(\[0, 2\]\)"):
        quantizer.decode(np.array([[0, 0], [0, 2], [-1, 0]]))
    with pytest.raises(TokenizerError, match="do not have 2 levels"):
        quantizer.decode(np.array([[0, 0, 0]]))
    with pytest.raises(TokenizerError, match="not whole numbers"):
        quantizer.decode(np.array([[0.0, 1.0]]))
    assert quantizer.decode(np.empty((0, 2), dtype=np.int32)).shape == (0, 3)
