"""Shares of the training users: what a model learns from, while what it is asked about stays as it is."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from llmrec.data.split import Split
from llmrec.exceptions import DataError

Mask = npt.NDArray[np.bool_]


def check_share(share: float, seed: int) -> None:
    """Raises DataError for a share outside (0, 1], or a negative seed."""
    if not 0 < share <= 1:
        raise DataError(f"--train_share is {share}. Give a share of the training users above 0, and at most 1.")
    if seed < 0:
        raise DataError(f"--train_share_seed is {seed}, but a seed is not negative. Give 0 or more.")


def training_users(split: Split, share: float, seed: int = 0) -> Mask:
    """(U,) which users' training interactions are learnt from: so many of those who have any, drawn without return.

    With one seed the shares are nested: the users of a smaller one are among those of a larger one, so that what more
    data bring is not mixed up with whose data they are. The number of users is rounded, and never 0.

    Args:
        split: whose users.
        share: of the users that have training interactions, in (0, 1].
        seed: of the draw.

    Raises:
        DataError: if the share or the seed is none.
    """
    check_share(share, seed)
    candidates = np.flatnonzero(split.train_ends > split.offsets[:-1])
    drawn = np.random.default_rng(seed).permutation(candidates)
    chosen = np.zeros(len(split.all_users), dtype=bool)
    chosen[drawn[: max(1, round(share * len(candidates)))]] = True
    return chosen


def learnt_split(split: Split, share: float, seed: int = 0) -> Split:
    """The split of which only a share of the users (`training_users`) has training interactions.

    Users, items, interactions, cases and their histories are the same; only `train_ends`, and what follows from it
    (training sequences, counts, the content hash), are not. All of the users give the very split.

    Raises:
        DataError: if the share or the seed is none.
    """
    check_share(share, seed)
    if share == 1:
        return split
    chosen = training_users(split, share, seed)
    return replace(split, train_ends=np.where(chosen, split.train_ends, split.offsets[:-1]))


def learnt_events(split: Split, longest: int | None = None) -> Mask:
    """(M,) which interactions a next-item model sees in training, as an input or as a target.

    All of a training sequence, or its last `longest`. A sequence of one interaction has nothing that follows: it is
    none.

    Args:
        split: whose training part.
        longest: for windows of the latest items alone, the inputs of a window and one more; None: all.
    """
    lengths = split.train_ends - split.offsets[:-1]
    kept = lengths if longest is None else np.minimum(lengths, longest)
    begins = np.where(lengths >= 2, split.train_ends - kept, split.train_ends)
    places = np.arange(len(split.rows))
    seen: Mask = (places >= begins[split.owner]) & split.in_training
    return seen


def drawn_cases(split: Split, size: int) -> npt.NDArray[np.int64]:
    """Test cases, ascending: all of them (-1), none (0), or some drawn alike whatever the training's seed."""
    cases = np.arange(len(split.targets("test")))
    if size < 0 or size >= len(cases):
        return cases
    return np.sort(np.random.default_rng(0).permutation(cases)[:size])
