"""Collision resolution against all possible assignments, and uniqueness whatever the codes."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import TokenizerError
from llmrec.quantization import ResidualKMeans, resolve_collisions
from llmrec.quantization.residual_kmeans import nearest


def quantizer_of(*codebooks: list[list[float]]) -> ResidualKMeans:
    quantizer = ResidualKMeans(len(codebooks), len(codebooks[0]))
    quantizer.codebooks = tuple(np.array(codebook, dtype=np.float32) for codebook in codebooks)
    return quantizer


def distortion(quantizer: ResidualKMeans, vectors: np.ndarray, codes: np.ndarray) -> float:
    return float(((vectors - quantizer.decode(codes).astype(np.float64)) ** 2).sum())


def test_by_hand() -> None:
    # Prefix 0 (point 0), last codes at 0, 1, 5. The items 0.1 and 0.2 both want 0: the farther one, 0.2, moves to 1.
    quantizer = quantizer_of([[0.0], [100.0]], [[0.0], [1.0], [5.0]])
    vectors = np.array([[0.2], [0.1], [105.0]])
    codes = quantizer.encode(vectors)
    assert codes.tolist() == [[0, 0], [0, 0], [1, 2]]
    resolved = resolve_collisions(codes, vectors, quantizer)
    assert resolved.codes.tolist() == [[0, 1], [0, 0], [1, 2]]
    report = resolved.report
    assert report.policy == "reassign"
    assert (report.sharing_items, report.unique_codes_before, report.largest_group, report.moved_items) == (2, 2, 2, 1)
    assert report.sharing_rate == pytest.approx(2 / 3)
    assert report.collision_rate == pytest.approx(1 / 3)
    assert report.distortion_before == pytest.approx((0.04 + 0.01 + 0) / 3)
    assert report.added_distortion == pytest.approx((0.64 - 0.04) / 3)
    assert (report.tokens_per_item, report.codebook_sizes, report.used_codes) == (2, [2, 3], [2, 3])


def test_append_by_hand() -> None:
    quantizer = quantizer_of([[0.0], [10.0]], [[0.0], [1.0]])
    vectors = np.array([[0.0], [10.0], [0.1], [11.0], [-0.1]])
    codes = quantizer.encode(vectors)
    for policy in ("append", "auto"):  # three items on a prefix of two last codes: auto cannot reassign
        resolved = resolve_collisions(codes, vectors, quantizer, policy)
        assert resolved.codes.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 1, 0], [0, 0, 2]]
        assert resolved.codebook_sizes == (2, 2, 3)
        assert (resolved.report.policy, resolved.report.moved_items) == ("append", 0)
        assert (resolved.report.added_distortion, resolved.report.tokens_per_item) == (0, 3)
    with pytest.raises(TokenizerError, match=r"3 items share the prefix \[0\], the last level has 2 codes"):
        resolve_collisions(codes, vectors, quantizer, "reassign")


@pytest.mark.parametrize("seed", range(30))
def test_reassignment_is_the_best_of_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    size = 5
    quantizer = quantizer_of((10 * generator.normal(size=(2, 2))).tolist(), generator.normal(size=(size, 2)).tolist())
    # Crowded around few points, so that the best answer moves items that did not collide themselves, too.
    prefixes = generator.permutation([0, 0, 0, 0, 1, 1, 1])
    vectors = quantizer.codebooks[0][prefixes] + generator.normal(scale=0.7, size=(7, 2))
    residuals = vectors - quantizer.codebooks[0][prefixes]
    codes = np.column_stack([prefixes, nearest(residuals, quantizer.codebooks[1])])
    collides = {prefix: len(np.unique(codes[prefixes == prefix, 1])) < (prefixes == prefix).sum() for prefix in (0, 1)}
    resolved = resolve_collisions(codes, vectors, quantizer, "reassign").codes
    np.testing.assert_array_equal(resolved[:, 0], codes[:, 0])
    for prefix in np.unique(codes[:, 0]):
        rows = np.flatnonzero(codes[:, 0] == prefix)
        if not collides[prefix]:
            np.testing.assert_array_equal(resolved[rows], codes[rows])
            continue
        best = min(
            distortion(quantizer, vectors[rows], np.array([(prefix, code) for code in choice]))
            for choice in permutations(range(size), len(rows))
        )
        assert distortion(quantizer, vectors[rows], resolved[rows]) == pytest.approx(best, rel=1e-12)


def test_groups_without_a_collision_keep_even_a_worse_code() -> None:
    quantizer = quantizer_of([[0.0], [100.0]], [[0.0], [1.0], [2.0]])
    vectors = np.array([[0.0], [0.0], [100.0], [101.0]])
    codes = np.array([[0, 0], [0, 0], [1, 1], [1, 0]])  # prefix 1 is coded the wrong way round
    resolved = resolve_collisions(codes, vectors, quantizer).codes
    assert resolved[2:].tolist() == [[1, 1], [1, 0]]
    assert {tuple(code) for code in resolved[:2].tolist()} == {(0, 0), (0, 1)}


def test_unique_codes_are_left_alone() -> None:
    quantizer = quantizer_of([[0.0], [10.0]], [[0.0], [1.0]])
    vectors = np.array([[0.0], [11.0]])
    for policy in ("auto", "reassign", "append"):
        resolved = resolve_collisions(quantizer.encode(vectors), vectors, quantizer, policy)
        assert resolved.codes.tolist() == [[0, 0], [1, 1]]
        assert (resolved.report.policy, resolved.report.collision_rate) == ("none", 0)


def test_one_level() -> None:
    quantizer = quantizer_of([[0.0], [1.0], [2.0]])
    vectors = np.array([[0.1], [0.2], [0.3]])
    resolved = resolve_collisions(quantizer.encode(vectors), vectors, quantizer)
    assert resolved.codes.tolist() == [[0], [1], [2]]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_codes_become_unique(data: st.DataObject) -> None:
    levels, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    code = st.lists(st.integers(0, size - 1), min_size=levels, max_size=levels)
    codes = np.array(data.draw(st.lists(code, min_size=1, max_size=30)), dtype=np.int32)
    policy = data.draw(st.sampled_from(["auto", "append"]))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    quantizer = quantizer_of(*generator.normal(size=(levels, size, 2)).tolist())
    vectors = generator.normal(size=(len(codes), 2))
    resolved = resolve_collisions(codes, vectors, quantizer, policy)
    assert len({tuple(row) for row in resolved.codes.tolist()}) == len(codes)
    assert resolved.codes.shape == (len(codes), len(resolved.codebook_sizes))
    assert (resolved.codes >= 0).all()
    assert (resolved.codes < np.array(resolved.codebook_sizes)).all()
    np.testing.assert_array_equal(resolved.codes[:, : levels - 1], codes[:, : levels - 1])
    prefixes = np.unique(codes[:, :-1], axis=0, return_counts=True)[1] if levels > 1 else np.array([len(codes)])
    collides = len(np.unique(codes, axis=0)) < len(codes)
    if not collides:
        assert resolved.report.policy == "none"
    elif policy == "auto" and prefixes.max() <= size:
        assert resolved.report.policy == "reassign"
    else:
        assert resolved.report.policy == "append"


@pytest.mark.parametrize("items", [1, 3, 40])
def test_a_catalog_of_equal_items_gets_unique_codes(items: int) -> None:
    vectors = np.ones((items, 3))
    quantizer = ResidualKMeans(3, 8).fit(vectors)
    resolved = resolve_collisions(quantizer.encode(vectors), vectors, quantizer)
    assert len(np.unique(resolved.codes, axis=0)) == items


def test_misuse_is_refused() -> None:
    quantizer = quantizer_of([[0.0]])
    with pytest.raises(TokenizerError, match="no collision policy 'drop'"):
        resolve_collisions(np.array([[0]]), np.array([[0.0]]), quantizer, "drop")
    with pytest.raises(TokenizerError, match=r"shape \(2, 1\) do not belong to 1 embeddings"):
        resolve_collisions(np.array([[0], [0]]), np.array([[0.0]]), quantizer)
