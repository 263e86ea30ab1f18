"""GRU4Rec against the equations of gated recurrent units in float64 numpy; padding, saving."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from llmrec.backbones.gru4rec import GRU4RecConfig, GRU4RecModel, register
from llmrec.exceptions import BackboneError


def tiny(**sizes: Any) -> GRU4RecModel:
    """A model in float64 and eval mode, none of whose parameters has its initial value of 0."""
    torch.manual_seed(0)
    model: GRU4RecModel = GRU4RecModel(GRU4RecConfig(**{"hidden_size": 6, "max_position_embeddings": 7, **sizes}))
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def definition(model: GRU4RecModel, history: torch.Tensor) -> np.ndarray:
    """(S, D) -> (S, D), item by item, in numpy."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    inputs = history.detach().numpy()
    for layer in range(model.config.num_hidden_layers):
        read, kept, of_read, of_kept = (
            weights[f"gru.{kind}_l{layer}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        state, states = np.zeros(read.shape[0] // 3), []
        for item in inputs:
            new, old = np.split(read @ item + of_read, 3), np.split(kept @ state + of_kept, 3)
            reset, update = sigmoid(new[0] + old[0]), sigmoid(new[1] + old[1])
            state = (1 - update) * np.tanh(new[2] + reset * old[2]) + update * state
            states.append(state)
        inputs = np.array(states)
    if "output.weight" in weights:
        inputs = inputs @ weights["output.weight"].T + weights["output.bias"]
    return np.asarray(inputs)


@pytest.mark.parametrize("sizes", [{}, {"num_hidden_layers": 2}, {"gru_size": 4, "num_hidden_layers": 3}])
def test_states_are_the_definition(sizes: dict[str, int]) -> None:
    model = tiny(**sizes)
    history = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        found = model(history[None])[0]
    np.testing.assert_allclose(found, definition(model, history), atol=1e-12, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(masks=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4))
def test_padding_anywhere_changes_nothing(masks: list[list[bool]]) -> None:
    model, mask = tiny(num_hidden_layers=2, gru_size=5), torch.tensor(masks)
    rows = torch.randn(*mask.shape, 6, dtype=torch.float64)
    rows[~mask] = torch.nan
    rows.requires_grad_()
    states = model(rows, mask)
    assert not states[~mask].any()
    for row, there in enumerate(mask):
        if there.any():
            expected = definition(model, rows[row, there])
            np.testing.assert_allclose(states[row, there].detach(), expected, atol=1e-12, rtol=1e-12)
    states.square().sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad.any(dim=2), mask)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_an_empty_history_has_no_states() -> None:
    model = tiny()
    assert model(torch.zeros(2, 0, 6, dtype=torch.float64)).shape == (2, 0, 6)
    states, cache = model.prefill(torch.randn(2, 3, 6, dtype=torch.float64), torch.zeros(2, 3))
    assert not states.any()
    assert not cache.states.any()
    assert cache.lengths.tolist() == [0, 0]


def test_dropout_works_while_training_only() -> None:
    rows = torch.randn(1, 5, 6, dtype=torch.float64)
    model = tiny(dropout=0.5)
    assert torch.equal(model(rows), model(rows))
    model.train()
    assert not torch.equal(model(rows), model(rows))
    still = tiny(dropout=0.0)
    assert torch.equal(still.train()(rows), still.eval()(rows))
    assert tiny(dropout=0.5, num_hidden_layers=2).gru.dropout == 0.5


def test_a_history_of_too_many_items_is_refused_and_padding_does_not_count() -> None:
    model = tiny()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 0]])
    assert model(torch.zeros(1, 9, 6, dtype=torch.float64), mask).shape == (1, 9, 6)
    with pytest.raises(BackboneError, match="holds 8 items, and this gru4rec has positions for 7"):
        model(torch.zeros(1, 8, 6, dtype=torch.float64))


def test_new_weights_are_as_stated() -> None:
    model = GRU4RecModel(GRU4RecConfig(hidden_size=100, gru_size=50))
    assert not model.get_parameter("gru.bias_ih_l0").any()
    spread = (2 / (100 + 150)) ** 0.5
    assert abs(model.get_parameter("gru.weight_ih_l0").std() / spread - 1) < 0.05


@pytest.mark.parametrize("auto", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path: Any, auto: bool) -> None:
    model = tiny(num_hidden_layers=2, gru_size=5)
    model.save_pretrained(tmp_path)
    register()
    register()
    loaded = (AutoModel if auto else GRU4RecModel).from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, GRU4RecModel)
    rows = torch.randn(1, 4, 6, dtype=torch.float64)
    assert torch.equal(loaded(rows), model(rows))
