"""Loops that numpy has no words for, compiled by numba: how llmrec asks for it."""

from collections.abc import Callable
from typing import TypeVar

import numba

Loop = TypeVar("Loop", bound=Callable[..., object])


def compiled(loop: Loop) -> Loop:
    """The function as machine code, made at its first call and kept beside its file, or else in the user's cache.

    Where neither can be written, as in some containers, every process compiles anew. What is kept is known by its
    file alone: a compiled function may call others of its own file, none of another, because a change there would go
    unnoticed.
    """
    try:
        kept: Loop = numba.njit(cache=True)(loop)
    except RuntimeError:  # there is no place to keep it
        kept = numba.njit(loop)
    return kept
