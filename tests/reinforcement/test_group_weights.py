"""What items of a group count: inclusion by definition and by counting, and the gradient of the expected reward."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_grpo import Kept, descent, trainer_of
from tiny_rollouts import Reward, cases_of, mixed, policy, title_policy, weights

from llmrec.decoding import decode
from llmrec.exceptions import RecipeError
from llmrec.reinforcement.group_weights import log_inclusion, weighted_advantages
from llmrec.reinforcement.rollouts import TransformersRollouts
from llmrec.selection import Draw
from llmrec.trie_tensors import TrieTensors


@given(st.lists(st.floats(-60, 20), min_size=1, max_size=5), st.floats(-20, 20))
def test_inclusion_is_the_chance_of_a_gumbel_above_the_threshold(drawn, threshold):
    found = log_inclusion(np.array([drawn]), np.array([threshold]))[0]
    for own, value in zip(drawn, found.tolist(), strict=True):
        rate = math.exp(own - threshold)
        expected = math.log(-math.expm1(-rate)) if rate > 0 else own - threshold
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_far_below_the_threshold_inclusion_is_the_rate_and_without_one_certain():
    found = log_inclusion(np.array([[-1000.0, -800.0, 5000.0]]), np.array([0.0]))
    np.testing.assert_allclose(found, [[-1000.0, -800.0, 0.0]])
    assert log_inclusion(np.array([[-1000.0, 0.0]]), np.array([-np.inf])).tolist() == [[0.0, 0.0]]


def test_sums_over_drawn_items_divided_by_their_inclusion_are_unbiased():
    """A race of Gumbel variables by the textbook: every item is counted once on average, however rare it is."""
    rng = np.random.default_rng(0)
    chances = np.array([0.6, 0.25, 0.1, 0.03, 0.015, 0.005])
    race = np.log(chances) + rng.gumbel(size=(100_000, 6))
    order = np.argsort(-race, axis=1)
    members, threshold = order[:, :3], np.take_along_axis(race, order[:, 3:4], axis=1)[:, 0]
    counted = np.exp(-log_inclusion(np.log(chances)[members], threshold))
    for item in range(6):
        each = np.where(members == item, counted, 0.0).sum(axis=1)
        assert abs(each.mean() - 1) < 5 * each.std() / len(each) ** 0.5


def stepwise(recommender, prompt, temperature, legal):
    """The probability of each legal item to be the first drawn: by level, over the legal codes."""
    model, spelt = recommender.model, recommender.catalog.item_tokens
    found = np.zeros(len(spelt))
    for row in legal:
        chance = 1.0
        for level, token in enumerate(spelt[row].tolist()):
            inside = [other for other in legal if (spelt[other][:level] == spelt[row][:level]).all()]
            follows = sorted({int(spelt[other][level]) for other in inside})
            if token < 0:  # behind the end of a title comes nothing else
                assert follows == [-1]
                break
            with torch.no_grad():
                line = torch.tensor([[*prompt, *spelt[row][:level].tolist()]])
                logits = model(line, use_cache=False).logits[0, -1].double()
            chance *= float((logits[follows] / temperature).softmax(0)[follows.index(token)])
        found[row] = chance
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("make", [lambda: policy(num_items=8, sizes=(3, 4)), title_policy], ids=["codes", "titles"])
def test_what_the_search_says_of_its_draws_counts_every_item_once_on_average(make, temperature):
    recommender = make()
    trie = TrieTensors.of(recommender.catalog, "vocabulary")
    (prompt,) = cases_of(recommender, 1).prompts
    legal = [row for row in range(len(recommender.catalog)) if row != 6]
    draws = [Draw(temperature, seed) for seed in range(4000)]
    found = decode(recommender.model, [prompt] * 4000, trie, 4, [np.array([6])] * 4000, draws=draws)
    chances = stepwise(recommender, prompt, temperature, legal)
    assert chances.sum() == pytest.approx(1.0)
    items, drawn = found.items.numpy(), found.drawn.numpy()
    np.testing.assert_allclose(np.exp(drawn), chances[items], rtol=1e-4)
    perturbed = found.perturbed.numpy()
    assert (np.diff(perturbed, axis=1) <= 0).all()
    counted = np.exp(-log_inclusion(drawn[:, :3], perturbed[:, 3]))
    often = [row for row in legal if (items[:, :3] == row).sum() > 30]  # a rarer item is not met often enough to tell
    assert len(often) >= 6
    for row in often:
        each = np.where(items[:, :3] == row, counted, 0.0).sum(axis=1)
        assert abs(each.mean() - 1) < 5 * each.std() / len(each) ** 0.5


def test_a_search_without_draws_says_nothing_of_them_and_a_mixed_batch_of_its_own_alone():
    recommender = policy()
    trie = TrieTensors.of(recommender.catalog, "vocabulary")
    (prompt,) = cases_of(recommender, 1).prompts
    plain = decode(recommender.model, [prompt], trie, 4)
    assert plain.drawn is None
    assert plain.perturbed is None
    mixed_batch = decode(recommender.model, [prompt] * 2, trie, 4, draws=[None, Draw(1.0, 3)])
    alone = decode(recommender.model, [prompt], trie, 4, draws=[Draw(1.0, 3)])
    assert torch.isneginf(mixed_batch.drawn[0]).all()
    torch.testing.assert_close(mixed_batch.drawn[1:], alone.drawn, rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed_batch.perturbed[1:], alone.perturbed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [None, 0.7, 2.0], ids=["beams", "cold", "hot"])
def test_weights_are_the_policy_over_inclusion(temperature):
    recommender = policy(num_items=8, sizes=(3, 4))
    cases = cases_of(recommender, 5)
    cases.histories[1] = np.arange(5)  # what is left is the group
    how = {"temperature": temperature, "seed": 4}
    rollouts = TransformersRollouts(recommender.model, recommender.catalog, cases, 3, weighted=True, **how)
    plain = TransformersRollouts(recommender.model, recommender.catalog, cases, 3, **how).generate([4, 1], step=2)
    groups = rollouts.generate([4, 1], step=2)
    np.testing.assert_array_equal(groups.items, plain.items)
    assert groups.tokens == plain.tokens
    np.testing.assert_allclose(np.array(groups.logprobs), np.array(plain.logprobs), atol=1e-5)
    assert plain.weights is None
    np.testing.assert_allclose(groups.weights.sum(axis=1), 1.0)
    for group, case in enumerate([4, 1]):
        expected = np.exp(np.array(groups.logprobs).sum(axis=1))[3 * group : 3 * group + 3]
        if temperature is not None and case == 4:
            found = _drawn(recommender, cases, case, 4, temperature, rollouts)
            assert found.items[0, :3].tolist() == groups.items[group].tolist()
            rate = np.exp(found.drawn[0, :3].numpy() - float(found.perturbed[0, 3]))
            expected = expected / (1 - np.exp(-rate))
        np.testing.assert_allclose(groups.weights[group], expected / expected.sum(), rtol=1e-4)


def _drawn(recommender, cases, case, width, temperature, rollouts):
    from llmrec.reinforcement.rollouts import draw_seed

    trie = TrieTensors.of(recommender.catalog, "vocabulary")
    draw = Draw(temperature, draw_seed(rollouts.seed, 2, case))
    return decode(recommender.model, [cases.prompts[case]], trie, width, [cases.histories[case]], draws=[draw])


def expected_reward(model, recommender, cases, case, earned, rows):
    """E[R] over some items, whose probabilities are scaled up to 1."""
    scores, catalog = [], recommender.catalog
    for row in rows:
        own = catalog.tokens_of(row)
        logits = model(torch.tensor([[*cases.prompts[case], *own]]), use_cache=False).logits
        steps = logits[0, len(cases.prompts[case]) - 1 : -1].log_softmax(-1)
        scores.append(steps[torch.arange(len(own)), own].sum())
    return (torch.stack(scores).softmax(0) * torch.from_numpy(earned[rows]).float()).sum()


@pytest.mark.parametrize("kind", ["all items, drawn", "all items, beams", "the best four"])
@pytest.mark.parametrize("make", [lambda: policy(num_items=6, sizes=(2, 3)), title_policy], ids=["codes", "titles"])
def test_one_step_climbs_the_expected_reward(tmp_path, make, kind):
    """Of groups that hold every item the step is that of the exact gradient, and of beams that among themselves."""
    recommender = make()
    cases = cases_of(recommender, 3)
    everything = list(range(len(recommender.catalog)))
    size = 4 if kind == "the best four" else len(everything)
    plain, before = copy.deepcopy(recommender.model), weights(recommender.model)
    beams = TransformersRollouts(plain, recommender.catalog, cases, size, exclude_seen=False).generate(range(3))
    trainer = trainer_of(
        tmp_path,
        recommender,
        cases,
        [Reward("mixed", 2.0, mixed)],
        size=size,
        exclude_seen=False,
        draws_at=1.3 if "drawn" in kind else None,
        weighted=True,
        scale_rewards="none",
        loss_type="dr_grpo",  # divides by a constant, whatever an item's length is
        max_steps=1,
        max_grad_norm=0.0,
        optimizers=descent(recommender.model),
        per_device_train_batch_size=3 * size,
    )
    trainer.train()
    total = torch.zeros(())
    for case in range(3):
        earned = 2.0 * mixed(np.arange(len(recommender.catalog))[None], cases, np.array([case]))[0]
        rows = sorted(beams.items[case].tolist()) if kind == "the best four" else everything
        total = total + expected_reward(plain, recommender, cases, case, earned, rows) / 3
    slopes = torch.autograd.grad(total / recommender.catalog.num_levels, list(plain.parameters()), allow_unused=True)
    after, moved = dict(recommender.model.named_parameters()), 0.0
    for (name, _), slope in zip(plain.named_parameters(), slopes, strict=True):
        if slope is not None:
            change = (after[name].detach() - before[name]) / 0.1
            torch.testing.assert_close(change, slope, rtol=2e-3, atol=2e-5)
            moved = max(moved, float(slope.abs().max()))
    assert moved > 1e-2


def test_draws_estimate_the_gradient_the_better_the_larger_groups_are_and_unweighted_ones_do_not():
    recommender = policy(num_items=7, sizes=(2, 4))
    cases = cases_of(recommender, 1)
    everything = TransformersRollouts(
        recommender.model, recommender.catalog, cases, 7, weighted=True, exclude_seen=False
    ).generate([0])
    p = np.zeros(7)
    p[everything.items[0]] = everything.weights[0]
    earned = np.cos(np.arange(7.0))
    exact = p * (earned - (p * earned).sum())
    repeated = cases.select([0] * 3000)

    def off(found):
        """How far it is from the exact gradient, and how far at its best length."""
        best = found * (found @ exact) / (found @ found)
        return [float(np.abs(one - exact).sum() / np.abs(exact).sum()) for one in (found, best)]

    weighted, alike = [], []
    for size in (2, 4, 6):
        groups = TransformersRollouts(
            recommender.model, recommender.catalog, repeated, size, temperature=1.0, weighted=True, exclude_seen=False
        ).generate(range(3000))
        own = torch.from_numpy(earned[groups.items])
        equal = torch.full((3000, size), 1 / size, dtype=torch.float64)
        for errors, counts in ((weighted, torch.from_numpy(groups.weights)), (alike, equal)):
            found = np.zeros((3000, 7))
            np.put_along_axis(found, groups.items, weighted_advantages(own, counts, False).numpy() / size, axis=1)
            errors.append(off(found.mean(axis=0)))
    # What a group's weights are divided by is an estimate too, and a poor one of two items: as far off as alike.
    (two, _), (four, _), (six, _) = weighted
    assert two > four > six
    assert four < 0.2
    assert six < 0.05
    assert all(best > 0.3 for _, best in alike)  # not for its length alone


@pytest.mark.parametrize("draws_at", [None, 1.3], ids=["beams", "drawn"])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_the_trainer_learns_from_weighted_advantages_of_a_part_of_the_items(tmp_path, scale, draws_at):
    recommender = policy()
    cases = cases_of(recommender, 6)
    how = {"temperature": draws_at, "weighted": True}
    groups = TransformersRollouts(recommender.model, recommender.catalog, cases, 4, **how).generate(range(6))
    kept = Kept()
    trainer = trainer_of(
        tmp_path,
        recommender,
        cases,
        [Reward("mixed", 1.5, mixed)],
        callbacks=[kept],
        draws_at=draws_at,
        weighted=True,
        scale_rewards=scale,
        max_steps=1,
        beta=0.1,
        per_device_train_batch_size=6,
        steps_per_generation=4,  # dealt out in parts
    )
    kept.trainer = trainer
    trainer.train()
    earned = 1.5 * mixed(groups.items, cases, np.arange(6))
    against = earned - (groups.weights * earned).sum(axis=1, keepdims=True)
    if scale == "group":
        against = against / (np.sqrt((groups.weights * against**2).sum(axis=1, keepdims=True)) + 1e-4)
    wanted = {
        (tuple(cases.prompts[at // 4]), tuple(own)): float((4 * groups.weights * against).reshape(-1)[at])
        for at, own in enumerate(groups.tokens)
    }
    for inputs in kept.inputs[0]:
        for row in range(6):
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row] == 1]
            own = inputs["completion_ids"][row][inputs["completion_mask"][row] == 1]
            value = wanted.pop((tuple(prompt.tolist()), tuple(own.tolist())))
            assert float(inputs["advantages"][row]) == pytest.approx(value, abs=1e-4)
    assert not wanted


def test_equal_rewards_are_exactly_nothing_however_weights_are():
    weights_of = torch.softmax(8 * torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    for reward in (1 / 3, 5.3, 1e6):
        for scaled in (True, False):
            found = weighted_advantages(torch.full((50, 16), reward), weights_of, scaled)
            assert (found == 0).all()


def test_equal_weights_are_grpo_and_advantages_of_a_group_by_hand():
    earned = torch.tensor([[1.0, 0.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    equal = torch.full((2, 4), 0.25)
    torch.testing.assert_close(weighted_advantages(earned, equal, False), earned - earned.mean(1, keepdim=True))
    scaled = weighted_advantages(earned, equal, True)
    torch.testing.assert_close(scaled[0], (earned[0] - 1) / (earned[0].std(correction=0) + 1e-4))
    assert scaled[1].tolist() == [0.0] * 4
    by_hand = weighted_advantages(torch.tensor([[4.0, 0.0]]), torch.tensor([[0.25, 0.75]]), False)
    assert by_hand.tolist() == [[2 * 0.25 * 3.0, 2 * 0.75 * -1.0]]
    deviation = (0.25 * 9 + 0.75 * 1) ** 0.5
    found = weighted_advantages(torch.tensor([[4.0, 0.0]]), torch.tensor([[0.25, 0.75]]), True)
    torch.testing.assert_close(found, by_hand_of(deviation))


def by_hand_of(deviation):
    return torch.tensor([[1.5, -1.5]]) / (deviation + 1e-4)


@pytest.mark.parametrize(
    "how", [{"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}], ids=str
)
def test_what_cannot_be_weighted_is_refused(tmp_path, how):
    recommender = policy()
    given = (tmp_path, recommender, cases_of(recommender), [Reward("mixed", 1.0, mixed)])
    with pytest.raises(RecipeError, match="Weighted groups are compared each by itself"):
        trainer_of(*given, weighted=True, **how)
    trainer_of(*given, **how)
