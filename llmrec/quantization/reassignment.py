"""Dealing out the last codes anew: what every choice costs, and the least costly one without a code given twice."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from llmrec.quantization.nearest import squared_distances
from llmrec.quantization.quantizer import Quantizer

# Numbers of a matrix held at once: 4 M float64 are 32 MB.
ENTRIES = 4_000_000
# Relative error of a cost that is found by a matrix product of float32 points' sums; far above the real one.
ROUGH = 1e-6

Level = npt.NDArray[np.int64]


def last_level_costs(
    vectors: npt.NDArray[np.float64], codes: npt.NDArray[np.integer], quantizer: Quantizer
) -> npt.NDArray[np.float64]:
    """(n, D), (n, L) -> (n, K_L): the squared distance of each vector to each point that its prefix leads to.

    A point is what `quantizer.decode` gives for the prefix and a last code. Where the quantizer has a method
    `level_points(level) -> (K, D)`, of which `decode` is the sum over the levels, one matrix product finds them all;
    else every candidate of every different prefix is decoded. Costs are right within ROUGH times the sum of the
    vector's squared norm and the cost.
    """
    size = quantizer.codebook_sizes[-1]
    points_of = getattr(quantizer, "level_points", None)
    if points_of is not None:
        tables = [np.asarray(points_of(level), dtype=np.float64) for level in range(codes.shape[1])]
        left = vectors.copy()
        for level, table in enumerate(tables[:-1]):
            left -= table[codes[:, level]]
        return _squared(left, tables[-1])
    costs = np.empty((len(vectors), size))
    prefixes, group = np.unique(codes[:, :-1], axis=0, return_inverse=True)
    group = group.reshape(-1)
    together = max(1, ENTRIES // (size * vectors.shape[1]))
    for begin in range(0, len(prefixes), together):
        part = prefixes[begin : begin + together]
        candidates = np.column_stack([np.repeat(part, size, axis=0), np.tile(np.arange(size), len(part))])
        points = quantizer.decode(candidates).astype(np.float64).reshape(len(part), size, -1)
        for place, decoded in enumerate(points):
            rows = np.flatnonzero(group == begin + place)
            costs[rows] = _squared(vectors[rows], decoded)
    return costs


def reassign(
    codes: npt.NDArray[np.int32],
    vectors: npt.NDArray[np.floating],
    quantizer: Quantizer,
    groups: list[npt.NDArray[np.int64]],
) -> npt.NDArray[np.int32]:
    """The codes with the last ones of each group dealt out anew, none twice, at the least sum of squared errors.

    A group of n items needs at most the n cheapest codes of each of its items: if an item holds another one in an
    optimal assignment, the n - 1 other items leave one of its n cheapest free, for which it can be exchanged at no
    loss. So the assignment among these (all that rounding leaves possible) is an optimal one among all K.

    Args:
        codes: (N, L).
        vectors: (N, D).
        quantizer: see `last_level_costs`; what decides are the distances to what it decodes.
        groups: rows that share a prefix of L - 1 codes, not more than the last level has codes.
    """
    resolved = codes.copy()
    size = quantizer.codebook_sizes[-1]
    for batch in _batches(groups, max(1, ENTRIES // max(size, vectors.shape[1]))):
        rows = np.concatenate(batch)
        wide = np.asarray(vectors[rows], dtype=np.float64)
        rough = last_level_costs(wide, codes[rows], quantizer)
        norms = np.einsum("nd,nd->n", wide, wide)
        ends = np.cumsum([len(group) for group in batch])
        shortlists = [
            _shortlist(rough[end - len(group) : end], norms[end - len(group) : end])
            for group, end in zip(batch, ends, strict=True)
        ]
        first = np.repeat([group[0] for group in batch], [len(shortlist) for shortlist in shortlists])
        candidates = np.column_stack([codes[first, :-1], np.concatenate(shortlists)])
        for group, end, shortlist, points in zip(
            batch, ends, shortlists, _decoded(candidates, shortlists, quantizer), strict=True
        ):
            own = wide[end - len(group) : end]
            items, chosen = linear_sum_assignment(squared_distances(own[:, None], points[None]))
            resolved[group[items], -1] = shortlist[chosen]
    return resolved


def _shortlist(costs: npt.NDArray[np.float64], norms: npt.NDArray[np.float64]) -> Level:
    """The codes that are among the n cheapest of any of the n items, as far as rough costs (n, K) tell."""
    items = len(costs)
    if items >= costs.shape[1]:
        return np.arange(costs.shape[1])
    limit = np.partition(costs, items - 1, axis=1)[:, items - 1]
    limit += 2 * ROUGH * (norms + np.maximum(limit, 0))
    return np.flatnonzero((costs <= limit[:, None]).any(axis=0))


def _decoded(
    candidates: npt.NDArray[Any], shortlists: list[Level], quantizer: Quantizer
) -> Iterator[npt.NDArray[Any]]:
    """The points of each group's candidates, decoded many groups at a time."""
    begin = 0
    for part in _batches(shortlists, 65_536):
        end = begin + sum(map(len, part))
        points = quantizer.decode(candidates[begin:end])
        yield from np.split(points, np.cumsum([len(shortlist) for shortlist in part])[:-1])
        begin = end


def _batches(groups: list[npt.NDArray[np.int64]], most: int) -> Iterator[list[npt.NDArray[np.int64]]]:
    """Runs of groups of at most `most` entries in all, or of one group."""
    batch: list[npt.NDArray[np.int64]] = []
    held = 0
    for group in groups:
        if batch and held + len(group) > most:
            yield batch
            batch, held = [], 0
        batch.append(group)
        held += len(group)
    if batch:
        yield batch


def _squared(vectors: npt.NDArray[np.float64], points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(n, D), (K, D) -> (n, K) squared distances by a matrix product, none below 0."""
    costs = -2 * (vectors @ points.T)
    costs += np.einsum("nd,nd->n", vectors, vectors)[:, None] + np.einsum("kd,kd->k", points, points)
    return np.maximum(costs, 0)
