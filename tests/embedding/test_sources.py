"""Where collaborative vectors come from, item by item, and what is said of those without a signal."""

import logging

import numpy as np
import pytest

from llmrec.embedding import EmbeddingStore, cooccurrence_embeddings, sasrec_embeddings
from llmrec.embedding.sources import collaborative_vectors, own_vectors
from llmrec.exceptions import ArtefactError, DataError

IDS = ["a", "b", "ü", "d", "e"]
TRAIN = [np.array([0, 1, 2]), np.array([1, 0, 1]), np.array([2, 0])]


@pytest.mark.parametrize("seed", range(5))
def test_own_vectors_are_found_by_id(seed: int, tmp_path) -> None:
    generator = np.random.default_rng(seed)
    known = [str(name) for name in generator.permutation([*IDS, "x", "y"])[: generator.integers(1, 8)]]
    vectors = generator.normal(size=(len(known), 3)).astype(np.float32)
    EmbeddingStore(known, vectors).save(tmp_path / "own")
    found = own_vectors(tmp_path / "own", IDS)
    assert (found.shape, found.dtype) == ((5, 3), np.float32)
    for item, row in zip(IDS, found, strict=True):
        np.testing.assert_array_equal(row, vectors[known.index(item)] if item in known else np.zeros(3))


def test_every_source_is_what_it_is_called(tmp_path, caplog) -> None:
    settings = {"dim": 2, "window": 1, "epochs": 2, "seed": 3}
    EmbeddingStore(["e", "stranger"], np.ones((2, 4))).save(tmp_path / "own")
    expected = {
        "cooccurrence": cooccurrence_embeddings(TRAIN, 5, 2, 1, 3),
        "sasrec": sasrec_embeddings(TRAIN, 5, 2, epochs=2, seed=3),
        "own": np.eye(5)[:, 4:] * np.ones((1, 4)),
    }
    unseen = {"cooccurrence": 2, "sasrec": 2, "own": 4}
    for source, vectors in expected.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, "llmrec"):
            found = collaborative_vectors(source, IDS, TRAIN, folder=tmp_path / "own", **settings)
        np.testing.assert_array_equal(found, vectors.astype(np.float32))
        assert f"{unseen[source]} items have no collaborative signal" in caplog.text
    np.testing.assert_array_equal(collaborative_vectors("own", IDS, folder=tmp_path / "own"), expected["own"])


def test_without_any_signal_there_are_no_vectors(tmp_path, caplog) -> None:
    EmbeddingStore(["stranger"], np.ones((1, 4))).save(tmp_path / "own")
    with caplog.at_level(logging.INFO, "llmrec"):
        assert collaborative_vectors("own", IDS, folder=tmp_path / "own") is None
        assert collaborative_vectors("cooccurrence", IDS, [np.array([0])]) is None
    assert caplog.text.count("No item has a collaborative signal") == 2


def test_misuse_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="no collaborative source 'gnn'"):
        collaborative_vectors("gnn", IDS, TRAIN)
    with pytest.raises(DataError, match="'own' came without a folder"):
        collaborative_vectors("own", IDS, TRAIN)
    for source in ("cooccurrence", "sasrec"):
        with pytest.raises(DataError, match=f"'{source}' came without training histories"):
            collaborative_vectors(source, IDS)
        with pytest.raises(DataError):
            collaborative_vectors(source, IDS, TRAIN, dim=0)
    with pytest.raises(ArtefactError, match="lacks embeddings"):
        own_vectors(tmp_path, IDS)
