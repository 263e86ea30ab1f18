"""The recommender of sequence models: scores by definition, events, filters, new items, artefacts."""

import json
import math

import numpy as np
import pytest
import torch
from factories import random_recommender
from sequence_models import EVENTS, KINDS, features_of, items_of, random_model, random_sequence_recommender

from llmrec import Recommender
from llmrec.artefact import verify_manifest
from llmrec.artefact_parts import Settings, is_sequence
from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.catalog import Catalog
from llmrec.catalog_versions import CatalogVersions
from llmrec.exceptions import (
    ArtefactError,
    BackboneError,
    CatalogError,
    DataError,
    FilterError,
    PromptError,
    RequestError,
    UnknownItemError,
)
from llmrec.model_card import card_of
from llmrec.prompt import Event
from llmrec.sequence.histories import History, collate
from llmrec.sequence.history_encoder import HistoryEncoder, history_of
from llmrec.sequence.new_items import add_items, model_of
from llmrec.sequence.recommender import SequenceRecommender


def names(rows):
    return [f"item-{row}" for row in rows]


def ids(found):
    return [item.item_id for item in found]


def log_softmax(model, history):
    """(N,) by definition, of one history alone."""
    with torch.inference_mode():
        query = model.last(**collate([history], model.config.max_history))
        return (query @ model.table().T)[0].log_softmax(0)


def rows_history(rows):
    return History(np.array(rows, dtype=np.int64))


def best(scores, candidates):
    return sorted(candidates, key=lambda row: (-float(scores[row]), row))


@pytest.mark.parametrize("encoder", ["hstu", "sasrec"])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_recommendations_are_the_best_items_of_the_catalog(encoder, exclude_seen):
    made = random_sequence_recommender(2, encoder=encoder, retired=[4, 9])
    rng = np.random.default_rng(0)
    for length in (0, 1, 2, 7, 8, 30):
        rows = rng.integers(0, 40, size=length).tolist()
        found = made.recommend(names(rows), k=50, exclude_seen=exclude_seen)
        scores = log_softmax(made.model, rows_history(rows))
        order = best(scores, set(range(40)) - {4, 9} - (set(rows) if exclude_seen else set()))
        assert ids(found) == names(order)
        assert [item.log_probability for item in found] == pytest.approx(scores[order].tolist(), abs=1e-9)
        assert [item.rank for item in found] == list(range(1, len(order) + 1))
        assert [(item.semantic_id, item.level_log_probabilities) for item in found] == [
            ((row,), (item.log_probability,)) for row, item in zip(order, found, strict=True)
        ]
        assert found[0].title == f"Title {order[0]}"


def test_legal_scores_are_those_of_the_candidates_alone():
    made = random_sequence_recommender(2, retired=[4])
    asked = {"k": 40, "deny": names([7]), "filters": {"price": {"max": 12}}}
    found = made.recommend(names([1, 2]), normalize="legal", **asked)
    scores = log_softmax(made.model, rows_history([1, 2]))
    order = best(scores, {row for row in range(40) if row % 20 <= 12} - {1, 2, 4, 7})
    assert ids(found) == names(order)
    assert [item.log_probability for item in found] == pytest.approx(scores[order].log_softmax(0).tolist(), abs=1e-9)
    assert sum(math.exp(item.log_probability) for item in found) == pytest.approx(1.0)
    over_all = made.recommend(names([1, 2]), **asked)
    assert [item.log_probability for item in over_all] == pytest.approx(scores[order].tolist(), abs=1e-9)


def test_allow_deny_filters_and_caps():
    made = random_sequence_recommender(3)
    allowed = made.recommend(names([1]), k=9, allow=names([5, 1, 8, 30]), deny=names([8]))
    assert set(ids(allowed)) == set(names([5, 30]))
    assert ids(made.recommend(names([1]), k=9, filters={"brand": {"any_of": ["none"]}})) == []
    with pytest.raises(FilterError, match="at least 5"):
        made.recommend(names([1]), allow=names([2]), min_candidates=5)
    plain = made.recommend(names([1]), k=9)
    assert made.recommend(names([1]), k=9, prefix_cap={"levels": 1, "most": 1}) == plain
    with pytest.raises(RequestError, match="first 2 levels"):
        made.recommend(names([1]), prefix_cap={"levels": 2, "most": 1})


def test_draws_are_of_the_seed_alone():
    made = random_sequence_recommender(3)
    drawn = made.recommend(names([1, 2]), k=6, sampling={"temperature": 2.0, "seed": 5})
    assert drawn == made.recommend(names([1, 2]), k=6, sampling={"temperature": 2.0, "seed": 5})
    assert any(ids(made.recommend(names([1, 2]), k=6, sampling={"seed": seed})) != ids(drawn) for seed in range(5))
    scores = dict(zip(names(range(40)), log_softmax(made.model, rows_history([1, 2])).tolist(), strict=True))
    assert [item.log_probability for item in drawn] == pytest.approx([scores[i] for i in ids(drawn)], abs=1e-9)


def test_given_items_are_scored():
    made = random_sequence_recommender(3, retired=[6])
    scores = log_softmax(made.model, rows_history([1, 2]))
    asked = [30, 1, 5]
    found = made.score(names([1, 2]), names(asked))
    assert [item for item, _, _ in found] == names(asked)
    assert [score for _, score, _ in found] == pytest.approx(scores[asked].tolist(), abs=1e-9)
    assert all(levels == [score] for _, score, levels in found)
    with pytest.raises(RequestError, match="retired"):
        made.score(names([1]), names([6]))


def test_many_histories_are_answered_in_order_and_alike():
    made = random_sequence_recommender(4, events=EVENTS)
    rng = np.random.default_rng(1)
    histories = [rng.integers(0, 40, size=rng.integers(0, 12)).tolist() for _ in range(25)]
    events = [None if not len(rows) % 3 else [random_event(rng) for _ in rows] for rows in histories]
    targets = [None if place % 2 else {"action": "view", "timestamp": 1.6e9 + place} for place in range(25)]
    items, scores = made.recommend_rows(histories, k=7, events=events, target=targets)
    for rows, event, target, found, values in zip(histories, events, targets, items, scores, strict=True):
        alone = made.recommend(names(rows), k=7, events=event, **({} if target is None else {"target": target}))
        assert ids(alone) == names(found)
        assert [item.log_probability for item in alone] == pytest.approx(values, abs=1e-9)
    with pytest.raises(RequestError, match="Row 40"):
        made.recommend_rows([[40]])
    with pytest.raises(RequestError, match="one entry for each"):
        made.recommend_rows([[1]], target=[None, None])


def random_event(rng):
    """One of which some is not known."""
    event = {"action": ["buy", "view", "unheard"][rng.integers(3)], "timestamp": 1.5e9 + float(rng.integers(0, 10**8))}
    event["domain"] = ["books", "games"][rng.integers(2)]
    for name in list(event):
        if rng.random() < 0.2:
            del event[name]
    return event


def test_events_and_targets_reach_the_model():
    made = random_sequence_recommender(4, events=EVENTS)
    rows, times = [3, 5, 7], [1_500_000_000, 1_500_086_400, 1_500_090_000]
    events = [
        {"action": "view", "domain": "books", "timestamp": times[0]},
        Event("unheard", "games", times[1] + 0.7),
        {"timestamp": times[2]},
    ]
    known = {
        "timestamps": np.array(times),
        "actions": np.array([2, 0, 0]),
        "domains": np.array([1, 2, 0]),
    }

    def scores(**changes):
        asked = {"next_timestamp": times[2], "next_action": 1, "next_domain": 0} | changes
        return log_softmax(made.model, History(np.array(rows), **known, **asked))

    def found(**asked):
        answer = made.recommend(names(rows), k=40, exclude_seen=False, events=events, **asked)
        return torch.tensor([dict(zip(ids(answer), (i.log_probability for i in answer), strict=True))[name]
                             for name in names(range(40))], dtype=torch.float64)  # fmt: skip

    torch.testing.assert_close(found(), scores())
    torch.testing.assert_close(found(target={"action": "view"}), scores(next_action=2))
    torch.testing.assert_close(found(target={"domain": "games"}), scores(next_domain=2))
    torch.testing.assert_close(found(target=Event(timestamp=1.6e9)), scores(next_timestamp=1_600_000_000))
    for other in (scores(next_action=2), scores(next_domain=2), scores(next_timestamp=1_600_000_000)):
        assert (other - scores()).abs().max() > 1e-3
    without = log_softmax(made.model, rows_history(rows))
    assert (without - scores()).abs().max() > 1e-3


def test_prompts_say_all_of_a_history_and_nothing_else():
    catalog = Catalog.of_rows(items_of(9))
    encoder = HistoryEncoder(catalog, Settings(max_history=2), EVENTS)
    events = [{"action": "view"}, {"domain": "books", "timestamp": -0.5}, {"action": "odd", "domain": "odd"}]
    prompt = encoder.encode([1, 2, 3], events, target={"action": "view", "timestamp": 12.9})
    assert prompt == [12, 2, 0, 2, -1, 0, 1, 3, UNKNOWN_TIME, 0, 0]
    history = history_of(prompt, 9)
    assert history.rows.tolist() == [2, 3]
    assert history.timestamps.tolist() == [-1, UNKNOWN_TIME]
    assert (history.actions.tolist(), history.domains.tolist()) == ([0, 0], [1, 0])
    assert (history.next_timestamp, history.next_action, history.next_domain) == (12, 2, 0)
    assert encoder.encode([]) == [UNKNOWN_TIME, 1, 0]
    assert encoder.encode([5], [Event("view", "games", 7.0)]) == [7, 1, 2, 5, 7, 2, 2]
    assert encoder.example() == [UNKNOWN_TIME, 1, 0, 0, UNKNOWN_TIME, 0, 0, 4, UNKNOWN_TIME, 0, 0]
    for wrong, message in (
        (prompt[:-1], "has 10 numbers"),
        ([1, 2], "has 2 numbers"),
        (encoder.encode([8]), "rows from 8 to 8"),
    ):
        with pytest.raises(RequestError, match=message):
            history_of(wrong, 8)


def test_requests_that_cannot_be_answered():
    made = random_sequence_recommender(4, events=EVENTS)
    asked = [
        ({"history": [*names([1]), "lost"]}, UnknownItemError, "'lost'"),
        ({"history": names([1]), "k": 0}, RequestError, "k is 0"),
        ({"history": "item-1"}, RequestError, "the string"),
        ({"history": names([1]), "events": []}, RequestError, "1 items came with 0 events"),
        ({"history": names([1]), "events": [{"place": 1}]}, PromptError, "place"),
        ({"history": names([1]), "events": [{"timestamp": 1e300}]}, RequestError, "no moment"),
        ({"history": names([1]), "target": {"action": "sell"}}, RequestError, "'sell', and the model knows buy, view"),
        ({"history": names([1]), "target": {"domain": "toys"}}, RequestError, "'toys', and the model knows books"),
        ({"history": names([1]), "preference": "red"}, RequestError, "no place for preference"),
        ({"text": "a red lamp"}, RequestError, "no text"),
        ({"history": names([1]), "filters": {"colour": {"any_of": ["red"]}}}, FilterError, "colour"),
    ]
    for request, kind, message in asked:
        with pytest.raises(kind, match=message):
            made.recommend(**request)
    with pytest.raises(RequestError, match="cannot search for words"):
        made.search("lamp")
    assert made.recommend([*names([1]), "lost"], ignore_unknown=True) == made.recommend(names([1]))


def test_broken_weights_are_no_recommendation():
    made = random_sequence_recommender(1)
    with torch.no_grad():
        made.model.representation.table().fill_(torch.nan)
    with pytest.raises(BackboneError, match="not numbers"):
        made.recommend(names([1]))


def test_a_catalog_must_be_the_model_s():
    model = random_model(0)
    with pytest.raises(CatalogError, match="has 30 items and the model 40"):
        SequenceRecommender(model, Catalog.of_rows(items_of(30)))
    with pytest.raises(CatalogError, match="no vectors for the last 5 of 45"):
        SequenceRecommender(model, Catalog.of_rows(items_of(45)))
    with pytest.raises(CatalogError, match=r"Catalog\.of_rows"):
        SequenceRecommender(model, random_recommender(1).catalog)
    with pytest.raises(RequestError, match="the model reads 8"):
        SequenceRecommender(model, Catalog.of_rows(items_of(40)), Settings(max_history=9))
    short = SequenceRecommender(model, Catalog.of_rows(items_of(40)), Settings(max_history=2))
    assert short.score(names([9, 8, 1, 2]), names([3])) == short.score(names([1, 2]), names([3]))


@pytest.mark.parametrize("retrieval", ["faiss-flat", "faiss-ivf", "faiss-hnsw"])
def test_faiss_finds_what_the_exact_search_finds(retrieval):
    made = random_sequence_recommender(5, retrieval=retrieval, retired=[3])
    exact = SequenceRecommender(made.model, made.catalog, made.settings)
    for history in ([1, 2], [], [5]):
        found, wanted = made.recommend(names(history), k=6), exact.recommend(names(history), k=6)
        assert ids(found) == ids(wanted)
        assert [item.log_probability for item in found] == pytest.approx(
            [item.log_probability for item in wanted], abs=1e-5
        )


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_saved_artefact_gives_the_same_scores(tmp_path, kind):
    made = random_sequence_recommender(6, kind=kind, events=EVENTS, retired=[2])
    made.save_pretrained(tmp_path / "art")
    verify_manifest(tmp_path / "art")
    files = {path.relative_to(tmp_path / "art").as_posix() for path in (tmp_path / "art").rglob("*") if path.is_file()}
    assert files == {
        "config.json", "model.safetensors", "llmrec.json", "sha256.json",
        "catalog/catalog.json", "catalog/codes.safetensors", "catalog/items.jsonl",
    }  # fmt: skip
    assert is_sequence(tmp_path / "art")
    for loaded in (
        Recommender.from_pretrained(tmp_path / "art"),
        SequenceRecommender.from_pretrained(tmp_path / "art", retrieval="faiss-flat"),
    ):
        assert isinstance(loaded, SequenceRecommender)
        assert loaded.settings == made.settings
        assert loaded.catalog.content_hash == made.catalog.content_hash
        found = loaded.recommend(names([1, 3]), k=40, events=[{"action": "view"}, {"timestamp": 1.5e9}])
        wanted = made.recommend(names([1, 3]), k=40, events=[{"action": "view"}, {"timestamp": 1.5e9}])
        assert ids(found) == ids(wanted)
        assert [item.log_probability for item in found] == pytest.approx(
            [item.log_probability for item in wanted], abs=1e-6
        )


def test_what_is_no_sequence_artefact(tmp_path):
    random_recommender(1).save_pretrained(tmp_path / "lm")
    assert not is_sequence(tmp_path / "lm")
    assert not is_sequence(tmp_path)
    with pytest.raises(ArtefactError, match="no sequence model's artefact"):
        SequenceRecommender.from_pretrained(tmp_path / "lm")
    made = random_sequence_recommender(1)
    made.save_pretrained(tmp_path / "art")
    (tmp_path / "art" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtefactError, match=r"model\.safetensors is truncated"):
        Recommender.from_pretrained(tmp_path / "art")


def test_its_card_says_what_it_is(tmp_path):
    random_sequence_recommender(1).save_pretrained(tmp_path / "art")
    card = card_of(tmp_path / "art", repo_id="user/art")
    assert "hstu in a SequenceModel" in card
    assert "| items | 40 to recommend |" in card
    assert 'recommender.recommend(["item-0", "item-1"], k=10)' in card
    for word in ("vLLM", "AutoModelForCausalLM", "beams", "codebooks", "semantic", "text-generation"):
        assert word not in card


@pytest.mark.parametrize("kind", ["text", "tuned", "ids+text", "semantic_ids", "hashed"])
def test_new_items_are_recommended_and_read_without_training(tmp_path, kind):
    made = random_sequence_recommender(7, kind=kind)
    features = {
        "text": ("vectors",), "tuned": ("vectors",), "ids+text": ("vectors",), "semantic_ids": ("codes",), "hashed": ()
    }[kind]  # fmt: skip
    new = {name: values[:5] for name, values in features_of(5, seed=9).items() if name in features}
    grown = made.with_items(items_of(5, first=40), new)
    before, after = made.model.table(), grown.model.table()
    assert torch.equal(after[:40], before)
    assert len(after) == len(grown.catalog) == 45
    assert made.model.num_items == len(made.catalog) == 40
    if kind == "semantic_ids":  # an item of an old item's codes is that item again
        twin = made.with_items(items_of(1, first=40), {"codes": features_of(40)["codes"][7:8]})
        torch.testing.assert_close(twin.model.table()[40], before[7])
    scores = log_softmax(grown.model, rows_history([1, 42]))
    found = grown.recommend(names([1, 42]), k=45)
    assert ids(found) == names(best(scores, set(range(45)) - {1, 42}))
    assert set(ids(found)) & set(names(range(40, 45)))
    # The same as a version of a saved artefact's catalog, and as an artefact of its own.
    made.save_pretrained(tmp_path / "art")
    version = add_items(tmp_path / "art", items_of(2, first=40), {n: v[:2] for n, v in new.items()})
    assert add_items(tmp_path / "art", items_of(3, first=42), {n: v[2:] for n, v in new.items()}, "more") != version
    verify_manifest(tmp_path / "art")
    loaded = Recommender.from_pretrained(tmp_path / "art")
    grown.save_pretrained(tmp_path / "grown")
    again = Recommender.from_pretrained(tmp_path / "grown")
    for other in (loaded, again):
        answer = other.recommend(names([1, 42]), k=45)
        assert ids(answer) == ids(found)
        assert [item.log_probability for item in answer] == pytest.approx(
            [item.log_probability for item in found], abs=1e-6
        )
    first = Recommender.from_pretrained(tmp_path / "art", catalog_version=version)
    assert len(first.catalog) == 42
    CatalogVersions(tmp_path / "art" / "catalog").retire(names([41, 3]))
    retired = Recommender.from_pretrained(tmp_path / "art")
    assert ids(retired.recommend(names([1, 42]), k=45)) == [name for name in ids(found) if name not in names([3, 41])]


def test_new_items_that_a_model_cannot_know(tmp_path):
    made = random_sequence_recommender(7)
    with pytest.raises(BackboneError, match="were not trained"):
        made.with_items(items_of(1, first=40))
    made.save_pretrained(tmp_path / "ids")
    with pytest.raises(BackboneError, match="were not trained"):
        add_items(tmp_path / "ids", items_of(1, first=40))
    assert len(CatalogVersions(tmp_path / "ids" / "catalog").log()) == 1
    text = random_sequence_recommender(7, kind="text")
    for wrong in ({}, {"vectors": np.zeros((1, 5), np.float32)}, {"vectors": np.full((1, 6), np.nan)}):
        with pytest.raises(DataError):
            text.with_items(items_of(1, first=40), wrong)
    with pytest.raises(DataError):
        text.with_items(items_of(2, first=40), features_of(1))
    with pytest.raises(CatalogError, match="in the catalog already"):
        text.with_items(items_of(1), features_of(1))
    text.save_pretrained(tmp_path / "text")
    versions = CatalogVersions(tmp_path / "text" / "catalog")
    with pytest.raises(CatalogError, match="Give each its row"):
        versions.add(items_of(1, first=40), np.array([[7]]))
    with pytest.raises(CatalogError, match="1 items have 2 vectors"):
        versions.add(items_of(1, first=40), np.array([[40]]), features=features_of(2))
    versions.add(items_of(1, first=40), np.array([[40]]))
    with pytest.raises(CatalogError, match="cannot make vectors of the catalog's last 1 items"):
        Recommender.from_pretrained(tmp_path / "text")


def test_altered_features_are_refused(tmp_path):
    made = random_sequence_recommender(7, kind="text")
    made.save_pretrained(tmp_path / "art")
    version = add_items(tmp_path / "art", items_of(2, first=40), {"vectors": features_of(2)["vectors"]})
    file = tmp_path / "art" / "catalog" / "versions" / version / "features.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ArtefactError, match=r"features\.safetensors is missing or not the file"):
        Recommender.from_pretrained(tmp_path / "art")


def test_features_are_of_all_added_items_or_of_none(tmp_path):
    catalog = Catalog.of_rows(items_of(4))
    catalog.save(tmp_path)
    versions = CatalogVersions(tmp_path)
    versions.add(items_of(1, first=4), np.array([[4]]), features={"vectors": np.ones((1, 2), np.float32)})
    versions.add(items_of(1, first=5), np.array([[5]]), features={"vectors": np.zeros((1, 2), np.float32)})
    for one in (versions, CatalogVersions(tmp_path)):
        assert one.load().features["vectors"].tolist() == [[1, 1], [0, 0]]
        assert (one.load().base_items, one.load().is_rows) == (4, True)
    versions.add(items_of(1, first=6), np.array([[6]]))
    for one in (versions, CatalogVersions(tmp_path)):
        assert one.load().features == {}


def test_a_catalog_of_rows_is_saved_and_grows(tmp_path):
    catalog = Catalog.of_rows(items_of(4), np.array([False, True, False, False]))
    catalog.save(tmp_path)
    loaded = Catalog.load(tmp_path)
    assert loaded.is_rows
    assert loaded.content_hash == catalog.content_hash
    assert loaded.retired.tolist() == catalog.retired.tolist()
    assert loaded.codebook_sizes == (4,)
    assert json.loads((tmp_path / "catalog.json").read_text())["rows"] is True
    assert loaded.tokens_of(2) == [2]
    grown = loaded.with_items(items_of(2, first=4), np.array([[4], [5]]))
    assert (grown.codes[:, 0].tolist(), grown.codebook_sizes) == ([0, 1, 2, 3, 4, 5], (6,))
    assert grown.retired.tolist() == [False, True, False, False, False, False]
    with pytest.raises(CatalogError, match="known by their rows"):
        loaded.with_tokens([np.arange(4)])
    plain = Catalog(items_of(4), np.arange(4)[:, None], [4])
    assert not plain.is_rows


def test_a_model_knows_a_version_whose_items_came_before_it_was_saved():
    made = random_sequence_recommender(7, kind="text").with_items(items_of(3, first=40), features_of(3))
    catalog = made.catalog.with_items(items_of(2, first=43), np.array([[43], [44]]))
    catalog.base_items, catalog.features = 40, features_of(5, seed=4)
    grown = model_of(made.model, catalog)
    torch.testing.assert_close(grown.table()[:43], made.model.table())
    alone = made.with_items(items_of(2, first=43), {n: v[3:] for n, v in features_of(5, seed=4).items()})
    torch.testing.assert_close(grown.table(), alone.model.table())
