"""Ceilings against enumeration, and the beam search against a plain one over dictionaries and exact fractions."""

import itertools
import json
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.diagnostics import beam_recall, collision_ceiling
from llmrec.diagnostics import ceiling as module
from llmrec.evaluation.baselines import ItemCF
from llmrec.evaluation.metrics import values
from llmrec.evaluation.ranks import Ranks
from llmrec.exceptions import DataError, TokenizerError


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_collision_ceiling_is_the_mean_over_all_orders(data: st.DataObject) -> None:
    codes = np.array(data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=9)))
    targets = data.draw(st.lists(st.integers(0, len(codes) - 1), min_size=1, max_size=6))
    ks = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True))
    found = collision_ceiling(codes, targets, ks)
    json.dumps(found, allow_nan=False)
    assert set(found) == {f"{name}@{k}" for name in ("HR", "NDCG") for k in ks}
    for k in ks:
        hits, gains = [], []
        for target in targets:
            group = [row for row in range(len(codes)) if (codes[row] == codes[target]).all()]
            if len(group) > 6:
                places = list(range(len(group)))
            else:
                places = [order.index(target) for order in itertools.permutations(group)]
            hits.append(sum(place < k for place in places) / len(places))
            gains.append(sum(1 / math.log2(place + 2) for place in places if place < k) / len(places))
        assert found[f"HR@{k}"] == pytest.approx(sum(hits) / len(hits))
        assert found[f"NDCG@{k}"] == pytest.approx(sum(gains) / len(gains))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_items_of_the_history_are_no_candidates(data: st.DataObject) -> None:
    codes = np.array(data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=9)))
    rows = st.integers(0, len(codes) - 1)
    targets = data.draw(st.lists(rows, min_size=1, max_size=6))
    histories = [data.draw(st.lists(rows, max_size=12)) for _ in targets]  # with repetitions, and the target itself
    arrays = [np.array(history, dtype=np.int32) for history in histories]
    found = collision_ceiling(codes, targets, [1, 2, 5], arrays)
    hits, gains = [], []
    for target, history in zip(targets, histories, strict=True):
        allowed = [row for row in range(len(codes)) if row == target or row not in history]
        group = [row for row in allowed if (codes[row] == codes[target]).all()]
        hits.append([min(k, len(group)) / len(group) for k in (1, 2, 5)])
        gains.append([sum(1 / math.log2(place + 2) for place in range(min(k, len(group)))) for k in (1, 2, 5)])
        gains[-1] = [gain / len(group) for gain in gains[-1]]
    for place, k in enumerate((1, 2, 5)):
        assert found[f"HR@{k}"] == pytest.approx(np.mean(hits, axis=0)[place])
        assert found[f"NDCG@{k}"] == pytest.approx(np.mean(gains, axis=0)[place])
    assert collision_ceiling(codes, targets, [1], [array[:0] for array in arrays]) == collision_ceiling(
        codes, targets, [1]
    )


def test_the_collision_ceiling_is_what_an_evaluation_of_a_perfect_model_gives() -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 4, size=(60, 2))
    targets = generator.integers(0, 60, 40)
    histories = [generator.integers(0, 60, 20) for _ in targets]
    histories = [history[history != target] for history, target in zip(histories, targets, strict=True)]
    ranks, _ = Ranks.from_groups(codes[targets][:, None], codes, targets, histories)
    found = collision_ceiling(codes, targets, [1, 10], histories)
    assert found["HR@1"] == pytest.approx(values(ranks, "HR", 1).mean())
    assert found["NDCG@10"] == pytest.approx(values(ranks, "NDCG", 10).mean())
    assert found["HR@1"] > collision_ceiling(codes, targets, [1])["HR@1"]


def test_unique_codes_leave_everything() -> None:
    assert collision_ceiling(np.arange(9).reshape(3, 3), [0, 1, 2], [1, 10]) == {
        **{"HR@1": 1.0, "NDCG@1": 1.0},
        **{"HR@10": 1.0, "NDCG@10": 1.0},
    }


def searched_plainly(codes: Sequence[Sequence[int]], chances: Sequence[Fraction], width: int) -> set[int]:
    """The rows that a beam search ends with: dictionaries, prefixes as tuples, one history."""
    beams: list[tuple[int, ...]] = [()]
    for length in range(1, len(codes[0]) + 1):
        extended = sorted({tuple(code[:length]) for code in codes if tuple(code[: length - 1]) in beams})
        masses = {
            prefix: sum(p for code, p in zip(codes, chances, strict=True) if tuple(code[:length]) == prefix)
            for prefix in extended
        }
        beams = sorted(extended, key=lambda prefix: (-masses[prefix], prefix))[:width]
    return {row for row, code in enumerate(codes) if tuple(code) in beams}


def recalled_plainly(codes, scores, histories, widths, k, exclude, smoothing, temperature):
    """The definition; the probabilities are the module's own, which `test_probabilities` checks."""
    recalls, masses, looked_for = {w: [] for w in widths}, {w: [] for w in widths}, []
    for history, row in zip(histories, scores, strict=True):
        candidates = np.array([[not (exclude and item in history) for item in range(len(codes))]])
        chances, scored = module._probabilities(np.array([row], dtype=float), candidates, smoothing, temperature)
        exact = [Fraction(chance) for chance in chances[0]]
        ranked = sorted(range(len(codes)), key=lambda item: (-exact[item], item))
        wanted = [item for item in ranked if scored[0, item] and exact[item] > 0][:k]
        if not wanted:
            continue
        looked_for.append(len(wanted))
        for width in widths:
            listed = searched_plainly(codes, exact, width)
            recalls[width].append(sum(item in listed for item in wanted) / len(wanted))
            masses[width].append(float(sum(exact[item] for item in listed) / sum(exact)))
    cases = len(looked_for)

    def mean(numbers):
        return sum(numbers) / len(numbers) if numbers else None

    return {
        "k": k,
        "cases": cases,
        "left_out": len(histories) - cases,
        "looked_for": mean(looked_for),
        "recall": {str(width): mean(recalls[width]) for width in widths},
        "kept_mass": {str(width): mean(masses[width]) for width in widths},
    }


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-12), key


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_the_beam_search_is_the_plain_one(data: st.DataObject) -> None:
    levels, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    code = st.lists(st.integers(0, size), min_size=levels, max_size=levels)
    codes = data.draw(st.lists(code, min_size=1, max_size=20))
    items = len(codes)
    cases = data.draw(st.integers(0, 4))
    temperature = data.draw(st.sampled_from([None, 0.5, 3.0]))
    number = st.sampled_from([0, 0, 1, 2, 3, 0.7] if temperature is None else [-2, 0, 1, 2.5])
    scores = [data.draw(st.lists(number, min_size=items, max_size=items)) for _ in range(cases)]
    histories = [np.array(data.draw(st.lists(st.integers(0, items - 1), max_size=4)), np.int64) for _ in scores]
    settings_ = {
        "widths": data.draw(st.lists(st.integers(1, 25), min_size=1, max_size=3, unique=True)),
        "k": data.draw(st.integers(1, 6)),
        "exclude": data.draw(st.booleans()),
        "smoothing": data.draw(st.sampled_from([0.0, 0.01, 0.5])),
        "temperature": temperature,
    }
    table = np.array(scores, dtype=np.float64).reshape(cases, items)
    place = iter(range(100))

    def score(batch):
        return table[[next(place) for _ in batch]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "batch_size", lambda items: data.draw(st.sampled_from([1, 8, 1000])))
        found = beam_recall(np.array(codes), score, histories, **settings_)
    json.dumps(found, allow_nan=False)
    lists = [history.tolist() for history in histories]
    assert_same(found, recalled_plainly(codes, scores, lists, **settings_))
    if max(settings_["widths"]) >= len({tuple(code) for code in codes}) and found["cases"]:
        assert found["recall"][str(max(settings_["widths"]))] == 1
        assert found["kept_mass"][str(max(settings_["widths"]))] == 1


@pytest.mark.parametrize("seed", range(3))
def test_larger_trees_with_real_scores(seed: int) -> None:
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 7, size=(250, 3))
    scores = generator.gamma(0.2, size=(6, 250))
    histories = [generator.integers(0, 250, 12) for _ in range(6)]
    settings_ = {"widths": [1, 3, 10, 60, 250], "k": 10, "exclude": True, "smoothing": 0.02, "temperature": None}
    found = beam_recall(codes, lambda batch: scores, histories, **settings_)
    lists = [history.tolist() for history in histories]
    assert_same(found, recalled_plainly(codes.tolist(), scores.tolist(), lists, **settings_))
    assert found["recall"]["1"] < found["recall"]["10"] < found["recall"]["250"] == 1


def test_a_probable_item_below_an_improbable_prefix_is_lost() -> None:
    codes = np.array([[0, 0], [1, 0], [1, 1], [1, 2]])
    scores = np.array([[4.0, 3.0, 2.0, 1.0]])
    history = [np.zeros(0, np.int64)]
    found = beam_recall(codes, lambda batch: scores, history, [1, 2], k=1, smoothing=0)
    # Prefix 1 has 6/10 of the mass, prefix 0 has the best item; of two beams both prefixes are kept.
    assert found["recall"] == {"1": 0.0, "2": 1.0}
    assert found["kept_mass"] == {"1": pytest.approx(0.3), "2": pytest.approx(0.7)}
    assert (found["cases"], found["left_out"], found["looked_for"]) == (1, 0, 1)


def test_ties_go_to_the_lowest_prefix_whatever_the_order_of_sums() -> None:
    # Both prefixes sum the same ten chances, in orders whose float sums differ; the lower one holds the best item.
    generator = np.random.default_rng(0)
    for _ in range(20):
        parts = generator.random(10)
        codes = np.array([[half, place] for half in (1, 0) for place in range(10)])
        scores = np.concatenate([generator.permutation(parts), generator.permutation(parts)])[None]
        found = beam_recall(codes, lambda batch, scores=scores: scores, [np.zeros(0, np.int64)], [1], k=10)
        lower = int(np.isin(np.lexsort((np.arange(20), -scores[0]))[:10], np.arange(10, 20)).sum())
        beam = beam_recall(codes[:, :1], lambda batch, scores=scores: scores, [np.zeros(0, np.int64)], [1], k=10)
        assert beam["recall"]["1"] == lower / 10
        assert beam["kept_mass"]["1"] == pytest.approx(0.5)
        best = 10 + int(scores[0, 10:].argmax())
        assert found["kept_mass"]["1"] == pytest.approx(0.99 * scores[0, best] / scores.sum() + 0.01 / 20)


def test_seen_items_are_no_candidates_unless_asked_for() -> None:
    codes = np.array([[0], [1], [2]])
    scores = np.array([[5.0, 3.0, 0.0]])
    history = [np.array([0, 0])]
    found = beam_recall(codes, lambda batch: scores, history, [1], k=2, smoothing=0)
    assert (found["looked_for"], found["recall"]["1"], found["kept_mass"]["1"]) == (1, 1, 1)
    found = beam_recall(codes, lambda batch: scores, history, [1], k=2, smoothing=0, exclude=False)
    assert (found["looked_for"], found["recall"]["1"], found["kept_mass"]["1"]) == (2, 0.5, 0.625)


def test_histories_without_a_score_are_left_out() -> None:
    codes = np.array([[0], [1]])
    scores = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    histories = [np.array([], np.int64), np.array([0]), np.array([0, 1]), np.array([1])]
    found = beam_recall(codes, lambda batch: scores, histories, [1], k=5)
    assert (found["cases"], found["left_out"], found["recall"]) == (1, 3, {"1": 1.0})
    nothing = beam_recall(codes, lambda batch: scores[:1], histories[:1], [1])
    assert (nothing["cases"], nothing["looked_for"], nothing["recall"], nothing["kept_mass"]) == (
        *(0, None),
        *({"1": None}, {"1": None}),
    )
    assert beam_recall(codes, lambda batch: scores, [], [1])["cases"] == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_probabilities(data: st.DataObject) -> None:
    items = data.draw(st.integers(1, 8))
    temperature = data.draw(st.sampled_from([None, 0.5, 4.0]))
    number = st.floats(0, 1e6) if temperature is None else st.floats(-50, 50)
    scores = data.draw(st.lists(number, min_size=items, max_size=items))
    candidates = data.draw(st.lists(st.booleans(), min_size=items, max_size=items))
    smoothing = data.draw(st.sampled_from([0.0, 0.1]))
    found, scored = module._probabilities(np.array([scores]), np.array([candidates]), smoothing, temperature)
    weights = [
        (score if temperature is None else math.exp(score / temperature)) * candidate
        for score, candidate in zip(scores, candidates, strict=True)
    ]
    total = math.fsum(weights)
    for item in range(items):
        chance = weights[item] / total if total else 0
        expected = candidates[item] * ((1 - smoothing) * chance + smoothing / max(1, sum(candidates)))
        assert found[0, item] == pytest.approx(expected, abs=1e-14)
        assert found[0, item] * 2**50 == round(found[0, item] * 2**50)
        if abs(chance - 2.0**-51) > 1e-17:
            assert scored[0, item] == (chance > 2.0**-51)


def test_scores_near_the_ends_of_float64_are_divided() -> None:
    candidates = np.ones((1, 2), dtype=bool)
    for scores in ([1.5e308, 1.5e308], [1e-300, 1e-300]):
        assert module._probabilities(np.array([scores]), candidates, 0.0, None)[0].tolist() == [[0.5, 0.5]]
    assert module._probabilities(np.array([[1e6, 1e6]]), candidates, 0.0, 0.01)[0].tolist() == [[0.5, 0.5]]


def test_codes_that_follow_the_reference_lose_less_than_random_ones() -> None:
    generator = np.random.default_rng(0)
    tastes = np.arange(2000) // 40
    by_taste = np.stack([tastes, np.arange(2000) % 40], axis=1)
    mixed = by_taste[generator.permutation(2000)]
    weights = generator.gamma(20.0, size=(30, 2000)) * np.where(tastes == np.arange(30)[:, None], 100, 1)
    histories = [np.zeros(0, np.int64)] * 30
    good = beam_recall(by_taste, lambda batch: weights, histories, [10])
    bad = beam_recall(mixed, lambda batch: weights, histories, [10])
    assert good["recall"]["10"] == 1
    assert bad["recall"]["10"] < 0.7
    assert bad["kept_mass"]["10"] < good["kept_mass"]["10"]


def test_of_a_surer_reference_the_same_beams_keep_more() -> None:
    generator = np.random.default_rng(3)
    codes = generator.integers(0, 40, size=(800, 2))
    scores = generator.gamma(0.5, size=(20, 800))
    histories = [np.zeros(0, np.int64)] * 20
    flat, sure = (beam_recall(codes, lambda batch, p=p: scores**p, histories, [10])["recall"]["10"] for p in (1, 6))
    assert flat < 0.7 < sure


def test_a_fitted_baseline_is_a_reference() -> None:
    generator = np.random.default_rng(1)
    train = [generator.integers(0, 60, 8) for _ in range(50)]
    reference = ItemCF().fit(train, 60)
    codes = generator.integers(0, 5, size=(60, 2))
    histories = [history[:5] for history in train[:20]]
    found = beam_recall(codes, reference.scores, histories, [2, 5, 25])
    lists = [history.tolist() for history in histories]
    scores = reference.scores(histories).tolist()
    assert_same(found, recalled_plainly(codes.tolist(), scores, lists, [2, 5, 25], 10, True, 0.01, None))
    # With every ID in the beam, the items looked for are the baseline's own list.
    assert found["recall"]["25"] == 1
    assert found["recall"]["2"] < found["recall"]["5"] < 1


def test_misuse_is_refused() -> None:
    codes, history = np.array([[0], [1]]), [np.array([0])]
    ones = np.ones((1, 2))

    def run(scores=ones, histories=history, widths=(1,), **options):
        return beam_recall(codes, lambda batch: scores, histories, widths, **options)

    for options in ({"widths": ()}, {"widths": (1, 0)}, {"k": 0}):
        with pytest.raises(DataError, match="Beam widths are"):
            run(**options)
    for options in ({"smoothing": 1.0}, {"smoothing": -0.1}, {"temperature": 0.0}, {"temperature": np.inf}):
        with pytest.raises(DataError, match="The smoothing is"):
            run(**options)
    for wrong in (np.ones((1, 3)), np.ones((2, 2)), np.array([[np.nan, 1]]), np.array([[np.inf, 1]])):
        with pytest.raises(DataError, match="not finite"):
            run(wrong)
    with pytest.raises(DataError, match=r"is -1\.0, which is no probability"):
        run(np.array([[-1.0, 1]]))
    for rows in ([2], [-1]):
        with pytest.raises(DataError, match="codes of 2 items"):
            run(histories=[np.array(rows)])
    for targets in ([], [2], [-1]):
        with pytest.raises(DataError, match="targets, or one is outside the 2 items"):
            collision_ceiling(codes, targets, [1])
    with pytest.raises(DataError, match="2 histories do not fit 1 targets"):
        collision_ceiling(codes, [0], [1], [np.array([0])] * 2)
    with pytest.raises(DataError, match="codes of 2 items"):
        collision_ceiling(codes, [0], [1], [np.array([2])])
    with pytest.raises(DataError, match="k is 0"):
        collision_ceiling(codes, [0], [0])
    with pytest.raises(TokenizerError, match="no semantic IDs"):
        beam_recall(np.zeros((0, 1), np.int64), lambda batch: ones, history, [1])
