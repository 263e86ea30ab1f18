import pytest

from llmrec.exceptions import DataError
from llmrec.scaling.cost import cost_of
from llmrec.scaling.flops import window_flops
from llmrec.scaling.language import LanguageShape, row_flops
from llmrec.scaling.memory import activation_bytes
from llmrec.scaling.shape import Shape


def test_a_sequence_model_s_cost():
    shape = Shape("hstu", 4, 64, 3706, 50)
    cost = cost_of(shape)
    assert cost.flops_per_token == window_flops(shape).total / 50
    assert cost.flops(1e6, 3) == pytest.approx(3e6 * cost.flops_per_token)
    assert cost.table == 3707 * 64
    assert cost.activation_bytes(8) == activation_bytes(shape, 8)
    assert cost.state_bytes() == 16 * cost.parameters == 16 * cost.trained


def test_the_rule_of_thumb_is_near_where_it_holds():
    """6 a weight and event is the layers' part alone: of a wide model on few items most of it, of a narrow one not."""
    wide, narrow = cost_of(Shape("llama", 16, 512, 100, 50)), cost_of(Shape("llama", 2, 16, 50_000, 50))
    for cost in (wide, narrow):
        assert cost.window.layers == pytest.approx(6 * 50 * (cost.parameters - cost.table), rel=0.02)
    assert wide.window.total < 1.1 * wide.window.layers
    assert narrow.window.total > 50 * narrow.window.layers


def test_a_language_model_s_cost():
    shape = LanguageShape("llama", 4, 64, 1280, 3, 21, targets=10)
    cost = cost_of(shape)
    assert cost.flops_per_token == row_flops(shape).total / 10
    assert cost.table == 1280 * 64
    assert cost.held == cost.parameters
    lora = cost_of(LanguageShape("llama", 4, 64, 1280, 3, 21, lora_rank=8, new_rows=768))
    assert lora.parameters == cost.parameters
    assert lora.held == lora.parameters + lora.trained
    assert lora.state_bytes() == 4 * lora.parameters + 16 * lora.trained


@pytest.mark.parametrize(
    ("tokens", "epochs"), [(0, 1), (-1, 1), (float("nan"), 1), (10, 0), (float("inf"), 1), (10, float("inf"))]
)
def test_no_training_has_no_cost(tokens, epochs):
    with pytest.raises(DataError, match="are no training"):
        cost_of(Shape("hstu", 1, 8, 100, 10)).flops(tokens, epochs)
