"""BERT4Rec against a float64 numpy definition; hiding, padding, saving; and what cloze training makes of a chain."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from llmrec.backbones.bert4rec import BERT4RecConfig, BERT4RecModel, register
from llmrec.exceptions import BackboneError


def tiny(**sizes: Any) -> BERT4RecModel:
    """A model in float64 and eval mode, none of whose parameters has its initial value of 0 or 1."""
    torch.manual_seed(0)
    config = BERT4RecConfig(**{"hidden_size": 8, "max_position_embeddings": 7, "initializer_range": 0.5, **sizes})
    model: BERT4RecModel = BERT4RecModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def definition(model: BERT4RecModel, representations: torch.Tensor) -> np.ndarray:
    """(S, D) -> (S, D), place by place and head by head, in numpy."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config = model.config
    width = config.hidden_size // config.num_attention_heads

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-12)
        return np.asarray(scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"])

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])

    def gelu(x: np.ndarray) -> np.ndarray:
        return np.asarray(F.gelu(torch.from_numpy(x)))

    x = norm(representations.numpy() + weights["positions.weight"][: len(representations)], "embedding_norm")
    for layer in range(config.num_hidden_layers):
        block = f"blocks.{layer}"
        queries, keys, values = (linear(x, f"{block}.attention.{kind}") for kind in ("query", "key", "value"))
        read = np.zeros_like(x)
        for head in range(config.num_attention_heads):
            mine = slice(head * width, (head + 1) * width)
            for place in range(len(x)):
                shares = np.exp(keys[:, mine] @ queries[place, mine] / np.sqrt(width))
                read[place, mine] = shares / shares.sum() @ values[:, mine]
        x = norm(x + linear(read, f"{block}.attention.output"), f"{block}.attention_norm")
        inner = gelu(linear(x, f"{block}.feed_forward.inner"))
        x = norm(x + linear(inner, f"{block}.feed_forward.outer"), f"{block}.feed_forward_norm")
    return norm(gelu(linear(x, "output")), "norm")


@pytest.mark.parametrize(("layers", "heads"), [(0, 1), (1, 1), (2, 2), (1, 4)])
def test_states_are_the_definition(layers: int, heads: int) -> None:
    model = tiny(num_hidden_layers=layers, num_attention_heads=heads)
    representations = torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        found = model(representations[None])[0]
    np.testing.assert_allclose(found, definition(model, representations), atol=1e-12, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 7), left=st.integers(0, 3), right=st.integers(0, 3), seed=st.integers(0, 99))
def test_padding_on_either_side_changes_nothing(length: int, left: int, right: int, seed: int) -> None:
    model = tiny()
    history = torch.randn(length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([False] * left + [True] * length + [False] * right)
    padded = torch.full((1, len(mask), 8), torch.nan, dtype=torch.float64)
    padded[0, mask] = history
    with torch.no_grad():
        states = model(padded, mask[None])[0]
    np.testing.assert_allclose(states[mask], definition(model, history), atol=1e-12, rtol=1e-12)
    assert not states[~mask].any()


def test_rows_of_one_batch_do_not_touch_and_empty_ones_are_zero() -> None:
    model = tiny()
    rows, mask = torch.randn(3, 4, 8, dtype=torch.float64), torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]])
    rows.requires_grad_()
    states = model(rows, mask)
    for row in (0, 2):
        there = mask[row].bool()
        expected = definition(model, rows[row, there].detach())
        np.testing.assert_allclose(states[row, there].detach(), expected, atol=1e-12, rtol=1e-12)
    assert not states[1].any()
    (states * torch.randn_like(states)).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad.any(dim=2), mask.bool())
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    assert model(rows[:, :0]).shape == (3, 0, 8)


def test_both_directions_are_seen() -> None:
    model = tiny()
    assert not model.causal
    representations = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    (model(representations)[0, 2] * torch.arange(8)).sum().backward()
    assert representations.grad is not None
    assert representations.grad[0].any(dim=1).all()


def test_what_is_hidden_cannot_be_seen() -> None:
    model = tiny()
    rows, others = torch.randn(2, 1, 4, 8, dtype=torch.float64)
    hidden = torch.tensor([[False, True, False, True]])
    mixed = torch.where(hidden[..., None], others, rows)
    assert not torch.equal(model(rows), model(mixed))
    found = model.hide(rows, hidden)
    assert torch.equal(model(found), model(model.hide(mixed, hidden)))
    assert torch.equal(found[~hidden], rows[~hidden])
    assert torch.equal(found[hidden], model.hidden_item.expand(2, 8))
    # What was there has no gradient, whatever it was; the hidden item's own vector has.
    rows[hidden] = torch.nan
    rows.requires_grad_()
    (model(model.hide(rows, hidden)) * others).sum().backward()
    assert rows.grad is not None
    assert rows.grad.any(dim=2).tolist() == [[True, False, True, False]]
    assert model.hidden_item.grad is not None
    assert model.hidden_item.grad.any()


def test_a_chain_is_learnt_by_hiding() -> None:
    # Item i stands before i + 1 always: either neighbour gives a hidden item away.
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "initializer_range": 0.1}
    model = BERT4RecModel(BERT4RecConfig(**sizes, dropout=0.0, attention_dropout=0.0))
    table = torch.nn.Parameter(0.3 * torch.randn(10, 64))
    optimizer = torch.optim.Adam([table, *model.parameters()], lr=1e-3)
    rows = (torch.arange(10)[:, None] + torch.arange(5)) % 10
    model.train()
    for _ in range(150):
        hidden = torch.arange(5) == torch.randint(0, 5, (10, 1))
        scores = model(model.hide(table[rows], hidden))[hidden] @ table.T
        loss = F.cross_entropy(scores, rows[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    last = torch.arange(5) == 4
    scores = model(model.hide(table[rows], last.expand(10, 5)))[:, 4] @ table.T
    assert torch.equal(scores.argmax(dim=1), rows[:, 4])


def test_dropout_works_while_training_only() -> None:
    rows = torch.randn(1, 5, 8, dtype=torch.float64)
    for rates in ({"dropout": 0.5, "attention_dropout": 0.0}, {"dropout": 0.0, "attention_dropout": 0.5}):
        model = tiny(**rates)
        assert torch.equal(model(rows), model(rows))
        model.train()
        assert not torch.equal(model(rows), model(rows))
    model = tiny(dropout=0.0, attention_dropout=0.0)
    assert torch.equal(model.train()(rows), model.eval()(rows))


def test_misuse_is_refused() -> None:
    with pytest.raises(BackboneError, match="not a multiple of num_attention_heads 3"):
        tiny(num_attention_heads=3)
    with pytest.raises(BackboneError, match="holds 8 items, and this bert4rec has positions for 7"):
        tiny()(torch.zeros(1, 8, 8, dtype=torch.float64))


def test_new_weights_have_the_stated_spread() -> None:
    torch.manual_seed(0)
    model = BERT4RecModel(BERT4RecConfig(hidden_size=256, initializer_range=0.1))
    for name in ("hidden_item", "positions.weight", "blocks.0.attention.query.weight"):
        assert 0.085 < model.get_parameter(name).std() < 0.115, name
    assert not model.get_parameter("output.bias").any()
    assert model.get_submodule("blocks.0.feed_forward.inner").out_features == 1024


@pytest.mark.parametrize("auto", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path: Any, auto: bool) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    register()
    register()
    loaded = (AutoModel if auto else BERT4RecModel).from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, BERT4RecModel)
    rows, hidden = torch.randn(1, 4, 8, dtype=torch.float64), torch.tensor([[False, True, False, False]])
    assert torch.equal(loaded(loaded.hide(rows, hidden)), model(model.hide(rows, hidden)))
