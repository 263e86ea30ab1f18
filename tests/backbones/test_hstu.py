"""HSTU against a numpy definition, place by place; jagged and cached reading, M-FALCON, flags, saving."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from llmrec.backbones import hstu
from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.backbones.hstu import HSTUConfig, HSTUModel, register
from llmrec.backbones.hstu_cache import HSTUCache
from llmrec.exceptions import BackboneError
from llmrec.kernels.hstu_attention import hstu_attention

D, LIMIT = 6, 9


def tiny(seed: int = 0, **parts: Any) -> HSTUModel:
    """A model in float64 and eval mode, none of whose parameters has its initial value of 0 or 1."""
    sizes = {
        "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "qk_dim": 4, "v_dim": 3,
        "max_position_embeddings": LIMIT, "num_time_buckets": 40,
    }  # fmt: skip
    torch.manual_seed(seed)
    model: HSTUModel = HSTUModel(HSTUConfig(**{**sizes, **parts})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
    return model


def silu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / (1 + np.exp(-x)))


def normed(x: np.ndarray, weights: dict[str, np.ndarray], name: str, rms: bool = False) -> np.ndarray:
    """LayerNorm or RMSNorm of one vector, with the weights that stand under this name, if any do."""
    centred = x if rms else x - x.mean()
    scaled = centred / np.sqrt((centred**2).mean() + 1e-6)
    return np.asarray(scaled * weights.get(f"{name}.weight", 1.0) + weights.get(f"{name}.bias", 0.0))


def turned(x: np.ndarray, place: int) -> np.ndarray:
    half = len(x) // 2
    angles = place * 10000.0 ** (-2 * np.arange(half) / len(x))
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag])


def definition(model: HSTUModel, inputs: np.ndarray, times: list[int], following: list[int]) -> np.ndarray:
    """States (S, D) of one unpadded history: equations 1-3, one place, head and key at a time."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config = model.config
    heads, rms = config.num_attention_heads, config.residual == "llama"
    asked = [own if then == UNKNOWN_TIME else then for own, then in zip(times, following, strict=True)]
    states = [np.sqrt(D) * row for row in inputs]
    if config.position_embeddings:
        states = [row + weights["positions.weight"][place] for place, row in enumerate(states)]
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}"
        entering = states if config.residual == "post" else [normed(x, weights, f"{name}.norm", rms) for x in states]
        parts = []
        for row in entering:
            widths = [heads * config.v_dim * config.gate, heads * config.v_dim, heads * config.qk_dim]
            parts.append(np.split(silu(weights[f"{name}.uvqk.weight"] @ row), np.cumsum(widths)))
        after = []
        for i, x in enumerate(states):
            read = []
            for head in range(heads):
                scores = []
                for j in range(i + 1):
                    query, key = (
                        parts[place][2 + which].reshape(heads, -1)[head] for which, place in ((0, i), (1, j))
                    )
                    if "rope" in config.relative_bias:
                        query, key = turned(query, i), turned(key, j)
                    score = query @ key / (np.sqrt(config.qk_dim) if config.score == "softmax" else 1)
                    if "position" in config.relative_bias:
                        score += weights[f"{name}.bias.position"][0, i - j]
                    if "time" in config.relative_bias:
                        known = UNKNOWN_TIME not in (asked[i], times[j])
                        bucket = (
                            min(config.num_time_buckets, int(np.log(max(1, abs(asked[i] - times[j]))) / 0.301))
                            if known
                            else -1
                        )
                        score += weights[f"{name}.bias.time"][0, bucket]
                    scores.append(score)
                shares = np.exp(np.array(scores) - max(scores))
                shares /= shares.sum()
                if config.score == "silu":
                    shares = silu(np.array(scores)) / (LIMIT if config.normalize_by == "max_length" else i + 1)
                read.append(shares @ np.stack([parts[j][1].reshape(heads, -1)[head] for j in range(i + 1)]))
            y, u = normed(np.concatenate(read), {}, ""), parts[i][0]
            if config.gate:
                y = np.concatenate([u, y, u * y]) if config.concat_ua else u * y
            y = weights[f"{name}.output.weight"] @ y + weights[f"{name}.output.bias"]
            if config.residual == "post":
                after.append(normed(x + y, weights, f"{name}.norm"))
            else:
                after.append(y + (entering[i] if config.residual == "sasrec" else x))
        states = after
    if config.residual in ("llama", "sasrec"):
        states = [normed(x, weights, "norm", rms) for x in states]
    return np.stack(states)


def drawn(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random inputs (B, S, D), their mask with padding on the right, times and next times, some of them unknown."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    inputs = torch.randn(*shape, D, generator=generator, dtype=torch.float64)
    times = torch.randint(0, 20, shape, generator=generator).double().exp().long().cumsum(dim=1)
    following = torch.cat((times[:, 1:], times[:, -1:] + 1000), dim=1)
    for column in (times, following):
        column[torch.rand(shape, generator=generator) < 0.15] = UNKNOWN_TIME
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return inputs, mask, times, following


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


FLAGS: list[dict[str, Any]] = [
    {},
    *({"relative_bias": kind} for kind in ("none", "position", "time", "rope", "rope+time")),
    {"score": "softmax"},
    {"gate": False},
    {"concat_ua": True},
    {"normalize_by": "length"},
    *({"residual": style} for style in ("llama", "sasrec", "post")),
    {"position_embeddings": False},
    {"score": "softmax", "relative_bias": "rope+time", "gate": False, "residual": "llama", "num_attention_heads": 3},
    {"num_hidden_layers": 1, "num_attention_heads": 1, "qk_dim": 2, "v_dim": 5, "num_time_buckets": 200},
]
named = pytest.mark.parametrize(
    "flags", FLAGS, ids=lambda flags: ",".join(f"{k}={v}" for k, v in flags.items()) or "-"
)


@named
def test_states_are_the_definition(flags: dict[str, Any]) -> None:
    model = tiny(**flags)
    lengths = [5, 1, 9]
    inputs, mask, times, following = drawn(lengths)
    with torch.no_grad():
        states = model(inputs, mask, times, next_timestamps=following)
        own = model(inputs, mask, times)
        unknown = model(inputs, mask)
    nobody = [UNKNOWN_TIME] * max(lengths)
    for row, length in enumerate(lengths):
        history = inputs[row, :length].numpy()
        known, then = times[row, :length].tolist(), following[row, :length].tolist()
        for found, arguments in (
            (states, (known, then)),
            (own, (known, known)),
            (unknown, (nobody[:length], nobody[:length])),
        ):
            np.testing.assert_allclose(found[row, :length].numpy(), definition(model, history, *arguments), atol=1e-11)


@named
def test_jagged_is_padded(flags: dict[str, Any]) -> None:
    model = tiny(**flags)
    lengths = [4, 0, 9, 1]
    inputs, mask, times, following = drawn(lengths)
    offsets = torch.tensor([0, 4, 4, 13, 14])
    with torch.no_grad():
        padded = model(inputs, mask, times, next_timestamps=following)
        close(model.forward_jagged(inputs[mask], offsets, times[mask], following[mask]), padded[mask])
        close(model.forward_jagged(inputs[mask], offsets), model(inputs, mask)[mask])
        alone = [model(inputs[[row], :length], None, times[[row], :length]) for row, length in enumerate(lengths)]
        close(torch.cat(alone, dim=1)[0], model(inputs, mask, times)[mask])


@named
def test_cached_reading_is_reading_at_once(flags: dict[str, Any]) -> None:
    model = tiny(**flags)
    inputs, mask, times, following = drawn([6, 2, 9])
    with torch.no_grad():
        expected = model(inputs, mask, times, next_timestamps=following)
        for cuts in ([0, 3, 4, 9], [0, 0, 1, 9], [0, 8, 9]):
            states, cache = [], None
            for first, last in pairwise(cuts):
                new = inputs[:, first:last], times[:, first:last], following[:, first:last]
                if cache is None:
                    read, cache = model.prefill(new[0], mask[:, first:last], *new[1:])
                else:
                    read, cache = model.extend(cache, *new, mask=mask[:, first:last])
                states.append(read)
            close(torch.cat(states, dim=1), expected)
            assert cache is not None
            assert cache.lengths.tolist() == [6, 2, 9]


@named
def test_isolated_candidates_are_read_one_by_one(flags: dict[str, Any]) -> None:
    model = tiny(**flags)
    lengths, count = [5, 0, 8], 4
    inputs, mask, times, following = drawn(lengths)
    candidates, _, at, then = drawn([count] * 3, seed=1)
    with torch.no_grad():
        _, cache = model.prefill(inputs, mask, times, following)
        before = [tensor.clone() for tensor in (*cache.keys, *cache.values, cache.mask, cache.places)]
        found, after = model.extend(cache, candidates, at, then, isolated=True)
        timeless, _ = model.extend(cache, candidates, isolated=True)
        assert after is cache
        unchanged = (*cache.keys, *cache.values, cache.mask, cache.places)
        assert all(torch.equal(one, other) for one, other in zip(before, unchanged, strict=True))
        for row, length in enumerate(lengths):
            for place in range(count):
                one = slice(place, place + 1)
                longer = torch.cat((inputs[row, :length], candidates[row, one]))[None]
                moments = torch.cat((times[row, :length], at[row, one]))[None]
                asked = torch.cat((following[row, :length], then[row, one]))[None]
                close(found[row, place], model(longer, None, moments, next_timestamps=asked)[0, -1])
                moments[0, -1] = asked[0, -1] = UNKNOWN_TIME
                close(timeless[row, place], model(longer, None, moments, next_timestamps=asked)[0, -1])


def test_a_cache_goes_on_after_isolated_candidates_and_padding_in_the_middle() -> None:
    model = tiny()
    inputs, _, times, following = drawn([9, 9])
    holes = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 1, 0, 0, 0]]).bool()
    with torch.no_grad():
        _, cache = model.prefill(inputs[:, :4], holes[:, :4], times[:, :4], following[:, :4])
        model.extend(cache, inputs[:, 5:], times[:, 5:], isolated=True)
        read, cache = model.extend(cache, inputs[:, 4:], times[:, 4:], following[:, 4:], mask=holes[:, 4:])
        for row in range(2):
            kept = holes[row]
            whole = model(
                inputs[[row]][:, kept], None, times[[row]][:, kept], next_timestamps=following[[row]][:, kept]
            )
            close(read[row][holes[row, 4:]], whole[0, int(kept[:4].sum()) :])
        assert not read[~holes[:, 4:]].any()
        # Reading all at once knows the holes too.
        close(model(inputs, holes, times, next_timestamps=following)[:, 4:], read)


def test_padding_among_isolated_candidates_gives_zeros() -> None:
    model = tiny()
    inputs, mask, times, _ = drawn([LIMIT - 1, 3])
    candidates, there, at, _ = drawn([1, 3], seed=1)
    broken = candidates.masked_fill(~there[..., None], torch.nan)
    with torch.no_grad():
        _, cache = model.prefill(inputs, mask, times)
        found, _ = model.extend(cache, broken, at, isolated=True, mask=there)
        everyone, _ = model.extend(cache, candidates, at, isolated=True)
    close(found[there], everyone[there])
    assert not found[~there].any()


def test_states_change_neither_with_padding_nor_with_the_batch() -> None:
    for normalize_by in ("max_length", "length"):
        model = tiny(normalize_by=normalize_by)
        inputs, _, times, following = drawn([4])
        wide = torch.full((2, 12, D), torch.nan, dtype=torch.float64)
        mask, moments, then = (torch.zeros(2, 12, dtype=kind) for kind in (torch.bool, torch.int64, torch.int64))
        wide[0, 7:11], moments[0, 7:11], then[0, 7:11], mask[0, 7:11] = inputs[0], times[0], following[0], True
        with torch.no_grad():
            padded = model(wide, mask, moments, next_timestamps=then)
            close(padded[0, 7:11], model(inputs, None, times, next_timestamps=following)[0])
        assert not padded[~mask].any()


def test_gradients_of_jagged_and_cached_reading_are_the_same() -> None:
    model = tiny()
    inputs, mask, times, following = drawn([6, 3])
    slopes = []
    for cut in (6, 4):
        model.zero_grad()
        inputs = inputs.detach().requires_grad_()
        read, cache = model.prefill(inputs[:, :cut], mask[:, :cut], times[:, :cut], following[:, :cut])
        later, _ = model.extend(cache, inputs[:, cut:], times[:, cut:], following[:, cut:], mask=mask[:, cut:])
        (torch.cat((read, later), dim=1) ** 2).sum().backward()
        slopes.append([inputs.grad, *(parameter.grad for parameter in model.parameters())])
    assert len(slopes[0]) > 10
    for one, other in zip(*slopes, strict=True):
        assert one is not None
        assert one.abs().max() > 1e-6
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


@settings(max_examples=25, deadline=None)
@given(place=st.integers(0, 6), seed=st.integers(0, 50))
def test_a_state_knows_its_next_time_and_no_later_one(place: int, seed: int) -> None:
    model = tiny(num_time_buckets=128)
    inputs, _, times, following = drawn([7], seed)
    times = times.masked_fill(times == UNKNOWN_TIME, 3)
    changed = following.clone()
    changed[0, place] = 10**12
    with torch.no_grad():
        before, after = (model(inputs, None, times, next_timestamps=then) for then in (following, changed))
    close(before[:, :place], after[:, :place])
    assert (before[0, place] - after[0, place]).abs().max() > 1e-6


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny(dropout=0.0)
    inputs, mask, times, _ = drawn([6, 3])
    slopes = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(inputs, mask, times).square().sum().backward()
        slopes.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(layer.gradient_checkpointing for layer in model.layers)
    torch.testing.assert_close(*slopes, atol=1e-12, rtol=0)


def test_dropout_works_while_training_only() -> None:
    model = tiny(dropout=0.5, num_hidden_layers=1)
    inputs, mask, times, _ = drawn([6, 3])
    assert torch.equal(model(inputs, mask, times), model(inputs, mask, times))
    model.train()
    assert not torch.equal(model(inputs, mask, times), model(inputs, mask, times))
    # On the embedded input and in front of the last matrix: each of them alone changes states.
    inner = model.get_submodule("layers.0.dropout")
    for one, other in ((model.dropout, inner), (inner, model.dropout)):
        one.p, other.p = 0.5, 0.0
        assert not torch.equal(model(inputs, mask, times), model(inputs, mask, times))
    model.dropout.p = inner.p = 0.0
    assert torch.equal(model(inputs, mask, times), model(inputs, mask, times))


def test_too_long_histories_are_refused_and_padding_does_not_count() -> None:
    model = tiny()
    inputs, mask, times, _ = drawn([LIMIT, 3])
    wide = torch.cat((inputs, inputs), dim=1)
    assert model(wide, torch.cat((mask, torch.zeros_like(mask)), dim=1)).shape == (2, 2 * LIMIT, D)
    with pytest.raises(BackboneError, match=r"holds 10 items, and this hstu has positions for 9\. Keep its last 9"):
        model(wide[:, :10])
    with pytest.raises(BackboneError, match="holds 12 items"):
        model.forward_jagged(inputs[mask], torch.tensor([0, 12]))
    with torch.no_grad():
        _, cache = model.prefill(inputs, mask, times)
        for isolated in (False, True):
            with pytest.raises(BackboneError, match="would hold 10 items"):
                model.extend(cache, inputs[:, :1], times[:, :1], isolated=isolated)
        # The shorter history may go on.
        read, grown = model.extend(cache, inputs[:, :2], times[:, :2], mask=torch.tensor([[0, 0], [1, 1]]))
        assert grown.lengths.tolist() == [LIMIT, 5]
        assert not read[0].any()
        # More candidates than positions are no longer histories.
        _, cache = model.prefill(inputs[:, :8], None, times[:, :8])
        assert model.extend(cache, wide, isolated=True)[0].shape == wide.shape


def test_a_history_of_nothing() -> None:
    for score in ("silu", "softmax"):
        model = tiny(score=score)
        nothing = torch.zeros(2, 0, D, dtype=torch.float64)
        assert model(nothing).shape == (2, 0, D)
        assert model(nothing, torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0, D)
        assert model.forward_jagged(nothing[0], torch.tensor([0])).shape == (0, D)
        inputs = torch.ones(2, 3, D, dtype=torch.float64, requires_grad=True)
        model(inputs, torch.zeros(2, 3)).sum().backward()
        assert not inputs.grad.any()  # type: ignore[union-attr]
        _, cache = model.prefill(nothing)
        assert isinstance(cache, HSTUCache)
        close(model.extend(cache, inputs)[0], model(inputs))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"score": "relu"}, "score is 'relu'. Choose one of silu, softmax"),
        ({"normalize_by": "batch"}, "normalize_by is 'batch'"),
        ({"residual": "gpt"}, "residual is 'gpt'. Choose one of hstu, llama, sasrec, post"),
        ({"gate": False, "concat_ua": True}, "concat_ua needs U"),
        ({"relative_bias": "rope", "qk_dim": 3}, "qk_dim is 3. Choose an even one"),
        ({"relative_bias": "alibi"}, "'alibi'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"v_dim": -1}, "v_dim is -1"),
        ({"hidden_size": 0}, "hidden_size is 0"),
    ],
)
def test_models_that_do_not_exist_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        tiny(**flags)


def test_new_weights_have_the_stated_spread() -> None:
    torch.manual_seed(0)
    model = HSTUModel(HSTUConfig(hidden_size=64, initializer_range=0.1, residual="llama"))
    weights = {name.removeprefix("layers.1."): parameter.detach() for name, parameter in model.named_parameters()}
    assert 0.095 < weights["uvqk.weight"].std() < 0.105
    assert 0.08 < weights["bias.time"].std() < 0.12
    assert 0.08 < weights["bias.position"].std() < 0.12
    limit = (6 / 128) ** 0.5
    assert 0.95 * limit < weights["output.weight"].abs().max() <= limit
    assert not weights["output.bias"].any()
    assert abs(weights["positions.weight"].std() * 8 - 1) < 0.03
    assert (weights["norm.weight"] == 1).all()


def test_what_is_saved_is_what_is_loaded(tmp_path: Any) -> None:
    model = tiny(relative_bias="rope+time", residual="llama", position_embeddings=False)
    model.save_pretrained(tmp_path)
    register()
    register()
    assert AutoConfig.from_pretrained(tmp_path).qk_dim == 4
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, HSTUModel)
    assert not loaded.training
    inputs, mask, times, following = drawn([5, 2])
    with torch.no_grad():
        arguments = (inputs, mask, times, None, None, following)
        close(loaded(*arguments), model(*arguments))


def test_the_bias_is_asked_for_once_a_layer_and_the_kernel_knows_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    attention = hstu_attention

    def spy(*arguments: Any, **named_arguments: Any) -> torch.Tensor:
        calls.append(named_arguments)
        assert arguments[4] == LIMIT
        return attention(*arguments, **named_arguments)

    monkeypatch.setattr(hstu, "hstu_attention", spy)
    inputs, mask, times, _ = drawn([5, 2])
    tiny(score="softmax", normalize_by="length", relative_bias="time")(inputs, mask, times)
    assert [(call["score"], call["normalize_by"], call["position_bias"]) for call in calls] == [
        ("softmax", "length", None)
    ] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype: torch.dtype) -> None:
    model = tiny(normalize_by="length")
    inputs, mask, times, following = drawn([7, 4])
    with torch.no_grad():
        exact = model(inputs, mask, times, next_timestamps=following)
        model = model.to(dtype)
        read = model(inputs.to(dtype), mask, times, next_timestamps=following)
        first, cache = model.prefill(inputs[:, :3].to(dtype), mask[:, :3], times[:, :3], following[:, :3])
        rest, _ = model.extend(cache, inputs[:, 3:].to(dtype), times[:, 3:], following[:, 3:], mask=mask[:, 3:])
    assert read.dtype == rest.dtype == dtype
    scale = exact.abs().max()
    assert (read.double() - exact).abs().max() < 0.05 * scale
    assert (torch.cat((first, rest), dim=1).double() - exact).abs().max() < 0.05 * scale


def test_autocast_trains() -> None:
    model = tiny().float().train()
    inputs, mask, times, _ = drawn([7, 4])
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs.float(), mask, times).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
