"""What may be asked of a Recommender beside a history, each option against a look at every item of the catalog."""

import math

import numpy as np
import pytest
import torch
from factories import random_histories, random_recommender
from test_title_spelling import text_recommender

from llmrec import Recommender, recommender
from llmrec.catalog import Catalog
from llmrec.decoding import score_catalog
from llmrec.exceptions import BackboneError, FilterError, RequestError, UnknownItemError
from llmrec.recommendation import Recommendation, check_request, read_selection, rows_to_score
from llmrec.selection import Draw, PrefixCap
from llmrec.service.schema import Condition, Sampling
from llmrec.service.schema import PrefixCap as Cap
from llmrec.trie_tensors import TrieTensors

GONE = [4, 25]
PRICES = np.random.default_rng(3).integers(0, 10, 40).tolist()


@pytest.fixture(scope="module")
def made():
    """Forty items with prices and brands, two of them retired."""
    made = random_recommender(3)
    items = [{**item, "price": price} for item, price in zip(made.catalog.items, PRICES, strict=True)]
    catalog = Catalog(items, made.catalog.codes, made.catalog.codebook_sizes, made.catalog.token_ids)
    return Recommender(made.model, made.tokenizer, catalog.with_retired(GONE, True), made.prompt, made.settings)


def names(rows):
    return [f"item-{row}" for row in rows]


def brute_force(made, prompt, rows, renormalize=False):
    """Per row its score, where `rows` alone may be recommended."""
    trie = TrieTensors.of(made.catalog, made.settings.softmax).subset(list(rows))
    return score_catalog(made.model, prompt, trie, renormalize)


def ordered(made, scores, rows):
    return sorted(rows, key=lambda row: (-scores[row], made.catalog.codes[row].tolist()))


@pytest.mark.parametrize("normalize", ["vocabulary", "legal"])
@pytest.mark.parametrize("seed", range(6))
def test_constrained_recommendations_are_the_best_of_what_is_left(made, seed, normalize):
    rng = np.random.default_rng(seed)
    for history in random_histories(seed, 40, 4, 6):
        options, left = {}, set(range(40)) - set(GONE)
        if rng.integers(2):
            options["filters"] = {"price": Condition(max=5), "brand": {"none_of": ["Brand 1"]}}
            left &= {row for row in range(40) if PRICES[row] <= 5 and row % 3 != 1}
        if rng.integers(2):
            allow = rng.integers(0, 50, 25).tolist()
            options["allow"] = names(allow)
            left &= set(allow)
        if rng.integers(2):
            deny = rng.integers(0, 50, 8).tolist()
            options["deny"] = names(deny)
            left -= set(deny)
        options["exclude_seen"] = bool(rng.integers(2))
        left -= set(history) if options["exclude_seen"] else set()
        k = int(rng.integers(1, 30))
        found = made.recommend(
            names(history), k, num_beams=40, normalize=normalize, min_candidates=len(left), **options
        )
        scores = brute_force(made, made.encoder.encode(history), left, normalize == "legal").tolist()
        wanted = ordered(made, scores, left)[:k]
        assert [item.item_id for item in found] == names(wanted)
        assert [item.log_probability for item in found] == pytest.approx([scores[row] for row in wanted], abs=1e-9)
        narrow = made.recommend(names(history), k, num_beams=1, normalize=normalize, **options)
        assert len(narrow) == len(wanted)
        assert {item.item_id for item in narrow} <= set(names(left))
        values = [scores[made.catalog.row(item.item_id)] for item in narrow]
        assert [item.log_probability for item in narrow] == pytest.approx(values, abs=1e-9)
        with pytest.raises(FilterError, match=rf"{len(left)} item\(s\) may be recommended here"):
            made.recommend(names(history), k, min_candidates=len(left) + 1, **options)


def test_renormalised_scores_of_all_that_is_left_are_probabilities(made):
    found = made.recommend(["item-1"], 40, num_beams=40, normalize="legal", filters={"price": {"min": 4}})
    assert sum(math.exp(item.log_probability) for item in found) == pytest.approx(1.0, abs=1e-9)


def test_a_cap_keeps_the_best_of_every_branch(made):
    history = [3, 9]
    scores = brute_force(made, made.encoder.encode(history), set(range(40)) - set(GONE)).tolist()
    left = set(range(40)) - set(GONE) - set(history)
    for most in (1, 2):
        kept, counts = [], {}
        for row in ordered(made, scores, left):
            branch = tuple(made.catalog.codes[row][:2])
            counts[branch] = counts.get(branch, 0) + 1
            kept += [row] if counts[branch] <= most else []
        found = made.recommend(names(history), 40, num_beams=40, prefix_cap={"levels": 2, "most": most})
        assert [item.item_id for item in found] == names(kept)
        again = made.recommend(names(history), 40, num_beams=40, prefix_cap=Cap(levels=2, most=most))
        assert again == found
    found = made.recommend(names(history), 40, num_beams=40, prefix_cap={"levels": 1, "most": 1})
    assert len({item.semantic_id[0] for item in found}) == len(found) == 5
    with pytest.raises(RequestError, match="9"):
        made.recommend(names(history), prefix_cap={"levels": 9, "most": 1})


def test_a_draw_is_repeated_by_its_seed_and_scores_stay(made):
    scores = brute_force(made, made.encoder.encode([3]), set(range(40)) - set(GONE)).tolist()
    draws = set()
    for seed in range(12):
        found = made.recommend(["item-3"], 6, num_beams=40, sampling={"temperature": 3.0, "seed": seed})
        assert found == made.recommend(["item-3"], 6, num_beams=40, sampling=Sampling(temperature=3.0, seed=seed))
        rows = [made.catalog.row(item.item_id) for item in found]
        assert len(set(rows)) == 6
        assert not {3, *GONE} & set(rows)
        assert [item.log_probability for item in found] == pytest.approx([scores[row] for row in rows], abs=1e-9)
        draws.add(tuple(rows))
    assert len(draws) > 6
    cold = [made.recommend(["item-3"], 6, sampling={"temperature": 1e-6, "seed": seed}) for seed in range(3)]
    assert cold[0] == cold[1] == cold[2]
    assert cold[0][0].item_id == made.recommend(["item-3"], 1, num_beams=1)[0].item_id  # greedy, level by level
    everything = made.recommend(["item-3"], 40, num_beams=40, sampling={"seed": 5}, exclude_seen=False)
    assert {item.item_id for item in everything} == set(names(set(range(40)) - set(GONE)))


def test_a_text_is_the_prompt(made):
    text = "a customer bought <s0_1> a title"
    prompt = made.encoder.encode_text(text)
    own = {int(token) for level in made.catalog.token_ids for token in level}
    assert not own & set(prompt)  # no item is spelt by a text
    scores = brute_force(made, prompt, set(range(40)) - set(GONE)).tolist()
    found = made.recommend(text=text, k=40, num_beams=40)
    assert [item.item_id for item in found] == names(ordered(made, scores, set(range(40)) - set(GONE)))
    assert [item.log_probability for item in found] == pytest.approx(sorted(scores)[::-1][:38], abs=1e-9)
    for given, message in [
        ({"text": text, "history": ["item-1"]}, "both a history and a text"),
        ({}, "neither a history nor a text"),
        ({"text": text, "events": []}, "events came with a text"),
        ({"text": text, "preference": "x", "events": []}, "events, preference came with a text"),
        ({"text": "  "}, "The text is '  '"),
    ]:
        with pytest.raises(RequestError, match=message):
            made.recommend(**given)


def test_recommendations_tell_their_path(made):
    history = [3, 9]
    prompt = made.encoder.encode(history)
    for item in made.recommend(names(history), 8, num_beams=40):
        row = made.catalog.row(item.item_id)
        assert item.semantic_id == tuple(made.catalog.codes[row].tolist())
        tokens = made.catalog.tokens_of(row)
        with torch.inference_mode():
            logits = made.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        by_hand = logits.log_softmax(-1)[range(3), tokens].tolist()
        assert list(item.level_log_probabilities) == pytest.approx(by_hand, abs=1e-9)
        assert sum(by_hand) == pytest.approx(item.log_probability, abs=1e-9)
    plain = Recommendation("a", 1, -0.5, "A")
    assert plain == Recommendation("a", 1, -0.5, "A", (1, 2), (-0.2, -0.3))
    assert hash(plain) == hash(Recommendation("a", 1, -0.5, "A", (1, 2), (-0.2, -0.3)))
    assert "semantic_id" not in repr(plain)


def test_scores_are_those_of_brute_force_in_the_order_asked(made, monkeypatch):
    history, asked = [3, 9], [9, 0, 39, 3, 17, 22, 8]
    scores = brute_force(made, made.encoder.encode(history), set(range(40)) - set(GONE)).tolist()
    for at_once in (1_000, 3):
        monkeypatch.setattr(recommender, "_SCORED_AT_ONCE", at_once)
        found = made.score(names(history), names(asked))
        assert [item for item, _, _ in found] == names(asked)
        assert [score for _, score, _ in found] == pytest.approx([scores[row] for row in asked], abs=1e-9)
        assert [sum(levels) for _, _, levels in found] == pytest.approx([scores[row] for row in asked], abs=1e-9)
        assert {len(levels) for _, _, levels in found} == {3}
    best = made.recommend(names(history), 5, num_beams=40)
    again = made.score(names(history), [item.item_id for item in best])
    assert [score for _, score, _ in again] == pytest.approx([item.log_probability for item in best], abs=1e-9)
    text = made.score(None, ["item-1"], text="some words")
    wanted = brute_force(made, made.encoder.encode_text("some words"), [1])[1]
    assert text[0][1] == pytest.approx(float(wanted), abs=1e-9)


def test_items_that_cannot_be_scored(made):
    assert rows_to_score(made.catalog, ["item-7", "item-1"]) == [7, 1]
    for items, message in [
        ([], "Give a list with at least one item id"),
        ("item-1", "The items to score are 'item-1'"),
        (["item-1", "item-2", "item-1"], r"\('item-1'\) to score are named more than once"),
        (["item-1", "lost"], r"1 item\(s\) \('lost'\) to score are not in the catalog"),
        (["item-4"], r"\('item-4'\) to score are retired"),
        ([f"x{n}" for n in range(9)], r"9 item\(s\) \('x0', 'x1', 'x2', 'x3', 'x4', …\)"),
    ]:
        with pytest.raises(RequestError, match=message):
            made.score(["item-1"], items)
    with pytest.raises(UnknownItemError, match="'lost'"):
        made.score(["lost"], ["item-1"])
    assert made.score(["item-1", "lost"], ["item-2"], ignore_unknown=True) == made.score(["item-1"], ["item-2"])


def test_options_that_cannot_be_read(made):
    for options, kind, message in [
        ({"filters": {"prise": {"max": 1}}}, FilterError, "no attribute 'prise'. The nearest is 'price'"),
        ({"filters": {"price": {"any_of": ["1"]}}}, FilterError, "compares a number with"),
        ({"filters": {"price": {}}}, FilterError, "The filter on 'price' cannot be read"),
        ({"normalize": "items"}, RequestError, "normalize is 'items'. Give one of vocabulary, legal"),
        ({"prefix_cap": {"levels": 0, "most": 1}}, RequestError, "prefix_cap is"),
        ({"prefix_cap": {"most": 1}}, RequestError, r"\(levels: Field required\)\. Give levels and most"),
        ({"sampling": {"temperature": 0}}, RequestError, "sampling is"),
        ({"sampling": {"heat": 1}}, RequestError, "sampling is .* Give temperature and seed"),
    ]:
        with pytest.raises(kind, match=message):
            made.recommend(["item-1"], **options)
    assert read_selection() == read_selection("vocabulary", None, None)
    chosen = read_selection("legal", {"levels": 2, "most": 3}, {"seed": 4})
    assert (chosen.renormalize, chosen.cap, chosen.draw) == (True, PrefixCap(2, 3), Draw(1.0, 4))
    assert check_request(7, 3) == 7


def test_an_allow_list_is_a_list(made):
    for name in ("allow", "deny"):
        with pytest.raises(RequestError, match=f"{name} is the string 'item-1'"):
            made.recommend(["item-1"], **{name: "item-1"})


def test_nothing_left_is_nothing_found(made):
    assert made.recommend(["item-1"], filters={"price": {"min": 99}}) == []
    assert made.recommend(["item-1"], allow=[]) == []
    assert made.recommend(["item-1"], allow=["item-4", "lost"]) == []
    assert made.recommend(["item-1"], allow=["item-1"]) == []
    capped = made.recommend(["item-1"], allow=["item-1"], prefix_cap={"levels": 1, "most": 1})
    assert capped == []


def test_broken_weights_are_told_under_a_cap_too():
    broken = random_recommender(1)
    with torch.no_grad():
        broken.model.get_input_embeddings().weight.fill_(torch.nan)
    for options in ({}, {"prefix_cap": {"levels": 1, "most": 1}}, {"sampling": {}}, {"allow": ["item-2"]}):
        with pytest.raises(BackboneError, match="not numbers"):
            broken.recommend(["item-1"], **options)
    with pytest.raises(BackboneError, match="not numbers"):
        broken.score(["item-1"], ["item-2"])


def test_titles_take_the_options_too():
    made = text_recommender()
    left = [0, 3, 4, 9, 15, 16]
    prompt = made.encoder.encode([1])
    for normalize in ("vocabulary", "legal"):
        found = made.recommend(["item-1"], 9, num_beams=40, allow=names(left), normalize=normalize)
        scores = brute_force(made, prompt, left, normalize == "legal").tolist()
        assert [item.item_id for item in found] == names(sorted(left, key=lambda row: -scores[row]))
        assert [item.log_probability for item in found] == pytest.approx(sorted(scores)[::-1][:6], abs=1e-9)
    scores = brute_force(made, prompt, range(17)).tolist()
    for item, score, levels in made.score(["item-1"], names(left)):
        row = made.catalog.row(item)
        assert score == pytest.approx(scores[row], abs=1e-9)
        assert sum(levels) == pytest.approx(score, abs=1e-9)
        assert [level == 0 for level in levels] == (made.catalog.item_tokens[row] < 0).tolist()
