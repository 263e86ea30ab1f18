"""The trade-off of a training after SFT: what it may cost, and whether a loss of recall bought anything."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.evaluation.metrics import Metric, values
from llmrec.evaluation.ranks import Ranks
from llmrec.evaluation.uncertainty import paired_difference
from llmrec.exceptions import RecipeError
from llmrec.reinforcement.slice import DEPTH, Places

DECIDES = "NDCG@10"  # which checkpoint is the best
SHARP = ("NDCG@1", DECIDES)  # what a loss of recall can be the price of

_RESAMPLES = 1000


@dataclass(frozen=True)
class GuardLimits:
    """When a training is stopped.

    Attributes:
        recall_tolerance: HR@50 may be lower than the SFT model's by this share of it before a fall counts, because
            sharpening the first places costs some of the last ones: 5 %, about what seeds of one SFT differ by.
        max_kl: nats from the SFT model as the trainer logs them: per token of a rollout, or, of preferences, per item,
            over a case's items and "any other". At 1 per token an item of four tokens has become e⁴ = 55 times as
            probable as it was: what is left of the SFT model is little.
        min_entropy_share: of the entropy that was logged first. Below a fifth the policy always proposes the same, and
            has nothing to compare it with.
        max_signal_free: the share of groups whose rewards are all equal. Only the others have a gradient; of an exact
            match alone that is normal for nine of ten groups, at 99 of 100 the rest is noise.
        patience: evaluations in a row without a better `NDCG@10`; 0: any number.

    Raises:
        RecipeError: for a number that is no such limit.
    """

    recall_tolerance: float = 0.05
    max_kl: float = 1.0
    min_entropy_share: float = 0.2
    max_signal_free: float = 0.99
    patience: int = 3

    def __post_init__(self) -> None:
        for name, most in (("recall_tolerance", 1.0), ("min_entropy_share", 1.0), ("max_signal_free", 1.0)):
            value = getattr(self, name)
            if not 0.0 <= value <= most:
                raise RecipeError(f"{name} is {value}, and it is a share. Give a number from 0 to 1.")
        if not self.max_kl > 0:
            raise RecipeError(
                f"max_kl is {self.max_kl}. Give a number above 0, or inf (in a recipe .inf) for no limit."
            )
        if self.patience < 0:
            raise RecipeError(f"patience is {self.patience}. Give 1 or more, or 0 for no end.")


def judge(
    before: Places,
    now: Places,
    users: npt.NDArray[np.int64],
    limits: GuardLimits,
    depth: int = DEPTH,
    seed: int = 0,
) -> dict[str, Any]:
    """Recall against sharpness: how a model ranks the slice, case by case beside the SFT model.

    The trade is **bad** if HR@`depth` fell by more than `recall_tolerance` of the SFT model's and its paired 95 %
    interval lies below 0, while neither NDCG@1 nor NDCG@10 rose with an interval above 0.

    Args:
        before: (U,) the targets' places with the SFT model, -1 where absent.
        now: (U,) with the model as it is.
        users: (U,) whose cases they are, numbered.
        limits: of which `recall_tolerance` is read.
        depth: of the lists.
        seed: of the bootstrap.

    Returns:
        `metrics` (by name: `sft`, `policy`, `difference`, `difference interval95`), `fell`, `risen` (names) and `bad`.
    """
    chosen: list[tuple[Metric, int]] = [("HR", depth), ("HR", 10), ("NDCG", 10), ("NDCG", 1)]
    nothing = np.zeros(len(before), dtype=np.int64)
    tables = [
        np.stack([values(Ranks(places, nothing), metric, k) for metric, k in chosen], axis=1)
        for places in (before, now)
    ]
    gaps = paired_difference(tables[1], tables[0], users, _RESAMPLES, seed)
    metrics: dict[str, dict[str, Any]] = {
        f"{metric}@{k}": {
            "sft": float(tables[0][:, place].mean()),
            "policy": float(tables[1][:, place].mean()),
            "difference": float(gaps.mean[place]),
            "difference interval95": [float(gaps.low[place]), float(gaps.high[place])],
        }
        for place, (metric, k) in enumerate(chosen)
    }
    recall = metrics[f"HR@{depth}"]
    fell = recall["difference"] < -limits.recall_tolerance * recall["sft"] and recall["difference interval95"][1] < 0
    risen = [name for name in SHARP if metrics[name]["difference interval95"][0] > 0]
    return {"metrics": metrics, "fell": bool(fell), "risen": risen, "bad": bool(fell and not risen)}
