"""Attention of beams: the prompt's keys and values from vLLM's paged cache, the beams' own few beside it.

vLLM's attention layers call `layer.impl.forward(...)`. `teach_beams` gives that implementation a subclass which
answers for a `BeamAttention` in the place of the metadata and leaves every other call to vLLM. Nothing is ever written
to the paged cache, no block is taken, and the model's layers stay vLLM's own.

The beams of a request share their prompt, so one product serves them all; the result over the prompt and the one over
a beam's own tokens are merged by the logarithms of their softmax sums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llmrec.exceptions import EngineError


class Sight:
    """Which keys of their prompts the beams of R requests see: the same for all layers of one block and window.

    A beam's token of step `s` (0 for the first) stands at position T + s behind a prompt of T tokens. A window of n
    sees n positions, its own among them. Blocks wholly outside the window at step 0 are not read at all: vLLM has
    given them back, and its table names another block in their place.

    Attributes:
        columns: (R, n) columns of the block table to read.
    """

    def __init__(self, lengths: Sequence[int], block: int, window: int | None, device: torch.device | str) -> None:
        """
        Args:
            lengths: T of each prompt, at least 1.
            block: tokens in a block.
            window: positions that a token sees; None for all.
        """
        self.window = window
        first = [0 if window is None else max(0, length - window + 1) // block for length in lengths]
        columns = max(-(-length // block) - begin for length, begin in zip(lengths, first, strict=True))
        begin = torch.tensor(first, device=device).unsqueeze(1)
        self.columns = begin + torch.arange(max(1, columns), device=device)
        self._position = begin * block + torch.arange(max(1, columns) * block, device=device)  # (R, T)
        self._length = torch.tensor(lengths, device=device).unsqueeze(1)
        self._masks: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def hidden(self, step: int) -> torch.Tensor:
        """(R, T) bool: the keys that are not seen at a step, padding among them."""
        hidden = self._position >= self._length
        if self.window is not None:
            hidden |= self._position <= self._length + step - self.window
        return hidden

    def mask(self, step: int, dtype: torch.dtype) -> torch.Tensor:
        """(R, 1, 1, T) 0 for what is seen and -inf for what is hidden, to be added to scores."""
        key = (0 if self.window is None else step, dtype)
        if key not in self._masks:
            hidden = self.hidden(step)[:, None, None, :]
            self._masks[key] = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
                hidden, -torch.inf
            )
        return self._masks[key]

    def blind(self, step: int) -> bool:
        """Whether the window has left all prompts behind."""
        return self.window is not None and step >= self.window - 1


class Prompts(Protocol):
    """A layer's keys and values of R prompts, however they are kept."""

    def attend(
        self, query: torch.Tensor, scale: float, cap: float, step: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Softmax attention of queries (R, H_kv, n, D) over the keys that are seen at `step`.

        Returns:
            (R, H_kv, n, D), and the logarithms of the softmax sums, (R, H_kv, n) of at least float32; None where
            nothing is seen.
        """
        ...


class GatheredPrompts:
    """Prompts whose keys and values were read out of the cache, (R, H_kv, T, D) each."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, sight: Sight) -> None:
        """`key` and `value` are changed: what no step sees is cleared, for it may be anything, not-a-number too."""
        hidden = sight.hidden(0)[:, None, :, None]
        self._key, self._value = key.masked_fill_(hidden, 0), value.masked_fill_(hidden, 0)
        self._sight = sight

    def attend(
        self, query: torch.Tensor, scale: float, cap: float, step: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As `Prompts` says."""
        if self._sight.blind(step):
            return None
        if fused(query.device, cap):
            mask = self._sight.mask(step, query.dtype)
            attended, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, self._key, self._value, attn_mask=mask, scale=scale
            )
            return attended, total
        scores = _capped((query @ self._key.transpose(-1, -2)).to(_exact(query.dtype)) * scale, cap)
        scores += self._sight.mask(step, scores.dtype)
        total = scores.logsumexp(-1)
        weights = scores.sub_(total.unsqueeze(-1)).exp_().to(query.dtype)
        return weights @ self._value, total


class Unkept:
    """Prompts that are read anew at each use: for a search whose keys and values of all layers would be too many."""

    def __init__(self, read: Callable[[], Prompts]) -> None:
        self._read = read

    def attend(
        self, query: torch.Tensor, scale: float, cap: float, step: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As `Prompts` says."""
        return self._read().attend(query, scale, cap, step)


class NoPrompts:
    """Prompts of which nothing is seen: in a dummy run, those that would be read where they are."""

    def attend(self, query: torch.Tensor, scale: float, cap: float, step: int) -> None:
        """As `Prompts` says."""


@dataclass
class Progress:
    """Where a search is: shared by its layers.

    Attributes:
        step: of the beams' tokens, 0 for the first.
        begin, end: the beams, of each request, that the next pass through the layers brings.
    """

    step: int = 0
    begin: int = 0
    end: int = 0


class BeamAttention:
    """One layer's share of a search: its prompts, and the keys and values of the beams so far.

    It stands in the place of vLLM's attention metadata while the beams are run.
    """

    def __init__(self, prompts: Prompts, progress: Progress, steps: int, window: int | None = None) -> None:
        """
        Args:
            prompts: of the R requests.
            progress: of the search, which moves it on.
            steps: that the search may have, at most.
            window: positions that a token sees, its own among them; None for all.
        """
        self._prompts, self._progress, self._steps, self._window = prompts, progress, steps, window
        self._own: list[torch.Tensor] = []  # keys and values, (R, W, H_kv, steps, D) each, in the order of the beams

    def descend(self, parents: torch.Tensor) -> None:
        """Reorders the beams' keys and values for a step whose beams (R, W) continue `parents`."""
        requests, beams = parents.shape
        if self._own:
            first = torch.arange(requests, device=parents.device).unsqueeze(1) * self._own[0].shape[1]
            places = (first + parents).flatten()
            self._own = [
                kept.flatten(0, 1).index_select(0, places).unflatten(0, (requests, beams)) for kept in self._own
            ]
        self._beams = beams

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, cap: float = 0.0
    ) -> torch.Tensor:
        """Attends from the newest tokens of some beams; query (R·n, H, D), key and value (R·n, H_kv, D).

        The beams are those from `progress.begin` to `progress.end` of each request, n of them. Softmax over prompt
        and beam positions together, in float32 at least, over H_kv groups of H / H_kv heads; scores x are first bent
        to cap·tanh(x / cap) where there is a cap (Gemma 2, arXiv 2408.00118).

        Returns:
            (R·n, H, D).
        """
        step, here = self._progress.step, slice(self._progress.begin, self._progress.end)
        number = here.stop - here.start
        requests, heads = query.shape[0] // number, query.shape[1]
        kv_heads, width = key.shape[1:]
        group = heads // kv_heads
        if not self._own:
            shape = (requests, self._beams, kv_heads, self._steps, width)
            self._own = [key.new_empty(shape), value.new_empty(shape)]
        for kept, new in zip(self._own, (key, value), strict=True):
            kept[:, here, :, step] = new.view(requests, number, kv_heads, width)
        oldest = 0 if self._window is None else max(0, step - self._window + 1)
        own_keys, own_values = (kept[:, here, :, oldest : step + 1] for kept in self._own)
        grouped = query.view(requests, number, kv_heads, group, width)
        scores = _capped((grouped @ own_keys.transpose(-1, -2)).to(_exact(query.dtype)) * scale, cap)
        folded = grouped.transpose(1, 2).reshape(requests, kv_heads, number * group, width)
        seen = self._prompts.attend(folded, scale, cap, step)
        if seen is None:
            return (scores.softmax(-1).to(query.dtype) @ own_values).view(requests * number, heads, width)
        attended, total = (part.unflatten(2, (number, group)).transpose(1, 2) for part in seen)
        # The prompt counts as one more key whose score is the logarithm of its sum.
        weights = torch.cat([total.unsqueeze(-1).to(scores.dtype), scores], -1).softmax(-1)
        result: torch.Tensor = attended * weights[..., :1]  # in the scores' type: half precision is rounded to once
        for place in range(own_values.shape[3]):  # few, and far faster than a product of so small matrices
            own = own_values[:, :, :, place].unsqueeze(3).to(weights.dtype)
            result.addcmul_(own, weights[..., place + 1 : place + 2])
        return result.to(query.dtype).reshape(requests * number, heads, width)


def fused(device: torch.device, cap: float) -> bool:
    """Whether the attention over prompts is torch's fused kernel for CPUs, which keeps no scores."""
    return device.type == "cpu" and not cap


def refuse_unsupported(name: str, layer: Any) -> None:
    """Raises EngineError if this attention layer computes something that `BeamAttention` does not."""
    impl = layer.impl
    kind = type(layer).__name__
    dtype = f"{getattr(impl, 'kv_cache_dtype', '')} {getattr(layer, 'kv_cache_dtype', '')}"
    reasons = {
        "multi-head latent attention": "MLA" in kind or not hasattr(impl, "do_kv_cache_update"),
        f"another kind of attention ({kind})": "MLA" not in kind and kind != "Attention",
        "cross or encoder attention": getattr(impl, "attn_type", "decoder") != "decoder",
        "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "attention sinks": getattr(impl, "sinks", None) is not None or bool(getattr(layer, "has_sink", False)),
        "shared KV layers": getattr(impl, "kv_sharing_target_layer_name", None) is not None,
        "a quantised KV cache": any(word in dtype for word in ("fp8", "int8", "fp4", "nvfp4")),
        "values of another width than its keys": getattr(layer, "head_size_v", layer.head_size) != layer.head_size,
        "a lookback over chunks": (getattr(impl, "chunk_lookback", -1) or -1) > -1,
    }
    if found := [reason for reason, present in reasons.items() if present]:
        raise EngineError(
            f"Layer {name} has {' and '.join(found)}, which the in-engine beam search does not do. "
            "Serve a model with plain paged attention (Llama, Qwen, Mistral, Gemma, GPT-2, OPT) and an unquantised KV "
            "cache, or use `llmrec serve --backend transformers`."
        )


def teach_beams(impl: Any) -> None:
    """Makes a vLLM attention implementation answer for BeamAttention; everything else stays as it was.

    The object gets a subclass of its own class, so that isinstance checks on that class still hold.
    """
    original = type(impl)
    if original.__name__.startswith("Beam"):
        return

    def forward(
        self: Any,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not isinstance(attn_metadata, BeamAttention):
            return original.forward(  # type: ignore[no-any-return]
                self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        cap = float(getattr(self, "logits_soft_cap", None) or 0.0)
        output.copy_(attn_metadata.forward(query, key, value, self.scale, cap).view_as(output))
        return output

    impl.__class__ = type(f"Beam{original.__name__}", (original,), {"forward": forward})


def _capped(scores: torch.Tensor, cap: float) -> torch.Tensor:
    return scores.div_(cap).tanh_().mul_(cap) if cap else scores


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The type that scores are taken in: float32 for half precisions."""
    return dtype if dtype == torch.float64 else torch.float32
