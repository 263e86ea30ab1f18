"""Collision resolution against all possible assignments, and uniqueness whatever the codes."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import TokenizerError
from llmrec.quantization import ResidualKMeans, resolve_collisions
from llmrec.quantization import collisions as module
from llmrec.quantization.collisions import compare_policies
from llmrec.quantization.nearest import nearest


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


def test_allow_changes_nothing_and_counts() -> None:
    quantizer = quantizer_of([[0.0], [10.0]], [[0.0], [1.0]])
    vectors = np.array([[0.0], [10.0], [0.1], [11.0], [-0.1]])
    codes = quantizer.encode(vectors)
    resolved = resolve_collisions(codes, vectors, quantizer, "allow")
    np.testing.assert_array_equal(resolved.codes, codes)
    report = resolved.report
    assert (report.policy, report.sharing_items, report.sharing_items_after) == ("allow", 3, 3)
    assert report.collision_rate_after == report.collision_rate == pytest.approx(2 / 5)
    assert (report.moved_items, report.added_distortion, report.tokens_per_item) == (0, 0, 2)


def test_sinkhorn_by_hand() -> None:
    # Two items collide on the point 0, whose share of the plan is split between them. Of the others, item 0 takes 1
    # and 2 wholly, of which 1 is nearer to it, and item 1 takes -1.
    quantizer = quantizer_of([[0.0], [100.0]], [[0.0], [1.0], [-1.0], [2.0]])
    vectors = np.array([[0.3], [0.1], [101.0]])
    resolved = resolve_collisions(quantizer.encode(vectors), vectors, quantizer, "sinkhorn")
    assert resolved.codes.tolist() == [[0, 1], [0, 2], [1, 1]]
    report = resolved.report
    assert (report.policy, report.sinkhorn_rounds, report.second_step) == ("sinkhorn", 1, "none")
    assert (report.moved_items, report.sharing_items_after, report.sharing_items_sinkhorn) == (2, 0, 0)
    assert report.added_distortion == pytest.approx((0.49 - 0.09 + 1.21 - 0.01) / 3)


def test_sinkhorn_is_told_what_it_cannot_separate() -> None:
    quantizer = quantizer_of([[0.0]], [[0.0], [1.0], [5.0]])
    vectors = np.array([[0.1], [0.1], [0.1]])  # equal items have equal rows of every plan
    resolved = resolve_collisions(quantizer.encode(vectors), vectors, quantizer, "sinkhorn")
    assert sorted(resolved.codes[:, 1].tolist()) == [0, 1, 2]
    report = resolved.report
    assert (report.sinkhorn_rounds, report.sharing_items_sinkhorn, report.second_step) == (1, 3, "reassign")
    crowd = np.full((4, 1), 0.1)
    resolved = resolve_collisions(quantizer.encode(crowd), crowd, quantizer, "sinkhorn")
    assert resolved.report.second_step == "append"
    assert resolved.codes[:, 2].tolist() == [0, 1, 2, 3]


def test_sinkhorn_maps_what_collides_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the rounds done group by group, with everything in one problem at a time."""
    generator = np.random.default_rng(5)
    quantizer = quantizer_of(*(3 * generator.normal(size=(1, 4, 3))).tolist(), generator.normal(size=(12, 3)).tolist())
    vectors = quantizer.codebooks[0][generator.integers(0, 4, 40)] + generator.normal(scale=0.6, size=(40, 3))
    original = quantizer.encode(vectors)
    expected, rounds = original.copy(), 0
    while len(np.unique(expected, axis=0)) < 40 and rounds < 20:
        before = expected.copy()
        rounds += 1
        for code in np.unique(before, axis=0):
            rows = np.flatnonzero((before == code).all(axis=1))
            if len(rows) > 1:
                candidates = np.column_stack([np.full(12, code[0]), np.arange(12)])
                points = quantizer.decode(candidates).astype(np.float64)
                expected[rows, 1] = module.uniform_mapping(((vectors[rows, None] - points) ** 2).sum(axis=2))
        if (before == expected).all():
            break
    assert rounds > 1
    for entries in (4_000_000, 30):
        monkeypatch.setattr(module, "ENTRIES", entries)
        resolved = resolve_collisions(original, vectors, quantizer, "sinkhorn")
        assert resolved.report.sinkhorn_rounds == rounds
        assert resolved.report.sharing_items_sinkhorn == 40 - len(
            [1 for row in expected.tolist() if expected.tolist().count(row) == 1]
        )
        if resolved.report.second_step == "none":
            np.testing.assert_array_equal(resolved.codes, expected)
    np.testing.assert_array_equal(module._map_uniformly(original, vectors, quantizer)[0], expected)


class Curved:
    """A quantizer of no sums: its decoder is all that is known of it."""

    codebook_sizes = (3, 16)

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.tables = [generator.normal(size=(size, 4)) for size in self.codebook_sizes]

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.tanh(self.tables[0][codes[:, 0]] + self.tables[1][codes[:, 1]]).astype(np.float32)


@pytest.mark.parametrize("policy", ["reassign", "sinkhorn", "append", "auto"])
def test_any_quantizer_will_do(policy: str) -> None:
    quantizer = Curved()
    generator = np.random.default_rng(1)
    codes = np.column_stack([generator.integers(0, 3, 30), generator.integers(0, 3, 30)]).astype(np.int32)
    vectors = quantizer.decode(codes) + generator.normal(scale=0.05, size=(30, 4))
    resolved = resolve_collisions(codes, vectors, quantizer, policy)
    assert len(np.unique(resolved.codes, axis=0)) == 30
    before = ((vectors - quantizer.decode(codes)) ** 2).sum(axis=1).mean()
    after = ((vectors - quantizer.decode(resolved.codes[:, :2])) ** 2).sum(axis=1).mean()
    assert resolved.report.distortion_before == pytest.approx(before)
    assert resolved.report.added_distortion == pytest.approx(after - before)
    assert resolved.report.moved_items == int((resolved.codes[:, :2] != codes).any(axis=1).sum())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sinkhorn_ends_with_unique_codes_and_old_prefixes(data: st.DataObject) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    items, size = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 6))
    quantizer = quantizer_of(*generator.normal(size=(2, size, 2)).tolist())
    vectors = generator.integers(-1, 2, size=(items, 2)).astype(np.float32)  # with duplicates
    codes = quantizer.encode(vectors)
    resolved = resolve_collisions(codes, vectors, quantizer, "sinkhorn")
    assert len(np.unique(resolved.codes, axis=0)) == items
    np.testing.assert_array_equal(resolved.codes[:, 0], codes[:, 0])
    alone = [codes.tolist().count(code) == 1 for code in codes.tolist()]
    if resolved.report.second_step != "reassign" and resolved.report.sinkhorn_rounds <= 1:
        np.testing.assert_array_equal(resolved.codes[alone, 1], codes[alone, 1])


def test_policies_are_compared() -> None:
    generator = np.random.default_rng(2)
    vectors = generator.normal(size=(300, 4))
    quantizer = ResidualKMeans(2, 16, niter=3).fit(vectors)
    codes = quantizer.encode(vectors)
    copy = codes.copy()
    table = {row["policy"]: row for row in compare_policies(codes, vectors, quantizer)}
    np.testing.assert_array_equal(codes, copy)
    assert list(table) == ["allow", "append", "reassign", "sinkhorn"]
    largest = np.bincount(codes[:, 0]).max()
    assert largest > 16  # so that reassignment does not fit
    assert (table["reassign"]["possible"], table["reassign"]["moved_items"]) == (False, None)
    assert table["reassign"]["why_not"] == f"{largest} items share a prefix, 16 last codes"
    assert table["append"]["tokens_per_item"] == table["sinkhorn"]["tokens_per_item"] == 3
    assert table["allow"]["tokens_per_item"] == 2
    assert table["allow"]["collision_rate_after"] == table["allow"]["collision_rate_before"] > 0
    assert len({frozenset(row) for row in table.values()}) == 1  # one set of columns

    roomy = ResidualKMeans(2, 64, niter=3).fit(vectors)
    codes = roomy.encode(vectors)
    table = {row["policy"]: row for row in compare_policies(codes, vectors, roomy)}
    for policy in ("reassign", "sinkhorn", "append", "allow"):
        report = resolve_collisions(codes, vectors, roomy, policy).report
        for name in ("moved_items", "added_distortion", "tokens_per_item", "collision_rate_after", "second_step"):
            assert table[policy][name] == getattr(report, name)
        assert table[policy]["added_share"] == pytest.approx(report.added_distortion / report.distortion_before)
    assert 0 < table["reassign"]["added_distortion"] <= table["sinkhorn"]["added_distortion"]


@pytest.mark.parametrize("levels", [1, 3, 9])
def test_groups_are_those_of_equal_rows(levels: int) -> None:
    generator = np.random.default_rng(levels)
    for high in (2, 40_000):  # nine levels of 40,000 do not fit into one number
        codes = generator.integers(0, high, size=(200, levels)).astype(np.int32)
        codes = codes[generator.integers(0, 200, 400)]
        group, sizes = module._groups(codes)
        _, expected, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
        np.testing.assert_array_equal(group, expected.reshape(-1))
        np.testing.assert_array_equal(sizes, counts)
