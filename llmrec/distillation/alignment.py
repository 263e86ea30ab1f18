"""How far a student's hidden states are from its teacher's, in direction and in length (SLMRec, arXiv 2405.17890).

Of states h of the student and t of the teacher at one place and one supervision point, of width D:

    cosine = 1 - h · t / (|h| |t|) = ½ |h/|h| - t/|t||²
    norm   = |h - t|² / D

The second form of the cosine is exactly 0, and so is its gradient, where the two states are equal. SLMRec takes the
squared distance itself; a D-th of it is the same for a weight that does not hang on the width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_LEAST = 1e-12  # of a length: a state of zeros has no direction, and no gradient that is none


class Alignment(NamedTuple):
    """Distances of P places, summed over them.

    Attributes:
        cosine: of directions, from 0 to 2 each.
        norm: of the states themselves, 0 or more each.
    """

    cosine: Tensor
    norm: Tensor


def align(student: Tensor, teacher: Tensor) -> Alignment:
    """The distances of states (P, D) from states (P, D), in float32 at least; the teacher's get no gradient.

    >>> found = align(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    >>> float(found.cosine), float(found.norm)
    (1.0, 6.5)
    """
    exact = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    own, other = student.to(exact), teacher.detach().to(exact)
    apart = _direction(own) - _direction(other)
    return Alignment(apart.square().sum() / 2, (own - other).square().sum() / max(1, student.shape[-1]))


def _direction(states: Tensor) -> Tensor:
    return states / states.square().sum(-1, keepdim=True).clamp(min=_LEAST**2).sqrt()
