"""The items nearest to queries: exact search over the whole table, in chunks, and faiss where it is asked for.

Scores are log-probabilities. Over the "vocabulary" they are normalised over all rows of the table, those of retired
items among them, as the softmax of the training was: what may not be recommended takes part in the sum, as it does
with a language model's tokens. Over "legal" items, the sum is over those alone that may be returned. Items come in the
order of their scores, equal ones in the order of their rows.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from llmrec.exceptions import DependencyError, RequestError
from llmrec.selection import Draw, best_in_order, gumbel, keys_of_children, perturbed, seeded, seeds_of, tempered

Retrieval = Literal["exact", "faiss-flat", "faiss-ivf", "faiss-hnsw"]

# So many logits of a batch are held at once.
_CHUNK = 1 << 22
_SAMPLED_ROWS = 1 << 14  # of the table, from which faiss's normaliser is estimated
_NEAREST = 128  # rows whose logits enter that estimate as they are
_WIDEST = 1 << 14  # so many items faiss is asked for at most; for more, all are looked through


class ItemPool:
    """The items of a table that may be returned.

    Attributes:
        mask: (N,) bool, on the table's device.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    @cached_property
    def count(self) -> int:
        """How many they are."""
        return int(self.mask.sum())

    def subset(self, rows: "Sequence[int] | np.ndarray[Any, Any]") -> "ItemPool":
        """Those of `rows` that are here; rows outside the table are passed over."""
        mask = torch.zeros_like(self.mask)
        mask[self._inside(rows)] = True
        return ItemPool(mask & self.mask)

    def without(self, rows: "Sequence[int] | np.ndarray[Any, Any]") -> Tensor:
        """(n,) the different ones of `rows` that are here, ascending: what excluding them takes away."""
        inside: Tensor = self._inside(rows).unique()
        return inside[self.mask[inside]]

    def _inside(self, rows: "Sequence[int] | np.ndarray[Any, Any]") -> Tensor:
        given = np.asarray(rows, dtype=np.int64)
        given = given[(given >= 0) & (given < len(self.mask))]
        return torch.from_numpy(given).to(self.mask.device)


@dataclass(frozen=True, eq=False)
class Wanted:
    """What one query asks for.

    Attributes:
        k: items, at most.
        pool: those that may be returned.
        excluded: rows that may not.
        renormalize: scores over the legal items in the place of all.
        draw: how items are drawn without replacement in the place of the best, or None.
    """

    k: int
    pool: ItemPool
    excluded: "Sequence[int] | np.ndarray[Any, Any]" = ()
    renormalize: bool = False
    draw: Draw | None = None


class Ranked(NamedTuple):
    """Items found, the best (of a draw: the first drawn) first.

    Attributes:
        rows: (n,) int64.
        scores: (n,) log-probabilities.
    """

    rows: Tensor
    scores: Tensor


class ItemIndex(ABC):
    """A table of items, ready to be searched.

    Attributes:
        table: (N, D).
    """

    table: Tensor

    @abstractmethod
    def search(self, queries: Tensor, wanted: Sequence[Wanted]) -> list[Ranked]:
        """The best items of every query (B, D). Fewer than asked for are found only where fewer may be returned, or
        where scores are not numbers."""

    @torch.inference_mode()
    def log_probability(self, query: Tensor, row: int) -> Tensor:
        """That of one row after a query (1, D), computed in one piece: what a search is checked by."""
        logits = self.logits(query, slice(None))[0]
        return logits[row] - logits.logsumexp(0)

    def logits(self, queries: Tensor, rows: Tensor | slice) -> Tensor:
        """(B, n) the inner products of queries (B, D) with some rows, in float32 or, of such a table, float64."""
        return queries.to(self._dtype) @ self.table[rows].to(self._dtype).T

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.table.dtype == torch.float64 else torch.float32


class ExactIndex(ItemIndex):
    """Every query with every item: a brute-force search that never holds more than a bounded number of logits."""

    def __init__(self, table: Tensor, chunk: int = _CHUNK) -> None:
        """
        Args:
            table: (N, D), of any device and dtype; it is not copied.
            chunk: logits that are held at once, at least one per query. A draw holds N of them.
        """
        self.table, self._chunk = table, chunk

    @torch.inference_mode()
    def search(self, queries: Tensor, wanted: Sequence[Wanted]) -> list[Ranked]:
        """See `ItemIndex`; the scores are exact."""
        found: list[Ranked | None] = [None] * len(wanted)
        plain = [place for place, one in enumerate(wanted) if one.draw is None]
        best = self._best(queries[plain], [wanted[place] for place in plain])
        for place, ranked in zip(plain, best, strict=True):
            found[place] = ranked
        for place, one in enumerate(wanted):
            if one.draw is not None:
                found[place] = self._drawn(queries[place : place + 1], one, one.draw)
        return [one for one in found if one is not None]

    def _chunks(self, queries: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The first row of every chunk, and its logits (B, C)."""
        size = max(1, self._chunk // max(1, len(queries)))
        for begin in range(0, len(self.table), size):
            yield begin, self.logits(queries, slice(begin, begin + size))

    def _best(self, queries: Tensor, wanted: Sequence[Wanted]) -> list[Ranked]:
        if not wanted:
            return []
        device = self.table.device
        k = min(max(one.k for one in wanted), len(self.table))
        gone = [one.pool.without(one.excluded) for one in wanted]
        owner = torch.arange(len(wanted), device=device).repeat_interleave(
            torch.tensor([len(rows) for rows in gone], device=device)
        )
        excluded = torch.cat(gone)
        total = torch.full((len(wanted), 2), -torch.inf, dtype=self._dtype, device=device)
        # What is kept stands by row, so that of equal logits the left one has the lower row.
        kept = torch.empty((len(wanted), 0), dtype=self._dtype, device=device)
        rows = torch.empty((len(wanted), 0), dtype=torch.long, device=device)
        for begin, logits in self._chunks(queries):
            end = begin + logits.shape[1]
            legal = torch.stack([one.pool.mask[begin:end] for one in wanted])
            here = (excluded >= begin) & (excluded < end)
            legal[owner[here], excluded[here] - begin] = False
            allowed = logits.masked_fill(~legal, -torch.inf)
            total = torch.logaddexp(total, torch.stack([logits.logsumexp(1), allowed.logsumexp(1)], dim=1))
            allowed = allowed.masked_fill(allowed.isnan(), -torch.inf)
            best = best_in_order(allowed, min(k, allowed.shape[1]))
            kept = torch.cat([kept, allowed.gather(1, best)], dim=1)
            rows = torch.cat([rows, best + begin], dim=1)
            best = best_in_order(kept, min(k, kept.shape[1]))
            kept, rows = kept.gather(1, best), rows.gather(1, best)
        order = kept.argsort(dim=1, descending=True, stable=True)
        kept, rows = kept.gather(1, order), rows.gather(1, order)
        found = []
        for place, one in enumerate(wanted):
            scores = kept[place, : one.k] - total[place, int(one.renormalize)]
            finite = scores.isfinite()
            found.append(Ranked(rows[place, : one.k][finite], scores[finite]))
        return found

    def _drawn(self, query: Tensor, one: Wanted, draw: Draw) -> Ranked:
        """As the beam search draws, of which an item is a code: see `llmrec.selection`."""
        device = self.table.device
        logits = torch.cat([chunk for _, chunk in self._chunks(query)], dim=1).view(1, 1, -1)
        legal = one.pool.mask.clone()
        legal[one.pool.without(one.excluded)] = False
        allowed = logits.masked_fill(~legal | logits.isnan(), -torch.inf)
        total = (allowed if one.renormalize else logits).logsumexp(-1).view(())
        temperature = torch.tensor([draw.temperature], dtype=torch.float64, device=device)
        key = seeded(seeds_of([draw], device)).unsqueeze(1)
        noise = gumbel(keys_of_children(key, torch.arange(logits.shape[-1], device=device).view(1, 1, -1)))
        greatest = torch.zeros((1, 1), dtype=torch.float64, device=device)
        rank = perturbed(tempered(allowed, temperature), noise, greatest).view(1, -1)
        rows = best_in_order(rank, min(one.k, rank.shape[1]))[0]
        rows = rows[rank[0, rows].argsort(descending=True, stable=True)]
        scores = logits.view(-1)[rows] - total
        whole = rank[0, rows].isfinite() & scores.isfinite()
        return Ranked(rows[whole], scores[whole])


class FaissIndex(ItemIndex):
    """Items by faiss, for catalogs so large that looking at every item takes too long.

    "faiss-flat" looks at all items, "faiss-ivf" at the nearest of sqrt-many cells, "faiss-hnsw" walks a graph of
    neighbours: the last two may miss items (`recall`). What is found is scored exactly, but for the normaliser: the
    sum over the rows that were not found is estimated from a sample of 16,384 rows, the same for all queries, so all
    of a query's log-probabilities are off by one and the same number. Filters make it look for more items until there
    are enough; draws, "legal" scores and requests that few items fulfil are answered exactly.
    """

    def __init__(self, table: Tensor, kind: Retrieval, seed: int = 0) -> None:
        """Builds the index on the CPU.

        Args:
            table: (N, D).
            kind: of index.
            seed: of the sample.

        Raises:
            DependencyError: if faiss is not installed.
            RequestError: if the table holds what is no number.
        """
        try:
            import faiss
        except ImportError as error:
            raise DependencyError(
                "Retrieval by faiss needs faiss, which is not installed. Install faiss-cpu, or use --retrieval exact."
            ) from error
        self.table, self._exact, self._faiss = table, ExactIndex(table), faiss
        vectors = np.ascontiguousarray(table.detach().float().cpu().numpy())
        if not np.isfinite(vectors).all():
            raise RequestError("Items' vectors are not numbers. The weights are broken or their dtype overflows.")
        count, width = vectors.shape
        self._index = _empty(faiss, kind, count, width)
        if not self._index.is_trained:
            self._index.train(vectors)
        self._index.add(vectors)
        generator = torch.Generator().manual_seed(seed)
        sampled = torch.randperm(count, generator=generator)[:_SAMPLED_ROWS].sort().values
        self._sample = sampled.to(table.device)
        self._sampled = table[self._sample].to(self._dtype)

    @torch.inference_mode()
    def search(self, queries: Tensor, wanted: Sequence[Wanted]) -> list[Ranked]:
        """See `ItemIndex`, and the class for what is exact."""
        found: list[Ranked | None] = [None] * len(wanted)
        for place, one in enumerate(wanted):
            if one.draw is None and not one.renormalize:
                found[place] = self._nearest(queries[place : place + 1], one)
        left = [place for place, one in enumerate(found) if one is None]
        answers = self._exact.search(queries[left], [wanted[place] for place in left]) if left else []
        for place, answer in zip(left, answers, strict=True):
            found[place] = answer
        return [one for one in found if one is not None]

    @torch.inference_mode()
    def log_probability(self, query: Tensor, row: int) -> Tensor:
        """See `ItemIndex`; with the same estimate as a search's."""
        logit = self.logits(query, slice(row, row + 1))[0, 0]
        return logit - self._estimate(query, self._rows(query, 1))[0]

    def _nearest(self, query: Tensor, one: Wanted) -> Ranked | None:
        """The best that faiss finds, or None where looking through all is quicker, or it found too few."""
        gone = one.pool.without(one.excluded)
        least = min(one.k, one.pool.count - len(gone))
        if not least:
            return Ranked(gone[:0], gone[:0].to(self._dtype))
        fetched = one.k + len(gone)
        while fetched <= min(_WIDEST, len(self.table)):
            rows = self._rows(query, fetched)
            legal = rows[one.pool.mask[rows] & ~torch.isin(rows, gone)]
            if len(legal) >= least:
                logits = self.logits(query, legal)[0]
                nearest = rows if fetched <= _NEAREST else self._rows(query, 1)
                scores = logits - self._estimate(query, nearest)
                order = scores.argsort(descending=True, stable=True)[: one.k]
                return Ranked(legal[order], scores[order]) if bool(scores.isfinite().all()) else None
            fetched *= 2
        return None

    def _rows(self, query: Tensor, count: int) -> Tensor:
        """(n,) the rows that faiss finds, ascending: `count`, or `_NEAREST` where these are more."""
        count = min(max(count, _NEAREST), len(self.table))
        asked = np.ascontiguousarray(query.float().cpu().numpy())
        if not np.isfinite(asked).all():
            return torch.empty(0, dtype=torch.long, device=self.table.device)
        _, rows = self._index.search(asked, count)
        return torch.from_numpy(np.sort(rows[0][rows[0] >= 0])).to(self.table.device)

    def _estimate(self, query: Tensor, found: Tensor) -> Tensor:
        """(1,) the normaliser: the rows found, and so many others as their share of the sample says."""
        own = self.logits(query, found).logsumexp(1)
        again = torch.isin(self._sample, found)
        sampled = len(again) - int(again.sum())
        if not sampled:
            return own
        others = (query.to(self._dtype) @ self._sampled.T).masked_fill(again, -torch.inf).logsumexp(1)
        return torch.logaddexp(own, others + math.log((len(self.table) - len(found)) / sampled))


def open_index(table: Tensor, retrieval: Retrieval = "exact") -> ItemIndex:
    """The index of a table (N, D); raises RequestError for an unknown kind, and as `FaissIndex` does."""
    if retrieval not in get_args(Retrieval):
        raise RequestError(f"There is no retrieval {retrieval!r}. Choose one of {', '.join(get_args(Retrieval))}.")
    return ExactIndex(table) if retrieval == "exact" else FaissIndex(table, retrieval)


def recall(index: ItemIndex, queries: Tensor, k: int) -> float:
    """The share of the k best items of queries (B, D) that an index finds, among all items of its table."""
    pool = ItemPool(torch.ones(len(index.table), dtype=torch.bool, device=index.table.device))
    wanted = [Wanted(k, pool)] * len(queries)
    pairs = zip(index.search(queries, wanted), ExactIndex(index.table).search(queries, wanted), strict=True)
    shares = [float(torch.isin(best.rows, found.rows).float().mean()) for found, best in pairs]
    return sum(shares) / max(1, len(shares))


def _empty(faiss: Any, kind: Retrieval, count: int, width: int) -> Any:
    """A faiss index of inner products for so many vectors, before training."""
    if kind == "faiss-ivf":
        cells = max(1, min(4 * math.isqrt(count), count // 39))  # faiss asks for 39 vectors to train each cell
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(1, min(cells, max(16, cells // 16)))
        return index
    if kind == "faiss-hnsw":
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, 256
        return index
    return faiss.IndexFlatIP(width)
