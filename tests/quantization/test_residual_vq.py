"""The beam search against its definition, and codebooks learnt together against greedy ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization import ResidualKMeans, resolve_collisions
from llmrec.quantization import residual_vq as module
from llmrec.quantization.residual_vq import ResidualVQ


def quantizer_of(codebooks: list[np.ndarray], beam: int) -> ResidualVQ:
    quantizer = ResidualVQ(len(codebooks), max(len(codebook) for codebook in codebooks), beam)
    quantizer.codebooks = tuple(np.asarray(codebook, dtype=np.float32) for codebook in codebooks)
    return quantizer


def mixture(items: int, seed: int, dimension: int = 16) -> np.ndarray:
    """Items of one distribution: the seed draws the items, not the clusters."""
    fixed, generator = np.random.default_rng(123), np.random.default_rng(seed)
    centres = 2 * fixed.normal(size=(40, dimension))
    mixing = fixed.normal(size=(dimension, dimension)) * np.linspace(2, 0.2, dimension)
    return (centres[generator.integers(0, 40, items)] + generator.normal(size=(items, dimension))) @ mixing


def errors_of(quantizer: ResidualVQ | ResidualKMeans, vectors: np.ndarray) -> np.ndarray:
    points = quantizer.decode(quantizer.encode(vectors)).astype(np.float64)
    return ((vectors - points) ** 2).sum(axis=1)


def square(vector: np.ndarray, chosen: tuple[int, ...], codebooks: list[np.ndarray]) -> float:
    point = sum(codebooks[level][code].astype(np.float64) for level, code in enumerate(chosen))
    return float(((vector - point) ** 2).sum())


def brute_force(vector: np.ndarray, codebooks: list[np.ndarray], beam: int) -> tuple[int, ...]:
    """One item: partial codes as tuples, every sum measured directly; greedy if that is strictly nearer."""

    def search(width: int) -> tuple[int, ...]:
        kept: list[tuple[int, ...]] = [()]
        for codebook in codebooks:
            grown = [(*prefix, code) for prefix in kept for code in range(len(codebook))]
            kept = sorted(grown, key=lambda chosen: square(vector, chosen, codebooks))[:width]
        return kept[0]

    wide, greedy = search(beam), search(1)
    return greedy if square(vector, greedy, codebooks) < square(vector, wide, codebooks) else wide


@pytest.mark.parametrize("beam", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_encode_is_the_beam_search(beam: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(seed)
    codebooks = [generator.normal(size=(size, 3)) / 2**level for level, size in enumerate((4, 6, 5))]
    vectors = generator.normal(size=(60, 3))
    quantizer = quantizer_of(codebooks, beam)
    codes = quantizer.encode(vectors)
    assert codes.dtype == np.int32
    expected = [brute_force(vector, list(quantizer.codebooks), beam) for vector in vectors]
    np.testing.assert_array_equal(codes, expected)
    monkeypatch.setattr(module, "ENTRIES", 50)
    np.testing.assert_array_equal(quantizer.encode(vectors), codes)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_ties_go_to_the_nearer_prefix_then_the_lower_code(data: st.DataObject) -> None:
    # Small integers: sums and squares are exact, and many are equal.
    levels, dimension, beam = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    point = st.lists(st.integers(-2, 2), min_size=dimension, max_size=dimension)
    codebooks = [np.array(data.draw(st.lists(point, min_size=1, max_size=4)), dtype=float) for _ in range(levels)]
    vectors = np.array(data.draw(st.lists(point, min_size=1, max_size=5)), dtype=float)
    codes = quantizer_of(codebooks, beam).encode(vectors)
    assert codes.tolist() == [list(brute_force(vector, codebooks, beam)) for vector in vectors]


@pytest.mark.parametrize("seed", range(3))
def test_an_exhaustive_beam_finds_the_nearest_of_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    codebooks = [generator.normal(size=(4, 2)) for _ in range(3)]
    quantizer = quantizer_of(codebooks, beam=16)
    every = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    points = quantizer.decode(every).astype(np.float64)
    vectors = generator.normal(size=(100, 2))
    nearest = ((vectors[:, None] - points[None]) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(quantizer.encode(vectors), every[nearest])
    sums = sum(quantizer.level_points(level)[every[:, level]] for level in range(3))
    np.testing.assert_allclose(sums, points, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(quantizer.encode(quantizer.decode(every)), every)


@pytest.mark.parametrize("beam", [1, 2, 5])
def test_no_item_is_coded_worse_than_greedily(beam: int) -> None:
    generator = np.random.default_rng(beam)
    codebooks = [generator.normal(size=(8, 4)) for _ in range(4)]  # not residual: greedy paths are often lost
    vectors = generator.normal(size=(2000, 4))
    greedy, searched = (errors_of(quantizer_of(codebooks, width), vectors) for width in (1, beam))
    assert (searched <= greedy + 1e-5).all()
    assert beam == 1 or searched.mean() < 0.9 * greedy.mean()


def test_the_greedy_path_is_kept_when_the_beam_loses_it() -> None:
    # Of 0: 0.5 is nearer than -1, but -1 + 1.1 and -1 + 0.9 then fill the beam, and 0.5 + 0.9 - 1.4 is exact.
    quantizer = quantizer_of([[[0.5], [-1.0]], [[1.1], [0.9]], [[-1.4], [5.0]]], beam=2)
    assert quantizer.encode(np.array([[0.0]])).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_distortion_is_below_greedy_residual_kmeans(seed: int) -> None:
    vectors, unseen = mixture(3000, seed), mixture(2000, 100 + seed)
    greedy = ResidualKMeans(3, 16, seed=seed).fit(vectors)
    for beam, bound in ((1, 1.0), (5, 0.97)):
        together = ResidualVQ(3, 16, beam, seed=seed).fit(vectors)
        assert errors_of(together, vectors).mean() <= bound * errors_of(greedy, vectors).mean()
        assert errors_of(together, unseen).mean() <= bound * errors_of(greedy, unseen).mean()


def test_distortion_is_not_above_faiss() -> None:
    import faiss

    vectors, unseen = (mixture(3000, seed).astype(np.float32) for seed in (0, 1))
    reference = faiss.ResidualQuantizer(16, 3, 4)
    reference.max_beam_size = 5
    reference.train(vectors)
    points = reference.decode(reference.compute_codes(unseen))
    quantizer = ResidualVQ(3, 16, beam=5).fit(vectors)
    assert errors_of(quantizer, unseen).mean() <= ((unseen - points) ** 2).sum(axis=1).mean()


def test_rounds_learn() -> None:
    vectors = mixture(2000, 3)
    few, many = (errors_of(ResidualVQ(3, 16, rounds=rounds).fit(vectors), vectors).mean() for rounds in (1, 12))
    assert many < 0.995 * few


@pytest.mark.parametrize("seed", range(5))
def test_a_sweep_puts_every_level_at_its_best_place(seed: int) -> None:
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(200, 3))
    codes = np.column_stack([generator.integers(0, 5, 200), generator.integers(0, 5, 200)]).astype(np.int32)
    quantizer = quantizer_of([generator.normal(size=(6, 3)), generator.normal(size=(5, 3))], beam=2)
    before = ((vectors - quantizer.decode(codes)) ** 2).sum(axis=1)
    second = quantizer.codebooks[1]
    moved = quantizer._moved(vectors, codes, before)
    for code in range(5):
        rows = codes[:, 0] == code
        np.testing.assert_allclose(moved[0][code], (vectors[rows] - second[codes[rows, 1]]).mean(axis=0), atol=1e-5)
        rows = codes[:, 1] == code
        np.testing.assert_allclose(moved[1][code], (vectors[rows] - moved[0][codes[rows, 0]]).mean(axis=0), atol=1e-5)
    # No item has code 5 of the first level: it now fits the worst item, whose second code stood.
    worst = int(before.argmax())
    np.testing.assert_allclose(moved[0][5], vectors[worst] - second[codes[worst, 1]], atol=1e-5)
    quantizer.codebooks = moved
    assert ((vectors - quantizer.decode(codes)) ** 2).sum() < before.sum()


def test_same_seed_same_codebooks_other_seed_others() -> None:
    vectors = mixture(500, 2)
    first, again, other = (ResidualVQ(2, 16, rounds=3, seed=seed).fit(vectors) for seed in (0, 0, 1))
    for left, right in zip(first.codebooks, again.codebooks, strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(first.codebooks[0], other.codebooks[0])
    assert ResidualVQ.ordered is True


@pytest.mark.parametrize("items", [1, 2, 10])
def test_small_catalogs_have_as_many_codes_as_items(items: int, caplog: pytest.LogCaptureFixture) -> None:
    vectors = np.random.default_rng(3).normal(size=(items, 4))
    quantizer = ResidualVQ(3, 256).fit(vectors)
    assert quantizer.codebook_sizes == (items,) * 3
    assert f"{items} items: codebooks have {items} codes, not 256" in caplog.text
    codes = quantizer.encode(vectors)
    np.testing.assert_allclose(quantizer.decode(codes), vectors, atol=1e-5)
    assert len(np.unique(codes, axis=0)) == items


@pytest.mark.parametrize("vectors", [np.ones((20, 4)), np.zeros((20, 4)), np.repeat(np.eye(4), 5, axis=0)])
def test_equal_items_share_one_code_that_can_be_resolved(vectors: np.ndarray) -> None:
    quantizer = ResidualVQ(3, 8).fit(vectors)
    codes = quantizer.encode(vectors)
    assert len(np.unique(codes, axis=0)) == len(np.unique(vectors, axis=0))
    np.testing.assert_allclose(quantizer.decode(codes), vectors, atol=1e-5)
    assert len(np.unique(resolve_collisions(codes, vectors, quantizer).codes, axis=0)) == 20


def test_saved_and_loaded(tmp_path: Path) -> None:
    vectors = mixture(100, 4)
    quantizer = ResidualVQ(2, 16, beam=3, rounds=2, niter=7, seed=3).fit(vectors)
    quantizer.save(tmp_path)
    loaded = ResidualVQ.from_pretrained(tmp_path)
    settings = ("num_levels", "codebook_size", "beam", "rounds", "niter", "seed")
    assert [getattr(loaded, name) for name in settings] == [2, 16, 3, 2, 7, 3]
    np.testing.assert_array_equal(loaded.encode(vectors), quantizer.encode(vectors))
    document = json.loads((tmp_path / "quantizer.json").read_text())
    for change in ({"quantizer": "product"}, {"num_levels": 3}, {"beam": 0}, {"other": 1}):
        (tmp_path / "quantizer.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(ArtefactError, match="holds no"):
            ResidualVQ.from_pretrained(tmp_path)
    (tmp_path / "quantizer.json").write_text(json.dumps(document))
    whole = (tmp_path / "codebooks.safetensors").read_bytes()
    for part in (0, 40, len(whole) - 1):
        (tmp_path / "codebooks.safetensors").write_bytes(whole[:part])
        with pytest.raises(ArtefactError, match="holds no residual_vq quantizer"):
            ResidualVQ.from_pretrained(tmp_path)
    quantizer.codebooks = (quantizer.codebooks[0], quantizer.codebooks[1][:, :3])
    quantizer.save(tmp_path)
    with pytest.raises(ArtefactError, match="codebooks of shapes"):
        ResidualVQ.from_pretrained(tmp_path)


def test_misuse_is_refused() -> None:
    for name in ("num_levels", "codebook_size", "beam", "rounds", "niter"):
        with pytest.raises(TokenizerError, match=f"{name} is 0"):
            ResidualVQ(**{name: 0})
    with pytest.raises(TokenizerError, match="no codebooks yet"):
        ResidualVQ().encode(np.ones((2, 2)))
    with pytest.raises(TokenizerError, match="no codebooks yet"):
        ResidualVQ().save("nowhere")
    for bad in (np.zeros((0, 3)), np.zeros(3), np.array([[np.nan]]), np.array([[np.inf]])):
        with pytest.raises(TokenizerError):
            ResidualVQ().fit(bad)
    quantizer = ResidualVQ(2, 2).fit(np.eye(3))
    with pytest.raises(TokenizerError, match="2 wide, the codebooks 3"):
        quantizer.encode(np.ones((2, 2)))
    for codes in ([[0, 2]], [[-1, 0]], [[0, 0, 0]]):
        with pytest.raises(TokenizerError):
            quantizer.decode(np.array(codes))
