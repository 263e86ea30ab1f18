"""What the items of a group count by the policy: their probability, over that of having been drawn.

The gradient of a policy's expected reward E[R] over the items that may be proposed is Σ_i p_i (R_i - E[R]) ∇ log π_i
with p_i ∝ π_i: π is the policy's own softmax, of which the catalog and what was seen leave a part. A group S estimates
sums over all items by Σ_{i∈S} w_i f_i. For a draw without replacement by perturbed log-probabilities, with κ the
greatest of those that were left out, w_i = π_i / q_i with q_i = P(Gumbel(φ_i) > κ) is unbiased (Kool, van Hoof and
Welling 2019, arXiv 1903.06059; φ_i is the log-probability that i was drawn by); divided by their sum, which stands for
the catalog's part, the estimate is consistent. A group of beams has q = 1: it is its own world, and the gradient that
of the expected reward among its items.

All this is of rewards that an item has by itself, whatever else was drawn, and of advantages that are not divided by a
group's deviation, which is another number for each case; a loss that means over an item's tokens divides ∇ log π_i by
their number. So it holds for Dr. GRPO. The divergence from the reference stays a plain mean over the group.
"""

import numpy as np
import numpy.typing as npt
from torch import Tensor

Table = npt.NDArray[np.float64]


def group_weights(logprobs: Table, drawn: Table | None = None, threshold: Table | None = None) -> Table:
    """(B, G) what each item of a group counts, adding up to 1.

    Args:
        logprobs: (B, G) log π.
        drawn: (B, G) φ, of a draw; None for beams.
        threshold: (B,) κ, of a draw; -inf where the group is all that there was.

    >>> group_weights(np.log([[0.3, 0.1]])).round(3).tolist()
    [[0.75, 0.25]]
    """
    found = logprobs if drawn is None or threshold is None else logprobs - log_inclusion(drawn, threshold)
    found = np.exp(found - found.max(axis=1, keepdims=True))
    weights: Table = found / found.sum(axis=1, keepdims=True)
    return weights


def log_inclusion(drawn: Table, threshold: Table) -> Table:
    """log P(Gumbel(φ) > κ) = log(1 - exp(-exp(φ - κ))), of φ (B, G) and κ (B,).

    >>> log_inclusion(np.array([[0.0, -50.0]]), np.array([0.0])).round(4).tolist()
    [[-0.4587, -50.0]]
    >>> log_inclusion(np.array([[-3.0]]), np.array([-np.inf])).tolist()
    [[0.0]]
    """
    above = drawn - threshold[:, None]
    rate = np.exp(np.minimum(above, 700.0))
    # Where the rate is below rounding, 1 - exp(-rate) is the rate.
    return np.where(above < -30.0, above, np.log(-np.expm1(-np.maximum(rate, 1e-300))))


def weighted_advantages(earned: Tensor, weights: Tensor, scaled: bool) -> Tensor:
    """(B, G) G w_i (R_i - Σ_j w_j R_j), so that a mean over the group is the weighted sum.

    Equal weights give the advantages of GRPO (scaled, but for its deviation of G - 1) and Dr. GRPO.

    Args:
        earned: (B, G) R.
        weights: (B, G), adding up to 1 in every group.
        scaled: whether they are divided by the group's weighted standard deviation, plus 1e-4.
    """
    exact, shares = (earned - earned[:, :1]).double(), weights.double()  # equal rewards are exactly 0 so
    against = exact - (shares * exact).sum(dim=1, keepdim=True)
    if scaled:
        against = against / ((shares * against.square()).sum(dim=1, keepdim=True).sqrt() + 1e-4)
    return (earned.shape[1] * shares * against).to(earned.dtype)
