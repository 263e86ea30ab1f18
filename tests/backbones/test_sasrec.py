"""SASRec and its variants against a float64 numpy definition; causality, padding, times, saving."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.backbones.sasrec import SASRecConfig, SASRecModel, register
from llmrec.exceptions import BackboneError

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "no-blocks": {"num_hidden_layers": 0},
    "four-heads": {"num_attention_heads": 4, "num_hidden_layers": 1},
    "authors": {"norm": "authors"},
    "post": {"norm": "post"},
    "post-gelu": {"norm": "post", "feed_forward": "gelu", "output_projection": True, "gate": True},
    "gelu": {"feed_forward": "gelu", "intermediate_size": 5},
    "llama": {"residual": "llama"},
    "llama-relu": {"residual": "llama", "feed_forward": "relu", "output_projection": False},
    "esasrec": {"gate": True, "feed_forward": "swiglu", "output_projection": True},
    "authors-gate": {"norm": "authors", "gate": True},
    "position": {"relative_bias": "position", "position_embeddings": False},
    "time": {"relative_bias": "time", "num_time_buckets": 30},
    "both-llama": {"relative_bias": "position+time", "residual": "llama"},
    "rope": {"relative_bias": "rope", "position_embeddings": False},
    "rope+time": {"relative_bias": "rope+time", "residual": "llama", "gate": True},
}
variants = pytest.mark.parametrize("name", VARIANTS)


def tiny(seed: int = 0, **sizes: Any) -> SASRecModel:
    """A model in float64 and eval mode, none of whose parameters has its initial value of 0 or 1."""
    given_sizes = {
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 7,
        "initializer_range": 0.5, **sizes,
    }  # fmt: skip
    torch.manual_seed(seed)
    model: SASRecModel = SASRecModel(SASRecConfig(**given_sizes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def random_history(seed: int, length: int, model: SASRecModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Representations (S, D), times and next times (S,), a few of both unknown."""
    generator = np.random.default_rng(seed)
    representations = generator.normal(size=(length, model.config.hidden_size))
    times = np.exp(generator.uniform(0, 22, size=(2, length))).astype(np.int64)
    times[generator.random((2, length)) < 0.2] = UNKNOWN_TIME
    return torch.from_numpy(representations), torch.from_numpy(times[0]), torch.from_numpy(times[1])


class Definition:
    """A SASRec place by place and head by head, in numpy."""

    def __init__(self, model: SASRecModel) -> None:
        self.weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        self.config = model.config

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        if self.config.residual == "llama":
            scaled = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-8)
            return np.asarray(scaled * self.weights[f"{name}.weight"])
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-8)
        return np.asarray(scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"])

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0))

    def feed_forward(self, x: np.ndarray, name: str) -> np.ndarray:
        inner = self.linear(x, f"{name}.inner")
        kind = self.config.feed_forward or {"sasrec": "relu", "llama": "swiglu"}[self.config.residual]
        if kind == "relu":
            inner = np.maximum(inner, 0)
        elif kind == "gelu":
            inner = F.gelu(torch.from_numpy(inner)).numpy()
        else:
            inner = inner / (1 + np.exp(-inner)) * self.linear(x, f"{name}.beside")
        return self.linear(inner, f"{name}.outer")

    def bias(self, name: str, query: int, key: int, times: np.ndarray, next_times: np.ndarray) -> float:
        total = 0.0
        if "position" in self.config.relative_bias:
            total += self.weights[f"{name}.position"][0, query - key]
        if "time" in self.config.relative_bias:
            asked = times[query] if next_times[query] == UNKNOWN_TIME else next_times[query]
            last = self.config.num_time_buckets
            if UNKNOWN_TIME in (asked, times[key]):
                bucket = last + 1
            else:
                bucket = min(int(np.log(max(1, abs(int(asked) - int(times[key])))) / 0.301), last)
            total += self.weights[f"{name}.time"][0, bucket]
        return total

    def turned(self, vector: np.ndarray, place: int) -> np.ndarray:
        half = len(vector) // 2
        angles = place * 10_000.0 ** (-np.arange(half) / half)
        numbers = (vector[:half] + 1j * vector[half:]) * np.exp(1j * angles)
        return np.concatenate((numbers.real, numbers.imag))

    def attention(
        self, x: np.ndarray, memory: np.ndarray, name: str, times: np.ndarray, next_times: np.ndarray
    ) -> np.ndarray:
        width = self.config.hidden_size // self.config.num_attention_heads
        queries, keys = self.linear(x, f"{name}.query"), self.linear(memory, f"{name}.key")
        values, read = self.linear(memory, f"{name}.value"), np.zeros_like(x)
        for head in range(self.config.num_attention_heads):
            mine = slice(head * width, (head + 1) * width)
            for place in range(len(x)):
                logits = []
                for seen in range(place + 1):
                    query, key = queries[place, mine], keys[seen, mine]
                    if "rope" in self.config.relative_bias:
                        query, key = self.turned(query, place), self.turned(key, seen)
                    bias = self.bias(f"{name}.relative", place, seen, times, next_times)
                    logits.append(query @ key / np.sqrt(width) + bias)
                shares = np.exp(np.array(logits) - max(logits))
                read[place, mine] = shares / shares.sum() @ values[: place + 1, mine]
        projected = self.config.output_projection
        projected = self.config.residual == "llama" if projected is None else projected
        return self.linear(read, f"{name}.output") if projected else read

    def added(self, x: np.ndarray, normed: np.ndarray, new: np.ndarray, block: str, name: str) -> np.ndarray:
        if self.config.gate:
            new = new / (1 + np.exp(-self.linear(x, f"{block}.{name}_gate")))
        if self.config.norm == "post":
            return self.norm(x + new, f"{block}.{name}_norm")
        return np.asarray((normed if self.config.norm == "authors" else x) + new)

    def __call__(self, representations: Any, times: Any, next_times: Any) -> np.ndarray:
        """(S, D), (S,), (S,) -> (S, D), without padding."""
        times, next_times = np.asarray(times), np.asarray(next_times)
        x = np.asarray(representations) * np.sqrt(self.config.hidden_size)
        if self.config.position_embeddings:
            x = x + self.weights["positions.weight"][: len(x)]
        for layer in range(self.config.num_hidden_layers):
            block, post = f"blocks.{layer}", self.config.norm == "post"
            normed = x if post else self.norm(x, f"{block}.attention_norm")
            memory = x if self.config.norm == "authors" else normed
            read = self.attention(normed, memory, f"{block}.attention", times, next_times)
            x = self.added(x, normed, read, block, "attention")
            normed = x if post else self.norm(x, f"{block}.feed_forward_norm")
            x = self.added(x, normed, self.feed_forward(normed, f"{block}.feed_forward"), block, "feed_forward")
        return x if self.config.norm == "post" else self.norm(x, "norm")


def encode(
    model: SASRecModel, history: tuple[torch.Tensor, ...], left: int = 0, right: int = 0, filler: float = 0.0
) -> torch.Tensor:
    """Hidden states (left + S + right, D) of a history that is padded with `filler` on both sides."""
    mask = torch.tensor([False] * left + [True] * len(history[0]) + [False] * right)
    representations = torch.full((len(mask), model.config.hidden_size), filler, dtype=torch.float64)
    times = torch.full((2, len(mask)), 12345)
    representations[mask], times[:, mask] = history[0], torch.stack(history[1:])
    with torch.no_grad():
        states: torch.Tensor = model(representations[None], mask[None], times[:1], next_timestamps=times[1:])[0]
    return states


@variants
def test_states_are_the_definition(name: str) -> None:
    model = tiny(**VARIANTS[name])
    history = random_history(1, 6, model)
    expected = Definition(model)(*history)
    with torch.no_grad():
        unmasked = model(history[0][None], None, history[1][None], next_timestamps=history[2][None])[0]
    np.testing.assert_allclose(unmasked, expected, atol=1e-12, rtol=1e-12)
    np.testing.assert_allclose(encode(model, history), expected, atol=1e-12, rtol=1e-12)
    np.testing.assert_allclose(encode(model, history, left=2)[2:], expected, atol=1e-12, rtol=1e-12)


def test_times_that_nobody_gives_are_unknown() -> None:
    model = tiny(relative_bias="position+time")
    representations, times, _ = random_history(0, 5, model)
    unknown = torch.full_like(times, UNKNOWN_TIME)
    expected = Definition(model)(representations, unknown, unknown)
    np.testing.assert_allclose(model(representations[None])[0].detach(), expected, atol=1e-12, rtol=1e-12)
    own = model(representations[None], None, times[None])[0].detach()
    np.testing.assert_allclose(own, Definition(model)(representations, times, unknown), atol=1e-12, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(VARIANTS)),
    seed=st.integers(0, 99),
    length=st.integers(1, 7),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    filler=st.sampled_from([0.0, 3.0, np.nan]),
)
def test_padding_on_either_side_changes_nothing(
    name: str, seed: int, length: int, left: int, right: int, filler: float
) -> None:
    model = tiny(**VARIANTS[name])
    history = random_history(seed, length, model)
    padded = encode(model, history, left, right, filler)
    torch.testing.assert_close(padded[left : left + length], encode(model, history), atol=1e-12, rtol=1e-12)
    assert not padded[:left].any()
    assert not padded[left + length :].any()


@variants
@pytest.mark.parametrize("mask", [[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
def test_no_gradient_reaches_the_future_or_the_padding(name: str, mask: list[int]) -> None:
    model = tiny(**VARIANTS[name])
    history = random_history(0, 6, model)
    representations = history[0][None].requires_grad_()
    given_mask = torch.tensor([mask]).bool()
    weights = torch.arange(1.0, 9.0, dtype=torch.float64)  # a sum of what LayerNorm puts out has no gradient
    states = model(representations, given_mask, history[1][None], next_timestamps=history[2][None])
    (states[0, 2] * weights).sum().backward()
    reached = representations.grad[0].abs().sum(dim=1) > 0  # type: ignore[index]
    blind = model.config.num_hidden_layers == 0
    assert reached.tolist() == [bool(mask[0]) and not blind, not blind, True, False, False, False]


def test_rows_of_one_batch_do_not_touch() -> None:
    model = tiny()
    rows = torch.randn(4, 4, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    with torch.no_grad():
        states = model(rows, mask)
        for row in range(3):
            there = mask[row].bool()
            torch.testing.assert_close(states[row, there], model(rows[row : row + 1, there])[0], atol=1e-12, rtol=0)
    assert not states[3].any()


def plain_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, attn_mask: torch.Tensor, **others: Any
) -> torch.Tensor:
    """The definition, which has no answer for a query that may look nowhere: NaN, where some kernels give zeros."""
    assert not others["is_causal"]
    logits = queries @ keys.mT / queries.shape[-1] ** 0.5
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=torch.float64).masked_fill(~attn_mask, -torch.inf)
    read: torch.Tensor = (logits + attn_mask).softmax(dim=-1) @ values
    return read


@pytest.mark.parametrize("name", ["paper", "authors", "both-llama", "rope+time"])
def test_padding_leaves_the_gradients_finite_whatever_the_kernel(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = tiny(**VARIANTS[name])
    rows, mask = torch.randn(3, 2, 8, dtype=torch.float64), torch.tensor([[1, 1], [0, 1], [0, 0]])
    expected = model(rows, mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    found = model(rows, mask)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    found.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("mask", "masked"),
    [(None, False), ([[1, 1, 1], [1, 0, 0], [0, 0, 0]], False), ([[1, 1, 1], [0, 1, 1], [1, 1, 0]], True)],
)
def test_padding_behind_the_items_needs_no_mask(
    monkeypatch: pytest.MonkeyPatch, mask: list[list[int]] | None, masked: bool
) -> None:
    model, seen = tiny(), []
    attention: Any = F.scaled_dot_product_attention

    def spy(*tensors: torch.Tensor, **others: Any) -> torch.Tensor:
        seen.append((others["attn_mask"] is None, others["is_causal"]))
        states: torch.Tensor = attention(*tensors, **others)
        return states

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model(torch.randn(3, 3, 8, dtype=torch.float64), None if mask is None else torch.tensor(mask))
    assert seen == [(not masked, not masked)] * 2


def test_context_that_a_variant_does_not_use_changes_nothing() -> None:
    model = tiny()
    representations = torch.randn(1, 2, 8, dtype=torch.float64)
    context = {name: torch.tensor([[5, 9]]) for name in ("timestamps", "actions", "domains", "next_timestamps")}
    torch.testing.assert_close(model(representations, **context), model(representations))


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout", "feed_forward_dropout"])
def test_dropout_works_while_training_only(kind: str) -> None:
    rates: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "feed_forward_dropout": 0.0}
    model = tiny(**{**rates, kind: 0.5})
    history = random_history(0, 5, model)
    assert torch.equal(encode(model, history), encode(model, history))
    model.train()
    assert not torch.equal(encode(model, history), encode(model, history))
    unchanged = tiny(**rates)
    assert torch.equal(encode(unchanged.train(), history), encode(unchanged.eval(), history))


@pytest.mark.parametrize("name", ["paper", "authors", "both-llama", "rope+time"])
def test_bfloat16_by_autocast_is_near(name: str) -> None:
    model = tiny(**VARIANTS[name]).float()
    representations, times, _ = random_history(0, 6, model)
    arguments = (representations[None].float(), torch.tensor([[0, 1, 1, 1, 1, 1]]), times[None])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(*arguments)
    with torch.no_grad():
        torch.testing.assert_close(found.float(), model(*arguments), atol=0.15, rtol=0.1)


def test_a_history_of_too_many_items_is_refused_and_padding_does_not_count() -> None:
    model = tiny()
    seven = random_history(0, 7, model)
    for padding in ({"left": 4}, {"right": 4}):
        assert encode(model, seven, **padding).shape == (11, 8)
    with pytest.raises(BackboneError, match="holds 8 items, and this sasrec has positions for 7"):
        encode(model, random_history(0, 8, model), left=1)
    with pytest.raises(BackboneError, match="holds 9 items"):
        model(torch.zeros(1, 9, 8, dtype=torch.float64))


def test_an_empty_history_has_no_states() -> None:
    for sizes in VARIANTS.values():
        model = tiny(**sizes)
        nothing = torch.zeros(2, 0, 8, dtype=torch.float64)
        for mask in (None, torch.ones(2, 0, dtype=torch.bool)):
            assert model(nothing, mask, torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 8)


def test_choices_that_do_not_go_together_are_refused() -> None:
    for sizes, words in (
        ({"num_attention_heads": 3}, "8 is not a multiple of num_attention_heads 3"),
        ({"num_attention_heads": 0}, "not a multiple"),
        ({"norm": "none"}, "norm is 'none'. Choose one of pre, authors, post"),
        ({"feed_forward": "tanh"}, "feed_forward is 'tanh'. Choose one of relu, gelu, swiglu"),
        ({"residual": "gpt"}, "residual is 'gpt'. Choose one of sasrec, llama"),
        ({"residual": "llama", "norm": "post"}, "norm is 'post' with residual 'llama'"),
        ({"relative_bias": "alibi"}, "'alibi'"),
    ):
        with pytest.raises(BackboneError, match=words):
            tiny(**sizes)


def test_new_weights_have_the_stated_spread() -> None:
    torch.manual_seed(0)
    config = SASRecConfig(
        hidden_size=64, max_position_embeddings=2000, initializer_range=0.1, relative_bias="position+time"
    )
    model = SASRecModel(config)
    assert model.positions is not None
    assert 0.097 < model.positions.weight.std() < 0.103
    assert 0.09 < model.get_parameter("blocks.1.attention.relative.position").std() < 0.11
    inner = "blocks.0.feed_forward.inner"
    assert abs(model.get_parameter(f"{inner}.weight").std() / (2 / 128) ** 0.5 - 1) < 0.05
    assert not model.get_parameter(f"{inner}.bias").any()
    assert torch.equal(model.get_parameter("norm.weight"), torch.ones(64))


@pytest.mark.parametrize(
    ("sizes", "width"),
    [
        ({}, 64),
        ({"feed_forward": "gelu"}, 256),
        ({"residual": "llama"}, 176),
        ({"feed_forward": "swiglu"}, 176),
        ({"residual": "llama", "feed_forward": "relu"}, 64),
        ({"feed_forward": "gelu", "intermediate_size": 7}, 7),
    ],
)
def test_the_feed_forward_network_has_the_stated_width(sizes: dict[str, Any], width: int) -> None:
    model = SASRecModel(SASRecConfig(hidden_size=64, **sizes))
    assert model.get_submodule("blocks.0.feed_forward.outer").in_features == width


def test_a_llama_has_no_biases_and_a_sasrec_no_output_matrix() -> None:
    llama, sasrec = (dict(tiny(residual=kind).named_parameters()) for kind in ("llama", "sasrec"))
    assert not [name for name in llama if name.endswith("bias")]
    assert "blocks.0.attention.output.weight" in llama
    assert "blocks.0.attention.output.weight" not in sasrec
    assert "blocks.0.feed_forward.inner.bias" in sasrec


@pytest.mark.parametrize("name", ["paper", "post", "both-llama", "rope+time"])
@pytest.mark.parametrize("auto", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path: Any, auto: bool, name: str) -> None:
    model = tiny(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    if auto:
        register()
        register()
        assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings == 7
        loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    else:
        loaded = SASRecModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, SASRecModel)
    assert loaded.config.norm == model.config.norm
    assert not loaded.training
    history = random_history(0, 4, model)
    assert torch.equal(encode(loaded, history), encode(model, history))
