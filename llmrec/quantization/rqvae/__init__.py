"""RQ-VAE: an autoencoder whose middle is quantised residually (TIGER)."""

from llmrec.quantization.rqvae.rqvae import RQVAE

__all__ = ["RQVAE"]
