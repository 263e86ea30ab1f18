"""Constrained beam search over a catalog's trie, in plain torch.

It knows neither transformers nor vLLM: a `step` function turns the beams' newest tokens into logits, and both back
ends (`llmrec.decoding`, `llmrec.engine`) supply their own. Each level keeps the best W of *all* legal continuations,
so the search is exact beam search, and exhaustive once W reaches the number of leaves.

Where items are ragged (titles), the places behind an item's end hold the token id -1, "nothing", which follows with
probability 1. A finished item so keeps its score, and competes with the unfinished ones for its place in the beam.
The nodes that tell items of one code apart are such places too: these items have one score, and the lower row first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmrec.exceptions import RequestError
from llmrec.selection import (
    Draw,
    PrefixCap,
    best_in_order,
    beyond_cap,
    gumbel,
    keys_of_children,
    perturbed,
    require_levels,
    seeded,
    seeds_of,
    tempered,
)
from llmrec.trie_tensors import Rows, TrieTensors

__all__ = ["Beams", "Draw", "PrefixCap", "Step", "TrieTensors", "beam_search", "normalizer"]

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Beams:
    """What a search found, best first; places beyond the last legal item hold item -1 and score -inf.

    Attributes:
        items: (B, W) catalog rows.
        scores: (B, W) sums of log-probabilities, in the logits' dtype (at least float32).
        levels: (B, W, L) the log-probability of each level's token, under the same normalisation; 0 behind an item's
            end and where there is no item. They add up to the score.
        drawn: (B, W) float64 the log-probability by which each item was drawn (`Draw`), and
        perturbed: (B, W) float64 the same with its noise, in falling order; -inf where there is no item, and of
            requests without a draw. None if no request has one.
    """

    items: torch.Tensor
    scores: torch.Tensor
    levels: torch.Tensor
    drawn: torch.Tensor | None = None
    perturbed: torch.Tensor | None = None


def beam_search(
    logits: torch.Tensor,
    step: Step,
    trie: TrieTensors | Sequence[TrieTensors],
    num_beams: int | Sequence[int],
    excluded: Sequence[Rows] | None = None,
    renormalize: bool | Sequence[bool] = False,
    caps: Sequence[PrefixCap | None] | None = None,
    draws: Sequence[Draw | None] | None = None,
) -> Beams:
    """The best items under an autoregressive model, every step constrained to the catalog.

    A beam's score is the sum over levels of log P(token | prompt, tokens so far), with P over the full vocabulary, or
    over the trie's `vocabulary` where it has one, or over the legal children alone if `renormalize` (those in the
    request's trie, and not all excluded). The sum runs over an item's own tokens and is not divided by their number:
    it is the logarithm of the item's probability. Equal scores are ordered by code, lexicographically: the order of
    the trie's nodes. Nodes whose items are all excluded are never entered, so a search returns min(W, legal items)
    items, unless a cap holds some back. An item with several codes has the score of its best one and is returned once:
    the search keeps W codes, so it may then return fewer than W items, and is exhaustive once W reaches the number of
    codes.

    Requests of one trie (the same object), width and kind of options are selected together; all share each `step`.

    Args:
        logits: (B, V) for the first code of every request.
        step: (tokens (B, W'), parents (B, W')) -> logits (B, W', V). `parents` are the beams of the step before that
            each new beam continues (all 0 after the prompt). It is called at most once for every level with tokens
            but the first, and no more once all items are finished; where fewer than W' beams live, the dead ones
            repeat a legal token or are given token 0, finished ones are given token 0, and the results of both are
            ignored.
        trie: the catalog's, or one per request: that of a part of the catalog, or of another catalog. A request whose
            trie has no items finds none.
        num_beams: W, at least 1, or one per request; results are as wide as the widest.
        excluded: for each request the catalog rows that it may not return.
        renormalize: scores over legal continuations instead of the vocabulary; for all or per request.
        caps: for each request a cap on items that begin alike, or None.
        draws: for each request how items are drawn in the place of the best being found, or None. Drawn items come in
            the order of the draw, and their scores are what they are without one.

    Raises:
        RequestError: if W is below 1, options do not come one per request, or a cap has more levels than the trie.
    """
    groups = _groups(logits, trie, num_beams, excluded, renormalize, caps, draws)
    batch = logits.shape[0]
    logits = logits.unsqueeze(1)  # (B, 1, V)
    waiting = [group for group in groups if group.trie.num_leaves]
    while waiting:
        for group in waiting:
            group.descend(logits)
        waiting = [group for group in waiting if not group.finished]
        if waiting:
            logits = step(*_together(waiting, batch))
    return _gathered(groups, batch)


def normalizer(logits: torch.Tensor, vocabulary: torch.Tensor | None) -> torch.Tensor:
    """(…, 1) the logarithm of the sum that logits (…, V) are normalised by, over `vocabulary` or over all tokens."""
    return (logits if vocabulary is None else logits[..., vocabulary]).logsumexp(-1, keepdim=True)


class _Group:
    """Requests that are selected together: one trie, one width, options of one kind.

    Attributes:
        places: where its requests stand in the batch, as a slice if they stand side by side.
        node: (b, w) the beams' nodes, ascending.
        tokens, parents: (b, w) of the newest beams, for the next step.
        finished: whether no more logits are needed.
    """

    def __init__(
        self,
        places: list[int],
        trie: TrieTensors,
        num_beams: int,
        renormalize: bool,
        caps: list[PrefixCap],
        draws: list[Draw],
        excluded: list[Rows] | None,
        logits: torch.Tensor,
    ) -> None:
        device, batch = logits.device, len(places)
        side_by_side = places == list(range(places[0], places[0] + batch))
        self.places = slice(places[0], places[0] + batch) if side_by_side else torch.tensor(places, device=device)
        self.trie, self.num_beams, self.renormalize, self.batch = trie, num_beams, renormalize, batch
        self.dead = trie.dead_children(excluded) if excluded is not None and any(map(len, excluded)) else None
        self.node = torch.zeros((batch, 1), dtype=torch.long, device=device)
        self.score = torch.zeros((batch, 1), dtype=_score_dtype(logits), device=device)
        self.tokens = self.parents = self.node
        self.caps = bool(caps)
        if caps:
            self.cap_levels = torch.tensor([cap.levels for cap in caps], device=device).view(-1, 1)
            self.most = torch.tensor([cap.most for cap in caps], device=device).view(-1, 1)
            self.branch = self.node
        self.draws = bool(draws)
        if draws:
            self.temperature = torch.tensor([draw.temperature for draw in draws], dtype=torch.float64, device=device)
            self.key = seeded(seeds_of(draws, device)).unsqueeze(1)
            self.drawn = self.rank = torch.zeros((batch, 1), dtype=torch.float64, device=device)
        self.level = 0
        self.finished = not trie.num_leaves
        # Per level gone through: its number, and (b, w) log-probability and parent of the beams.
        self.past: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def descend(self, logits: torch.Tensor) -> None:
        """Goes down a level with the whole batch's logits (B, W', V), and through those that need none."""
        self._select(logits[self.places, : self.node.shape[1]])
        while self.level < self.trie.num_levels and not self._needs_logits():
            if self.trie.shared or self.draws:
                self._select(None)
            else:  # nothing but "nothing" follows, once
                self.node = self.trie.start[self.level][self.node].long()
                self.level += 1
        self.finished = self.level == self.trie.num_levels
        if not self.finished:
            self.tokens = self.trie.token[self.level - 1][self.node].long().clamp(min=0)

    def _needs_logits(self) -> bool:
        """Whether a token follows one of the beams, dead ones left aside."""
        trie = self.trie
        if self.level >= trie.token_levels:
            return False
        if not trie.ragged:
            return True
        follows = trie.token[self.level][trie.start[self.level][self.node]]
        return not bool(((follows < 0) | torch.isinf(self.score)).all())

    def _select(self, logits: torch.Tensor | None) -> None:
        """Keeps the best children of the beams; without logits (b, w, V) where only "nothing" follows."""
        trie, level = self.trie, self.level
        begin = trie.start[level][self.node]  # (b, w)
        width = trie.start[level][self.node + 1] - begin
        fan_out = int(width.max())
        offset = torch.arange(fan_out, device=begin.device)
        legal = offset < width.unsqueeze(-1)  # (b, w, C); a dead beam's children inherit its score of -inf
        child = torch.where(legal, begin.unsqueeze(-1) + offset, begin.unsqueeze(-1))
        if self.dead is not None and len(self.dead[level][0]):
            legal &= self._alive(*self.dead[level], fan_out)
        token = trie.token[level][child].long()
        if logits is None:
            found = torch.zeros(token.shape, dtype=self.score.dtype, device=token.device)
        else:
            found = _log_probabilities(logits, token, legal, self.renormalize, trie.vocabulary)
        # NaN compares with nothing; as -inf it is an item that was not found, which callers notice.
        candidate = (self.score.unsqueeze(-1) + found).masked_fill(~legal | found.isnan(), -torch.inf)
        rank = candidate
        if self.draws:
            rank = self._perturbed(found.masked_fill(~legal | candidate.isinf(), -torch.inf), child)
        rank, flat = rank.flatten(1), child.flatten(1)  # (b, w·C)
        if self.caps:
            rank = self._capped(rank, flat, fan_out)
        best = best_in_order(rank, min(self.num_beams, rank.shape[1]))
        self.parents = best // fan_out
        self.score = candidate.flatten(1).gather(1, best)
        if self.caps or self.draws:
            self._remember(rank, best)
        self.past.append((level, found.flatten(1).gather(1, best), self.parents))
        self.node = flat.gather(1, best)
        self.level += 1

    def _alive(self, parents: torch.Tensor, places: torch.Tensor, fan_out: int) -> torch.Tensor:
        """(b, w, C) which children are not those of `TrieTensors.dead_children`; work for these, not for all."""
        above = len(self.trie.token[self.level - 1]) if self.level else 1
        rows = torch.arange(self.batch, device=parents.device).unsqueeze(1)
        # Dead beams repeat nodes, out of order; of equal ones the first may live.
        beams, order = (rows * above + self.node).flatten().sort(stable=True)
        place = torch.searchsorted(beams, parents).clamp_(max=len(beams) - 1)
        alive = torch.ones(len(beams) * fan_out + 1, dtype=torch.bool, device=parents.device)
        alive[torch.where(beams[place] == parents, order[place] * fan_out + places, len(beams) * fan_out)] = False
        return alive[:-1].view(*self.node.shape, fan_out)

    def _perturbed(self, found: torch.Tensor, child: torch.Tensor) -> torch.Tensor:
        """(b, w, C) what children are drawn by, of log-probabilities `found`, -inf for what is not legal."""
        self._child_key = keys_of_children(self.key, self.trie.code[self.level][child].long())
        self._child_drawn = self.drawn.unsqueeze(-1) + tempered(found, self.temperature)
        return perturbed(self._child_drawn, gumbel(self._child_key), self.rank)

    def _capped(self, rank: torch.Tensor, child: torch.Tensor, fan_out: int) -> torch.Tensor:
        """`rank` (b, w·C) with -inf for what is too many of its branch."""
        inherited = self.branch.repeat_interleave(fan_out, dim=1)
        self._child_branch = torch.where(self.cap_levels <= self.level, inherited, child)
        beyond = beyond_cap(rank, self._child_branch, self.most) & (self.cap_levels <= self.level)
        return rank.masked_fill(beyond, -torch.inf)

    def _remember(self, rank: torch.Tensor, best: torch.Tensor) -> None:
        """Takes over what the kept beams bear beside their score."""
        kept = rank.gather(1, best)
        self.score = self.score.masked_fill(torch.isinf(kept), -torch.inf)
        if self.caps:
            self.branch = self._child_branch.gather(1, best)
        if self.draws:
            self.rank = kept
            self.key = self._child_key.flatten(1).gather(1, best)
            self.drawn = self._child_drawn.flatten(1).gather(1, best)

    def results(self) -> Beams:
        """What was found, in the order of the result."""
        order = (self.rank if self.draws else self.score).sort(dim=1, descending=True, stable=True).indices
        score = self.score.gather(1, order)
        items = self.trie.item_of_leaf[self.node.gather(1, order)].long().masked_fill(~torch.isfinite(score), -1)
        place = order
        levels = torch.zeros((*order.shape, self.trie.num_levels), dtype=score.dtype, device=score.device)
        beam = order
        for level, found, parents in reversed(self.past):
            levels[:, :, level] = found.gather(1, beam)
            beam = parents.gather(1, beam)
        if self.trie.several:  # an item's best code comes first; the others make place
            again = ((items.unsqueeze(2) == items.unsqueeze(1)).tril(-1)).any(2)
            again, order = again.sort(dim=1, stable=True)
            items = items.gather(1, order).masked_fill(again, -1)
            score = score.gather(1, order).masked_fill(again, -torch.inf)
            levels = levels.gather(1, order.unsqueeze(-1).expand_as(levels))
            place = place.gather(1, order)
        levels = levels.masked_fill((items < 0).unsqueeze(-1), 0.0)
        if not self.draws:
            return Beams(items, score, levels)
        drawn, perturbed = (one.gather(1, place).masked_fill(items < 0, -torch.inf) for one in (self.drawn, self.rank))
        return Beams(items, score, levels, drawn, perturbed)


def _groups(
    logits: torch.Tensor,
    trie: TrieTensors | Sequence[TrieTensors],
    num_beams: int | Sequence[int],
    excluded: Sequence[Rows] | None,
    renormalize: bool | Sequence[bool],
    caps: Sequence[PrefixCap | None] | None,
    draws: Sequence[Draw | None] | None,
) -> list[_Group]:
    """The batch's requests by what they can be selected with."""
    batch = len(logits)
    tries = _each("tries", trie, batch)
    widths = _each("widths", num_beams, batch)
    over_legal = _each("renormalize", renormalize, batch)
    caps = _each("caps", caps, batch)
    draws = _each("draws", draws, batch)
    gone = _each("excluded", excluded, batch)
    if any(width < 1 for width in widths):
        raise RequestError(f"num_beams is {min(widths)}. Search with at least one beam.")
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, one in enumerate(tries):
        cap, draw = caps[place], draws[place]
        if cap is not None:
            require_levels(cap.levels, one.num_levels)
        kind = (id(one), widths[place], bool(over_legal[place]), cap is not None, draw is not None)
        alike.setdefault(kind, []).append(place)
    return [
        _Group(
            places,
            tries[places[0]],
            widths[places[0]],
            bool(over_legal[places[0]]),
            [cap for place in places if (cap := caps[place]) is not None],
            [draw for place in places if (draw := draws[place]) is not None],
            None if excluded is None else [gone[place] for place in places],
            logits,
        )
        for places in alike.values()
    ]


def _each(name: str, given: object, batch: int) -> list:  # type: ignore[type-arg]
    """One per request, of one for all or a sequence."""
    if not isinstance(given, Sequence):
        return [given] * batch
    if len(given) != batch:
        raise RequestError(f"{len(given)} {name} do not fit {batch} requests. Give one per request.")
    return list(given)


def _together(groups: list[_Group], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and parents (B, W') of all groups; what is not theirs is a dead beam: token 0 behind beam 0."""
    if len(groups) == 1 and groups[0].batch == batch:
        return groups[0].tokens, groups[0].parents
    width = max(group.tokens.shape[1] for group in groups)
    tokens, parents = torch.zeros((2, batch, width), dtype=torch.long, device=groups[0].tokens.device)
    for group in groups:
        tokens[group.places, : group.tokens.shape[1]] = group.tokens
        parents[group.places, : group.tokens.shape[1]] = group.parents
    return tokens, parents


def _gathered(groups: list[_Group], batch: int) -> Beams:
    """The groups' results, as wide as the widest, in the order of the requests."""
    found = [group.results() if group.past else None for group in groups]
    if len(groups) == 1 and found[0] is not None:
        return found[0]
    there = [one for one in found if one is not None]
    width = max((one.items.shape[1] for one in there), default=1)
    depth = max(group.trie.num_levels for group in groups)
    device, dtype = groups[0].node.device, groups[0].score.dtype
    items = torch.full((batch, width), -1, dtype=torch.long, device=device)
    scores = torch.full((batch, width), -torch.inf, dtype=dtype, device=device)
    levels = torch.zeros((batch, width, depth), dtype=dtype, device=device)
    drawn = perturbed = None
    if any(one.drawn is not None for one in there):
        drawn, perturbed = torch.full((2, batch, width), -torch.inf, dtype=torch.float64, device=device)
    for group, one in zip(groups, found, strict=True):
        if one is not None:
            own = one.items.shape[1]
            items[group.places, :own] = one.items
            scores[group.places, :own] = one.scores
            levels[group.places, :own, : one.levels.shape[2]] = one.levels
            for whole, part in ((drawn, one.drawn), (perturbed, one.perturbed)):
                if whole is not None and part is not None:
                    whole[group.places, :own] = part
    return Beams(items, scores, levels, drawn, perturbed)


def _score_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


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
