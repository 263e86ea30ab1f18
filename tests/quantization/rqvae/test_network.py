"""The RQ-VAE's network on numbers worked out by hand, and its gradients."""

import numpy as np
import pytest
import torch

from llmrec.quantization.rqvae.model import MLP, Network, ResidualQuantizer


def quantizer_of(*codebooks: list[list[float]], estimator="straight-through", update="ema") -> ResidualQuantizer:
    shape = np.array(codebooks[0]).shape
    quantizer = ResidualQuantizer(len(codebooks), *shape, estimator, update, 0.99)
    for level, codes in zip(quantizer.levels, codebooks, strict=True):
        level.codes.data.copy_(torch.tensor(codes))
    return quantizer


@pytest.mark.parametrize("estimator", ["straight-through", "rotation"])
def test_residual_codes_and_losses_by_hand(estimator: str) -> None:
    quantizer = quantizer_of([[0.0], [10.0]], [[-1.0], [1.0]], estimator=estimator)
    points, codes, residuals, commitment, codebook = quantizer(torch.tensor([[0.5], [9.0]]))
    assert codes.tolist() == [[0, 1], [1, 0]]
    assert points.tolist() == [[1.0], [9.0]]
    assert residuals.tolist() == [[[0.5], [9.0]], [[0.5], [-1.0]]]
    # Level 0: 0.5 to 0 and 9 to 10; level 1: 0.5 to 1 and -1 to -1.
    assert float(commitment) == pytest.approx((0.25 + 1) / 2 + (0.25 + 0) / 2)
    assert float(codebook) == 0


def test_commitment_moves_the_latents_and_the_codebook_loss_the_codes() -> None:
    quantizer = quantizer_of([[0.0], [10.0]], [[-1.0], [1.0]], update="gradient")
    latents = torch.tensor([[0.5], [9.0]], requires_grad=True)
    quantised = quantizer(latents)
    assert torch.equal(quantised.codebook, quantised.commitment)
    quantised.commitment.backward()
    # 2 (residual - code) / B, summed over the levels: (0.5 - 0) + (0.5 - 1) and (9 - 10) + (-1 + 1).
    np.testing.assert_allclose(latents.grad, [[0.0], [-1.0]], atol=1e-6)
    assert all(level.codes.grad is None for level in quantizer.levels)
    latents.grad = None
    quantizer(latents).codebook.backward()
    assert latents.grad is None
    np.testing.assert_allclose(quantizer.levels[0].codes.grad, [[-0.5], [1.0]], atol=1e-6)
    np.testing.assert_allclose(quantizer.levels[1].codes.grad, [[0.0], [0.5]], atol=1e-6)


def test_straight_through_is_the_identity_whatever_the_number_of_levels() -> None:
    generator = np.random.default_rng(0)
    quantizer = quantizer_of(*generator.normal(size=(3, 8, 4)).tolist())
    latents = torch.tensor(generator.normal(size=(10, 4)), dtype=torch.float32, requires_grad=True)
    upstream = torch.tensor(generator.normal(size=(10, 4)), dtype=torch.float32)
    quantizer(latents).points.backward(upstream)
    assert torch.equal(latents.grad, upstream)


def test_mlp_is_linear_relu_linear() -> None:
    torch.manual_seed(0)
    mlp = MLP([3, 5, 2]).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    first, last = mlp[0], mlp[2]
    expected = torch.relu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    np.testing.assert_allclose(mlp(x).detach(), expected.detach(), atol=1e-12)
    assert len(mlp) == 3


def test_the_loss_is_the_mean_squared_error_with_and_without_quantisation() -> None:
    torch.manual_seed(1)
    network = Network(6, (5,), 3, num_levels=2, size=4)
    for level in network.quantizer.levels:
        level.codes.copy_(torch.randn(4, 3))
    x = torch.randn(7, 6)
    latents = network.encoder(x)
    plain, nothing = network(x, quantise=False)
    assert nothing is None
    assert float(plain.detach()) == pytest.approx(float(((network.decoder(latents) - x) ** 2).mean().detach()))
    loss, quantised = network(x)
    codes = quantised.codes
    points = network.quantizer.levels[0].codes[codes[:, 0]] + network.quantizer.levels[1].codes[codes[:, 1]]
    assert float(loss) == pytest.approx(float(((network.decoder(points) - x) ** 2).mean()), rel=1e-6)
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_half_precision_does_not_reach_the_quantiser() -> None:
    torch.manual_seed(2)
    network = Network(6, (5,), 3, num_levels=2, size=64)
    for level in network.quantizer.levels:
        level.codes.copy_(torch.randn(64, 3))
    x = torch.randn(500, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = network.encoder(x)
        loss, quantised = network(x)
    assert latents.dtype == torch.bfloat16
    assert {loss.dtype, quantised.points.dtype, quantised.residuals.dtype} == {torch.float32}
    assert torch.equal(quantised.codes, network.quantizer(latents.float()).codes)
