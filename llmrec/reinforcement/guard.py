"""The guard: watches a training after SFT on the temporal slice, stops it when it does harm, and says what to keep.

It knows no reward and no loss. What it goes by is where the slice's targets stand, each against where the SFT model
itself had them, and what the trainer logs of its groups.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from llmrec.exceptions import BackboneError, RecipeError
from llmrec.reinforcement.slice import DEPTH, Places, SliceRanking
from llmrec.reinforcement.trade_off import DECIDES, GuardLimits, judge

logger = logging.getLogger(__name__)

# The trainers' names for what they log.
SIGNAL_FREE, ENTROPY, KL, GRADIENT = "groups_without_signal", "entropy", "kl", "grad_norm"

_LINES = 3  # logged, before a missing signal is warned of


class RLGuard(TrainerCallback, ExportableState):
    """Ranks the slice before the first step, every `every` steps and after the last, and decides.

    At each of these steps, in this order of reasons, the training is stopped if

    1. the trade is bad (`judge`),
    2. the mean KL logged since the last evaluation is above `max_kl`,
    3. the mean entropy since then is below `min_entropy_share` of the first one that was logged,
    4. the mean share of groups without signal since then is above `max_signal_free`, or
    5. `patience` evaluations in a row were none of a new best.

    The **best** is the evaluation with the highest NDCG@10 on the slice that none of 1 to 3 holds for, the SFT model
    being the first; a later one has to be higher. It is saved as a checkpoint, which rotation keeps. If that is the
    SFT model itself, `best_step` is None, and whoever called it keeps the SFT weights.

    What is not logged (the KL where nothing is weighted by it) is not judged. The state is part of every checkpoint,
    and a resumed training goes on with it; processes take the first one's decision. Use it with `WholeCheckpoints`,
    and before `ShutdownCallback`.

    Attributes:
        history: one entry per evaluation, JSON-ready: `step`, what `judge` says, `logged` (means since the last),
            `better`, and `why` it stopped there, or None.
        best_step: whose checkpoint is the best; None for the SFT model.
        stopped: why the guard ended the training, in words; None if it did not.
    """

    def __init__(
        self,
        ranking: SliceRanking,
        users: npt.ArrayLike,
        limits: GuardLimits | None = None,
        every: float = 0.1,
        depth: int = DEPTH,
        seed: int = 0,
    ) -> None:
        """
        Args:
            ranking: of the slice's U cases, `depth` deep.
            users: (U,) whose cases they are; equal values mean one user.
            limits: when to stop.
            every: steps between evaluations; below 1 a share of all steps.
            depth: of the lists, at least 10.
            seed: of the intervals.

        Raises:
            RecipeError: if `every` is not above 0, or lists end before 10.
        """
        if not 0 < every < math.inf:
            raise RecipeError(f"The guard is to look every {every} steps. Give a number of steps, or a share of them.")
        if depth < 10:
            raise RecipeError(f"The guard's lists hold {depth} items, and NDCG@10 decides. Give 10 or more.")
        self._ranking, self._every, self._depth, self._seed = ranking, every, depth, seed
        self.limits = limits or GuardLimits()
        self._users: npt.NDArray[np.int64] = np.unique(np.asarray(users), return_inverse=True)[1].reshape(-1)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.best_step: int | None = None
        self.stopped: str | None = None
        self._reference: Places | None = None
        self._sums: dict[str, list[float]] = {}  # since the last evaluation, by name: sum and number
        self._first_entropy: float | None = None
        self._lines = 0
        self._had_signal = self._had_gradient = self._warned = False

    @property
    def is_returned(self) -> bool:
        """Whether no checkpoint was better than the SFT model, whose weights are then to be kept."""
        return self.best_step is None

    @property
    def sentence(self) -> str:
        """What the guard found, in words."""
        last = self.history[-1]["step"] if self.history else 0
        ended = f"stopped at step {last}: {self.stopped}" if self.stopped else f"ended at step {last}"
        if self.best_step is None:
            return f"The training {ended}. No checkpoint was better on the slice than the SFT model, which is kept."
        best = next(one for one in self.history if one["step"] == self.best_step)["metrics"][DECIDES]
        return (
            f"The training {ended}. The checkpoint of step {self.best_step} is kept: {DECIDES} on the slice "
            f"{best['policy']:.4f}, the SFT model's {best['sft']:.4f}."
        )

    def document(self) -> dict[str, Any]:
        """What a metrics.json says of it, JSON-ready."""
        return {
            "cases": len(self._users),
            "depth": self._depth,
            "limits": {name: _finite(value) for name, value in asdict(self.limits).items()},
            "evaluations": self.history,
            "best_step": self.best_step,
            "stopped": self.stopped,
            "returned_to_start": self.is_returned,
            "sentence": self.sentence,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "args": {},
            "attributes": {
                "reference": None if self._reference is None else self._reference.tolist(),
                "history": self.history,
                "best_step": self.best_step,
                "stopped": self.stopped,
                "sums": self._sums,
                "first_entropy": self._first_entropy,
                "lines": self._lines,
                "seen": [self._had_signal, self._had_gradient, self._warned],
            },
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin_anew()
        if state.global_step:
            control.should_training_stop = self.had_ended(state) or control.should_training_stop
            return
        self._reference = agreed(self._ranking.places(kwargs["model"], progress=not args.disable_tqdm))
        first = judge(self._reference, self._reference, self._users, self.limits, self._depth, self._seed)
        entry = {"step": 0, "metrics": first["metrics"], "fell": False, "risen": [], "bad": False}
        self.history = [entry | {"logged": {}, "better": True, "why": None}]
        if state.is_world_process_zero:
            logger.info("the guard watches %d validation cases; the SFT model: %s", len(self._users), _shown(entry))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_due(state):
            control.should_log = True  # what was logged until here is judged, and the trainer saves behind it

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step and "train_runtime" not in kwargs["logs"]:
            self._add(kwargs["logs"], state)
            if self._is_due(state):
                self._evaluate(kwargs["model"], args, state, control)

    def _is_due(self, state: TrainerState) -> bool:
        every = max(1, math.ceil(self._every * state.max_steps if self._every < 1 else self._every))
        at = state.global_step % every == 0 or state.global_step == state.max_steps
        new = self.history[-1]["step"] < state.global_step <= state.max_steps
        return at and new and self.stopped is None

    def _add(self, logs: Mapping[str, Any], state: TrainerState) -> None:
        """Keeps what a line of the log says, and warns once where nothing can be learnt."""
        numbers = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            if math.isfinite(value) and (name in (SIGNAL_FREE, ENTROPY, KL, GRADIENT) or name.startswith("reward")):
                total = self._sums.setdefault(name, [0.0, 0])
                total[0] += value
                total[1] += 1
        if self._first_entropy is None and math.isfinite(numbers.get(ENTROPY, math.nan)):
            self._first_entropy = numbers[ENTROPY]
        self._lines += 1
        self._had_signal |= SIGNAL_FREE not in numbers or numbers[SIGNAL_FREE] < 1
        self._had_gradient |= GRADIENT not in numbers or numbers[GRADIENT] != 0
        if self._lines >= _LINES and not self._warned and not (self._had_signal and self._had_gradient):
            self._warned = True
            if state.is_world_process_zero:
                logger.warning(self._nothing_to_learn(state.global_step))

    def _nothing_to_learn(self, step: int) -> str:
        """Why nothing has been learnt so far, and what to do about it."""
        if self._had_signal:
            return (
                f"NOTHING IS LEARNT: until step {step} every gradient was 0, although rewards told items apart. "
                "Check that parameters are trained, and that beta or the weights of the rewards are not all 0."
            )
        rewards = [total[0] for name, total in self._sums.items() if name.startswith("rewards/") and "mean" in name]
        what = "every reward was 0" if rewards and not any(rewards) else "the rewards of every group were all equal"
        return (
            f"NOTHING IS LEARNT: until step {step} {what}, so no item was better than another of its group. Make "
            "groups larger, add rewards that tell misses apart (prefix, semantic, collaborative), or begin with an "
            "artefact that ranks some targets among the first."
        )

    def _evaluate(self, model: Any, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        assert self._reference is not None
        now = agreed(self._ranking.places(model, progress=not args.disable_tqdm))
        found = judge(self._reference, now, self._users, self.limits, self._depth, self._seed)
        logged = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        why = agreed(self._broken(found, logged))
        value = found["metrics"][DECIDES]["policy"]
        best = next(one for one in self.history if one["step"] == (self.best_step or 0))["metrics"][DECIDES]["policy"]
        better = why is None and value > best
        entry = {"step": state.global_step, **found, "logged": logged, "better": better, "why": why}
        self.history.append(entry)
        if better:
            self.best_step = state.best_global_step = state.global_step
            state.best_metric = value
            control.should_save = True
        why = why or agreed(self._exhausted(logged))
        if why is not None:
            self.stopped = entry["why"] = why
            control.should_training_stop = control.should_save = True
        if state.is_world_process_zero:
            logger.info("step %d: %s%s", state.global_step, _shown(entry), "; the best so far" if better else "")
            if why is not None:
                logger.warning("the guard stops the training at step %d: %s", state.global_step, why)

    def _broken(self, found: Mapping[str, Any], logged: Mapping[str, float]) -> str | None:
        """Which of the limits this model is beyond, so that it is not to be kept; None if it is within."""
        limits = self.limits
        if found["bad"]:
            recall = found["metrics"][f"HR@{self._depth}"]
            low, high = recall["difference interval95"]
            change = f"{recall['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
            return (
                f"HR@{self._depth} fell from {recall['sft']:.4f} to {recall['policy']:.4f} ({change}), and neither "
                "NDCG@1 nor NDCG@10 rose for it"
            )
        if logged.get(KL, 0.0) > limits.max_kl:
            return f"the KL from the SFT model is {logged[KL]:.3f} nats, and the limit is {limits.max_kl:g}"
        if ENTROPY in logged and self._first_entropy is not None:
            least = limits.min_entropy_share * self._first_entropy
            if logged[ENTROPY] < least:
                return (
                    f"the entropy is {logged[ENTROPY]:.3f} nats per token, and the limit is {least:.3f}, "
                    f"{limits.min_entropy_share:g} of the first"
                )
        return None

    def _exhausted(self, logged: Mapping[str, float]) -> str | None:
        """Why to go on is of no use; None if it is."""
        limits = self.limits
        if logged.get(SIGNAL_FREE, 0.0) > limits.max_signal_free:
            return (
                f"{100 * logged[SIGNAL_FREE]:.1f} % of the groups had no signal, and the limit is "
                f"{100 * limits.max_signal_free:g} %"
            )
        since = len(self.history) - 1 - max(place for place, one in enumerate(self.history) if one["better"])
        if limits.patience and since >= limits.patience:
            return f"{since} evaluations in a row without a better {DECIDES}"
        return None

    def had_ended(self, state: TrainerState) -> bool:
        """Goes on with what the state of a checkpoint kept, and tells whether that training has nothing left to do.

        The Trainer takes a step more, of one that had ended, when it is resumed: then it is better not resumed.

        Raises:
            BackboneError: if the checkpoint knows no guard of these cases.
        """
        self._restore(state)
        return self.stopped is not None or state.global_step >= state.max_steps

    def _restore(self, state: TrainerState) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__) or {}
        kept = (stored[0] if isinstance(stored, list) else stored).get("attributes", {})
        places = kept.get("reference")
        if places is None or len(places) != len(self._users):
            raise BackboneError(
                f"The checkpoint of step {state.global_step} does not say how the SFT model ranks the guard's "
                f"{len(self._users)} cases, so nothing can be compared with it. Begin anew with --fresh."
            )
        self._reference = np.array(places, dtype=np.int64)
        self.history, self.best_step, self.stopped = kept["history"], kept["best_step"], kept["stopped"]
        self._sums, self._first_entropy, self._lines = kept["sums"], kept["first_entropy"], kept["lines"]
        self._had_signal, self._had_gradient, self._warned = kept["seen"]


def agreed(value: Any) -> Any:
    """The first process's value, in every process: none may go on where another stops."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return value
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values[0]


def _shown(entry: Mapping[str, Any]) -> str:
    """An evaluation's metrics in a line, with differences where there can be any."""
    said = []
    for name, found in entry["metrics"].items():
        change = f" ({found['difference']:+.4f})" if entry["step"] else ""
        said.append(f"{name} {found['policy']:.4f}{change}")
    return ", ".join(said)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
