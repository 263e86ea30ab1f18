"""The distances of hidden states against their definition, and what is exactly nothing."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.distillation.alignment import align


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), places=st.integers(1, 6), width=st.integers(1, 9))
def test_distances_are_their_definitions(seed, places, width):
    torch.manual_seed(seed)
    student = torch.randn(places, width, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(places, width, dtype=torch.float64, requires_grad=True)
    found = align(student, teacher)
    cosine = sum(
        1 - float((h @ t).detach()) / (float((h @ h).detach()) ** 0.5 * float((t @ t).detach()) ** 0.5)
        for h, t in zip(student, teacher, strict=True)
    )
    norm = sum(float(((h - t) ** 2).sum().detach()) / width for h, t in zip(student, teacher, strict=True))
    assert abs(float(found.cosine) - cosine) < 1e-12
    assert abs(float(found.norm) - norm) < 1e-12
    (gradient,) = torch.autograd.grad(found.cosine, student, retain_graph=True)
    (expected,) = torch.autograd.grad(
        (1 - torch.nn.functional.cosine_similarity(student, teacher.detach(), dim=1)).sum(), student
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    (found.cosine + found.norm).backward()
    assert teacher.grad is None


def test_equal_states_are_exactly_no_distance_and_have_exactly_no_gradient():
    torch.manual_seed(0)
    teacher = torch.randn(50, 33) * torch.logspace(-6, 6, 50)[:, None]
    student = teacher.clone().requires_grad_(True)
    found = align(student, teacher)
    assert float(found.cosine) == float(found.norm) == 0.0
    (found.cosine + found.norm).backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_states_of_zeros_and_no_states_have_finite_gradients():
    student = torch.zeros(2, 4, requires_grad=True)
    found = align(student, torch.ones(2, 4))
    (found.cosine + found.norm).backward()
    assert torch.isfinite(student.grad).all()
    nothing = align(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4))
    assert float(nothing.cosine) == float(nothing.norm) == 0.0


def test_half_precision_is_compared_in_single():
    states = torch.randn(4, 8, dtype=torch.bfloat16)
    assert align(states, torch.randn(4, 8)).norm.dtype == torch.float32
