"""SearchMemory: how many requests and beams are searched at once, so that a step's searches stay within a bound.

A search holds the prompts' keys and values of all layers, each beam's own, the logits of all beams, and while the
beams are run what the layers compute. All of it follows from the model's shape, so it is bounded beforehand: first by
fewer requests at once, then, for one request alone, by reading its prompt anew at every layer instead of keeping it,
then by running its beams in slices. None of it changes a result. What is left for one request is the floor: its
beams' logits and keys, and one layer of its prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

DEFAULT_MIB = 1024
# Of the search over V logits and C children of a beam: float32 logits and their exponentials; places, legality,
# tokens, scores and what sorting takes.
_PER_LOGIT, _PER_CHILD = 8, 48
# Rows are not run in thinner slices than this, whatever the bound: the slice would cost as much time as more rows.
_THINNEST = 16


@dataclass(frozen=True)
class Portion:
    """Requests that are searched together.

    Attributes:
        places: which of the planned requests.
        keep: whether the prompts' keys and values are read once, and not at each step.
        width: beams of each request in one pass through the layers.
    """

    places: list[int]
    keep: bool
    width: int


@dataclass(frozen=True)
class SearchMemory:
    """The bound, and what it is made of.

    Attributes:
        limit: bytes.
        prompt: bytes of all layers for a prompt token; 0 where the cache itself is read.
        layer: of the largest of them alone, with what reading it takes.
        held: bytes for a beam, from its first to its last step.
        passing: bytes for a beam while it is run.
        score: bytes for a beam and a prompt token while it is run; 0 where the attention keeps no scores.
        most_rows: beams in one pass through the layers, over all requests; None for any number.
    """

    limit: int
    prompt: int
    layer: int
    held: int
    passing: int
    score: int
    most_rows: int | None = None

    @classmethod
    def of(
        cls, limit: int, layers: Sequence[Any], config: Any, bytes_each: int, steps: int, gathered: bool, fused: bool
    ) -> Self:
        """Of a model's attention layers.

        Args:
            limit: bytes.
            layers: with `num_heads`, `num_kv_heads` and `head_size`.
            config: of the model's text part: `hidden_size`, `vocab_size` and `intermediate_size`.
            bytes_each: of a number of the model's.
            steps: that a search may have, at most.
            gathered: whether prompts are read out of the cache.
            fused: whether the attention over prompts keeps no scores.
        """
        token = [2 * layer.num_kv_heads * layer.head_size * bytes_each for layer in layers]
        heads = max(layer.num_heads for layer in layers)
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        inner = max(inner) if isinstance(inner, (list, tuple)) else inner
        logits = config.vocab_size * (bytes_each + _PER_LOGIT)
        return cls(
            limit=limit,
            prompt=sum(token) if gathered else 0,
            layer=3 * max(token) if gathered else 0,
            held=steps * (sum(token) + max(token)) + logits,
            passing=bytes_each * (4 * config.hidden_size + 3 * inner + 8 * heads * max(x.head_size for x in layers)),
            score=0 if fused else 3 * 4 * heads,
        )

    def rows(self, most: int) -> Self:
        """This with at most so many beams in one pass."""
        return replace(self, most_rows=most)

    def size(self, requests: int, longest: int, beams: int, fan_out: int, keep: bool = True, width: int = 0) -> int:
        """Bytes for so many requests with prompts of up to `longest` tokens; `width` as in `Portion`, 0 for all."""
        kept = longest * ((self.prompt if keep else 0) + self.layer)
        running = (width or beams) * (self.passing + longest * self.score)
        return requests * (kept + beams * (self.held + _PER_CHILD * fan_out) + running)

    def reserve(self, device: torch.device) -> None:
        """Takes the bound's bytes of a GPU and gives them back at once: its profile run then counts with them."""
        if device.type != "cpu":
            torch.empty(self.limit, dtype=torch.uint8, device=device)

    def plan(self, lengths: Sequence[int], beams: int, fan_out: int) -> list[Portion]:
        """Divides requests with prompts of these lengths and W beams each; similar lengths come together.

        Args:
            lengths: tokens of each prompt.
            beams: W.
            fan_out: children of a node, at most.
        """
        portions: list[Portion] = []
        places: list[int] = []
        for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
            if places and not self._fits(len(places) + 1, lengths[place], beams, fan_out):
                portions.append(self._portion(places, lengths, beams, fan_out))
                places = []
            places.append(place)
        return [*portions, self._portion(places, lengths, beams, fan_out)] if places else []

    def _fits(self, requests: int, longest: int, beams: int, fan_out: int) -> bool:
        few = self.most_rows is None or requests * beams <= self.most_rows
        return few and self.size(requests, longest, beams, fan_out) <= self.limit

    def _portion(self, places: list[int], lengths: Sequence[int], beams: int, fan_out: int) -> Portion:
        longest = lengths[places[-1]]
        if self._fits(len(places), longest, beams, fan_out):
            return Portion(places, True, max(1, beams))
        # One request alone: there is nothing left to divide but itself.
        keep = self.size(1, longest, beams, fan_out, width=min(beams, _THINNEST)) <= self.limit
        width = beams if self.most_rows is None else min(beams, self.most_rows)
        while width > _THINNEST and self.size(1, longest, beams, fan_out, keep, width) > self.limit:
            width = max(_THINNEST, width // 2)
        return Portion(places, keep, max(1, width))
