"""What a training changed: paired, by users, over all its metrics, and said in words that fit the numbers."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.evaluation.evaluation import Evaluation
from llmrec.evaluation.outcome import outcome, outcome_over_seeds, outcome_rows, outcome_table
from llmrec.evaluation.ranks import Ranks
from llmrec.evaluation.uncertainty import holm, paired_difference
from llmrec.exceptions import DataError

KS = (1, 5, 10, 20, 50)


def evaluation(places, system="sft", users=None, ties=None, counted=None, ks=KS, **facts):
    cases = len(places)
    return Evaluation(
        system=system,
        user_ids=[f"u{n}" for n in (range(cases) if users is None else users)],
        targets=[f"i{n}" for n in range(cases)],
        ranks=Ranks(np.array(places), np.zeros(cases, int) if ties is None else np.array(ties)),
        counted=np.ones(cases, dtype=bool) if counted is None else np.array(counted),
        slices={},
        ks=ks,
        facts={"split": "abc", "part": "test", "exclude_seen": True} | facts,
    )


def gain(name, place, ties=0):
    """One case's value by definition: the mean over the places that the target may have."""
    metric, k = name.split("@")
    if place < 0:
        return 0.0
    each = [
        (1.0 if metric == "HR" else 1 / math.log2(p + 2)) if p < int(k) else 0.0
        for p in range(place, place + ties + 1)
    ]
    return sum(each) / len(each)


@pytest.fixture(scope="module")
def better():
    """Two hundred users of whom most stand far better after."""
    rng = np.random.default_rng(0)
    before = rng.integers(-1, 60, 200)
    after = np.where(rng.random(200) < 0.7, before // 4, before)
    return before.tolist(), after.tolist()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(5, 40))
def test_every_number_equals_its_definition(seed, cases):
    rng = np.random.default_rng(seed)
    users = rng.integers(0, 5 + cases // 2, cases).tolist()
    counted = rng.random(cases) < 0.8
    counted[0] = True
    places, ties = rng.integers(-1, 30, (2, cases)), rng.integers(0, 4, (2, cases))
    ties[places < 0] = 0
    before, after = (evaluation(places[s], name, users, ties[s], counted) for s, name in ((0, "sft"), (1, "rl")))
    found = outcome(before, after, ks=(5, 10), resamples=300, seed=3)
    names = ["HR@5", "NDCG@5", "HR@10", "NDCG@10"]
    assert list(found["metrics"]) == names
    table = np.array(
        [
            [[gain(name, int(places[s, c]), int(ties[s, c])) for name in names] for c in np.flatnonzero(counted)]
            for s in (0, 1)
        ]
    )
    own = before.user_places()[counted]
    gaps = paired_difference(table[1], table[0], own, 300, 3)
    corrected = holm(gaps.p_value)
    for place, name in enumerate(names):
        got = found["metrics"][name]
        assert got["before"] == pytest.approx(table[0][:, place].mean())
        assert got["after"] == pytest.approx(table[1][:, place].mean())
        assert got["difference"] == pytest.approx(table[1][:, place].mean() - table[0][:, place].mean(), abs=1e-12)
        assert got["difference interval95"] == pytest.approx([gaps.low[place], gaps.high[place]], abs=1e-9)
        assert (got["p_value"], got["p_holm"]) == pytest.approx((gaps.p_value[place], corrected[place]))
    assert (found["users"], found["cases"], found["tests"]) == (len(set(own)), counted.sum(), 4)
    json.dumps(found, allow_nan=False)


def test_help_and_harm_are_told_apart_from_no_difference(better):
    before, after = better
    helped = outcome(evaluation(before), evaluation(after, "rl"))
    assert helped["verdict"] == "helped"
    assert helped["primary"] == "NDCG@10"
    assert helped["metrics"]["NDCG@10"]["difference"] > 0
    assert "rl is better than sft: NDCG@10" in helped["sentence"]
    hurt = outcome(evaluation(after), evaluation(before, "rl"))
    assert hurt["verdict"] == "hurt"
    assert hurt["metrics"]["NDCG@10"]["difference"] == -helped["metrics"]["NDCG@10"]["difference"]
    assert "rl is worse than sft" in hurt["sentence"]
    same = outcome(evaluation(before), evaluation(before, "rl"))
    assert same["verdict"] == "no difference"
    assert same["metrics"]["NDCG@10"]["difference interval95"] == [0.0, 0.0]
    assert same["metrics"]["NDCG@10"]["p_holm"] == 1.0
    assert "cannot be told from" in same["sentence"]


def test_the_correction_decides():
    # Six users of thirty move up: p of one test is below 0.05, of the family it is not.
    before = [12] * 6 + [30] * 24
    after = [0] * 6 + [30] * 24
    found = outcome(evaluation(before), evaluation(after, "rl"), ks=(1, 5, 10, 20, 50), resamples=2000)
    decided = found["metrics"]["NDCG@10"]
    assert decided["p_value"] < 0.05 < decided["p_holm"]
    assert found["verdict"] == "no difference"


def test_default_metrics_are_those_that_the_lists_are_long_enough_for():
    few = evaluation([0, 3, 9], ks=(5, 10, 20))
    assert list(outcome(few, few)["metrics"]) == [
        *("NDCG@1", "HR@5", "NDCG@5", "HR@10", "NDCG@10", "HR@20", "NDCG@20"),
    ]
    assert {"HR@50", "NDCG@50"} <= set(outcome(evaluation([0, 3, 9]), evaluation([0, 3, 9]))["metrics"])
    short = evaluation([0, 3, 9], ks=(5,))
    assert (outcome(short, short)["primary"], list(outcome(short, short)["metrics"])[-1]) == ("NDCG@5", "NDCG@5")
    # What decides is there whatever was asked for.
    asked = outcome(few, few, ks=(20,))
    assert (asked["primary"], list(asked["metrics"])) == ("NDCG@10", ["NDCG@10", "HR@20", "NDCG@20"])


def test_seeds_are_averaged_case_by_case(better):
    before, after = better
    worse = [place + 5 if place >= 0 else -1 for place in before]
    pairs = [(evaluation(before), evaluation(after, "rl")), (evaluation(before), evaluation(worse, "rl"))]
    found = outcome_over_seeds(pairs, ks=(10,))
    single = [outcome(*pair, ks=(10,))["metrics"]["NDCG@10"]["difference"] for pair in pairs]
    got = found["metrics"]["NDCG@10"]
    assert found["seeds"] == 2
    assert got["by_seed"] == pytest.approx(single)
    assert got["difference"] == pytest.approx(np.mean(single))
    assert got["sd_over_seeds"] == pytest.approx(np.std(single, ddof=1))
    # The pairing is of the means over seeds, not of 400 cases: as many users as there are.
    values = np.array([[[gain("NDCG@10", p)] for p in places] for places in (before, after, worse)])
    gaps = paired_difference((values[1] + values[2]) / 2, values[0], np.arange(200), found["resamples"])
    assert got["difference interval95"] == pytest.approx([gaps.low[0], gaps.high[0]])
    assert found["users"] == 200
    assert "mean of 2 seeds" in found["sentence"]


def test_the_table_shows_the_document(better):
    before, after = better
    document = outcome(evaluation(before), evaluation(after, "rl"))
    header, rows = outcome_rows(document)
    assert header == ["metric", "sft", "rl", "difference", "95 % interval", "p", "p (Holm)"]
    found = document["metrics"]["NDCG@10"]
    (row,) = [row for row in rows if row[0] == "NDCG@10"]
    assert row[1:4] == [f"{found['before']:.4f}", f"{found['after']:.4f}", f"{found['difference']:+.4f}"]
    lines = outcome_table(document).splitlines()
    assert len(lines) == len(document["metrics"]) + 2
    assert lines[-1] == document["sentence"]
    assert len({len(line) for line in lines[:-1]}) == 1
    # Two systems of one name are told apart.
    assert outcome_rows(outcome(evaluation(before), evaluation(after)))[0][1:3] == ["before", "after"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": "other"}, "the split abc"),
        ({"part": "valid"}, "the part test"),
        ({"exclude_seen": False}, "candidates"),
        ({"users": [0, 1, 3]}, "not the same ones"),
        ({"places": [0, 1]}, "not the same ones"),
        ({"counted": [True, True, False]}, "not the same ones"),
    ],
    ids=["split", "part", "candidates", "users", "cases", "counted"],
)
def test_evaluations_of_different_things_are_refused(changes, said):
    given = {"places": [0, 1, 2]} | changes
    with pytest.raises(DataError, match=said):
        outcome(evaluation([0, 1, 2]), evaluation(**given))


def test_bad_requests():
    one = evaluation([0, 1, 2], ks=(5, 10))
    with pytest.raises(DataError, match="ended at 10"):
        outcome(one, one, ks=(20,))
    with pytest.raises(DataError, match="from 1 on"):
        outcome(one, one, ks=(0,))
    with pytest.raises(DataError, match="from 1 on"):
        outcome(one, one, ks=())
    with pytest.raises(DataError, match="Ask for 100 resamples"):
        outcome(one, one, ks=(1, 5, 10), resamples=50)
    with pytest.raises(DataError, match="no pair"):
        outcome_over_seeds([])
    none = evaluation([0, 1], counted=[False, False])
    with pytest.raises(DataError, match="no headline figure"):
        outcome(none, none)


def test_saved_evaluations_have_the_same_outcome(tmp_path, better):
    pair = [
        evaluation(places, system, protocol={}, items=99) for places, system in zip(better, ("sft", "rl"), strict=True)
    ]
    loaded = [Evaluation.load(one.save(tmp_path))[0] for one in pair]
    assert outcome(*loaded) == outcome(*pair)
