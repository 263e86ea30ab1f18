"""SASRec against a float64 numpy definition; causality, padding, saving; the chunked loss against F.cross_entropy."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from llmrec.backbones.sasrec import SASRecConfig, SASRecModel, full_softmax_loss, register
from llmrec.exceptions import BackboneError


def tiny(seed: int = 0, **sizes: Any) -> SASRecModel:
    """A model in float64 and eval mode, none of whose parameters has its initial value of 0 or 1."""
    given_sizes = {
        "num_items": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 7, "initializer_range": 0.5, **sizes,
    }  # fmt: skip
    torch.manual_seed(seed)
    model: SASRecModel = SASRecModel(SASRecConfig(**given_sizes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def layer_norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled: np.ndarray = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-8)
    return np.asarray(scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"])


def definition(model: SASRecModel, items: list[int]) -> np.ndarray:
    """Scores (S, N) of one unpadded history, place by place and head by head, in numpy."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    table, config = weights["items.weight"], model.config
    width = config.hidden_size // config.num_attention_heads
    x = table[items] * np.sqrt(config.hidden_size) + weights["positions.weight"][: len(items)]
    for layer in range(config.num_hidden_layers):
        block = f"blocks.{layer}"
        normed = layer_norm(x, weights, f"{block}.attention_norm")
        queries, keys, values = (
            normed @ weights[f"{block}.attention.{kind}.weight"].T for kind in ("query", "key", "value")
        )
        read = np.zeros_like(x)
        for head in range(config.num_attention_heads):
            mine = slice(head * width, (head + 1) * width)
            for place in range(len(items)):
                logits = keys[: place + 1, mine] @ queries[place, mine] / np.sqrt(width)
                shares = np.exp(logits - logits.max())
                read[place, mine] = shares / shares.sum() @ values[: place + 1, mine]
        x = x + read
        normed = layer_norm(x, weights, f"{block}.feed_forward_norm")
        name = f"{block}.feed_forward"
        inner = np.maximum(normed @ weights[f"{name}.inner.weight"].T + weights[f"{name}.inner.bias"], 0)
        x = x + inner @ weights[f"{name}.outer.weight"].T + weights[f"{name}.outer.bias"]
    return np.asarray(layer_norm(x, weights, "norm") @ table.T)


def encode(model: SASRecModel, items: list[int], left: int = 0, right: int = 0, filler: int = 0) -> torch.Tensor:
    """Hidden states (S, D) of a history that is padded with `filler` on both sides."""
    row = torch.tensor([[filler] * left + items + [filler] * right])
    mask = torch.tensor([[0] * left + [1] * len(items) + [0] * right])
    with torch.no_grad():
        states: torch.Tensor = model(model.represent(row), mask)[0]
    return states


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (1, 2), (2, 4), (0, 1)])
def test_scores_are_the_definition(layers: int, heads: int) -> None:
    model = tiny(num_hidden_layers=layers, num_attention_heads=heads)
    items = [3, 0, 8, 3, 5]
    with torch.no_grad():
        unmasked = model.score(model(model.represent(torch.tensor([items]))))[0]
    np.testing.assert_allclose(unmasked.numpy(), definition(model, items), atol=1e-12)
    np.testing.assert_allclose(model.score(encode(model, items)).detach().numpy(), unmasked.numpy(), atol=1e-12)


histories = st.lists(st.integers(0, 8), min_size=1, max_size=7)


@settings(max_examples=30, deadline=None)
@given(items=histories, left=st.integers(0, 3), right=st.integers(0, 3), filler=st.integers(0, 8))
def test_padding_on_either_side_changes_nothing(items: list[int], left: int, right: int, filler: int) -> None:
    model = tiny()
    padded = encode(model, items, left, right, filler)
    torch.testing.assert_close(padded[left : left + len(items)], encode(model, items), atol=1e-12, rtol=0)
    assert not padded[:left].any()
    assert not padded[left + len(items) :].any()


@settings(max_examples=30, deadline=None)
@given(items=histories, later=histories, cut=st.integers(1, 7))
def test_later_items_change_no_earlier_state(items: list[int], later: list[int], cut: int) -> None:
    model = tiny()
    kept = items[:cut]
    changed = encode(model, (kept + later)[:7])
    torch.testing.assert_close(changed[: len(kept)], encode(model, kept), atol=1e-12, rtol=0)


def test_no_gradient_reaches_the_future_or_the_padding() -> None:
    model = tiny()
    representations = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, True, True, True, True, False]])
    model(representations, mask)[0, 2].sum().backward()
    reached = representations.grad[0].abs().sum(dim=1) > 0  # type: ignore[index]
    assert reached.tolist() == [False, True, True, False, False, False]


def test_order_matters_and_earlier_items_are_seen() -> None:
    model = tiny()
    states = [encode(model, items)[-1] for items in ([1, 2, 3], [2, 1, 3], [4, 2, 3])]
    assert all((states[0] - other).abs().max() > 1e-3 for other in states[1:])


def test_rows_of_one_batch_do_not_touch() -> None:
    model = tiny()
    rows = torch.tensor([[1, 2, 3, 4], [0, 0, 5, 6], [7, 0, 0, 0], [0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    with torch.no_grad():
        states = model(model.represent(rows), mask)
    torch.testing.assert_close(states[0], encode(model, [1, 2, 3, 4]), atol=1e-12, rtol=0)
    torch.testing.assert_close(states[1, 2:], encode(model, [5, 6]), atol=1e-12, rtol=0)
    torch.testing.assert_close(states[2, :1], encode(model, [7]), atol=1e-12, rtol=0)
    assert not states[3].any()


def plain_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, attn_mask: torch.Tensor, is_causal: bool
) -> torch.Tensor:
    """The definition, which has no answer for a query that may look nowhere: NaN, where some kernels give zeros."""
    assert not is_causal
    logits = queries @ keys.mT / queries.shape[-1] ** 0.5
    read: torch.Tensor = logits.masked_fill(~attn_mask, -torch.inf).softmax(dim=-1) @ values
    return read


def test_padding_leaves_the_gradients_finite_whatever_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    rows, mask = torch.tensor([[1, 2], [0, 3], [0, 0]]), torch.tensor([[1, 1], [0, 1], [0, 0]])
    expected = model(model.represent(rows), mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    found = model(model.represent(rows), mask)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    found.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_what_stands_at_padded_places_may_be_no_number() -> None:
    model = tiny()
    mask = torch.tensor([[False, True, True, False]])
    representations = model.represent(torch.tensor([[0, 4, 5, 0]])).detach()
    representations[~mask] = torch.nan
    with torch.no_grad():
        torch.testing.assert_close(model(representations, mask)[0, 1:3], encode(model, [4, 5]), atol=1e-12, rtol=0)


def test_context_that_sasrec_does_not_use_changes_nothing() -> None:
    model = tiny()
    representations = model.represent(torch.tensor([[1, 2]]))
    context = {name: torch.tensor([[5, 9]]) for name in ("timestamps", "actions", "domains")}
    torch.testing.assert_close(model(representations, **context), model(representations))


def test_dropout_works_while_training_only() -> None:
    model = tiny(dropout=0.5)
    assert torch.equal(encode(model, [1, 2]), encode(model, [1, 2]))
    model.train()
    assert not torch.equal(encode(model, [1, 2]), encode(model, [1, 2]))


def test_a_history_of_too_many_items_is_refused_and_padding_does_not_count() -> None:
    model = tiny()
    assert encode(model, [1] * 7, left=4).shape == (11, 8)
    with pytest.raises(BackboneError, match="holds 8 items, and this SASRec has positions for 7"):
        encode(model, [1] * 8)
    with pytest.raises(BackboneError, match="holds 9 items"):
        model(model.represent(torch.zeros(1, 9, dtype=torch.long)))
    with pytest.raises(BackboneError, match="not a multiple"):
        tiny(num_attention_heads=3)


def test_new_weights_have_the_stated_spread() -> None:
    torch.manual_seed(0)
    model = SASRecModel(SASRecConfig(num_items=2000, hidden_size=64, initializer_range=0.1))
    assert 0.097 < model.items.weight.std() < 0.103
    linear = model.get_submodule("blocks.0.feed_forward.inner")
    assert abs(linear.weight.std() / (2 / 128) ** 0.5 - 1) < 0.05
    assert not linear.bias.any()
    assert (model.norm.weight == 1).all()


@pytest.mark.parametrize("auto", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path: Any, auto: bool) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    if auto:
        register()
        register()
        assert AutoConfig.from_pretrained(tmp_path).num_items == 9
        loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    else:
        loaded = SASRecModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, SASRecModel)
    assert loaded.config.max_position_embeddings == 7
    assert not loaded.training
    assert torch.equal(encode(loaded, [1, 2, 3]), encode(model, [1, 2, 3]))
    assert loaded.get_input_embeddings() is loaded.items
    loaded.set_input_embeddings(torch.nn.Embedding(3, 8, dtype=torch.float64))
    assert loaded.score(encode(model, [1])).shape == (1, 3)


def random_loss(
    seed: int, tokens: int, num_items: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(tokens, 5, generator=generator, dtype=dtype)
    table = torch.randn(num_items, 5, generator=generator, dtype=dtype)
    targets = torch.randint(0, num_items, (tokens,), generator=generator)
    return hidden.requires_grad_(), targets, table.requires_grad_()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 20),
    num_items=st.integers(1, 9),
    chunk=st.integers(1, 200),
    factor=st.sampled_from([1.0, -2.5]),
)
def test_chunked_loss_is_cross_entropy_with_its_gradients(
    seed: int, tokens: int, num_items: int, chunk: int, factor: float
) -> None:
    hidden, targets, table = random_loss(seed, tokens, num_items, torch.float64)
    expected = F.cross_entropy(hidden @ table.T, targets)
    slopes = torch.autograd.grad(factor * expected, (hidden, table))
    found = full_softmax_loss(hidden, targets, table, chunk)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    for mine, definition_s in zip(torch.autograd.grad(factor * found, (hidden, table)), slopes, strict=True):
        torch.testing.assert_close(mine, definition_s, atol=1e-12, rtol=1e-12)


def test_chunked_loss_by_hand() -> None:
    # Scores (0, ln 3) and target 1: the loss is ln(4 / 3), the softmax (1/4, 3/4).
    hidden = torch.tensor([[1.0]], requires_grad=True)
    table = torch.tensor([[0.0], [np.log(3.0)]], dtype=torch.float32, requires_grad=True)
    loss = full_softmax_loss(hidden, torch.tensor([1]), table)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(4 / 3))
    assert table.grad is not None
    assert hidden.grad is not None
    np.testing.assert_allclose(table.grad.numpy(), [[0.25], [-0.25]], atol=1e-6)
    np.testing.assert_allclose(hidden.grad.numpy(), [[-0.25 * np.log(3)]], atol=1e-6)


def test_chunked_loss_of_frozen_parts_and_half_precision() -> None:
    hidden, targets, table = random_loss(0, 50, 9, torch.float64)
    expected = F.cross_entropy(hidden @ table.T, targets)
    with torch.no_grad():
        assert full_softmax_loss(hidden, targets, table).item() == pytest.approx(expected.item())
    (for_hidden,) = torch.autograd.grad(full_softmax_loss(hidden, targets, table.detach(), 20), hidden)
    (for_table,) = torch.autograd.grad(full_softmax_loss(hidden.detach(), targets, table, 20), table)
    torch.testing.assert_close([for_hidden, for_table], list(torch.autograd.grad(expected, (hidden, table))))
    with torch.autocast("cpu", torch.bfloat16):
        automatic = full_softmax_loss(hidden.float(), targets, table.float(), 20)
    assert automatic.dtype == torch.float32
    assert automatic.item() == pytest.approx(expected.item(), rel=0.02)
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, table)]
    loss = full_softmax_loss(half[0], targets, half[1], 20)
    exact = F.cross_entropy(half[0].double() @ half[1].double().T, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    loss.backward()
    assert half[1].grad is not None
    torch.testing.assert_close(half[1].grad.double(), for_table, atol=0.01, rtol=0.1)


def test_scores_are_never_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    logsumexp = torch.Tensor.logsumexp

    def spy(scores: torch.Tensor, **arguments: Any) -> torch.Tensor:
        sizes.append(tuple(scores.shape))
        return logsumexp(scores, **arguments)

    monkeypatch.setattr(torch.Tensor, "logsumexp", spy)
    hidden, targets, table = random_loss(0, 25, 9, torch.float32)
    full_softmax_loss(hidden, targets, table, chunk_scores=95).backward()
    assert sizes == [(10, 9), (10, 9), (5, 9)]


def test_a_loss_of_nothing_is_refused() -> None:
    hidden, targets, table = random_loss(0, 1, 3, torch.float32)
    with pytest.raises(BackboneError, match="over 0 tokens"):
        full_softmax_loss(hidden[:0], targets[:0], table)
    with pytest.raises(BackboneError, match="with 0 scores"):
        full_softmax_loss(hidden, targets, table, 0)
