"""The embedding folder: written whole, read back bit for bit, and refused when it is not what it says."""

import json

import numpy as np
import pytest

from llmrec.embedding import EmbeddingStore
from llmrec.embedding.store import text_sha256
from llmrec.exceptions import ArtefactError, DataError


@pytest.fixture
def store() -> EmbeddingStore:
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    return EmbeddingStore(["a", "b", "ü", "d", "e"], vectors, {"model": "static", "text_sha256": "0"})


def test_saved_and_loaded(store: EmbeddingStore, tmp_path) -> None:
    store.save(tmp_path / "embeddings")
    loaded = EmbeddingStore.load(tmp_path / "embeddings")
    assert loaded.item_ids == store.item_ids
    assert loaded.origin == store.origin
    assert loaded.dimension == 3
    assert isinstance(loaded.embeddings, np.memmap)
    np.testing.assert_array_equal(loaded.embeddings, store.embeddings)
    np.testing.assert_array_equal(loaded.rows(["ü", "a", "ü"]), store.embeddings[[2, 0, 2]])


def test_unknown_items_are_named(store: EmbeddingStore) -> None:
    with pytest.raises(DataError, match=r"2 item.* 'x', 'y'"):
        store.rows(["a", "x", "y"])


@pytest.mark.parametrize("name", ["embeddings.safetensors", "items.json", "embedding.json"])
def test_missing_and_altered_files_are_named(store: EmbeddingStore, tmp_path, name: str) -> None:
    store.save(tmp_path / "embeddings")
    file = tmp_path / "embeddings" / name
    content = file.read_bytes()
    file.write_bytes(content[:-3])
    with pytest.raises(ArtefactError, match=name):
        EmbeddingStore.load(tmp_path / "embeddings")
    file.unlink()
    with pytest.raises(ArtefactError, match=f"lacks {name}"):
        EmbeddingStore.load(tmp_path / "embeddings")


def test_a_manifest_of_another_kind_is_refused(store: EmbeddingStore, tmp_path) -> None:
    store.save(tmp_path / "embeddings")
    (tmp_path / "embeddings" / "embedding.json").write_text(json.dumps({"items": 5}))
    with pytest.raises(ArtefactError, match="no embedding manifest"):
        EmbeddingStore.load(tmp_path / "embeddings")


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(DataError, match="2 items cannot have embeddings of shape"):
        EmbeddingStore(["a", "b"], np.zeros((3, 2)))
    with pytest.raises(DataError, match="1 item id"):
        EmbeddingStore(["a", "a"], np.zeros((2, 2)))
    with pytest.raises(DataError, match="'b' first"):
        EmbeddingStore(["a", "b"], np.array([[0.0], [np.nan]]))


def test_text_hash_depends_on_order_and_boundaries() -> None:
    hashes = {text_sha256(texts) for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], [])}
    assert len(hashes) == 5
