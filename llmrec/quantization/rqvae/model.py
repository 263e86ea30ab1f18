"""The RQ-VAE's network: encoder, residual quantiser, decoder. Knows nothing of items, files or training."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from llmrec.quantization.rqvae.codebook import ESTIMATORS, Codebook, Estimator, Update


class MLP(nn.Sequential):
    """Linear layers of the given widths with ReLU between them."""

    def __init__(self, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])


class Quantised(NamedTuple):
    """What the residual quantiser makes of latents (B, d).

    Attributes:
        points: (B, d) the sum of the chosen codes, differentiable in the latents by the estimator.
        codes: (B, L) int64.
        residuals: (L, B, d) what each level was given, without gradient.
        commitment: the mean over rows and widths of (residual - code)², summed over levels; moves the encoder.
        codebook: the same number; moves the codes, and is 0 where they learn by averages.
    """

    points: Tensor
    codes: Tensor
    residuals: Tensor
    commitment: Tensor
    codebook: Tensor


class ResidualQuantizer(nn.Module):
    """L codebooks, each for what those before it left over."""

    def __init__(
        self, num_levels: int, size: int, width: int, estimator: Estimator, update: Update, decay: float
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Codebook(size, width, update, decay) for _ in range(num_levels))
        self.estimate = ESTIMATORS[estimator]

    @property
    def codebooks(self) -> list[Codebook]:
        """The levels, first to last."""
        return cast("list[Codebook]", list(self.levels))

    def forward(self, latents: Tensor) -> Quantised:
        """Greedy from level to level (TIGER, section 3.1).

        The estimator stands once between the latents and the sum of all levels' points. One at each level would pass
        a straight-through gradient L times.
        """
        points = torch.zeros_like(latents)
        codes, residuals = [], []
        commitment, codebook = latents.new_zeros(()), latents.new_zeros(())
        for level in self.codebooks:
            residual = latents - points  # (B, d); `points` carries no gradient here
            chosen, point = level(residual)
            commitment = commitment + (residual - point.detach()).square().mean()
            if point.requires_grad:
                codebook = codebook + (residual.detach() - point).square().mean()
            codes.append(chosen)
            residuals.append(residual.detach())
            points = points + point.detach()
        return Quantised(
            self.estimate(latents, points), torch.stack(codes, dim=1), torch.stack(residuals), commitment, codebook
        )


class Network(nn.Module):
    """x (B, D) -> encoder -> latents (B, d) -> codes -> decoder -> x' (B, D)."""

    def __init__(
        self,
        width: int,
        hidden: Sequence[int],
        latent_width: int,
        num_levels: int,
        size: int,
        estimator: Estimator = "straight-through",
        update: Update = "ema",
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        self.encoder = MLP([width, *hidden, latent_width])
        self.quantizer = ResidualQuantizer(num_levels, size, latent_width, estimator, update, decay)
        self.decoder = MLP([latent_width, *reversed(hidden), width])

    def forward(self, x: Tensor, quantise: bool = True) -> tuple[Tensor, Quantised | None]:
        """x (B, D) -> the mean over rows and widths of (x - x')², and what the quantiser did.

        Without `quantise` the latents go to the decoder as they are, as a plain autoencoder's.
        """
        latents = self.encoder(x)
        quantised = None
        if quantise:
            # Half precision would choose other codes: only the two MLPs run in it.
            with torch.autocast(device_type=x.device.type, enabled=False):
                quantised = self.quantizer(latents.float())
            latents = quantised.points
        reconstruction = (self.decoder(latents).float() - x).square().mean()
        return reconstruction, quantised
