import itertools
import math

import numpy as np
import pytest

from llmrec.evaluation.identifiers import Identifiers
from llmrec.evaluation.metrics import values
from llmrec.evaluation.ranks import Ranks, flattened, rank_scores
from llmrec.exceptions import DataError


def integers(*sequences):
    return [np.array(sequence, dtype=np.int32) for sequence in sequences]


def possible_places(blocks, target):
    """The target's place in every order that keeps the blocks in order; empty if no block holds it."""
    places = []
    for order in itertools.product(*(itertools.permutations(block) for block in blocks)):
        flat = [item for block in order for item in block]
        if target in flat:
            places.append(flat.index(target))
    return places


def check(ranks, case, places):
    """The interval is that of the possible places, each of which is equally frequent."""
    if not places:
        assert (ranks.better[case], ranks.ties[case]) == (-1, 0)
        return
    assert ranks.better[case] == min(places)
    assert ranks.better[case] + ranks.ties[case] == max(places)
    assert {places.count(place) for place in range(min(places), max(places) + 1)} == {
        len(places) // (max(places) - min(places) + 1)
    }


def test_lists_ragged_and_padded():
    ragged = Ranks.from_lists([[4, 7, 4], [], [3, 1, 2], [4, 4, -1]], [4, 0, 2, 4])
    assert ragged.better.tolist() == [0, -1, 2, 0]
    assert ragged.ties.tolist() == [0] * 4
    assert ragged.absent.tolist() == [False, True, False, False]
    padded = Ranks.from_lists(np.array([[4, 7, 4], [-1, -1, -1], [-1, 3, 2], [1, 1, 4]], dtype=np.int32), [7, 0, 2, 4])
    assert padded.better.tolist() == [1, -1, 2, 2]
    assert len(Ranks.from_lists(np.empty((3, 0), dtype=int), [1, 2, 3])) == 3
    assert len(Ranks.from_lists([], [])) == 0
    with pytest.raises(DataError, match="item row -1"):
        Ranks.from_lists([[1]], [-1])
    with pytest.raises(DataError, match="1 lists do not fit 2 targets"):
        Ranks.from_lists([[1]], [1, 2])


def test_an_array_flattens_as_its_rows_do():
    table = np.arange(12).reshape(3, 4)
    for ours, theirs in zip(flattened(table), flattened(list(table)), strict=True):
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("better", "ties", "said"),
    [([0, -2], [0, 0], "Case 1 has -2 better"), ([0, -1], [0, 3], "-1 better and 3 tied"), ([0], [-1], "-1 tied")],
)
def test_ranks_that_no_ranking_gives(better, ties, said):
    with pytest.raises(DataError, match=said):
        Ranks(np.array(better), np.array(ties))


def test_ranks_of_two_shapes():
    with pytest.raises(DataError, match=r"\(2,\) and \(1,\)"):
        Ranks(np.zeros(2, int), np.zeros(1, int))


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_scores_equal_the_enumeration_of_all_orders(seed, exclude_seen):
    rng = np.random.default_rng(seed)
    num_items, cases = int(rng.integers(1, 7)), 7
    scores = rng.choice([-np.inf, -1.5, 0.0, -0.0, 2.0, np.inf], size=(cases, num_items))
    histories = integers(*(rng.integers(0, num_items, size=rng.integers(0, 5)) for _ in range(cases)))
    targets = rng.integers(0, num_items, size=cases)
    k, begin = int(rng.integers(0, 9)), iter(range(0, cases, 3))

    def score(batch):
        first = next(begin)
        assert [h.tolist() for h in batch] == [h.tolist() for h in histories[first : first + 3]]
        return scores[first : first + 3]

    before = scores.copy()
    ranks, lists = rank_scores(score, histories, targets, num_items, exclude_seen, k, batch=3)
    assert np.array_equal(scores, before)
    assert lists.shape == (cases, k)
    for case in range(cases):
        allowed = [
            item
            for item in range(num_items)
            if scores[case, item] > -np.inf and not (exclude_seen and item in histories[case])
        ]
        strata = sorted({scores[case, item] for item in allowed}, reverse=True)
        blocks = [[item for item in allowed if scores[case, item] == value] for value in strata]
        check(ranks, case, possible_places(blocks, targets[case]))
        best = sorted(allowed, key=lambda item: (-scores[case, item], item))[:k]
        assert lists[case].tolist() == best + [-1] * (k - len(best))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.uint8])
def test_larger_lists_with_ties_at_their_end(dtype):
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 12, size=(50, 300)).astype(dtype)
    histories = integers(*(rng.integers(0, 300, size=20) for _ in range(50)))
    chunks = []
    targets = rng.integers(0, 300, size=50)
    ranks, lists = rank_scores(
        lambda batch: chunks.append(len(batch)) or scores[sum(chunks[:-1]) : sum(chunks)],
        histories,
        targets,
        300,
        k=40,
    )
    for case in range(50):
        allowed = [item for item in range(300) if item not in histories[case]]
        expected = sorted(allowed, key=lambda item: (-float(scores[case, item]), item))
        assert lists[case].tolist() == expected[:40]
    # The place in the list is one of the places that the interval leaves open.
    held = np.flatnonzero(~Ranks.from_lists(lists, targets).absent)
    place = Ranks.from_lists(lists, targets).better[held]
    assert len(held) > 3
    assert (ranks.better[held] <= place).all()
    assert (place <= ranks.better[held] + ranks.ties[held]).all()


def test_batches_stay_under_the_limit_and_do_not_matter(monkeypatch):
    table = np.random.default_rng(0).random((9, 100)).round(2)
    histories = integers(*([case] for case in range(9)))
    sizes = []

    def score(batch):
        sizes.append(len(batch))
        return table[[int(history[0]) for history in batch]]

    whole = rank_scores(score, histories, np.arange(20, 29), 100, k=5)
    monkeypatch.setattr("llmrec.evaluation.ranks._MATRIX_BYTES", 8 * 100 * 4 + 7)
    parts = rank_scores(score, histories, np.arange(20, 29), 100, k=5)
    assert sizes == [9, 4, 4, 1]
    assert np.array_equal(whole[1], parts[1])
    assert np.array_equal(whole[0].better, parts[0].better)


def test_no_cases_and_no_candidates():
    ranks, lists = rank_scores(lambda _: np.empty((0, 3)), [], [], 3, k=2)
    assert (len(ranks), lists.shape) == (0, (0, 2))
    ranks, lists = rank_scores(lambda h: np.zeros((1, 2)), integers([0, 1]), [1], 2, k=2)
    assert (ranks.better.tolist(), ranks.ties.tolist(), lists.tolist()) == ([-1], [0], [[-1, -1]])
    assert rank_scores(lambda h: np.zeros((1, 1)), integers([]), [0], 1, k=2)[1].tolist() == [[0, -1]]


def test_bad_scores_name_the_case_and_the_item():
    def ask(scores, targets=(0, 0, 0), histories=([], [], []), **more):
        rows = iter(np.asarray(scores))
        return rank_scores(lambda b: np.stack([next(rows) for _ in b]), integers(*histories), targets, 2, **more)

    with pytest.raises(DataError, match="Case 2 has the score NaN for item row 1"):
        ask([[0.0, 1.0], [0.0, 1.0], [0.0, math.nan]], batch=2)
    with pytest.raises(DataError, match="Case 0 has the score NaN"):  # also where the history would hide it
        ask([[0.0, math.nan]] * 3, histories=([1], [], []))
    with pytest.raises(DataError, match=r"shape \(3, 4\).*2 items"):
        ask(np.zeros((3, 4)))
    with pytest.raises(DataError, match="complex128"):
        ask(np.zeros((3, 2), dtype=complex))
    with pytest.raises(DataError, match="target is the item row 2"):
        ask(np.zeros((3, 2)), targets=(0, 2, 0))
    with pytest.raises(DataError, match="target is the item row -1"):
        ask(np.zeros((3, 2)), targets=(0, -1, 0))
    with pytest.raises(DataError, match="history's item is the item row 5"):
        ask(np.zeros((3, 2)), histories=([5], [], []))
    with pytest.raises(DataError, match="2 histories do not fit 3"):
        ask(np.zeros((3, 2)), histories=([], []))
    for wrong in ({"k": -1}, {"batch": 0}):
        with pytest.raises(DataError, match="Give a k of 0 or more"):
            ask(np.zeros((3, 2)), **wrong)


def draw(seed):
    """A small catalog whose items share IDs, beams with repeated, invalid and padded IDs, histories, targets."""
    rng = np.random.default_rng(seed)
    num_items, cases = int(rng.integers(1, 7)), 6
    codes = rng.integers(0, 2, size=(num_items, 2))
    beams = rng.integers(-1 if seed % 2 else 0, 3, size=(cases, int(rng.integers(0, 6)), 2))
    histories = integers(*(rng.integers(0, num_items, size=rng.integers(0, 4)) for _ in range(cases)))
    return codes, beams, histories, rng.integers(0, num_items, size=cases)


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("seed", range(60))
def test_groups_equal_the_enumeration_of_all_orders(seed, exclude_seen):
    codes, beams, histories, targets = draw(seed)
    items, ids = Ranks.from_groups(beams, codes, targets, histories if exclude_seen else None)
    assert not ids.ties.any()
    for case, target in enumerate(targets):
        allowed = [item for item in range(len(codes)) if not (exclude_seen and item in histories[case])]
        order = []
        for beam in beams[case].tolist():
            exists = beam in codes.tolist()
            possible = any(codes[item].tolist() == beam for item in allowed)
            if min(beam) >= 0 and beam not in order and (possible or not exists):
                order.append(beam)
        blocks = [[item for item in allowed if codes[item].tolist() == beam] for beam in order]
        check(items, case, possible_places(blocks, target))
        own = codes[target].tolist()
        assert ids.better[case] == (order.index(own) if target in allowed and own in order else -1)


def test_without_invalid_ids_groups_agree_with_lists_of_items():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, size=(40, 3))
    lists = np.stack([rng.permutation(40)[:12] for _ in range(200)])
    histories = integers(*(rng.integers(0, 40, size=6) for _ in range(200)))
    targets = rng.integers(0, 40, size=200)
    # A list of items names an ID through the items that the history allows, a beam names it anyway.
    allowed = np.array(
        [[item if item not in h else -1 for item in one] for one, h in zip(lists, histories, strict=True)]
    )
    beams = np.where((allowed >= 0)[..., None], codes[allowed], -1)
    items, ids = Ranks.from_groups(beams, codes, targets, histories)
    levels = Identifiers.from_codes(codes).rank_lists(lists, targets, histories)
    assert (items.ties > 0).any()
    for ours, theirs in ((items, levels.items), (ids, levels.ids)):
        assert np.array_equal(ours.better, theirs.better)
        assert np.array_equal(ours.ties, theirs.ties)


def test_an_id_level_hit_can_be_an_item_level_miss():
    codes = [[0, 0]] * 8 + [[0, 1], [0, 1]]
    items, ids = Ranks.from_groups([[[0, 0], [0, 1]]], codes, [9])
    assert values(ids, "HR", 5).tolist() == [1.0]
    assert values(items, "HR", 5).tolist() == [0.0]
    assert values(items, "HR", 9).tolist() == [0.5]


def test_large_codes_do_not_overflow():
    largest = np.iinfo(np.int64).max
    codes = np.array([[largest, 0, largest], [largest, largest, 0], [0, largest, largest]])
    items, ids = Ranks.from_groups(codes[None, [2, 1]], codes, [1])
    assert (items.better.tolist(), items.ties.tolist(), ids.better.tolist()) == ([1], [0], [1])


def test_bad_groups():
    with pytest.raises(DataError, match=r"Beams \(1, 1, 3\), codes \(2, 2\)"):
        Ranks.from_groups(np.zeros((1, 1, 3), int), np.zeros((2, 2), int), [0])
    with pytest.raises(DataError, match="1 targets do not fit"):
        Ranks.from_groups(np.zeros((2, 1, 2), int), np.zeros((2, 2), int), [0])
    with pytest.raises(DataError, match="code -1"):
        Ranks.from_groups(np.zeros((1, 1, 2), int), [[0, -1]], [0])
    with pytest.raises(DataError, match="target is the item row 1"):
        Ranks.from_groups(np.zeros((1, 1, 2), int), [[0, 0]], [1])
    with pytest.raises(DataError, match="history's item is the item row 3"):
        Ranks.from_groups(np.zeros((1, 1, 2), int), [[0, 0]], [0], integers([3]))
    with pytest.raises(DataError, match="2 histories do not fit 1"):
        Ranks.from_groups(np.zeros((1, 1, 2), int), [[0, 0]], [0], integers([0], [0]))
