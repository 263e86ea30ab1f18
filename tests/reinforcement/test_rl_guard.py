"""The guard: what it calls a bad trade, when it stops, what it keeps, and what it says."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from llmrec.evaluation.metrics import values
from llmrec.evaluation.ranks import Ranks
from llmrec.evaluation.uncertainty import paired_difference
from llmrec.exceptions import BackboneError, RecipeError
from llmrec.reinforcement.guard import RLGuard
from llmrec.reinforcement.trade_off import GuardLimits, judge
from llmrec.training.checkpoints import WholeCheckpoints

USERS = 200
RNG = np.random.default_rng(0)
SFT = RNG.permutation(np.r_[np.arange(50).repeat(2), np.full(100, -1)])  # half of the targets are listed
BETTER = np.where(SFT > 5, SFT // 2, SFT)
FORGOT = np.where(SFT >= 25, -1, SFT)  # recall is halved, and nothing is won
TRADED = np.where(SFT >= 40, -1, np.where(SFT > 0, SFT // 4, SFT))  # recall is lost, and the top is won


ONE_PROCESS = TrainingArguments(disable_tqdm=True, use_cpu=True)


class Scripted:
    """In the place of a ranking: the next places of a list, and how often it was asked."""

    def __init__(self, *places):
        self.left, self.asked = list(places), 0

    def places(self, model, progress=False):
        self.asked += 1
        return self.left.pop(0)


def guard_of(*places, every=10, **limits):
    return RLGuard(Scripted(SFT, *places), np.arange(USERS), GuardLimits(**limits), every=every)


def drive(guard, steps, max_steps=100, logs=None, state=None, args=None, each=False):
    """Calls the guard as a Trainer does; tells at which steps it saved and where it stopped."""
    state = state or TrainerState(max_steps=max_steps, stateful_callbacks=[guard])
    state.is_world_process_zero = True
    control, args = TrainerControl(), args or TrainingArguments(disable_tqdm=True, use_cpu=True)
    guard.on_train_begin(args, state, control, model=None)
    saved = []
    if control.should_training_stop:
        return state, saved
    for step in range(state.global_step + 1, steps + 1):
        state.global_step = step
        control.should_log = control.should_save = False
        guard.on_step_end(args, state, control)
        if control.should_log or each:
            line = dict(logs(step) if logs else {"groups_without_signal": 0.5, "entropy": 1.0, "kl": 0.01})
            guard.on_log(args, state, control, logs=line, model=None)
        if control.should_save:
            saved.append(step)
        if control.should_training_stop:
            break
    return state, saved


# --- the trade ---


@pytest.mark.parametrize("seed", range(4))
def test_the_judgement_equals_its_definition(seed):
    rng = np.random.default_rng(seed)
    before, now = rng.integers(-1, 60, (2, 80))
    users = rng.integers(0, 50, 80)
    found = judge(before, now, users, GuardLimits(recall_tolerance=0.1), depth=50, seed=seed)
    for name, (metric, k) in {
        "HR@50": ("HR", 50),
        "HR@10": ("HR", 10),
        "NDCG@10": ("NDCG", 10),
        "NDCG@1": ("NDCG", 1),
    }.items():
        old, new = (values(Ranks(places, np.zeros(80, int)), metric, k)[:, None] for places in (before, now))
        gaps = paired_difference(new, old, users, 1000, seed)
        got = found["metrics"][name]
        assert (got["sft"], got["policy"]) == pytest.approx((old.mean(), new.mean()))
        assert got["difference interval95"] == pytest.approx([gaps.low[0], gaps.high[0]])
    recall = found["metrics"]["HR@50"]
    fell = recall["difference"] < -0.1 * recall["sft"] and recall["difference interval95"][1] < 0
    risen = [n for n in ("NDCG@1", "NDCG@10") if found["metrics"][n]["difference interval95"][0] > 0]
    assert (found["fell"], found["risen"], found["bad"]) == (fell, risen, fell and not risen)


def test_what_a_bad_trade_is():
    users, limits = np.arange(USERS), GuardLimits()

    def of(now, limits=limits):
        found = judge(SFT, now, users, limits)
        return found["fell"], bool(found["risen"]), found["bad"]

    assert of(FORGOT) == (True, False, True)
    assert of(TRADED) == (True, True, False)  # that price may be paid
    assert of(BETTER) == (False, True, False)
    assert of(SFT) == (False, False, False)
    # A fall within the tolerance is none, however certain; nor is one that chance can explain.
    assert of(FORGOT, GuardLimits(recall_tolerance=0.6)) == (False, False, False)
    few = np.where(SFT >= 47, -1, SFT)  # six of the hundred hits: certain, and more than 5 %
    assert of(few)[0]
    assert not of(few, GuardLimits(recall_tolerance=0.07))[0]
    swapped = SFT.copy()  # as many come as go, but for six of them: 6 % less, and anything else is possible
    swapped[np.flatnonzero(SFT >= 0)[:50]] = -1
    swapped[np.flatnonzero(SFT < 0)[:44]] = 30
    assert judge(SFT, swapped, users, limits)["metrics"]["HR@50"]["difference"] == pytest.approx(-0.03)
    assert not of(swapped)[0]


# --- stopping ---


def test_a_bad_trade_stops_at_once_and_the_sft_model_is_kept(caplog):
    guard = guard_of(FORGOT)
    with caplog.at_level(logging.WARNING, "llmrec"):
        state, saved = drive(guard, 100)
    assert state.global_step == 10
    assert saved == [10]  # so that a resumed run knows that it had ended
    assert guard.is_returned
    assert "HR@50 fell from 0.5000 to 0.2500" in guard.stopped
    assert "the guard stops the training at step 10" in caplog.text
    assert "the SFT model, which is kept" in guard.sentence
    assert state.best_global_step is None


def test_the_best_checkpoint_is_the_highest_and_ties_are_none():
    worse = np.where(SFT >= 0, SFT + 1, -1)
    guard = guard_of(BETTER, BETTER, worse, every=10, patience=0)
    state, saved = drive(guard, 30)
    assert guard.best_step == state.best_global_step == 10
    assert saved == [10]
    assert [entry["better"] for entry in guard.history] == [True, True, False, False]
    assert state.best_metric == guard.history[1]["metrics"]["NDCG@10"]["policy"]
    assert "step 10 is kept" in guard.sentence
    assert not guard.is_returned


def test_equal_to_the_sft_model_is_not_better():
    guard = guard_of(SFT, SFT)
    drive(guard, 20)
    assert guard.is_returned


def test_a_checkpoint_behind_a_limit_is_never_the_best():
    guard = guard_of(BETTER, max_kl=0.5)
    state, _ = drive(guard, 100, logs=lambda step: {"kl": 0.6, "grad_norm": 1.0})
    assert state.global_step == 10
    assert "KL from the SFT model is 0.600" in guard.stopped
    assert guard.is_returned


def test_entropy_is_held_against_the_first_one():
    guard = guard_of(BETTER, BETTER, min_entropy_share=0.25)
    state, _ = drive(guard, 100, logs=lambda step: {"entropy": {10: 2.0, 20: 0.4}[step]})
    assert state.global_step == 20
    assert "0.400 nats per token, and the limit is 0.500" in guard.stopped
    assert guard.best_step == 10


def test_means_are_over_the_lines_since_the_last_evaluation():
    guard = guard_of(BETTER, BETTER, every=3, max_kl=1.0, patience=0)
    args, control = TrainingArguments(disable_tqdm=True, use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=6, stateful_callbacks=[guard])
    state.is_world_process_zero = True
    guard.on_train_begin(args, state, control, model=None)
    for step, kl in enumerate([1.9, 0.2, 0.3, 0.9, 0.1, math.nan], 1):
        state.global_step = step
        guard.on_step_end(args, state, control)
        guard.on_log(args, state, control, logs={"kl": kl, "rewards/exact/mean": step}, model=None)
    assert [entry["step"] for entry in guard.history] == [0, 3, 6]
    assert guard.history[1]["logged"] == {"kl": pytest.approx(0.8), "rewards/exact/mean": 2.0}
    assert guard.history[2]["logged"] == {"kl": pytest.approx(0.5), "rewards/exact/mean": 5.0}


def test_groups_without_signal_stop_it_but_spoil_nothing():
    guard = guard_of(BETTER)
    state, saved = drive(guard, 100, logs=lambda step: {"groups_without_signal": 0.995})
    assert (state.global_step, saved, guard.best_step) == (10, [10], 10)
    assert "99.5 % of the groups had no signal, and the limit is 99 %" in guard.stopped


def test_patience():
    guard = guard_of(BETTER, SFT, SFT, SFT, patience=2)
    state, _ = drive(guard, 100)
    assert state.global_step == 30
    assert guard.stopped == "2 evaluations in a row without a better NDCG@10"
    assert guard.best_step == 10
    endless = guard_of(*[SFT] * 10, patience=0)
    assert drive(endless, 100)[0].global_step == 100
    assert endless.stopped is None


def test_it_looks_at_a_share_of_all_steps_and_after_the_last():
    guard = guard_of(*[SFT] * 4, every=0.3, patience=0)
    drive(guard, 95, max_steps=95)
    assert [entry["step"] for entry in guard.history] == [0, 29, 58, 87, 95]
    assert not guard._ranking.left
    # A second line at the same step, or the summary, is no second look.
    args, control = TrainingArguments(disable_tqdm=True, use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=95, global_step=95)
    guard.on_log(args, state, control, logs={"loss": 1.0}, model=None)
    guard.on_log(args, state, control, logs={"train_runtime": 1.0}, model=None)
    assert len(guard.history) == 5


# --- what cannot be learnt ---


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"groups_without_signal": 1.0, "rewards/exact/mean": 0.0, "grad_norm": 0.0}, "every reward was 0"),
        ({"groups_without_signal": 1.0, "rewards/exact/mean": 0.5, "grad_norm": 0.0}, "were all equal"),
        ({"groups_without_signal": 0.2, "rewards/exact/mean": 0.5, "grad_norm": 0.0}, "every gradient was 0"),
    ],
    ids=["zero", "equal", "gradients"],
)
def test_it_warns_loudly_and_once_when_nothing_is_learnt(caplog, line, said):
    guard = guard_of(*[SFT] * 9, every=1, patience=0, max_signal_free=1.0)
    with caplog.at_level(logging.WARNING, "llmrec"):
        drive(guard, 9, logs=lambda step: line)
    (warned,) = [record for record in caplog.records if "NOTHING IS LEARNT" in record.getMessage()]
    assert said in warned.getMessage()


def test_it_does_not_warn_where_there_is_a_signal(caplog):
    # The first lines of a warm-up may be empty; then something comes. And a trainer that logs none of it is no case.
    for line in (
        lambda step: {"groups_without_signal": 1.0 if step < 3 else 0.9, "grad_norm": 0.0 if step < 3 else 0.1},
        lambda step: {"loss": 1.0},
    ):
        guard = guard_of(*[SFT] * 9, every=1, patience=0, max_signal_free=1.0)
        with caplog.at_level(logging.WARNING, "llmrec"):
            drive(guard, 9, logs=line)
        assert "NOTHING IS LEARNT" not in caplog.text


# --- resuming ---


def test_a_resumed_guard_goes_on_as_if_nothing_had_been():
    script = [BETTER, SFT, SFT, SFT, SFT]
    logs = lambda step: {"entropy": 2.0 - step / 100, "groups_without_signal": 0.1, "kl": step / 1000}  # noqa: E731
    whole = guard_of(*script, patience=3)
    drive(whole, 100, logs=logs, each=True)
    first = guard_of(*script[:2], patience=3)
    drive(first, 25, logs=logs, each=True)  # with lines of five steps that are still to be judged
    # What a checkpoint keeps is JSON.
    kept = TrainerState(max_steps=100, global_step=25)
    kept.stateful_callbacks = json.loads(json.dumps({"RLGuard": first.state()}))
    second = RLGuard(Scripted(*script[2:]), np.arange(USERS), GuardLimits(patience=3), every=10)
    state, _ = drive(second, 100, logs=logs, state=kept, each=True)
    assert second.document() == whole.document()
    assert state.global_step == 40
    assert second.document()["stopped"] is not None


def test_a_training_that_the_guard_had_stopped_stays_stopped():
    first = guard_of(FORGOT)
    drive(first, 100)
    kept = TrainerState(max_steps=100, global_step=10)
    kept.stateful_callbacks = {"RLGuard": first.state()}
    ranking = Scripted()
    second = RLGuard(ranking, np.arange(USERS), every=10)
    state, saved = drive(second, 100, state=kept)
    assert (state.global_step, saved, ranking.asked) == (10, [], 0)
    assert second.stopped == first.stopped


def test_a_checkpoint_of_another_slice_is_refused():
    first = guard_of(SFT)
    drive(first, 10)
    kept = TrainerState(max_steps=100, global_step=10)
    kept.stateful_callbacks = {"RLGuard": first.state()}
    for stored in (kept.stateful_callbacks, {}):
        kept.stateful_callbacks = stored
        with pytest.raises(BackboneError, match="--fresh"):
            drive(RLGuard(Scripted(), np.arange(5)), 100, state=kept)


def test_every_process_takes_the_decision_of_the_first(monkeypatch):
    # This process finds the model better, and the first finds it forgetful, as rounding on another device may.
    theirs = [SFT, FORGOT, "what the first said", None]
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    said = []

    def gather(values, value):
        said.append(value)
        values[:] = [theirs[len(said) - 1], value]

    monkeypatch.setattr(distributed, "all_gather_object", gather)
    guard = guard_of(BETTER)
    state, _ = drive(guard, 100, state=TrainerState(max_steps=100), args=ONE_PROCESS)
    assert state.global_step == 10
    assert guard.stopped == "what the first said"
    assert guard.is_returned
    assert guard.history[1]["bad"]  # judged by the first one's places


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, labels=None):
        return {"loss": ((x * self.weight - labels) ** 2).mean()}


class WholeTrainer(WholeCheckpoints, Trainer):
    pass


def test_with_a_trainer_the_best_checkpoint_outlives_rotation(tmp_path):
    script = {2: BETTER, 4: SFT, 6: SFT, 8: SFT, 10: SFT}
    seen = []

    class ByWeight:
        def places(self, model, progress=False):
            assert isinstance(model, Line)
            seen.append(model.weight.item())
            return script[2 * (len(seen) - 1)] if len(seen) > 1 else SFT

    guard = RLGuard(ByWeight(), np.arange(USERS), GuardLimits(patience=0), every=2)
    rows = [{"x": torch.ones(1), "labels": torch.ones(1)} for _ in range(10)]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=10,
        save_steps=1,
        save_total_limit=2,
        logging_steps=100,
        per_device_train_batch_size=1,
        learning_rate=0.1,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
    )
    trainer = WholeTrainer(Line(), args, train_dataset=rows, callbacks=[guard])
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-2"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert seen[0] == 0.0
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["RLGuard"]["attributes"]["best_step"] == 2
    trainer._load_best_model()
    assert trainer.model.weight.item() == pytest.approx(seen[1])


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"recall_tolerance": 1.5}, "recall_tolerance is 1.5"),
        ({"min_entropy_share": -0.1}, "min_entropy_share is -0.1"),
        ({"max_signal_free": math.nan}, "max_signal_free is nan"),
        ({"max_kl": 0.0}, "max_kl is 0.0"),
        ({"patience": -1}, "patience is -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_limits_that_are_none(limits, said):
    with pytest.raises(RecipeError, match=said):
        GuardLimits(**limits)


def test_a_guard_that_could_not_look():
    with pytest.raises(RecipeError, match="every 0 steps"):
        RLGuard(Scripted(), np.arange(3), every=0)
    with pytest.raises(RecipeError, match="hold 5 items"):
        RLGuard(Scripted(), np.arange(3), depth=5)
