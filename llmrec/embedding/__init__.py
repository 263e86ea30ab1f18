"""Item embeddings: item texts by a sentence encoder, co-occurrence of the training histories, and both fused.

Nothing here knows of codes, catalogs or tokens: it ends with one float vector per item.
"""

from llmrec.embedding.collaborative import cooccurrence_embeddings
from llmrec.embedding.columns import VectorBlocks, column_vectors
from llmrec.embedding.encoder import EmbeddingModel, encode_texts, resolve_model
from llmrec.embedding.fusion import Fusion
from llmrec.embedding.sequential import sasrec_embeddings
from llmrec.embedding.static import static_embeddings
from llmrec.embedding.store import EmbeddingStore
from llmrec.embedding.whitening import Whitening

__all__ = [
    "EmbeddingModel",
    "EmbeddingStore",
    "Fusion",
    "VectorBlocks",
    "Whitening",
    "column_vectors",
    "cooccurrence_embeddings",
    "encode_texts",
    "resolve_model",
    "sasrec_embeddings",
    "static_embeddings",
]
