"""Items' log-probabilities with gradients, against the sum over each item run by itself."""

import numpy as np
import pytest
import torch
from factories import random_catalog, random_recommender
from item_scores import by_hand
from tiny_backbones import FAMILIES, arguments_for, new_ids, write_checkpoint

from llmrec.backbones.adapters import adapt
from llmrec.backbones.causal_lm import from_checkpoint, load_tokenizer
from llmrec.decoding import score_catalog
from llmrec.exceptions import BackboneError, CatalogError
from llmrec.reinforcement.item_logprobs import ItemLogProbs
from llmrec.title_spelling import title_catalog
from llmrec.trie_tensors import TrieTensors
from llmrec.vocabulary import add_catalog_tokens


def prompts_of(catalog, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [[1, *catalog.tokens_of_rows(rng.integers(0, len(catalog), length))] for length in lengths]


def gradients(model, value):
    model.zero_grad()
    value.sum().backward()
    return torch.cat([one.grad.reshape(-1) for one in model.parameters() if one.grad is not None])


@pytest.mark.parametrize("softmax", ["vocabulary", "semantic_ids"])
@pytest.mark.parametrize("layout", ["repeated", "branches", "auto"])
def test_values_and_gradients_are_those_of_items_run_alone(layout, softmax):
    recommender = random_recommender(3)
    model, catalog = recommender.model, recommender.catalog
    prompts = prompts_of(catalog, [4, 0, 1, 6])
    items = np.random.default_rng(1).integers(0, 40, (4, 5))  # also an item twice, which nothing forbids
    scored = ItemLogProbs(model, catalog, softmax, layout)
    found = scored(model, scored.batch(prompts, items))
    expected = by_hand(model, prompts, items, catalog, softmax)
    assert found.dtype == torch.float64
    assert scored.layout == ("branches" if layout == "auto" else layout)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one = gradients(model, found * weights)
    other = gradients(model, by_hand(model, prompts, items, catalog, softmax) * weights)
    # The model's own norms are computed in float32.
    assert (one - other).norm() < 1e-5 * other.norm()


def test_they_are_the_scores_that_the_recommender_ranks_by():
    recommender = random_recommender(4)
    prompt = recommender.encoder.encode([3, 9, 27])
    scored = ItemLogProbs(recommender.model, recommender.catalog)
    with torch.no_grad():
        found = scored(recommender.model, scored.batch([prompt], np.arange(40)[None]))[0]
    expected = score_catalog(recommender.model, prompt, TrieTensors.of(recommender.catalog, "vocabulary", "cpu"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", ["repeated", "branches"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families(tmp_path, family, layout):
    arguments = arguments_for(write_checkpoint(family, tmp_path / "checkpoint"), "full")
    tokenizer = load_tokenizer(arguments)
    catalog = add_catalog_tokens(tokenizer, random_catalog())
    model, _ = from_checkpoint(arguments, tokenizer, new_ids(catalog), seed=0)
    model = model.double().eval()
    prompts, items = prompts_of(catalog, [2, 5]), np.array([[0, 1, 2], [7, 8, 39]])
    scored = ItemLogProbs(model, catalog, layout="auto" if layout == "branches" else layout)
    assert scored.layout == ("repeated" if family == "mistral" else layout)  # whose attention has a window
    with torch.no_grad():
        found = scored(model, scored.batch(prompts, items))
        torch.testing.assert_close(found, by_hand(model, prompts, items, catalog), rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", ["repeated", "branches"])
def test_titles_of_different_lengths(tmp_path, layout):
    arguments = arguments_for(write_checkpoint("llama", tmp_path / "checkpoint"), "full")
    tokenizer = load_tokenizer(arguments)
    items = [{"item_id": str(row), "title": "very " * (row % 4) + f"good {row}"} for row in range(8)]
    catalog = title_catalog(items, tokenizer, 32)
    model = from_checkpoint(arguments, tokenizer, [], 0, None)[0].double().eval()
    prompts, chosen = prompts_of(catalog, [1, 2]), np.array([[0, 4, 3], [7, 5, 0]])
    scored = ItemLogProbs(model, catalog, layout=layout)
    found = scored(model, scored.batch(prompts, chosen))
    torch.testing.assert_close(found, by_hand(model, prompts, chosen, catalog), rtol=0, atol=1e-9)
    with pytest.raises(CatalogError, match="titles"):
        ItemLogProbs(model, catalog, "semantic_ids")


def test_one_level_and_one_item():
    recommender = random_recommender(5, sizes=(40,))
    catalog = recommender.catalog
    prompts, items = prompts_of(catalog, [3, 1]), np.array([[4], [5]])
    for layout in ("repeated", "branches"):
        scored = ItemLogProbs(recommender.model, catalog, layout=layout)
        with torch.no_grad():
            found = scored(recommender.model, scored.batch(prompts, items))
            torch.testing.assert_close(found, by_hand(recommender.model, prompts, items, catalog), rtol=0, atol=1e-9)


def test_eager_attention_and_adapters(tmp_path):
    arguments = arguments_for(write_checkpoint("llama", tmp_path / "checkpoint"), "lora")
    tokenizer = load_tokenizer(arguments)
    catalog = add_catalog_tokens(tokenizer, random_catalog())
    model, rows = from_checkpoint(arguments, tokenizer, new_ids(catalog), seed=0)
    model.set_attn_implementation("eager")
    model = adapt(arguments, model, rows).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2)
        prompts, items = prompts_of(catalog, [3, 1]), np.array([[4, 8], [5, 0]])
        scored = ItemLogProbs(model, catalog)
        assert scored.layout == "branches"
        found = scored(model, scored.batch(prompts, items))
        # The eager attention's softmax is computed in float32.
        torch.testing.assert_close(found, by_hand(model, prompts, items, catalog), rtol=0, atol=1e-5)


def test_a_model_that_ignores_the_mask_is_given_each_item_alone():
    recommender = random_recommender(6)
    model = recommender.model
    own = model.forward

    def forward(attention_mask=None, **given):
        return own(attention_mask=attention_mask if attention_mask.dim() == 2 else None, **given)

    model.forward = forward
    scored = ItemLogProbs(model, recommender.catalog)
    assert scored.layout == "repeated"
    assert "look at one another" in scored.reason


def test_layouts_that_cannot_be():
    recommender = random_recommender(7)
    with pytest.raises(BackboneError, match="'folded'"):
        ItemLogProbs(recommender.model, recommender.catalog, layout="folded")
    recommender.model.config._attn_implementation = "flash_attention_2"
    assert ItemLogProbs(recommender.model, recommender.catalog).layout == "repeated"
    with pytest.raises(BackboneError, match="flash_attention_2 takes no mask"):
        ItemLogProbs(recommender.model, recommender.catalog, layout="branches")
