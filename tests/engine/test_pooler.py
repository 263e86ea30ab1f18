"""The pooler around a toy model: a batch as vLLM hands it over, against every sequence run in full."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_models import make_trie
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.beam import Draw, PrefixCap, beam_search
from llmrec.engine.indexes import Indexes
from llmrec.engine.memory import SearchMemory
from llmrec.engine.request import FAILED, OK, REFUSED, Found, SearchParameters
from llmrec.trie import CatalogTrie
from llmrec.trie_tensors import TrieTensors

pytest.importorskip("vllm", reason="this environment has no vLLM")

from vllm.forward_context import get_forward_context

from llmrec.engine import pooler as pooler_module
from llmrec.engine.attention import GatheredPrompts, Sight, teach_beams
from llmrec.engine.pooler import BeamPooler

WIDTH, HEADS, KV_HEADS, HEAD, TOKENS, POSITIONS, BLOCK = 16, 2, 1, 8, 70, 64, 4
TRIE = make_trie(0, 60, (8, 6, 8))


class Impl:
    """A cache as the layer's shape says, keys before values; what vLLM's own forward would be is not asked for."""

    scale = 0.4

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        for token, slot in enumerate(slots.tolist()):
            cache[slot // BLOCK, :, slot % BLOCK, :HEAD] = key[token]
            cache[slot // BLOCK, :, slot % BLOCK, HEAD:] = value[token]

    def forward(self, *args, **kwargs):
        raise AssertionError("beams are to be run here")


class Toy(torch.nn.Module):
    """A decoder of two layers, the second with a window; run in full, or as vLLM runs beams."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.randn(TOKENS, WIDTH)
        self.place = torch.randn(POSITIONS, WIDTH)
        shape = (2, WIDTH, (HEADS + 2 * KV_HEADS) * HEAD)
        self.mix, self.out = torch.randn(shape) * 0.3, torch.randn(2, HEADS * HEAD, WIDTH) * 0.3
        self.layers = {}
        for number, window in enumerate((None, 6)):
            impl = Impl()
            teach_beams(impl)
            self.layers[f"layer{number}"] = SimpleNamespace(
                impl=impl,
                num_heads=HEADS,
                num_kv_heads=KV_HEADS,
                head_size=HEAD,
                sliding_window=window,
                kv_cache=torch.full((200, KV_HEADS, BLOCK, 2 * HEAD), torch.nan),
            )

    def split(self, number, hidden):
        sizes = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
        parts = (hidden @ self.mix[number]).split(sizes, dim=-1)
        return [part.unflatten(-1, (-1, HEAD)) for part in parts]

    def prefill(self, tokens, keep=None):
        """Hidden states of sequences (…, T); `keep(number, keys, values)` gets what a cache would."""
        length = tokens.shape[-1]
        hidden = self.embed[tokens] + self.place[:length]
        distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
        for number, layer in enumerate(self.layers.values()):
            query, key, value = self.split(number, hidden)
            if keep:
                keep(number, key, value)
            seen = (distance >= 0) & (distance < (layer.sliding_window or POSITIONS))
            scores = torch.einsum("...qhd,...kgd->...hqk", query, key) * Impl.scale
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            hidden = hidden + torch.einsum("...hqk,...kgd->...qhd", weights, value).flatten(-2) @ self.out[number]
        return hidden

    def beams(self, tokens, positions):
        """What vLLM's layers do with the forward context."""
        assert tokens.is_contiguous()
        assert positions.is_contiguous()
        assert positions.stride() != (0,)
        assert int(positions.max()) < POSITIONS
        hidden = self.embed[tokens] + self.place[positions]
        context = get_forward_context()
        assert context.slot_mapping == {}
        for number, (name, layer) in enumerate(self.layers.items()):
            output = torch.empty(len(tokens), HEADS * HEAD)
            layer.impl.forward(layer, *self.split(number, hidden), None, context.attn_metadata[name], output)
            hidden = hidden + output @ self.out[number]
        return hidden

    def logits(self, hidden):
        return hidden @ self.embed.T


TOY = Toy()
CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(max_model_len=POSITIONS),
    parallel_config=SimpleNamespace(data_parallel_size=1, use_sequence_parallel_moe=False, is_moe_model=False),
    compilation_config=SimpleNamespace(fast_moe_cold_start=False, static_forward_context={}),
)
# No request of these tests comes near it.
AMPLE = SearchMemory(limit=1 << 40, prompt=1, layer=1, held=1, passing=1, score=0)


def pooler_of(indexes=None, memory=AMPLE, most_beams=100, punica=lambda: None, readers=None):
    made = BeamPooler(CONFIG, TOY.beams, TOY.logits)
    made.prepare(indexes or Indexes(None, lambda: TRIE), TOY.layers, memory, most_beams, punica, readers)
    return made


def pooled(pooler, prompts, given, finished=None, remembered=True):
    """What the pooler says to a batch: prompts in blocks of the cache, hidden states one after the other."""
    tables, hidden = {name: torch.zeros((len(prompts), 20), dtype=torch.int32) for name in TOY.layers}, []
    used = 1
    for row, prompt in enumerate(prompts):

        def keep(number, key, value, row=row, first=used):
            name = f"layer{number}"
            blocks = torch.arange(-(-len(key) // BLOCK)) + first
            tables[name][row, : len(blocks)] = blocks
            slots = torch.arange(len(key)) + first * BLOCK
            TOY.layers[name].impl.do_kv_cache_update(None, key, value, TOY.layers[name].kv_cache, slots)

        hidden.append(TOY.prefill(torch.tensor(prompt), keep))
        used += -(-len(prompt) // BLOCK)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    cursor = SimpleNamespace(
        get_finished_mask=lambda: finished or [True] * len(prompts),
        last_token_indices_gpu=lengths.cumsum(0) - 1,
        prompt_lens_cpu=lengths,
    )
    if remembered:
        pooler.remember({name: SimpleNamespace(block_table=table) for name, table in tables.items()})
    metadata = SimpleNamespace(
        pooling_params=[SimpleNamespace(extra_kwargs=one) for one in given], get_pooling_cursor=lambda: cursor
    )
    return pooler.forward(torch.cat(hidden), metadata)


def expected(prompt, parameters, trie=TRIE):
    paths = [[]]

    def step(tokens, parents):
        nonlocal paths
        paths = [[*paths[p], t] for t, p in zip(tokens[0].tolist(), parents[0].tolist(), strict=True)]
        return TOY.logits(TOY.prefill(torch.tensor([[*prompt, *path] for path in paths]))[:, -1])[None]

    return beam_search(
        TOY.logits(TOY.prefill(torch.tensor(prompt))[-1])[None],
        step,
        trie if parameters.allowed is None else trie.subset(parameters.allowed),
        parameters.num_beams,
        [np.array(parameters.excluded, dtype=np.int64)],
        parameters.renormalize,
        [PrefixCap(parameters.cap_levels, parameters.cap) if parameters.cap else None],
        [Draw(parameters.temperature, parameters.seed) if parameters.temperature else None],
    )


def assert_same(result, prompt, parameters, trie=TRIE):
    assert float(result[0, 0]) == OK
    found, wanted = Found.unpack(result), expected(prompt, parameters, trie)
    rows = [row for row in wanted.items[0].tolist() if row >= 0][: parameters.k]
    assert found.rows == rows
    np.testing.assert_allclose(found.scores, wanted.scores[0, : len(rows)], atol=1e-4)
    if rows:
        np.testing.assert_allclose(found.levels, wanted.levels[0, : len(rows)], atol=1e-4)
    assert found.seconds > 0


def random_request(rng):
    """Parameters of every kind, mixed."""
    rows = rng.permutation(60)
    options = {
        "k": int(rng.integers(1, 30)),
        "num_beams": int(rng.choice([1, 4, 9, 60])),
        "excluded": rows[: rng.integers(0, 20)].tolist() if rng.random() < 0.5 else [],
        "allowed": rows[: rng.integers(0, 40)].tolist() if rng.random() < 0.4 else None,
        "renormalize": bool(rng.random() < 0.3),
        "seed": int(rng.integers(100)),
        "temperature": float(rng.choice([0.0, 0.0, 0.7])),
    }
    if rng.random() < 0.3:
        options |= {"cap_levels": int(rng.integers(1, 4)), "cap": int(rng.integers(1, 4))}
    return SearchParameters(**options)


def random_prompts(rng, count):
    return [rng.integers(0, TOKENS, size=rng.integers(1, 40)).tolist() for _ in range(count)]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), limit=st.sampled_from([1, 3_000, 20_000, 1 << 40]), narrow=st.booleans())
def test_every_batch_is_answered_as_each_request_alone(seed, limit, narrow):
    """Whatever is divided for want of memory: requests, prompts kept or read anew, slices of beams."""
    rng = np.random.default_rng(seed)
    memory = SearchMemory(limit=limit, prompt=80, layer=60, held=40, passing=100, score=3)
    memory = memory.rows(5) if narrow else memory
    prompts, asked = random_prompts(rng, 6), [random_request(rng) for _ in range(6)]
    finished = (rng.random(6) < 0.8).tolist()
    results = pooled(pooler_of(memory=memory), prompts, [one.pack() for one in asked], finished)
    for done, result, prompt, parameters in zip(finished, results, prompts, asked, strict=True):
        if done:
            assert_same(result, prompt, parameters)
        else:
            assert result is None


class InPlace:
    """What reads a layer's prompts where they are, as FlashAttention does."""

    def __init__(self, layer):
        self.layer = layer

    def prompts(self, table, lengths):
        sight = Sight([int(length) for length in lengths.used], BLOCK, self.layer.sliding_window, "cpu")
        assert lengths.longest == max(lengths.used)
        cache = (
            self.layer.kv_cache[table.gather(1, sight.columns).long()].transpose(2, 3).flatten(1, 2).transpose(1, 2)
        )
        return GatheredPrompts(*(part.contiguous() for part in cache.split(HEAD, dim=-1)), sight)


def test_prompts_may_be_read_in_place():
    """The way of a GPU, with the definitions of its kernels: one layer in place, the other gathered."""
    rng = np.random.default_rng(3)
    prompts, asked = random_prompts(rng, 6), [random_request(rng) for _ in range(6)]
    readers = {"layer0": InPlace(TOY.layers["layer0"]), "layer1": None}
    pooler = pooler_of(memory=SearchMemory(20_000, 80, 60, 40, 100, 3), readers=readers)
    for result, prompt, parameters in zip(
        pooled(pooler, prompts, [one.pack() for one in asked]), prompts, asked, strict=True
    ):
        assert_same(result, prompt, parameters)
    metadata = SimpleNamespace(pooling_params=[SimpleNamespace(extra_kwargs=None)] * 3)
    assert len(pooler.forward(torch.zeros(60, WIDTH), metadata)) == 3


def test_given_items_are_scored_by_a_search_among_them():
    rows = list(range(0, 60, 3))
    asked = SearchParameters(k=len(rows), num_beams=len(rows), allowed=rows)
    (result,) = pooled(pooler_of(), [[5, 6, 7]], [asked.pack()])
    found = Found.unpack(result)
    assert sorted(found.rows) == rows
    everything = expected([5, 6, 7], SearchParameters(k=60, num_beams=60))
    scores = dict(zip(everything.items[0].tolist(), everything.scores[0].tolist(), strict=True))
    np.testing.assert_allclose(found.scores, [scores[row] for row in found.rows], atol=1e-5)


def test_a_token_after_the_prompt_is_a_prefill_alone():
    asked = [SearchParameters(num_beams=0, token=token).pack() for token in (3, 69)]
    results = pooled(pooler_of(), [[5, 6, 7], [9]], asked)
    for result, prompt, token in zip(results, ([5, 6, 7], [9]), (3, 69), strict=True):
        wanted = TOY.logits(TOY.prefill(torch.tensor(prompt))[-1]).log_softmax(-1)[token]
        found = Found.unpack(result)
        assert found.rows == [0]
        assert found.scores == pytest.approx([float(wanted)], abs=1e-5)
    strange = SearchParameters(num_beams=0, token=70).pack()
    results = pooled(pooler_of(), [[5], [9]], [strange, asked[0]])
    assert [float(result[0, 0]) for result in results] == [REFUSED, OK]


FINE = SearchParameters(k=3, num_beams=4)


@pytest.mark.parametrize(
    "strange",
    [
        None,
        {"k": 0},
        {"k": "three"},
        {"wide": 3},
        {"index": "nowhere.trie.safetensors"},
        {"index": "../secret"},
        {"subset": "/etc/passwd"},
        {"allowed": [60]},
        {"allowed": [-1]},
        {"allowed": ["3"]},
        {"excluded": [2, 60]},
        {"num_beams": 101},
        {"cap_levels": 4, "cap": 1},
        {"cap": 1},
        {"temperature": -1.0},
        {"temperature": float("inf")},
    ],
)
def test_what_fits_no_search_is_refused_and_nobody_else(strange, tmp_path):
    indexes = Indexes(tmp_path, lambda: TRIE)
    given = None if strange is None else FINE.pack() | strange
    results = pooled(pooler_of(indexes), [[5, 6], [7], [8, 9]], [FINE.pack(), given, FINE.pack()])
    # Without parameters it is no request of ours: its defaults are a search for the best item.
    assert [float(result[0, 0]) for result in results] == [OK, OK if strange is None else REFUSED, OK]
    assert_same(results[0], [5, 6], FINE)
    assert_same(results[2], [8, 9], FINE)


def test_a_prompt_that_leaves_no_room_for_an_item_is_refused():
    prompts = [[3] * (POSITIONS - 2), [3] * (POSITIONS - 1)]
    results = pooled(pooler_of(), prompts, [FINE.pack()] * 2)
    assert [float(result[0, 0]) for result in results] == [OK, REFUSED]
    assert_same(results[0], prompts[0], FINE)


def test_a_search_that_fails_fails_alone(monkeypatch, caplog):
    whole = pooler_module.beam_search

    def search(logits, step, tries, beams, excluded, *options):
        if any(13 in rows for rows in excluded):
            raise ZeroDivisionError("of one request")
        return whole(logits, step, tries, beams, excluded, *options)

    monkeypatch.setattr(pooler_module, "beam_search", search)
    asked = [FINE, SearchParameters(k=3, num_beams=4, excluded=[13]), SearchParameters(k=2, num_beams=4)]
    with caplog.at_level(logging.CRITICAL):
        results = pooled(pooler_of(), [[5, 6], [7], [8, 9]], [one.pack() for one in asked])
    assert [float(result[0, 0]) for result in results] == [OK, FAILED, OK]
    assert_same(results[0], [5, 6], asked[0])
    assert_same(results[2], [8, 9], asked[2])


def test_requests_of_several_indexes_in_one_batch(tmp_path):
    other = make_trie(1, 30, (8, 6, 8))
    other.save(tmp_path / "other")
    other.subset(range(10)).save(tmp_path / "part")
    shallow = TrieTensors(CatalogTrie(np.arange(8).reshape(8, 1)), [np.arange(20, 28)])
    shallow.save(tmp_path / "shallow")
    asked = [FINE, SearchParameters(k=3, num_beams=4, index="other")]
    asked += [SearchParameters(k=9, num_beams=4, index="shallow"), FINE]
    asked += [SearchParameters(k=20, num_beams=20, index="other", subset="part", allowed=[1, 5, 25], excluded=[5, 29])]
    prompts = random_prompts(np.random.default_rng(0), 5)
    results = pooled(pooler_of(Indexes(tmp_path, lambda: TRIE)), prompts, [one.pack() for one in asked])
    tries = [TRIE, other, shallow, TRIE]
    for result, prompt, parameters, trie in zip(results, prompts, asked, tries, strict=False):
        assert_same(result, prompt, parameters, trie)
    assert Found.unpack(results[4]).rows == [1]
    beyond = SearchParameters(k=3, num_beams=4, index="other", allowed=[30])
    assert float(pooled(pooler_of(Indexes(tmp_path, lambda: TRIE)), [[3]], [beyond.pack()])[0][0, 0]) == REFUSED


def test_nothing_is_found_among_nothing():
    asked = [SearchParameters(k=3, num_beams=4, allowed=[]), FINE]
    asked += [SearchParameters(k=3, num_beams=4, excluded=list(range(60)))]
    results = pooled(pooler_of(), [[5, 6], [7], [8]], [one.pack() for one in asked])
    assert [Found.unpack(result).rows for result in results][::2] == [[], []]
    assert_same(results[1], [7], FINE)
    assert Found.unpack(pooled(pooler_of(), [[5]], [asked[0].pack()])[0]).rows == []


def test_block_tables_serve_one_step_alone(caplog):
    pooler = pooler_of()
    assert_same(pooled(pooler, [[5, 6]], [FINE.pack()])[0], [5, 6], FINE)
    # A step that brings none: what the last one brought would name blocks of others. As dual batch overlap, a list.
    for strange in (None, [{"layer0": None}]):
        if strange:
            pooler.remember(strange)
        with caplog.at_level(logging.CRITICAL):
            (result,) = pooled(pooler, [[5, 6]], [FINE.pack()], remembered=False)
        assert float(result[0, 0]) == FAILED
    (result,) = pooled(pooler, [[5, 6]], [FINE.pack()], [False], remembered=False)
    assert result is None


def test_the_dummy_run_searches_the_most_that_the_bound_lets_through():
    widest = []

    def run(tokens, positions):
        widest.append((len(tokens), int(positions.max())))
        return TOY.beams(tokens, positions)

    memory = SearchMemory(limit=40_000, prompt=80, layer=60, held=40, passing=100, score=3)
    pooler = BeamPooler(CONFIG, run, TOY.logits)
    pooler.prepare(Indexes(None, lambda: TRIE), TOY.layers, memory, 20)
    metadata = SimpleNamespace(pooling_params=[SimpleNamespace(extra_kwargs=None)] * 50)
    results = pooler.forward(torch.zeros(60, WIDTH), metadata)
    assert len(results) == 50
    fits = {length: len(memory.plan([length] * 50, 20, 8)[0].places) for length in (1, POSITIONS - 2)}
    assert fits[1] > fits[POSITIONS - 2] >= 1
    assert {(number, place) for number, place in widest if place > 1} >= {
        (fits[POSITIONS - 2] * 8, POSITIONS - 2),
        (fits[POSITIONS - 2] * 20, POSITIONS - 1),
    }
    assert max(number for number, _ in widest) == fits[1] * 20

    def full(tokens, positions):
        raise RuntimeError("out of memory")

    pooler = BeamPooler(CONFIG, full, TOY.logits)
    pooler.prepare(Indexes(None, lambda: TRIE), TOY.layers, memory, 20)
    with pytest.raises(RuntimeError, match="out of memory"):  # so that vLLM does not start
        pooler.forward(torch.zeros(60, WIDTH), metadata)
