"""The whole constrained beam search over static shapes, equal to `llmrec.beam.beam_search`.

Every shape follows from the number of requests, W and the level; nothing is read back from the device, and no step is
left out because its values happen to allow it. So the levels can be traced as one graph each, and the search with the
steps between them be recorded once and replayed (`llmrec.engine.beam_graphs`).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from llmrec.exceptions import CatalogError
from llmrec.kernels.select import Level, normalizer, select

if TYPE_CHECKING:
    from llmrec.beam import TrieTensors

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class State(NamedTuple):
    """The beams after a level, those that live first and in node order.

    Attributes:
        node: (R, W_l) int64.
        parent: (R, W_l) int64, places of the beams of the level before.
        token: (R, W_l) int64, at least 0: what a model is given next.
        score: (R, W_l), -inf for dead places.
        gains: (R, W_l, l) log-probabilities of the levels so far.
    """

    node: torch.Tensor
    parent: torch.Tensor
    token: torch.Tensor
    score: torch.Tensor
    gains: torch.Tensor


class StaticBeams(NamedTuple):
    """What a search found, best first; places beyond the last legal item hold item -1 and score -inf.

    Attributes:
        items: (R, W_L) int64 catalog rows, with W_L the last of the search's widths.
        scores: (R, W_L) sums of log-probabilities.
        levels: (R, W_L, L) log-probabilities per level, 0 behind a title's end.
    """

    items: torch.Tensor
    scores: torch.Tensor
    levels: torch.Tensor


class StaticSearch:
    """A catalog's search with a fixed number of beams; made once per (catalog version, W), used by many searches.

    It finds the best items: caps and draws are `beam_search`'s alone.

    Attributes:
        levels: the trie's, with their fan-outs.
        token_levels: those that bear tokens; one further level may tell items of one code apart.
        widths: beams after each level, the least of W, the level's nodes and all children of the beams before.
    """

    def __init__(self, trie: "TrieTensors", num_beams: int, renormalize: bool = False) -> None:
        """Reads the trie's fan-outs from the device, the only time that it waits for it.

        Raises:
            CatalogError: if `num_beams` is below 1 or the trie has no item.
        """
        if num_beams < 1:
            raise CatalogError(f"A search with {num_beams} beams finds nothing. Ask for at least one.")
        if not trie.num_leaves:
            raise CatalogError("A search over no item has no shape. Answer such a request with no items.")
        self.levels = [Level(*parts) for parts in zip(trie.start, trie.token, trie.fan_out, strict=True)]
        self.token_levels = trie.token_levels
        self.widths: list[int] = []
        for level in self.levels:
            before = self.widths[-1] if self.widths else 1
            self.widths.append(min(num_beams, len(level.token), before * level.fan_out))
        self._item_of_leaf, self._several = trie.item_of_leaf, trie.several
        self._vocabulary = trie.vocabulary
        self._renormalize = renormalize

    def begin(self, logits: torch.Tensor) -> State:
        """The root as the one beam of each request, for logits (R, V) after the prompt."""
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        nothing = torch.zeros((logits.shape[0], 1), dtype=torch.long, device=logits.device)
        score = torch.zeros((logits.shape[0], 1), dtype=dtype, device=logits.device)
        return State(nothing, nothing, nothing, score, score.new_zeros((logits.shape[0], 1, 0)))

    def advance(
        self, level: int, logits: torch.Tensor | None, state: State, dead: torch.Tensor | None = None
    ) -> State:
        """The best beams of `level`, from logits (R, W_{l-1}, V) behind the beams of the level before.

        A level without tokens takes no logits. `dead` are the level's keys of nodes that may not be entered
        (`llmrec.kernels.select.pad_keys`).
        """
        if logits is None:
            logits, normal = state.score.new_zeros((*state.score.shape, 1)), torch.zeros_like(state.score)
        elif self._renormalize:
            normal = None
        else:
            normal = normalizer(logits, state.score.dtype, self._vocabulary)
        found = select(self.levels[level], logits, state.score, state.node, self.widths[level], normal, dead)
        before = state.gains.gather(1, found.parent.unsqueeze(-1).expand(-1, -1, level))
        gains = torch.cat([before, found.gain.unsqueeze(-1)], dim=-1)
        return State(found.node, found.parent, found.token.clamp(min=0), found.score, gains)

    def finish(self, state: State) -> StaticBeams:
        """The items of the last level's beams, best first; equal scores by code."""
        scores, order = state.score.sort(dim=1, descending=True, stable=True)
        items = self._item_of_leaf[state.node.gather(1, order)].long().masked_fill(~torch.isfinite(scores), -1)
        levels = state.gains.gather(1, order.unsqueeze(-1).expand_as(state.gains))
        if self._several:  # an item's best code comes first; the others make place
            again = ((items.unsqueeze(2) == items.unsqueeze(1)).tril(-1)).any(2)
            again, order = again.sort(dim=1, stable=True)
            items = items.gather(1, order).masked_fill(again, -1)
            scores = scores.gather(1, order).masked_fill(again, -torch.inf)
            levels = levels.gather(1, order.unsqueeze(-1).expand_as(levels))
        return StaticBeams(items, scores, levels.masked_fill((items < 0).unsqueeze(-1), 0.0))

    def run(self, logits: torch.Tensor, step: Step, dead: Sequence[torch.Tensor | None] | None = None) -> StaticBeams:
        """The best items under a model, as `llmrec.beam.beam_search` finds them.

        Args:
            logits: (R, V) for the first code of every request.
            step: (tokens (R, W_l), parents (R, W_l)) -> logits (R, W_l, V); called once per level with tokens but the
                first, whatever it finds.
            dead: per level the keys of nodes that may not be entered, or None.
        """
        gone = dead if dead is not None else [None] * len(self.levels)
        state = self.advance(0, logits.unsqueeze(1), self.begin(logits), gone[0])
        for level in range(1, len(self.levels)):
            behind = step(state.token, state.parent) if level < self.token_levels else None
            state = self.advance(level, behind, state, gone[level])
        return self.finish(state)
