import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import DataError
from llmrec.training.loss import Shape, columns_of, id_range_loss, token_loss


def drawn(seed, tokens, words, width=7, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    targets = torch.randint(0, words, (tokens,), generator=generator)
    return random(tokens, width), random(words, width), random(words) if bias else None, targets


def whole(hidden, weight, bias, targets, shape):
    """Cross-entropy by its definition, over logits that are held as a whole."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * shape.scale
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    return -(logits - logits.exp().sum(1, keepdim=True).log()).gather(1, targets[:, None])[:, 0]


def gradients(total, *tensors):
    return torch.autograd.grad(3.0 * total, [tensor for tensor in tensors if tensor is not None])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 600),
    words=st.integers(1, 30),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    piece=st.sampled_from([1, 1 << 22]),
)
def test_values_and_gradients_are_those_of_whole_logits(seed, tokens, words, bias, scale, softcap, piece):
    hidden, weight, offsets, targets = drawn(seed, tokens, words, bias=bias)
    shape = Shape(scale, softcap)
    expected = whole(hidden, weight, offsets, targets, shape)
    total, each = token_loss(hidden, weight, targets, offsets, shape, piece=piece)
    torch.testing.assert_close(each, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-11, atol=1e-11)
    found = gradients(total, hidden, weight, offsets)
    for got, wanted in zip(found, gradients(expected.sum(), hidden, weight, offsets), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 600), bias=st.booleans(), data=st.data())
def test_a_range_of_ids_is_cross_entropy_over_these_logits(seed, tokens, bias, data):
    ids = torch.tensor(sorted(data.draw(st.sets(st.integers(0, 29), min_size=1))))
    hidden, weight, offsets, places = drawn(seed, tokens, 30, bias=bias)
    targets = ids[places % len(ids)]
    logits = torch.nn.functional.linear(hidden, weight, offsets)
    restricted = torch.full_like(logits, -torch.inf)
    restricted[:, ids] = logits[:, ids]
    expected = -torch.log_softmax(restricted, 1).gather(1, targets[:, None])[:, 0]
    total, each = id_range_loss(hidden, weight, targets, ids, offsets, piece=1)
    torch.testing.assert_close(each, expected, rtol=1e-11, atol=1e-11)
    found = gradients(total, hidden, weight, offsets)
    for got, wanted in zip(found, gradients(expected.sum(), hidden, weight, offsets), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_rows_trained_beside_a_frozen_weight_get_its_gradients():
    hidden, weight, _, targets = drawn(0, 600, 20)
    places = torch.tensor([3, 19, 0])
    rows = weight.detach()[places].clone().requires_grad_()
    total, _ = token_loss(hidden, weight.detach(), targets, trained=(rows, places), piece=1)
    of_hidden, of_rows = gradients(total, hidden, rows)
    expected = whole(hidden, weight, None, targets, Shape()).sum()
    wanted_hidden, wanted_weight = gradients(expected, hidden, weight)
    torch.testing.assert_close(of_hidden, wanted_hidden)
    torch.testing.assert_close(of_rows, wanted_weight[places])


def test_huge_logits_do_not_overflow():
    hidden, weight = torch.tensor([[1000.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    total, each = token_loss(hidden, weight, torch.tensor([1]))
    assert each.item() == 2000.0
    total.backward()
    assert hidden.grad.item() == 2.0


def test_without_labels_the_loss_is_zero_and_every_weight_has_a_gradient():
    hidden, weight, bias, targets = drawn(0, 0, 5)
    total, each = token_loss(hidden, weight, targets, bias)
    total.backward()
    assert total.item() == 0.0
    assert each.shape == (0,)
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_autocast_computes_products_in_half_precision_and_sums_in_float32():
    hidden, weight, _, targets = drawn(1, 600, 40, bias=False, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, each = token_loss(hidden, weight, targets, piece=1)
        logits = torch.nn.functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    assert total.dtype == each.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(total, [hidden, weight])
    for got, wanted in zip(found, torch.autograd.grad(expected.sum(), [hidden, weight]), strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < 0.01 * wanted.norm()


def test_no_gradients_are_made_where_none_are_wanted():
    hidden, weight, _, targets = drawn(2, 5, 4)
    with torch.no_grad():
        assert not token_loss(hidden, weight, targets)[0].requires_grad
    total, _ = token_loss(hidden, weight.detach(), targets)
    total.backward()
    assert weight.grad is None
    assert hidden.grad.any()


def test_a_second_backward_pass_is_refused():
    hidden, weight, _, targets = drawn(3, 5, 4)
    total, _ = token_loss(hidden, weight, targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated before"):
        total.backward()


@pytest.mark.parametrize("target", [4, 0, 9])
def test_a_label_outside_of_the_range_is_refused(target):
    with pytest.raises(DataError, match=f"token {target} is a label"):
        columns_of(torch.tensor([2, target]), torch.tensor([2, 5, 7]))
