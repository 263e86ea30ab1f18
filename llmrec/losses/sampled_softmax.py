"""The softmax over a target and sampled negatives, with or without the log-Q correction.

Sources: Bengio and Senécal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language
Model" (2008), for the correction; Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
Recommendations" (2019), for in-batch negatives; Yang et al., "Mixed Negative Sampling for Learning Two-tower Neural
Networks in Recommendations" (2020), for mixed ones; Khrylchenko et al., "Correcting the LogQ Correction" (arXiv
2507.09331), for leaving the target uncorrected, which is there with certainty.

The corrected loss is -s_t + log(exp(s_t) + Σ_c exp(s_c) / E_c) with E_c how often item c is expected among the
negatives: the sum in it has the expectation Σ_{j≠t} exp(s_j), so the loss approaches the full softmax's as the
negatives grow in number. Items that are the target are no negatives of it.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llmrec.losses.full_softmax import CHUNK_SCORES
from llmrec.losses.loss import ItemLoss, ItemVectors
from llmrec.losses.negatives import NegativeSampler, finest_type
from llmrec.losses.products import distinct, logsumexp_of_others, own_products


class OwnNegativesSoftmax(ItemLoss):
    """Every target has negatives of its own, drawn from the items that are not it.

    Args:
        sampler: draws them.
        num_negatives: for each target.
        log_q: whether logits are corrected.
    """

    def __init__(self, sampler: NegativeSampler, num_negatives: int, log_q: bool = True) -> None:
        super().__init__()
        self.sampler, self.num_negatives, self.log_q = sampler, num_negatives, log_q

    def forward(self, queries: Tensor, targets: Tensor, items: ItemVectors, weights: Tensor | None = None) -> Tensor:
        """See `ItemLoss.forward`."""
        negatives = self.sampler.draw_others(targets, self.num_negatives)  # (T, K)
        rows, places = distinct(torch.cat([targets[:, None], negatives], dim=1), items.num_items)
        scores = own_products(queries, items.vectors(rows), places)  # (T, 1 + K)
        if self.log_q:
            expected = self.sampler.log_shares_of_others(negatives, targets) + math.log(self.num_negatives)
            scores = scores - F.pad(expected, (1, 0)).to(scores.dtype)
        return _weighted_sum(scores.logsumexp(dim=1) - scores[:, 0], weights)


class SharedNegativesSoftmax(ItemLoss):
    """All targets of a batch share their negatives: drawn ones, the other targets, or both.

    With `cross_process` those of all processes are shared. Processes exchange item rows, 8 bytes each, not vectors:
    each holds the whole model, computes the vectors of all negatives itself, and gets the gradients of its own
    queries' losses; their sum over processes is the gradient of one process with the joined batch. Every process must
    then call the loss equally often, also without a token.

    Args:
        sampler: draws negatives; None: none are drawn.
        num_negatives: how many, in each process.
        targets: the distribution of targets; None: other targets are no negatives.
        log_q: whether logits are corrected.
        cross_process: whether negatives are shared among processes.
        chunk_scores: how many scores are held at once.
    """

    def __init__(
        self,
        sampler: NegativeSampler | None,
        num_negatives: int,
        targets: NegativeSampler | None = None,
        log_q: bool = True,
        cross_process: bool = False,
        chunk_scores: int = CHUNK_SCORES,
    ) -> None:
        super().__init__()
        self.sampler, self.num_negatives, self.targets = sampler, num_negatives, targets
        self.log_q, self.cross_process, self.chunk_scores = log_q, cross_process, chunk_scores

    def forward(self, queries: Tensor, targets: Tensor, items: ItemVectors, weights: Tensor | None = None) -> Tensor:
        """See `ItemLoss.forward`."""
        none = targets.new_empty(0)
        drawn = none if self.sampler is None else self.sampler.draw(self.num_negatives)
        others = none if self.targets is None else targets
        if self.cross_process:
            drawn, others = all_rows(drawn), all_rows(others)
        negatives = torch.cat([drawn, others])  # (M,)
        rows, places = distinct(torch.cat([negatives, targets]), items.num_items)
        vectors = items.vectors(rows)
        biases = -self._log_expected(negatives, len(drawn), len(others)) if self.log_q else torch.zeros_like(negatives)
        wanted = own_products(queries, vectors, places[len(negatives) :, None])[:, 0]
        sums = logsumexp_of_others(
            queries, vectors[places[: len(negatives)]], biases, negatives, targets, self.chunk_scores
        )
        return _weighted_sum(F.softplus(sums - wanted), weights)

    def _log_expected(self, negatives: Tensor, drawn: int, others: int) -> Tensor:
        """(M,) log of how often each item is expected among the negatives of a target, in the device's finest type.

        A target's own place among the others is no draw: the rest of them are.
        """
        expected = torch.zeros(len(negatives), dtype=finest_type(negatives.device), device=negatives.device)
        if self.sampler is not None:
            expected += drawn * self.sampler.log_shares(negatives).exp()
        if self.targets is not None:
            expected += max(0, others - 1) * self.targets.log_shares(negatives).exp()
        # A single target has no other one; it is never its own negative either.
        return expected.clamp_min(torch.finfo(expected.dtype).tiny).log()


def all_rows(rows: Tensor) -> Tensor:
    """(R,) -> the rows of all processes in order of their ranks, however many each has; without gradients."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    number = torch.tensor([len(rows)], device=rows.device)
    numbers = [torch.empty_like(number) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, number)
    counts = torch.cat(numbers).tolist()
    padded = F.pad(rows, (0, max(counts) - len(rows)))
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def _weighted_sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.sum() if weights is None else (losses * weights.to(losses.dtype)).sum()
