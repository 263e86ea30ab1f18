import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from llmrec.evaluation.identifiers import Identifiers
from llmrec.evaluation.levels import Levels
from llmrec.evaluation.metrics import values
from llmrec.evaluation.ranks import Ranks
from llmrec.exceptions import DataError

METRICS = [("HR", 1), ("HR", 2), ("NDCG", 3), ("NDCG", 5), ("MRR", 4)]


def gain(metric: str, k: int, place: int) -> float:
    if place >= k:
        return 0.0
    return {"HR": 1.0, "NDCG": 1 / np.log2(place + 2), "MRR": 1 / (place + 1)}[metric]


def places_of_items(blocks: list[list[int]], target: int) -> list[int]:
    """The target's place in every order of the items that respects the order of the blocks."""
    found = []
    for order in itertools.product(*(itertools.permutations(block) for block in blocks)):
        flat = [item for block in order for item in block]
        if target in flat:
            found.append(flat.index(target))
    return found


def draw(rng: np.random.Generator) -> tuple[Identifiers, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A small catalog with collisions: IDs, codes, popularity, histories, targets."""
    num_items = int(rng.integers(1, 7))
    codes = rng.integers(0, 2, size=(num_items, 2))
    cases = 6
    targets = rng.integers(0, num_items, size=cases)
    histories = [rng.integers(0, num_items, size=rng.integers(0, 3)) for _ in range(cases)]
    return Identifiers.from_codes(codes), codes, rng.integers(0, 3, size=num_items), histories, targets


def check(levels: Levels, case: int, items: list[int], ids: list[int]) -> None:
    """Both levels of one case against all equally likely places, [] being a miss."""
    for ranks, places in ((levels.items, items), (levels.ids, ids)):
        one = Ranks(ranks.better[case : case + 1], ranks.ties[case : case + 1])
        for metric, k in METRICS:
            expected = np.mean([gain(metric, k, place) for place in places]) if places else 0.0
            assert values(one, metric, k)[0] == pytest.approx(expected, abs=1e-12)
        if places:
            assert one.better[0] == min(places)
            assert one.ties[0] == max(places) - min(places)
        else:
            assert (one.better[0], one.ties[0]) == (-1, 0)


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("rule", ["expected", "popularity"])
@pytest.mark.parametrize("seed", range(25))
def test_lists_equal_the_enumeration_of_all_orders(seed: int, rule: str, exclude_seen: bool) -> None:
    rng = np.random.default_rng(seed)
    ids, codes, counts, histories, targets = draw(rng)
    num_items = len(codes)
    lists = np.full((len(targets), num_items + 2), -1)
    for row in lists:  # with repeats and with padding at both ends
        length = rng.integers(0, num_items + 1)
        row[1 : 1 + length] = rng.integers(0, num_items, size=length)
    given = lists if seed % 2 else [row[row >= 0].tolist() for row in lists]
    levels = ids.rank_lists(given, targets, histories if exclude_seen else None, rule, counts)
    for case, (row, history, target) in enumerate(zip(lists, histories, targets, strict=True)):
        candidates = [i for i in range(num_items) if not exclude_seen or i not in history]
        order: list[tuple[int, ...]] = []
        for item in row[row >= 0]:
            if item in candidates and tuple(codes[item]) not in order:
                order.append(tuple(codes[item]))
        blocks = [[i for i in candidates if tuple(codes[i]) == identifier] for identifier in order]
        if rule == "popularity":
            flat = [i for block in blocks for i in sorted(block, key=lambda i: (-counts[i], i))]
            items = [flat.index(target)] if target in flat else []
        else:
            items = places_of_items(blocks, target)
        own = tuple(codes[target])
        check(levels, case, items, [order.index(own)] if own in order and target in candidates else [])


@pytest.mark.parametrize("pool", ["sum", "max"])
@pytest.mark.parametrize("rule", ["expected", "popularity"])
@pytest.mark.parametrize("seed", range(25))
def test_scores_equal_the_enumeration_of_all_orders(seed: int, rule: str, pool: str) -> None:
    rng = np.random.default_rng(100 + seed)
    ids, codes, counts, histories, targets = draw(rng)
    num_items = len(codes)
    scores = rng.integers(-2, 3, size=(len(targets), num_items)) / 2
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    exclude_seen = bool(seed % 3)
    asked = iter(range(len(targets)))

    def score(batch: list[np.ndarray]) -> np.ndarray:
        return scores[[next(asked) for _ in batch]]

    levels = ids.rank_scores(score, histories, targets, pool, rule, counts, exclude_seen, batch=4)
    for case, (history, target) in enumerate(zip(histories, targets, strict=True)):
        candidates = [i for i in range(num_items) if not (exclude_seen and i in history) and scores[case, i] > -np.inf]
        members: dict[tuple[int, ...], list[int]] = {}
        for item in candidates:
            members.setdefault(tuple(codes[item]), []).append(item)
        pooled = {
            identifier: (sum if pool == "sum" else max)(scores[case, item] for item in inside)
            for identifier, inside in members.items()
        }
        if target not in candidates:
            check(levels, case, [], [])
            continue
        strata = sorted(set(pooled.values()), reverse=True)
        tied_ids = [[identifier for identifier in pooled if pooled[identifier] == value] for value in strata]
        tied_items = [[i for identifier in tied for i in members[identifier]] for tied in tied_ids]
        if rule == "expected":
            items = places_of_items(tied_items, target)
            own = list(members).index(tuple(codes[target]))
            numbered = [[list(members).index(identifier) for identifier in tied] for tied in tied_ids]
            check(levels, case, items, places_of_items(numbered, own))
        else:
            flat = [i for stratum in tied_items for i in sorted(stratum, key=lambda i: (-counts[i], i))]
            order = list(dict.fromkeys(tuple(codes[item]) for item in flat))
            check(levels, case, [flat.index(target)], [order.index(tuple(codes[target]))])


@pytest.mark.parametrize("rule", ["expected", "popularity"])
def test_the_id_level_never_reads_lower_and_unique_ids_read_alike(rule: str) -> None:
    rng = np.random.default_rng(0)
    num_items, cases = 60, 200
    targets = rng.integers(0, num_items, size=cases)
    histories = [rng.choice(num_items, size=3, replace=False) for _ in range(cases)]
    scores = rng.integers(0, 8, size=(num_items, num_items)).astype(float)
    counts = rng.integers(0, 5, size=num_items)

    def score(batch: list[np.ndarray]) -> np.ndarray:
        return np.stack([scores[history].sum(axis=0) for history in batch])

    colliding = Identifiers.from_groups(rng.integers(0, 25, size=num_items))
    unique = Identifiers.from_groups(np.arange(num_items))
    lists = [np.argsort(-row, kind="stable")[:30] for row in score(histories)]
    for ids in (colliding, unique):
        for levels in (
            ids.rank_scores(score, histories, targets, "max", rule, counts),
            ids.rank_lists(lists, targets, histories, rule, counts),
        ):
            for metric, k in METRICS:
                gap = values(levels.ids, metric, k) - values(levels.items, metric, k)
                assert (gap >= -1e-12).all()
                assert gap.any() == (ids is colliding)


def test_lists_and_the_beams_that_spell_them_read_alike() -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 5, size=(60, 2))
    targets = rng.integers(0, 60, size=100)
    histories = [rng.choice(60, size=4, replace=False) for _ in targets]
    lists = [[item for item in rng.permutation(60)[:25] if item not in history][:15] for history in histories]
    levels = Identifiers.from_codes(codes).rank_lists(lists, targets, histories)
    items, ids = Ranks.from_groups(codes[np.array(lists)], codes, targets, histories)
    for one, other in ((levels.items, items), (levels.ids, ids)):
        assert one.better.tolist() == other.better.tolist()
        assert one.ties.tolist() == other.ties.tolist()


def test_shares_by_hand() -> None:
    ids = Identifiers.from_codes(np.array([[3, 1], [0, 0], [3, 1], [0, 1], [0, 0], [3, 1]]))
    assert ids.groups.tolist() == [0, 1, 0, 2, 1, 0]
    assert ids.document() == {
        "items": 6,
        "ids": 3,
        "beyond_unique_share": 0.5,
        "sharing_share": pytest.approx(5 / 6),
        "largest_group": 3,
    }


def test_the_control_keeps_the_sizes_and_moves_the_items() -> None:
    ids = Identifiers.from_groups(np.random.default_rng(1).integers(0, 40, size=100))
    shuffled = ids.shuffled(7)
    assert sorted(shuffled.sizes) == sorted(ids.sizes)
    assert (shuffled.groups == ids.shuffled(7).groups).all()
    assert (shuffled.groups != ids.groups).any()
    together = ids.groups[:, None] == ids.groups
    assert (together != (shuffled.groups[:, None] == shuffled.groups)).any()


def test_wrong_input_is_refused_with_what_to_do() -> None:
    ids = Identifiers.from_codes([[0], [0], [1]])
    with pytest.raises(DataError, match=r"shape \(3,\).*Give one code per item"):
        Identifiers.from_codes(np.array([1, 2, 3]))
    with pytest.raises(DataError, match="float64"):
        Identifiers.from_codes(np.array([[1.5]]))
    with pytest.raises(DataError, match="no table"):
        Identifiers.from_codes(np.empty((0, 3), dtype=int))
    with pytest.raises(DataError, match="2 lists do not fit 1 targets"):
        ids.rank_lists([[0], [1]], [0])
    with pytest.raises(DataError, match="1 histories do not fit 2 targets"):
        ids.rank_lists([[0], [1]], [0, 1], [np.array([2])])
    with pytest.raises(DataError, match="A list has the item row 3, the table of IDs 3 items"):
        ids.rank_lists([[3]], [0])
    with pytest.raises(DataError, match="A target has the item row 5"):
        ids.rank_lists([[0]], [5])
    with pytest.raises(DataError, match="A target is the item row -1"):
        ids.rank_lists([[0]], [-1])
    with pytest.raises(DataError, match="0 counts for 3 items"):
        ids.rank_lists([[0]], [0], rule="popularity")
    with pytest.raises(DataError, match="Case 1 has the score NaN for item row 2"):
        ids.rank_scores(lambda _: np.array([[0, 0, 0], [0, 0, np.nan]]), [np.array([], int)] * 2, [0, 1])
    with pytest.raises(DataError, match=r"shape \(1, 2\), the catalog has 3 items"):
        ids.rank_scores(lambda _: np.zeros((1, 2)), [np.array([], int)], [0])


PUBLISHED = {
    "amazon-beauty": {"rkmeans_native": 0.130, "rqvae_native": 0.050, "letter_native": 0.007, "quasid_native": 0.0031}
    | {"letter_repo": 0.0011},
    "amazon-scientific": {"rkmeans_native": 0.201, "rqvae_native": 0.128, "quasid_native": 0.028}
    | {"letter_native": 0.006},
}


@pytest.mark.parametrize(("data", "table", "share"), [(d, t, s) for d, ts in PUBLISHED.items() for t, s in ts.items()])
def test_published_tables_have_the_published_shares(shared_data: Path, data: str, table: str, share: float) -> None:
    path = shared_data / data / "published_semantic_ids" / f"{table}.json.gz"
    codes = json.loads(gzip.decompress(path.read_bytes()))
    numbers = {token: number for number, token in enumerate(sorted({t for code in codes.values() for t in code}))}
    ids = Identifiers.from_codes([[numbers[token] for token in code] for code in codes.values()])
    digits = 4 if share < 0.005 else 3
    assert round(ids.beyond_unique, digits) == share
