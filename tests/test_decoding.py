"""Cached, batched, left-padded decoding against scoring every item of the catalog by hand."""

import numpy as np
import pytest
import torch
from factories import random_histories, random_recommender

from llmrec.beam import Draw, PrefixCap, TrieTensors
from llmrec.decoding import decode, score_catalog
from llmrec.exceptions import RequestError
from llmrec.trie import CatalogTrie


def tensors(recommender):
    return TrieTensors(recommender.catalog.trie, recommender.catalog.require_tokens())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_wide_search_is_brute_force(model_type, renormalize, seed):
    recommender = random_recommender(seed, model_type, num_items=30, sizes=(4, 3, 5))
    histories = [*random_histories(seed, 30, 4, 6), []]
    prompts = [recommender.encoder.encode(rows) for rows in histories]
    found = decode(recommender.model, prompts, tensors(recommender), 30, renormalize=renormalize)
    for row, prompt in enumerate(prompts):
        scores = score_catalog(recommender.model, prompt, tensors(recommender), renormalize)
        order = np.lexsort((recommender.catalog.trie.leaf_of_item, -scores.numpy()))
        assert found.items[row].tolist() == order.tolist()
        assert torch.allclose(found.scores[row], scores[order.copy()], atol=1e-9)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_batch_is_one_by_one(model_type):
    recommender = random_recommender(5, model_type, num_items=40)
    histories = random_histories(5, 40, 7, 6)
    prompts = [recommender.encoder.encode(rows) for rows in histories]
    excluded = [np.array(rows, dtype=np.int64) for rows in histories]
    together = decode(recommender.model, prompts, tensors(recommender), 6, excluded)
    for row, prompt in enumerate(prompts):
        alone = decode(recommender.model, [prompt], tensors(recommender), 6, [excluded[row]])
        assert alone.items[0].tolist() == together.items[row].tolist()
        assert torch.allclose(alone.scores[0], together.scores[row], atol=1e-10)


def test_narrow_beams_score_their_items_exactly():
    recommender = random_recommender(2, num_items=60, sizes=(8, 8, 8))
    prompt = recommender.encoder.encode([4, 5, 6])
    scores = score_catalog(recommender.model, prompt, tensors(recommender))
    found = decode(recommender.model, [prompt], tensors(recommender), 5)
    assert torch.allclose(found.scores[0], scores[found.items[0]], atol=1e-10)
    assert (found.scores[0].diff() <= 0).all()


def test_prompts_that_cannot_be_run():
    recommender = random_recommender(0, max_positions=16)
    trie = tensors(recommender)
    with pytest.raises(RequestError, match="no tokens"):
        decode(recommender.model, [[1], []], trie, 5)
    with pytest.raises(RequestError, match="16 positions"):
        decode(recommender.model, [[1] * 15], trie, 5)
    assert decode(recommender.model, [[1] * 14], trie, 5).items.shape == (1, 5)
    # An item's last token is not run, and a level without tokens takes no place.
    codes = recommender.catalog.codes
    shared = TrieTensors(CatalogTrie(codes, shared=True), recommender.catalog.require_tokens())
    assert decode(recommender.model, [[1] * 14], shared, 5).items.equal(
        decode(recommender.model, [[1] * 14], trie, 5).items
    )
    with pytest.raises(RequestError, match="15 tokens and 3 of an item exceed"):
        decode(recommender.model, [[1] * 15, [1]], [shared, trie.subset([1])], 5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_prompts_with_options_of_their_own_are_brute_force(model_type):
    recommender = random_recommender(7, model_type, num_items=30, sizes=(4, 3, 5))
    whole = tensors(recommender)
    parts = [whole, whole.subset([3, 4, 5, 6, 20, 29]), whole.subset([]), whole, whole.subset(range(0, 30, 2)), whole]
    renormalize = [False, True, False, True, True, True]
    prompts = [recommender.encoder.encode(rows) for rows in [*random_histories(7, 30, 4, 6), [], [1, 2]]]
    excluded = [[1, 2], [3], [0], [], [4, 6, 7], list(range(10))]
    draws = [None, None, None, None, None, Draw(1.5, 3)]
    found = decode(recommender.model, prompts, parts, 30, excluded, renormalize, None, draws)
    for row, prompt in enumerate(prompts):
        part = parts[row].subset(np.setdiff1d(np.arange(30), excluded[row]))
        scores = score_catalog(recommender.model, prompt, part, renormalize[row])
        order = np.lexsort((recommender.catalog.trie.leaf_of_item, -scores.numpy()))[: part.num_leaves]
        own = found.items[row][: len(order)]
        assert (sorted(own.tolist()) if draws[row] else own.tolist()) == (
            sorted(order.tolist()) if draws[row] else order.tolist()
        )
        assert torch.allclose(found.scores[row, : len(order)], scores[own], atol=1e-9)
        assert torch.allclose(found.levels[row].sum(-1)[: len(order)], scores[own], atol=1e-9)
        assert (found.items[row, len(order) :] == -1).all()
    # The levels are those of the model's own forward pass.
    item = int(found.items[0, 0])
    tokens = recommender.catalog.tokens_of(item)
    with torch.no_grad():
        logits = recommender.model(torch.tensor([[*prompts[0], *tokens]])).logits[0].log_softmax(-1)
    levels = [float(logits[len(prompts[0]) - 1 + level, token]) for level, token in enumerate(tokens)]
    assert found.levels[0, 0].tolist() == pytest.approx(levels, abs=1e-9)


def test_a_cap_keeps_the_best_of_every_branch():
    recommender = random_recommender(8, num_items=40, sizes=(3, 4, 6))
    trie, codes = tensors(recommender), recommender.catalog.codes
    prompt = recommender.encoder.encode([1, 2])
    order = score_catalog(recommender.model, prompt, trie).argsort(descending=True, stable=True).tolist()
    # Of all items, a cap on the two levels above the last keeps the best ones that begin alike: it cuts no prefix.
    expected = []
    for row in order:
        expected += [row] if sum((codes[row, :2] == codes[kept, :2]).all() for kept in expected) < 2 else []
    found = decode(recommender.model, [prompt, prompt], trie, 40, caps=[PrefixCap(2, 2), None])
    assert found.items[0].tolist() == expected + [-1] * (40 - len(expected))
    assert found.items[1].tolist() == order
    assert len(expected) < 40


@pytest.mark.parametrize("renormalize", [False, True])
def test_items_of_one_code_and_codes_of_one_item_are_brute_force(renormalize):
    recommender = random_recommender(9, num_items=24, sizes=(4, 3, 5))
    tokens, rng = recommender.catalog.require_tokens(), np.random.default_rng(9)
    codes = recommender.catalog.codes
    prompt = recommender.encoder.encode([3, 1])
    twins = codes[rng.integers(0, 12, 24)]
    shared = TrieTensors(CatalogTrie(twins, shared=True), tokens)
    scores = score_catalog(recommender.model, prompt, shared, renormalize)
    alone = score_catalog(
        recommender.model, prompt, TrieTensors(CatalogTrie(np.unique(twins, axis=0)), tokens), renormalize
    )
    of_code = {tuple(code): float(score) for code, score in zip(np.unique(twins, axis=0).tolist(), alone, strict=True)}
    assert scores.tolist() == [of_code[tuple(code)] for code in twins.tolist()]
    found = decode(recommender.model, [prompt], shared, 24, renormalize=renormalize)
    order = np.lexsort((np.arange(24), -scores.numpy()))
    assert found.items[0].tolist() == order.tolist()
    assert torch.allclose(found.scores[0], scores[order.copy()], atol=1e-9)

    rows = rng.integers(0, 8, 24)
    several = TrieTensors(CatalogTrie(codes), tokens, rows=rows)
    scores = score_catalog(recommender.model, prompt, several, renormalize)
    each = score_catalog(recommender.model, prompt, tensors(recommender), renormalize).numpy()
    assert scores.tolist() == [max(each[rows == row], default=-np.inf) for row in range(rows.max() + 1)]
    found = decode(recommender.model, [prompt], several, 24, renormalize=renormalize)
    live = np.unique(rows)
    order = live[np.argsort(-scores[live].numpy(), kind="stable")]
    assert found.items[0, : len(order)].tolist() == order.tolist()
    assert (found.items[0, len(order) :] == -1).all()
    assert torch.allclose(found.scores[0, : len(order)], scores[order], atol=1e-9)
