"""PagedLayout: where vLLM's paged cache keeps each key and value, found out by writing numbers, not assumed."""

from typing import Any

import torch

from llmrec.exceptions import EngineError


class PagedLayout:
    """Where a layer's cache keeps each key and value inside a block.

    Kernels pack blocks as suits their instructions (keys transposed for vectors, pairs for AMX), so the layout is
    probed: every element of a one-block cache gets a number of its own through vLLM's own update, and is read back.
    Where the places of keys, or of values, are evenly spaced in each direction, blocks are copied whole and seen
    through strides, several times faster than one number at a time.

    Attributes:
        key, value: (block, H_kv, D) flat positions inside one block.
        block: tokens in a block.
    """

    def __init__(self, layer: Any) -> None:
        """Probes `layer` (a vLLM Attention whose cache is allocated); raises EngineError if a number is lost."""
        heads, width, cache = layer.num_kv_heads, layer.head_size, layer.kv_cache
        scratch = torch.zeros_like(cache[:1])
        self.block = scratch.numel() // (2 * heads * width)
        count = self.block * heads * width
        if not count or scratch.numel() != 2 * count:
            raise EngineError(
                f"A cache block of {scratch.numel()} numbers is no whole number of tokens of {heads} heads x {width}. "
                "This vLLM lays out its cache otherwise: use vllm 0.32."
            )
        numbers = torch.arange(1, 2 * count + 1, device=cache.device)
        found = torch.zeros(scratch.numel(), dtype=torch.long, device=cache.device)
        slots = torch.arange(self.block, device=cache.device, dtype=torch.long)
        dtype = cache.dtype
        base, power = 128, 1  # seven bits a pass: exact in bfloat16 too
        while power <= 2 * count:
            digit = (numbers // power % base).to(dtype).view(2, self.block, heads, width)
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
        self.key, self.value = place[1:].view(2, self.block, heads, width).unbind(0)
        self._strides = [_strides(self.key), _strides(self.value)]

    def read(self, cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole blocks, each (R, H_kv, n·block, D) and contiguous, for `blocks` (R, n)."""
        content = cache[blocks.flatten().long()].flatten(1).contiguous()  # (R·n, numbers in a block)
        return self._read(content, blocks.shape, 0), self._read(content, blocks.shape, 1)

    def _read(self, content: torch.Tensor, shape: torch.Size, which: int) -> torch.Tensor:
        requests, number = shape
        block, heads, width = self.key.shape
        if even := self._strides[which]:
            begin, (token, head, place) = even
            size = content.shape[1]
            seen = content.as_strided(
                (requests, heads, number, block, width), (number * size, head, size, token, place), begin
            )
        else:
            places = (self.key, self.value)[which]
            seen = content[:, places.flatten()].view(requests, number, block, heads, width).permute(0, 3, 1, 2, 4)
        return seen.reshape(requests, heads, number * block, width).contiguous()


class Layouts:
    """The layouts of a model's layers, each kind of layer probed once, when its cache is first read."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], PagedLayout] = {}

    def of(self, layer: Any) -> PagedLayout:
        """Raises EngineError as PagedLayout does."""
        cache = layer.kv_cache
        stored = (tuple(cache.shape[1:]), cache.stride()[1:], cache.dtype)
        kind = (type(layer.impl), *stored, layer.num_kv_heads, layer.head_size)
        if kind not in self._known:
            self._known[kind] = PagedLayout(layer)
        return self._known[kind]


def _strides(places: torch.Tensor) -> tuple[int, tuple[int, ...]] | None:
    """The first of `places` and their steps in each direction, None where a direction has no one step."""
    begin = int(places.flatten()[0])
    expected = torch.full_like(places, begin)
    steps = []
    for dimension, size in enumerate(places.shape):
        step = int(places.select(dimension, min(1, size - 1)).flatten()[0]) - begin
        shape = [size if other == dimension else 1 for other in range(places.dim())]
        expected = expected + step * torch.arange(size, device=places.device).view(shape)
        steps.append(step)
    return (begin, tuple(steps)) if torch.equal(expected, places) and min(steps) >= 0 else None
