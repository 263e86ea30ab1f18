"""Which candidates of a level go on as beams: the best, the best under a cap for variety, or drawn ones.

A draw is stochastic beam search (Kool, van Hoof and Welling 2019, "Stochastic Beams and Where to Find Them", arXiv
1903.06059, Algorithm 1): every item's log-probability is perturbed by Gumbel noise, and the search finds the W items
that are greatest so, which is a draw without replacement. A node's perturbed log-probability is the greatest of its
items', so children are perturbed on the condition that their greatest is their parent's.
"""

import math
from dataclasses import dataclass

import torch

from llmrec.exceptions import RequestError

# Steps and multipliers of splitmix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators").
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_FAINTEST = -1e300  # log-probability, over temperature, of what is possible at all


@dataclass(frozen=True)
class PrefixCap:
    """At most `most` items that have their first `levels` codes in common.

    At every level from `levels` on, all candidates are gone through from the best (those of equal score by node): one
    is kept unless `most` kept ones share its first `levels` codes already, until W are kept. The level below the codes
    that tells items of one code apart counts as a level. Fewer than W items may be found.

    Attributes:
        levels: from 1 to L; a search refuses more.
        most: at least 1.
    """

    levels: int
    most: int

    def __post_init__(self) -> None:
        if self.levels < 1 or self.most < 1:
            raise RequestError(f"A cap of {self.most} items on {self.levels} levels keeps none. Give both, from 1 on.")


def require_levels(cap_levels: int, levels: int) -> None:
    """Raises RequestError for a cap on more levels than items have."""
    if cap_levels > levels:
        raise RequestError(
            f"A cap on the first {cap_levels} levels does not fit items of {levels}. Give fewer levels."
        )


@dataclass(frozen=True)
class Draw:
    """Items are drawn without replacement, in the order of the draw, in the place of the best ones.

    The first is drawn from the distribution in which the code that follows a prefix has a probability proportional to
    P(code | prompt, prefix) ^ (1 / temperature), over the codes that lead to an item that may be returned; each
    further one likewise, from the items that are left. Items of one code are equally probable. The noise is a function
    of the seed and of an item's codes alone: not of its place in a batch or a beam, of other items, or of the device.

    Attributes:
        temperature: finite, above 0; the lower, the more the draw is the plain search.
        seed: any integer; modulo 2^64.
    """

    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise RequestError(f"The temperature of a draw is {self.temperature}. Give a finite number above 0.")


def best_in_order(candidate: torch.Tensor, width: int) -> torch.Tensor:
    """(B, width) places of the `width` greatest entries of each row (B, n), places ascending; ties go to the left.

    Beams are kept in the order of their nodes, so candidates lie in the order of theirs and left means lower code.
    A stable sort of all candidates would say the same with more work; `topk` alone leaves the order of ties open. But
    it matters only where the last entry kept and the first one left out are equal.
    """
    if width == candidate.shape[1]:
        return torch.arange(width, device=candidate.device).expand(candidate.shape)
    greatest, place = candidate.topk(width + 1, dim=1)
    if bool((greatest[:, -2] > greatest[:, -1]).all()):
        return place[:, :width].sort(dim=1).values
    threshold = greatest[:, -2:-1]
    above, tied = candidate > threshold, candidate == threshold
    keep = above | (tied & (tied.cumsum(1) <= width - above.sum(1, keepdim=True)))
    return keep.nonzero()[:, 1].view(-1, width)


def beyond_cap(candidate: torch.Tensor, branch: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Which candidates (B, n) are not among the `most` (B, 1) greatest of their branch (B, n); ties go to the left.

    What a walk from the best candidate on keeps, see `PrefixCap`, are the first `most` of every branch.
    """
    order = candidate.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, branch.gather(1, order).argsort(dim=1, stable=True))  # by branch, the best first
    sorted_branch = branch.gather(1, order)
    place = torch.arange(candidate.shape[1], device=candidate.device).expand_as(order)
    begins = torch.ones_like(sorted_branch, dtype=torch.bool)
    begins[:, 1:] = sorted_branch[:, 1:] != sorted_branch[:, :-1]
    rank = place - torch.where(begins, place, 0).cummax(dim=1).values
    return torch.empty_like(begins).scatter_(1, order, rank >= most)


def tempered(found: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (B, W, C) float64 of a draw, given those of the model, -inf for what is not legal."""
    best = found.amax(dim=-1, keepdim=True)
    scaled = (found.double() - torch.where(torch.isinf(best), 0.0, best)) / temperature.view(-1, 1, 1)
    scaled = torch.where(torch.isinf(found), -torch.inf, scaled.clamp(min=_FAINTEST))
    total = scaled.logsumexp(-1, keepdim=True)
    return scaled - torch.where(torch.isinf(total), 0.0, total)


def perturbed(log_probability: torch.Tensor, noise: torch.Tensor, greatest: torch.Tensor) -> torch.Tensor:
    """Children's perturbed log-probabilities (B, W, C), whose maximum over C is their parents' `greatest` (B, W).

    Args:
        log_probability: (B, W, C) float64 of whole prefixes, -inf for what is not legal.
        noise: (B, W, C) standard Gumbel.
        greatest: (B, W) float64.

    The numerically stable form of the paper's appendix B.3; illegal ones are -inf.
    """
    free = log_probability + noise
    most = free.amax(dim=-1, keepdim=True)
    parent = greatest.unsqueeze(-1)
    below = parent - free + _log1mexp(free - most)
    found = parent - below.clamp(min=0.0) - torch.log1p(torch.exp(-below.abs()))
    return found.masked_fill(torch.isinf(log_probability) | found.isnan(), -torch.inf)


def seeded(seeds: torch.Tensor) -> torch.Tensor:
    """(B,) int64 the keys of the roots, from seeds (B,) int64."""
    return _mixed(seeds + _signed(_STEP))


def keys_of_children(keys: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """(…, C) int64 keys of the children with these codes (…, C), of parents with these keys (…)."""
    return _mixed(keys.unsqueeze(-1) + (codes + 1) * _signed(_STEP))


def gumbel(keys: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64, one for each key."""
    return -torch.log(-torch.log(uniform(keys)))


def uniform(keys: torch.Tensor) -> torch.Tensor:
    """Numbers from (0, 1), float64, one for each key: 52 bits and a half, so that neither end is reached."""
    return ((_shifted(_mixed(keys ^ _signed(_FIRST)), 12)).double() + 0.5) * 2.0**-52


def _mixed(keys: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser, modulo 2^64 in int64: integers alone, the same on every device."""
    keys = (keys ^ _shifted(keys, 30)) * _signed(_FIRST)
    keys = (keys ^ _shifted(keys, 27)) * _signed(_SECOND)
    return keys ^ _shifted(keys, 31)


def _shifted(keys: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifted to the right, zeros moving in; int64's own shift copies the sign."""
    return (keys >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


def seeds_of(draws: "list[Draw]", device: torch.device) -> torch.Tensor:
    """(B,) int64 seeds, modulo 2^64."""
    return torch.tensor([_signed(draw.seed) for draw in draws], device=device)


def _log1mexp(values: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(values)) of values at most 0, precise at both ends."""
    near = values > -math.log(2.0)
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, values, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, values))),
    )
