import os
import subprocess
import sys

import polars as pl
import pytest

from llmrec.data import hub
from llmrec.data.hub import HubId
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.exceptions import DataError, DependencyError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:a/b", HubId("a/b")),
        ("hub:a/b/c", HubId("a/b", "c")),
        ("hub:a/b/data/c.csv", HubId("a/b", "data/c.csv")),
        ("hub:a/b@v1", HubId("a/b", None, "v1")),
        ("hub:a/b/c@v1#train", HubId("a/b", "c", "v1", "train")),
        ("hub:a/b@refs/pr/1#test", HubId("a/b", None, "refs/pr/1", "test")),
        ("hub:/data/set#train", HubId("/data/set", None, None, "train")),
    ],
)
def test_names(text, expected):
    assert HubId.parse(text) == expected


@pytest.mark.parametrize("text", ["hub:", "hub:a", "hub:a/", "hub:/b".replace("/b", "a//b")])
def test_what_names_nothing(text):
    with pytest.raises(DataError, match="names no data set"):
        HubId.parse(text)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    pl.DataFrame(
        {
            "user_id": [f"u{n % 7}" for n in range(1000)],
            "parent_asin": [n % 11 for n in range(1000)],
            "timestamp": [1_400_000_000_000 + n for n in range(1000)],
            "text": ["x" * 20] * 1000,
        }
    ).write_parquet(tmp_path / "train.parquet")
    return tmp_path


def test_a_data_set_is_streamed_in_batches(folder, monkeypatch):
    monkeypatch.setattr(hub, "_BATCH", 64)
    seen = []
    original = hub._frame
    monkeypatch.setattr(hub, "_frame", lambda batch: seen.append(batch.shape) or original(batch))
    log = Interactions.read(f"hub:{folder}")
    assert log.histories() == Interactions.read(folder / "train.parquet").histories()
    assert seen == [(64, 3)] * 15 + [(40, 3)]  # the text column never travels
    assert log.time_unit == "ms"


def test_ids_of_a_csv_keep_their_zeros(tmp_path):
    (tmp_path / "train.csv").write_text("user_id,item_id,timestamp\n007,NA,\n8,0012,5\n")
    log = Interactions.read(f"hub:{tmp_path}")
    assert log.histories() == {"007": ["NA"], "8": ["0012"]}
    assert log.rows_without_timestamp == 1


def test_json_without_declared_columns(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        '{"item_id": 1, "title": "A", "tags": ["x"]}\n{"item_id": 2, "title": "B"}\n'
    )
    items = Items.read(f"hub:{tmp_path}")
    assert (items.ids, items.titles) == (["1", "2"], ["A", "B"])
    assert items.frame["tags"].to_list() == ["x", None]


def test_mixed_types_come_as_text(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"item_id": "a", "x": "text"}\n{"item_id": "b", "x": {"y": ["z"]}}\n')
    assert Items.read(f"hub:{tmp_path}").frame["x"].to_list() == ["text", "y: z"]


def test_several_splits_are_asked_for(folder):
    pl.DataFrame(
        {"user_id": ["v"], "parent_asin": [1], "timestamp": [1_400_000_000_000], "text": ["x"]}
    ).write_parquet(folder / "test.parquet")
    with pytest.raises(DataError, match=r"has the splits train, test\. Name one, such as hub:.*#train"):
        Interactions.read(f"hub:{folder}")
    assert Interactions.read(f"hub:{folder}#test").histories() == {"v": ["1"]}
    with pytest.raises(DataError, match=r"hub:.*#nosuch cannot be read from the Hub: .*nosuch"):
        Interactions.read(f"hub:{folder}#nosuch")


def test_a_row_at_fault_and_an_absent_column(folder):
    with pytest.raises(DataError, match=r"hub:.*has no column 'item_id'.*'text'"):
        Interactions.read(f"hub:{renamed(folder, 'parent_asin', 'thing')}")
    gap = pl.read_parquet(folder / "train.parquet").with_columns(
        pl.when(pl.int_range(pl.len()) != 500).then("user_id").alias("user_id")
    )
    gap.write_parquet(folder / "train.parquet")
    with pytest.raises(DataError, match=r"hub:.*, row 501 of 1000: user_id is None"):
        Interactions.read(f"hub:{folder}")


def renamed(folder, old, new):
    other = folder.parent / f"{folder.name}-renamed"
    other.mkdir()
    pl.read_parquet(folder / "train.parquet").rename({old: new}).write_parquet(other / "train.parquet")
    return other


def test_a_file_of_a_repository_keeps_zeros(monkeypatch, tmp_path):
    import datasets

    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp\n007,0012,\n8,3,\n")
    asked = {}
    original = datasets.load_dataset

    def load(builder, data_files, **others):
        asked.update(builder=builder, url=data_files)
        return original(builder, data_files=str(tmp_path / "a.csv"), **others)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert Interactions.read("hub:ann/shop/data/a.csv@v2").histories() == {"007": ["0012"], "8": ["3"]}
    assert asked == {"builder": "csv", "url": "hf://datasets/ann/shop@v2/data/a.csv"}


def test_an_unreachable_hub_is_a_data_error():
    code = "from llmrec.data.interactions import Interactions; Interactions.read('hub:nobody/nothing')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "DataError: hub:nobody/nothing cannot be read from the Hub: " in done.stderr
    assert "Check the name" in done.stderr


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match="pip install datasets"):
        Interactions.read("hub:a/b")


def test_nothing_heavy_is_imported():
    code = "import sys, llmrec.data; print([n for n in ('torch', 'datasets', 'vllm', 'sklearn') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_type_that_changes_between_batches_leaves_ids_alone(folder, monkeypatch):
    batches = [pl.DataFrame({"user_id": [7.0], "item_id": [1]}), pl.DataFrame({"user_id": ["7"], "item_id": [2]})]
    monkeypatch.setattr(hub, "_batches", lambda *_: iter(batches))
    monkeypatch.setattr(hub, "_columns", lambda _: ["user_id", "item_id"])
    assert Interactions.read(f"hub:{folder}").histories() == {"7": ["1", "2"]}
