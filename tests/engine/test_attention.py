"""Attention of beams against its definition, and the probing of cache layouts, without vLLM."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.engine.attention import (
    BeamAttention,
    GatheredPrompts,
    Progress,
    Sight,
    Unkept,
    refuse_unsupported,
    teach_beams,
)
from llmrec.engine.layout import Layouts, PagedLayout
from llmrec.exceptions import EngineError


def attend(query, keys, values, positions, here, scale, cap, window):
    """One head, one query (D,) at position `here`, keys and values with their positions: as it is defined."""
    seen = [place for place, at in enumerate(positions) if at <= here and (window is None or here - at < window)]
    scores = torch.stack([keys[place] @ query * scale for place in seen])
    if cap:
        scores = cap * torch.tanh(scores / cap)
    return scores.softmax(0) @ torch.stack([values[place] for place in seen])


def paged(keys, block, spoil):
    """The prompts' keys (a list of (T, H_kv, D)) in blocks of a cache, and the block table; the rest is spoilt."""
    blocks = [-(-len(key) // block) for key in keys]
    cache = torch.full((sum(blocks) + 1, block, *keys[0].shape[1:]), spoil, dtype=keys[0].dtype)
    table = torch.zeros((len(keys), max(blocks) + 2), dtype=torch.int32)  # block 0: vLLM's null block
    used = 1
    for row, key in enumerate(keys):
        for place in range(blocks[row]):
            part = key[place * block : (place + 1) * block]
            cache[used, : len(part)] = part
            table[row, place] = used
            used += 1
    return cache, table


def gathered(cache, table, sight):
    """(R, H_kv, T, D) of the blocks that a sight reads."""
    blocks = cache[table.long().gather(1, sight.columns.clamp(max=table.shape[1] - 1))]
    return blocks.flatten(1, 2).transpose(1, 2).contiguous()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    cap=st.sampled_from([0.0, 1.5]),
    window=st.sampled_from([None, 1, 2, 3, 5, 8, 100]),
    block=st.sampled_from([1, 3, 4]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    slices=st.sampled_from([1, 2, 100]),
    kept=st.booleans(),
)
def test_beams_attend_to_their_prompt_and_their_ancestors(seed, heads, cap, window, block, dtype, slices, kept):
    torch.manual_seed(seed)
    heads, kv_heads = heads
    width, scale, lengths, steps = 8, 0.3, [11, 1, 4], [5, 3, 4, 6]
    prompts = [torch.randn(2, length, kv_heads, width, dtype=torch.float64) for length in lengths]
    sight = Sight(lengths, block, window, "cpu")
    # What lies beyond a prompt, or in a block that was given back, is read and hidden, whatever it is.
    stores = [paged([prompt[part].to(dtype) for prompt in prompts], block, torch.nan) for part in (0, 1)]
    if window is not None:
        for _, table in stores:
            for row, length in enumerate(lengths):
                table[row, : max(0, length - window + 1) // block] = 0

    def read():
        return GatheredPrompts(*(gathered(cache, table, sight) for cache, table in stores), sight)

    progress = Progress()
    attention = BeamAttention(read() if kept else Unkept(read), progress, len(steps), window)
    own = [[[]] for _ in lengths]  # each beam's keys and values, oldest first: the definition's
    beams = 1
    for step, now in enumerate(steps):
        parents = torch.randint(0, beams, (len(lengths), now))
        attention.descend(parents)
        new_key, new_value = torch.randn(2, len(lengths), now, kv_heads, width, dtype=torch.float64)
        query = torch.randn(len(lengths), now, heads, width, dtype=torch.float64)
        found = torch.empty_like(query)
        for progress.begin in range(0, now, slices):
            progress.end = min(now, progress.begin + slices)
            here = slice(progress.begin, progress.end)
            parts = [part[:, here].flatten(0, 1).to(dtype) for part in (query, new_key, new_value)]
            found[:, here] = attention.forward(*parts, scale, cap).view(len(lengths), -1, heads, width).double()
        progress.step += 1
        own = [
            [[*own[r][parents[r, w]], (new_key[r, w], new_value[r, w])] for w in range(now)]
            for r in range(len(lengths))
        ]
        for r, length in enumerate(lengths):
            positions = list(range(length + step + 1))
            for w in range(now):
                for head in range(heads):
                    group = head // (heads // kv_heads)
                    keys = [*prompts[r][0, :, group], *(k[group] for k, _ in own[r][w])]
                    values = [*prompts[r][1, :, group], *(v[group] for _, v in own[r][w])]
                    expected = attend(query[r, w, head], keys, values, positions, length + step, scale, cap, window)
                    atol = 1e-12 if dtype == torch.float64 else 2e-6
                    assert torch.allclose(found[r, w, head], expected, atol=atol, rtol=0)
        beams = now


def test_blocks_outside_the_window_are_not_read():
    sight = Sight([100, 70, 3], 16, 20, "cpu")
    assert sight.columns.tolist() == [[5, 6], [3, 4], [0, 1]]
    assert Sight([100, 70], 16, None, "cpu").columns.tolist() == [list(range(7))] * 2
    assert not sight.blind(18)
    assert sight.blind(19)


def test_bfloat16_is_attended_in_float32():
    torch.manual_seed(0)
    prompts = torch.randn(2, 1, 2, 40, 32).bfloat16()
    query, key, value = torch.randn(3, 6, 2, 32).bfloat16()
    for cap in (0.0, 5.0):
        found = []
        for dtype in (torch.bfloat16, torch.float64):
            sight, progress = Sight([40], 8, None, "cpu"), Progress(0, 0, 6)
            attention = BeamAttention(GatheredPrompts(*prompts.to(dtype).clone(), sight), progress, 1)
            attention.descend(torch.zeros((1, 6), dtype=torch.long))
            found.append(attention.forward(*(x.to(dtype) for x in (query, key, value)), 0.2, cap))
        assert found[0].dtype == torch.bfloat16
        assert torch.allclose(found[0].double(), found[1], atol=0.02)


class ScrambledImpl:
    """A cache whose blocks keep their numbers in an arbitrary order, as packed kernels do; or evenly."""

    def __init__(self, block, heads, width, seed, lossy=False, order=None):
        count = 2 * block * heads * width
        scrambled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        self.order = scrambled if order is None else order.reshape(-1)
        self.shape, self.lossy = (block, heads, width), lossy

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        block, heads, width = self.shape
        places = self.order.view(2, block, heads, width)
        flat = cache.view(cache.shape[0], -1)
        for token, slot in enumerate(slots.tolist()):
            flat[slot // block, places[0, slot % block]] = key[token]
            flat[slot // block, places[1, slot % block]] = value[token].clamp(max=100 if self.lossy else 1e4)


def layer_of(impl, blocks, dtype):
    block, heads, width = impl.shape
    cache = torch.randn(blocks, heads, block, 2 * width).to(dtype)
    return SimpleNamespace(impl=impl, num_kv_heads=heads, head_size=width, kv_cache=cache)


def even(block, heads, width):
    """Keys transposed for vectors, values as they are, head after head: vLLM's own layout on most CPUs."""
    flat = torch.arange(2 * block * heads * width).view(heads, 2, block * width)
    key = flat[:, 0].view(heads, width, block).permute(2, 0, 1)
    return torch.stack([key, flat[:, 1].view(heads, block, width).transpose(0, 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block", "heads", "width"), [(16, 2, 32), (1, 2, 16), (16, 1, 32), (4, 3, 1)])
@pytest.mark.parametrize("evenly", [True, False])
def test_any_layout_is_found_out(dtype, block, heads, width, evenly):
    order = even(block, heads, width) if evenly else None
    layer = layer_of(ScrambledImpl(block, heads, width, block, order=order), 60, dtype)
    untouched = layer.kv_cache.clone()
    layout = Layouts().of(layer)
    assert layout.block == block
    assert torch.equal(layer.kv_cache, untouched)
    length = 2 * block + (block + 1) // 2
    key, value = torch.randn(2, length, heads, width).to(dtype)
    blocks = torch.tensor([[4, 0, 2], [5, 1, 3]])
    slots = torch.tensor([int(blocks[1, place // block]) * block + place % block for place in range(length)])
    layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
    keys, values = layout.read(layer.kv_cache, blocks)
    assert keys.shape == (2, heads, 3 * block, width)
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert torch.equal(keys[1, :, :length], key.transpose(0, 1))
    assert torch.equal(values[1, :, :length], value.transpose(0, 1))


def test_even_layouts_are_read_through_strides():
    # Both ways say the same; only one is fast. A scrambled one has no strides.
    layer = layer_of(ScrambledImpl(16, 2, 32, 0, order=even(16, 2, 32)), 6, torch.float32)
    layout = PagedLayout(layer)
    assert layout._strides == [(0, (1, 1024, 16)), (512, (32, 1024, 1))]
    blocks = torch.tensor([[4, 0], [5, 1]])
    fast = layout.read(layer.kv_cache, blocks)
    layout._strides = [None, None]
    for one, other in zip(fast, layout.read(layer.kv_cache, blocks), strict=True):
        assert torch.equal(one, other)
    assert PagedLayout(layer_of(ScrambledImpl(16, 2, 32, 0), 6, torch.float32))._strides == [None, None]


def test_each_kind_of_layer_is_probed_once():
    layouts = Layouts()
    one, other = (layer_of(ScrambledImpl(16, 2, 32, 0), blocks, torch.float32) for blocks in (6, 9))
    assert layouts.of(one) is layouts.of(other)
    wider = layer_of(ScrambledImpl(32, 2, 32, 0), 6, torch.float32)
    assert layouts.of(wider) is not layouts.of(one)
    assert layouts.of(wider).block == 32


def test_layouts_that_lose_numbers_are_refused():
    with pytest.raises(EngineError, match="could not be probed"):
        PagedLayout(layer_of(ScrambledImpl(16, 2, 32, 0, lossy=True), 4, torch.float32))
    layer = layer_of(ScrambledImpl(16, 2, 32, 0), 4, torch.float32)
    layer.num_kv_heads = 3
    with pytest.raises(EngineError, match="no whole number of tokens"):
        PagedLayout(layer)


class Attention(SimpleNamespace):
    """What vLLM's plain attention layer is called."""


class MLAAttention(SimpleNamespace):
    """What its multi-head latent one is called."""


class ChunkedLocalAttention(SimpleNamespace):
    """One of its kinds that are no plain ones."""


def plain_layer(kind=Attention, layer=None, **changes):
    impl = {"do_kv_cache_update": print, "alibi_slopes": None, "sinks": None, "logits_soft_cap": 0.0}
    impl |= {"attn_type": "decoder", "kv_cache_dtype": "auto", "kv_sharing_target_layer_name": None} | changes
    return kind(**({"impl": SimpleNamespace(**impl), "sliding_window": None, "head_size": 32} | (layer or {})))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (plain_layer(alibi_slopes=[1.0]), "ALiBi"),
        (plain_layer(sinks=[1.0]), "attention sinks"),
        (plain_layer(layer={"has_sink": True}), "attention sinks"),
        (plain_layer(kv_cache_dtype="fp8_e4m3"), "a quantised KV cache"),
        (plain_layer(layer={"kv_cache_dtype": "int8_per_token_head"}), "a quantised KV cache"),
        (plain_layer(kv_sharing_target_layer_name="x"), "shared KV layers"),
        (plain_layer(attn_type="encoder_decoder"), "cross or encoder attention"),
        (plain_layer(attn_type="encoder_only"), "cross or encoder attention"),
        (plain_layer(MLAAttention), "multi-head latent attention"),
        (plain_layer(ChunkedLocalAttention), r"another kind of attention \(ChunkedLocalAttention\)"),
        (plain_layer(layer={"head_size_v": 64}), "values of another width"),
        (plain_layer(chunk_lookback=2), "a lookback over chunks"),
    ],
)
def test_what_beams_cannot_compute_is_refused(made, said):
    for fine in (plain_layer(), plain_layer(layer={"sliding_window": 128}), plain_layer(logits_soft_cap=30.0)):
        refuse_unsupported("layer", fine)
    with pytest.raises(EngineError, match=said) as raised:
        refuse_unsupported("layer.7", made)
    assert str(raised.value).startswith("Layer layer.7 has ")
    assert str(raised.value).count(". ") == 1  # two sentences


def test_everything_but_beams_stays_with_the_original():
    class Impl:
        scale, logits_soft_cap = 1.0, 2.0

        def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, **kwargs):
            return "original", attn_metadata, kwargs

    impl = Impl()
    teach_beams(impl)
    teach_beams(impl)  # again changes nothing
    assert isinstance(impl, Impl)
    assert impl.forward(None, None, None, None, None, "metadata", None, output_scale=2) == (
        "original",
        "metadata",
        {"output_scale": 2},
    )
    query = torch.randn(2, 1, 4)
    output = torch.empty(2, 4)
    prompt = torch.randn(2, 1, 1, 3, 4)

    def beams():
        made = BeamAttention(GatheredPrompts(*prompt.clone(), Sight([3], 1, None, "cpu")), Progress(0, 0, 2), 1)
        made.descend(torch.zeros((1, 2), dtype=torch.long))
        return made

    assert impl.forward(None, query, query, query, None, beams(), output) is output
    assert torch.equal(output.view(2, 1, 4), beams().forward(query, query, query, 1.0, 2.0))
    assert not torch.equal(output.view(2, 1, 4), beams().forward(query, query, query, 1.0))
