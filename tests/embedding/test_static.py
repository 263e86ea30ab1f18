"""The static embedding: similar texts are near, any catalog size works, the same texts give the same bits."""

import numpy as np
import pytest

from llmrec.embedding import static_embeddings
from llmrec.exceptions import DataError


def texts_of(groups: int, per_group: int) -> list[str]:
    generator = np.random.default_rng(0)
    return [
        " ".join(f"word{group}_{token}" for token in generator.integers(0, 30, 12)) + " for everyone"
        for group in range(groups)
        for _ in range(per_group)
    ]


@pytest.mark.parametrize(("groups", "per_group"), [(3, 10), (8, 100)])
def test_texts_of_a_kind_are_neighbours(groups: int, per_group: int) -> None:
    vectors = static_embeddings(texts_of(groups, per_group), dim=32)
    kinds = np.repeat(np.arange(groups), per_group)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    assert (kinds[similarity.argmax(axis=1)] == kinds).mean() > 0.95
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_without_truncation_cosines_are_those_of_the_features() -> None:
    # Full rank keeps every inner product: equal texts stay equal, and texts without a shared n-gram orthogonal.
    vectors = static_embeddings(["red bolt", "red bolt", "qqqq"])
    assert vectors.shape == (3, 3)
    np.testing.assert_allclose(vectors @ vectors.T, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-5)


@pytest.mark.parametrize(("items", "width"), [(1, 1), (2, 2), (3, 3), (40, 32), (600, 32)])
def test_any_number_of_items(items: int, width: int) -> None:
    vectors = static_embeddings([f"item number {i}" for i in range(items)], dim=32)
    assert vectors.shape == (items, width)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()


def test_the_same_texts_give_the_same_bits() -> None:
    texts = texts_of(6, 100)
    np.testing.assert_array_equal(static_embeddings(texts, dim=16, seed=3), static_embeddings(texts, dim=16, seed=3))


def test_items_without_text_are_zero_and_a_catalog_without_any_is_refused() -> None:
    vectors = static_embeddings(["a bolt", "", "a nut"])
    assert not vectors[1].any()
    assert vectors[0].any()
    with pytest.raises(DataError, match="None of the 2 items has text"):
        static_embeddings(["", "  "])
