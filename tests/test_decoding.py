"""Cached, batched, left-padded decoding against scoring every item of the catalog by hand."""

import numpy as np
import pytest
import torch
from factories import random_histories, random_recommender

from llmrec.beam import TrieTensors
from llmrec.decoding import decode, score_catalog
from llmrec.exceptions import RequestError


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
