"""The curves of layers against evaluations of models that are built without them."""

import copy

import numpy as np
import pytest
import torch
from pages import Seen
from small_teachers import language_recommender, sequence_recommender, split_of

from llmrec.distillation.layer_curves import METRICS, LayerCases, advice, layer_curves
from llmrec.distillation.layer_page import layer_page
from llmrec.distillation.layer_stack import with_layers
from llmrec.evaluation.evaluation import evaluate
from llmrec.evaluation.uncertainty import paired_difference
from llmrec.exceptions import BackboneError, DataError
from llmrec.sequence.histories import LoggedHistories
from llmrec.sequence.recommender import SequenceRecommender
from llmrec.sequence.scores import CaseScores


@pytest.fixture(scope="module")
def split():
    return split_of(users=30)


def asked(recommender, split, count=20):
    return LayerCases(recommender, split, np.arange(count))


def cut(recommender, kept):
    """A recommender whose model was built without the other layers."""
    model = with_layers(recommender.model, kept)
    if isinstance(recommender, SequenceRecommender):
        return SequenceRecommender(model, recommender.catalog, recommender.settings)
    made = copy.copy(recommender)
    made.model = model
    return made


def reference(recommender, split, count=20):
    """NDCG@10 and HR@10 of each case by the house's evaluation."""
    cases = np.arange(count)
    if isinstance(recommender, SequenceRecommender):
        histories = LoggedHistories(split, recommender.model.events).cases("valid", cases)
        found = evaluate("x", split, "valid", scores=CaseScores(recommender.model, histories), ks=(10,), cases=cases)
    else:
        found = evaluate(
            "x",
            split,
            "valid",
            recommend=lambda rows, k: recommender.recommend_rows([r.tolist() for r in rows], k, num_beams=20)[0],
            ks=(10,),
            cases=cases,
        )
    names = found.metric_names
    return found.table()[:, [names.index("NDCG@10"), names.index("HR@10")]]


@pytest.mark.parametrize("kind", ["language", "sasrec", "hstu"])
def test_every_point_is_an_evaluation_of_the_model_without_these_layers(split, kind):
    recommender = language_recommender() if kind == "language" else sequence_recommender(encoder=kind)
    found = layer_curves(asked(recommender, split), greedy=True, resamples=200)
    assert (found["layers"], found["cases"], found["part"]) == (4, 20, "valid")
    assert [one["removed"] for one in found["drop_one"]] == [[0], [1], [2], [3]]
    assert [one["kept"] for one in found["keep_first"]] == [[0, 1, 2], [0, 1], [0]]
    whole = reference(recommender, split)
    assert [found["whole"][name]["mean"] for name in METRICS[:2]] == pytest.approx(whole.mean(axis=0).tolist())
    users = split.case_users("valid")[:20]
    for one in (found["drop_one"][1], found["keep_first"][1], found["greedy"][2]):
        table = reference(cut(recommender, one["kept"]), split)
        gap = paired_difference(table, whole, users, resamples=200)
        for m, name in enumerate(METRICS[:2]):
            assert one[name]["mean"] == pytest.approx(table[:, m].mean())
            assert one[name]["difference"] == pytest.approx(gap.mean[m])
            assert one[name]["difference interval95"] == pytest.approx([gap.low[m], gap.high[m]])


def test_the_loss_of_a_language_model_is_its_items_log_probability(split):
    recommender = language_recommender(layers=3)
    cases = asked(recommender, split, 9)
    lost = cases.table()[:, 2]
    np.testing.assert_allclose(lost, cases.losses())
    targets = split.targets("valid")
    for case in range(9):
        prompt = recommender.encoder.encode(split.histories("valid")[case].tolist())
        tokens = recommender.catalog.tokens_of(int(targets[case]))
        logits = recommender.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens), reduction="sum")
        assert lost[case] == pytest.approx(each.item(), rel=1e-6)


def test_greedy_removes_what_leaves_the_lowest_loss(split):
    recommender = language_recommender()
    cases = asked(recommender, split, 10)
    curve = layer_curves(cases, greedy=True, resamples=50)["greedy"]
    kept = [0, 1, 2, 3]
    for one in curve:
        losses = {
            place: asked(cut(recommender, [n for n in kept if n != place]), split, 10).losses().mean()
            for place in kept
        }
        kept.remove(min(losses, key=losses.get))
        assert one["kept"] == kept
    assert len(kept) == 1


def test_a_layer_that_does_nothing_can_go(split):
    recommender = language_recommender()
    layer = recommender.model.model.layers[2]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    found = layer_curves(asked(recommender, split), greedy=True, resamples=200)
    point = found["drop_one"][2]
    assert point["loss"]["difference"] == pytest.approx(0, abs=1e-9)
    assert point["NDCG@10"]["difference interval95"] == [0.0, 0.0]
    assert found["greedy"][0]["removed"] == [2] or found["greedy"][0]["loss"]["difference"] < 0
    assert layer_curves(asked(recommender, split), resamples=200)["drop_one"] == found["drop_one"]  # all is restored


def curve(*intervals):
    return [
        {
            "removed": list(range(number + 1)),
            "kept": [],
            "NDCG@10": {"mean": 0.1 + low, "difference": (low + high) / 2, "difference interval95": [low, high]},
        }
        for number, (low, high) in enumerate(intervals)
    ]


def test_advice_counts_until_the_first_fall():
    falls = curve((-0.02, 0.01), (-0.03, 0.0), (-0.05, -0.01), (-0.03, 0.02))
    found = {"layers": 5, "drop_one": curve((-0.3, -0.1), (-0.1, 0.1))[:1], "keep_first": falls}
    assert advice(found).startswith("2 of 5 layers removed from the end could go")
    assert "removed greedily" in advice({**found, "greedy": falls[:1]})
    assert advice({**found, "greedy": falls[:1]}).startswith("1 of 5")
    none = {**found, "keep_first": falls[2:]}
    assert advice(none).startswith("No layer could go: already the first of 5")
    single = {**found, "drop_one": [{**one, "removed": [n]} for n, one in enumerate(curve((-0.2, 0), (-0.1, 0)))]}
    assert "missed least is 1" in advice(single)


def test_the_page_shows_all_of_it(split):
    found = layer_curves(asked(sequence_recommender(), split), greedy=True, resamples=50)
    page = Seen(layer_page(found, "<mine>").render())
    assert page.tags.count("svg") == page.tags.count("table") == 3
    assert "Which layers matter: <mine>" in page.texts
    assert any(found["advice"] in text for text in page.texts)


def test_progress_is_told_from_nothing_to_all(split):
    told = []
    layer_curves(
        asked(sequence_recommender(), split), greedy=True, resamples=50, announce=lambda *one: told.append(one)
    )
    shares = [share for _, share in told]
    assert shares[0] == 0.0
    assert shares == sorted(shares)
    assert shares[-1] < 1.0


def test_what_cannot_be_asked_is_refused(split):
    with pytest.raises(BackboneError, match="one layer and none to spare"):
        layer_curves(asked(sequence_recommender(layers=1), split))
    with pytest.raises(DataError, match="no case"):
        LayerCases(sequence_recommender(), split, np.zeros(0, dtype=np.int64))
    with pytest.raises(DataError, match="Give the interactions"):
        asked(sequence_recommender(num_items=39), split)
