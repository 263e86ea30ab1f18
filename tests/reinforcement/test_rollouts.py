import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_rollouts import cases_of, policy, title_policy

from llmrec.backbones.adapters import adapt
from llmrec.backbones.causal_lm import BackboneArguments
from llmrec.catalog import Catalog
from llmrec.exceptions import BackboneError, RecipeError
from llmrec.reinforcement.rollouts import Groups, TransformersRollouts, batches, draw_seed, evaluating


def rollouts_of(recommender, cases, size=4, **options):
    return TransformersRollouts(
        recommender.model, recommender.catalog, cases, size, softmax=recommender.settings.softmax, **options
    )


@torch.no_grad()
def by_hand(model, prompt, tokens, vocabulary):
    """The log-probability of each token, from the whole line run alone."""
    logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    chosen = logits[torch.arange(len(tokens)), tokens]
    return chosen - (logits if vocabulary is None else logits[:, vocabulary]).logsumexp(-1)


@pytest.mark.parametrize("temperature", [None, 1.5], ids=["beams", "draws"])
@pytest.mark.parametrize(
    "make",
    [policy, lambda: policy("semantic_ids", model_type="gpt2"), title_policy],
    ids=["vocabulary", "semantic_ids", "titles"],
)
def test_groups_are_legal_items_with_their_own_tokens_and_log_probabilities(make, temperature):
    recommender = make()
    catalog, cases = recommender.catalog, cases_of(recommender, 6)
    chosen = [4, 0, 5]
    groups = rollouts_of(recommender, cases, 5, temperature=temperature).generate(chosen)
    vocabulary = catalog.softmax_tokens(recommender.settings.softmax)
    assert groups.items.shape == (3, 5)
    assert groups.items.dtype == np.int64
    for case, rows in zip(chosen, groups.items.tolist(), strict=True):
        assert len(set(rows)) == 5
        assert not set(rows) & set(cases.histories[case].tolist())
    flat = groups.items.reshape(-1).tolist()
    assert groups.tokens == [catalog.tokens_of(row) for row in flat]
    for place, (tokens, found) in enumerate(zip(groups.tokens, groups.logprobs, strict=True)):
        expected = by_hand(recommender.model, cases.prompts[chosen[place // 5]], tokens, vocabulary)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    if make is title_policy:
        assert len({len(tokens) for tokens in groups.tokens}) > 1


def test_beams_are_the_best_of_the_catalog_and_draws_are_not():
    recommender = policy(num_items=12, sizes=(3, 4))
    cases = cases_of(recommender, 3)
    everything = rollouts_of(recommender, cases, 12, exclude_seen=False).generate([0, 1, 2])
    scores = np.array([sum(one) for one in everything.logprobs]).reshape(3, 12)
    np.testing.assert_array_equal(np.sort(everything.items, axis=1), np.tile(np.arange(12), (3, 1)))
    assert (np.diff(scores, axis=1) <= 0).all()
    drawn = rollouts_of(recommender, cases, 12, exclude_seen=False, temperature=2.0).generate([0, 1, 2])
    assert (drawn.items != everything.items).any()


def test_seen_items_are_left_out_as_serving_does_or_not():
    recommender = policy(num_items=12, sizes=(3, 4))
    cases = cases_of(recommender, 6)
    # With the whole rest of the catalog in a group, an item that is let back in must be there.
    assert cases.histories[0].size
    left = 12 - len(set(cases.histories[0].tolist()))
    without = rollouts_of(recommender, cases.select([0]), left).generate([0])
    assert not set(without.items[0].tolist()) & set(cases.histories[0].tolist())
    everything = rollouts_of(recommender, cases.select([0]), 12, exclude_seen=False).generate([0])
    assert sorted(everything.items[0].tolist()) == list(range(12))
    lists, _ = recommender.recommend_rows([cases.histories[0].tolist()], k=left, num_beams=left)
    assert without.items[0].tolist() == lists[0]


def test_draws_depend_on_seed_step_and_case_and_on_nothing_else():
    recommender = policy()
    cases = cases_of(recommender, 6)
    drawn = rollouts_of(recommender, cases, temperature=2.0, seed=7)
    whole = drawn.generate([0, 1, 2, 3, 4, 5], step=3)
    np.testing.assert_array_equal(drawn.generate([4, 1], step=3).items, whole.items[[4, 1]])
    small = rollouts_of(recommender, cases, temperature=2.0, seed=7, cached_tokens=1)
    np.testing.assert_array_equal(small.generate([0, 1, 2, 3, 4, 5], step=3).items, whole.items)
    assert (drawn.generate([0, 1, 2, 3, 4, 5], step=4).items != whole.items).any()
    assert (
        rollouts_of(recommender, cases, temperature=2.0, seed=8).generate([0, 1], 3).items != whole.items[:2]
    ).any()
    same_prompt = cases.select([0, 0, 0, 0])
    found = rollouts_of(recommender, same_prompt, temperature=2.0).generate([0, 1, 2, 3])
    assert len({tuple(row) for row in found.items.tolist()}) > 1
    beams = rollouts_of(recommender, same_prompt)
    np.testing.assert_array_equal(beams.generate([0, 1], 0).items, beams.generate([1, 0], 9).items)


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**31), st.integers(0, 2**31))
def test_seeds_of_draws_are_unsigned_and_differ_by_each_of_the_three(seed, step, case):
    found = draw_seed(seed, step, case)
    assert 0 <= found < 2**64
    assert found == draw_seed(seed % 2**64, step, case)
    assert len({found, draw_seed(seed + 1, step, case), draw_seed(seed, step + 1, case)}) == 3
    assert found != draw_seed(seed, step, case + 1)


def test_the_first_drawn_item_has_the_policys_own_frequencies():
    recommender = policy(num_items=6, sizes=(2, 3))
    cases = cases_of(recommender, 1)
    rollouts = rollouts_of(recommender, cases, 2, exclude_seen=False, temperature=1.0)
    first = np.bincount([rollouts.generate([0], step).items[0, 0] for step in range(400)], minlength=6)
    everything = rollouts_of(recommender, cases, 6, exclude_seen=False)
    # Over the legal continuations: the codes of the first level, then those of the second under the first.
    codes = recommender.catalog.codes
    (prompt,) = cases.prompts
    expected = np.zeros(6)
    for row in range(6):
        own = recommender.catalog.tokens_of(row)
        for level in range(2):
            alike = [other for other in range(6) if (codes[other, :level] == codes[row, :level]).all()]
            legal = sorted({recommender.catalog.tokens_of(other)[level] for other in alike})
            expected[row] += float(by_hand(recommender.model, prompt, own, legal)[level])
    expected = np.exp(expected)
    assert expected.sum() == pytest.approx(1.0, abs=1e-5)
    assert (abs(first / 400 - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 400) + 1e-3).all()
    assert sorted(everything.generate([0]).items[0].tolist()) == list(range(6))


def test_results_do_not_depend_on_how_prompts_are_batched():
    recommender = policy()
    cases = cases_of(recommender, 9, longest=6)
    chosen = [8, 3, 3, 0, 5]
    together = rollouts_of(recommender, cases).generate(chosen)
    alone = rollouts_of(recommender, cases, cached_tokens=1).generate(chosen)
    np.testing.assert_array_equal(together.items, alone.items)
    np.testing.assert_allclose(together.logprobs, alone.logprobs, atol=1e-5)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 20), st.integers(1, 300))
def test_batches_hold_every_prompt_once_within_the_bound(lengths, width, most):
    found = batches(lengths, width, most)
    assert sorted(place for places in found for place in places) == list(range(len(lengths)))
    for places in found:
        assert len(places) == 1 or len(places) * (max(lengths[place] for place in places) + width) <= most


def test_too_few_items_are_refused_and_said_whose():
    recommender = policy(num_items=12, sizes=(3, 4))
    cases = cases_of(recommender, 4)
    with pytest.raises(RecipeError, match=r"The catalog has 12 items to propose, and a group has 13\. Ask for"):
        rollouts_of(recommender, cases, 13)
    several = [len(set(history.tolist())) for history in cases.histories]
    longest, left = int(np.argmax(several)), 12 - max(several)
    rollouts_of(recommender, cases, left)
    with pytest.raises(RecipeError, match=rf"of case {longest} are {left} items to propose.*let seen items"):
        rollouts_of(recommender, cases, left + 1)
    rollouts_of(recommender, cases, 12, exclude_seen=False)
    with pytest.raises(RecipeError, match="A group has 1 item"):
        rollouts_of(recommender, cases, 1)
    for temperature in (0.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="temperature of draws"):
            rollouts_of(recommender, cases, 2, temperature=temperature)


def test_retired_items_count_as_none():
    recommender = policy(num_items=12, sizes=(3, 4))
    cases = cases_of(recommender, 2)
    catalog = recommender.catalog
    retired = Catalog(
        catalog.items, catalog.codes, catalog.codebook_sizes, token_ids=catalog.token_ids, retired=np.arange(12) < 3
    )
    found = TransformersRollouts(recommender.model, retired, cases, 9, exclude_seen=False).generate([0, 1])
    assert found.items.min() == 3
    with pytest.raises(RecipeError, match="has 9 items"):
        TransformersRollouts(recommender.model, retired, cases, 10, exclude_seen=False)


def test_scores_that_are_no_numbers_are_an_error():
    recommender = policy()
    rollouts = rollouts_of(recommender, cases_of(recommender))
    with torch.no_grad():
        recommender.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(BackboneError, match="scores are not numbers"):
        rollouts.generate([0])


def test_groups_refuse_what_is_no_group():
    catalog = policy().catalog
    levels = np.zeros((1, 3, 3))
    for items, said in (([[0, 1, 0]], "an item twice"), ([[0, 1, -1]], "lacks"), ([[0, 1, 40]], "lacks")):
        with pytest.raises(BackboneError, match=said):
            Groups.of(np.array(items), levels, catalog)
    assert len(Groups.of(np.array([[2, 1, 0]]), levels, catalog).tokens) == 3
    retired = Catalog(
        catalog.items, catalog.codes, catalog.codebook_sizes, token_ids=catalog.token_ids, retired=np.arange(40) == 1
    )
    with pytest.raises(BackboneError, match="a retired item"):
        Groups.of(np.array([[2, 1, 0]]), levels, retired)


def test_the_model_proposes_without_dropout_and_is_put_back_as_it_was():
    recommender = policy(model_type="gpt2")
    model = recommender.model
    cases = cases_of(recommender)
    rollouts = rollouts_of(recommender, cases)
    expected = rollouts.generate([0, 1, 2])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    model.gradient_checkpointing_enable()
    frozen = model.transformer.h[1]
    frozen.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    found = rollouts.generate([0, 1, 2])
    np.testing.assert_array_equal(found.items, expected.items)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-6)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.is_gradient_checkpointing
    assert not any(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ZeroDivisionError), evaluating(model):
        1 / model.training  # which is False there
    assert {name: module.training for name, module in model.named_modules()} == before


def test_an_adapters_policy_proposes_with_its_adapter():
    recommender = policy()
    cases = cases_of(recommender)
    plain = rollouts_of(recommender, cases).generate([0, 1, 2, 3])
    new = np.unique(recommender.catalog.item_tokens).tolist()
    adapted = adapt(BackboneArguments(backbone="none", method="lora", lora_rank=4), recommender.model, new)
    rollouts = TransformersRollouts(adapted, recommender.catalog, cases, 4)
    np.testing.assert_array_equal(rollouts.generate([0, 1, 2, 3]).items, plain.items)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    found = rollouts.generate([0, 1, 2, 3])
    assert (found.items != plain.items).any()
    expected = by_hand(adapted.eval(), cases.prompts[0], found.tokens[0], None)
    np.testing.assert_allclose(found.logprobs[0], expected.numpy(), atol=1e-5)
