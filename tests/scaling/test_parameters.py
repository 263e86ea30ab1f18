import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_steps import SHAPES, model_of

from llmrec.scaling.parameters import encoder_parameters, parameters
from llmrec.scaling.shape import ENCODERS, OWNERS, Shape

CHOICES = {
    "heads": (1, 2, 4),
    "inner": (7, 24),
    "relative_bias": ("none", "position", "time", "position+time", "rope", "rope+time"),
    "position_embeddings": (True, False),
    "residual": ("hstu", "llama", "sasrec", "post"),
    "gate": (True, False),
    "concat_ua": (True, False),
    "score": ("silu", "softmax"),
    "qk_dim": (2, 6),
    "v_dim": (3, 5),
    "norm": ("pre", "authors", "post"),
    "feed_forward": ("relu", "gelu", "swiglu"),
    "attention_dropout": (True, False),
    "gru_size": (5, 8),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_weight_is_counted(name):
    shape = SHAPES[name]
    model = model_of(shape)
    assert parameters(shape) == sum(weight.numel() for weight in model.parameters())
    assert encoder_parameters(shape) == sum(weight.numel() for weight in model.encoder.parameters())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_the_flags_say(data):
    encoder = data.draw(st.sampled_from(ENCODERS))
    flags = {
        name: data.draw(st.none() | st.sampled_from(values), label=name)
        for name, values in CHOICES.items()
        if encoder in OWNERS[name]
    }
    if encoder == "sasrec":
        if flags["residual"] not in (None, "llama"):
            flags["residual"] = "sasrec"
        if flags["residual"] == "llama":
            flags["norm"] = None
    if flags.get("gate") is False:
        flags["concat_ua"] = None if encoder == "hstu" else flags.get("concat_ua")
    sizes = {"depth": data.draw(st.integers(1, 3)), "length": data.draw(st.integers(1, 9))}
    flags = {name: value for name, value in flags.items() if value is not None}
    shape = Shape(encoder, width=8, items=11, time_buckets=5, **sizes, **flags)
    assert parameters(shape) == sum(weight.numel() for weight in model_of(shape).parameters())


def test_a_layer_of_hstu_is_five_squares_of_its_width():
    """U, V, Q, K and the output, with heads that share the width; beside them a bias of D and the relative ones."""
    two, three = (Shape("hstu", depth, 64, 100, 50, heads=4) for depth in (2, 3))
    assert parameters(three) - parameters(two) == 5 * 64**2 + 64 + 50 + 130


def test_a_layer_of_llama_is_twelve_squares_of_its_width():
    two, three = (Shape("llama", depth, 96, 100, 50) for depth in (2, 3))
    assert parameters(three) - parameters(two) == 12 * 96**2 + 2 * 96
