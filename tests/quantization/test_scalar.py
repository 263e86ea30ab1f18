"""Finite scalar quantisation against its definition: components by the SVD, steps by counting, digits by hand."""

import json
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization import resolve_collisions
from llmrec.quantization.scalar import ScalarQuantizer, _lowered, _quantile_edges

EVERY = [
    {},
    {"bound": "tanh"},
    {"layout": "components"},
    {"layout": "components", "bound": "tanh"},
    {"shared": True},
    {"shared": True, "bound": "tanh"},
]


def correlated(items: int, seed: int, dimension: int = 12) -> np.ndarray:
    """Columns that depend on each other, away from the origin, of one distribution whatever the seed."""
    mixing = np.random.default_rng(77).normal(size=(dimension, dimension)) * np.linspace(3, 0.3, dimension)
    return np.random.default_rng(seed).normal(size=(items, dimension)) @ mixing + 4


def error_of(quantizer: ScalarQuantizer, vectors: np.ndarray) -> float:
    points = quantizer.decode(quantizer.encode(vectors)).astype(np.float64)
    return float(((vectors - points) ** 2).sum(axis=1).mean())


def whitened(vectors: np.ndarray) -> np.ndarray:
    """Principal components of variance 1, the largest first; the sign of each is such that its direction's entry of
    largest magnitude is positive."""
    centred = vectors - vectors.mean(axis=0)
    left, _, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    return left * signs * np.sqrt(len(vectors))


def test_slices_by_the_definition() -> None:
    vectors = correlated(211, 0, dimension=7)
    quantizer = ScalarQuantizer(2, (4, 3)).fit(vectors)
    codes = quantizer.encode(vectors)
    assert (codes.dtype, quantizer.codebook_sizes) == (np.dtype(np.int32), (12, 12))
    for group, part in enumerate((vectors[:, :4], vectors[:, 4:])):
        numbers = whitened(part)
        places = numbers.argsort(axis=0).argsort(axis=0)  # of every item among all, by each component
        # Step k holds the places from floor(k N / steps) on.
        first, second = (
            np.searchsorted(np.arange(1, steps) * 211 // steps, places[:, d], side="right")
            for d, steps in ((0, 4), (1, 3))
        )
        np.testing.assert_array_equal(codes[:, group], first + 4 * second)


def test_components_are_dealt_out() -> None:
    vectors = correlated(300, 1, dimension=6)
    quantizer = ScalarQuantizer(2, (5, 2), layout="components", bound="tanh").fit(vectors)
    numbers = whitened(vectors)
    steps = np.floor((np.tanh(numbers) + 1) / 2 * np.array([5, 5, 2, 2, 1, 1]))
    expected = np.column_stack([steps[:, 0] + 5 * steps[:, 2], steps[:, 1] + 5 * steps[:, 3]])
    np.testing.assert_array_equal(quantizer.encode(vectors), expected)


def test_shared_groups_have_one_meaning() -> None:
    vectors = correlated(400, 2, dimension=9)
    quantizer = ScalarQuantizer(3, (4, 3), shared=True).fit(vectors)
    stacked = vectors.reshape(-1, 3)
    numbers = whitened(stacked)[:, :2]
    digits = [np.floor(numbers[:, d].argsort().argsort() * steps / 1200) for d, steps in ((0, 4), (1, 3))]
    np.testing.assert_array_equal(quantizer.encode(vectors).reshape(-1), digits[0] + 4 * digits[1])
    # A sub-vector has the same code in every group, and a code the same sub-vector.
    same = np.tile(stacked[:50], (1, 3))
    codes = quantizer.encode(same)
    assert (codes == codes[:, :1]).all()
    points = quantizer.decode(codes).reshape(50, 3, 3)
    np.testing.assert_allclose(points, np.repeat(points[:, :1], 3, axis=1), rtol=1e-5)


@pytest.mark.parametrize("options", EVERY)
def test_decode_is_the_step_means_projected_back(options: dict) -> None:
    vectors = correlated(500, 3)
    quantizer = ScalarQuantizer(3, (4, 3), **options).fit(vectors)
    numbers = (vectors - quantizer.mean) @ quantizer.projection
    codes = quantizer.encode(vectors)
    digits = np.stack([codes % 4, codes // 4], axis=2).reshape(500, 6)
    means = np.empty((500, 6))
    for row, place in product(range(500), range(6)):
        same = range(place % 2, 6, 2) if options.get("shared") else [place]
        members = [numbers[digits[:, other] == digits[row, place], other] for other in same]
        means[row, place] = np.concatenate(members).mean()
    expected = means @ np.linalg.pinv(quantizer.projection) + quantizer.mean
    np.testing.assert_allclose(quantizer.decode(codes), expected, rtol=1e-4, atol=1e-4)
    points = sum(quantizer.level_points(level)[codes[:, level]] for level in range(3))
    np.testing.assert_allclose(points, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", EVERY)
def test_decode_and_encode_are_idempotent(options: dict) -> None:
    quantizer = ScalarQuantizer(3, (5, 4, 2), **options).fit(correlated(800, 4))
    for codes in (quantizer.encode(correlated(500, 5)), quantizer.encode(3 * correlated(100, 6))):
        np.testing.assert_array_equal(quantizer.encode(quantizer.decode(codes)), codes)
    every = np.tile(np.arange(40)[:, None], (1, 3))
    np.testing.assert_array_equal(quantizer.encode(quantizer.decode(every)), every)


@pytest.mark.parametrize("options", [{}, {"layout": "components"}])
def test_quantiles_use_every_step_alike(options: dict) -> None:
    # Long tails: tanh would leave steps nearly empty.
    vectors = np.random.default_rng(5).standard_t(2, size=(1003, 8))
    quantizer = ScalarQuantizer(2, (8, 5), **options).fit(vectors)
    codes = quantizer.encode(vectors)
    for digits, steps in ((codes % 8, 8), (codes // 8, 5)):
        for group in digits.T:
            counts = np.bincount(group, minlength=steps)
            assert len(counts) == steps
            assert counts.max() - counts.min() <= 1


def test_recgpt_levels() -> None:
    vectors = correlated(15_360, 6, dimension=20)
    quantizer = ScalarQuantizer().fit(vectors)
    assert quantizer.steps == (8, 8, 8, 6, 5)
    assert quantizer.codebook_sizes == (15_360,) * 4
    codes = quantizer.encode(vectors)
    # All five components of every slice are used, so that each code of 15,360 is about one item's.
    assert all(len(np.unique(level)) > 0.5 * 15_360 for level in codes.T)
    assert error_of(quantizer, vectors) < 0.2 * vectors.var(axis=0).sum()


def test_more_steps_and_better_layouts_lower_the_error() -> None:
    vectors = correlated(2000, 7)
    coarse, fine = (error_of(ScalarQuantizer(2, levels).fit(vectors), vectors) for levels in ((2, 2), (8, 8)))
    dealt = error_of(ScalarQuantizer(2, (8, 8), layout="components").fit(vectors), vectors)
    assert dealt < fine < coarse < vectors.var(axis=0).sum()


def test_one_number_per_code() -> None:
    vectors = correlated(300, 8, dimension=3)
    quantizer = ScalarQuantizer(3, (50,), layout="components").fit(vectors)
    places = whitened(vectors).argsort(axis=0).argsort(axis=0)
    np.testing.assert_array_equal(quantizer.encode(vectors), places // 6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 6))
def test_quantile_edges_keep_equal_values_together(values: list[int], steps: int) -> None:
    numbers = np.array(values, dtype=np.float64)
    edges = _quantile_edges(numbers, steps)
    assert len(edges) == steps - 1
    assert (np.diff(edges) >= 0).all()
    assert not np.isin(edges, numbers).any()
    for step, edge in enumerate(edges):
        below = (numbers < edge).sum()
        # At least the share that is asked for, and without the last group of equal values less than it.
        share = max((step + 1) * len(values) // steps, 1)
        assert below >= share
        assert (numbers < numbers[numbers < edge].max()).sum() < share


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 500))
def test_levels_are_lowered_to_the_items(levels: list[int], items: int) -> None:
    expected = list(levels)
    while prod(expected) > items:
        expected[max(d for d, level in enumerate(expected) if level == max(expected))] -= 1
    assert _lowered(levels, items) == tuple(expected)


@pytest.mark.parametrize("options", EVERY)
@pytest.mark.parametrize("items", [1, 2, 50])
def test_small_catalogs_have_no_more_codes_than_items(
    options: dict, items: int, caplog: pytest.LogCaptureFixture
) -> None:
    vectors = np.random.default_rng(3).normal(size=(items, 24))
    quantizer = ScalarQuantizer(**options).fit(vectors)
    assert max(quantizer.codebook_sizes) <= items
    assert f"{items} items: the levels are {quantizer.steps}" in caplog.text
    codes = quantizer.encode(vectors)
    assert len(np.unique(resolve_collisions(codes, vectors, quantizer).codes, axis=0)) == items
    if items == 1:  # nothing but the mean, of the sub-vectors if they share one
        mean = np.tile(vectors.reshape(4, 6).mean(axis=0), 4) if options.get("shared") else vectors[0]
        np.testing.assert_allclose(quantizer.decode(codes)[0], mean, rtol=1e-5)


def test_large_catalogs_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    ScalarQuantizer(2, (3, 2)).fit(correlated(6, 0))
    assert not caplog.text


@pytest.mark.parametrize("options", EVERY)
@pytest.mark.parametrize("vectors", [np.ones((30, 6)), np.zeros((30, 6)), np.repeat(np.eye(6), 5, axis=0)])
def test_equal_items_share_one_code_that_can_be_resolved(options: dict, vectors: np.ndarray) -> None:
    quantizer = ScalarQuantizer(3, (3, 2), **options).fit(vectors)
    codes = quantizer.encode(vectors)
    assert np.isfinite(quantizer.decode(codes)).all()
    for row in range(0, 30, 5):
        assert (codes[row : row + 5] == codes[row]).all()
    if len(np.unique(vectors)) == 1:
        np.testing.assert_allclose(quantizer.decode(codes), vectors, atol=1e-6)
    assert len(np.unique(resolve_collisions(codes, vectors, quantizer).codes, axis=0)) == 30


def test_constant_columns_carry_nothing() -> None:
    vectors = np.column_stack([np.random.default_rng(0).normal(size=(60, 2)), np.full((60, 2), 7.0)])
    quantizer = ScalarQuantizer(2, (4, 4)).fit(vectors)
    codes = quantizer.encode(vectors)
    assert len(np.unique(codes[:, 1])) == 1
    assert len(np.unique(codes[:, 0])) > 10
    np.testing.assert_allclose(quantizer.decode(codes)[:, 2:], 7)


@pytest.mark.parametrize("options", EVERY)
def test_saved_and_loaded(tmp_path: Path, options: dict) -> None:
    vectors = correlated(200, 9)
    quantizer = ScalarQuantizer(3, [6, 1, 5], **options).fit(vectors)
    quantizer.save(tmp_path)
    loaded = ScalarQuantizer.from_pretrained(tmp_path)
    names = ("num_levels", "levels", "layout", "bound", "shared", "steps", "codebook_sizes")
    assert [getattr(loaded, name) for name in names] == [getattr(quantizer, name) for name in names]
    np.testing.assert_array_equal(loaded.encode(vectors), quantizer.encode(vectors))
    codes = quantizer.encode(vectors)
    np.testing.assert_array_equal(loaded.decode(codes), quantizer.decode(codes))
    again = ScalarQuantizer(3, [6, 1, 5], **options).fit(vectors)
    np.testing.assert_array_equal(again.projection, quantizer.projection)


def test_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    ScalarQuantizer(3, (3, 2)).fit(correlated(50, 0)).save(tmp_path)
    document = json.loads((tmp_path / "quantizer.json").read_text())
    changes = (
        {"quantizer": "product"},
        {"steps": [3, 3, 3]},
        {"steps": [4, 2]},
        {"steps": [3, 0]},
        {"num_levels": 2},
        {"bound": "none"},
        {"levels": []},
        {"other": 1},
    )
    for change in changes:
        (tmp_path / "quantizer.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(ArtefactError, match="holds no"):
            ScalarQuantizer.from_pretrained(tmp_path)
    (tmp_path / "quantizer.json").write_text(json.dumps(document))
    whole = (tmp_path / "codebooks.safetensors").read_bytes()
    for part in (0, 40, len(whole) - 1):
        (tmp_path / "codebooks.safetensors").write_bytes(whole[:part])
        with pytest.raises(ArtefactError, match="holds no scalar quantizer"):
            ScalarQuantizer.from_pretrained(tmp_path)


def test_misuse_is_refused() -> None:
    for options, message in (
        ({"num_levels": 0}, "num_levels is 0"),
        ({"levels": (8, 0)}, r"levels\[1\] is 0"),
        ({"levels": ()}, "do not give 1 to"),
        ({"levels": (2**16, 2**16)}, "do not give 1 to"),
        ({"layout": "rows"}, "no layout 'rows'"),
        ({"bound": "clip"}, "no bound 'clip'"),
        ({"layout": "components", "shared": True}, "cannot share a vocabulary"),
    ):
        with pytest.raises(TokenizerError, match=message):
            ScalarQuantizer(**options)
    for use in (lambda q: q.encode(np.ones((2, 2))), lambda q: q.codebook_sizes, lambda q: q.save("nowhere")):
        with pytest.raises(TokenizerError, match="no codebooks yet"):
            use(ScalarQuantizer())
    with pytest.raises(TokenizerError, match="19 wide in 4 slices do not have 5 components"):
        ScalarQuantizer().fit(np.ones((5, 19)))
    with pytest.raises(TokenizerError, match="19 wide do not have 4 x 5 components"):
        ScalarQuantizer(layout="components").fit(np.ones((5, 19)))
    with pytest.raises(TokenizerError, match="cannot be cut into 4 slices of one width"):
        ScalarQuantizer(shared=True).fit(np.ones((5, 21)))
    with pytest.raises(TokenizerError, match="NaN"):
        ScalarQuantizer(1, (2,)).fit(np.array([[np.nan]]))
    quantizer = ScalarQuantizer(1, (2,)).fit(np.eye(3))
    with pytest.raises(TokenizerError, match="2 wide, the codebooks 3"):
        quantizer.encode(np.ones((2, 2)))
    with pytest.raises(TokenizerError, match="outside the codebooks"):
        quantizer.decode(np.array([[2]]))
