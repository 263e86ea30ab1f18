"""Semantic ID tokenizers: item embeddings -> codes, then unique codes. Knows nothing of texts or language models."""

from llmrec.quantization.assignment import Assignment, AssignmentReport, assign
from llmrec.quantization.collisions import (
    CollisionReport,
    Policy,
    ResolvedCodes,
    compare_policies,
    resolve_collisions,
)
from llmrec.quantization.hashed import HashedCodes
from llmrec.quantization.product import ProductQuantizer
from llmrec.quantization.quantizer import Quantizer
from llmrec.quantization.residual_kmeans import ResidualKMeans
from llmrec.quantization.residual_vq import ResidualVQ
from llmrec.quantization.scalar import ScalarQuantizer

__all__ = [
    "Assignment",
    "AssignmentReport",
    "CollisionReport",
    "HashedCodes",
    "Policy",
    "ProductQuantizer",
    "Quantizer",
    "ResidualKMeans",
    "ResidualVQ",
    "ResolvedCodes",
    "ScalarQuantizer",
    "assign",
    "compare_policies",
    "resolve_collisions",
]
