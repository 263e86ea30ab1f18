"""semantic_ids/embed.py by what it is given: whose rows vectors are, and when a result is the one asked for."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest

from llmrec.data.arguments import ColumnArguments
from llmrec.embedding import EmbeddingStore, encoder
from llmrec.exceptions import DataError

ROOT = Path(__file__).parents[2]
IDS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def embed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("embed_stage", ROOT / "semantic_ids/embed.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four items with two columns of vectors, a file of four vectors, and a log that knows a fifth item."""
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=(4, 3)).tolist() for name in ("left", "right")}
    pl.DataFrame({"item_id": IDS, "title": IDS, **columns}).write_parquet(tmp_path / "items.parquet")
    np.save(tmp_path / "v.npy", rng.normal(size=(4, 2)).astype(np.float32))
    log = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "z"], "timestamp": [1, 2]})
    log.write_csv(tmp_path / "log.csv")
    return tmp_path


def embedded(embed, capsys, data: Path, invalid: str = "error", **arguments) -> tuple[EmbeddingStore, bool]:
    """Runs the stage in this process: what it wrote, and whether it said that this was there already."""
    given = {"items": str(data / "items.parquet"), "out": str(data / "out"), **arguments}
    embed.main(embed.EmbedArguments(**given), ColumnArguments(invalid_rows=invalid))
    return EmbeddingStore.load(data / "out"), "already" in capsys.readouterr().err


def test_other_ids_of_the_same_rows_are_another_embedding(embed, capsys, data: Path) -> None:
    file = {"vectors": str(data / "v.npy"), "vector_ids": str(data / "ids.txt")}
    vectors = np.load(data / "v.npy")
    for ids, there in ((IDS, False), (IDS, True), (IDS[::-1], False), (IDS[::-1], True)):
        (data / "ids.txt").write_text("\n".join(ids) + "\n")
        store, already = embedded(embed, capsys, data, **file)
        assert already == there
        np.testing.assert_array_equal(store.rows(ids), vectors)


def test_columns_in_another_order_are_another_embedding(embed, capsys, data: Path) -> None:
    def block(name: str, share: float) -> np.ndarray:
        vectors = np.array(pl.read_parquet(data / "items.parquet")[name].to_list())
        centred = vectors - vectors.mean(axis=0)
        return centred * np.sqrt(share) / np.linalg.norm(centred, axis=1).mean()

    for columns, there in ((["left", "right"], False), (["left", "right"], True), (["right", "left"], False)):
        store, already = embedded(embed, capsys, data, vector_columns=columns, vector_weights=[3.0, 1.0])
        assert already == there
        expected = np.concatenate([block(columns[0], 0.75), block(columns[1], 0.25)], axis=1)
        np.testing.assert_allclose(store.embeddings, expected, atol=1e-6)
    assert [name for name, _ in store.origin["columns_sha256"]] == ["right", "left"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vector_columns": ["left", "right", "left"]}, "names 'left' twice"),
        ({"vector_columns": ["left", "(text)"], "with_text": True}, r"names '\(text\)' twice"),
        ({"vector_columns": ["left"], "vector_weights": [1.0, 2.0]}, r"gives 2 for 1 block\(s\), left"),
        (
            {"vector_columns": ["left"], "with_text": True, "vector_weights": [1.0]},
            r"gives 1 for 2 block\(s\), left, \(text\)",
        ),
        ({"max_tokens": -64}, "--max-tokens is -64"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(embed, wrong, message: str) -> None:
    with pytest.raises(DataError, match=message):
        embed.main(embed.EmbedArguments(items="absent.csv", out="x", **wrong), ColumnArguments())


def test_rows_without_ids_are_trusted_only_where_the_table_is_whole(embed, capsys, data: Path) -> None:
    """A table's second row is left out and the log adds an item: four rows and four items all the same."""
    vectors = {"vectors": str(data / "v.npy")}
    store, _ = embedded(embed, capsys, data, invalid="drop", **vectors)
    np.testing.assert_array_equal(store.rows(IDS), np.load(data / "v.npy"))
    with pytest.raises(DataError, match=r"0 row\(s\) were left out and 1 item\(s\) .* added\. Say with --vector-ids"):
        embedded(embed, capsys, data, interactions=str(data / "log.csv"), **vectors)
    broken = pl.DataFrame({"item_id": ["a", "a", "c", None, "d"], "title": [*IDS, "e"]})
    broken.write_parquet(data / "items.parquet")
    for more, added in (({}, 0), ({"interactions": str(data / "log.csv")}, 1)):
        with pytest.raises(DataError, match=rf"2 row\(s\) were left out and {added} item"):
            embedded(embed, capsys, data, invalid="drop", **vectors, **more)
    (data / "ids.txt").write_text("d\nc\nz\na\n")
    log = {"interactions": str(data / "log.csv"), "vector_ids": str(data / "ids.txt")}
    store, _ = embedded(embed, capsys, data, invalid="drop", **vectors, **log)
    np.testing.assert_array_equal(store.rows(["d", "c", "z", "a"]), np.load(data / "v.npy"))


def test_another_configuration_of_the_same_weights_is_embedded_anew(embed, capsys, data: Path, monkeypatch) -> None:
    folder = data / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    made = []

    def encode_texts(texts, model, **arguments):
        from llmrec.embedding.matrix import write_matrix

        made.append(model.config_sha256)
        write_matrix(arguments["target"], "embeddings", np.ones((len(texts), 2), np.float32))

    monkeypatch.setattr("llmrec.embedding.encode_texts", encode_texts)
    for pooling, there in (("mean", False), ("mean", True), ("cls", False)):
        (folder / "config.json").write_text(json.dumps({"pooling": pooling}))
        store, already = embedded(embed, capsys, data, model=str(folder))
        assert already == there
        assert store.origin["config_sha256"] == encoder.config_sha256(folder)
    assert len(set(made)) == len(made) == 2
