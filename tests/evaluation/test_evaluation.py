import json
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from llmrec.data.arguments import SplitArguments
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.evaluation.evaluation import Evaluation, evaluate
from llmrec.evaluation.ranks import rank_scores
from llmrec.exceptions import DataError

DAY = 86_400


@pytest.fixture(params=["leave-one-out", "global-temporal"])
def split(request):
    rng = np.random.default_rng(0)
    rows = 900
    users, items = rng.integers(0, 90, rows), np.minimum(rng.zipf(1.4, rows), 30)
    # Some users and items come late: training by time does not hold them.
    days = np.where((users >= 75) | (items % 7 == 0), rng.integers(33, 40, rows), rng.integers(0, 40, rows))
    frame = pl.DataFrame(
        {"user_id": users.astype(str), "item_id": items.astype(str), "timestamp": 16_000 * DAY + days * DAY}
    )
    items = Items.from_frame(pl.DataFrame({"item_id": [str(n) for n in range(1, 36)]}))
    split = SplitArguments(request.param).make(Interactions.from_frame(frame), items)
    assert split.headline("test").all() == (request.param == "leave-one-out")
    return split


def coarse_scores(num_items, seed=0, levels=6):
    """Scores with many ties, the same for the same history."""

    def score(histories):
        rows = [
            np.random.default_rng([seed, *history.tolist()]).integers(0, levels, num_items) for history in histories
        ]
        return np.array(rows, dtype=np.float32)

    return score


def by_definition(split, part, score, ks):
    """Per case: the mean of every metric over all places that the target may take among its ties."""
    table = []
    for history, target in zip(split.histories(part), split.targets(part).tolist(), strict=True):
        scores = score([history])[0]
        seen = set(history.tolist())
        candidates = [row for row in range(split.num_items) if row not in seen]
        row = []
        better = sum(scores[item] > scores[target] for item in candidates)
        ties = sum(scores[item] == scores[target] for item in candidates) - 1
        places = [] if target in seen else range(better, better + ties + 1)
        for k in ks:
            hits = [place for place in places if place < k]
            count = max(1, len(places))
            row.append(len(hits) / count)
            row.append(sum(1 / math.log2(place + 2) for place in hits) / count)
            row.append(sum(1 / (place + 1) for place in hits) / count)
        table.append(row)
    return np.array(table)


def test_scores_equal_their_definition(split):
    score = coarse_scores(split.num_items)
    evaluation = evaluate("coarse", split, scores=score, ks=(1, 5, 10))
    _, lists = rank_scores(score, split.histories("test"), split.targets("test"), split.num_items, k=1)
    shown = {row for row, counts in zip(lists[:, 0].tolist(), split.headline("test"), strict=True) if counts}
    assert evaluation.document(resamples=10)["coverage@1"] == len(shown) / split.num_items
    expected = by_definition(split, "test", score, (1, 5, 10))
    assert evaluation.table() == pytest.approx(expected, abs=1e-12)
    document = evaluation.document()
    counted = split.headline("test")
    names = [f"{metric}@{k}" for k in (1, 5, 10) for metric in ("HR", "NDCG", "MRR")]
    for place, name in enumerate(names):
        assert document[name] == pytest.approx(expected[counted, place].mean(), abs=1e-12)
        low, high = document[f"{name} interval95"]
        worst, best = document[f"{name} ties"]
        assert low <= document[name] <= high
        assert worst < document[name] < best
        for slice_name, mask in evaluation.slices.items():
            found = document["slices"][slice_name][name]
            assert found is None if not mask.any() else found == pytest.approx(expected[mask, place].mean(), abs=1e-12)
    assert document["cases"] == counted.sum()
    assert document["cases"] + document["cases_kept_apart"] == len(split.targets("test"))
    users = split.users("test")
    assert document["users"] == len({users[case] for case in np.flatnonzero(counted)})
    assert {"head", "torso", "tail", "cold", "later_day"} <= set(document["slices"])
    assert document["split"] == split.content_hash
    assert document["protocol"] == split.protocol
    histories = split.histories("test")
    repeated = np.array([t in h for t, h in zip(split.targets("test"), histories, strict=True)])
    assert document["repeated_share"] == pytest.approx(repeated[counted].mean())
    assert document["ties"] == "expected"
    assert (document["invalid_rate"], document["duplicate_rate"], document["seen_rate"]) == (0, 0, 0)
    json.dumps(document, allow_nan=False)


def test_lists_have_the_order_that_they_have(split):
    def recommend(histories, k):
        """The first rows that are new; to users without a history, the last rows of all."""
        orders = [range(split.num_items) if len(h) else range(split.num_items - 1, -1, -1) for h in histories]
        return [[r for r in o if r not in set(h.tolist())][:k] for o, h in zip(orders, histories, strict=True)]

    evaluation = evaluate("first", split, part="valid", recommend=recommend, ks=(3, 5))
    targets = split.targets("valid").tolist()
    lists = recommend(split.histories("valid"), 5)
    places = [one.index(target) if target in one else None for one, target in zip(lists, targets, strict=True)]
    counted = split.headline("valid")
    document = evaluation.document()
    hits = [place is not None and place < 3 for place in places]
    assert document["HR@3"] == pytest.approx(np.mean(np.array(hits)[counted]))
    assert document["beyond_list_share"] == pytest.approx(np.mean(np.array([p is None for p in places])[counted]))
    shown = [one for one, counts in zip(lists, counted, strict=True) if counts]
    assert document["coverage@5"] == len({row for one in shown for row in one}) / split.num_items
    assert (document["ties"], document["seen_rate"]) == ("as listed", 0)
    assert document["invalid_rate"] == document["duplicate_rate"] == 0
    assert not any(name.endswith(" ties") for name in document)


def test_without_a_headline_case_there_is_no_document(split):
    evaluation = evaluate("apart", split, scores=coarse_scores(split.num_items))
    with pytest.raises(DataError, match=r"All \d+ cases are of users or items that training does not hold"):
        replace(evaluation, counted=np.zeros_like(evaluation.counted)).document()


def test_what_is_no_item_covers_none():
    interactions = Interactions.from_frame(pl.DataFrame({"user_id": ["a"] * 4, "item_id": list("wxyz")}))
    split = SplitArguments().make(interactions, Items.from_interactions(interactions))
    document = evaluate("odd", split, recommend=lambda h, k: [[9, 3]], ks=(2,)).document()
    assert document["coverage@2"] == 1 / 4


def test_faults_of_a_list_are_counted():
    interactions = Interactions.from_frame(pl.DataFrame({"user_id": ["a"] * 4, "item_id": list("wxyz")}))
    split = SplitArguments().make(interactions, Items.from_interactions(interactions))
    document = evaluate("odd", split, recommend=lambda h, k: [[9, 3, 3, -1]], ks=(4,)).document()
    assert (document["invalid_rate"], document["duplicate_rate"], document["seen_rate"]) == (0.5, 0.25, 0)
    assert document["HR@4"] == 1
    assert document["NDCG@4"] == pytest.approx(1 / math.log2(3))


def test_items_of_the_history_are_no_candidates_in_a_list_either(split):
    """A system that names the target even where the user had it, and what the user had before it."""
    targets, histories = split.targets("test"), split.histories("test")
    lists = [[*history[:1].tolist(), int(target)] for target, history in zip(targets, histories, strict=True)]
    document = evaluate("cheat", split, recommend=lambda h, k: lists, ks=(1,)).document()
    counted = split.headline("test")
    repeated = np.array([t in h for t, h in zip(targets, histories, strict=True)])
    assert 0 < repeated[counted].mean() < 1
    assert document["HR@1"] == pytest.approx(1 - repeated[counted].mean())
    slots = sum(len(one) for one, counts in zip(lists, counted, strict=True) if counts)
    seen = [row in history for one, history in zip(lists, histories, strict=True) for row in one]
    owner = np.repeat(counted, [len(one) for one in lists])
    assert document["seen_rate"] == pytest.approx(np.array(seen)[owner].sum() / slots)
    allowed = evaluate("cheat", split, recommend=lambda h, k: lists, ks=(1,), exclude_seen=False).document()
    assert allowed["HR@1"] == pytest.approx(
        np.mean([one[0] == t for one, t, c in zip(lists, targets, counted, strict=True) if c])
    )


def test_intervals_do_not_depend_on_what_ran_before(split):
    evaluation = evaluate("coarse", split, scores=coarse_scores(split.num_items), ks=(5,))
    before = evaluation.document()
    kept = pl.Series(evaluation.user_ids[::-1]).cast(pl.Categorical)
    again = evaluate("coarse", split, scores=coarse_scores(split.num_items), ks=(5,)).document()
    assert len(kept)
    assert {**again, "cost": None} == {**before, "cost": None}
    first = list(dict.fromkeys(evaluation.user_ids))
    assert [first[place] for place in evaluation.user_places()] == evaluation.user_ids


def test_a_choice_of_cases(split):
    score = coarse_scores(split.num_items)
    apart = np.flatnonzero(~split.headline("test"))[2:4]
    chosen = np.unique(np.concatenate([[3, 4, 11, 17, 20], apart]))
    some = evaluate("some", split, scores=score, cases=chosen, ks=(5,))
    whole = evaluate("some", split, scores=score, ks=(5,))
    assert some.table().tolist() == whole.table()[chosen].tolist()
    assert some.user_ids == [whole.user_ids[case] for case in chosen]
    assert some.targets == [whole.targets[case] for case in chosen]
    assert some.counted.tolist() == whole.counted[chosen].tolist()
    assert all(mask.tolist() == whole.slices[name][chosen].tolist() for name, mask in some.slices.items())


def test_what_is_saved_is_what_is_read(split, tmp_path):
    evaluation = evaluate(
        "mine",
        split,
        scores=coarse_scores(split.num_items),
        facts={"seeds": {"training": 3}, "cost": {"parameters": 7}},
    )
    document = evaluation.document(seed=4)
    path = evaluation.save(tmp_path, document)
    assert path == tmp_path / "evaluation" / "mine.json"
    again, read = Evaluation.load(path)
    assert read == {**document, "ks": [5, 10, 20]}
    assert read["cost"]["parameters"] == 7
    assert (again.system, again.user_ids, again.targets, again.ks) == (
        "mine",
        evaluation.user_ids,
        evaluation.targets,
        evaluation.ks,
    )
    assert again.table().tolist() == evaluation.table().tolist()
    assert again.counted.tolist() == evaluation.counted.tolist()
    assert {name: mask.tolist() for name, mask in again.slices.items()} == {
        name: mask.tolist() for name, mask in evaluation.slices.items()
    }
    assert again.document(seed=4)["NDCG@10 interval95"] == document["NDCG@10 interval95"]
    path.with_suffix(".parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=r"mine\.json is no evaluation.*belong together"):
        Evaluation.load(path)


def test_bad_requests(split):
    for name in ("a/b", "", "..", ".hidden", "a\nb"):
        with pytest.raises(DataError, match="cannot name a file"):
            evaluate(name, split, scores=coarse_scores(split.num_items))
    with pytest.raises(DataError, match="by both lists and scores, or by neither"):
        evaluate("none", split)
    for ks in ((), (0,)):
        with pytest.raises(DataError, match="cut-offs"):
            evaluate("none", split, scores=coarse_scores(split.num_items), ks=ks)
    with pytest.raises(DataError, match="has no cases"):
        evaluate("none", split, scores=coarse_scores(split.num_items), cases=np.array([], dtype=int))
