"""Rewards against values by hand and against their one-by-one definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rl_logs import SIZES, cases_of, data_of, items_of, log_of

from llmrec.backbones.sasrec import SASRecConfig
from llmrec.catalog import Catalog
from llmrec.embedding.store import EmbeddingStore
from llmrec.evaluation.baselines import ItemCF
from llmrec.exceptions import BackboneError, DataError, RecipeError
from llmrec.reinforcement import collaborative as collaborative_file
from llmrec.reinforcement.cases import RolloutCases
from llmrec.reinforcement.collaborative import collaborative, item_cf_scores, sequence_scores
from llmrec.reinforcement.rewards import (
    NAMES,
    build_rewards,
    check_weights,
    exact,
    later,
    parse_weights,
    rank,
)
from llmrec.reinforcement.similarity import code_lengths, diversity, prefix, semantic
from llmrec.sequence.events import EventConfig
from llmrec.sequence.histories import LoggedHistories
from llmrec.sequence.model import SequenceModel, sequence_config
from llmrec.sequence.recommender import SequenceRecommender, Settings
from llmrec.title_spelling import title_catalog
from llmrec.vocabulary import train_tokenizer

N = 12


def random_groups(seed, batch=5, size=4, cases=7):
    """Groups without repeats for some of the cases; the target is in about half of them."""
    rng = np.random.default_rng(seed)
    made = cases_of(rng.integers(0, N, cases).tolist(), later=rng.integers(0, N, (cases, 3)).tolist())
    for case, taken in enumerate(made.later):
        taken[0] = made.targets[case]
    items = np.stack([rng.permutation(N)[:size] for _ in range(batch)])
    return items, made, rng.integers(0, cases, batch)


def codes_of(seed, levels=3, count=N):
    flat = np.random.default_rng(seed).permutation(3**levels)[:count]
    return np.stack(np.unravel_index(flat, (3,) * levels), axis=1).astype(np.int32)


def test_exact_by_hand():
    cases = cases_of([3, 5, 3])
    found = exact(np.array([[5, 3], [3, 1], [0, 3]]), cases, np.array([1, 0, 2]))
    assert found.tolist() == [[1, 0], [1, 0], [0, 1]]
    assert found.dtype == np.float64


def test_rank_by_hand():
    """Of three: weights 1, 1 / log2(3) and 1 / 2."""
    whole = 1 + 1 / math.log2(3) + 1 / 2
    cases, one = cases_of([7]), np.array([0])
    expected = {
        (7, 8, 9): [0, -1 / math.log2(3) / whole, -0.5 / whole],
        (8, 7, 9): [-1 / whole, 0, -0.5 / whole],
        (8, 9, 7): [-1 / whole, -1 / math.log2(3) / whole, 0],
        (1, 2, 3): [0, 0, 0],
    }
    for group, values in expected.items():
        assert rank(np.array([group]), cases, one)[0].tolist() == pytest.approx(values)
    assert rank(np.array([[7]]), cases, one).tolist() == [[0.0]]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, N))
def test_rank_against_its_definition(seed, size):
    items, cases, chosen = random_groups(seed, size=size)
    found = rank(items, cases, chosen)
    whole = sum(1 / math.log2(place + 2) for place in range(size))
    for group, case in enumerate(chosen.tolist()):
        target = cases.targets[case]
        for place in range(size):
            wrong = items[group, place] != target and target in items[group]
            expected = -1 / math.log2(place + 2) / whole if wrong else 0.0
            assert found[group, place] == pytest.approx(expected, abs=1e-15)
    assert (found <= 0).all()
    assert (found.sum(axis=1) > -1).all()


def test_later_by_hand():
    cases = cases_of([4, 6], later=[[4, 9, 2, 9], [6]])
    found = later(np.array([[2, 9, 4, 0], [4, 6, 9, 2]]), cases, np.array([0, 1]))
    assert found[0].tolist() == pytest.approx([1 / 2, 1 / math.log2(3), 1, 0])
    assert found[1].tolist() == [0, 1, 0, 0]


def test_prefix_by_hand():
    codes = np.array([[0, 1, 2], [0, 1, 0], [0, 2, 2], [1, 1, 2]])
    lengths = np.full(4, 3)
    found = prefix(np.array([[0, 1, 2, 3]]), cases_of([0]), np.array([0]), codes=codes, lengths=lengths)
    assert found[0].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])  # what agrees behind a difference counts nothing


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 4))
def test_prefix_and_diversity_against_their_definitions(seed, levels):
    items, cases, chosen = random_groups(seed)
    codes = codes_of(seed, levels)
    shared = prefix(items, cases, chosen, codes=codes, lengths=np.full(N, levels))
    different = diversity(items, cases, chosen, codes=codes)
    for group, case in enumerate(chosen.tolist()):
        wanted = codes[cases.targets[case]].tolist()
        for place, item in enumerate(items[group].tolist()):
            common = 0
            while common < levels and codes[item].tolist()[common] == wanted[common]:
                common += 1
            assert shared[group, place] == pytest.approx(common / levels)
            others = [other for other in items[group].tolist() if other != item]
            apart = [codes[other, 0] != codes[item, 0] for other in others]
            assert different[group, place] == pytest.approx(np.mean(apart))


def test_a_group_of_one_is_not_diverse():
    assert diversity(np.array([[3]]), cases_of([0]), np.array([0]), codes=codes_of(0)).tolist() == [[0.0]]


def test_prefixes_of_titles_go_by_the_longer_one():
    tokenizer = train_tokenizer(["a good red hat", "a good red", "one two"], 300)
    titles = ["a good red hat", "a good red", "one two"]
    catalog = title_catalog([{"item_id": str(row), "title": title} for row, title in enumerate(titles)], tokenizer, 32)
    lengths = code_lengths(catalog)
    assert lengths.tolist() == [len(catalog.tokens_of(row)) for row in range(3)]
    found = prefix(np.array([[1, 0, 2]]), cases_of([1]), np.array([0]), codes=catalog.codes, lengths=lengths)
    one, other = catalog.tokens_of(1), catalog.tokens_of(0)
    common = next(place for place in range(9) if one[place : place + 1] != other[place : place + 1])
    assert found[0].tolist() == pytest.approx([1.0, common / max(len(one), len(other)), 0.0])
    assert 0 < found[0, 1] < 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_semantic_is_the_cosine(seed):
    items, cases, chosen = random_groups(seed)
    vectors = np.random.default_rng(seed).normal(size=(N, 5)).astype(np.float32) * 1e-3
    vectors[3] = 0
    found = semantic(items, cases, chosen, vectors=vectors)
    for group, case in enumerate(chosen.tolist()):
        wanted = vectors[cases.targets[case]].astype(np.float64)
        for place, item in enumerate(items[group].tolist()):
            own = vectors[item].astype(np.float64)
            size = np.linalg.norm(own) * np.linalg.norm(wanted)
            assert found[group, place] == pytest.approx(own @ wanted / size if size else 0.0, abs=1e-12)
    assert (np.abs(found) <= 1).all()


@pytest.mark.parametrize("cells", [1, 30, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_collaborative_against_its_definition(monkeypatch, cells, seed):
    """Whatever fits into a batch, each item's share is what a look at every other item gives."""
    monkeypatch.setattr(collaborative_file, "_CELLS", cells)
    _, cases, chosen = random_groups(seed)
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 4, (len(cases), N)).astype(np.float32)  # with many ties
    live = rng.permutation(N) < 9
    items = np.stack([rng.permutation(np.flatnonzero(live))[:4] for _ in chosen])
    found = collaborative(items, cases, chosen, scores=lambda cases, some: table[some], live=live)
    for group, case in enumerate(chosen.tolist()):
        for place, item in enumerate(items[group].tolist()):
            others = [table[case, other] for other in np.flatnonzero(live) if other != item]
            below = sum((1.0 if score < table[case, item] else 0.5 * (score == table[case, item])) for score in others)
            assert found[group, place] == pytest.approx(below / len(others))
    assert found.min() >= 0
    assert found.max() <= 1


def test_collaborative_by_hand():
    scores = np.array([[0.0, 3.0, 1.0, 1.0, -2.0]])
    found = collaborative(
        np.array([[1, 4, 2, 0]]), cases_of([1]), np.array([0]), scores=lambda *_: scores, live=np.ones(5, dtype=bool)
    )
    assert found[0].tolist() == pytest.approx([1, 0, (2 + 0.5) / 4, 1 / 4])
    only = np.array([False, True, False, False, False])
    assert collaborative(np.array([[1]]), cases_of([1]), np.array([0]), scores=lambda *_: scores, live=only) == 1


def test_broken_scores_are_no_reward():
    scores = np.array([[0.0, np.nan, 1.0]])
    with pytest.raises(BackboneError, match="1 item"):
        collaborative(
            np.array([[0]]), cases_of([1]), np.array([0]), scores=lambda *_: scores, live=np.ones(3, dtype=bool)
        )


def test_item_cf_scores_are_its_own():
    held = data_of(log_of(1, users=10))
    model = ItemCF().fit(held.split.train, held.split.num_items)
    cases = RolloutCases.of(held)
    chosen = np.array([4, 0, 4, 2])
    expected = np.concatenate([model.scores([cases.histories[case]]) for case in chosen])
    assert np.array_equal(item_cf_scores(model)(cases, chosen), expected)
    assert len(np.unique(expected)) > 5


def sequence_recommender(held, seed=0, **settings):
    torch.manual_seed(seed)
    encoder = SASRecConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8, hidden_dropout_prob=0.0
    )
    events = EventConfig(actions=["buy", "view"], action_tokens="added", time_features=True)
    model = SequenceModel(sequence_config(encoder, len(held.catalog), 8, events=events))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)
    catalog = Catalog.of_rows(held.catalog.items)
    return SequenceRecommender(model.eval(), catalog, Settings(max_history=8, num_beams=1, **settings))


def test_sequence_scores_are_those_of_an_evaluation_one_by_one():
    held = data_of(log_of(1, users=10))
    recommender = sequence_recommender(held)
    cases = RolloutCases.of(held)
    chosen = np.array([4, 0, 4, 2, 7])
    found = sequence_scores(recommender, held.split)(cases, chosen)
    logged = LoggedHistories(held.split, recommender.model.events)
    for line, case in zip(found, chosen.tolist(), strict=True):
        place = int(cases.places[case])
        history = logged.before(place - len(cases.histories[case]), place)
        assert history.rows.tolist() == cases.histories[case].tolist()
        rows, scores = recommender.recommend_histories([history], k=N, exclude_seen=False)
        own = torch.from_numpy(line).log_softmax(0)[rows[0]]
        assert own.tolist() == pytest.approx(scores[0], abs=1e-5)
    # What the log says of the events is told, and told of the right ones.
    blind = sequence_scores(recommender)(cases, chosen)
    assert np.abs(found - blind).max() > 1e-3
    rows, scores = recommender.recommend_rows([cases.histories[4].tolist()], k=N, exclude_seen=False)
    assert torch.from_numpy(blind[0]).log_softmax(0)[rows[0]].tolist() == pytest.approx(scores[0], abs=1e-5)
    with pytest.raises(RecipeError, match="where in the split"):
        sequence_scores(recommender, held.split)(cases_of([1], [[2]]), np.array([0]))


def test_weights():
    assert parse_weights(["exact=1.0", " rank = 0.5 ", "later"]) == {"exact": 1.0, "rank": 0.5, "later": 1.0}
    assert list(parse_weights(["later", "exact"])) == ["later", "exact"]
    assert parse_weights(["exact", "diversity=0"]) == {"exact": 1.0, "diversity": 0.0}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["exat=1"], "no reward 'exat'"),
        (["exact", "exact=2"], "named twice"),
        (["exact=much"], "'much'"),
        (["exact="], "no number"),
        (["exact=nan"], "is nan"),
        (["exact=inf"], "is inf"),
        (["exact=-1"], "is -1"),
        (["exact=0", "rank=0.0"], "above 0"),
        ([], "above 0"),
    ],
)
def test_weights_that_cannot_be(texts, said):
    with pytest.raises(RecipeError, match=said) as error:
        parse_weights(texts)
    assert str(error.value).count(". ") == 1
    assert str(error.value).endswith(".")


def test_weights_that_were_not_parsed_are_checked_too():
    with pytest.raises(RecipeError, match="'novelty'"):
        check_weights({"novelty": 1.0})
    with pytest.raises(RecipeError, match="nan"):
        build_rewards({"exact": math.nan}, data_of())


def test_all_rewards_are_built_with_what_they_need(tmp_path):
    held = data_of(log_of(1, users=10))
    vectors = np.random.default_rng(0).normal(size=(N, 4))
    # The store has its own order, and one item more.
    order = np.random.default_rng(1).permutation(N)
    ids = [held.catalog.ids[row] for row in order]
    EmbeddingStore([*ids, "other"], np.concatenate([vectors[order], np.ones((1, 4))])).save(tmp_path / "embeddings")
    weights = {name: 0.5 + place for place, name in enumerate(NAMES)}
    made = build_rewards(weights, held, tmp_path / "embeddings", "item-cf")
    assert {one.name: one.weight for one in made} == weights
    assert [one.name for one in made] == list(NAMES)
    cases = RolloutCases.of(held, later_items=3)
    chosen = np.array([3, 0, 5])
    rng = np.random.default_rng(2)
    items = np.stack([rng.permutation(N)[:4] for _ in chosen])
    items[0, 1] = cases.targets[3]
    cf = ItemCF().fit(held.split.train, N)
    codes = held.catalog.codes
    expected = {
        "exact": exact(items, cases, chosen),
        "rank": rank(items, cases, chosen),
        "later": later(items, cases, chosen),
        "prefix": prefix(items, cases, chosen, codes=codes, lengths=np.full(N, len(SIZES))),
        "diversity": diversity(items, cases, chosen, codes=codes),
        "semantic": semantic(items, cases, chosen, vectors=vectors.astype(np.float32)),
        "collaborative": collaborative(items, cases, chosen, scores=item_cf_scores(cf), live=np.ones(N, dtype=bool)),
    }
    for one in made:
        found = one.function(items, cases, chosen)
        assert (found.shape, found.dtype) == ((3, 4), np.float64)
        assert found == pytest.approx(expected[one.name], abs=1e-12), one.name
    (given_matrix,) = build_rewards({"semantic": 1.0}, held, embeddings=vectors)
    assert given_matrix.function(items, cases, chosen) == pytest.approx(expected["semantic"], abs=1e-12)


def test_a_sequence_artefact_rewards(tmp_path):
    held = data_of(log_of(1, users=10))
    recommender = sequence_recommender(held, split=held.split.content_hash)
    recommender.save_pretrained(tmp_path / "artefact")
    (made,) = build_rewards({"collaborative": 1.0}, held, collaborative=tmp_path / "artefact")
    cases, chosen = RolloutCases.of(held), np.array([2, 1])
    items = np.array([[0, 5], [7, 3]])
    live = np.ones(N, dtype=bool)
    expected = collaborative(items, cases, chosen, scores=sequence_scores(recommender, held.split), live=live)
    assert np.array_equal(made.function(items, cases, chosen), expected)
    with pytest.raises(RecipeError, match="may know what is tested"):
        build_rewards({"collaborative": 1.0}, held, collaborative=tmp_path / "artefact", split_hash="another")
    other = data_of(items=items_of().reverse())
    with pytest.raises(RecipeError, match="not the 12"):
        build_rewards({"collaborative": 1.0}, other, collaborative=tmp_path / "artefact")


def test_what_is_missing_is_said():
    held = data_of()
    with pytest.raises(RecipeError, match=r"embed\.py"):
        build_rewards({"semantic": 1.0}, held, collaborative="item-cf")
    with pytest.raises(RecipeError, match=r"seqrec\.py"):
        build_rewards({"collaborative": 1.0}, held, embeddings=np.ones((N, 2)))
    with pytest.raises(DataError, match="shape"):
        build_rewards({"semantic": 1.0}, held, embeddings=np.ones((3, 2)))
    assert len(build_rewards({"exact": 1.0}, held)) == 1
