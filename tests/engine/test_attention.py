"""Attention of beams against its definition, and the probing of cache layouts, without vLLM."""

from types import SimpleNamespace

import pytest
import torch

from llmrec.engine.attention import BeamAttention, PagedLayout, refuse_unsupported, teach_beams
from llmrec.exceptions import EngineError


def attend(query, keys, values, scale):
    """One head, one query (D,), keys and values (T, D): softmax attention as it is defined."""
    weights = (keys @ query * scale).softmax(0)
    return weights @ values


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_beams_attend_to_their_prompt_and_their_ancestors(heads, kv_heads, seed):
    torch.manual_seed(seed)
    requests, width, longest, scale = 3, 8, 7, 0.3
    lengths = torch.tensor([7, 1, 4])
    key, value = torch.randn(2, requests, longest, kv_heads, width, dtype=torch.float64)
    attention = BeamAttention(key, value, lengths)
    beams = 1
    # Each beam's own keys and values, oldest first, as plain lists: the definition.
    own = [[[]] for _ in range(requests)]
    for step, now in enumerate([5, 3, 4]):
        parents = torch.randint(0, beams, (requests, now))
        attention.descend(parents)
        new_key, new_value = torch.randn(2, requests * now, kv_heads, width, dtype=torch.float64)
        query = torch.randn(requests * now, heads, width, dtype=torch.float64)
        found = attention.forward(query, new_key, new_value, scale)
        own = [
            [[*own[r][parents[r, w]], (new_key[r * now + w], new_value[r * now + w])] for w in range(now)]
            for r in range(requests)
        ]
        for r in range(requests):
            for w in range(now):
                assert len(own[r][w]) == step + 1
                for head in range(heads):
                    group = head // (heads // kv_heads)
                    keys = torch.stack([*key[r, : lengths[r], group], *(k[group] for k, _ in own[r][w])])
                    values = torch.stack([*value[r, : lengths[r], group], *(v[group] for _, v in own[r][w])])
                    expected = attend(query[r * now + w, head], keys, values, scale)
                    # Scores are taken in float32, as in vLLM.
                    assert torch.allclose(found[r * now + w, head], expected, atol=1e-5)
        beams = now


class ScrambledImpl:
    """A cache whose blocks keep their numbers in an arbitrary order, as packed kernels do."""

    def __init__(self, block, heads, width, seed, lossy=False):
        order = torch.randperm(2 * block * heads * width, generator=torch.Generator().manual_seed(seed))
        self.order, self.shape, self.lossy = order, (block, heads, width), lossy

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_any_layout_is_found_out(dtype, seed):
    block, heads, width = 16, 2, 32
    layer = layer_of(ScrambledImpl(block, heads, width, seed), 6, dtype)
    untouched = layer.kv_cache.clone()
    layout = PagedLayout(layer, block)
    assert torch.equal(layer.kv_cache, untouched)
    key, value = torch.randn(2, 40, heads, width).to(dtype)
    blocks = torch.tensor([[4, 0, 2], [5, 1, 3]])
    slots = torch.tensor([int(blocks[0, place // block]) * block + place % block for place in range(40)])
    layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
    keys, values = layout.read(layer.kv_cache, blocks)
    assert keys.shape == (2, 48, heads, width)
    assert torch.equal(keys[0, :40], key)
    assert torch.equal(values[0, :40], value)


def test_layouts_that_lose_numbers_are_refused():
    with pytest.raises(EngineError, match="could not be probed"):
        PagedLayout(layer_of(ScrambledImpl(16, 2, 32, 0, lossy=True), 4, torch.float32), 16)
    with pytest.raises(EngineError, match="cannot hold"):
        PagedLayout(layer_of(ScrambledImpl(16, 2, 32, 0), 4, torch.float32), 32)


def plain_layer(**changes):
    impl = {"do_kv_cache_update": print, "alibi_slopes": None, "sinks": None, "logits_soft_cap": 0.0}
    impl |= {name: value for name, value in changes.items() if name != "sliding_window"}
    return SimpleNamespace(impl=SimpleNamespace(**impl), sliding_window=changes.get("sliding_window"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliding_window": 128}, "a sliding window"),
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"sinks": [1.0]}, "attention sinks"),
        ({"logits_soft_cap": 30.0}, "a soft cap"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "a quantised KV cache"),
        ({"kv_sharing_target_layer_name": "x"}, "shared KV layers"),
    ],
)
def test_what_beams_cannot_compute_is_refused(changes, said):
    refuse_unsupported("layer", plain_layer())
    with pytest.raises(EngineError, match=said):
        refuse_unsupported("layer", plain_layer(**changes))


def test_everything_but_beams_stays_with_the_original():
    class Impl:
        scale = 1.0

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
    beams = BeamAttention(torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4), torch.tensor([3]))
    again = BeamAttention(beams.key.permute(0, 3, 1, 2), beams.value.transpose(1, 2), torch.tensor([3]))
    assert impl.forward(None, query, query, query, None, beams, output) is output
    assert torch.equal(output.view(2, 1, 4), again.forward(query, query, query, 1.0))
