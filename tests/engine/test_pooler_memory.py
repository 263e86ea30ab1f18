"""The bound on what is searched at once: what is planned stays within it, and leaves nobody out."""

from itertools import pairwise
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.engine.memory import Portion, SearchMemory


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=0, max_size=40),
    beams=st.integers(0, 600),
    fan_out=st.integers(1, 300),
    limit=st.integers(1, 3_000_000),
    most_rows=st.sampled_from([None, 1, 7, 48, 4096]),
    score=st.sampled_from([0, 24]),
)
def test_plans(lengths, beams, fan_out, limit, most_rows, score):
    memory = SearchMemory(limit, prompt=400, layer=300, held=700, passing=900, score=score, most_rows=most_rows)
    plan = memory.plan(lengths, beams, fan_out)
    assert sorted(place for portion in plan for place in portion.places) == list(range(len(lengths)))
    floor = min(beams, 16 if most_rows is None else min(16, most_rows))
    for portion in plan:
        longest, requests = max(lengths[place] for place in portion.places), len(portion.places)
        rows = requests * portion.width
        assert 1 <= portion.width <= max(1, beams)
        assert most_rows is None or rows <= most_rows or portion.width == 1
        size = memory.size(requests, longest, beams, fan_out, portion.keep, portion.width)
        if requests > 1:
            assert size <= limit
            assert portion.keep
            assert portion.width == max(1, beams)
        elif size > limit:  # nothing is left that could be divided
            assert not portion.keep
            assert portion.width <= max(1, floor)
    # Neighbours in the plan do not fit together: no search is run apart without need.
    for one, other in pairwise(plan):
        together = [*one.places, other.places[0]]
        longest = max(lengths[place] for place in together)
        fits = memory.size(len(together), longest, beams, fan_out) <= limit
        assert not fits or (most_rows is not None and len(together) * beams > most_rows)


def test_a_portion_by_hand():
    memory = SearchMemory(limit=10_000, prompt=10, layer=5, held=20, passing=30, score=1)
    # Two prompts of 100 tokens: 2 (100 · 15 + 10 · (20 + 48 · 1) + 10 · (30 + 100)) = 6960; three are 10440.
    assert memory.size(2, 100, 10, 1) == 6960
    assert memory.plan([100, 100, 100], 10, 1) == [Portion([0, 1], True, 10), Portion([2], True, 10)]
    assert memory.plan([100, 7, 100], 10, 1)[0].places == [1, 0]
    # 900 tokens alone: keys and values kept are 13500, read anew 4500; 4 beams are slices of 4.
    assert memory.plan([900], 4, 1) == [Portion([0], False, 4)]
    # 60 beams: 100 · 15 + 60 · 68 = 5580 are there for good, which leaves 34 beams at a time: slices of 30.
    assert memory.plan([100], 60, 1) == [Portion([0], True, 30)]
    assert memory.rows(8).plan([5, 5], 60, 1) == [Portion([0], True, 8), Portion([1], True, 8)]


def test_bytes_of_a_model():
    layer = SimpleNamespace(num_heads=8, num_kv_heads=2, head_size=64)
    config = SimpleNamespace(hidden_size=512, vocab_size=1_000, intermediate_size=2_048)
    memory = SearchMemory.of(1 << 30, [layer] * 3, config, 2, steps=3, gathered=True, fused=False)
    assert memory.prompt == 3 * 2 * 2 * 64 * 2  # layers, keys and values, heads, width, bytes
    assert memory.layer == memory.prompt
    assert memory.held == 3 * (1_536 + 512) + 1_000 * (2 + 8)
    assert memory.score == 8 * 3 * 4
    assert SearchMemory.of(1, [layer], config, 2, 3, gathered=False, fused=True).size(1, 10**9, 1, 0) < 10**6
    config.intermediate_size = None  # GPT-2's: four times the width
    assert SearchMemory.of(1 << 30, [layer] * 3, config, 2, 3, True, False).passing == memory.passing
