"""Codes for new items against the definition, written out with sets and loops, and against all possible choices."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from llmrec.exceptions import TokenizerError
from llmrec.quantization import (
    HashedCodes,
    ProductQuantizer,
    ResidualKMeans,
    ResidualVQ,
    ScalarQuantizer,
    occupancy,
    resolve_collisions,
)
from llmrec.quantization import assignment as module
from llmrec.quantization.assignment import assign


class Bent:
    """A quantizer whose decoder is no sum, and whose encoder looks at every code."""

    def __init__(self, generator: np.random.Generator, sizes: tuple[int, ...], width: int) -> None:
        self.codebook_sizes = sizes
        self._tables = [generator.normal(size=(size, width)) for size in sizes]

    def decode(self, codes: np.ndarray) -> np.ndarray:
        total = sum(table[codes[:, level]] for level, table in enumerate(self._tables))
        return (2 * np.tanh(total) + 0.1 * total).astype(np.float32)

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        codes = every(self.codebook_sizes)
        return codes[((embeddings[:, None] - self.decode(codes)[None]) ** 2).sum(axis=2).argmin(axis=1)]


def additive(generator: np.random.Generator, sizes: tuple[int, ...], width: int) -> ResidualKMeans:
    return quantizer_of(*[generator.normal(size=(size, width)) / 3**level for level, size in enumerate(sizes)])


def quantizer_of(*codebooks) -> ResidualKMeans:
    quantizer = ResidualKMeans(len(codebooks), max(map(len, codebooks)))
    quantizer.codebooks = tuple(np.array(codebook, dtype=np.float32) for codebook in codebooks)
    return quantizer


def every(sizes: tuple[int, ...]) -> np.ndarray:
    return np.array(list(product(*map(range, sizes))), dtype=np.int32)


def drawn(generator: np.random.Generator, sizes: tuple[int, ...], share: float) -> np.ndarray:
    """Taken codes: of every beginning another share, so that some are full and some empty."""
    codes = every(sizes)
    shares = share * generator.uniform(0, 2, size=sizes[:-1])
    return codes[generator.uniform(size=len(codes)) < shares[tuple(codes[:, :-1].T)]]


def distance(vector: np.ndarray, code: tuple[int, ...], quantizer) -> float:
    point = quantizer.decode(np.array([code[: len(quantizer.codebook_sizes)]])).astype(np.float64)[0]
    return float(((vector - point) ** 2).sum())


def refuge(vector, wanted, quantizer, occupied: set, sizes) -> tuple[tuple[int, ...], float]:
    """The beam search as its definition reads."""

    def has_room(beginning: tuple[int, ...]) -> bool:
        return any((*beginning, *rest) not in occupied for rest in product(*map(range, sizes[len(beginning) :])))

    beams = [()]
    for level in range(len(wanted)):
        children = [(*beam, code) for beam in beams for code in range(sizes[level])]
        children = [child for child in children if has_room(child)]
        children.sort(key=lambda child: distance(vector, (*child, *wanted[len(child) :]), quantizer))
        beams = children[: module.BEAM]
    return beams[0], distance(vector, beams[0], quantizer)


def reference(vectors, quantizer, taken, sizes, wanted=None) -> list[tuple[int, ...]]:
    """`assign` by its definition, for vectors without ties."""
    vectors = np.asarray(vectors, dtype=np.float64)
    wanted = [tuple(code) for code in (quantizer.encode(vectors) if wanted is None else wanted).tolist()]
    occupied = {tuple(code) for code in taken.tolist()}
    appended = len(sizes) > len(quantizer.codebook_sizes)
    first = [(*code, 0) if appended else code for code in wanted]
    clash = [code in occupied or first.count(code) > 1 for code in first]
    contested = {code[:-1] for code, clashes in zip(first, clash, strict=True) if clashes}
    given = {row: code for row, code in enumerate(first) if code[:-1] not in contested}
    occupied |= set(given.values())
    asked = {row: code[:-1] for row, code in enumerate(first) if code[:-1] in contested}
    while asked:
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, prefix in asked.items():
            groups.setdefault(prefix, []).append(row)
        free = {p: [(*p, c) for c in range(sizes[-1]) if (*p, c) not in occupied] for p in groups}
        crowded = [prefix for prefix, rows in groups.items() if len(rows) > len(free[prefix])]
        after = occupied | {code for prefix in crowded for code in free[prefix]}
        for prefix, rows in groups.items():
            if prefix in crowded:
                continue
            if appended:
                chosen = dict(zip(rows, free[prefix], strict=False))
            else:
                costs = [[distance(vectors[row], code, quantizer) for code in free[prefix]] for row in rows]
                items, codes = linear_sum_assignment(costs)
                chosen = {rows[item]: free[prefix][code] for item, code in zip(items, codes, strict=True)}
            given |= chosen
            after |= set(chosen.values())
        asked = {}
        for prefix in crowded:
            rows = groups[prefix]
            refuges = [refuge(vectors[row], wanted[row], quantizer, after, sizes) for row in rows]
            costs = np.array([[distance(vectors[row], code, quantizer) for code in free[prefix]] for row in rows])
            prices = np.array([price for _, price in refuges])
            items, codes = linear_sum_assignment(costs.reshape(len(rows), -1) - prices[:, None])
            for item, code in zip(items, sorted(codes) if appended else codes, strict=True):
                given[rows[item]] = free[prefix][code]
            asked |= {rows[item]: refuges[item][0][: len(prefix)] for item in set(range(len(rows))) - set(items)}
        asked = dict(sorted(asked.items()))
        occupied = after
    return [given[row] for row in range(len(vectors))]


def check(codes: np.ndarray, taken: np.ndarray, sizes: tuple[int, ...], items: int) -> None:
    assert codes.dtype == np.int32
    assert codes.shape == (items, len(sizes))
    assert ((codes >= 0) & (codes < np.array(sizes))).all()
    assert len({tuple(code) for code in np.concatenate([codes, taken]).tolist()}) == items + len(taken)


def test_by_hand() -> None:
    quantizer = quantizer_of([[0.0], [100.0]], [[0.0], [1.0], [2.0], [3.0]])
    # Prefix 0 has one free code. Item 0 wants a taken one and stays, because item 3 is nearer to the other prefix.
    taken = np.array([[0, 0], [0, 1], [0, 2]])
    vectors = np.array([[0.2], [101.1], [103.0], [3.4]])
    result = assign(vectors, quantizer, taken, (2, 4))
    assert result.codes.tolist() == [[0, 3], [1, 1], [1, 3], [1, 0]]
    report = result.report
    assert (report.items, report.taken, report.contested, report.moved, report.spilled) == (4, 3, 1, 2, 1)
    assert report.distortion == pytest.approx((0.04 + 0.01 + 0 + 0.16) / 4)
    assert report.added_distortion == pytest.approx((2.8**2 - 0.04 + 96.6**2 - 0.16) / 4)
    assert (report.free_codes, report.free_in_fullest, report.full_prefixes) == (1, 0, 1)
    assert set(report.to_dict()) == set(report.__dataclass_fields__)


def test_a_contested_prefix_is_dealt_out_anew_and_no_other() -> None:
    quantizer = quantizer_of([[0.0], [100.0]], [[0.0], [1.0], [2.0], [9.0]])
    vectors = np.array([[0.1], [1.1], [0.4], [100.6], [101.4]])
    wanted = np.array([[0, 0], [0, 1], [0, 0], [1, 0], [1, 1]])
    # Items 0 and 2 want one code: item 1, whose code was free, makes way, as the sum asks for. Prefix 1 stays.
    assert assign(vectors, quantizer, np.empty((0, 2), dtype=int), (2, 4), wanted).codes.tolist() == [
        *([0, 0], [0, 2], [0, 1], [1, 0], [1, 1])
    ]
    # A crossed pair is left alone in prefix 1, and uncrossed once an item of it is contested.
    crossed = np.array([[0, 0], [0, 1], [0, 3], [1, 1], [1, 0]])
    np.testing.assert_array_equal(assign(vectors, quantizer, np.array([[0, 2]]), (2, 4), crossed).codes, crossed)
    assert assign(vectors, quantizer, np.array([[1, 1]]), (2, 4), crossed).codes[3:].tolist() == [[1, 0], [1, 2]]


@pytest.mark.parametrize("make", [additive, Bent])
@pytest.mark.parametrize("seed", range(12))
def test_the_definition(monkeypatch: pytest.MonkeyPatch, make, seed: int) -> None:
    generator = np.random.default_rng(seed)
    levels = ((5,), (4, 6), (3, 4, 5), (2, 3, 2, 3))[seed % 4]
    quantizer = make(generator, levels, 3)
    # Taken codes leave some beginnings full; the new items crowd around few points.
    sizes = (*levels, 3) if seed % 3 == 1 else levels
    taken = drawn(generator, sizes, 0.4)
    items = min(int(np.prod(sizes)) - len(taken), (40, 9, 25)[seed % 3])
    vectors = quantizer.decode(every(levels)[generator.integers(0, 6, items) % np.prod(levels)])
    vectors = vectors + generator.normal(scale=0.2, size=vectors.shape)
    expected = reference(vectors, quantizer, taken, sizes)
    for entries, beam, most_keys in ((4_000_000, 8, 2**62), (1, 8, 1), (4_000_000, 2, 2**62), (500, 1, 1)):
        monkeypatch.setattr(module, "ENTRIES", entries)
        monkeypatch.setattr(occupancy, "MOST_KEYS", most_keys)
        if beam != module.BEAM:
            monkeypatch.setattr(module, "BEAM", beam)
            expected = reference(vectors, quantizer, taken, sizes)
        result = assign(vectors, quantizer, taken, sizes)
        check(result.codes, taken, sizes, items)
        assert [tuple(code) for code in result.codes.tolist()] == expected


def test_the_cases_of_the_definition_occur() -> None:
    """What the test above compares has items that spill, in several rounds, with digits and without."""
    seen = set()
    for seed in range(12):
        generator = np.random.default_rng(seed)
        sizes = (3, 4, 5) if seed % 2 else (3, 4, 2)
        quantizer = additive(generator, sizes[: 3 - (seed + 1) % 2], 3)
        taken = drawn(generator, sizes, 0.4)
        vectors = quantizer.decode(np.zeros((12, len(quantizer.codebook_sizes)), dtype=int))
        vectors = vectors + generator.normal(scale=0.2, size=vectors.shape)
        result = assign(vectors, quantizer, taken, sizes)
        assert [tuple(code) for code in result.codes.tolist()] == reference(vectors, quantizer, taken, sizes)
        seen.add((seed % 2, result.report.spilled > 0, result.report.full_prefixes > 1))
    assert {(0, True, True), (1, True, True)} <= seen


@pytest.mark.parametrize("seed", range(20))
def test_a_group_has_the_least_sum_of_all_choices(seed: int) -> None:
    generator = np.random.default_rng(seed)
    quantizer = quantizer_of(np.zeros((1, 2)), generator.normal(size=(6, 2)))
    taken = np.array([[0, code] for code in generator.permutation(6)[: seed % 3]], dtype=int).reshape(-1, 2)
    vectors = generator.normal(scale=0.4, size=(4, 2))
    if seed % 2:
        vectors = vectors.round(1)
    if len(np.unique(np.concatenate([quantizer.encode(vectors), taken]), axis=0)) == 4 + len(taken):
        vectors[1] = vectors[0]
    codes = assign(vectors, quantizer, taken, (1, 6)).codes
    check(codes, taken, (1, 6), 4)
    free = sorted(set(range(6)) - set(taken[:, 1].tolist()))
    sums = [
        sum(distance(v, (0, c), quantizer) for v, c in zip(vectors, p, strict=True)) for p in permutations(free, 4)
    ]
    found = sum(distance(v, tuple(c), quantizer) for v, c in zip(vectors, codes, strict=True))
    assert found == pytest.approx(min(sums), rel=1e-12)


@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_who_spills_is_the_best_of_all_choices(seed: int, appended: bool) -> None:
    """With at most BEAM prefixes, refuges are the nearest free codes of all: brute force over codes and choices."""
    generator = np.random.default_rng(seed)
    quantizer = additive(generator, (7,) if appended else (7, 5), 2)
    sizes = (7, 5)
    wanted = np.tile([3] if appended else [3, 1], (4, 1))
    vectors = quantizer.decode(wanted) + generator.normal(scale=0.8, size=(4, 2))
    taken = np.array([code for code in every(sizes).tolist() if code[0] != 3 or code[1] < 3])
    taken = taken[(taken[:, 0] == 3) | (generator.uniform(size=len(taken)) < 0.7)]  # prefix 3 has two free codes
    codes = assign(vectors, quantizer, taken, sizes, wanted).codes
    check(codes, taken, sizes, 4)
    occupied = {tuple(code) for code in taken.tolist()}
    outside = [tuple(c) for c in every(sizes).tolist() if c[0] != 3 and tuple(c) not in occupied]
    prices = [min(distance(vector, code, quantizer) for code in outside) for vector in vectors]
    sums = {}
    for choice in set(permutations((3, 4, None, None))):
        kept = [
            distance(vector, (3, code), quantizer) if code is not None else price
            for vector, code, price in zip(vectors, choice, prices, strict=True)
        ]
        sums[choice] = sum(kept)
    stayed = tuple(int(code[1]) if code[0] == 3 else None for code in codes)
    assert sums[stayed] == pytest.approx(min(sums.values()), rel=1e-9)
    # Those who go to different prefixes are alone there, and get their nearest codes.
    gone = np.flatnonzero(codes[:, 0] != 3)
    assert len(gone) == 2
    distances = [[distance(vectors[row], code, quantizer) for code in outside] for row in gone]
    nearest = [outside[int(np.argmin(row))][0] for row in distances]
    for row in gone if nearest[0] != nearest[1] else []:
        assert distance(vectors[row], tuple(codes[row]), quantizer) == pytest.approx(prices[row], rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_an_empty_catalog_is_what_a_build_makes(seed: int) -> None:
    generator = np.random.default_rng(seed)
    quantizer = additive(generator, (6, 30), 3)
    vectors = quantizer.decode(every((6, 4))[generator.integers(0, 24, 60)]) + generator.normal(
        scale=0.2, size=(60, 3)
    )
    codes = quantizer.encode(vectors)
    resolved = resolve_collisions(codes, vectors, quantizer, "reassign")
    none = np.empty((0, 2), dtype=np.int32)
    result = assign(vectors, quantizer, none, resolved.codebook_sizes)
    np.testing.assert_array_equal(result.codes, resolved.codes)
    assert result.report.moved == resolved.report.moved_items > 0
    assert result.report.contested == resolved.report.sharing_items
    assert result.report.distortion == pytest.approx(resolved.report.distortion_before)
    assert result.report.added_distortion == pytest.approx(resolved.report.added_distortion)
    appended = resolve_collisions(codes, vectors, quantizer, "append")
    digits = assign(vectors, quantizer, np.empty((0, 3), dtype=np.int32), appended.codebook_sizes)
    np.testing.assert_array_equal(digits.codes, appended.codes)
    # A catalog that grows in parts gets the digits of one that is built at once.
    later = assign(vectors[25:], quantizer, digits.codes[:25], appended.codebook_sizes).codes
    np.testing.assert_array_equal(later, digits.codes[25:])


def test_digits_are_the_lowest_free_ones_in_row_order() -> None:
    quantizer = quantizer_of([[0.0], [10.0], [11.0]])
    taken = np.array([[0, 0], [0, 3], [1, 1]])
    vectors = np.array([[0.3], [10.0], [-0.2], [0.1], [10.1], [11.0]])
    result = assign(vectors, quantizer, taken, (3, 5))
    assert result.codes.tolist() == [[0, 1], [1, 0], [0, 2], [0, 4], [1, 2], [2, 0]]
    assert (result.report.moved, result.report.spilled, result.report.added_distortion) == (0, 0, 0)
    assert (result.report.contested, result.report.free_in_fullest, result.report.full_prefixes) == (5, 0, 1)
    # No digit is left for one more: of equals the last row goes, to the nearest code that has one.
    crowd = np.array([[0.3], [0.1], [0.1], [0.1]])
    result = assign(crowd, quantizer, taken, (3, 5))
    assert result.codes.tolist() == [[1, 0], [0, 1], [0, 2], [0, 4]]
    equal = assign(np.full((4, 1), 0.1), quantizer, taken, (3, 5)).codes
    assert equal.tolist() == [[0, 1], [0, 2], [0, 4], [1, 0]]


def test_of_equal_items_the_lower_row_gets_the_nearer_code() -> None:
    quantizer = quantizer_of([[0.0], [50.0]], [[3.0], [1.0], [-1.5], [-1.0]])
    vectors = np.array([[0.0], [-0.0], [9.0], [0.0]])
    codes = assign(vectors, quantizer, np.empty((0, 2), dtype=int), (2, 4), np.tile([0, 1], (4, 1))).codes
    assert codes.tolist() == [[0, 1], [0, 3], [0, 0], [0, 2]]
    # One code is left: the first of the equal ones keeps it, and the others follow in order.
    taken = np.array([[0, 0], [0, 2], [0, 3]])
    codes = assign(vectors[[0, 1, 3]], quantizer, taken, (2, 4), np.tile([0, 1], (3, 1))).codes
    assert codes.tolist() == [[0, 1], [1, 2], [1, 3]]


@pytest.mark.parametrize("seed", range(8))
def test_equal_items_among_others_keep_their_order(seed: int) -> None:
    generator = np.random.default_rng(seed)
    quantizer = quantizer_of(np.zeros((1, 1)), generator.normal(size=(14, 1)))
    vectors = generator.integers(-2, 3, size=(9, 1)) / 4
    wanted = np.tile([0, 3], (9, 1))
    codes = assign(vectors, quantizer, np.array([[0, 5], [0, 6]]), (1, 14), wanted).codes
    check(codes, np.array([[0, 5], [0, 6]]), (1, 14), 9)
    far = [distance(vector, tuple(code), quantizer) for vector, code in zip(vectors, codes, strict=True)]
    for vector in np.unique(vectors):
        own = [far[row] for row in np.flatnonzero(vectors[:, 0] == vector)]
        assert own == sorted(own)


@pytest.mark.parametrize("seed", range(8))
def test_full_beginnings_take_no_place_in_the_beam(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    generator = np.random.default_rng(seed)
    quantizer = quantizer_of(*(generator.normal(size=(size, 2)) for size in (4, 6, 2)))
    codes = every((4, 6, 2))
    full = (codes[:, 0] >= 2) | ((codes[:, 0] == 0) & (codes[:, 1] == 1))
    taken = codes[full | (generator.uniform(size=len(codes)) < 0.3)]
    wanted = np.tile([0, 1, 0], (8, 1))
    vectors = generator.normal(size=(8, 2))
    for beam in (3, 4, 8):
        monkeypatch.setattr(module, "BEAM", beam)
        found = assign(vectors, quantizer, taken, (4, 6, 2), wanted).codes
        expected = reference(vectors, quantizer, taken, (4, 6, 2), wanted)
        assert [tuple(code) for code in found.tolist()] == expected


@st.composite
def catalogs(draw: st.DrawFn) -> tuple:
    """A quantizer, taken codes, and no more new items than free codes, on a grid: with ties and equal items."""
    generator = np.random.default_rng(draw(st.integers(0, 9999)))
    levels = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    sizes = (*levels, draw(st.integers(1, 4))) if draw(st.booleans()) else levels
    quantizer = quantizer_of(*[generator.integers(-2, 3, size=(size, 2)) for size in levels])
    codes = generator.permutation(every(sizes))
    taken = codes[: draw(st.integers(0, len(codes)))]
    items = draw(st.integers(0, min(12, len(codes) - len(taken))))
    vectors = generator.integers(-3, 4, size=(items, 2)).astype(draw(st.sampled_from([np.float32, np.float64])))
    return quantizer, taken, sizes, vectors, generator


@settings(max_examples=300, deadline=None)
@given(catalogs())
def test_whatever_the_catalog_codes_are_unique_and_spill_only_from_full_prefixes(catalog: tuple) -> None:
    quantizer, taken, sizes, vectors, generator = catalog
    copies = taken.copy(), vectors.copy()
    result = assign(vectors, quantizer, taken, sizes)
    np.testing.assert_array_equal(taken, copies[0])
    np.testing.assert_array_equal(vectors, copies[1])
    check(result.codes, taken, sizes, len(vectors))
    np.testing.assert_array_equal(assign(vectors, quantizer, taken, sizes).codes, result.codes)
    wanted = quantizer.encode(vectors) if len(vectors) else np.empty((0, len(quantizer.codebook_sizes)), dtype=int)
    depth = len(sizes) - 1
    spilled = (result.codes[:, :depth] != wanted[:, :depth]).any(axis=1)
    together = np.concatenate([taken, result.codes])
    for code in wanted[spilled]:
        assert (together[:, :depth] == code[:depth]).all(axis=1).sum() == sizes[-1]
    occupied = {tuple(code) for code in taken.tolist()}
    first = [(*code, 0)[: len(sizes)] for code in wanted.tolist()]
    contested = [code in occupied or first.count(code) > 1 for code in first]
    prefixes = {code[:-1] for code, clash in zip(first, contested, strict=True) if clash}
    for code, found in zip(first, result.codes.tolist(), strict=True):
        assert code[:-1] in prefixes or code == tuple(found)
    _, counts = np.unique(together[:, :depth], axis=0, return_counts=True) if depth else (None, [len(together)])
    report = result.report
    assert report.full_prefixes == sum(count == sizes[-1] for count in counts)
    assert report.free_codes == np.prod(sizes) - len(together)
    assert (report.contested, report.spilled) == (sum(contested), spilled.sum())
    levels = len(quantizer.codebook_sizes)
    assert report.moved == (result.codes[:, :levels] != wanted).any(axis=1).sum()
    if not len(vectors):
        assert (report.distortion, report.added_distortion, report.free_in_fullest) == (None, None, None)
        return
    before, after = (
        ((vectors.astype(float) - quantizer.decode(codes)) ** 2).sum(axis=1).mean()
        for codes in (wanted, result.codes[:, :levels])
    )
    assert (report.distortion, report.added_distortion) == (pytest.approx(before), pytest.approx(after - before))
    used = [(together[:, :depth] == code[:depth]).all(axis=1).sum() for code in result.codes]
    assert report.free_in_fullest == sizes[-1] - max(used)
    # Another order: equal items exchange codes, and digits of one code go by rows; nothing else changes.
    order = generator.permutation(len(vectors))
    shuffled = assign(vectors[order], quantizer, taken, sizes).codes
    seen = levels if len(sizes) > levels else len(sizes)
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, result.codes.tolist()))
    pairs = [
        sorted((*vector, *code[:seen]) for vector, code in zip(rows.tolist(), codes.tolist(), strict=True))
        for rows, codes in ((vectors, result.codes), (vectors[order], shuffled))
    ]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_items_does_not_matter(seed: int, appended: bool) -> None:
    generator = np.random.default_rng(seed)
    quantizer = additive(generator, (4, 5), 3)
    sizes = (4, 5, 3) if appended else (4, 5)
    taken = drawn(generator, sizes, 0.3)
    items = min(20, int(np.prod(sizes)) - len(taken))
    vectors = generator.normal(scale=0.3, size=(items, 3)) + quantizer.decode(np.array([[1, 1]]))
    result = assign(vectors, quantizer, taken, sizes)
    assert result.report.spilled
    order = generator.permutation(items)
    shuffled = assign(vectors[order], quantizer, taken, sizes).codes
    if appended:  # digits go by rows
        np.testing.assert_array_equal(shuffled[:, :2], result.codes[order, :2])
    else:
        np.testing.assert_array_equal(shuffled, result.codes[order])


@pytest.mark.parametrize("appended", [False, True])
def test_every_free_code_is_found_and_then_the_catalog_is_full(appended: bool) -> None:
    generator = np.random.default_rng(0)
    quantizer = additive(generator, (3, 4, 3), 2)
    sizes = (3, 4, 3, 2) if appended else (3, 4, 3)
    codes = generator.permutation(every(sizes))
    taken, free = codes[:20], codes[20:]
    vectors = np.zeros((len(free), 2))  # all of them alike
    result = assign(vectors, quantizer, taken, sizes)
    assert {tuple(code) for code in result.codes.tolist()} == {tuple(code) for code in free.tolist()}
    assert (result.report.free_codes, result.report.full_prefixes) == (0, np.prod(sizes[:-1]))
    message = f"{len(free) + 1} new items do not fit beside 20 taken codes into the {len(codes)} codes .*build the sem"
    with pytest.raises(TokenizerError, match=message):
        assign(np.zeros((len(free) + 1, 2)), quantizer, taken, sizes)
    with pytest.raises(TokenizerError, match="1 new items do not fit"):
        assign(vectors[:1], quantizer, codes, sizes)
    assert assign(vectors[:0], quantizer, codes, sizes).codes.shape == (0, len(sizes))


@pytest.mark.parametrize("items", [0, 1])
def test_none_and_one(items: int) -> None:
    quantizer = quantizer_of([[0.0], [10.0]], [[0.0], [1.0]])
    vectors = np.full((items, 1), 11.2)
    for taken, expected in ((np.empty((0, 2), dtype=int), [1, 1]), (np.array([[1, 1]]), [1, 0])):
        assert assign(vectors, quantizer, taken, (2, 2)).codes.tolist() == [expected] * items
    full = np.array([[1, 1], [1, 0]])
    assert assign(vectors, quantizer, full, (2, 2)).codes.tolist() == [[0, 1]] * items
    for taken, digit in ((np.empty((0, 3), dtype=int), 0), (np.array([[1, 1, 0]]), 1), (np.array([[1, 1, 1]]), 0)):
        assert assign(vectors, quantizer, taken, (2, 2, 9)).codes.tolist() == [[1, 1, digit]] * items


def test_code_spaces_beyond_64_bits() -> None:
    generator = np.random.default_rng(1)
    quantizer = quantizer_of(*(generator.normal(size=(3, 4)) / 2**level for level in range(48)))
    sizes = quantizer.codebook_sizes
    taken = generator.integers(0, 3, size=(12, 48)).astype(np.int32)
    taken[:9, :46] = taken[0, :46]
    taken[:9, 46:] = every((3, 3))  # what is below one beginning of 46 codes is full
    wanted = taken[:3].repeat(2, axis=0)
    vectors = quantizer.decode(wanted) + generator.normal(scale=0.1, size=(6, 4))
    result = assign(vectors, quantizer, taken, sizes, wanted)
    check(result.codes, taken, sizes, 6)
    assert (result.codes[:, :46] != taken[0, :46]).any(axis=1).all()
    assert (result.report.free_codes, result.report.spilled) == (3**48 - 18, 6)
    assert result.report.full_prefixes == 3


def fitted(name: str, vectors: np.ndarray):
    if name == "rqvae":
        from llmrec.quantization.rqvae import RQVAE

        return RQVAE(2, 6, hidden=(8,), latent_dim=4, epochs=2, batch_size=64).fit(vectors)
    makers = {
        "rkmeans": lambda: ResidualKMeans(2, 6, niter=5),
        "normalised": lambda: ResidualKMeans(2, 6, niter=5, normalise_residuals=True),
        "balanced": lambda: ResidualKMeans(2, 6, niter=5, balanced=True),
        "rvq": lambda: ResidualVQ(2, 6, niter=5),
        "opq": lambda: ProductQuantizer(2, 6, niter=5),
        "fsq": lambda: ScalarQuantizer(2, (3, 2), layout="components"),
        "hash": lambda: HashedCodes(2, 6),
    }
    return makers[name]().fit(vectors)


@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.parametrize("name", ["rkmeans", "normalised", "balanced", "rvq", "opq", "fsq", "hash", "rqvae"])
def test_every_quantizer(name: str, appended: bool) -> None:
    generator = np.random.default_rng(7)
    old = generator.normal(size=(150, 8)).astype(np.float32)
    quantizer = fitted(name, old)
    sizes = (6, 6, 2) if appended else (6, 6)
    assert quantizer.codebook_sizes == (6, 6)
    taken = drawn(generator, sizes, 0.3)
    vectors = (old[3] + generator.normal(scale=0.5, size=(12, 8))).astype(np.float32)
    result = assign(vectors, quantizer, taken, sizes)
    check(result.codes, taken, sizes, 12)
    wanted = quantizer.encode(vectors)
    given_codes = assign(vectors, quantizer, taken, sizes, wanted)
    np.testing.assert_array_equal(given_codes.codes, result.codes)
    if name != "hash":
        assert [tuple(code) for code in result.codes.tolist()] == reference(vectors, quantizer, taken, sizes, wanted)
    else:
        assert result.report.added_distortion == 0
        ids, taken = [f"item {number}" for number in range(4, 8)], taken[::4]
        hashed = assign(np.tile(old[:1], (4, 1)), quantizer, taken, sizes, quantizer.encode_ids(ids)).codes
        check(hashed, taken, sizes, 4)
        occupied = {tuple(code) for code in taken.tolist()}
        first = [(*code, 0)[: len(sizes)] for code in quantizer.encode_ids(ids).tolist()]
        alone = [code for code in first if code not in occupied and [c[:-1] for c in first].count(code[:-1]) == 1]
        assert alone
        assert set(alone) <= {tuple(code) for code in hashed.tolist()}


def test_memory_maps_and_short_types_do(tmp_path) -> None:
    generator = np.random.default_rng(2)
    quantizer = additive(generator, (3, 4), 2)
    vectors = generator.normal(size=(6, 2)).astype(np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    taken = every((3, 4))[::3]
    expected = assign(vectors.astype(np.float64), quantizer, taken, (3, 4)).codes
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    np.testing.assert_array_equal(assign(mapped, quantizer, taken.astype(np.uint8), [3, 4]).codes, expected)


def test_misuse_is_refused() -> None:
    quantizer = quantizer_of([[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.1, 0.1]])
    none, vectors = np.empty((0, 2), dtype=int), np.zeros((1, 2))
    for bad in (np.nan, np.inf):
        with pytest.raises(TokenizerError, match="NaN or infinity, row 1 first"):
            assign(np.array([[0.0, 0.0], [bad, 0.0]]), quantizer, none, (2, 2))
    for shape in ((1, 3), (0, 3)):
        with pytest.raises(TokenizerError, match=r"3 wide, the codebooks 2|\(0, 3\) cannot be quantised"):
            assign(np.zeros(shape), quantizer, none, (2, 2))
    for sizes in ((2,), (2, 3), (2, 2, 2, 2), (2, 2, 0), ()):
        with pytest.raises(TokenizerError, match="not the quantizer's"):
            assign(vectors, quantizer, none, sizes)
    with pytest.raises(TokenizerError, match=r"shape \(0, 2\) do not have 3 levels"):
        assign(vectors, quantizer, none, (2, 2, 2))
    with pytest.raises(TokenizerError, match="outside the codebooks"):
        assign(vectors, quantizer, np.array([[0, 2]]), (2, 2))
    with pytest.raises(TokenizerError, match="not whole numbers"):
        assign(vectors, quantizer, np.array([[0.0, 1.0]]), (2, 2))
    with pytest.raises(TokenizerError, match="1 of the 3 taken codes are given twice"):
        assign(vectors, quantizer, np.array([[0, 1], [1, 1], [0, 1]]), (2, 2))
    with pytest.raises(TokenizerError, match="2 codes do not belong to 1 vectors"):
        assign(vectors, quantizer, none, (2, 2), np.array([[0, 0], [0, 1]]))
    with pytest.raises(TokenizerError, match="no codebooks yet"):
        assign(vectors, ResidualKMeans(2, 2), none, (2, 2))
