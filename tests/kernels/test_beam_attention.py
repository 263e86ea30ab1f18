"""Attention of beams in two parts, against one softmax over all keys in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.kernels.beam_attention import attend, merge, suffix_attention


def whole(query, keys, values, scale, softcap):
    """Attention of one query (D,) over keys and values (n, D)."""
    score = keys @ query * scale
    return ((softcap * (score / softcap).tanh()) if softcap else score).softmax(0) @ values


def drawn(seed, requests, beams, kv_heads, group, width, steps, length):
    """A search's query and own keys, values and ancestors, and a prompt of its own for each request."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    stored = beams + 2
    ancestors = torch.randint(0, stored, (steps, requests, beams), generator=generator)
    ancestors[-1] = torch.arange(beams)
    own = normal(2, steps, requests, stored, kv_heads, width)
    prompt = normal(2, requests, kv_heads, length, width)
    return normal(requests, beams, kv_heads * group, width), own, ancestors, prompt


def prompt_part(query, prompt, scale, softcap, first=0):
    """Output (R, H_kv, W·G, D) and LSE of the prompt's keys from `first` on."""
    kv_heads = prompt.shape[2]
    folded = query.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)
    score = folded @ prompt[0, :, :, first:].transpose(-1, -2) * scale
    score = softcap * (score / softcap).tanh() if softcap else score
    return score.softmax(-1) @ prompt[1, :, :, first:], score.logsumexp(-1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    group=st.sampled_from([1, 2, 3]),
    steps=st.integers(1, 4),
    length=st.integers(1, 6),
    softcap=st.sampled_from([0.0, 1.5]),
    window=st.sampled_from([None, 1, 2, 3, 5, 50]),
    strided=st.booleans(),
)
def test_two_parts_are_one_softmax(seed, group, steps, length, softcap, window, strided):
    query, own, ancestors, prompt = drawn(seed, 2, 3, 2, group, 4, steps, length)
    scale = 0.7
    # The query stands at position T + steps - 1, and sees `window` positions with its own.
    first = 0 if window is None else max(0, length + steps - window)
    before = None if first >= length else prompt_part(query, prompt, scale, softcap, first)
    if strided and before is not None:
        before = tuple(part.transpose(0, 1).contiguous().transpose(0, 1) for part in before)
    found = attend(query, own[0], own[1], ancestors, before, scale, softcap, window)
    oldest = 0 if window is None else max(0, steps - window)
    for request in range(2):
        for beam in range(3):
            for head in range(2 * group):
                kv = head // group
                past = [own[:, s, request, ancestors[s, request, beam], kv] for s in range(oldest, steps)]
                keys, values = torch.cat([prompt[:, request, kv, first:], torch.stack(past, 1)], 1)
                expected = whole(query[request, beam, head], keys, values, scale, softcap)
                assert torch.allclose(found[request, beam, head], expected, atol=1e-12)


def test_without_ancestors_keys_are_in_the_beams_order():
    query, own, _, prompt = drawn(0, 2, 3, 2, 2, 4, 3, 5)
    own = own[:, :, :, :3]
    order = torch.arange(3).expand(3, 2, 3)
    before = prompt_part(query, prompt, 0.5, 0.0)
    plain = attend(query, own[0], own[1], None, before, 0.5)
    assert torch.equal(plain, attend(query, own[0], own[1], order, before, 0.5))


def test_half_precision_is_summed_in_float32():
    query, own, ancestors, prompt = drawn(3, 2, 3, 2, 2, 8, 3, 5)
    before = tuple(part.float() for part in prompt_part(query, prompt, 0.5, 0.0))
    half = attend(query.bfloat16(), own[0].bfloat16(), own[1].bfloat16(), ancestors, before, 0.5)
    assert half.dtype == torch.bfloat16
    rounded = [tensor.bfloat16().double() for tensor in (query, *own)]
    exact = attend(*rounded, ancestors, before, 0.5)
    assert torch.allclose(half.double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("empty", [-torch.inf, torch.inf])
def test_an_empty_part_changes_nothing_whatever_it_holds(empty):
    output, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    nothing, none = torch.full_like(output, torch.nan), torch.full_like(lse, empty)
    for found in (merge(output, lse, nothing, none), merge(nothing, none, output, lse)):
        assert torch.equal(found[0], output)
        assert torch.equal(found[1], lse)
    both = merge(nothing, none, nothing, none)
    assert (both[0] == 0).all()
    assert (both[1] == -torch.inf).all()


def test_large_scores_do_not_overflow():
    query, own, ancestors, _ = drawn(5, 1, 2, 1, 1, 4, 2, 1)
    output, lse = suffix_attention(query * 1e3, own[0] * 1e3, own[1], ancestors, 1.0)
    assert torch.isfinite(output).all()
    assert torch.isfinite(lse).all()
    merged, _ = merge(output, lse, output, lse - 1e6)
    assert torch.equal(merged, output)
