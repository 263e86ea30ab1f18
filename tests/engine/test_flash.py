"""Prompts read by FlashAttention in place: a stand-in for the kernel, which honours block tables, reads caches."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.engine.attention import BeamAttention, GatheredPrompts, Progress, Sight
from llmrec.engine.flash import FlashBeamAttention, FlashReader, PromptLengths, why_gathered
from llmrec.exceptions import EngineError

BLOCK, WIDTH = 4, 8


def flash_attn_varlen_func(
    *,
    q,
    k,
    v,
    max_seqlen_q,
    cu_seqlens_q,
    max_seqlen_k,
    seqused_k,
    softmax_scale,
    causal,
    window_size,
    softcap,
    block_table,
    return_softmax_lse,
    scheduler_metadata,
    num_splits,
    fa_version,
):
    """What the kernel of this name computes, as its docstring in vllm 0.32 says, one query at a time.

    "Query at position i will only attend to keys between [i + seqlen_k - seqlen_q - window_size[0], i + seqlen_k -
    seqlen_q + window_size[1]] inclusive."
    """
    assert q.dim() == 3
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert {t.dtype for t in (cu_seqlens_q, seqused_k, block_table)} == {torch.int32}
    assert block_table.is_contiguous()
    assert not causal
    assert return_softmax_lse
    assert scheduler_metadata is None
    assert max_seqlen_k == int(seqused_k.max())
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert len(cu_seqlens_q) == len(seqused_k) + 1 == len(block_table) + 1
    assert int(cu_seqlens_q[-1]) == len(q)
    output, lse = torch.zeros_like(q), torch.zeros(q.shape[1], len(q), dtype=torch.float64)
    group = q.shape[1] // k.shape[2]
    for request, length in enumerate(seqused_k.tolist()):
        begin, end = cu_seqlens_q[request : request + 2].tolist()
        slots = [(int(block_table[request, t // k.shape[1]]), t % k.shape[1]) for t in range(length)]
        for place in range(begin, end):
            here = place - begin + length - (end - begin)
            left, right = (-1, -1) if window_size is None else window_size
            first = 0 if left < 0 else max(0, here - left)
            last = length - 1 if right < 0 else min(length - 1, here + right)
            assert first <= last
            keys, values = (torch.stack([cache[b, t] for b, t in slots[first : last + 1]]) for cache in (k, v))
            for head in range(q.shape[1]):
                score = keys[:, head // group] @ q[place, head] * softmax_scale
                score = softcap * (score / softcap).tanh() if softcap else score
                output[place, head] = score.softmax(0) @ values[:, head // group]
                lse[head, place] = score.logsumexp(0)
    return output, lse


def a_layer(kv_heads, window, blocks, seed, heads_first=True):
    """A vLLM attention layer with a filled cache, in either of the physical orders that vLLM has."""
    torch.manual_seed(seed)
    shape = (blocks, kv_heads, BLOCK, 2 * WIDTH)
    cache = torch.randn(shape, dtype=torch.float64)
    if not heads_first:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    impl = type("FlashAttentionImpl", (), {"__module__": "vllm.v1.attention.backends.flash_attn"})()
    impl.__dict__ |= {"vllm_flash_attn_version": 3, "fa4_hd256": False, "batch_invariant_enabled": False}
    impl.kv_cache_dtype = "auto"
    return SimpleNamespace(impl=impl, kv_cache=cache, num_kv_heads=kv_heads, head_size=WIDTH, sliding_window=window)


def gathered(layer, table, lengths):
    """The same prompts, by the way that reads them out of the cache."""
    sight = Sight(lengths, BLOCK, layer.sliding_window, "cpu")
    blocks = layer.kv_cache[table.gather(1, sight.columns).long()]  # (R, n, H_kv, block, 2 D)
    whole = blocks.permute(0, 2, 1, 3, 4).flatten(2, 3)
    return GatheredPrompts(whole[..., :WIDTH].clone(), whole[..., WIDTH:].clone(), sight)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kv_heads=st.sampled_from([1, 2]),
    queries=st.integers(1, 5),
    cap=st.sampled_from([0.0, 2.0]),
    window=st.sampled_from([None, 1, 2, 3, 5, 9, 40]),
    step=st.integers(0, 3),
    heads_first=st.booleans(),
)
def test_prompts_in_place_are_the_gathered_ones(seed, kv_heads, queries, cap, window, step, heads_first):
    layer = a_layer(kv_heads, window, 12, seed, heads_first)
    lengths = [9, 1, 4]
    table = torch.randperm(12)[:9].view(3, 3).int()
    query = torch.randn(3, queries, kv_heads, WIDTH, dtype=torch.float64).transpose(1, 2)
    prompts = FlashReader(layer, flash_attn_varlen_func).prompts(table, PromptLengths(lengths, "cpu"))
    found = prompts.attend(query, 0.4, cap, step)
    expected = gathered(layer, table.long(), lengths).attend(query, 0.4, cap, step)
    assert (found is None) == (expected is None) == (window is not None and step >= window - 1)
    if found is not None:
        assert torch.allclose(found[0], expected[0], atol=1e-12)
        assert torch.allclose(found[1], expected[1], atol=1e-12)


class SplitByBeams:
    """A search of three steps over one layer, in slices of some beams as the pooler runs them."""

    def __init__(self, seed, kv_heads, group, cap, window, slices):
        torch.manual_seed(seed)
        self.kv_heads, self.group, self.cap, self.window, self.slices = kv_heads, group, cap, window, slices
        self.steps = []
        before = 1
        for width in (3, 6, 5):
            shape = (2, width, kv_heads, WIDTH)
            query = torch.randn(2, width, kv_heads * group, WIDTH, dtype=torch.float64)
            key, value = torch.randn(2, *shape, dtype=torch.float64)
            self.steps.append((torch.randint(0, before, (2, width)), query, key, value))
            before = width

    def run(self, kind, prompts):
        progress, found = Progress(), []
        attention = kind(prompts, progress, len(self.steps), self.window)
        for parents, *parts in self.steps:
            attention.descend(parents)
            width = parents.shape[1]
            for begin in range(0, width, self.slices):
                progress.begin, progress.end = begin, min(width, begin + self.slices)
                some = [part[:, progress.begin : progress.end].flatten(0, 1).contiguous() for part in parts]
                found.append(attention.forward(*some, 0.4, self.cap))
            progress.step += 1
        return found


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    cap=st.sampled_from([0.0, 2.0]),
    window=st.sampled_from([None, 1, 2, 3, 40]),
    slices=st.sampled_from([2, 100]),
)
def test_a_search_that_moves_no_keys_is_the_one_that_does(seed, kv_heads, group, cap, window, slices):
    layer = a_layer(kv_heads, window, 8, seed)
    table, lengths = torch.randperm(8)[:6].view(2, 3).int(), [11, 3]
    search = SplitByBeams(seed, kv_heads, group, cap, window, slices)
    expected = search.run(BeamAttention, gathered(layer, table.long(), lengths))
    prompts = FlashReader(layer, flash_attn_varlen_func).prompts(table, PromptLengths(lengths, "cpu"))
    for kind in (FlashBeamAttention, BeamAttention):
        for mine, theirs in zip(search.run(kind, prompts), expected, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-12)


def test_the_kernel_is_asked_as_the_layer_says():
    asked = []

    def flash(**given):
        asked.append(given)
        return flash_attn_varlen_func(**given)

    layer = a_layer(2, None, 6, 0)
    table, query = torch.arange(6).view(2, 3), torch.randn(2, 2, 4, WIDTH, dtype=torch.float64)
    lengths = PromptLengths([5, 2], "cpu")
    FlashReader(layer, flash).prompts(table, lengths).attend(query, 0.4, 0.0, 0)
    layer.impl.batch_invariant_enabled, layer.impl.vllm_flash_attn_version = True, 2
    FlashReader(layer, flash).prompts(table, lengths).attend(query, 0.4, 0.0, 0)
    assert [(given["num_splits"], given["fa_version"]) for given in asked] == [(0, 3), (1, 2)]
    assert asked[0]["cu_seqlens_q"].tolist() == [0, 4, 8]  # a request's beams and heads of a group are its rows
    assert asked[0]["cu_seqlens_q"] is asked[1]["cu_seqlens_q"]  # one for all layers
    assert asked[0]["k"].data_ptr() == layer.kv_cache.data_ptr()  # nothing is copied


def test_axes_of_length_one_are_made_canonical():
    torch_utils = pytest.importorskip("vllm.utils.torch_utils")
    seen = []

    def flash(**given):
        seen.append((given["k"].stride(), given["v"].stride()))
        return flash_attn_varlen_func(**given)

    layer = a_layer(1, None, 3, 0)
    reader = FlashReader(layer, flash, torch_utils.canonicalize_singleton_dim_strides)
    table, query = torch.zeros(1, 1, dtype=torch.int32), torch.randn(1, 1, 2, WIDTH, dtype=torch.float64)
    reader.prompts(table, PromptLengths([3], "cpu")).attend(query, 0.4, 0.0, 0)
    assert all(stride % 2 == 0 for strides in seen[0] for stride in strides[:-1])
    assert all(strides[2] >= WIDTH for strides in seen[0])


def test_another_layout_is_refused():
    layer = a_layer(2, None, 3, 0)
    layer.kv_cache = layer.kv_cache.transpose(1, 2)
    with pytest.raises(EngineError, match=r"is \(3, 4, 2, 16\), not \(blocks, 2, tokens, 16\)"):
        FlashReader(layer, flash_attn_varlen_func).prompts(torch.zeros(1, 1), PromptLengths([1], "cpu"))


@pytest.mark.parametrize(
    ("changes", "window", "said"),
    [
        ({"vllm_flash_attn_version": None}, None, "FlashAttention None is not known"),
        ({"kv_cache_dtype": "fp8_e4m3"}, None, "quantised"),
        ({"fa4_hd256": True, "vllm_flash_attn_version": 4}, None, "256 numbers per head"),
        ({"vllm_flash_attn_version": 2}, 16, "FlashAttention 2 packs no folded beams"),
        ({"dcp_world_size": 2}, None, "spread over ranks"),
    ],
)
def test_what_flash_cannot_read_is_gathered(changes, window, said):
    assert why_gathered(a_layer(2, window, 1, 0)) is None
    layer = a_layer(2, window, 1, 0)
    layer.impl.__dict__ |= changes
    assert said in why_gathered(layer)
    assert FlashReader.of(layer) is None


def test_other_backends_are_gathered_and_taught_ones_are_not():
    layer = a_layer(2, None, 1, 0)
    layer.impl.__class__ = type("BeamFlashAttentionImpl", (type(layer.impl),), {})
    assert why_gathered(layer) is None
    layer.impl = SimpleNamespace(vllm_flash_attn_version=3)
    assert why_gathered(layer) == "its backend is SimpleNamespace"
