"""CausalBody against transformers' own Llama and GPT-2 over tokens; padding, checkpoints, saving."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig

from llmrec.backbones.causal_body import CausalBodyConfig, CausalBodyModel, register
from llmrec.exceptions import BackboneError

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"body": "llama"},
    "llama-grouped": {"body": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 5},
    "gpt2": {"body": "gpt2"},
    "gpt2-one-layer": {"body": "gpt2", "num_hidden_layers": 1, "intermediate_size": 5},
}
shapes = pytest.mark.parametrize("name", SHAPES)
bodies = pytest.mark.parametrize("body", ["llama", "gpt2"])


def shaken(model: Any) -> Any:
    """The model in float64 and eval mode, none of whose parameters has its initial value of 0 or 1."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def tiny(**sizes: Any) -> CausalBodyModel:
    torch.manual_seed(0)
    config = CausalBodyConfig(**{"hidden_size": 8, "max_position_embeddings": 7, "initializer_range": 0.3, **sizes})
    model: CausalBodyModel = shaken(CausalBodyModel(config))
    return model


def language_model(body: str, **sizes: Any) -> Any:
    """A causal language model of transformers with 20 tokens, width 8 and 16 positions."""
    torch.manual_seed(1)
    given_sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        **sizes,
    }
    given_sizes |= {"intermediate_size": 12, "num_key_value_heads": 1} if body == "llama" else {"n_inner": 12}
    return shaken(AutoModelForCausalLM.from_config(AutoConfig.for_model(body, **given_sizes)))


def over_tokens(model: CausalBodyModel, history: torch.Tensor) -> torch.Tensor:
    """The states (S, D) of transformers' own model of the same weights, whose token s is embedded as history[s]."""
    inner = AutoConfig.for_model(**{**model.body.config.to_dict(), "vocab_size": len(history)})
    whole = AutoModel.from_config(inner).double().eval()
    missing, unexpected = whole.load_state_dict(model.body.state_dict(), strict=False)
    assert len(missing) == 1  # the token embeddings
    assert not unexpected
    whole.get_input_embeddings().weight.data = history.detach().clone()
    with torch.no_grad():
        states: torch.Tensor = whole(torch.arange(len(history))[None]).last_hidden_state[0]
    return states


@shapes
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_states_are_those_of_transformers(name: str, attention: str) -> None:
    model, history = tiny(**SHAPES[name]), torch.randn(6, 8, dtype=torch.float64)
    model.set_attn_implementation(attention)
    assert model.body.config._attn_implementation == attention
    expected = over_tokens(model, history)
    # transformers' eager softmax is in float32, whatever the model is in.
    close = 1e-12 if attention == "sdpa" else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(model(history[None])[0], expected, atol=close, rtol=close)
        left = torch.cat((history[:1], history))[None]
        mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
        torch.testing.assert_close(model(left, mask)[0, 1:], expected, atol=close, rtol=close)


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(SHAPES)), length=st.integers(1, 7), left=st.integers(0, 3), right=st.integers(0, 3))
def test_padding_on_either_side_changes_nothing(name: str, length: int, left: int, right: int) -> None:
    model = tiny(**SHAPES[name])
    history = torch.randn(length, 8, dtype=torch.float64)
    mask = torch.tensor([False] * left + [True] * length + [False] * right)
    padded = torch.full((1, len(mask), 8), torch.nan, dtype=torch.float64)
    padded[0, mask] = history
    with torch.no_grad():
        states = model(padded, mask[None])[0]
    torch.testing.assert_close(states[mask], over_tokens(model, history), atol=1e-11, rtol=1e-11)
    assert not states[~mask].any()


@bodies
def test_rows_of_one_batch_do_not_touch_and_gradients_are_finite(body: str) -> None:
    model = tiny(body=body, body_hidden_size=12)
    rows = torch.randn(4, 4, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    rows.requires_grad_()
    states = model(rows, mask)
    for row in range(3):
        alone = model(rows[row : row + 1, mask[row]])[0]
        torch.testing.assert_close(states[row, mask[row]], alone, atol=1e-12, rtol=1e-12)
    assert not states[3].any()
    states.square().sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad.any(dim=2), mask)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    assert model(rows[:, :0]).shape == (4, 0, 8)


@bodies
def test_no_gradient_reaches_the_future(body: str) -> None:
    model = tiny(body=body)
    rows = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    (model(rows)[0, 2] * torch.arange(8)).sum().backward()
    assert rows.grad is not None
    assert rows.grad[0].any(dim=1).tolist() == [True, True, True, False, False]


@bodies
def test_there_are_no_token_embeddings(body: str) -> None:
    model = tiny(body=body)
    assert not [name for name in model.state_dict() if "wte" in name or "embed_tokens" in name]
    assert {"inward.weight", "outward.weight"} & set(model.state_dict()) == set()
    other = tiny(body=body, body_hidden_size=12)
    assert (other.get_parameter("inward.weight").shape, other.body.config.hidden_size) == ((12, 8), 12)
    assert other(torch.zeros(1, 2, 8, dtype=torch.float64)).shape == (1, 2, 8)


@bodies
def test_dropout_works_while_training_only(body: str) -> None:
    rows = torch.randn(1, 5, 8, dtype=torch.float64)
    model = tiny(body=body, dropout=0.5)
    assert torch.equal(model(rows), model(rows))
    model.train()
    assert not torch.equal(model(rows), model(rows))
    still = tiny(body=body, dropout=0.0)
    torch.testing.assert_close(still.train()(rows), still.eval()(rows), atol=1e-12, rtol=0)


@bodies
def test_checkpointed_layers_have_the_same_gradients(body: str) -> None:
    rows = torch.randn(2, 5, 8, dtype=torch.float64)
    gradients = []
    for checkpointed in (False, True):
        model = tiny(body=body, dropout=0.0).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(rows).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


@bodies
@pytest.mark.parametrize("width", [8, 6])
def test_a_checkpoint_gives_its_states(tmp_path: Any, body: str, width: int) -> None:
    source = language_model(body)
    source.save_pretrained(tmp_path / "lm")
    config = CausalBodyConfig.of_checkpoint(str(tmp_path / "lm"), hidden_size=width, max_position_embeddings=9)
    assert (config.body, config.num_hidden_layers, config.hidden_size) == (body, 2, width)
    torch.manual_seed(5)
    model: CausalBodyModel = CausalBodyModel(config).double().eval()
    model.load_body(str(tmp_path / "lm"))
    tokens = torch.tensor([[4, 7, 7, 19, 0]])
    with torch.no_grad():
        expected = source.base_model(tokens).last_hidden_state
        embedded = source.get_input_embeddings()(tokens)
        if width == 8:
            found = model(embedded)
        else:  # through the projections
            rows = torch.randn(1, 5, 6, dtype=torch.float64)
            found, expected = model(rows), source.base_model(inputs_embeds=model.inward(rows)).last_hidden_state
            expected = model.outward(expected)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    # The saved encoder stands by itself.
    model.save_pretrained(tmp_path / "encoder")
    again = CausalBodyModel.from_pretrained(tmp_path / "encoder", dtype=torch.float64)
    rows = torch.randn(1, 4, width, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(again(rows), model(rows))


@bodies
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Any, body: str) -> None:
    language_model(body).save_pretrained(tmp_path / "lm")
    with pytest.raises(BackboneError, match=r"weights of .* are not those of this body: .*size mismatch"):
        tiny(body=body).load_body(str(tmp_path / "lm"))
    other = {"llama": "gpt2", "gpt2": "llama"}[body]
    with pytest.raises(BackboneError, match="are not those of this body"):
        tiny(body=other).load_body(str(tmp_path / "lm"))
    with pytest.raises(BackboneError, match=r"holds no config\.json"):
        CausalBodyConfig.of_checkpoint(str(tmp_path))
    with pytest.raises(BackboneError, match=r"holds no config\.json"):
        tiny(body=body).load_body(str(tmp_path))
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(BackboneError, match="is of type 'bert', and bodies are llama or gpt2"):
        CausalBodyConfig.of_checkpoint(str(tmp_path / "bert"))
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "no-such"}')
    with pytest.raises(BackboneError, match="no model type that this transformers knows"):
        CausalBodyConfig.of_checkpoint(str(tmp_path / "bert"))


def test_misuse_is_refused(tmp_path: Any) -> None:
    with pytest.raises(BackboneError, match=r"body is 'bert'\. Choose one of llama, gpt2"):
        tiny(body="bert")
    for sizes in ({"num_attention_heads": 3}, {"num_attention_heads": 0}, {"num_attention_heads": 8}):
        with pytest.raises(BackboneError, match="width of 8 cannot be shared"):
            tiny(**sizes)
    for heads in (3, -1):
        with pytest.raises(BackboneError, match=f"num_key_value_heads is {heads}"):
            tiny(num_key_value_heads=heads)
    with pytest.raises(BackboneError, match="num_key_value_heads is 1, and a gpt2"):
        tiny(body="gpt2", num_key_value_heads=1)
    assert tiny(body="gpt2", num_attention_heads=8)(torch.zeros(1, 1, 8, dtype=torch.float64)).shape == (1, 1, 8)
    with pytest.raises(BackboneError, match="holds 8 items, and this causal_body has positions for 7"):
        tiny()(torch.zeros(1, 8, 8, dtype=torch.float64))
    for body in ("gpt2", "llama"):
        language_model(body).save_pretrained(tmp_path / body)
    # Rotary positions go on, learnt ones end.
    longer = CausalBodyConfig.of_checkpoint(str(tmp_path / "llama"), max_position_embeddings=17)
    assert CausalBodyModel(longer).config.max_position_embeddings == 17
    with pytest.raises(BackboneError, match=r"max_position_embeddings is 17, and .* has positions for 16"):
        CausalBodyModel(CausalBodyConfig.of_checkpoint(str(tmp_path / "gpt2"), max_position_embeddings=17))


@pytest.mark.parametrize("auto", [False, True])
@shapes
def test_what_is_saved_is_what_is_loaded(tmp_path: Any, name: str, auto: bool) -> None:
    model = tiny(**SHAPES[name])
    model.save_pretrained(tmp_path)
    register()
    register()
    loaded = (AutoModel if auto else CausalBodyModel).from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, CausalBodyModel)
    rows = torch.randn(1, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(loaded(rows), model(rows))


@pytest.mark.parametrize(("sizes", "width"), [({}, 176), ({"intermediate_size": 9}, 9), ({"body": "gpt2"}, 256)])
def test_the_mlp_has_the_stated_width(sizes: dict[str, Any], width: int) -> None:
    inner = CausalBodyConfig(hidden_size=64, **sizes).make_body_config()
    assert (inner.n_inner if inner.model_type == "gpt2" else inner.intermediate_size) == width
