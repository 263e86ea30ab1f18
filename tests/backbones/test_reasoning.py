"""Latent reasoning against its definition: a history with its thoughts appended, read whole, without any cache."""

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.backbones.bert4rec import BERT4RecConfig
from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.backbones.encoders import register_encoders
from llmrec.backbones.reasoning import ReasoningConfig, ReasoningEncoder
from llmrec.backbones.relative_bias import time_buckets, turned
from llmrec.backbones.transformer_block import Surroundings
from llmrec.exceptions import BackboneError

D, LIMIT = 8, 7
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sasrec": ("sasrec", "SASRec", {"num_attention_heads": 2}),
    "sasrec-bias": ("sasrec", "SASRec", {"relative_bias": "position+time", "norm": "post"}),
    "sasrec-rope": ("sasrec", "SASRec", {"relative_bias": "rope+time", "residual": "llama"}),
    "hstu": ("hstu", "HSTU", {"num_attention_heads": 2, "qk_dim": 4, "v_dim": 4}),
    "hstu-softmax": ("hstu", "HSTU", {"score": "softmax", "relative_bias": "rope+time", "qk_dim": 4, "v_dim": 4}),
    "hstu-length": ("hstu", "HSTU", {"normalize_by": "length", "residual": "llama", "qk_dim": 4, "v_dim": 4}),
    "gru4rec": ("gru4rec", "GRU4Rec", {}),
    "gru4rec-wide": ("gru4rec", "GRU4Rec", {"gru_size": 6}),
    "llama": ("causal_body", "CausalBody", {"body": "llama", "num_attention_heads": 2}),
    "llama-narrow": ("causal_body", "CausalBody", {"num_attention_heads": 2, "body_hidden_size": 4}),
    "gpt2": ("causal_body", "CausalBody", {"body": "gpt2", "num_attention_heads": 2}),
}
KINDS = {"erl": (3, "erl", 1), "prl": (2, "prl", 1), "block": (2, "block", 3)}
ALL = [(name, kind) for name in ENCODERS for kind in KINDS if not (name.startswith("gru") and kind == "block")]


def config_of(name: str, positions: int) -> Any:
    file, prefix, parts = ENCODERS[name]
    module = importlib.import_module(f"llmrec.backbones.{file}")
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "max_position_embeddings": positions}
    return getattr(module, f"{prefix}Config")(**sizes, **parts)


def thinking(name: str, steps: int, kind: str, block: int = 1) -> ReasoningEncoder:
    """In float64 and eval mode, with none of its weights at an initial value of 0 or 1."""
    register_encoders()
    torch.manual_seed(0)
    config = ReasoningConfig.around(config_of(name, LIMIT + steps * block), steps, kind, block)
    model: ReasoningEncoder = ReasoningEncoder(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


MODELS = {(name, kind): thinking(name, *KINDS[kind]) for name, kind in ALL}


def history(length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Items (S, D), times and next times (S,), the last of which is unknown."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.randint(0, 10**6, (length,), generator=generator).cumsum(dim=0)
    following = torch.cat((times[1:], torch.tensor([UNKNOWN_TIME])))
    return torch.randn(length, D, generator=generator, dtype=torch.float64), times, following


def whole(
    encoder: Any, items: torch.Tensor, thoughts: torch.Tensor, allowed: torch.Tensor, times: Any, asked: Any
) -> torch.Tensor:
    """The states (L, D) of items and thoughts behind them, read at once: `allowed` (L, L) says who sees whom.

    Args:
        times, asked: (L,) when each was, and when each counts from.
    """
    kind, count = encoder.config.model_type, len(items)
    places = torch.arange(len(items) + len(thoughts))
    if kind == "gru4rec":
        return torch.as_tensor(encoder.output(encoder.gru(torch.cat((items, thoughts))[None])[0])[0])
    if kind == "causal_body":
        sight = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
        rows = encoder.inward(torch.cat((items, thoughts)))
        read = encoder.body(
            inputs_embeds=rows[None], attention_mask=sight[None, None], position_ids=places[None], use_cache=False
        )
        return torch.as_tensor(encoder.outward(read.last_hidden_state)[0])
    x = items * math.sqrt(D)
    if getattr(encoder, "positions", None) is not None:
        x = x + encoder.positions(places[:count])
    x = torch.cat((x, thoughts))
    if kind == "sasrec":
        relations = encoder.blocks[0].attention.relative.relations(places[None], times[None], asked[None])
        around = Surroundings(places[None], allowed[None, None], relations)
        x = x[None]
        for block in encoder.blocks:
            x, _ = block(x, around)
        return torch.as_tensor(encoder.norm(x)[0])
    settings = encoder.config
    for layer in encoder.layers:
        entering = layer.norm(x)
        u, v, q, k = F.silu(layer.uvqk(entering)).split(layer.widths, dim=-1)
        v, q, k = (part.unflatten(-1, (settings.num_attention_heads, -1)).transpose(0, 1) for part in (v, q, k))
        if "rope" in settings.relative_bias:
            q, k = turned(q, places[None]), turned(k, places[None])
        scores = q @ k.transpose(1, 2) / (math.sqrt(settings.qk_dim) if settings.score == "softmax" else 1)
        if layer.bias.position is not None:
            scores = scores + layer.bias.position[0][(places[:, None] - places).clamp_min(0)]
        if layer.bias.time is not None:
            buckets = time_buckets(asked[:, None], times[None, :], settings.num_time_buckets)
            scores = scores + layer.bias.time[0][buckets]
        if settings.score == "softmax":
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
        else:
            number = settings.max_position_embeddings
            divisor = number if settings.normalize_by == "max_length" else allowed.sum(dim=1, keepdim=True)
            weights = F.silu(scores).masked_fill(~allowed, 0) / divisor
        y = layer.output(u * layer.read_norm((weights @ v).transpose(0, 1).flatten(1)))
        x = x + y
    return torch.as_tensor(encoder.norm(x))


def definition(model: ReasoningEncoder, items: torch.Tensor, times: Any, following: Any) -> torch.Tensor:
    """r_0 … r_K (K + 1, D) behind a history: every step reads all of it again."""
    count, block = len(items), model.config.block_size
    size = min(block, count)
    asked = torch.where(following == UNKNOWN_TIME, times, following)
    thoughts = items[:0]
    found = []
    assert model.step_vectors is not None
    for step in range(model.steps + 1):
        length = count + len(thoughts)
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        for begin in range(count, length, size):
            allowed[begin : begin + size, begin : begin + size] = True
        behind = (one.new_full((len(thoughts),), int(one[-1])) for one in (times, asked))
        when, counted = (torch.cat(pair) for pair in zip((times, asked), behind, strict=True))
        states = whole(model.encoder, items, thoughts, allowed, when, counted)
        found.append(states[-1])
        if step < model.steps:
            thoughts = torch.cat((thoughts, states[-size:] + model.step_vectors[step]))
    return torch.stack(found)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("name", "kind"), ALL)
@torch.no_grad()
def test_steps_are_the_history_read_again_with_its_thoughts(name: str, kind: str) -> None:
    model = MODELS[name, kind]
    items, times, following = history(LIMIT)
    mask = torch.tensor([[False, False] + [True] * LIMIT + [False]])
    wide = [torch.full((1, mask.shape[1], D), torch.nan, dtype=torch.float64)]
    wide += [torch.full(mask.shape, UNKNOWN_TIME) for _ in range(2)]
    for column, one in zip(wide, (items, times, following), strict=True):
        column[0, mask[0]] = one
    everywhere = torch.arange(mask.shape[1])[None]
    reasoned = model.reason(everywhere, wide[0], mask, wide[1], None, None, wide[2])
    answered = model(wide[0], mask, wide[1], None, None, wide[2])
    assert reasoned.noised is None
    for length in range(1, LIMIT + 1):
        expected = definition(model, items[:length], times[:length], following[:length])
        place = int(mask[0].nonzero()[length - 1])
        close(reasoned.states[0, place], expected)
        close(answered[0, place], expected.mean(dim=0) if kind == "erl" else expected[-1])
        steps = expected.diff(dim=0).abs().amax(dim=1)
        assert steps.min() > 1e-4  # every step says something new
    assert not reasoned.states[0, ~mask[0]].any()


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_without_steps_it_is_the_encoder_bit_by_bit(name: str) -> None:
    items, times, following = history(LIMIT)
    mask = torch.arange(LIMIT)[None] < 5
    given = (items[None], mask, times[None], None, None, following[None])
    places = torch.tensor([[4, 0, 6]])
    for kind in ("erl", "prl", "block"):
        model = thinking(name, 0, kind)
        assert model.step_vectors is None
        assert torch.equal(model(*given), model.encoder(*given))
        assert torch.equal(model.states_at(places, *given), model.encoder(*given)[:, places[0]])
        assert {f"encoder.{part}" for part in model.encoder.state_dict()} == set(model.state_dict())
    model = MODELS[name, "prl"]
    with model.thinking(0):
        assert torch.equal(model(*given), model.encoder(*given))
    assert not torch.equal(model(*given), model.encoder(*given))


@pytest.mark.parametrize(("name", "kind"), ALL)
@torch.no_grad()
def test_fewer_steps_are_the_first_of_more(name: str, kind: str) -> None:
    model = MODELS[name, kind]
    items, times, following = history(5)
    given = (items[None], None, times[None], None, None, following[None])
    states = model.reason(torch.tensor([[4]]), *given).states
    for steps in range(model.config.steps + 1):
        with model.thinking(steps):
            found = model(*given)[0, -1]
        close(found, states[0, 0, : steps + 1].mean(dim=0) if kind == "erl" else states[0, 0, steps])
    assert model.steps == model.config.steps
    with pytest.raises(BackboneError, match=r"9 steps .* learnt"), model.thinking(9):
        pass


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), lengths=st.lists(st.integers(0, LIMIT), min_size=1, max_size=4))
@pytest.mark.parametrize(("name", "kind"), [("sasrec-bias", "block"), ("hstu", "prl"), ("gru4rec", "erl")])
@torch.no_grad()
def test_chosen_places_think_as_all_places_do(name: str, kind: str, seed: int, lengths: list[int]) -> None:
    model = MODELS[name, kind]
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), LIMIT + 1)
    items = torch.randn(*shape, D, generator=generator, dtype=torch.float64)
    times = torch.randint(0, 10**6, shape, generator=generator).cumsum(dim=1)
    keys = torch.rand(shape, generator=generator)  # padding anywhere, also between items
    mask = keys.argsort(dim=1).argsort(dim=1) < torch.tensor(lengths)[:, None]
    places = torch.randint(0, shape[1], (len(lengths), 5), generator=generator)
    every = model(items, mask, times)
    close(model.states_at(places, items, mask, times), every.gather(1, places[..., None].expand(-1, -1, D)))
    for row, length in enumerate(lengths):
        if length:
            alone = [one[row, mask[row]] for one in (items, times)]
            unknown = torch.full((length,), UNKNOWN_TIME)
            close(model(alone[0][None], None, alone[1][None])[0], every[row, mask[row]])
            expected = definition(model, alone[0], alone[1], unknown)
            close(every[row, mask[row]][-1], expected.mean(dim=0) if kind == "erl" else expected[-1])


@torch.no_grad()
def test_noised_thoughts_are_a_line_of_their_own() -> None:
    model = MODELS["sasrec", "prl"]
    items, times, following = history(4)
    given = (items[None], None, times[None], None, None, following[None])
    places = torch.tensor([[3, 1]])
    torch.manual_seed(5)
    found = model.reason(places, *given, noise=0.25)
    assert found.noised is not None
    close(found.states, model.reason(places, *given).states)  # the clean line knows nothing of it
    torch.manual_seed(5)
    assert model.step_vectors is not None
    block, branches = found.states[:, :, :1], model.encoder.branches(places, items[None], torch.ones(1, 4).bool())[1]
    for step in range(2):
        drawn = 0.5 * torch.randn(1, 2, 1, D, dtype=torch.float64)
        block, branches = branches.think(
            block + model.step_vectors[step] + drawn, torch.ones(1, 2, 1, dtype=torch.bool)
        )
        close(found.noised[:, :, step], block[:, :, 0])
    torch.manual_seed(0)
    many = torch.stack([model.reason(places, *given, noise=1e-8).noised for _ in range(200)])  # type: ignore[misc]
    spread = (many[:, :, :, 0] - found.states[:, :, 1]).std()
    assert 1e-6 < spread < 1e-2  # of the order of the noise's √γ


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_gradients_reach_all_weights_and_thoughts_reach_back(name: str, kind: str) -> None:
    model = MODELS[name, kind]
    items, times, following = history(LIMIT)
    inputs = items[None].clone().requires_grad_()
    states = model.reason(torch.tensor([[2]]), inputs, None, times[None], None, None, following[None]).states
    model.zero_grad()
    states[0, 0, -1].square().sum().backward()
    assert model.step_vectors is not None
    assert model.step_vectors.grad is not None
    assert (model.step_vectors.grad.abs().sum(dim=1) > 0).all()
    assert inputs.grad is not None
    reached = inputs.grad[0].abs().sum(dim=1) > 0
    assert reached.tolist() == [True] * 3 + [False] * (LIMIT - 3)
    model.zero_grad()


def test_what_cannot_think_is_refused() -> None:
    register_encoders()
    for config, said in (
        (ReasoningConfig.around(BERT4RecConfig(hidden_size=D, max_position_embeddings=9), 2, "prl"), "both sides"),
        (ReasoningConfig.around(config_of("gru4rec", 12), 2, "block", 2), "one after another"),
        (ReasoningConfig.around(config_of("sasrec", 12), 2, "guess"), "'guess'.*erl, prl, block"),
        (ReasoningConfig.around(config_of("sasrec", 12), 2, "prl", 3), "kind 'prl'"),
        (ReasoningConfig.around(ReasoningConfig.around(config_of("sasrec", 12), 2, "prl"), 2, "prl"), "already"),
        (ReasoningConfig(encoder=config_of("sasrec", 9).to_dict(), steps=3, hidden_size=D), "need 53 positions"),
    ):
        with pytest.raises(BackboneError, match=said):
            ReasoningEncoder(config)
    with pytest.raises(BackboneError, match="no place for an item"):
        ReasoningConfig.around(config_of("sasrec", 6), 3, "block", 2)
    bert = importlib.import_module("llmrec.backbones.bert4rec").BERT4RecModel(BERT4RecConfig(hidden_size=D))
    with pytest.raises(BackboneError, match="reads a history to both sides"):
        bert.branches(torch.zeros(1, 1).long(), torch.zeros(1, 2, D), torch.ones(1, 2).bool())


def test_the_config_says_what_the_encoder_is() -> None:
    config = ReasoningConfig.around(config_of("sasrec-bias", 12), 2, "block", 3)
    assert (config.max_position_embeddings, config.hidden_size, config.relative_bias) == (6, D, "position+time")
    again = ReasoningConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.encoder_config().max_position_embeddings == 12
    assert ReasoningConfig.around(config_of("gru4rec", 12), 1).relative_bias == ""
