import pytest

from llmrec.exceptions import DataError
from llmrec.scaling.shape import Shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "mamba"}, "encoder of a model is 'mamba'. Choose one of hstu"),
        ({"device": "tpu"}, "device of a model is 'tpu'"),
        ({"depth": 0}, "depth of a model is 0. Give a positive number"),
        ({"width": -8}, "width of a model is -8"),
        ({"length": float("nan")}, "length of a model is nan"),
        ({"length": float("inf")}, "length of a model is inf"),
        ({"negatives": 0}, "negatives of a model is 0"),
        ({"items": 1}, "A model has 1 item"),
        ({"hidden_share": 1.0}, "a hidden share of 1.0"),
        ({"max_history": 10}, "hold 20 items, and the longest history 10"),
        ({"loss": "bce"}, "The loss is 'bce' with None negatives"),
        ({"loss": "softmax", "negatives": 3}, "The loss is 'softmax' with 3 negatives"),
        ({"shared_negatives": True}, "shared_negatives is true without a sampled softmax"),
        ({"shared_negatives": True, "loss": "bce", "negatives": 3}, "shared_negatives is true without"),
        ({"gru_size": 5}, "gru_size is given, and hstu has none"),
        ({"encoder": "gru4rec", "heads": 2}, "heads is given, and gru4rec has none"),
        ({"concat_ua": True, "gate": False}, "concat_ua needs the gate"),
        ({"encoder": "sasrec", "residual": "post"}, "residual of a sasrec is 'post'"),
        ({"encoder": "sasrec", "residual": "llama", "norm": "post"}, "norm is 'post' with residual 'llama'"),
        ({"encoder": "bert4rec", "heads": 3}, "3 heads do not share a width of 32"),
    ],
)
def test_sizes_and_flags_that_no_model_has(changes, message):
    sizes = {"encoder": "hstu", "depth": 2, "width": 32, "items": 100, "length": 20} | changes
    with pytest.raises(DataError, match=message):
        Shape(**sizes)


def test_what_is_left_out_is_the_encoder_s_own():
    hstu, sasrec, llama = (Shape(encoder, 2, 50, 100, 20.5) for encoder in ("hstu", "sasrec", "llama"))
    assert (hstu.num_heads, hstu.qk_width, hstu.bias, hstu.gated) == (1, 50, "position+time", True)
    assert (sasrec.bias, sasrec.gated, sasrec.network, sasrec.inner_width, sasrec.projects) == (
        *("none", False, "relu", 50, False),
    )
    assert (llama.num_heads, llama.network, llama.inner_width, llama.has_positions) == (2, "swiglu", 136, False)
    assert (hstu.positions, Shape("bert4rec", 2, 50, 100, 20.5).positions) == (21, 22)
    # The width that heads do not share is dropped, as the scripts drop it.
    assert Shape("hstu", 2, 50, 100, 20, heads=4).qk_width == 48
