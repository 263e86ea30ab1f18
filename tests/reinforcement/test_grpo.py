import copy
import json
import warnings

import numpy as np
import pytest
import torch
from tiny_rollouts import Reward, arguments, cases_of, exact, mixed, nothing, policy, same, title_policy, weights
from transformers import TrainerCallback

from llmrec.backbones.adapters import adapt
from llmrec.backbones.causal_lm import BackboneArguments
from llmrec.exceptions import RecipeError
from llmrec.reinforcement.cases import RolloutCases
from llmrec.reinforcement.grpo import ConstrainedGRPOTrainer, check_arguments
from llmrec.reinforcement.rollouts import TransformersRollouts


def trainer_of(folder, recommender, cases, rewards, *, size=4, model=None, reference=None, callbacks=(), **options):
    """A trainer; options of rollouts are `temperature`s of draws and `exclude_seen`, the others TRL's."""
    model = recommender.model if model is None else model
    ours = {
        name: options.pop(name) for name in ("draws_at", "exclude_seen", "weighted", "optimizers") if name in options
    }
    rollouts = TransformersRollouts(
        model,
        recommender.catalog,
        cases,
        size,
        softmax=recommender.settings.softmax,
        temperature=ours.get("draws_at"),
        exclude_seen=ours.get("exclude_seen", True),
        weighted=ours.get("weighted", False),
    )
    return ConstrainedGRPOTrainer(
        model,
        arguments(folder, num_generations=size, **options),
        rollouts,
        rewards,
        tokenizer=recommender.tokenizer,
        reference=reference,
        callbacks=callbacks,
        optimizers=ours.get("optimizers", (None, None)),
    )


def descent(model, rate=0.1):
    """Plain gradient descent, so that the change of weights is the gradient."""
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=rate)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def line_logprobs(model, prompt, own, vocabulary):
    logits = model(torch.tensor([[*prompt, *own]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = logits[torch.arange(len(own)), own]
    return chosen - (logits if vocabulary is None else logits[:, vocabulary]).logsumexp(-1)


def advantages_by_hand(earned, scaled):
    """(B, G) the rewards against their group."""
    against = earned - earned.mean(1, keepdims=True)
    return against / (earned.std(1, ddof=1, keepdims=True) + 1e-4) if scaled else against


class Kept(TrainerCallback):
    """Takes a copy of what a trainer learns from, when it has been made."""

    def __init__(self):
        self.trainer, self.inputs, self.lines = None, [], []

    def on_step_end(self, args, state, control, **_):
        self.inputs.append([{name: one[name].clone() for name in one} for one in self.trainer._buffered_inputs])

    def on_log(self, args, state, control, **kwargs):
        self.lines.append(dict(kwargs["logs"]))


KINDS = {
    "grpo": {"loss_type": "grpo", "use_bias_correction_kl": False},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "grpo-titles": {"loss_type": "grpo", "scale_rewards": "none"},
    "dr_grpo-titles": {"loss_type": "dr_grpo"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_descends_the_objective_by_hand(tmp_path, kind):
    """Advantages, sums over tokens and groups, and the divergence from another reference: all from definitions."""
    recommender = title_policy() if kind.endswith("titles") else policy("semantic_ids", model_type="gpt2")
    catalog, model = recommender.catalog, recommender.model
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    cases = cases_of(recommender, 6)
    reference = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    groups = TransformersRollouts(
        model, catalog, cases, 4, softmax=recommender.settings.softmax
    ).generate(range(6))  # fmt: skip
    before, plain, kept = weights(model), copy.deepcopy(model), Kept()
    trainer = trainer_of(
        tmp_path,
        recommender,
        cases,
        [Reward("mixed", 1.5, mixed), Reward("exact", 0.5, exact)],
        reference=reference,
        callbacks=[kept],
        beta=0.3,
        max_steps=1,
        max_grad_norm=0.0,
        optimizers=descent(model),
        per_device_train_batch_size=24,
        **KINDS[kind],
    )
    kept.trainer = trainer
    trainer.train()
    chosen = np.arange(6)
    earned = 1.5 * mixed(groups.items, cases, chosen) + 0.5 * exact(groups.items, cases, chosen)
    advantages = advantages_by_hand(earned, KINDS[kind].get("scale_rewards") != "none").reshape(-1)
    vocabulary = catalog.softmax_tokens(recommender.settings.softmax)
    each = []
    for place, own in enumerate(groups.tokens):
        prompt = cases.prompts[place // 4]
        found = line_logprobs(plain, prompt, own, vocabulary)
        ratio = (found - found.detach()).exp()
        if kind == "gspo":
            ratio = (found - found.detach()).mean().exp().expand(len(own))
        behind = line_logprobs(reference, prompt, own, vocabulary).detach() - found
        apart = behind.exp() - behind - 1
        if KINDS[kind].get("use_bias_correction_kl", True):
            apart = apart * ratio
        tokens = -advantages[place] * ratio + 0.3 * apart
        each.append(tokens.sum() / (catalog.num_levels if kind.startswith("dr_grpo") else len(own)))
    objective = torch.stack(each).mean()
    slopes = torch.autograd.grad(objective, list(plain.parameters()), allow_unused=True)
    after = dict(model.named_parameters())
    for (name, _), slope in zip(plain.named_parameters(), slopes, strict=True):
        expected = before[name] if slope is None else before[name] - 0.1 * slope
        torch.testing.assert_close(after[name].detach(), expected, rtol=0, atol=2e-5)
    # The same advantages, tokens and masks, in the order that TRL shuffled them to.
    (inputs,) = kept.inputs[0]
    by_item = {(tuple(cases.prompts[at // 4]), tuple(own)): advantages[at] for at, own in enumerate(groups.tokens)}
    for row in range(24):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row] == 1]
        own = inputs["completion_ids"][row][inputs["completion_mask"][row] == 1]
        wanted = by_item.pop((tuple(prompt.tolist()), tuple(own.tolist())))
        assert float(inputs["advantages"][row]) == pytest.approx(wanted, abs=1e-4)
    assert not by_item
    line = kept.lines[0]
    assert line["rewards/mixed/mean"] == pytest.approx(mixed(groups.items, cases, chosen).mean(), abs=1e-5)
    assert line["rewards/exact/mean"] == pytest.approx(exact(groups.items, cases, chosen).mean(), abs=1e-5)
    assert line["kl"] > 0
    assert line["entropy"] > 0


def two_items(targets=(1, 0)):
    """A catalog of two items, and two histories that each want another of them."""
    recommender = policy("semantic_ids", num_items=2, sizes=(2,), hidden_size=32)
    histories = [np.array([0]), np.array([1])]
    prompts = [recommender.encoder.encode(history.tolist()) for history in histories]
    targets = np.array(targets)
    return recommender, RolloutCases(prompts, histories, targets, [targets[:1], targets[1:]], np.arange(2))


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("draws_at", [None, 1.0], ids=["beams", "draws"])
def test_in_a_world_of_two_items_the_optimal_policy_is_reached(tmp_path, kind, draws_at):
    recommender, cases = two_items()
    trainer = trainer_of(
        tmp_path,
        recommender,
        cases,
        [Reward("exact", 1.0, exact)],
        size=2,
        exclude_seen=False,
        draws_at=draws_at,
        per_device_train_batch_size=4,
        max_steps=40,
        learning_rate=5e-3,
        **KINDS[kind],
    )
    trainer.train()
    groups = trainer._rollouts.generate([0, 1])
    found = {tuple(pair): score for pair, score in zip(_pairs(groups.items), groups.logprobs, strict=True)}
    assert np.exp(found[0, 1]) > 0.99
    assert np.exp(found[1, 0]) > 0.99
    assert trainer.state.log_history[0]["groups_without_signal"] == 0.0


def _pairs(items):
    return [(case, row) for case, rows in enumerate(items.tolist()) for row in rows]


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("reward", [nothing, lambda items, cases, chosen: 0.0 * items + 0.7], ids=["zero", "constant"])
def test_a_reward_that_tells_nothing_apart_changes_no_bit(tmp_path, reward, weighted):
    recommender = policy()
    before = weights(recommender.model)
    trainer = trainer_of(
        tmp_path,
        recommender,
        cases_of(recommender),
        [Reward("flat", 1.0, reward)],
        weight_decay=0.0,
        weighted=weighted,
        max_steps=3,
    )
    trainer.train()
    assert same(weights(recommender.model), before)
    assert [line["groups_without_signal"] for line in trainer.state.log_history[:3]] == [1.0] * 3
    trainer = trainer_of(tmp_path, recommender, cases_of(recommender), [Reward("mixed", 1.0, mixed)], max_steps=1)
    trainer.train()
    assert not same(weights(recommender.model), before)


def test_groups_without_signal_are_counted(tmp_path):
    recommender = policy()
    only = lambda items, cases, chosen: np.where(chosen[:, None] == 3, mixed(items, cases, chosen), 0.5)  # noqa: E731
    trainer = trainer_of(
        tmp_path,
        recommender,
        cases_of(recommender, 8),
        [Reward("only", 1.0, only), Reward("flat", 2.0, nothing)],
        per_device_train_batch_size=32,
        max_steps=1,
    )
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["groups_without_signal"] == pytest.approx(7 / 8)
    assert line["frac_reward_zero_std"] == pytest.approx(7 / 8)
    assert not any("clipped" in name or "terminated" in name for name in line)
    logged = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged[0]["rewards/only/mean"] == line["rewards/only/mean"]


class Stop(TrainerCallback):
    """Ends a training after a step, as an interruption would that came after its checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step == self.step


# Epochs of 2 steps (8 cases, 4 a step), or of 4, with groups that two steps, or two passes over them, share; stopped
# within the first epoch, at its end, and later.
RESUMED = {
    "plain": ({"per_device_train_batch_size": 16}, 5),
    "accumulated": ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, 2),
    "shared": ({"per_device_train_batch_size": 8, "steps_per_generation": 2}, 5),
    "passes": ({"per_device_train_batch_size": 16, "num_iterations": 2}, 1),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_an_interrupted_training_ends_with_the_weights_of_one_that_was_not(tmp_path, kind):
    sizes, stop = RESUMED[kind]

    def training(folder, callbacks=()):
        recommender = policy(model_type="gpt2")  # with dropout
        return trainer_of(
            folder,
            recommender,
            cases_of(recommender, 8),
            [Reward("mixed", 1.0, mixed)],
            draws_at=1.5,
            beta=0.05,
            max_steps=6,
            save_strategy="steps",
            save_steps=1,
            lr_scheduler_type="linear",
            callbacks=callbacks,
            **sizes,
        )

    whole = training(tmp_path / "whole")
    whole.train()
    stopped = training(tmp_path / "stopped", [Stop(stop)])
    stopped.train()
    assert not same(weights(stopped.model), weights(whole.model))
    resumed = training(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert same(weights(resumed.model), weights(whole.model))
    assert not list(tmp_path.glob("*/README.md"))


def test_epochs_have_orders_of_their_own(tmp_path):
    recommender = policy()
    orders, epoch = [], 0
    trainer = trainer_of(tmp_path, recommender, cases_of(recommender, 8), [Reward("mixed", 1.0, mixed)])
    sampler = trainer._get_train_sampler()
    for epoch in (0, 1, 0):
        trainer.state.epoch = float(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0][::4] != sorted(orders[0][::4])
    assert sorted(orders[0]) == sorted(list(range(8)) * 4)
    assert all(len(set(orders[0][at : at + 4])) == 1 for at in range(0, 32, 4))


@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["free", "held"])
def test_an_adapter_is_trained_and_the_model_below_it_is_the_reference(tmp_path, beta):
    recommender = policy()
    new = np.unique(recommender.catalog.item_tokens).tolist()
    torch.manual_seed(0)
    plain = copy.deepcopy(recommender.model)
    adapted = adapt(BackboneArguments(backbone="none", method="lora", lora_rank=4), recommender.model, new)
    frozen = {name: one.detach().clone() for name, one in adapted.named_parameters() if not one.requires_grad}
    cases = cases_of(recommender)
    trainer = trainer_of(
        tmp_path,
        recommender,
        cases,
        [Reward("mixed", 1.0, mixed)],
        model=adapted,
        beta=beta,
        max_steps=3,
        gradient_checkpointing=True,
    )
    trainer.train()
    after = dict(adapted.named_parameters())
    assert all(torch.equal(after[name], one) for name, one in frozen.items())
    assert list(adapted.peft_config) == ["default"]
    lines = trainer.state.log_history
    assert ("kl" in lines[0]) == bool(beta)
    if not beta:
        return
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[2]["kl"] > 1e-4
    tokens = torch.tensor([[3, 4, 5, 290, 295]])
    with torch.no_grad(), adapted.disable_adapter():
        torch.testing.assert_close(adapted.eval()(tokens).logits, plain(tokens).logits, rtol=0, atol=1e-5)
    with pytest.raises(RecipeError, match=r"adapter has been trained.*Merge the adapter"):
        trainer_of(tmp_path, recommender, cases, [Reward("mixed", 1.0, mixed)], model=adapted, beta=0.1)
    trainer_of(tmp_path, recommender, cases, [Reward("mixed", 1.0, mixed)], model=adapted, beta=0.1, reference=plain)


def test_the_reference_is_a_frozen_copy_of_where_training_begins(tmp_path):
    recommender = policy()
    before, kept = weights(recommender.model), Kept()
    trainer = trainer_of(
        tmp_path, recommender, cases_of(recommender), [Reward("mixed", 1.0, mixed)], beta=0.05, callbacks=[kept]
    )
    kept.trainer = trainer
    trainer.train()
    assert same(weights(trainer.ref_model), before)
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())
    assert not trainer.ref_model.training
    assert kept.lines[0]["kl"] == 0.0
    assert kept.lines[1]["kl"] > 0.0
    assert "forward" not in recommender.model.__dict__


def test_titles_of_all_lengths_are_learnt_to_their_ends(tmp_path):
    recommender = title_policy()
    cases, kept = cases_of(recommender, 8), Kept()
    lengths = np.array([len(recommender.catalog.tokens_of(row)) for row in range(30)])
    trainer = trainer_of(
        tmp_path,
        recommender,
        cases,
        # Longer than a title of one token that ends where its neighbour goes on: nothing may be cut.
        [Reward("long", 1.0, lambda items, cases, chosen: lengths[items] / 9)],
        callbacks=[kept],
        max_completion_length=1,
        max_steps=1,
    )
    kept.trainer = trainer
    trainer.train()
    (inputs,) = kept.inputs[0]
    found = {tuple(ids[mask == 1].tolist()) for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)}  # fmt: skip  # noqa: E501
    assert found <= {tuple(recommender.catalog.tokens_of(row)) for row in range(30)}
    assert len({len(one) for one in found}) > 1
    assert trainer.max_completion_length == recommender.catalog.num_levels == max(lengths)
    line = kept.lines[0]
    assert line["completions/max_length"] == max(len(one) for one in found)


def test_what_does_not_go_with_groups_of_items_is_refused(tmp_path):
    for name, value in {
        "loss_type": "dapo",
        "temperature": 0.7,
        "mask_truncated_completions": True,
        "cast_lm_head_to_fp32": True,
        "use_vllm": True,
        "sync_ref_model": True,
        "use_adaptive_entropy": True,
        "num_generations": 8,
    }.items():
        with pytest.raises(RecipeError, match=rf"{name} is .*does not go with groups of items"):
            check_arguments(arguments(tmp_path, **{name: value}), 4, 100)
    with pytest.raises(RecipeError, match="eval_strategy"):
        check_arguments(arguments(tmp_path, eval_strategy="steps", eval_steps=1), 4, 100)
    with pytest.raises(RecipeError, match="GSPO"):
        check_arguments(arguments(tmp_path, loss_type="dr_grpo", importance_sampling_level="sequence"), 4, 100)
    for name in ("dispatch_batches", "split_batches"):
        with pytest.raises(RecipeError, match=name):
            check_arguments(arguments(tmp_path, accelerator_config={name: True}), 4, 100)
    split = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, generation_batch_size=12)
    split.steps_per_generation = 3
    with pytest.raises(RecipeError, match=r"6 places at once.*no whole groups of 4"):
        check_arguments(split, 4, 100)
    with pytest.raises(RecipeError, match="A step asks 2 cases, and there are 1"):
        check_arguments(arguments(tmp_path), 4, 1)
    check_arguments(arguments(tmp_path), 4, 2)


def test_rewards_and_models_that_do_not_fit_are_refused(tmp_path):
    recommender = policy()
    cases = cases_of(recommender)
    rollouts = TransformersRollouts(recommender.model, recommender.catalog, cases, 4)
    given = (recommender.model, arguments(tmp_path), rollouts)
    for rewards, said in (([], "none"), ([Reward("one", 1.0, exact)] * 2, "one, one")):
        with pytest.raises(RecipeError, match=f"The rewards are {said}"):
            ConstrainedGRPOTrainer(*given, rewards, tokenizer=recommender.tokenizer)
    other = copy.deepcopy(recommender.model)
    with pytest.raises(RecipeError, match="another model"):
        ConstrainedGRPOTrainer(other, *given[1:], [Reward("one", 1.0, exact)], tokenizer=recommender.tokenizer)
    for function in (lambda items, cases, chosen: np.full(items.shape, np.nan), lambda items, cases, chosen: [1.0]):
        trainer = trainer_of(tmp_path, recommender, cases, [Reward("odd", 1.0, function)])
        with pytest.raises(RecipeError, match="The reward odd gave"):
            trainer.train()


def test_places_that_are_no_whole_groups_are_refused(tmp_path):
    recommender = policy()
    trainer = trainer_of(tmp_path, recommender, cases_of(recommender), [Reward("mixed", 1.0, mixed)])
    for places in (["1"] * 3, ["1", "1", "2", "1"], ["1", "1", "1", "2"] * 2):
        with pytest.raises(RecipeError, match="no whole groups of 4"):
            trainer._roll_out(places, trainer)
    found = trainer._roll_out(["1"] * 4 + ["0"] * 4, trainer)
    assert found["prompt_ids"] == [trainer._rollouts.cases.prompts[1]] * 4 + [trainer._rollouts.cases.prompts[0]] * 4


def test_no_warning_of_a_library_reaches_the_user(tmp_path):
    recommender = policy()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer_of(tmp_path, recommender, cases_of(recommender), [Reward("mixed", 1.0, mixed)], max_steps=1).train()
