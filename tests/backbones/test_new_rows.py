"""New rows against their definitions in float64, for tables of every kind."""

import numpy as np
import pytest
import torch
from factories import random_catalog
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from llmrec.backbones.new_rows import CodebookStart, MeanStart, TextStart, extend_embeddings, starts
from llmrec.exceptions import BackboneError
from llmrec.quantization.hashed import HashedCodes
from llmrec.vocabulary import PlainText, add_catalog_tokens, train_tokenizer


def tiny(model_type="llama", vocab_size=100, hidden_size=32, tied=False):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def spelt(num_items=40, sizes=(5, 4, 6), texts=()):
    """A tokenizer with a catalog's tokens behind its text."""
    tokenizer = train_tokenizer([*texts, "some text to learn from"], 300)
    return tokenizer, add_catalog_tokens(tokenizer, random_catalog(num_items=num_items, sizes=sizes))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_near_the_mean_distinct_and_seeded(tied):
    first, second, other = (tiny(tied=tied, hidden_size=64) for _ in range(3))
    before = [first.get_input_embeddings().weight.clone(), first.get_output_embeddings().weight.clone()]
    new = list(range(100, 140))
    assert extend_embeddings(first, 140, new, seed=1) == list(range(100, 192))
    extend_embeddings(second, 140, new, seed=1)
    extend_embeddings(other, 140, new, seed=2)
    tables = [first.get_input_embeddings().weight, first.get_output_embeddings().weight]
    assert (tables[0] is tables[1]) == tied
    for old, table in zip(before, tables, strict=True):
        assert table.shape[0] == 192
        assert torch.equal(table[:100], old)
        distance = (table[100:] - old.mean(0)) / old.std(0, correction=0)
        assert 0.08 < distance.std() < 0.12
        assert abs(distance.mean()) < 0.01
        assert len({tuple(row.tolist()) for row in table[100:]}) == 92
    assert torch.equal(tables[0], second.get_input_embeddings().weight)
    assert not torch.equal(tables[0][100:140], other.get_input_embeddings().weight[100:140])


def test_an_untied_head_starts_from_its_own_rows():
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(3.0)
        model.get_output_embeddings().weight.sub_(2.0)
    extend_embeddings(model, 110, range(100, 110), seed=0)
    assert model.get_input_embeddings().weight[100:].detach().mean().item() == pytest.approx(3.0, abs=0.02)
    assert model.get_output_embeddings().weight[100:].detach().mean().item() == pytest.approx(-2.0, abs=0.02)


def test_ids_may_lie_anywhere_and_only_they_change():
    model = tiny(vocab_size=200)
    before = model.get_input_embeddings().weight.detach().clone()
    scattered = [199, 5, 77, 78]
    assert extend_embeddings(model, 200, scattered, seed=0) == sorted(scattered)
    after = model.get_input_embeddings().weight
    changed = (after != before).any(1).nonzero().flatten().tolist()
    assert changed == sorted(scattered)
    old = np.delete(before.double().numpy(), scattered, axis=0)
    distance = np.abs(after[scattered].detach().double().numpy() - old.mean(0)) / old.std(0)
    assert distance.max() < 0.6  # a tenth of a standard deviation, six times


def test_tables_wider_than_the_tokenizer_are_not_shrunk():
    model = tiny(vocab_size=200)
    extend_embeddings(model, 140, list(range(100, 140)), seed=0)
    assert model.get_input_embeddings().weight.shape[0] == 200
    assert model.config.vocab_size == 200


def test_without_new_tokens_nothing_changes():
    model = tiny()
    before = model.get_input_embeddings().weight.detach().clone()
    assert extend_embeddings(model, 100, [], seed=0) == []
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_bias_of_the_head_starts_from_the_mean_of_the_old():
    model = tiny("phi")
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.bias.normal_(5.0, 1.0)
    old = head.bias.detach().double().clone()
    rows = extend_embeddings(model, 110, range(100, 110), seed=0)
    bias = model.get_output_embeddings().bias
    assert torch.equal(bias[:100].double(), old)
    assert torch.allclose(bias[rows].double(), old.mean().expand(len(rows)))


def test_half_precision_tables_keep_their_format():
    model = tiny().to(torch.bfloat16)
    extend_embeddings(model, 110, range(100, 110), seed=0)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert len({tuple(row.tolist()) for row in model.get_input_embeddings().weight[100:]}) == 28


@pytest.mark.parametrize(("size", "ids"), [(100, [100]), (140, [-1]), (140, [140])])
def test_ids_outside_the_vocabulary(size, ids):
    with pytest.raises(BackboneError, match=r"vocabulary has"):
        extend_embeddings(tiny(), size, ids, seed=0)


def test_nothing_old_to_start_from():
    with pytest.raises(BackboneError, match="none to start from"):
        extend_embeddings(tiny(), 100, range(100), seed=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(0, 3))
def test_text_rows_are_the_mean_of_the_items_tokens(seed, num_items, empty):
    rng = np.random.default_rng(seed)
    words = ["red", "lens", "cap", "oil", "a", "brush set"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 6))) for _ in range(num_items)]
    for place in rng.integers(0, num_items, empty):
        texts[place] = ""
    tokenizer, catalog = spelt(num_items, (6, 6), words)
    text = PlainText(tokenizer)
    size = min(min(ids) for ids in catalog.require_tokens())
    table = torch.from_numpy(rng.normal(size=(len(tokenizer) + 10, 16))).float()
    known = torch.arange(len(table)) < size
    new = torch.arange(size, len(tokenizer))
    start = TextStart(TextStart.of(catalog, texts, text).counts, noise=0.0)
    rows = start(table, known, new, torch.Generator().manual_seed(1))
    fallback = MeanStart()(table, known, new, torch.Generator().manual_seed(1))
    exact = table.double().numpy()
    for level, ids in enumerate(catalog.require_tokens()):
        for code, id in enumerate(ids.tolist()):
            of_code = [item for item in range(num_items) if catalog.codes[item, level] == code]
            tokens = [token for item in of_code for token in text.encode(texts[item])]
            expected = np.mean([exact[token] for token in tokens], axis=0) if tokens else fallback[id - size].numpy()
            np.testing.assert_allclose(rows[id - size].numpy(), expected, atol=1e-5)


def test_codes_with_equal_texts_start_apart_but_close():
    tokenizer, catalog = spelt()
    model = tiny(vocab_size=300)
    start = starts("text", catalog, ["the same words"] * len(catalog), PlainText(tokenizer))
    rows = extend_embeddings(
        model, len(tokenizer), [i for ids in catalog.require_tokens() for i in ids.tolist()], 0, start
    )
    table = model.get_input_embeddings().weight.detach()
    own = [
        int(id) for level, ids in enumerate(catalog.require_tokens()) for id in ids[np.unique(catalog.codes[:, level])]
    ]
    assert len({tuple(row.tolist()) for row in table[rows]}) == len(rows)
    tokens = PlainText(tokenizer).encode("the same words")
    distance = (table[own] - table[tokens].mean(0)) / table[:300].std(0, correction=0)
    assert 0.005 < distance.std() < 0.02


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 40), st.sampled_from([16, 24]))
def test_codebook_rows_keep_the_vectors_geometry(seed, codes, channels, width):
    rng = np.random.default_rng(seed)
    table = torch.from_numpy(rng.normal(2.0, 0.3, size=(60 + codes, width))).float()
    known = torch.arange(len(table)) < 60
    new = torch.arange(60, 60 + codes)
    vectors = rng.normal(7.0, 3.0, size=(codes, channels))
    start = CodebookStart([(np.arange(60, 60 + codes), vectors)], noise=0.0)
    rows = start(table, known, new, torch.Generator().manual_seed(seed % 1000)).double().numpy()
    old = table[:60].double().numpy()
    deviation = rows - old.mean(0)
    centred = vectors - vectors.mean(0)
    # Every inner product of centred vectors, up to one factor; all of them fit while min(K - 1, C) <= D.
    gram, wanted = deviation @ deviation.T, centred @ centred.T
    np.testing.assert_allclose(gram / np.trace(gram), wanted / np.trace(wanted), atol=1e-4)
    assert np.trace(gram) / codes == pytest.approx(old.var(0).sum(), rel=1e-4)


def test_wide_codebooks_keep_their_first_principal_components():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 30)) * np.linspace(3.0, 0.1, 30)
    table = torch.from_numpy(rng.normal(size=(300, 8))).float()
    start = CodebookStart([(np.arange(100, 300), vectors)], noise=0.0)
    known = torch.arange(300) < 100
    rows = start(table, known, torch.arange(100, 300), torch.Generator().manual_seed(0)).double().numpy()
    centred = vectors - vectors.mean(0)
    values, directions = np.linalg.eigh(centred.T @ centred)
    kept = centred @ directions[:, np.argsort(values)[::-1][:8]]
    got = rows - table[:100].double().numpy().mean(0)
    gram, wanted = got @ got.T, kept @ kept.T
    np.testing.assert_allclose(gram / np.trace(gram), wanted / np.trace(wanted), atol=1e-5)


def test_a_level_without_vectors_and_equal_centroids():
    _, catalog = spelt()
    levels = catalog.require_tokens()
    start = CodebookStart.of(catalog, [np.ones((5, 12)), np.eye(4, 12)])  # of three levels; the first one's are equal
    model = tiny(vocab_size=300)
    new = [int(id) for ids in levels for id in ids]
    extend_embeddings(model, max(new) + 1, new, seed=3, start=start)
    table = model.get_input_embeddings().weight.detach()
    assert len({tuple(row.tolist()) for row in table[new]}) == len(new)
    old = table[:300]
    spread = [((table[ids.tolist()] - old.mean(0)) / old.std(0, correction=0)).std().item() for ids in levels]
    assert spread[0] < 0.02
    assert 0.7 < spread[1] < 1.4
    assert 0.05 < spread[2] < 0.2


def test_each_table_is_seeded():
    _, catalog = spelt()
    new = [int(id) for ids in catalog.require_tokens() for id in ids]
    books = [np.random.default_rng(level).normal(size=(size, 7)) for level, size in enumerate((5, 4, 6))]
    tables = []
    for seed in (1, 1, 2):
        model = tiny(vocab_size=300)
        extend_embeddings(model, max(new) + 1, new, seed, CodebookStart.of(catalog, books))
        tables.append(model.get_output_embeddings().weight.detach().clone())
    assert torch.equal(tables[0], tables[1])
    assert not torch.allclose(tables[0][new], tables[2][new], atol=1e-3)


def test_what_a_start_needs():
    tokenizer, catalog = spelt()
    assert isinstance(starts("mean", catalog), MeanStart)
    with pytest.raises(BackboneError, match="needs the items' texts"):
        starts("text", catalog)
    with pytest.raises(BackboneError, match="HashedCodes keeps none"):
        starts("codebook", catalog, quantizer=HashedCodes())
    with pytest.raises(BackboneError, match="'mode'"):
        starts("mode", catalog)
    with pytest.raises(BackboneError, match="39 texts for 40 items"):
        starts("text", catalog, ["x"] * 39, PlainText(tokenizer))
    with pytest.raises(BackboneError, match="4 codebooks for a catalog of 3"):
        CodebookStart.of(catalog, [np.zeros((4, 2))] * 4)
    with pytest.raises(BackboneError, match="Level 1 has 5 codebook vectors and 4 tokens"):
        CodebookStart.of(catalog, [np.zeros((5, 2))] * 2)
