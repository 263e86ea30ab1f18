"""S-DPO's loss against its formula, DPO's, and finite differences; all in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.reinforcement.preference_loss import preference_loss, preference_measures


def pairs(seed, batch=4, negatives=3, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return [-spread * torch.rand((batch, 1 + negatives), dtype=torch.float64, generator=generator) for _ in range(2)]


def by_formula(policy, reference, beta):
    """-log σ(-log Σ_j exp(β (Δ_j - Δ_+))), term by term."""
    found = []
    for own, other in zip(policy.tolist(), reference.tolist(), strict=True):
        gains = [one - two for one, two in zip(own, other, strict=True)]
        inner = sum(math.exp(beta * (gain - gains[0])) for gain in gains[1:])
        found.append(-math.log(1 / (1 + math.exp(math.log(inner)))))
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(0.01, 5.0))
def test_it_is_the_papers_formula(seed, negatives, beta):
    policy, reference = pairs(seed, negatives=negatives)
    assert preference_loss(policy, reference, beta).tolist() == pytest.approx(by_formula(policy, reference, beta))


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 7.0])
def test_with_one_negative_it_is_dpo(beta):
    """The sigmoid loss of DPO: -log σ(β ((π_+ - π_-) - (r_+ - r_-)))."""
    policy, reference = pairs(1, batch=32, negatives=1)
    margin = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    expected = -torch.nn.functional.logsigmoid(beta * margin)
    torch.testing.assert_close(preference_loss(policy, reference, beta), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("negatives", [1, 3, 15])
def test_equal_policies_lose_the_logarithm_of_the_items(negatives):
    policy, _ = pairs(2, negatives=negatives)
    found = preference_loss(policy, policy.clone(), 0.3)
    assert found.tolist() == pytest.approx([math.log(1 + negatives)] * 4, abs=1e-12)


def test_beta_scales_the_gains_and_nothing_else():
    policy, reference = pairs(3)
    scaled = preference_loss(2.5 * policy, 2.5 * reference, 0.2)
    torch.testing.assert_close(scaled, preference_loss(policy, reference, 0.5))
    shifted = preference_loss(policy - 4.0, reference, 0.5)  # what all items gain alike is no preference
    torch.testing.assert_close(shifted, preference_loss(policy, reference, 0.5))


def test_it_is_cross_entropy_over_the_items():
    policy, reference = pairs(4)
    logits = 0.7 * (policy - reference)
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.long), reduction="none")
    torch.testing.assert_close(preference_loss(policy, reference, 0.7), expected)


def test_the_gradient_is_that_of_finite_differences():
    policy, reference = pairs(5)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda one: preference_loss(one, reference, 0.8), (policy,), eps=1e-6, atol=1e-8)
    preference_loss(policy, reference, 0.8).sum().backward()
    chances = (0.8 * (policy - reference)).softmax(1).detach()
    expected = 0.8 * (chances - torch.eye(4, dtype=torch.float64)[[0] * 4])  # of a softmax
    torch.testing.assert_close(policy.grad, expected)


def test_far_from_the_reference_nothing_overflows():
    policy = torch.tensor([[0.0, -1e4, -1e4], [-1e4, 0.0, 0.0]], requires_grad=True)
    found = preference_loss(policy, torch.zeros(2, 3), 1.0)
    assert found.tolist() == pytest.approx([0.0, 1e4 + math.log(2)])
    found.sum().backward()
    assert policy.grad.isfinite().all()


def test_measures_by_hand():
    policy = torch.log(torch.tensor([[0.4, 0.2, 0.2]], dtype=torch.float64))
    reference = torch.log(torch.tensor([[0.2, 0.4, 0.05]], dtype=torch.float64))
    found = {name: float(value) for name, value in preference_measures(policy, reference, 0.5).items()}
    up, down, more = 0.5 * math.log(2), 0.5 * math.log(1 / 2), 0.5 * math.log(4)
    assert found["rewards/chosen"] == pytest.approx(up)
    assert found["rewards/rejected"] == pytest.approx((down + more) / 2)
    assert found["rewards/margins"] == pytest.approx(up - (down + more) / 2)
    assert found["rewards/accuracies"] == pytest.approx(1 / 2)
    chances, before = np.array([0.4, 0.2, 0.2, 0.2]), np.array([0.2, 0.4, 0.05, 0.35])
    assert found["kl"] == pytest.approx(float((chances * np.log(chances / before)).sum()))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_the_divergence_is_a_lower_bound_of_that_over_all_items(seed, negatives):
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (
        (3 * torch.randn((4, 9), dtype=torch.float64, generator=generator)).log_softmax(1) for _ in range(2)
    )
    whole = (policy.exp() * (policy - reference)).sum(1)
    shown = preference_measures(policy[:, : 1 + negatives], reference[:, : 1 + negatives], 0.5)["kl"]
    assert (shown >= -1e-12).all()
    assert (shown <= whole + 1e-12).all()
    torch.testing.assert_close(preference_measures(policy, reference, 0.5)["kl"], whole, rtol=1e-9, atol=1e-9)


def test_measures_of_equal_policies():
    policy = pairs(6)[0].log_softmax(1).requires_grad_()
    for name, value in preference_measures(policy, policy.detach(), 0.5).items():
        assert value.abs().max() < 1e-12, name
        assert not value.requires_grad
