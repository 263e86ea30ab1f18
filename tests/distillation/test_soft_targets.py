"""The divergence from a teacher's softmax against its definition in float64, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.distillation.soft_targets import LinearTeaching, Teaching, soft_target_loss
from llmrec.training.loss import Shape


def logits_of(states, weight, bias, shape):
    products = shape.scale * (states @ weight.T + (0 if bias is None else bias))
    return products if shape.softcap is None else shape.softcap * torch.tanh(products / shape.softcap)


def definition(own, other, temperature, direction, weights):
    """T² KL by torch's own functions and autograd."""
    q, p = (own / temperature).log_softmax(-1), (other / temperature).log_softmax(-1)
    first, second = (p, q) if direction == "forward" else (q, p)
    return (weights * temperature**2 * (first.exp() * (first - second)).sum(-1)).sum()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    places=st.integers(0, 7),
    choices=st.integers(1, 9),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    direction=st.sampled_from(["forward", "reverse"]),
    shape=st.sampled_from([Shape(), Shape(scale=0.3), Shape(softcap=2.0)]),
    with_bias=st.booleans(),
    piece=st.integers(1, 40),
)
def test_values_and_gradients_are_those_of_the_definition(
    seed, places, choices, temperature, direction, shape, with_bias, piece
):
    torch.manual_seed(seed)

    def drawn(*sizes):
        return torch.randn(*sizes, dtype=torch.float64)

    states, weight = drawn(places, 4), drawn(choices, 4)
    bias = drawn(choices) if with_bias else None
    theirs, their_weight, their_bias = drawn(places, 6), drawn(choices, 6), drawn(choices)
    weights = torch.rand(places, dtype=torch.float64)
    given_tensors = [one.requires_grad_(True) for one in (states, weight, *([] if bias is None else [bias]))]
    teaching = LinearTeaching(theirs, their_weight, their_bias, Shape(scale=0.7))
    found = soft_target_loss(
        *(states, weight, teaching, temperature, bias, shape, weights), direction=direction, piece=piece
    )
    other = logits_of(theirs, their_weight, their_bias, Shape(scale=0.7))
    expected = definition(logits_of(states, weight, bias, shape), other, temperature, direction, weights)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(3 * found, given_tensors)
    for one, two in zip(gradients, torch.autograd.grad(3 * expected, given_tensors), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_logits_are_exactly_no_divergence_and_have_exactly_no_gradient(direction, dtype):
    torch.manual_seed(1)
    states = torch.randn(30, 16, dtype=dtype).requires_grad_(True)
    weight = torch.randn(50, 16, dtype=dtype).requires_grad_(True)
    teaching = LinearTeaching(states, weight)
    found = soft_target_loss(states, weight, teaching, 2.0, direction=direction, piece=170)
    assert float(found.detach()) == 0.0
    found.backward()
    assert torch.equal(states.grad, torch.zeros_like(states))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_the_teacher_gets_no_gradient_and_nothing_is_kept_where_none_is_wanted():
    theirs = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    soft_target_loss(
        torch.randn(3, 4, requires_grad=True), weight, LinearTeaching(theirs, torch.randn(5, 4))
    ).backward()
    assert theirs.grad is None
    assert weight.grad is not None
    with torch.no_grad():
        assert not soft_target_loss(torch.randn(3, 4), weight, LinearTeaching(theirs, weight)).requires_grad


def test_what_the_teacher_holds_impossible_adds_nothing():
    class Given(Teaching):
        def log_probabilities(self, begin, end, temperature, dtype):
            return torch.tensor([[0.5, 0.5, 0.0]], dtype=dtype).log()

    weight = torch.eye(3, dtype=torch.float64)
    states = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    found = soft_target_loss(states, weight, Given())
    assert abs(float(found) - torch.tensor(1.5).log().item()) < 1e-7  # 2 · ½ log(½ / ⅓)
    found.backward()
    torch.testing.assert_close(states.grad, torch.tensor([[1 / 3 - 1 / 2, 1 / 3 - 1 / 2, 1 / 3]], dtype=torch.float64))


def test_half_precision_states_get_gradients_of_their_own_kind():
    states = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    found = soft_target_loss(states, weight, LinearTeaching(torch.randn(3, 4), torch.randn(5, 4)))
    assert found.dtype == torch.float32
    found.backward()
    assert states.grad.dtype == torch.bfloat16
