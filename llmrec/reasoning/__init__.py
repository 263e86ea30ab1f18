"""Latent reasoning: the losses that teach an encoder to think, and what its steps gain and cost."""
