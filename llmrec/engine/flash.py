"""Prompts that FlashAttention reads in place, out of vLLM's paged cache: the GPU's way, which gathers nothing.

vLLM's own call computes a causal attention of prompt tokens over themselves. Here the same kernel is asked for another
one: all beams of a request, over all of its prompt, not causal, with the logarithms of the softmax sums, as vLLM does
itself for the context of its decode context parallelism. What the beams' own tokens add is joined to it afterwards.

The names leaned on, of vllm 0.32: `fa_utils.flash_attn_varlen_func`, `FlashAttentionImpl`'s attributes
`vllm_flash_attn_version`, `fa4_hd256`, `batch_invariant_enabled` and `kv_cache_dtype`, and a cache of logical shape
(blocks, H_kv, tokens, 2·D). docs/gpu_serving.md says which of it has been run.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from llmrec.engine.attention import BeamAttention, Progress, Prompts
from llmrec.exceptions import EngineError
from llmrec.kernels.beam_attention import attend

Flash = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class PromptLengths:
    """What all layers' calls share: the prompts' lengths on the device, and where each one's queries begin.

    Attributes:
        longest: T of the longest prompt, known on the host.
        used: (R,) int32 on the device.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        """`lengths` are tokens of each prompt, at least 1."""
        self.longest = max(lengths)
        self.used = torch.tensor(lengths, dtype=torch.int32, device=device)
        self._begins: dict[int, torch.Tensor] = {}

    def begins(self, queries: int) -> torch.Tensor:
        """(R + 1,) int32: where each request's queries begin, if each has so many."""
        if queries not in self._begins:
            counted = torch.arange(len(self.used) + 1, dtype=torch.int32, device=self.used.device)
            self._begins[queries] = counted * queries
        return self._begins[queries]


class FlashReader:
    """Reads the prompts of one layer; made once, when the layer's backend is known."""

    def __init__(
        self,
        layer: Any,
        flash: Flash,
        canonical: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> None:
        """
        Args:
            layer: vLLM's Attention, with FlashAttention behind it.
            flash: `flash_attn_varlen_func`.
            canonical: gives axes of length one the strides that Hopper's copies ask for.
        """
        self._layer, self._flash, self._canonical = layer, flash, canonical

    @classmethod
    def of(cls, layer: Any) -> Self | None:
        """The reader of a vLLM layer, None if its prompts have to be gathered (`why_gathered` says why)."""
        if why_gathered(layer) is not None:
            return None
        from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        return cls(layer, flash_attn_varlen_func, canonicalize_singleton_dim_strides)

    def prompts(self, table: torch.Tensor, lengths: PromptLengths) -> "FlashPrompts":
        """The prompts whose blocks `table` (R, n) names, int32, as vLLM's metadata has it."""
        key, value = self._cache()
        return FlashPrompts(key, value, table.int().contiguous(), lengths, self._layer, self._flash)

    def _cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (blocks, tokens, H_kv, D) of the layer's keys and values; how they lie in memory is in the strides."""
        cache, width, heads = self._layer.kv_cache, self._layer.head_size, self._layer.num_kv_heads
        if cache.dim() != 4 or cache.shape[1] != heads or cache.shape[3] != 2 * width:
            raise EngineError(
                f"A FlashAttention cache is {tuple(cache.shape)}, not (blocks, {heads}, tokens, {2 * width}). "
                "This vLLM lays out its cache otherwise: use vllm 0.32."
            )
        key, value = cache.transpose(1, 2).split(width, dim=-1)
        return self._canonical(key), self._canonical(value)


class FlashPrompts(Prompts):
    """A layer's keys and values of R prompts, where vLLM keeps them."""

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        table: torch.Tensor,
        lengths: PromptLengths,
        layer: Any,
        flash: Flash,
    ) -> None:
        self._key, self._value, self._table, self._lengths, self._flash = key, value, table, lengths, flash
        self._window = layer.sliding_window
        impl = layer.impl
        self._version = impl.vllm_flash_attn_version
        # 0 lets the kernel choose, unless results must not depend on what else is in the batch.
        self._splits = 1 if getattr(impl, "batch_invariant_enabled", False) else 0

    def attend(
        self, query: torch.Tensor, scale: float, cap: float, step: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As `Prompts` says; one call for all requests, which reads each prompt once for all of its beams."""
        if self._window is None:
            return self._by_rows(query, scale, cap)
        # The kernel takes a request's one query for the last of T positions and looks `left` positions back from
        # there; the beams' token stands at T + step and sees `window` positions, its own among them.
        left = self._window - 2 - step
        return None if left < 0 else self._folded(query, scale, cap, left)

    def _by_rows(self, query: torch.Tensor, scale: float, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
        """A request's n queries as n tokens of H_kv heads: full tiles for the kernel, whatever n is."""
        requests, heads, number, width = query.shape
        rows = query.transpose(1, 2).reshape(requests * number, heads, width)
        output, lse = self._call(rows, number, scale, cap, None)
        found = output.view(requests, number, heads, width).transpose(1, 2)
        return found, lse.view(heads, requests, number).transpose(0, 1)

    def _folded(self, query: torch.Tensor, scale: float, cap: float, left: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A request's n queries as the heads of one token: they stand at one position, and so does the window."""
        requests, heads, number, width = query.shape
        folded = query.reshape(requests, heads * number, width)
        output, lse = self._call(folded, 1, scale, cap, [left, 0])
        return output.view(query.shape), lse.view(heads, number, requests).permute(2, 0, 1)

    def _call(
        self, query: torch.Tensor, queries: int, scale: float, cap: float, window: list[int] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (rows, heads, D) and LSE (heads, rows) of `queries` rows per request."""
        return self._flash(
            q=query,
            k=self._key,
            v=self._value,
            max_seqlen_q=queries,
            cu_seqlens_q=self._lengths.begins(queries),
            max_seqlen_k=self._lengths.longest,
            seqused_k=self._lengths.used,
            softmax_scale=scale,
            causal=False,
            window_size=window,
            softcap=cap,
            block_table=self._table,
            return_softmax_lse=True,
            # The prefill's schedule was made for other queries.
            scheduler_metadata=None,
            num_splits=self._splits,
            fa_version=self._version,
        )


class FlashBeamAttention(BeamAttention):
    """A layer's share of a search whose beams' keys and values stay where they were written.

    `BeamAttention` reorders them at every step. Here a step's beams keep an index of their ancestor in each earlier
    step, and one kernel reads the keys through it and joins the prompt's part: of any `Prompts`, flash or gathered.
    """

    def __init__(self, prompts: Prompts, progress: Progress, steps: int, window: int | None = None) -> None:
        """As `BeamAttention`."""
        super().__init__(prompts, progress, steps, window)
        self._of_prompt, self._where, self._most_steps, self._sees = prompts, progress, steps, window
        self._kept: list[torch.Tensor] = []  # keys and values, (steps, R, W, H_kv, D) each, as they were written
        self._ancestors: torch.Tensor | None = None  # (step + 1, R, W) int64

    def descend(self, parents: torch.Tensor) -> None:
        """Takes note of whom the beams (R, W) of a new step continue."""
        newest = torch.arange(parents.shape[1], device=parents.device).expand(1, *parents.shape)
        if self._ancestors is None:
            self._ancestors = newest
        else:
            before = self._ancestors.gather(2, parents.expand(len(self._ancestors), -1, -1))
            self._ancestors = torch.cat([before, newest])

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, cap: float = 0.0
    ) -> torch.Tensor:
        """As `BeamAttention.forward`."""
        assert self._ancestors is not None
        step, here = self._where.step, slice(self._where.begin, self._where.end)
        number, (heads, width), kv_heads = here.stop - here.start, query.shape[1:], key.shape[1]
        requests = query.shape[0] // number
        self._make_room(key, requests, self._ancestors.shape[2])
        for kept, new in zip(self._kept, (key, value), strict=True):
            kept[step, :, here] = new.view(requests, number, kv_heads, width)
        asked = query.view(requests, number, heads, width)
        folded = asked.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)
        seen = self._of_prompt.attend(folded, scale, cap, step)
        keys, values = (kept[: step + 1] for kept in self._kept)
        found = attend(asked, keys, values, self._ancestors[:, :, here], seen, scale, cap, self._sees)
        return found.reshape(requests * number, heads, width)

    def _make_room(self, key: torch.Tensor, requests: int, beams: int) -> None:
        """Makes the buffers wide enough; a search has few widths, the narrow ones first."""
        if self._kept and self._kept[0].shape[2] >= beams:
            return
        narrow, shape = self._kept, (self._most_steps, requests, beams, *key.shape[1:])
        self._kept = [key.new_zeros(shape) for _ in range(2)]
        for wide, kept in zip(self._kept, narrow, strict=False):
            wide[:, :, : kept.shape[2]] = kept


def why_gathered(layer: Any) -> str | None:
    """Why FlashAttention cannot read a layer's prompts in place; None if it can.

    Layers that no beams can be run on are refused before (`llmrec.engine.attention.refuse_unsupported`).
    """
    impl = layer.impl
    names = {(kind.__module__, kind.__name__) for kind in type(impl).__mro__}
    if ("vllm.v1.attention.backends.flash_attn", "FlashAttentionImpl") not in names:
        return f"its backend is {type(impl).__name__}"
    version = getattr(impl, "vllm_flash_attn_version", None)
    if version not in (2, 3, 4):
        return f"FlashAttention {version} is not known"
    if "fp8" in str(getattr(impl, "kv_cache_dtype", "")):
        return "its cache is quantised"
    if getattr(impl, "fa4_hd256", False):
        return "FlashAttention 4's kernel for 256 numbers per head needs tables cut to size"
    if layer.sliding_window is not None and version != 3:
        # Beams folded into heads are packed into full tiles by FlashAttention 3 alone, and rows would shift windows.
        return f"FlashAttention {version} packs no folded beams, which its sliding window needs"
    if getattr(impl, "dcp_world_size", 1) > 1:
        return "its context is spread over ranks"
    return None
