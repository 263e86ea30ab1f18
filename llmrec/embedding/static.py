"""Static embedding: latent semantic analysis fitted on the catalog's own text, for machines without any model."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import hstack

from llmrec.embedding.reduction import principal_coordinates, unit_rows
from llmrec.exceptions import DataError


def static_embeddings(texts: Sequence[str], dim: int = 256, seed: int = 0) -> npt.NDArray[np.float32]:
    """TF-IDF of words, word pairs and character n-grams, reduced by a truncated SVD (Deerwester et al. 1990).

    Words carry the meaning; character n-grams match spellings, models and languages without spaces. The same texts,
    dim and seed give the same vectors on the same machine.

    Args:
        texts: N texts.
        dim: upper bound of the width; a catalog of N items has at most N dimensions.
        seed: of the randomised SVD.

    Returns:
        (N, min(dim, N)) float32 with rows of norm 1; the rows of items without any text are 0.

    Raises:
        DataError: if no item has text.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(text.strip() for text in texts):
        raise DataError(f"None of the {len(texts)} items has text. Name the columns that hold it.")
    # Any non-space run is a word here: the default pattern drops one-letter words and with them sizes ("M", "5").
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True, max_features=50_000)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True, max_features=30_000)
    features = hstack([words.fit_transform(texts), characters.fit_transform(texts)], format="csr")
    return unit_rows(principal_coordinates(features, dim, seed))
