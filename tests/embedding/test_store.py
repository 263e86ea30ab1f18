"""The embedding folder: written whole, read back bit for bit, and refused when it is not what it says."""

import json
import logging
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmrec.embedding import EmbeddingStore, matrix
from llmrec.embedding.matrix import write_matrix
from llmrec.embedding.store import TENSOR, read_item_ids, text_sha256
from llmrec.exceptions import ArtefactError, DataError
from llmrec.storage import sha256_of


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


def test_vectors_of_ones_own_are_mapped_and_become_a_store(tmp_path) -> None:
    vectors = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    ids = ["a", "b", "ü", "d"]
    np.save(tmp_path / "v.npy", vectors)
    save_file({"v": vectors, "w": 2 * vectors}, tmp_path / "v.safetensors")
    np.save(tmp_path / "half.npy", vectors.astype(np.float16))
    origins = []
    for name, tensor, expected in [
        ("v.npy", None, vectors),
        ("v.safetensors", "v", vectors),
        ("v.safetensors", "w", 2 * vectors),
        ("half.npy", None, vectors.astype(np.float16).astype(np.float32)),
    ]:
        store = EmbeddingStore.from_file(tmp_path / name, ids, tensor)
        assert isinstance(store.embeddings, np.memmap)
        store.save(tmp_path / "out")
        loaded = EmbeddingStore.load(tmp_path / "out")
        np.testing.assert_array_equal(loaded.rows(ids[::-1]), expected[::-1])
        assert loaded.origin == store.origin
        origins.append(loaded.origin)
    assert (origins[0]["file"], origins[0]["file_sha256"]) == ("v.npy", sha256_of(tmp_path / "v.npy"))
    assert len({json.dumps(origin) for origin in origins}) == 4


def test_vectors_that_do_not_belong_to_the_items_are_refused(tmp_path) -> None:
    file = tmp_path / "v.npy"
    np.save(file, np.ones((3, 2)))
    with pytest.raises(DataError, match=r"has 3 rows for 2 items, and rows are matched to items by their order"):
        EmbeddingStore.from_file(file, ["a", "b"])
    with pytest.raises(DataError, match="1 item id"):
        EmbeddingStore.from_file(file, ["a", "b", "b"])
    with pytest.raises(DataError, match="no tensor 'x'"):
        EmbeddingStore.from_file(file, ["a", "b", "c"], "x")
    with pytest.raises(DataError, match=r"is no \.npy or \.safetensors file"):
        EmbeddingStore.from_file(tmp_path / "v.csv", ["a"])
    for value in (np.nan, np.inf, 1e300):  # the last is infinite as float32
        np.save(file, np.array([[0.0], [value], [value]]))
        with pytest.raises(DataError, match=r"2 embedding.* item 'b' first"):
            EmbeddingStore.from_file(file, ["a", "b", "c"])


def test_rows_are_matched_to_items_by_id(store: EmbeddingStore, caplog: pytest.LogCaptureFixture) -> None:
    assert store.aligned(store.item_ids) is store
    with caplog.at_level(logging.INFO, "llmrec"):
        aligned = store.aligned(["e", "a", "ü"])
    assert "2 row(s) of the vectors belong to no item" in caplog.text
    assert (aligned.item_ids, aligned.origin) == (["e", "a", "ü"], store.origin)
    np.testing.assert_array_equal(aligned.embeddings, store.embeddings[[4, 0, 2]])
    with pytest.raises(DataError, match=r"2 of 3 item.* such as 'x', 'y'"):
        store.aligned(["a", "x", "y"])


def test_lists_of_ids_are_read(tmp_path) -> None:
    (tmp_path / "ids.json").write_text('["a", 7, "ü b"]', encoding="utf-8")
    (tmp_path / "ids.txt").write_bytes("a\r\n7\nü\u2028b\n".encode())
    assert read_item_ids(tmp_path / "ids.json") == ["a", "7", "ü b"]
    assert read_item_ids(tmp_path / "ids.txt") == ["a", "7", "ü\u2028b"]
    for name, content, message in [
        ("x.json", '{"a": 1}', "holds no list but dict"),
        ("x.json", '["a", 1.5]', "Entry 2 of .* is 1.5"),
        ("x.json", "[true]", "Entry 1 of .* is True"),
        ("x.json", '["a"', "cannot be read as a list of item ids"),
        ("x.txt", "a\n\nb\n", "Entry 2 of .* is ''"),
        ("x.txt", b"\xff\xfe\x00", "cannot be read as a list of item ids"),
    ]:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(DataError, match=message):
            read_item_ids(tmp_path / name)
    with pytest.raises(DataError, match="cannot be read"):
        read_item_ids(tmp_path / "absent.txt")


@pytest.mark.parametrize("fault", ["interrupted", "too few", "not finite", "not written"])
def test_a_folder_is_written_whole_or_not_at_all(store: EmbeddingStore, tmp_path, fault: str) -> None:
    store.save(tmp_path / "embeddings")

    def write() -> None:
        with EmbeddingStore.writing(tmp_path / "embeddings", ["x", "y"], {}) as path:
            if fault == "interrupted":
                raise KeyboardInterrupt
            if fault != "not written":
                vectors = np.ones((1, 3)) if fault == "too few" else np.full((2, 3), np.nan)
                write_matrix(path, TENSOR, vectors)

    with pytest.raises((KeyboardInterrupt, DataError)):
        write()
    assert EmbeddingStore.load(tmp_path / "embeddings").item_ids == store.item_ids
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings"]


def test_saving_and_loading_hold_a_block_in_memory(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "BLOCK_NUMBERS", 1 << 14)
    ids = [str(row) for row in range(2000)]
    np.save(tmp_path / "v.npy", np.ones((2000, 2000), dtype=np.float32))
    tracemalloc.start()
    EmbeddingStore.from_file(tmp_path / "v.npy", ids).aligned(ids[::-1]).save(tmp_path / "out")
    assert EmbeddingStore.load(tmp_path / "out").item_ids == ids[::-1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_500_000  # of 16,000,000; hashing a file takes 1 MiB at a time, twice


def test_text_hash_depends_on_order_and_boundaries() -> None:
    hashes = {text_sha256(texts) for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], [])}
    assert len(hashes) == 5
