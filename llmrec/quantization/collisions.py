"""Collisions: items that share a code, and making every code unique."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from llmrec.exceptions import TokenizerError
from llmrec.quantization.quantizer import Quantizer, as_vectors

Policy = Literal["auto", "reassign", "append"]


@dataclass(frozen=True)
class CollisionReport:
    """What collided and what was done.

    Attributes:
        policy: "none" if all codes were unique, else "reassign" or "append".
        items: N.
        unique_codes_before: how many different codes the quantizer gave.
        sharing_items: items whose code another item had too.
        sharing_rate: sharing_items / N.
        collision_rate: 1 - unique_codes_before / N, the items beyond unique codes.
        largest_group: the most items on one code.
        largest_prefix_group: the most items on one prefix of L - 1 codes, which decides what "auto" takes.
        moved_items: items whose code of the quantizer's levels was changed.
        distortion_before: mean squared distance of an item to its code's point, as quantised.
        added_distortion: what the moves added to that mean.
        tokens_per_item: levels after resolution.
        codebook_sizes: K_l after resolution.
        used_codes: how many codes of each level some item has.
    """

    policy: Literal["none", "reassign", "append"]
    items: int
    unique_codes_before: int
    sharing_items: int
    sharing_rate: float
    collision_rate: float
    largest_group: int
    largest_prefix_group: int
    moved_items: int
    distortion_before: float
    added_distortion: float
    tokens_per_item: int
    codebook_sizes: list[int]
    used_codes: list[int]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ResolvedCodes:
    """Unique codes (N, L) int32, their levels' sizes, and the report."""

    codes: npt.NDArray[np.int32]
    codebook_sizes: tuple[int, ...]
    report: CollisionReport


def resolve_collisions(
    codes: npt.NDArray[np.integer],
    embeddings: npt.NDArray[np.floating],
    quantizer: Quantizer,
    policy: Policy = "auto",
) -> ResolvedCodes:
    """Makes every item's code unique.

    "reassign": within each group of items with one prefix of L - 1 codes in which codes collide, the last-level codes
    are dealt out anew, each at most once, so that the sum of squared distances between items and their codes' points
    is the least possible (a linear assignment problem). Groups without a collision stay as they are.

    "append": one more level for all items, so that codes keep one length. Its digit is the item's rank in row order
    among those with the same code; items that are appended to the catalog later change no digit.

    "auto": reassign if every prefix group fits into the last codebook, else append.

    Args:
        codes: (N, L) as the quantizer gave them.
        embeddings: (N, D) what it quantised.
        quantizer: its `decode` and `codebook_sizes` are used.
        policy: see above.

    Raises:
        TokenizerError: if "reassign" is asked for and a prefix group has more items than the last level has codes, or
            the inputs do not fit together.
    """
    if policy not in get_args(Policy):
        raise TokenizerError(f"There is no collision policy {policy!r}. Use one of {', '.join(get_args(Policy))}.")
    vectors = as_vectors(embeddings)
    sizes = quantizer.codebook_sizes
    original: npt.NDArray[np.int32] = np.asarray(codes, dtype=np.int32)
    if original.shape != (len(vectors), len(sizes)):
        raise TokenizerError(
            f"Codes of shape {original.shape} do not belong to {len(vectors)} embeddings and {len(sizes)} levels. "
            "Encode these embeddings with this quantizer."
        )
    group, group_sizes = _groups(original)
    prefix, prefix_sizes = _groups(original[:, :-1])
    collides = group_sizes[group] > 1
    distances = _squared_distances(vectors, quantizer.decode(original))

    resolved = original
    taken: Literal["none", "reassign", "append"] = "none"
    if collides.any():
        crowded = np.flatnonzero(prefix_sizes > sizes[-1])
        if policy == "append" or (policy == "auto" and len(crowded)):
            resolved, taken = np.column_stack([original, _ranks(group)]), "append"
            sizes = (*sizes, int(group_sizes.max()))
        elif len(crowded):
            row = int(np.flatnonzero(prefix == crowded[0])[0])
            raise TokenizerError(
                f"{prefix_sizes[crowded[0]]} items share the prefix {original[row, :-1].tolist()}, the last level has "
                f"{sizes[-1]} codes. Use the policy 'append' or 'auto', or larger codebooks."
            )
        else:
            resolved, taken = _reassign(original, vectors, quantizer, prefix, np.unique(prefix[collides])), "reassign"
    if len(np.unique(resolved, axis=0)) != len(resolved):
        raise TokenizerError(f"Codes are not unique after {taken!r}. This is a bug of llmrec: please report it.")

    levels = original.shape[1]
    moved = (resolved[:, :levels] != original).any(axis=1)
    added = _squared_distances(vectors[moved], quantizer.decode(resolved[moved, :levels])) - distances[moved]
    report = CollisionReport(
        policy=taken,
        items=len(original),
        unique_codes_before=len(group_sizes),
        sharing_items=int(collides.sum()),
        sharing_rate=float(collides.mean()),
        collision_rate=1 - len(group_sizes) / len(original),
        largest_group=int(group_sizes.max()),
        largest_prefix_group=int(prefix_sizes.max()),
        moved_items=int(moved.sum()),
        distortion_before=float(distances.mean()),
        added_distortion=float(added.sum() / len(original)),
        tokens_per_item=resolved.shape[1],
        codebook_sizes=list(sizes),
        used_codes=[len(np.unique(level)) for level in resolved.T],
    )
    return ResolvedCodes(np.ascontiguousarray(resolved, dtype=np.int32), tuple(sizes), report)


def _reassign(
    codes: npt.NDArray[np.int32],
    vectors: npt.NDArray[np.float64],
    quantizer: Quantizer,
    prefix: npt.NDArray[np.int64],
    colliding: npt.NDArray[np.int64],
) -> npt.NDArray[np.int32]:
    resolved = codes.copy()
    size = quantizer.codebook_sizes[-1]
    order = np.argsort(prefix, kind="stable")
    begins = np.searchsorted(prefix[order], colliding)
    ends = np.searchsorted(prefix[order], colliding, side="right")
    for begin, end in zip(begins, ends, strict=True):
        rows = order[begin:end]
        candidates = np.repeat(codes[rows[:1]], size, axis=0)
        candidates[:, -1] = np.arange(size)
        points = quantizer.decode(candidates).astype(np.float64)  # (K, D)
        costs = np.stack([_squared_distances(vectors[row], points) for row in rows])  # (n, K)
        items, chosen = linear_sum_assignment(costs)
        resolved[rows[items], -1] = chosen
    return resolved


def _groups(codes: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Group of every row of equal rows, (N,), and the groups' sizes; no columns are one group."""
    if codes.shape[1] == 0:
        return np.zeros(len(codes), dtype=np.int64), np.array([len(codes)])
    _, group, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return group.reshape(-1).astype(np.int64), sizes.astype(np.int64)


def _ranks(group: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The place of every row among those of its group, in row order.

    >>> _ranks(np.array([1, 0, 1, 1, 0])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = np.argsort(group, kind="stable")
    in_order = group[order]
    ranks = np.empty(len(group), dtype=np.int32)
    ranks[order] = np.arange(len(group)) - np.searchsorted(in_order, in_order)
    return ranks


def _squared_distances(vectors: npt.NDArray[np.float64], points: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    return np.asarray(((vectors - points) ** 2).sum(axis=-1), dtype=np.float64)
