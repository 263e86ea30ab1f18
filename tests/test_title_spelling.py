"""Items spelt as titles: different tokens for every item, old ones never change, and a search that is brute force."""

import json
import os
import string
from collections import Counter

import numpy as np
import pytest
import torch
from factories import PROMPTS, random_histories
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec import Recommender
from llmrec.backbones.causal_lm import BackboneArguments, from_scratch
from llmrec.beam import TrieTensors
from llmrec.catalog import Catalog
from llmrec.catalog_versions import CatalogVersions
from llmrec.decoding import decode, score_catalog
from llmrec.diagnostics.identifiers import SemanticIDs
from llmrec.exceptions import ArtefactError, CatalogError, DataError, RequestError
from llmrec.prompt import Prompt
from llmrec.recommender import Settings
from llmrec.title_spelling import (
    TitleSpelling,
    codes_of_tokens,
    packed,
    spell_new_items,
    spell_titles,
    title_catalog,
    unpacked,
)
from llmrec.vocabulary import add_catalog_tokens, train_tokenizer

END = 0
TITLES = [
    *("Red lamp", "Red lamp", "Red", "Red lamp shade", "Blue lamp", "Blue", "", "  \n ", "Red  lamp", "lamp"),
    *("A <|eos|> in the middle", "<|eos|>", "Größe 5 — 🧦", "Red lamp (2)", "x", "very " * 30 + "long", "(2)"),
]


def text_items(titles=TITLES):
    return [{"item_id": f"item-{row}", "title": title} for row, title in enumerate(titles)]


def tokenizer_of_words(seed=0):
    return train_tokenizer(["Red lamp shade", "Blue lamp", "very very long"][: 3 - seed], vocab_size=280)


def text_recommender(model_type="llama", seed=0, max_title_tokens=12, dtype=torch.float64, positions=256):
    tokenizer = tokenizer_of_words()
    catalog = title_catalog(text_items(), tokenizer, max_title_tokens)
    arguments = BackboneArguments(
        model_type=model_type, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    torch.manual_seed(seed)
    model = from_scratch(arguments, tokenizer, positions)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    prompt = Prompt.read(PROMPTS / "semantic_ids.jinja")
    return Recommender(model.to(dtype).eval(), tokenizer, catalog, prompt, Settings(max_history=4, num_beams=8))


def spelt_by_bytes(titles, cut, taken=()):
    """The rule in slow words: the first free one of title, title (2), title (3), …"""
    known, found = set(taken), []
    for title in titles:
        begin, number, tail = list(title.encode())[:cut], 2, b""
        while (*begin, *tail, END) in known:
            tail, number = f" ({number})".encode(), number + 1
        known.add((*begin, *tail, END))
        found.append([*begin, *tail, END])
    return found


@settings(max_examples=150, deadline=None)
@given(
    titles=st.lists(st.text(alphabet="ab (2)", max_size=6), min_size=1, max_size=25),
    later=st.lists(st.text(alphabet="ab (2)", max_size=6), max_size=10),
    cut=st.integers(1, 5),
)
def test_titles_are_spelt_apart_and_old_ones_stay(titles, later, cut):
    spelling = TitleSpelling(256, "", END, cut)
    spelt = spell_titles(titles, lambda text: list(text.encode()), spelling)
    assert spelt == spelt_by_bytes(titles, cut)
    assert len(set(map(tuple, spelt))) == len(titles)
    assert spell_titles([*titles, *later], lambda text: list(text.encode()), spelling)[: len(titles)] == spelt
    more = spell_titles(later, lambda text: list(text.encode()), spelling, map(tuple, spelt))
    assert more == spelt_by_bytes(later, cut, map(tuple, spelt))
    assert not set(map(tuple, more)) & set(map(tuple, spelt))
    for one in map(tuple, [*spelt, *more]):  # none begins another's
        assert sum(other[: len(one)] == one for other in map(tuple, [*spelt, *more])) == 1


def test_many_items_of_one_title_are_numbered_in_linear_time():
    calls = Counter()

    def encode(text):
        calls["encode"] += 1
        return list(text.encode())

    spelt = spell_titles(["same"] * 3000, encode, TitleSpelling(256, "", END, 8))
    assert bytes(spelt[-1]) == b"same (3000)\x00"
    assert calls["encode"] == 3000 + 2999


@settings(max_examples=50, deadline=None)
@given(spelt=st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=6), min_size=1, max_size=8))
def test_ragged_codes_are_packed_without_loss(spelt):
    codes = codes_of_tokens(spelt)
    assert [(row[row > 0] - 1).tolist() for row in codes] == spelt
    flat, lengths = packed(codes)
    assert flat.size == sum(map(len, spelt))
    assert (unpacked(flat, lengths) == codes).all()
    with pytest.raises(CatalogError, match="do not fit rows"):
        unpacked(flat[1:], lengths)


def test_a_catalog_of_titles_reads_as_the_titles():
    tokenizer = tokenizer_of_words()
    before = len(tokenizer)
    catalog = title_catalog(text_items(), tokenizer, max_title_tokens=24)
    assert catalog.is_text
    assert len(tokenizer) == before
    said = [tokenizer.decode(catalog.tokens_of(row)[:-1]) for row in range(len(catalog))]
    assert said[:7] == ["Red lamp", "Red lamp (2)", "Red", "Red lamp shade", "Blue lamp", "Blue", "item-6"]
    assert said[7:10] == ["item-7", "Red lamp (3)", "lamp"]
    assert said[12:15] == ["Größe 5 — 🧦", "Red lamp (2) (2)", "x"]
    longest = catalog.tokens_of(15)
    assert len(longest) == 25
    assert tokenizer.decode(longest[:-1]) in "very " * 30
    end = tokenizer.eos_token_id
    for row in range(len(catalog)):  # a title that holds the end token's string does not end there
        tokens = catalog.tokens_of(row)
        assert [place for place, token in enumerate(tokens) if token == end] == [len(tokens) - 1]
    assert catalog.tokens_of_rows([3, 0, 3]) == [*catalog.tokens_of(3), *catalog.tokens_of(0), *catalog.tokens_of(3)]
    assert catalog.tokens_of_rows([]) == []
    assert catalog.num_levels == max(len(catalog.tokens_of(row)) for row in range(len(catalog)))


def test_a_catalog_of_titles_is_saved_small_and_whole(tmp_path):
    titles = [f"{word} {n}" for n in range(60) for word in ("Red lamp", "Blue")] + ["very " * 40]
    catalog = title_catalog(text_items(titles), tokenizer_of_words(), max_title_tokens=50)
    catalog = catalog.with_retired([4], True)
    catalog.save(tmp_path)
    again = Catalog.load(tmp_path)
    assert (again.codes == catalog.codes).all()
    assert again.spelling == catalog.spelling
    assert again.content_hash == catalog.content_hash
    assert again.retired.tolist() == catalog.retired.tolist()
    assert again.tokens_of_rows(range(len(titles))) == catalog.tokens_of_rows(range(len(titles)))
    total = len(catalog.tokens_of_rows(range(len(titles))))
    assert os.path.getsize(tmp_path / "codes.safetensors") < 4 * total + 6 * len(titles) + 500
    described = json.loads((tmp_path / "catalog.json").read_text())
    described["titles"]["end"] = 1
    (tmp_path / "catalog.json").write_text(json.dumps(described))
    with pytest.raises(CatalogError, match="which is no title with one end token"):
        Catalog.load(tmp_path)
    described["titles"]["begin"] = 1
    (tmp_path / "catalog.json").write_text(json.dumps(described))
    with pytest.raises(CatalogError, match=r"catalog\.json cannot be read"):
        Catalog.load(tmp_path)


def test_new_items_are_spelt_with_tokens_never_used_before_and_longer_than_any(tmp_path):
    tokenizer = tokenizer_of_words()
    title_catalog(text_items(["Red", "Blue"]), tokenizer, max_title_tokens=20).save(tmp_path)
    versions = CatalogVersions(tmp_path)
    base = versions.load()
    new = [{"item_id": "new-1", "title": "Zwölf Äpfel @ 3"}, {"item_id": "new-2", "title": "Red"}]
    first = versions.add(new, spell_new_items(new, tokenizer, base))
    versions.retire(["item-0"])
    last = [{"item_id": "new-3", "title": "Red"}]
    current = versions.load()
    second = versions.add(last, spell_new_items(last, tokenizer, current))
    grown = CatalogVersions(tmp_path).load(second)
    assert [tokenizer.decode(grown.tokens_of(row)[:-1]) for row in range(5)] == [
        *("Red", "Blue", "Zwölf Äpfel @ 3", "Red (2)", "Red (3)")
    ]
    assert grown.retired.tolist() == [True, False, False, False, False]
    assert grown.num_levels > base.num_levels
    assert (grown.codes[:2, : base.num_levels] == base.codes).all()
    assert not grown.codes[:2, base.num_levels :].any()
    assert grown.trie.num_items == 4
    assert CatalogVersions(tmp_path).load(first).ids == ["item-0", "item-1", "new-1", "new-2"]
    versions.rollback(base.version)
    assert CatalogVersions(tmp_path).load().content_hash == base.content_hash
    with pytest.raises(CatalogError, match="share the code"):
        base.with_items(last, base.codes[:1])
    with pytest.raises(CatalogError, match="no title with one end token"):
        base.with_items(last, np.array([[5, 6]]))
    with pytest.raises(CatalogError, match="Codes reach from"):
        base.with_items(last, np.array([[100_000, tokenizer.eos_token_id + 1]]))
    with pytest.raises(ArtefactError, match="different artefacts"):
        spell_new_items(last, tokenizer_of_words(2), base)


def test_what_has_no_place_in_text_mode_is_refused():
    tokenizer = tokenizer_of_words()
    catalog = title_catalog(text_items(), tokenizer)
    for attempt in (catalog.token_strings, lambda: add_catalog_tokens(tokenizer, catalog)):
        with pytest.raises(CatalogError, match="spelt as their titles"):
            attempt()
    with pytest.raises(CatalogError, match="spelt as their titles"):
        catalog.with_tokens(catalog.token_ids)
    with pytest.raises(CatalogError, match="no softmax range 'semantic_ids' for items spelt as titles"):
        TrieTensors.of(catalog, "semantic_ids")
    ids = Catalog([{"item_id": "a"}], np.array([[0]]), [1])
    with pytest.raises(CatalogError, match="have semantic IDs"):
        spell_new_items([], tokenizer, ids)
    with pytest.raises(CatalogError, match="no item to spell"):
        title_catalog([], tokenizer)
    with pytest.raises(CatalogError, match="max_title_tokens is 0"):
        title_catalog(text_items(), tokenizer, max_title_tokens=0)
    with pytest.raises(CatalogError, match="with the end token 97"):
        spell_titles(["a"], lambda text: list(text.encode()), TitleSpelling(256, "", 97, 4))


@pytest.mark.parametrize(
    "codes", [[[5, 3, 0, 3]], [[3, 3]], [[5, 6]], [[5]], [[5, 0]], [[0, 3]], [[3, 5]], [[5, 0, 3]]]
)
def test_codes_that_are_no_titles_are_refused(codes):
    spelling = TitleSpelling(10, "", 2, 4)
    spelling.check(np.array([[5, 3, 0], [3, 0, 0], [10, 9, 3]]))
    with pytest.raises(CatalogError, match="which is no title with one end token"):
        spelling.check(np.array(codes))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_wide_search_is_brute_force(model_type, renormalize):
    recommender = text_recommender(model_type, seed=1)
    catalog = recommender.catalog.with_retired([2, 9], True)
    trie = TrieTensors.of(catalog)
    histories = [*random_histories(1, len(catalog), 1, 4), [2, 5], []]
    prompts = [recommender.encoder.encode(rows) for rows in histories]
    # Over legal tokens probabilities depend on what is excluded, over the vocabulary they do not.
    excluded = None if renormalize else [np.array(rows, dtype=np.int64) for rows in histories]
    found = decode(recommender.model, prompts, trie, len(catalog), excluded, renormalize=renormalize)
    for row, prompt in enumerate(prompts):
        scores = score_catalog(recommender.model, prompt, trie, renormalize).numpy().copy()
        out = {2, 9} if renormalize else {2, 9, *histories[row]}
        scores[list(out)] = -np.inf
        order = np.lexsort((np.arange(len(scores)), -scores))[: len(catalog) - len(out)]
        assert found.items[row, : len(order)].tolist() == order.tolist()
        assert np.allclose(found.scores[row, : len(order)], scores[order], atol=1e-9)
        assert (found.items[row, len(order) :] == -1).all()
    if not renormalize:  # what the definition is by hand, for one item: its own tokens, end included, and no more
        tokens = catalog.tokens_of(3)
        logits = recommender.model(torch.tensor([[*prompts[-1], *tokens]])).logits[0].detach().log_softmax(-1)
        own = sum(float(logits[len(prompts[-1]) - 1 + place, token]) for place, token in enumerate(tokens))
        assert float(score_catalog(recommender.model, prompts[-1], trie)[3]) == pytest.approx(own, abs=1e-9)


def test_probabilities_over_legal_tokens_sum_to_one():
    recommender = text_recommender(seed=2)
    found = decode(recommender.model, [[1, 5, 9]], TrieTensors.of(recommender.catalog), 100, renormalize=True)
    assert float(found.scores[0, : len(recommender.catalog)].exp().sum()) == pytest.approx(1.0, abs=1e-9)


def test_the_longest_item_must_fit_behind_the_prompt():
    recommender = text_recommender(positions=32, max_title_tokens=12)
    trie = TrieTensors.of(recommender.catalog)
    room = 32 - recommender.catalog.num_levels + 1
    assert decode(recommender.model, [[1] * room], trie, 3).items.shape == (1, 3)
    with pytest.raises(RequestError, match=f"{recommender.catalog.num_levels} of an item exceed the model's 32"):
        decode(recommender.model, [[1] * (room + 1)], trie, 3)


def test_a_recommender_of_titles_travels_and_learns_new_items_by_command(tmp_path, run_python):
    recommender = text_recommender(dtype=torch.float32)
    recommender.save_pretrained(tmp_path / "artefact")
    again = Recommender.from_pretrained(tmp_path / "artefact", device="cpu")
    expected = recommender.recommend(["item-3", "item-5"])
    answered = again.recommend(["item-3", "item-5"])
    assert [item.item_id for item in answered] == [item.item_id for item in expected]
    assert [item.log_probability for item in answered] == pytest.approx(
        [e.log_probability for e in expected], abs=1e-4
    )
    (tmp_path / "new.jsonl").write_text(
        json.dumps({"item_id": "later", "title": "Red lamp"}) + "\n" + json.dumps({"item_id": "item-4"}) + "\n"
    )
    program = f"""
import sys
from llmrec.cli.main import app
sys.argv = ["llmrec", "ids", "assign", {str(tmp_path / "artefact")!r}, "--items", {str(tmp_path / "new.jsonl")!r},
    "--json", {str(tmp_path / "out.json")!r}]
app()
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out.json").read_text())
    assert (told["added"], told["known"], told["items"]) == (1, 1, len(TITLES) + 1)
    now = Recommender.from_pretrained(tmp_path / "artefact", device="cpu")
    assert now.catalog.version == told["version"]
    assert now.tokenizer.decode(now.catalog.tokens_of(len(TITLES))[:-1]) == "Red lamp (4)"
    found = now.recommend(["later"], k=50, num_beams=50)
    assert {item.item_id for item in found} == set(again.catalog.ids)
    scores = score_catalog(now.model, now.encoder.encode([len(TITLES)]), TrieTensors.of(now.catalog))
    for item in found:
        assert item.log_probability == pytest.approx(float(scores[now.catalog.row(item.item_id)]), abs=1e-4)


def test_a_report_on_semantic_ids_is_refused(tmp_path):
    text_recommender(dtype=torch.float32).save_pretrained(tmp_path / "artefact")
    with pytest.raises(DataError, match="17 items are spelt as their titles"):
        SemanticIDs.read(tmp_path / "artefact")


def test_an_artefact_of_titles_with_another_tokenizer_is_refused(tmp_path):
    from llmrec.artefact import write_manifest

    text_recommender(dtype=torch.float32).save_pretrained(tmp_path / "artefact")
    tokenizer_of_words(2).save_pretrained(tmp_path / "artefact")
    write_manifest(tmp_path / "artefact")
    with pytest.raises(ArtefactError, match="different artefacts"):
        Recommender.from_pretrained(tmp_path / "artefact")


def test_a_tokenizer_without_control_tokens_cannot_end_an_item():
    tokenizer = tokenizer_of_words()
    assert set(string.printable) <= set(tokenizer.decode(range(len(tokenizer))))
    tokenizer.eos_token = tokenizer.bos_token = tokenizer.pad_token = None
    with pytest.raises(CatalogError, match="no control token that could end an item"):
        title_catalog(text_items(), tokenizer)
