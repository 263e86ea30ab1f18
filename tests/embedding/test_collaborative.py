"""Co-occurrence counts and positive PMI against loops, and what the embedding makes of them."""

import numpy as np
import pytest

from llmrec.embedding import cooccurrence_embeddings
from llmrec.embedding.collaborative import cooccurrence, positive_pmi
from llmrec.exceptions import DataError


def random_histories(seed: int, num_items: int = 12) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, num_items, generator.integers(0, 9)).astype(np.int32) for _ in range(20)]


@pytest.mark.parametrize("window", [1, 2, 5, 50])
@pytest.mark.parametrize("seed", range(4))
def test_counts_are_the_definition(seed: int, window: int) -> None:
    histories = random_histories(seed)
    expected = np.zeros((12, 12))
    for history in histories:
        for i, first in enumerate(history):
            for j in range(i + 1, min(i + window, len(history) - 1) + 1):
                if first != history[j]:
                    expected[first, history[j]] += 1 / (j - i)
                    expected[history[j], first] += 1 / (j - i)
    np.testing.assert_allclose(cooccurrence(histories, 12, window).toarray(), expected, atol=1e-12)


def test_positive_pmi_is_the_definition() -> None:
    counts = cooccurrence(random_histories(0), 12)
    dense = counts.toarray()
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(dense * dense.sum() / np.outer(dense.sum(axis=1), dense.sum(axis=0)))
    expected = np.where(dense > 0, np.maximum(information, 0), 0)
    np.testing.assert_allclose(positive_pmi(counts).toarray(), expected, atol=1e-12)


def test_full_width_keeps_the_cosines_of_the_pmi_rows() -> None:
    histories = random_histories(1)
    rows = positive_pmi(cooccurrence(histories, 12)).toarray()
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms > 0, norms, 1)
    vectors = cooccurrence_embeddings(histories, 12)
    assert vectors.shape == (12, 12)
    np.testing.assert_allclose(vectors @ vectors.T, rows @ rows.T, atol=1e-5)


@pytest.mark.parametrize("num_items", [40, 700])  # exact and randomised decomposition
def test_items_of_one_taste_are_neighbours_and_unseen_ones_zero(num_items: int) -> None:
    generator = np.random.default_rng(0)
    tastes = np.arange(num_items) % 4
    histories = []
    for user in range(8 * num_items):
        histories.append(generator.choice(np.flatnonzero(tastes == user % 4)[:-1], 6))
    vectors = cooccurrence_embeddings(histories, num_items, dim=8)
    unseen = np.array([np.flatnonzero(tastes == taste)[-1] for taste in range(4)])
    assert not vectors[unseen].any()
    seen = np.setdiff1d(np.arange(num_items), unseen)
    np.testing.assert_allclose(np.linalg.norm(vectors[seen], axis=1), 1, atol=1e-5)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    assert (tastes[similarity.argmax(axis=1)] == tastes)[seen].all()
    np.testing.assert_array_equal(vectors, cooccurrence_embeddings(histories, num_items, dim=8))


@pytest.mark.parametrize("num_items", [30, 800])
def test_rank_deficiency_leaves_no_noise_in_unseen_items(num_items: int) -> None:
    # 12 of the items occur, so that most of the directions asked for belong to nothing but rounding.
    histories = [2 * history for history in random_histories(2)]
    vectors = cooccurrence_embeddings(histories, num_items, dim=30)
    seen = np.unique(np.concatenate(histories))
    assert not np.delete(vectors, seen, axis=0).any()
    np.testing.assert_allclose(np.linalg.norm(vectors[seen], axis=1), 1, atol=1e-5)


def test_without_pairs_all_rows_are_zero() -> None:
    for histories in ([], [np.array([1])], [np.array([2, 2, 2])]):
        assert not cooccurrence_embeddings(histories, 3).any()


def test_misuse_is_refused() -> None:
    with pytest.raises(DataError, match=r"item rows 0\.\.3, the catalog has 3 items"):
        cooccurrence([np.array([0, 3])], 3)
    with pytest.raises(DataError, match="window of 0"):
        cooccurrence([np.array([0, 1])], 3, window=0)
    for dim in (0, -1):
        with pytest.raises(DataError, match=f"collaborative embedding {dim} wide"):
            cooccurrence_embeddings([np.array([0, 1])], 3, dim)
