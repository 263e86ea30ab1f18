"""Attention of beams: the prompt's keys and values from vLLM's paged cache, the beams' own few beside it.

vLLM's attention layers call `layer.impl.forward(...)`. `teach_beams` gives that implementation a subclass which
answers for a `BeamAttention` in the place of the metadata and leaves every other call to vLLM. Nothing is ever written
to the paged cache, no block is taken, and the model's layers stay vLLM's own.
"""

from typing import Any

import torch

from llmrec.exceptions import EngineError


class PagedLayout:
    """Where a layer's cache keeps each key and value inside a block: found out by writing numbers, not assumed.

    Kernels pack blocks as suits their instructions (keys transposed for vectors, pairs for AMX), so the layout is
    probed: every element of a one-block cache gets a number of its own through vLLM's own update, and is read back.

    Attributes:
        key, value: (block, H_kv, D) flat positions inside one block.
        block: tokens in a block.
    """

    def __init__(self, layer: Any, block: int) -> None:
        """Probes `layer` (a vLLM Attention whose cache is allocated); raises EngineError if a number is lost."""
        heads, width, cache = layer.num_kv_heads, layer.head_size, layer.kv_cache
        self.block = block
        count = block * heads * width
        scratch = torch.zeros_like(cache[:1])
        if scratch.numel() < 2 * count:
            raise EngineError(
                f"A cache block of {scratch.numel()} numbers cannot hold {block} tokens of {heads} heads x {width}. "
                "This vLLM lays out its cache otherwise: use vllm 0.32."
            )
        numbers = torch.arange(1, 2 * count + 1, device=cache.device)
        found = torch.zeros(scratch.numel(), dtype=torch.long, device=cache.device)
        slots = torch.arange(block, device=cache.device, dtype=torch.long)
        dtype = cache.dtype
        base, power = 128, 1  # seven bits a pass: exact in bfloat16 too
        while power <= 2 * count:
            digit = (numbers // power % base).to(dtype).view(2, block, heads, width)
            layer.impl.do_kv_cache_update(layer, digit[0].contiguous(), digit[1].contiguous(), scratch, slots)
            found += scratch.flatten().float().round().long() * power
            power *= base
        place = torch.zeros(2 * count + 1, dtype=torch.long, device=cache.device)
        place[found.clamp(0, 2 * count)] = torch.arange(found.numel(), device=cache.device)
        if not torch.equal(found[place[1:]], numbers):
            raise EngineError(
                f"The cache layout of {type(layer.impl).__name__} ({dtype}) could not be probed: numbers written to "
                "it came back changed. Use an unquantised KV cache and vllm 0.32."
            )
        self.key, self.value = place[1:].view(2, block, heads, width).unbind(0)

    def read(self, cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole blocks, each (R, n·block, H_kv, D), for `blocks` (R, n) of `cache`."""
        requests, number = blocks.shape
        content = cache[blocks.flatten().long()].flatten(1)  # (R·n, numbers in a block)
        shape = (requests, number * self.block, *self.key.shape[1:])
        return (
            content[:, self.key.flatten()].view(shape),
            content[:, self.value.flatten()].view(shape),
        )


class BeamAttention:
    """One layer's share of a search: prompt keys and values, those of the beams so far, and who descends from whom.

    It stands in the place of vLLM's attention metadata while the beams are run.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor) -> None:
        """
        Args:
            key, value: (R, T, H_kv, D) of the prompts, padded.
            lengths: (R,) tokens that each prompt really has.
        """
        self.key = key.permute(0, 2, 3, 1)  # (R, H_kv, D, T)
        self.value = value.transpose(1, 2)  # (R, H_kv, T, D)
        self.padding = torch.arange(key.shape[1], device=key.device) >= lengths.unsqueeze(1)  # (R, T)
        self._beam_keys: list[torch.Tensor] = []  # a step each: (R, W, H_kv, D), in the order of today's beams
        self._beam_values: list[torch.Tensor] = []

    def descend(self, parents: torch.Tensor) -> None:
        """Reorders the beams' keys and values for a step whose beams (R, W) continue `parents`."""
        if self._beam_keys:
            rows = torch.arange(parents.shape[0], device=parents.device).unsqueeze(1)
            self._beam_keys = [key[rows, parents] for key in self._beam_keys]
            self._beam_values = [value[rows, parents] for value in self._beam_values]

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Attends from the beams' newest tokens; query (R·W, H, D), key and value (R·W, H_kv, D) -> (R·W, H, D).

        Softmax over prompt and beam positions together, in float32, over H_kv groups of H / H_kv heads.
        """
        requests, kv_heads, width, _ = self.key.shape
        beams, heads = query.shape[0] // requests, query.shape[1]
        group = heads // kv_heads
        self._beam_keys.append(key.view(requests, beams, kv_heads, width))
        self._beam_values.append(value.view(requests, beams, kv_heads, width))
        # (R, H_kv, W·G, D): the beams of a request share its prompt, so one product serves them all.
        grouped = query.view(requests, beams, kv_heads, group, width).transpose(1, 2)
        folded = grouped.reshape(requests, kv_heads, beams * group, width)
        prompt = (folded @ self.key).float() * scale  # (R, H_kv, W·G, T)
        prompt = prompt.masked_fill(self.padding[:, None, None, :], -torch.inf)
        own_keys = torch.stack(self._beam_keys, dim=3).transpose(1, 2)  # (R, H_kv, W, s, D)
        own_values = torch.stack(self._beam_values, dim=3).transpose(1, 2)
        own = (grouped @ own_keys.transpose(-1, -2)).float() * scale  # (R, H_kv, W, G, s)
        steps = own.shape[-1]
        weights = torch.cat([prompt, own.reshape(requests, kv_heads, beams * group, steps)], dim=-1).softmax(-1)
        weights = weights.to(query.dtype)
        attended = weights[..., :-steps] @ self.value  # (R, H_kv, W·G, D)
        attended = attended.view(requests, kv_heads, beams, group, width) + (
            weights[..., -steps:].view(requests, kv_heads, beams, group, steps) @ own_values
        )
        return attended.transpose(1, 2).reshape(requests * beams, heads, width)


def refuse_unsupported(name: str, layer: Any) -> None:
    """Raises EngineError if this attention layer computes something that `BeamAttention` does not."""
    impl = layer.impl
    reasons = {
        "multi-head latent attention": not hasattr(impl, "do_kv_cache_update"),
        "a sliding window": getattr(layer, "sliding_window", None) is not None,
        "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "attention sinks": getattr(impl, "sinks", None) is not None,
        "a soft cap": bool(getattr(impl, "logits_soft_cap", None)),
        "shared KV layers": getattr(impl, "kv_sharing_target_layer_name", None) is not None,
        "a quantised KV cache": "fp8" in str(getattr(impl, "kv_cache_dtype", "")),
    }
    if found := [reason for reason, present in reasons.items() if present]:
        raise EngineError(
            f"Layer {name} has {' and '.join(found)}, which the in-engine beam search does not do. "
            "Serve a model with plain paged attention (Llama, GPT-2, Qwen), or recommend with transformers."
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
        output.copy_(attn_metadata.forward(query, key, value, self.scale).view_as(output))
        return output

    impl.__class__ = type(f"Beam{original.__name__}", (original,), {"forward": forward})
