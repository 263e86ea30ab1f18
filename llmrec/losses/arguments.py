"""The flags of a sequence model's loss."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import RecipeError
from llmrec.losses.loss import ItemLoss


@dataclass
class LossArguments:
    """What a sequence model is trained with."""

    loss: Literal["softmax", "sampled_softmax", "bce", "gbce"] = field(
        default="softmax",
        metadata={
            "help": "softmax: over all items; sampled_softmax: over the target and some negatives; bce: each of them "
            "true or false for itself; gbce: the same, calibrated for how few negatives there are (gSASRec)."
        },
    )
    num_negatives: int = field(
        default=128, metadata={"help": "Negatives that are drawn for each target, or once a batch if they are shared."}
    )
    negatives: Literal["uniform", "popularity", "in_batch", "mixed"] = field(
        default="uniform",
        metadata={
            "help": "Which items: all alike; in proportion to their training interactions; the other targets of the "
            "batch; mixed: those and num_negatives uniform ones. The last two are for sampled_softmax."
        },
    )
    shared_negatives: bool = field(
        default=False,
        metadata={"help": "Draw uniform or popularity negatives of sampled_softmax once for all targets of a batch."},
    )
    log_q: bool = field(
        default=True,
        metadata={
            "help": "Subtract from a negative's logit the logarithm of how often it is expected among the negatives, "
            "so that sampled_softmax estimates softmax."
        },
    )
    gbce_t: float = field(
        default=0.75, metadata={"help": "Calibration of gbce: 0 is bce, 1 makes scores true probabilities."}
    )
    cross_process: bool = field(
        default=False, metadata={"help": "Share the negatives of a batch among all processes too."}
    )

    def check(self) -> None:
        """Raises RecipeError if the flags do not fit together."""
        for name, known in (
            ("loss", ("softmax", "sampled_softmax", "bce", "gbce")),
            ("negatives", ("uniform", "popularity", "in_batch", "mixed")),
        ):
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} is {getattr(self, name)!r}. Use one of {', '.join(known)}.")
        in_batch = self.negatives in ("in_batch", "mixed")
        if self.num_negatives < 1:
            raise RecipeError(f"num_negatives is {self.num_negatives}. Draw at least one.")
        if not 0 <= self.gbce_t <= 1:
            raise RecipeError(f"gbce_t is {self.gbce_t}. Give a number from 0 to 1.")
        if self.loss != "sampled_softmax" and (in_batch or self.shared_negatives or self.cross_process):
            raise RecipeError(
                f"The loss {self.loss} shares no negatives among targets. Use sampled_softmax, or leave out in_batch, "
                "mixed, shared_negatives and cross_process."
            )
        if self.loss == "softmax" and self.negatives == "popularity":
            raise RecipeError(
                "negatives is popularity, and the loss softmax draws no negatives. Use another loss, or leave it out."
            )
        if self.cross_process and not (in_batch or self.shared_negatives):
            raise RecipeError(
                f"cross_process is true, and every target has {self.negatives} negatives of its own. Share them with "
                "shared_negatives, in_batch or mixed, or leave it out."
            )
        if self.shared_negatives and in_batch:
            raise RecipeError(f"{self.negatives} negatives are shared in any case. Leave shared_negatives out.")

    def build(self, train_counts: npt.NDArray[np.integer]) -> ItemLoss:
        """The loss that the flags describe.

        Args:
            train_counts: (N,) how often each item is a target of training.

        Raises:
            RecipeError: if the flags do not fit together.
            BackboneError: if there are fewer than two items to draw negatives from.
        """
        from llmrec.losses.binary import BinaryCrossEntropy
        from llmrec.losses.full_softmax import FullSoftmax
        from llmrec.losses.negatives import NegativeSampler
        from llmrec.losses.sampled_softmax import OwnNegativesSoftmax, SharedNegativesSoftmax

        self.check()
        if self.loss == "softmax":
            return FullSoftmax()
        counts = train_counts if self.negatives == "popularity" else np.ones_like(train_counts)
        sampler = NegativeSampler(counts)
        if self.loss in ("bce", "gbce"):
            return BinaryCrossEntropy(sampler, self.num_negatives, self.gbce_t if self.loss == "gbce" else 0.0)
        if self.negatives in ("uniform", "popularity") and not self.shared_negatives:
            return OwnNegativesSoftmax(sampler, self.num_negatives, self.log_q)
        return SharedNegativesSoftmax(
            sampler=None if self.negatives == "in_batch" else sampler,
            num_negatives=self.num_negatives,
            targets=NegativeSampler(train_counts) if self.negatives in ("in_batch", "mixed") else None,
            log_q=self.log_q,
            cross_process=self.cross_process,
        )
