"""The promises of `SequenceEncoder`, held by every encoder: padding, causality, rows without items, saving."""

import importlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from llmrec.backbones.encoder import UNKNOWN_TIME, SequenceEncoder, check_length, places_of
from llmrec.backbones.encoders import register_encoders
from llmrec.exceptions import BackboneError

D, LIMIT = 8, 7
SIZES = {"hidden_size": D, "max_position_embeddings": LIMIT, "num_hidden_layers": 2}


def thinking(encoder: dict[str, Any], steps: int, kind: str, block_size: int = 1) -> tuple[str, str, dict[str, Any]]:
    """An encoder that thinks; its own has positions for the thoughts too."""
    inner = {**SIZES, **encoder, "max_position_embeddings": LIMIT + steps * block_size}
    return "reasoning", "Reasoning", {"encoder": inner, "steps": steps, "kind": kind, "block_size": block_size}


# Module, its config, and what they are given beside SIZES.
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hstu": ("hstu", "HSTU", {"num_attention_heads": 2, "qk_dim": 4, "v_dim": 4}),
    "hstu-softmax": ("hstu", "HSTU", {"score": "softmax", "relative_bias": "rope+time", "normalize_by": "length"}),
    "sasrec": ("sasrec", "SASRec", {"num_attention_heads": 2}),
    "sasrec-authors": ("sasrec", "SASRec", {"norm": "authors"}),
    "sasrec-bias": ("sasrec", "SASRec", {"relative_bias": "position+time", "norm": "post"}),
    "gru4rec": ("gru4rec", "GRU4Rec", {}),
    "bert4rec": ("bert4rec", "BERT4Rec", {"num_attention_heads": 2}),
    "llama": ("causal_body", "CausalBody", {"body": "llama", "num_attention_heads": 2}),
    "gpt2": ("causal_body", "CausalBody", {"body": "gpt2", "num_attention_heads": 2}),
    "sasrec-erl": thinking({"model_type": "sasrec", "num_attention_heads": 2}, 2, "erl"),
    "sasrec-block": thinking({"model_type": "sasrec", "relative_bias": "position+time"}, 2, "block", 3),
    "hstu-prl": thinking({"model_type": "hstu", "num_attention_heads": 2, "qk_dim": 4, "v_dim": 4}, 3, "prl"),
    "hstu-block": thinking({"model_type": "hstu", "score": "softmax", "relative_bias": "rope+time"}, 1, "block", 2),
    "gru4rec-prl": thinking({"model_type": "gru4rec"}, 2, "prl"),
    "llama-block": thinking({"model_type": "causal_body", "body": "llama"}, 2, "block", 2),
    "gpt2-erl": thinking({"model_type": "causal_body", "body": "gpt2"}, 1, "erl"),
    "sasrec-unthought": thinking({"model_type": "sasrec"}, 0, "prl"),
}
every = pytest.mark.parametrize("name", ENCODERS)
CAUSAL = [name for name in ENCODERS if name != "bert4rec"]
# Those that can be asked to go on from what they have read.
CACHED = [name for name in CAUSAL if ENCODERS[name][0] != "reasoning"]
# Those that read times.
TIMED = ["hstu", "hstu-softmax", "sasrec-bias", "sasrec-block", "hstu-prl", "hstu-block"]


def built(name: str) -> SequenceEncoder:
    """A model in float64 and eval mode, none of whose parameters has its initial value of 0 or 1."""
    file, prefix, parts = ENCODERS[name]
    module = importlib.import_module(f"llmrec.backbones.{file}")
    torch.manual_seed(0)
    config = getattr(module, f"{prefix}Config")(**SIZES, **parts)
    module.register()
    model: SequenceEncoder = AutoModel.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, SequenceEncoder]:
    """Every encoder, made once; tests leave them as they are."""
    return {name: built(name) for name in ENCODERS}


def history(length: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Representations (1, S, D), times, actions, domains and next times (1, S)."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.randint(0, 10**8, (1, length), generator=generator).cumsum(dim=1)
    events = [torch.randint(0, 3, (1, length), generator=generator) for _ in range(2)]
    following = torch.cat((times[:, 1:], times[:, -1:] + 60), dim=1)
    return torch.randn(1, length, D, generator=generator, dtype=torch.float64), times, *events, following


def read(model: SequenceEncoder, columns: tuple[torch.Tensor, ...], mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = model(columns[0], mask, *columns[1:])
    return states


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


@every
@pytest.mark.parametrize("filler", [0.0, 1e300, torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 3), (2, 5)])
def test_padding_on_either_side_is_never_used(
    models: dict[str, SequenceEncoder], name: str, filler: float, left: int, right: int
) -> None:
    for length in (1, 4, LIMIT):
        columns = history(length)
        mask = torch.tensor([[0] * left + [1] * length + [0] * right])
        wide = [torch.full((1, left + length + right, D), filler, dtype=torch.float64)]
        wide += [torch.full_like(mask, -(10**9) if filler else UNKNOWN_TIME) for _ in columns[1:]]
        for padded, column in zip(wide, columns, strict=True):
            padded[:, left : left + length] = column
        for given_mask in (mask, mask.bool()):
            states = read(models[name], tuple(wide), given_mask)
            close(states[:, left : left + length], read(models[name], columns))
            assert not states[mask == 0].any()


@every
def test_rows_of_one_batch_do_not_touch(models: dict[str, SequenceEncoder], name: str) -> None:
    lengths = [LIMIT, 2, 0, 5]
    alone = [history(max(1, length), seed) for seed, length in enumerate(lengths)]
    mask = torch.arange(LIMIT) < torch.tensor(lengths)[:, None]
    mask[1] = mask[1].flip(0)
    batch = [column.new_zeros(len(lengths), LIMIT, *column.shape[2:]) for column in alone[0]]
    for row, columns in enumerate(alone):
        for wide, column in zip(batch, columns, strict=True):
            wide[row, mask[row]] = column[0, : lengths[row]]
    states = read(models[name], tuple(batch), mask)
    for row, columns in enumerate(alone):
        if lengths[row]:
            close(states[row, mask[row]], read(models[name], columns)[0])
    assert not states[~mask].any()


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(1, LIMIT - 1), seed=st.integers(0, 100))
@pytest.mark.parametrize("name", CAUSAL)
def test_states_know_nothing_later(models: dict[str, SequenceEncoder], name: str, cut: int, seed: int) -> None:
    assert models[name].causal
    columns, other = history(LIMIT, seed), history(LIMIT, seed + 1000)
    changed = tuple(torch.cat((a[:, :cut], b[:, cut:]), dim=1) for a, b in zip(columns, other, strict=True))
    shorter = tuple(column[:, :cut] for column in columns)
    before, after = read(models[name], columns), read(models[name], changed)
    close(before[:, :cut], after[:, :cut])
    close(before[:, :cut], read(models[name], shorter))
    assert (before[:, cut] - after[:, cut]).abs().max() > 1e-4


@every
def test_states_know_all_before(models: dict[str, SequenceEncoder], name: str) -> None:
    columns = history(LIMIT)
    before = read(models[name], columns)
    for place in range(LIMIT):
        changed = (columns[0].clone(), *columns[1:])
        changed[0][0, place] = torch.arange(D)
        moved = (read(models[name], changed) - before)[0].abs().amax(dim=1) > 1e-7
        reached = range(place, LIMIT) if models[name].causal else range(LIMIT)
        assert moved.nonzero().flatten().tolist() == list(reached)
    swapped = (columns[0][:, [1, 0, *range(2, LIMIT)]], *columns[1:])
    assert (read(models[name], swapped) - before)[0, -1].abs().max() > 1e-6


@every
def test_gradients_are_finite_and_stay_where_items_are(models: dict[str, SequenceEncoder], name: str) -> None:
    model = models[name]
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    inputs = torch.randn(4, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = inputs.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    times = torch.randint(0, 10**9, (4, 5))
    model.zero_grad()
    model(inputs, mask, times).square().sum().backward()
    assert inputs.grad is not None
    assert ((inputs.grad.abs().sum(dim=-1) > 0) == mask).all()
    slopes = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert slopes
    assert all(slope.isfinite().all() for slope in slopes)
    # Nobody's item: zeros, and a loss that still can be differentiated.
    before = inputs.grad.clone()
    nothing = model(inputs, torch.zeros_like(mask), times)
    assert not nothing.any()
    nothing.sum().backward()
    assert torch.equal(inputs.grad, before)
    slopes = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(slope.isfinite().all() for slope in slopes)
    model.zero_grad()


@every
def test_times_matter_to_those_who_read_them(models: dict[str, SequenceEncoder], name: str) -> None:
    columns = history(5)
    later = (columns[0], columns[1] * 1000, columns[2], columns[3], columns[4] * 1000)
    moved = (read(models[name], columns) - read(models[name], later)).abs().max() > 1e-6
    assert bool(moved) == (name in TIMED)
    unknown = torch.full((1, 5), UNKNOWN_TIME)
    nobody = (columns[0], unknown, columns[2], columns[3], unknown)
    close(read(models[name], nobody), read(models[name], columns[:1]))
    # Where the next time is unknown, a place counts from its own.
    close(
        read(models[name], (*columns[:4], unknown)),
        read(models[name], columns[:4]),
    )


@every
def test_ties_in_time_and_one_item_give_numbers(models: dict[str, SequenceEncoder], name: str) -> None:
    for length in (1, LIMIT):
        columns = history(length)
        same = (columns[0], torch.full_like(columns[1], 7), *columns[2:4], torch.full_like(columns[1], 7))
        assert read(models[name], same).isfinite().all()


@every
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)], ids=str)
def test_batches_of_nothing_are_nothing(models: dict[str, SequenceEncoder], name: str, shape: tuple[int, int]) -> None:
    nothing = torch.zeros(*shape, D, dtype=torch.float64)
    for mask in (None, torch.ones(shape, dtype=torch.bool)):
        assert read(models[name], (nothing,), mask).shape == (*shape, D)


@every
def test_histories_of_too_many_items_are_refused(models: dict[str, SequenceEncoder], name: str) -> None:
    longer = history(LIMIT + 1)
    with pytest.raises(BackboneError, match=f"{LIMIT + 1} items.*positions for {LIMIT}. Keep its last {LIMIT}"):
        read(models[name], longer)
    with pytest.raises(BackboneError, match=f"{LIMIT + 1} items"):
        read(models[name], longer, torch.ones(1, LIMIT + 1))
    mask = torch.arange(LIMIT + 1)[None] > 0
    assert read(models[name], longer, mask).shape == (1, LIMIT + 1, D)


@every
def test_what_is_saved_is_what_is_loaded(models: dict[str, SequenceEncoder], name: str, tmp_path: Any) -> None:
    model = models[name]
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    register_encoders()
    register_encoders()
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["max_position_embeddings"] == LIMIT
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(model)
    assert not loaded.training
    saved = model.state_dict()
    assert saved.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, saved[part]) for part, tensor in loaded.state_dict().items())
    columns = history(LIMIT)
    close(read(loaded, columns), read(model, columns))


@every
def test_only_encoders_that_look_ahead_hide_items(models: dict[str, SequenceEncoder], name: str) -> None:
    model = models[name]
    columns = history(4)
    hidden = torch.tensor([[False, True, False, True]])
    if model.causal:
        with pytest.raises(BackboneError, match="is causal and hides no items"):
            model.hide(columns[0], hidden)
        return
    masked = model.hide(columns[0], hidden)
    assert torch.equal(masked[~hidden], columns[0][~hidden])
    assert torch.equal(masked[0, 1], masked[0, 3])
    assert not torch.equal(masked[0, 1], columns[0][0, 1])


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("cuts", [(0, 3, 6, LIMIT), (0, 1, LIMIT), (0, LIMIT)], ids=str)
def test_cached_reading_is_reading_at_once(
    models: dict[str, SequenceEncoder], name: str, cuts: tuple[int, ...]
) -> None:
    model: Any = models[name]
    lengths = torch.tensor([LIMIT, 2, 4])
    columns = [torch.cat(parts) for parts in zip(*(history(LIMIT, seed) for seed in range(3)), strict=True)]
    mask = torch.arange(LIMIT) < lengths[:, None]
    inputs, times, following = columns[0].masked_fill(~mask[..., None], torch.nan), columns[1], columns[4]
    states, cache = [], None
    with torch.no_grad():
        for piece in (slice(*pair) for pair in pairwise(cuts)):
            new = inputs[:, piece], times[:, piece], following[:, piece]
            if cache is None:
                found, cache = model.prefill(new[0], mask[:, piece], *new[1:])
            else:
                found, cache = model.extend(cache, *new, mask=mask[:, piece])
            states.append(found)
        close(torch.cat(states, dim=1), read(model, tuple(columns), mask))
        with pytest.raises(BackboneError, match=f"{LIMIT + 1} items"):
            model.extend(cache, columns[0][:, :1], times[:, :1])


@pytest.mark.parametrize("name", CACHED)
def test_isolated_candidates_are_read_one_by_one(models: dict[str, SequenceEncoder], name: str) -> None:
    model: Any = models[name]
    columns, candidates = history(LIMIT - 1), history(LIMIT + 2, seed=1)
    with torch.no_grad():
        _, cache = model.prefill(columns[0], None, columns[1], columns[4])
        found, after = model.extend(cache, candidates[0], candidates[1], candidates[4], isolated=True)
    assert after is cache
    for place in range(LIMIT + 2):
        one = slice(place, place + 1)
        longer = tuple(torch.cat((a, b[:, one]), dim=1) for a, b in zip(columns, candidates, strict=True))
        close(found[:, place], read(model, longer)[:, -1])


def test_places_count_from_the_oldest_item() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    assert places_of(mask).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 2], [0, 0, 0, 0]]


def test_the_longest_history_counts_without_its_padding() -> None:
    config = built("hstu").config
    check_length(config, LIMIT, None)
    check_length(config, 99, torch.ones(2, LIMIT))
    with pytest.raises(BackboneError, match="A history holds 8 items, and this hstu has positions for 7"):
        check_length(config, 8, None)
    with pytest.raises(BackboneError, match="A history holds 9 items"):
        check_length(config, 9, torch.tensor([[1] * 3 + [0] * 6, [1] * 9]))
