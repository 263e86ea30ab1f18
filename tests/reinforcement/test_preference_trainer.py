"""PreferenceTrainer: its loss and gradient by definition, known optima, adapters, resuming, processes."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import random_recommender
from item_scores import by_hand
from peft import LoraConfig, get_peft_model
from rl_logs import cases_of
from transformers import TrainerCallback, TrainingArguments

from llmrec.exceptions import BackboneError, PromptError, RecipeError
from llmrec.reinforcement.item_logprobs import ItemLogProbs
from llmrec.reinforcement.preference_loss import preference_loss
from llmrec.reinforcement.preference_trainer import PreferenceTrainer
from llmrec.reinforcement.preferences import PreferenceCases, uniform_negatives
from llmrec.script import leave_processes
from llmrec.training.curve import read_log
from llmrec.training.ranking import RankingCallback


def arguments(folder, **options):
    usual = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **(usual | options))


def preferences_of(recommender, count=8, negatives=3, seed=0):
    """Random histories, targets and negatives."""
    rng = np.random.default_rng(seed)
    size = len(recommender.catalog)
    histories = [rng.integers(0, size, rng.integers(0, 5)).tolist() for _ in range(count)]
    prompts = [recommender.encoder.encode(history) for history in histories]
    cases = cases_of(rng.integers(0, size, count).tolist(), histories, prompts=prompts)
    return PreferenceCases(cases, uniform_negatives(cases, ~recommender.catalog.retired, negatives, seed))


def made(folder, recommender, preferences, valid=None, model=None, keep=(), **options):
    own = {name: options.pop(name) for name in keep}
    return PreferenceTrainer(
        model or recommender.model,
        arguments(folder, **options),
        preferences,
        valid,
        catalog=recommender.catalog,
        **own,
    )


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def flat(model):
    return torch.cat([one.detach().reshape(-1) for one in model.parameters()])


@pytest.mark.parametrize("softmax", ["vocabulary", "semantic_ids"])
@pytest.mark.parametrize("layout", ["branches", "repeated"])
def test_a_step_follows_the_gradient_of_the_definition(tmp_path, layout, softmax):
    recommender = random_recommender(1)
    start, catalog = copy.deepcopy(recommender.model), recommender.catalog
    preferences = preferences_of(recommender, 6)
    trainer = made(
        *(tmp_path, recommender, preferences),
        keep=["beta", "layout", "softmax"],
        beta=0.5,
        layout=layout,
        softmax=softmax,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
    )
    trainer.train()
    expected, losses = copy.deepcopy(start), []
    prompts, items = preferences.cases.prompts, preferences.items
    with torch.no_grad():
        reference = by_hand(start, prompts, items, catalog, softmax)
    torch.testing.assert_close(torch.from_numpy(trainer.train_dataset.reference), reference, rtol=0, atol=1e-9)
    for _ in range(2):  # all six cases are one step, in whatever order
        expected.zero_grad()
        loss = preference_loss(by_hand(expected, prompts, items, catalog, softmax), reference, 0.5).mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter -= 0.1 * parameter.grad
    assert losses[0] == pytest.approx(math.log(4))
    assert losses[1] < losses[0] - 1e-3
    assert logged(trainer) == pytest.approx(losses, abs=1e-6)
    moved = flat(expected) - flat(start)
    assert (flat(recommender.model) - flat(start) - moved).norm() < 1e-5 * moved.norm()


def test_what_is_logged_at_the_start_and_later(tmp_path):
    recommender = random_recommender(2)
    trainer = made(tmp_path, recommender, preferences_of(recommender), max_steps=12, per_device_train_batch_size=8)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[11]
    assert first["loss"] == pytest.approx(math.log(4), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl"):
        assert first[name] == pytest.approx(0, abs=1e-9)
    assert last["loss"] < first["loss"]
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    assert last["rewards/margins"] > 0.1
    assert last["rewards/accuracies"] == 1
    assert last["kl"] > 1e-3
    lines = read_log(tmp_path / "log.jsonl")
    assert lines[0]["rewards/margins"] == first["rewards/margins"]
    assert sum("loss" in line for line in lines) == 12


def test_means_are_over_all_cases_since_the_last_log(tmp_path):
    recommender = random_recommender(2)
    preferences = preferences_of(recommender, 7)
    options = {"max_steps": 6, "per_device_train_batch_size": 3, "optim": "sgd", "learning_rate": 0.0}
    every = made(tmp_path / "1", recommender, preferences, **options)
    # A policy that is not its reference, and does not move.
    shifted = np.random.default_rng(0).normal(size=every.train_dataset.reference.shape)
    every.train_dataset.reference = every.train_dataset.reference + shifted
    every.train()
    seldom = made(tmp_path / "2", recommender, preferences, logging_steps=3, **options)
    seldom.train_dataset.reference = every.train_dataset.reference
    seldom.train()
    for name in ("rewards/chosen", "rewards/accuracies", "kl"):
        each = logged(every, name)
        for place in range(2):  # an epoch: batches of 3, 3 and 1
            expected = np.average(each[3 * place : 3 * place + 3], weights=[3, 3, 1])
            assert logged(seldom, name)[place] == pytest.approx(expected, abs=1e-6)
    assert logged(every, "rewards/chosen")[0] != 0


@pytest.mark.parametrize("share", [3, 1])
def test_the_known_optimum_of_a_two_item_world(tmp_path, share):
    """One prompt, two items; the first is preferred in `share` of `share` + 1 cases. DPO's optimum is known:
    β (Δ_first - Δ_second) = log(share)."""
    recommender = random_recommender(3, num_items=2, sizes=(2, 2), hidden_size=16)
    prompt = recommender.encoder.encode([0])
    targets = [0] * share + [1]
    cases = cases_of(targets, prompts=[prompt] * len(targets))
    preferences = PreferenceCases(cases, 1 - cases.targets[:, None])
    start = _scores(recommender)
    trainer = made(
        *(tmp_path, recommender, preferences),
        keep=["beta"],
        beta=0.8,
        max_steps=80,
        per_device_train_batch_size=share + 1,
        learning_rate=0.01,
    )
    trainer.train()
    found = _scores(recommender)
    gap = (found[0] - found[1]) - (start[0] - start[1])
    assert 0.8 * gap == pytest.approx(math.log(share), abs=0.02)
    chance = share / (share + 1)
    entropy = -chance * math.log(chance) - (1 - chance) * math.log(1 - chance)
    assert logged(trainer)[-1] == pytest.approx(entropy, abs=1e-3)


def _scores(recommender):
    rows, scores = recommender.recommend_rows([[0]], k=2, exclude_seen=False)
    return dict(zip(rows[0], scores[0], strict=True))


def test_what_users_took_gets_recommended(tmp_path):
    """Two items, two histories, each with its own favourite: the other one than the model began with."""
    recommender = random_recommender(4, num_items=2, sizes=(2, 2), hidden_size=16)
    histories = [[0], [1]]
    before, _ = recommender.recommend_rows(histories, k=1, exclude_seen=False)
    targets = [1 - ranked[0] for ranked in before]
    prompts = [recommender.encoder.encode(history) for history in histories]
    cases = cases_of(targets, histories, prompts=prompts)
    preferences = PreferenceCases(cases, 1 - cases.targets[:, None])
    made(tmp_path, recommender, preferences, max_steps=60, learning_rate=0.01).train()
    after, _ = recommender.recommend_rows(histories, k=1, exclude_seen=False)
    assert [ranked[0] for ranked in after] == targets


def adapted(recommender, dropout=0.0, strength=0.0):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(recommender.model), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 1.0).mul_(strength)
    return model


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_of_an_adapted_model_the_reference_is_its_base(tmp_path, strength):
    recommender = random_recommender(5)
    model = adapted(recommender, strength=strength)
    preferences = preferences_of(recommender)
    trainer = made(
        tmp_path,
        recommender,
        preferences,
        model=model,
        max_steps=3,
        per_device_train_batch_size=8,
        keep=["beta"],
        beta=1.0,
    )
    prompts, items = preferences.cases.prompts, preferences.items
    with torch.no_grad():
        base = by_hand(recommender.model, prompts, items, recommender.catalog)
        own = by_hand(model, prompts, items, recommender.catalog)
    reference = torch.from_numpy(trainer.train_dataset.reference)
    torch.testing.assert_close(reference, base, rtol=0, atol=1e-9)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(preference_loss(own, base, 1.0).mean().item(), abs=1e-6)
    assert (abs(logged(trainer)[0] - math.log(4)) > 1e-3) == bool(strength)
    assert logged(trainer)[-1] < logged(trainer)[0]
    with torch.no_grad(), model.disable_adapter():  # of which nothing was trained
        torch.testing.assert_close(by_hand(model, prompts, items, recommender.catalog), base, rtol=0, atol=1e-9)


def test_nothing_is_dropped_out(tmp_path):
    recommender = random_recommender(6)
    recommender.model.config.attention_dropout = 0.0
    for layer in recommender.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = adapted(recommender, dropout=0.5, strength=0.0)
    trainer = made(tmp_path, recommender, preferences_of(recommender), model=model, max_steps=3, learning_rate=0.0)
    trainer.train()
    assert logged(trainer) == pytest.approx([math.log(4)] * 3, abs=1e-6)


def test_dropout_of_gpt2(tmp_path):
    recommender = random_recommender(6, "gpt2")
    for module in recommender.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.4
    trainer = made(tmp_path, recommender, preferences_of(recommender), max_steps=2, learning_rate=0.0)
    trainer.train()
    assert logged(trainer) == pytest.approx([math.log(4)] * 2, abs=1e-6)


def test_half_precision_begins_at_the_reference_too(tmp_path):
    recommender = random_recommender(7, dtype=torch.float32)
    preferences = preferences_of(recommender)
    scored = ItemLogProbs(recommender.model, recommender.catalog)
    batch = scored.batch(preferences.cases.prompts, preferences.items)
    with torch.no_grad():
        exact = scored(recommender.model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = scored(recommender.model, batch)
    trainer = made(tmp_path, recommender, preferences, max_steps=1, bf16=True, per_device_train_batch_size=8)
    found = torch.from_numpy(trainer.train_dataset.reference)
    assert (found - exact).abs().mean() > 3e-3
    assert (found - rounded).abs().mean() < 0.2 * (found - exact).abs().mean()
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(4), abs=2e-3)


class Once(TrainerCallback):
    """Saves at a step and ends there."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            control.should_save = control.should_training_stop = True


def test_a_resumed_training_is_the_same(tmp_path):
    recommender = random_recommender(8, dtype=torch.float32)
    preferences = preferences_of(recommender, 9)
    start = copy.deepcopy(recommender.model)
    options = {"max_steps": 7, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    whole = made(tmp_path / "whole", recommender, preferences, model=copy.deepcopy(start), **options)
    whole.train()
    part = made(
        tmp_path / "part", recommender, preferences, model=copy.deepcopy(start), callbacks=[Once()],
        keep=["callbacks"], **options,
    )  # fmt: skip
    part.train()
    assert (tmp_path / "part" / "checkpoint-3" / "manifest.json").is_file()
    again = made(tmp_path / "part", recommender, preferences, model=copy.deepcopy(start), **options)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(flat(again.model), flat(whole.model))
    assert not torch.equal(flat(again.model), flat(start))
    assert np.array_equal(again.train_dataset.reference, whole.train_dataset.reference)
    both = [
        [
            {name: value for name, value in line.items() if name != "epoch"}
            for line in read_log(folder)
            if "loss" in line
        ]
        for folder in (tmp_path / "whole" / "log.jsonl", tmp_path / "part" / "log.jsonl")
    ]
    assert both[0] == both[1]


def test_evaluations_are_exact_and_rank(tmp_path):
    recommender = random_recommender(9)
    valid = preferences_of(recommender, 7, seed=5)
    ranked = RankingCallback(lambda model: lambda users, k: [[3, 1, 2]] * len(users), np.array([1, 9]))
    trainer = made(
        *(tmp_path, recommender, preferences_of(recommender), valid),
        keep=["callbacks", "beta"],
        callbacks=[ranked],
        beta=0.5,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=1e-2,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(4), abs=1e-9)
    trainer.train()
    found = trainer.evaluate()
    with torch.no_grad():
        own = by_hand(recommender.model, valid.cases.prompts, valid.items, recommender.catalog)
    reference = torch.from_numpy(trainer.eval_dataset.reference)
    assert found["eval_loss"] == pytest.approx(preference_loss(own, reference, 0.5).mean().item(), abs=1e-6)
    gains = 0.5 * (own - reference)
    assert found["eval_rewards/margins"] == pytest.approx((gains[:, 0] - gains[:, 1:].mean(1)).mean().item(), abs=1e-6)
    assert abs(found["eval_rewards/margins"]) > 1e-3
    assert found["eval_HR@10"] == 0.5
    evaluated = [line for line in read_log(tmp_path / "log.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in evaluated[-3:]] == [2, 4, 4]
    assert all("eval_NDCG@10" in line for line in evaluated[-3:])


def test_what_cannot_be_trained(tmp_path):
    recommender = random_recommender(10, max_positions=16)
    preferences = preferences_of(recommender)
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(RecipeError, match="beta is"):
            made(tmp_path, recommender, preferences, keep=["beta"], beta=beta)
    long = cases_of([1], prompts=[[1] * 14])
    with pytest.raises(PromptError, match="14 tokens and 3 of an item exceed the model's 16"):
        made(tmp_path, recommender, PreferenceCases(long, np.array([[2]])))
    fits = PreferenceCases(cases_of([1], prompts=[[1] * 13]), np.array([[2]]))
    with pytest.raises(PromptError, match="14 tokens"):
        made(tmp_path, recommender, fits, PreferenceCases(long, np.array([[2]])))
    made(tmp_path, recommender, fits).train()
    with pytest.raises(BackboneError, match="label_smoothing"):
        made(tmp_path, recommender, preferences, label_smoothing_factor=0.1)
    with pytest.raises(RecipeError, match="held-out"):
        made(tmp_path, recommender, fits).evaluate()
    with torch.no_grad():
        recommender.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(BackboneError, match="no numbers"):
        made(tmp_path, recommender, fits)


def distributed_run(folder, processes):
    """What a training of 8 cases a step logs, with an uneven validation set."""
    recommender = random_recommender(11, dtype=torch.float32)
    trainer = made(
        *(folder, recommender, preferences_of(recommender, 24), preferences_of(recommender, 7, seed=3)),
        per_device_train_batch_size=8 // processes,
        learning_rate=1e-2,
        optim="sgd",
        max_steps=6,
        eval_strategy="steps",
        eval_steps=3,
        ddp_backend="gloo" if processes > 1 else None,
    )
    trainer.train()
    names = ("loss", "rewards/margins", "kl", "eval_loss", "eval_kl")
    reference = {"reference": trainer.train_dataset.reference.reshape(-1).tolist()}
    return {name: logged(trainer, name) for name in names} | reference


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(tmp_path)]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | path
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = distributed_run(tmp_path / "alone", 1)
    for process in range(2):
        found = json.loads((tmp_path / f"{process}.json").read_text())
        for name, values in alone.items():
            assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-5), name
    assert len(alone["eval_loss"]) == 2


if __name__ == "__main__":
    base, rank = Path(sys.argv[1]), os.environ["RANK"]
    (base / f"{rank}.json").write_text(json.dumps(distributed_run(base / "two", 2)))
    leave_processes()
