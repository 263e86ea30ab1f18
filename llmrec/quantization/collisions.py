"""Collisions: items that share a code, and what is done about it."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import TokenizerError
from llmrec.quantization.nearest import check_matrix, chunks, squared_distances
from llmrec.quantization.quantizer import Quantizer
from llmrec.quantization.reassignment import ENTRIES, last_level_costs, reassign
from llmrec.quantization.sinkhorn import uniform_mapping

Policy = Literal["auto", "reassign", "append", "sinkhorn", "allow"]
Taken = Literal["none", "reassign", "append", "sinkhorn", "allow"]

# LC-Rec's rounds of the uniform mapping.
SINKHORN_ROUNDS = 20


@dataclass(frozen=True)
class CollisionReport:
    """What collided and what was done.

    Attributes:
        policy: "none" if all codes were unique, else "reassign", "append", "sinkhorn" or "allow".
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
        sharing_items_after: items whose code another item has too, after resolution; 0 unless "allow".
        collision_rate_after: the items beyond unique codes after resolution, divided by N; 0 unless "allow".
        sinkhorn_rounds: how many rounds of the uniform mapping were made.
        sharing_items_sinkhorn: items that still shared a code after them, which the second step dealt with.
        second_step: what dealt with them: "reassign", "append", or "none".
    """

    policy: Taken
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
    sharing_items_after: int = 0
    collision_rate_after: float = 0.0
    sinkhorn_rounds: int = 0
    sharing_items_sinkhorn: int = 0
    second_step: Literal["none", "reassign", "append"] = "none"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ResolvedCodes:
    """Codes (N, L) int32, unique unless the policy is "allow"; their levels' sizes, and the report."""

    codes: npt.NDArray[np.int32]
    codebook_sizes: tuple[int, ...]
    report: CollisionReport


def resolve_collisions(
    codes: npt.NDArray[np.integer],
    embeddings: npt.NDArray[np.floating],
    quantizer: Quantizer,
    policy: Policy = "auto",
) -> ResolvedCodes:
    """Makes every item's code unique, except with "allow".

    "reassign": within each group of items with one prefix of L - 1 codes in which codes collide, the last-level codes
    are dealt out anew, each at most once, so that the sum of squared distances between items and their codes' points
    is the least possible (a linear assignment problem). Groups without a collision stay as they are.

    "append": one more level for all items, so that codes keep one length (TIGER). Its digit is the item's rank in row
    order among those with the same code; items that are appended to the catalog later change no digit.

    "auto": reassign if every prefix group fits into the last codebook, else append.

    "sinkhorn": LC-Rec's uniform mapping. The items of each code that collides get last-level codes from a transport
    plan between them and all K codes of the level (`uniform_mapping`), in up to 20 rounds, each for what collides
    then; it ends early if a round changes nothing. What still collides, such as items with equal embeddings, which
    no plan tells apart, is dealt with as in "auto".

    "allow": codes stay as they are; the report says how many items share one. A `CatalogTrie` refuses them.

    Args:
        codes: (N, L) as the quantizer gave them.
        embeddings: (N, D) what it quantised; a memory map is not held in memory as a whole.
        quantizer: its `decode` and `codebook_sizes` are used, and `level_points` if it has that (`last_level_costs`).
        policy: see above.

    Raises:
        TokenizerError: if "reassign" is asked for and a prefix group has more items than the last level has codes, or
            the inputs do not fit together.
    """
    if policy not in get_args(Policy):
        raise TokenizerError(f"There is no collision policy {policy!r}. Use one of {', '.join(get_args(Policy))}.")
    vectors = check_matrix(embeddings)
    sizes = quantizer.codebook_sizes
    original: npt.NDArray[np.int32] = np.asarray(codes, dtype=np.int32)
    if original.shape != (len(vectors), len(sizes)):
        raise TokenizerError(
            f"Codes of shape {original.shape} do not belong to {len(vectors)} embeddings and {len(sizes)} levels. "
            "Encode these embeddings with this quantizer."
        )
    group, group_sizes = _groups(original)
    collides = group_sizes[group] > 1
    _, prefix_sizes = _groups(original[:, :-1])

    resolved, rounds, left = original, 0, 0
    taken: Taken = "none"
    second: Literal["none", "reassign", "append"] = "none"
    if collides.any():
        if policy == "allow":
            taken = "allow"
        elif policy == "sinkhorn":
            resolved, rounds = _map_uniformly(original, vectors, quantizer)
            again, again_sizes = _groups(resolved)
            left = int((again_sizes[again] > 1).sum())
            taken = "sinkhorn"
            if left:
                resolved, sizes, second = _separate(resolved, vectors, quantizer, "auto")
        else:
            resolved, sizes, taken = _separate(original, vectors, quantizer, policy)
    after, after_sizes = _groups(resolved)
    sharing_after = int((after_sizes[after] > 1).sum())
    if sharing_after and policy != "allow":
        raise TokenizerError(f"Codes are not unique after {taken!r}. This is a bug of llmrec: please report it.")

    levels = original.shape[1]
    moved = np.flatnonzero((resolved[:, :levels] != original).any(axis=1))
    distances = _distortions(original, vectors, quantizer)
    added = _distortions(resolved[moved, :levels], vectors[moved], quantizer) - distances[moved]
    report = CollisionReport(
        policy=taken,
        items=len(original),
        unique_codes_before=len(group_sizes),
        sharing_items=int(collides.sum()),
        sharing_rate=float(collides.mean()),
        collision_rate=1 - len(group_sizes) / len(original),
        largest_group=int(group_sizes.max()),
        largest_prefix_group=int(prefix_sizes.max()),
        moved_items=len(moved),
        distortion_before=float(distances.mean()),
        added_distortion=float(added.sum() / len(original)),
        tokens_per_item=resolved.shape[1],
        codebook_sizes=list(sizes),
        used_codes=[len(np.unique(level)) for level in resolved.T],
        sharing_items_after=sharing_after,
        collision_rate_after=1 - len(after_sizes) / len(original),
        sinkhorn_rounds=rounds,
        sharing_items_sinkhorn=left,
        second_step=second,
    )
    return ResolvedCodes(np.ascontiguousarray(resolved, dtype=np.int32), tuple(sizes), report)


def compare_policies(
    codes: npt.NDArray[np.integer],
    embeddings: npt.NDArray[np.floating],
    quantizer: Quantizer,
    policies: Sequence[Policy] = ("allow", "append", "reassign", "sinkhorn"),
) -> list[dict[str, Any]]:
    """What each policy would do: a table with one row per policy, and nothing is decided.

    Args:
        codes, embeddings, quantizer: as for `resolve_collisions`.
        policies: the rows.

    Returns:
        JSON-ready rows: "policy" as asked for, "possible", "why_not" (None, or why it is not possible, and then what
        it would do is None too), "collision_rate_before", "collision_rate_after", "sharing_items_before",
        "sharing_items_after", "moved_items", "added_distortion" (to the mean squared error), "added_share" (the same
        divided by that error as quantised; None if that is 0), "tokens_per_item", "second_step", "seconds".

    Raises:
        TokenizerError: for an unknown policy, or inputs that do not fit together.
    """
    rows: list[dict[str, Any]] = []
    allowed = resolve_collisions(codes, embeddings, quantizer, "allow").report
    for policy in policies:
        row: dict[str, Any] = {
            "policy": policy,
            "possible": True,
            "why_not": None,
            "collision_rate_before": allowed.collision_rate,
            "sharing_items_before": allowed.sharing_items,
        }
        begun = time.perf_counter()
        if (
            policy == "reassign"
            and allowed.sharing_items
            and allowed.largest_prefix_group > quantizer.codebook_sizes[-1]
        ):
            why = f"{allowed.largest_prefix_group} items share a prefix, {quantizer.codebook_sizes[-1]} last codes"
            rows.append({**row, "possible": False, "why_not": why, **dict.fromkeys(OUTCOMES)})
            continue
        report = resolve_collisions(codes, embeddings, quantizer, policy).report
        seconds = time.perf_counter() - begun
        share = report.added_distortion / report.distortion_before if report.distortion_before else None
        rows.append({**row, **{key: getattr(report, key, None) for key in OUTCOMES}, "added_share": share})
        rows[-1]["seconds"] = seconds
    return rows


OUTCOMES = (
    *("collision_rate_after", "sharing_items_after", "moved_items", "added_distortion", "added_share"),
    *("tokens_per_item", "second_step", "seconds"),
)


def _separate(
    codes: npt.NDArray[np.int32],
    vectors: npt.NDArray[np.floating],
    quantizer: Quantizer,
    policy: Policy,
) -> tuple[npt.NDArray[np.int32], tuple[int, ...], Literal["reassign", "append"]]:
    """Unique codes by reassignment or an appended digit, their levels' sizes, and which of the two it was."""
    sizes = quantizer.codebook_sizes
    group, group_sizes = _groups(codes)
    prefix, prefix_sizes = _groups(codes[:, :-1])
    crowded = np.flatnonzero(prefix_sizes > sizes[-1])
    if policy == "append" or (policy == "auto" and len(crowded)):
        return np.column_stack([codes, _ranks(group)]), (*sizes, int(group_sizes.max())), "append"
    if len(crowded):
        row = int(np.flatnonzero(prefix == crowded[0])[0])
        raise TokenizerError(
            f"{prefix_sizes[crowded[0]]} items share the prefix {codes[row, :-1].tolist()}, the last level has "
            f"{sizes[-1]} codes. Use the policy 'append' or 'auto', or larger codebooks."
        )
    colliding = np.unique(prefix[group_sizes[group] > 1])
    return reassign(codes, vectors, quantizer, _members(prefix, colliding)), sizes, "reassign"


def _map_uniformly(
    codes: npt.NDArray[np.int32], vectors: npt.NDArray[np.floating], quantizer: Quantizer
) -> tuple[npt.NDArray[np.int32], int]:
    """LC-Rec's rounds: codes, of which some may still collide, and how many rounds there were."""
    resolved = codes.copy()
    for made in range(1, SINKHORN_ROUNDS + 1):
        group, sizes = _groups(resolved)
        before = resolved.copy()
        for size in np.unique(sizes[sizes > 1]).tolist():
            # Groups of one size are solved together.
            rows = np.stack(_members(group, np.flatnonzero(sizes == size)))
            together = max(1, ENTRIES // (size * max(quantizer.codebook_sizes[-1], vectors.shape[1])))
            for part in chunks(len(rows), together):
                flat = rows[part].reshape(-1)
                costs = last_level_costs(np.asarray(vectors[flat], dtype=np.float64), before[flat], quantizer)
                mapped = uniform_mapping(costs.reshape(-1, size, costs.shape[1]))
                resolved[flat, -1] = mapped.reshape(-1)
        if (resolved == before).all() or _groups(resolved)[1].max() == 1:
            return resolved, made
    return resolved, SINKHORN_ROUNDS


def _groups(codes: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Group of every row of equal rows, (N,), and the groups' sizes; no columns are one group."""
    if codes.shape[1] == 0:
        return np.zeros(len(codes), dtype=np.int64), np.array([len(codes)])
    radices = codes.max(axis=0).astype(object) + 1
    if codes.min() >= 0 and int(np.prod(radices)) < 2**62:
        # One number per row, in the rows' order, sorts many times faster.
        keys = np.zeros(len(codes), dtype=np.int64)
        for level, radix in zip(codes.T, radices, strict=True):
            keys = keys * int(radix) + level
        _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    else:
        _, group, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return group.reshape(-1).astype(np.int64), sizes.astype(np.int64)


def _members(group: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The rows of each wanted group, in row order.

    >>> [rows.tolist() for rows in _members(np.array([1, 0, 1, 2]), np.array([1, 2]))]
    [[0, 2], [3]]
    """
    order = np.argsort(group, kind="stable")
    begins = np.searchsorted(group[order], wanted)
    ends = np.searchsorted(group[order], wanted, side="right")
    return [order[begin:end] for begin, end in zip(begins, ends, strict=True)]


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


def _distortions(
    codes: npt.NDArray[np.int32], vectors: npt.NDArray[np.floating], quantizer: Quantizer
) -> npt.NDArray[np.float64]:
    """(n,) squared distances of the vectors to their codes' points."""
    found = np.empty(len(codes))
    for rows in chunks(len(codes)):
        found[rows] = squared_distances(vectors[rows], quantizer.decode(codes[rows]))
    return found
