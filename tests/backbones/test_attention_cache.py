"""Histories that are read piece by piece, and rivals behind one history, against `forward` of all of it; every encoder
that can."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.backbones.attention_cache import AttentionCache, KeysAndValues
from llmrec.backbones.causal_body import CausalBodyConfig, CausalBodyModel
from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.backbones.gru4rec import GRU4RecConfig, GRU4RecModel
from llmrec.backbones.sasrec import SASRecConfig, SASRecModel
from llmrec.exceptions import BackboneError

WIDTH, LIMIT = 8, 12
SIZES: dict[str, Any] = {"hidden_size": WIDTH, "max_position_embeddings": LIMIT, "initializer_range": 0.5}
KINDS: dict[str, tuple[Any, Any]] = {
    "sasrec": (SASRecModel, SASRecConfig(**SIZES, num_attention_heads=2)),
    "sasrec-authors-both": (SASRecModel, SASRecConfig(**SIZES, norm="authors", relative_bias="position+time")),
    "sasrec-post-rope": (
        SASRecModel,
        SASRecConfig(**SIZES, norm="post", relative_bias="rope+time", position_embeddings=False),
    ),
    "sasrec-no-blocks": (SASRecModel, SASRecConfig(**SIZES, num_hidden_layers=0)),
    "llama": (CausalBodyModel, CausalBodyConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1)),
    "gpt2": (CausalBodyModel, CausalBodyConfig(**SIZES, body="gpt2", body_hidden_size=12)),
    "gru4rec": (GRU4RecModel, GRU4RecConfig(**SIZES, num_hidden_layers=2, gru_size=5)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def tiny(kind: str) -> Any:
    """A model in float64 and eval mode, none of whose parameters has its initial value of 0 or 1."""
    build, config = KINDS[kind]
    torch.manual_seed(0)
    model = build(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


class Log:
    """Columns of a batch of histories, with padding anywhere, NaN there, and some times unknown."""

    def __init__(self, seed: int, batch: int, columns: int, most: int = LIMIT) -> None:
        generator = np.random.default_rng(seed)
        self.mask = torch.from_numpy(generator.random((batch, columns)) < 0.7)
        self.mask &= self.mask.cumsum(dim=1) <= most
        self.representations = torch.from_numpy(generator.normal(size=(batch, columns, WIDTH)))
        self.representations[~self.mask] = torch.nan
        times = np.exp(generator.uniform(0, 22, size=(2, batch, columns))).astype(np.int64)
        times[generator.random(times.shape) < 0.2] = UNKNOWN_TIME
        self.times, self.next_times = torch.from_numpy(times)

    def cut(self, begin: int, end: int) -> dict[str, torch.Tensor]:
        part = slice(begin, end)
        return {
            "representations": self.representations[:, part],
            "mask": self.mask[:, part],
            "timestamps": self.times[:, part],
            "next_timestamps": self.next_times[:, part],
        }


def full(model: Any, **columns: Any) -> torch.Tensor:
    """`forward`, each history by itself and without padding."""
    states = torch.zeros(columns["representations"].shape, dtype=torch.float64)
    for row, there in enumerate(columns["mask"]):
        if there.any():
            alone = {name: columns[name][row : row + 1, there] for name in columns if name != "mask"}
            states[row, there] = model(**alone)[0]
    return states


@settings(max_examples=120, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 999), cuts=st.lists(st.integers(0, 14), max_size=3))
def test_what_is_read_in_pieces_is_what_is_read_at_once(kind: str, seed: int, cuts: list[int]) -> None:
    model, log = tiny(kind), Log(seed, batch=4, columns=14)
    ends = [*sorted(cuts), 14]
    with torch.no_grad():
        hidden, cache = model.prefill(**log.cut(0, ends[0]))
        pieces = [hidden]
        for begin, end in pairwise(ends):
            hidden, cache = model.extend(cache, **log.cut(begin, end))
            pieces.append(hidden)
        found, expected = torch.cat(pieces, dim=1), full(model, **log.cut(0, 14))
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


@settings(max_examples=120, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 999), read=st.integers(0, 9), rivals=st.integers(1, 4))
def test_rivals_see_the_history_and_themselves(kind: str, seed: int, read: int, rivals: int) -> None:
    model, log = tiny(kind), Log(seed, batch=3, columns=read + rivals, most=LIMIT - 1)
    with torch.no_grad():
        _, cache = model.prefill(**log.cut(0, read))
        found, kept = model.extend(cache, **log.cut(read, read + rivals), isolated=True)
        assert kept is cache
        for rival in range(read, read + rivals):
            chosen = torch.tensor([*range(read), rival])
            alone = {name: tensor[:, chosen] for name, tensor in log.cut(0, read + rivals).items()}
            expected = full(model, **alone)[:, -1]
            torch.testing.assert_close(found[:, rival - read], expected, atol=1e-11, rtol=1e-11)


@kinds
def test_a_cache_is_never_changed(kind: str) -> None:
    model, log = tiny(kind), Log(0, batch=3, columns=9)
    with torch.no_grad():
        _, cache = model.prefill(**log.cut(0, 4))
        first, longer = model.extend(cache, **log.cut(4, 7))
        model.extend(cache, **log.cut(7, 9))
        model.extend(cache, **log.cut(7, 9), isolated=True)
        second, again = model.extend(cache, **log.cut(4, 7))
        assert torch.equal(first, second)
        after = [model.extend(one, **log.cut(7, 9))[0] for one in (longer, again)]
    assert torch.equal(*after)


@kinds
def test_without_masks_and_times_all_are_items_at_unknown_times(kind: str) -> None:
    model = tiny(kind)
    rows = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        expected = model(rows)
        _, cache = model.prefill(rows[:, :4])
        found, _ = model.extend(cache, rows[:, 4:])
        torch.testing.assert_close(found, expected[:, 4:], atol=1e-11, rtol=1e-11)
        times = torch.arange(12).view(2, 6) ** 7
        half = torch.where(torch.arange(6) < 4, UNKNOWN_TIME, times)
        found, _ = model.extend(cache, rows[:, 4:], times[:, 4:])
        torch.testing.assert_close(found, model(rows, None, half)[:, 4:], atol=1e-11, rtol=1e-11)
        half = torch.where(torch.arange(6) < 4, times, UNKNOWN_TIME)
        _, cache = model.prefill(rows[:, :4], None, times[:, :4])
        found, _ = model.extend(cache, rows[:, 4:])
        torch.testing.assert_close(found, model(rows, None, half)[:, 4:], atol=1e-11, rtol=1e-11)


@kinds
def test_nothing_more_changes_nothing(kind: str) -> None:
    model, log = tiny(kind), Log(0, batch=2, columns=5)
    with torch.no_grad():
        _, cache = model.prefill(**log.cut(0, 5))
        for isolated in (False, True):
            states, kept = model.extend(cache, torch.zeros(2, 0, WIDTH, dtype=torch.float64), isolated=isolated)
            assert kept is cache
            assert states.shape == (2, 0, WIDTH)


@kinds
def test_histories_that_get_too_long_are_refused(kind: str) -> None:
    model = tiny(kind)
    rows = torch.randn(2, LIMIT, WIDTH, dtype=torch.float64)
    mask = torch.ones(2, LIMIT, dtype=torch.bool)
    mask[0, :3] = False
    with torch.no_grad():
        _, cache = model.prefill(rows, mask)
        for isolated in (False, True):
            with pytest.raises(BackboneError, match=f"holds {LIMIT + 1} items, .* has positions for {LIMIT}"):
                model.extend(cache, rows[:, :1], isolated=isolated)
            # Padding is no item, also behind a full history.
            padded = torch.tensor([[False, True], [False, False]])
            states, _ = model.extend(cache, rows[:, :2], isolated=isolated, mask=padded)
            assert states[0, 1].any()
            assert not states[1].any()
            assert not states[0, 0].any()
        _, cache = model.prefill(rows[:, :-1])
        # Rivals share one place, however many they are.
        assert model.extend(cache, rows, isolated=True)[0].shape == rows.shape
        with pytest.raises(BackboneError, match=f"holds {LIMIT + 1} items"):
            model.extend(cache, rows[:, :2])


def test_growth_by_hand() -> None:
    cache = AttentionCache((), torch.tensor([[False, True, True], [False, False, False]]))
    mask = torch.tensor([[True, False, True], [False, True, True]])
    grown = cache.growth(SASRecConfig(max_position_embeddings=9), mask)
    assert grown.places.tolist() == [[2, 2, 3], [0, 0, 1]]
    assert grown.key_places.tolist() == [[0, 0, 1, 2, 2, 3], [0, 0, 0, 0, 0, 1]]
    assert grown.timestamps is None
    assert grown.allowed.int()[:, 0].tolist() == [
        [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1]],
        [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]],
    ]
    isolated = cache.growth(SASRecConfig(max_position_embeddings=3), mask, torch.full((2, 3), 5), isolated=True)
    assert isolated.places.tolist() == [[2, 2, 2], [0, 0, 0]]
    assert isolated.allowed.int()[1, 0].tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]
    assert isolated.timestamps is not None
    assert isolated.timestamps.tolist() == [[UNKNOWN_TIME] * 3 + [5] * 3] * 2


def test_a_cache_holds_what_was_read_and_no_more() -> None:
    model = tiny("sasrec")
    _, cache = model.prefill(torch.zeros(3, 5, WIDTH, dtype=torch.float64))
    assert [type(layer) for layer in cache.layers] == [KeysAndValues] * 2
    assert {tuple(part.shape) for layer in cache.layers for part in layer} == {(3, 2, 5, 4)}
    _, cache = model.extend(cache, torch.zeros(3, 2, WIDTH, dtype=torch.float64))
    assert {tuple(part.shape) for layer in cache.layers for part in layer} == {(3, 2, 7, 4)}
    assert cache.mask.shape == (3, 7)
