"""The builder: packed, cached, streamed and plain rows are the same, and a cache is never trusted."""

import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs_with_events import SERVED, data_of, items_of, log_of
from safetensors import SafetensorError

from llmrec.exceptions import DataError, DependencyError
from llmrec.prompt import Prompt
from llmrec.tasks import dataset as module
from llmrec.tasks.dataset import build_rows, cache_key, next_item_cases, training_dataset
from llmrec.tasks.mixture import Mixture, Plan
from llmrec.tasks.packed_rows import PackedRows
from llmrec.tasks.tables import Preferences, Queries

MIXTURE = Mixture.parse(["next_item", "item_to_id=2", "id_to_item:20", "search"])
DATA = data_of()
ROWS = list(Plan(MIXTURE, DATA, 5).rows())

random_rows = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=6).flatmap(
        lambda tokens: st.sampled_from(["x", "y", "z"]).map(
            lambda task: {
                "input_ids": [token for token, _ in tokens],
                "labels": [token if answer else -100 for token, answer in tokens],
                "task": task,
            }
        )
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(random_rows, st.integers(1, 9))
def test_packed_rows_are_the_rows(rows, most):
    packed = PackedRows.of(rows)
    assert list(packed) == rows
    assert len(packed) == len(rows)
    assert packed[:] == rows
    assert packed.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    assert packed.dataset().to_list() == rows
    spans = packed._spans(most)
    assert [place for begin, end in spans for place in range(begin, end)] == list(range(len(rows)))
    for begin, end in spans:
        assert end - begin <= 1 or packed.lengths[begin:end].sum() <= most
    for task, counted in packed.report().items():
        mine = [row for row in rows if row["task"] == task]
        assert counted == {
            "rows": len(mine),
            "tokens": sum(len(row["input_ids"]) for row in mine),
            "answer_tokens": sum(label != -100 for row in mine for label in row["labels"]),
            "longest": max(len(row["input_ids"]) for row in mine),
        }
    assert set(packed.report()) == {row["task"] for row in rows}
    if rows:
        assert packed[-1] == rows[-1]
        with pytest.raises(IndexError):
            packed[len(rows)]


def test_a_table_in_pieces_is_the_same(monkeypatch):
    packed = PackedRows.of(ROWS)
    monkeypatch.setattr(PackedRows, "_spans", lambda self: [(0, 7), (7, 8), (8, len(self))])
    assert packed.dataset().to_list() == ROWS


def test_memory_stream_and_list_are_the_same_rows_in_the_same_order(monkeypatch):
    memory = training_dataset(MIXTURE, DATA, 5)
    assert memory.column_names == ["input_ids", "labels", "task"]
    assert memory.to_list() == ROWS
    stream = training_dataset(MIXTURE, DATA, 5, stream=True)
    assert list(stream) == ROWS
    assert list(stream) == ROWS  # a second epoch
    workers = [row for index in range(4) for row in stream.shard(4, index, contiguous=True)]
    assert workers == ROWS
    assert list(pickle.loads(pickle.dumps(stream))) == ROWS  # as a worker that is no fork gets it
    resumed = training_dataset(MIXTURE, DATA, 5, stream=True)
    reading = iter(resumed)
    begun = [next(reading) for _ in range(10)]
    state = resumed.state_dict()
    resumed = training_dataset(MIXTURE, DATA, 5, stream=True)
    resumed.load_state_dict(state)
    assert begun + list(resumed) == ROWS
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert training_dataset(MIXTURE, DATA, 5) == ROWS
    with pytest.raises(DependencyError, match="need the package datasets"):
        training_dataset(MIXTURE, DATA, 5, stream=True)


def test_a_cache_is_used_once_it_is_written(tmp_path, monkeypatch):
    assert list(build_rows(MIXTURE, DATA, 5, tmp_path)) == ROWS
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["rows.json", "rows.safetensors"]

    def unused(*_):
        raise AssertionError("the rows were built again")

    monkeypatch.setattr(module, "Plan", unused)
    assert list(build_rows(MIXTURE, DATA, 5, tmp_path)) == ROWS
    assert training_dataset(MIXTURE, DATA, 5, tmp_path).to_list() == ROWS
    with pytest.raises(AssertionError):
        build_rows(MIXTURE, DATA, 6, tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no manifest", "no rows", "manifest cut", "other key"])
def test_a_torn_cache_is_built_again(tmp_path, damage, caplog):
    build_rows(MIXTURE, DATA, 5, tmp_path)
    (folder,) = tmp_path.iterdir()
    rows, manifest = folder / "rows.safetensors", folder / "rows.json"
    content = rows.read_bytes()
    if damage == "cut":
        rows.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        place = len(content) // 2
        rows.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "no rows":
        rows.unlink()
    elif damage == "manifest cut":
        manifest.write_text(manifest.read_text()[:20])
    else:
        manifest.write_text(manifest.read_text().replace(cache_key(MIXTURE, DATA, 5), "0" * 64))
    assert list(build_rows(MIXTURE, DATA, 5, tmp_path)) == ROWS
    assert "built again" in caplog.text
    assert rows.read_bytes() == content
    assert PackedRows.load(folder, cache_key(MIXTURE, DATA, 5)) is not None


def test_whatever_decides_the_rows_is_in_the_key():
    def item(**changes):
        return items_of().with_columns(**changes)

    import polars as pl

    log = log_of()
    other_times = log.with_columns(timestamp=pl.col("timestamp") + 7)
    other = [
        (MIXTURE, DATA, 6),
        (Mixture.parse(["next_item", "item_to_id=2", "id_to_item:21", "search"]), DATA, 5),
        (Mixture.parse(["next_item", "item_to_id=2.0000001", "id_to_item:20", "search"]), DATA, 5),
        (MIXTURE, data_of(log.filter(pl.col("user_id") != "u0")), 5),
        (MIXTURE, data_of(other_times), 5),
        (MIXTURE, data_of(log.drop("timestamp")), 5),
        (MIXTURE, data_of(log.with_columns(rating=pl.lit(2.0))), 5),
        (MIXTURE, data_of(log.with_columns(action=pl.lit("look"))), 5),
        (MIXTURE, data_of(log.with_columns(domain=pl.lit("look"))), 5),
        (MIXTURE, data_of(items=item(title=pl.lit("Other"))), 5),
        (MIXTURE, data_of(items=item(brand=pl.lit("Other"))), 5),
        (MIXTURE, data_of(seed=1), 5),
        (MIXTURE, replace(DATA, catalog=DATA.catalog.with_retired([1], True)), 5),
        (MIXTURE, replace(DATA, prompt=Prompt("x" + SERVED.source)), 5),
        (MIXTURE, replace(DATA, templates={**DATA.templates, "search": {"query": Prompt("? {{ query }}")}}), 5),
        (MIXTURE, replace(DATA, max_history=4), 5),
        (MIXTURE, replace(DATA, max_text_tokens=41), 5),
        (MIXTURE, replace(DATA, like_threshold=3.0), 5),
        (MIXTURE, replace(DATA, text_columns=("brand",)), 5),
        (MIXTURE, replace(DATA, description_column="brand"), 5),
        (MIXTURE, replace(DATA, queries=Queries([0], ["a"])), 5),
        (MIXTURE, replace(DATA, queries=Queries([0], ["b"])), 5),
        (MIXTURE, replace(DATA, preferences=Preferences(False, {"u0": [(-np.inf, "a")]})), 5),
        (MIXTURE, replace(DATA, preferences=Preferences(True, {"u0": [(0.0, "a")]})), 5),
    ]
    larger = data_of()
    larger.tokenizer.add_tokens(["abc"])
    keys = [cache_key(*arguments) for arguments in [(MIXTURE, DATA, 5), (MIXTURE, larger, 5), *other]]
    assert len(set(keys)) == len(keys)
    assert cache_key(MIXTURE, data_of(), 5) == keys[0]


def test_the_code_is_in_the_key(monkeypatch):
    from llmrec.tasks import task_data

    before = data_of().content_hash
    monkeypatch.setattr(task_data, "_code", lambda: "later")
    assert data_of().content_hash != before


def test_validation_rows_ask_by_the_served_prompt_with_its_events():
    prompt = Prompt("{% for i in history %}{{ i.semantic_id }}{{ i.gap }};{% endfor %}")
    data = data_of(prompt=prompt)
    rows = list(next_item_cases(data, "valid"))
    histories, targets = data.split.histories("valid"), data.split.targets("valid")
    assert len(rows) == len(targets) > 1
    assert list(next_item_cases(data, "valid", [1, 0])) == [rows[1], rows[0]]
    for row, history, target, place in zip(rows, histories, targets, data.split.positions["valid"], strict=True):
        begin = max(place - 3, place - len(history))
        events = data.events(begin, place)
        question = prompt.encode(data.catalog, history[-3:].tolist(), data.text, data.start, events)
        answer = data.catalog.item_tokens[target].tolist()
        labels = [-100] * len(question) + answer
        assert row == {"input_ids": question + answer, "labels": labels, "task": "next_item"}


def test_the_catalog_is_the_splits():
    with pytest.raises(DataError, match="12 items and the catalog 13"):
        replace(DATA, catalog=data_of(items=items_of(13)).catalog)
    with pytest.raises(DataError, match="max_history is 0"):
        replace(DATA, max_history=0)


def test_remembered_texts_are_encoded_as_ever(monkeypatch):
    from llmrec.tasks import task_data
    from llmrec.vocabulary import PlainText

    monkeypatch.setattr(task_data, "_REMEMBERED", 3)
    data, plain = data_of(), PlainText(DATA.tokenizer)
    texts = ["a", "b", "a", "<s0_1>", "c", "d", "a", "e" * 300, "e" * 300, "b"]
    for text in texts:
        found = data.text.encode(text)
        assert found == plain.encode(text)
        found.append(-1)  # what is done with it changes nothing that is remembered
    assert 0 < len(data.text._remembered) <= 3
    assert all(len(text) <= 200 for text in data.text._remembered)


@pytest.mark.parametrize("error", [OSError(39, "Directory not empty"), SafetensorError("I/O error")])
def test_rows_that_cannot_be_kept_are_not_lost(tmp_path, monkeypatch, caplog, error):
    """As when another process writes the same rows at the same moment, or the disk is full."""

    def save(self, folder, key):
        raise error

    mixture = Mixture.parse(["next_item"])
    expected = list(build_rows(mixture, data_of(), 0))
    monkeypatch.setattr(PackedRows, "save", save)
    assert list(build_rows(mixture, data_of(), 0, tmp_path)) == expected
    assert "could not be kept" in caplog.text
