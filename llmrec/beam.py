"""Constrained beam search over a CatalogTrie, in plain torch.

It knows neither transformers nor vLLM: a `step` function turns the beams' newest tokens into logits, and both back
ends (`llmrec.decoding`, `llmrec.engine`) supply their own. Each level keeps the best W of *all* legal continuations,
so the search is exact beam search, and exhaustive once W reaches the number of items.

Where items are ragged (titles), the places behind an item's end hold the token id -1, "nothing", which follows with
probability 1. A finished item so keeps its score, and competes with the unfinished ones for its place in the beam.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from llmrec.exceptions import CatalogError
from llmrec.trie import CatalogTrie, child_of

if TYPE_CHECKING:
    from typing import Self

    from llmrec.catalog import Catalog, Softmax

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class TrieTensors:
    """A CatalogTrie and its token ids as torch tensors on one device; made once, used by every search.

    Attributes, per level, int32 as in the trie:
        start[l]: (n_{l-1} + 1,) the children of node `p` of the level above: start[l][p] to start[l][p + 1].
        token[l]: (n_l,) the token id on the edge into each node, -1 behind an item's end.
    Attribute of the leaves:
        item_of_leaf: (N,) int32 catalog rows.
    Attributes of the tokens:
        vocabulary: (n,) int64 ascending token ids that probabilities are normalised over; None for all.
        ragged: whether items differ in length.
    """

    def __init__(
        self,
        trie: CatalogTrie,
        token_ids: Sequence[npt.NDArray[np.int64]],
        device: torch.device | str = "cpu",
        vocabulary: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Raises CatalogError if a token of an item is not in `vocabulary`, so that it could have no probability."""
        self.trie = trie
        self.device = torch.device(device)
        self.start = [torch.from_numpy(level).to(self.device) for level in trie.start]
        self.token = [
            torch.from_numpy(token_ids[level][codes].astype(np.int32)).to(self.device)
            for level, codes in enumerate(trie.code)
        ]
        self.item_of_leaf = torch.from_numpy(trie.item_of_leaf).to(self.device)
        # Asked of the host's arrays, so that nothing is read back from the device.
        self.ragged = any(bool((ids[codes] < 0).any()) for ids, codes in zip(token_ids, trie.code, strict=True))
        self.vocabulary: torch.Tensor | None = None
        if vocabulary is not None:
            used = np.unique(np.concatenate([token_ids[level][codes] for level, codes in enumerate(trie.code)]))
            if strange := np.setdiff1d(used[used >= 0], vocabulary).tolist():
                raise CatalogError(
                    f"{len(strange)} token(s) of items are outside the softmax range, {strange[0]} first. "
                    "Give the range that the model was trained with."
                )
            self.vocabulary = torch.from_numpy(np.unique(vocabulary)).to(self.device)

    @classmethod
    def of(cls, catalog: "Catalog", softmax: "Softmax" = "vocabulary", device: torch.device | str = "cpu") -> "Self":
        """Those of a catalog with token ids, whose model was trained with this softmax range.

        Raises:
            CatalogError: if the catalog has no token ids yet, or there is no such range for its items.
        """
        return cls(catalog.trie, catalog.require_tokens(), device, catalog.softmax_tokens(softmax))

    @cached_property
    def code(self) -> list[torch.Tensor]:
        """Per level (n_l,) the codes on the edges, uint8 or int32; made when asked, for a beam search needs none."""
        wide = [code if code.dtype == np.uint8 else code.astype(np.int32, copy=False) for code in self.trie.code]
        return [torch.from_numpy(code).to(self.device) for code in wide]

    def nodes(self, prefixes: torch.Tensor) -> torch.Tensor:
        """`CatalogTrie.nodes` on this device: (B, l) codes -> (B,) int64 nodes, -1 where no item begins so.

        The operations depend on the trie and on l, not on values, and nothing is read back from the device.

        Raises:
            CatalogError: if prefixes are not a matrix of integers with at most L columns.
        """
        if prefixes.dim() != 2 or prefixes.shape[1] > self.trie.num_levels or prefixes.is_floating_point():
            raise CatalogError(
                f"Prefixes are {prefixes.dtype} of shape {tuple(prefixes.shape)}. "
                f"Give integers (batch, levels) with at most {self.trie.num_levels} levels."
            )
        node = torch.zeros(len(prefixes), dtype=torch.long, device=self.device)
        found = torch.ones(len(prefixes), dtype=torch.bool, device=self.device)
        for level in range(prefixes.shape[1]):
            wanted = prefixes[:, level].long()
            node, here = child_of(self.trie, level, self.code[level], self.start[level], node, wanted)
            found &= here
        return torch.where(found, node, -1)

    def allowed(self, prefixes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes that may follow each of B prefixes (B, l) of one length l < L, without a look back as in `nodes`.

        Returns:
            codes (B, C), int64, and legal (B, C): codes[i][legal[i]] may follow prefix `i`, ascending, and stand to
            the left; the rest of the row repeats one code. C is the greatest number of children in level l.

        Raises:
            CatalogError: as in `nodes`, and if prefixes are whole codes, which nothing follows.
        """
        node = self.nodes(prefixes)
        level = prefixes.shape[1]
        if level == self.trie.num_levels:
            raise CatalogError(f"Prefixes have all {level} levels, which nothing follows. Give shorter ones.")
        start = self.start[level]
        begin = start[node]
        width = start[node + 1] - begin  # -1 is a place too, the last: negative
        offset = torch.arange(self.trie.fan_out[level], device=self.device)
        legal = offset < width.unsqueeze(1)
        child = begin.unsqueeze(1) + offset.where(legal, 0)
        # The place -1 is past the last node.
        return self.code[level][child.clamp(max=len(self.code[level]) - 1)].long(), legal

    def dead_keys(self, excluded: Sequence[npt.NDArray[np.integer]]) -> list[torch.Tensor]:
        """`CatalogTrie.dead_nodes` on this device."""
        return [torch.from_numpy(keys).to(self.device) for keys in self.trie.dead_nodes(excluded)]


@dataclass(frozen=True)
class Beams:
    """What a search found, best first; places beyond the last legal item hold item -1 and score -inf.

    Attributes:
        items: (B, W) catalog rows.
        scores: (B, W) sums of log-probabilities, in the logits' dtype (at least float32).
    """

    items: torch.Tensor
    scores: torch.Tensor


def beam_search(
    logits: torch.Tensor,
    step: Step,
    trie: TrieTensors,
    num_beams: int,
    excluded: Sequence[npt.NDArray[np.integer]] | None = None,
    renormalize: bool = False,
) -> Beams:
    """The best items under an autoregressive model, every step constrained to the catalog.

    A beam's score is the sum over levels of log P(token | prompt, tokens so far), with P over the full vocabulary, or
    over the trie's `vocabulary` where it has one, or over the legal children alone if `renormalize` (those in the
    catalog, and not all excluded). The sum runs over an item's own tokens and is not divided by their number: it is
    the logarithm of the item's probability. Equal scores are ordered by code, lexicographically: the order of the
    trie's nodes. Nodes whose items are all excluded are never entered, so a search returns min(W, legal items) items.

    Args:
        logits: (B, V) for the first code of every request.
        step: (tokens (B, W'), parents (B, W')) -> logits (B, W', V). `parents` are the beams of the step before that
            each new beam continues (all 0 after the prompt). It is called L - 1 times, or until all items are
            finished; where fewer than W beams live, the dead ones repeat a legal token, finished ones are given token
            0, and the results of both are ignored.
        trie: the catalog.
        num_beams: W, at least 1.
        excluded: for each request the catalog rows that it may not return.
        renormalize: scores over legal continuations instead of the vocabulary.
    """
    batch = logits.shape[0]
    dead = trie.dead_keys(excluded) if excluded is not None else None
    node = torch.zeros((batch, 1), dtype=torch.long, device=logits.device)
    score = torch.zeros((batch, 1), dtype=_score_dtype(logits), device=logits.device)
    logits = logits.unsqueeze(1)  # (B, 1, V)
    for level in range(trie.trie.num_levels):
        begin = trie.start[level][node]  # (B, W')
        width = trie.start[level][node + 1] - begin
        fan_out = int(width.max())
        offset = torch.arange(fan_out, device=logits.device)
        legal = offset < width.unsqueeze(-1)  # (B, W', C); a dead beam's children inherit its score of -inf
        child = torch.where(legal, begin.unsqueeze(-1) + offset, begin.unsqueeze(-1))
        if dead is not None and dead[level].numel():
            rows = torch.arange(batch, device=logits.device).view(-1, 1, 1)
            legal &= ~_contains(dead[level], rows * len(trie.token[level]) + child)
        token = trie.token[level][child].long()
        candidate = score.unsqueeze(-1) + _log_probabilities(logits, token, legal, renormalize, trie.vocabulary)
        # NaN compares with nothing; as -inf it is an item that was not found, which callers notice.
        candidate = candidate.masked_fill(~legal | candidate.isnan(), -torch.inf).flatten(1)  # (B, W'·C)
        best = _best_in_order(candidate, min(num_beams, candidate.shape[1]))
        score = candidate.gather(1, best)
        node = child.flatten(1).gather(1, best)
        if level + 1 < trie.trie.num_levels:
            if trie.ragged and _all_finished(trie, level, node, score):
                for below in range(level + 1, trie.trie.num_levels):
                    node = trie.start[below][node].long()
                break
            logits = step(trie.token[level][node].long().clamp(min=0), best // fan_out)
    score, order = score.sort(dim=1, descending=True, stable=True)
    items = trie.item_of_leaf[node.gather(1, order)].long().masked_fill(~torch.isfinite(score), -1)
    return Beams(items, score)


def _best_in_order(candidate: torch.Tensor, width: int) -> torch.Tensor:
    """(B, width) places of the `width` greatest entries of each row (B, n), places ascending; ties go to the left.

    Beams are kept in the order of their nodes, so candidates lie in the order of theirs and left means lower code.
    A stable sort of all candidates would say the same with more work; `topk` alone leaves the order of ties open.
    """
    threshold = candidate.topk(width, dim=1).values[:, -1:]
    above, tied = candidate > threshold, candidate == threshold
    keep = above | (tied & (tied.cumsum(1) <= width - above.sum(1, keepdim=True)))
    return keep.nonzero()[:, 1].view(-1, width)


def _all_finished(trie: TrieTensors, level: int, node: torch.Tensor, score: torch.Tensor) -> bool:
    """Whether nothing but "nothing" follows the nodes (B, W) of `level`, those of dead beams left aside."""
    follows = trie.token[level + 1][trie.start[level + 1][node]]
    return bool(((follows < 0) | torch.isinf(score)).all())


def _score_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def normalizer(logits: torch.Tensor, vocabulary: torch.Tensor | None) -> torch.Tensor:
    """(…, 1) the logarithm of the sum that logits (…, V) are normalised by, over `vocabulary` or over all tokens."""
    return (logits if vocabulary is None else logits[..., vocabulary]).logsumexp(-1, keepdim=True)


def _log_probabilities(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    legal: torch.Tensor,
    renormalize: bool,
    vocabulary: torch.Tensor | None,
) -> torch.Tensor:
    """(B, W, C) log-probabilities of `tokens` (B, W, C) under `logits` (B, W, V); 0 for token -1."""
    logits = logits.to(_score_dtype(logits))
    chosen = logits.gather(-1, tokens.clamp(min=0))
    if renormalize:
        chosen = chosen.masked_fill(~legal, -torch.inf)
        # Where all children are excluded, the logsumexp is -inf, and -inf - -inf would be NaN.
        total = chosen.logsumexp(-1, keepdim=True)
        found = chosen - total.masked_fill(torch.isinf(total), 0.0)
    else:
        found = chosen - normalizer(logits, vocabulary)
    return found.masked_fill(tokens < 0, 0.0)


def _contains(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Which of `values` occur in the ascending `keys` (at least one)."""
    place = torch.searchsorted(keys, values).clamp_(max=len(keys) - 1)
    return keys[place] == values
