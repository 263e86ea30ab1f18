"""Relative biases against a definition pair by pair in exact arithmetic; buckets at their borders; RoPE."""

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.backbones.relative_bias import RelativeBias, bucket_starts, query_times, rotate, time_buckets, turned
from llmrec.exceptions import BackboneError

CPU = torch.device("cpu")


def exact_bucket(elapsed: int, last: int = 128) -> int:
    """⌊ln(max(1, elapsed)) / 0.301⌋ in 28 digits."""
    return min(last, math.floor(Decimal(max(1, elapsed)).ln() / Decimal("0.301")))


def bucket(one: int, other: int, last: int = 128) -> int:
    return int(time_buckets(torch.tensor(one), torch.tensor(other), last))


@pytest.mark.parametrize(("elapsed", "expected"), [(0, 0), (1, 0), (2, 2), (86400, 37), (31536000, 57), (10**9, 68)])
def test_buckets_by_hand(elapsed: int, expected: int) -> None:
    assert bucket(10**9 + elapsed, 10**9) == bucket(10**9, 10**9 + elapsed) == exact_bucket(elapsed) == expected


def test_buckets_at_their_borders_are_exact() -> None:
    borders = [math.ceil((Decimal("0.301") * number).exp()) for number in range(1, 129)]
    assert borders[-1] < 2**63
    for elapsed in {border + step for border in borders for step in (-1, 0, 1)}:
        assert bucket(elapsed, 0) == exact_bucket(elapsed), elapsed


@settings(max_examples=200, deadline=None)
@given(elapsed=st.integers(0, 2**62), last=st.integers(1, 200))
def test_buckets_are_the_definition(elapsed: int, last: int) -> None:
    assert bucket(elapsed - 2**61, -(2**61), last) == exact_bucket(elapsed, last)


def test_unknown_times_have_a_bucket_of_their_own() -> None:
    times = torch.tensor([UNKNOWN_TIME, 5, 0, -(10**9)])
    buckets = time_buckets(times[:, None], times[None, :])
    assert (buckets[0] == 129).all()
    assert (buckets[:, 0] == 129).all()
    assert (buckets[1:, 1:] < 129).all()
    # Buckets that no int64 reaches: there are 145 of 0.301 in ln 2⁶³, and unknown is behind those asked for.
    assert bucket(2**63 - 1, 0, 1000) == exact_bucket(2**63 - 1, 1000) == 145
    assert bucket(UNKNOWN_TIME, 0, 1000) == 1001


def test_times_far_beyond_the_calendar_break_nothing() -> None:
    assert 0 <= bucket(2**63 - 1, -(2**63) + 1) <= 128
    assert 0 <= bucket(2**62, -(2**62)) <= 128


def test_bucket_starts_ascend_from_zero() -> None:
    starts = bucket_starts(128, CPU)
    assert starts[:3].tolist() == [0, 2, 2]  # no whole second lies in bucket 1
    assert (starts.diff() >= 0).all()
    assert len(starts) == 129
    assert bucket_starts(2, CPU).tolist() == [0, 2, 2]


def drawn(kind: str, max_length: int = 6, num_time_buckets: int = 60, num_heads: int = 1) -> RelativeBias:
    torch.manual_seed(0)
    bias = RelativeBias(kind, max_length, num_time_buckets, num_heads).double()
    bias.reset_parameters(1.0)
    return bias


def definition(
    bias: RelativeBias,
    places: list[int],
    asked: list[int],
    key_places: list[int],
    key_times: list[int],
) -> torch.Tensor:
    """(num_heads, Sq, Sk) pair by pair; zeros where the kind adds nothing, NaN where the key comes later."""
    heads = max(len(table) for table in bias.parameters())
    found = torch.zeros(heads, len(places), len(key_places), dtype=torch.float64)
    for i, (place, time) in enumerate(zip(places, asked, strict=True)):
        for j, (key_place, key_time) in enumerate(zip(key_places, key_times, strict=True)):
            for head in range(heads):
                if key_place > place:
                    found[head, i, j] = torch.nan
                    continue
                if bias.position is not None:
                    found[head, i, j] += bias.position[head, place - key_place].detach()
                if bias.time is not None:
                    known = UNKNOWN_TIME not in (time, key_time)
                    slot = exact_bucket(abs(time - key_time), bias.num_time_buckets) if known else -1
                    found[head, i, j] += bias.time[head, slot].detach()
    return found


def assert_same(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    """(B, heads, Sq, Sk), where the definition is a number."""
    assert found is not None
    found = found.expand(expected.shape)
    torch.testing.assert_close(found[~expected.isnan()], expected[~expected.isnan()], atol=1e-12, rtol=0)


moments = st.integers(-(10**10), 10**10) | st.just(UNKNOWN_TIME)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["position", "time", "position+time", "rope+time"]),
    heads=st.sampled_from([1, 3]),
    times=st.lists(st.tuples(moments, moments), min_size=1, max_size=6),
    cut=st.integers(0, 5),
    how=st.sampled_from(["next", "own", "none"]),
)
def test_bias_is_the_definition(kind: str, heads: int, times: list[tuple[int, int]], cut: int, how: str) -> None:
    bias = drawn(kind, num_heads=heads)
    places = list(range(len(times)))
    own, following = ([pair[part] for pair in times] for part in (0, 1))
    if how == "none":
        own = [UNKNOWN_TIME] * len(own)
    asked = own if how != "next" else [b if b != UNKNOWN_TIME else a for a, b in times]
    expected = definition(bias, places, asked, places, own)[None]
    tensors = [torch.tensor([column]) for column in (places, own, following)]
    arguments = (
        tensors[0],
        None if how == "none" else tensors[1],
        tensors[2] if how == "next" else None,
    )
    assert_same(bias(*arguments), expected)
    # The same queries, apart from the keys: what a cache does.
    cut = min(cut, len(times) - 1)
    later = [None if column is None else column[:, cut:] for column in arguments]
    assert_same(bias(*later, key_places=tensors[0], key_timestamps=arguments[1]), expected[:, :, cut:])


def test_rows_have_their_own_places_and_times() -> None:
    bias = drawn("position+time", num_heads=2)
    places = [[0, 1, 2], [0, 0, 1]]
    times = [[5, 50, 5000], [7, 8, UNKNOWN_TIME]]
    found = bias(torch.tensor(places), torch.tensor(times))
    expected = [definition(bias, places[row], times[row], places[row], times[row]) for row in (0, 1)]
    assert_same(found, torch.stack(expected))


def test_relations_serve_every_layer() -> None:
    torch.manual_seed(0)
    first, second = (RelativeBias("position+time", 6) for _ in range(2))
    places, times = torch.arange(4)[None], torch.tensor([[1, 10, 100, 1000]])
    torch.testing.assert_close(second.of(first.relations(places, times)), second(places, times))
    assert not torch.equal(first(places, times), second(places, times))


@pytest.mark.parametrize("kind", ["none", "rope"])
def test_kinds_without_a_bias(kind: str) -> None:
    bias = RelativeBias(kind, 4)
    assert bias(torch.arange(4)[None], torch.arange(4)[None]) is None
    assert not list(bias.parameters())


def test_sizes_and_spread_of_new_tables() -> None:
    torch.manual_seed(0)
    bias = RelativeBias("position+time", 3000, num_heads=2)
    assert bias.position is not None
    assert bias.time is not None
    assert bias.position.shape == (2, 3000)
    assert bias.time.shape == (2, 130)
    assert 0.019 < bias.position.std() < 0.021


def test_gradients_reach_what_was_used_alone() -> None:
    bias = drawn("position+time", max_length=9)
    found = bias(torch.arange(3)[None], torch.tensor([[0, 100, UNKNOWN_TIME]]))
    found[..., torch.ones(3, 3).tril().bool()].sum().backward()
    slopes = dict(bias.named_parameters())
    assert slopes["position"].grad[0].tolist() == [3, 2, 1, 0, 0, 0, 0, 0, 0]  # type: ignore[index]
    for_time = slopes["time"].grad[0].tolist()  # type: ignore[index]
    assert {number: count for number, count in enumerate(for_time) if count} == {0: 2, 15: 1, 61: 3}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("places", 4), "'places'"),
        (("time", 0), "0 distances"),
        (("time", 4, 0), "0 buckets"),
        (("none", 4, 1, 0), ""),
    ],
)
def test_biases_that_do_not_exist_are_refused(arguments: tuple[str, int], named: str) -> None:
    with pytest.raises(BackboneError, match=f"{named}.*Choose one of none, position, time"):
        RelativeBias(*arguments)


def test_queries_count_from_the_next_time_or_else_their_own() -> None:
    own, following = torch.tensor([1, 2, UNKNOWN_TIME]), torch.tensor([5, UNKNOWN_TIME, UNKNOWN_TIME])
    assert query_times(own, following).tolist() == [5, 2, UNKNOWN_TIME]  # type: ignore[union-attr]
    assert query_times(own, None) is own
    assert query_times(None, following) is following
    assert query_times(None, None) is None


def test_rope_turns_every_pair_by_its_angle() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(5, 6, dtype=torch.float64)
    found = turned(vectors, torch.tensor([0, 1, 2, 50, 7]))
    for row, place in enumerate([0, 1, 2, 50, 7]):
        for pair in range(3):
            angle = place * 10000 ** (-2 * pair / 6)
            number = complex(vectors[row, pair], vectors[row, pair + 3]) * complex(math.cos(angle), math.sin(angle))
            assert found[row, pair].item() == pytest.approx(number.real, abs=1e-12)
            assert found[row, pair + 3].item() == pytest.approx(number.imag, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.integers(0, 10000))
def test_products_of_turned_vectors_know_the_distance_alone(seed: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(2, 3, 4, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    places = torch.randint(0, 50, (2, 4), generator=generator)
    products = [q @ k.mT for q, k in (rotate(queries, keys, places), rotate(queries, keys, places + shift))]
    torch.testing.assert_close(products[0], products[1], atol=1e-9, rtol=0)
    apart = rotate(queries[:, :, 2:], keys, places[:, 2:], places)
    torch.testing.assert_close(apart[0] @ apart[1].mT, products[0][:, :, 2:], atol=1e-9, rtol=0)
    assert (rotate(queries, keys, places, places + 1)[1] - keys).abs().max() > 0.1


def test_rope_keeps_types_and_counts_far_places_exactly() -> None:
    vectors = torch.ones(1, 4, dtype=torch.bfloat16)
    far = turned(vectors, torch.tensor([8191]))
    assert far.dtype == torch.bfloat16
    torch.testing.assert_close(far.double(), turned(vectors.double(), torch.tensor([8191])), atol=0.01, rtol=0)
    with pytest.raises(BackboneError, match="a head has 3"):
        turned(torch.ones(1, 3), torch.tensor([0]))
