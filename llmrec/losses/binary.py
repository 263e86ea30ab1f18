"""BinaryCrossEntropy: the target true, sampled negatives false, each for itself; BCE and gBCE.

Source: Petrov and Macdonald, "gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with Negative
Sampling" (2023), arXiv 2308.07192.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrec.exceptions import BackboneError
from llmrec.losses.loss import ItemLoss, ItemVectors
from llmrec.losses.negatives import NegativeSampler
from llmrec.losses.products import distinct, own_products


class BinaryCrossEntropy(ItemLoss):
    """-(log σ(s_t)^β + Σ_c log(1 - σ(s_c))) / (k + 1), over k negatives c that are not the target t.

    β = α (t (1 - 1/α) + 1/α) with the sampling rate α = k / (N - 1), and t the calibration: 0 gives β = 1, plain BCE
    (SASRec's is the one with k = 1), and 1 gives β = α, with which σ(s) tends to the true probability. α is at most 1.

    Args:
        sampler: draws the negatives.
        num_negatives: k, for each target.
        calibration: t, from 0 to 1.

    Raises:
        BackboneError: if t is none of these.
    """

    def __init__(self, sampler: NegativeSampler, num_negatives: int, calibration: float = 0.0) -> None:
        super().__init__()
        if not 0 <= calibration <= 1:
            raise BackboneError(f"gBCE's t is {calibration}. Give a number from 0 to 1.")
        self.sampler, self.num_negatives = sampler, num_negatives
        rate = min(1.0, num_negatives / (sampler.num_items - 1))
        self.beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)

    def forward(self, queries: Tensor, targets: Tensor, items: ItemVectors, weights: Tensor | None = None) -> Tensor:
        """See `ItemLoss.forward`."""
        negatives = self.sampler.draw_others(targets, self.num_negatives)  # (T, k)
        rows, places = distinct(torch.cat([targets[:, None], negatives], dim=1), items.num_items)
        scores = own_products(queries, items.vectors(rows), places)  # (T, 1 + k)
        # -log σ(s) = softplus(-s), -log(1 - σ(s)) = softplus(s).
        losses = (self.beta * F.softplus(-scores[:, 0]) + F.softplus(scores[:, 1:]).sum(dim=1)) / scores.shape[1]
        return losses.sum() if weights is None else (losses * weights.to(losses.dtype)).sum()
