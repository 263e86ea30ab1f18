"""Histories that lie one after another, without padding: there and back.

T tokens of B histories; history b is offsets[b]:offsets[b + 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def offsets_of(mask: Tensor) -> Tensor:
    """(B, S), true where there is an item -> (B + 1,) int64."""
    return F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0))


def places_in(offsets: Tensor, tokens: int) -> Tensor:
    """(T,) each token's place in its own history, counted from 0.

    >>> places_in(torch.tensor([0, 2, 2, 5]), 5)
    tensor([0, 1, 0, 1, 2])
    """
    starts = offsets[:-1].repeat_interleave(offsets.diff(), output_size=tokens)
    return torch.arange(tokens, device=offsets.device) - starts


def without_padding(padded: Tensor, mask: Tensor | None) -> Tensor:
    """(B, S, …) -> (T, …): what stands where the mask (B, S) is true, in order; None: everything."""
    return padded.flatten(0, 1) if mask is None else padded[mask]


def with_padding(tokens: Tensor, mask: Tensor) -> Tensor:
    """(T, …) -> (B, S, …): the tokens in order where the mask (B, S) is true, zeros elsewhere."""
    inner = tokens.shape[1:]
    return tokens.new_zeros(*mask.shape, *inner).masked_scatter(mask.reshape(*mask.shape, *(1 for _ in inner)), tokens)
