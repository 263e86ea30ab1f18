import json
from fractions import Fraction

import numpy as np
import pytest

from llmrec.evaluation.identifiers import Identifiers
from llmrec.evaluation.levels import Levels, ratio_interval
from llmrec.evaluation.metrics import values
from llmrec.evaluation.ranks import Ranks


def test_document_labels_the_id_level_and_pairs_the_difference() -> None:
    rng = np.random.default_rng(3)
    ids = Identifiers.from_groups(rng.integers(0, 30, size=60))
    targets = rng.integers(0, 60, size=300)
    lists = [rng.permutation(60)[:20] for _ in targets]
    levels = ids.rank_lists(lists, targets)
    found = levels.document(np.arange(300), resamples=300, seed=1)
    for metric, k in (("HR", 10), ("NDCG", 10)):
        item, identifier = values(levels.items, metric, k), values(levels.ids, metric, k)
        assert found[f"{metric}@10"] == pytest.approx(item.mean())
        assert found[f"{metric}@10 (ID level)"] == pytest.approx(identifier.mean())
        assert found[f"{metric}@10 inflation"] == pytest.approx((identifier - item).mean())
        low, high = found[f"{metric}@10 inflation interval95"]
        error = 1.96 * (identifier - item).std() / np.sqrt(300)
        assert low == pytest.approx((identifier - item).mean() - error, abs=error / 3)
        assert high == pytest.approx((identifier - item).mean() + error, abs=error / 3)
        assert found[f"{metric}@10 inflation p_value"] < 0.01
        assert found[f"{metric}@10 ratio"] == pytest.approx(identifier.mean() / item.mean())
        low, high = found[f"{metric}@10 ratio interval95"]
        assert 1 < low < found[f"{metric}@10 ratio"] < high
    assert json.loads(json.dumps(found)) == found


def test_a_ranking_without_hits_has_no_ratio() -> None:
    nothing = Ranks(np.full(5, -1), np.zeros(5, dtype=np.int64))
    first = Ranks(np.zeros(5, dtype=np.int64), np.zeros(5, dtype=np.int64))
    found = Levels(nothing, first).document(np.arange(5), [("HR", 10)], resamples=20)
    assert (found["HR@10"], found["HR@10 (ID level)"], found["HR@10 ratio"]) == (0.0, 1.0, None)
    assert found["HR@10 ratio interval95"] == [None, None]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert Levels(nothing, nothing).document(np.arange(5), [("HR", 10)], resamples=20)["HR@10 ratio"] == 1.0


def exact_quantiles(above: list[int], below: list[int]) -> tuple[float, float]:
    """The ratio's 2.5 % and 97.5 % quantiles over all n^n resamples of n users."""
    count = len(above)
    ratios: list[Fraction] = []
    for draw in np.ndindex(*([count] * count)):
        ratios.append(Fraction(sum(above[user] for user in draw), sum(below[user] for user in draw)))
    ratios.sort()
    return float(ratios[int(0.025 * len(ratios))]), float(ratios[int(0.975 * len(ratios))])


@pytest.mark.parametrize("seed", range(4))
def test_the_ratio_of_sums_is_resampled_by_user(seed: int) -> None:
    rng = np.random.default_rng(seed)
    below, above = rng.integers(1, 6, size=5), rng.integers(1, 9, size=5)
    # Every user's total is spread over three cases in any order: users are drawn, not cases.
    users = rng.permutation(np.repeat(np.arange(5), 3))
    numerator, denominator = np.zeros((15, 1)), np.zeros((15, 1))
    for user in range(5):
        cases = np.flatnonzero(users == user)
        numerator[cases, 0] = rng.multinomial(above[user], [1 / 3] * 3)
        denominator[cases, 0] = rng.multinomial(below[user], [1 / 3] * 3)
    ratio, low, high = ratio_interval(numerator, denominator, users + 10, resamples=20_000, seed=seed)[:, 0]
    assert ratio == pytest.approx(above.sum() / below.sum())
    exact_low, exact_high = exact_quantiles(above.tolist(), below.tolist())
    assert low == pytest.approx(exact_low, rel=0.03)
    assert high == pytest.approx(exact_high, rel=0.03)
    again = ratio_interval(numerator, denominator, users, resamples=20_000, seed=seed)
    assert (again[:, 0] == [ratio, low, high]).all()


def test_a_ratio_is_tighter_than_its_parts_because_they_are_of_the_same_users() -> None:
    below = np.random.default_rng(0).random((500, 1)) ** 8
    ratio, low, high = ratio_interval(1.25 * below, below, np.arange(500), resamples=200)[:, 0]
    assert (ratio, low, high) == pytest.approx((1.25, 1.25, 1.25))
