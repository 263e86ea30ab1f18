"""Semantic ID tokenizers: item embeddings -> codes, then unique codes. Knows nothing of texts or language models."""

from llmrec.quantization.collisions import CollisionReport, Policy, ResolvedCodes, resolve_collisions
from llmrec.quantization.quantizer import Quantizer
from llmrec.quantization.residual_kmeans import ResidualKMeans

__all__ = ["CollisionReport", "Policy", "Quantizer", "ResidualKMeans", "ResolvedCodes", "resolve_collisions"]
