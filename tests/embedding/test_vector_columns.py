"""Vector columns: what is read of a table, each block's share of the distances, and the same blocks for new items."""

import json
import logging
from itertools import combinations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data import Items
from llmrec.embedding.columns import VectorBlocks, column_vectors
from llmrec.exceptions import ArtefactError, DataError

IDS = ["a", "b", "c", "d"]
LISTS = [[1.0, 2.0], None, [3.0, -4.5], []]
READ = np.array([[1, 2], [np.nan] * 2, [3, -4.5], [np.nan] * 2], dtype=np.float32)


@pytest.mark.parametrize(
    "dtype", [pl.List(pl.Float64), pl.List(pl.Float32), pl.Array(pl.Float64, 2), pl.List(pl.Decimal(10, 2))]
)
def test_lists_and_arrays_are_read(dtype, caplog: pytest.LogCaptureFixture) -> None:
    lists = [row or None for row in LISTS] if isinstance(dtype, pl.Array) else LISTS
    frame = pl.DataFrame({"image": pl.Series(lists, dtype=dtype, strict=False)})
    with caplog.at_level(logging.WARNING, "llmrec"):
        found = column_vectors(frame, "image", IDS)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, READ)
    assert "2 of 4 item(s) have no vector in the column 'image', such as 'b'" in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_columns_survive_the_reading_of_items(kind: str, tmp_path) -> None:
    rows = [{"item_id": item, "title": item, "image": row} for item, row in zip(IDS, LISTS, strict=True)]
    file = tmp_path / f"items.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "parquet":
        pl.DataFrame(rows).write_parquet(file)
    else:
        texts = ["" if row["image"] is None else json.dumps(row["image"]) for row in rows]
        pl.DataFrame({"item_id": IDS, "title": IDS, "image": texts}).write_csv(file)
    items = Items.read(file)
    np.testing.assert_array_equal(column_vectors(items.frame, "image", items.ids), READ)


def test_new_items_without_any_vector_have_the_width_they_are_told() -> None:
    for dtype in (pl.Null, pl.List(pl.Null), pl.List(pl.Float64)):
        frame = pl.DataFrame({"image": pl.Series([None, None], dtype=dtype)})
        assert np.isnan(column_vectors(frame, "image", ["x", "y"], width=3)).all()
        assert column_vectors(frame, "image", ["x", "y"], width=3).shape == (2, 3)
        with pytest.raises(DataError, match="No item has a vector in the column 'image'"):
            column_vectors(frame, "image", ["x", "y"])
    with pytest.raises(DataError, match="Item 'a' has 2 numbers in the column 'image', not 3"):
        column_vectors(pl.DataFrame({"image": LISTS}), "image", IDS, width=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0, 3.0], None], "Item 'c' has 3 numbers in the column 'v', not 2"),
        ([[1.0, 2.0], [1.0, None], None, None], "item 'b' in the column 'v' holds null, NaN"),
        ([[1.0, 2.0], None, [1.0, float("nan")], None], "item 'c' in the column 'v' holds null, NaN"),
        ([[1.0, 2.0], None, None, [1.0, 1e39]], "item 'd' in the column 'v' holds null, NaN"),
        (["[1, 2]", None, "[1, x]", None], r"Item 'c' has '\[1, x\]' in the column 'v', which is no list of numbers"),
        (["[1, 2]", "red", None, None], "Item 'b' has 'red' in the column 'v', which is no list of numbers"),
        ([None, [True], [False], None], "Item 'b' has .* in the column 'v', which is no list of numbers"),
        ([None, ["1"], ["2"], None], "Item 'b' has .* in the column 'v', which is no list of numbers"),
        ([1.0, 2.0, 3.0, 4.0], "Item 'a' has '1.0' in the column 'v', which is no list of numbers"),
        ([[[1.0]], None, None, None], "Item 'a' has .* in the column 'v', which is no list of numbers"),
    ],
)
def test_the_item_and_the_column_are_named(values, message: str) -> None:
    with pytest.raises(DataError, match=message):
        column_vectors(pl.DataFrame({"v": values}), "v", IDS)


def test_an_absent_column_is_named() -> None:
    with pytest.raises(DataError, match="no column 'x'; their columns are 'v'"):
        column_vectors(pl.DataFrame({"v": LISTS}), "x", IDS)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 9999),
    weights=st.none() | st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
)
def test_blocks_have_their_share_of_the_distances(seed: int, weights) -> None:
    """Against the definition, item by item."""
    generator = np.random.default_rng(seed)
    vectors = {
        name: (generator.normal(size=(30, width)) * 10.0**place + 5).astype(np.float32)
        for place, (name, width) in enumerate({"a": 3, "b": 1, "c": 6}.items())
    }
    for block in vectors.values():
        block[generator.permutation(30)[: generator.integers(0, 20)]] = np.nan
    joined = VectorBlocks.fit(vectors, weights).transform(vectors)
    assert joined.shape == (30, 10)
    shares = np.array(weights or [1, 1, 1]) / np.sum(weights or [1, 1, 1])
    for (block, share), columns in zip(
        zip(vectors.values(), shares, strict=True), [slice(0, 3), slice(3, 4), slice(4, 10)], strict=True
    ):
        has = ~np.isnan(block).any(axis=1)
        centred = block[has].astype(np.float64) - block[has].astype(np.float64).mean(axis=0)
        expected = centred * np.sqrt(share) / np.linalg.norm(centred, axis=1).mean()
        np.testing.assert_allclose(joined[has, columns], expected, rtol=1e-4, atol=1e-5)
        assert not joined[~has, columns].any()  # the mean, after centring


def test_new_items_are_placed_by_the_old_means(tmp_path) -> None:
    generator = np.random.default_rng(0)
    old = {"image": generator.normal(3, size=(20, 4)), "(text)": generator.normal(size=(20, 2))}
    fitted = VectorBlocks.fit(old, [1, 3])
    fitted.save(tmp_path / "blocks")
    loaded = VectorBlocks.from_pretrained(tmp_path / "blocks")
    assert (loaded.weights, loaded.sha256) == ([0.25, 0.75], fitted.sha256)
    few = {name: block[5:7] for name, block in old.items()}
    np.testing.assert_array_equal(loaded.transform(few), fitted.transform(old)[5:7])
    few["image"] = np.full((2, 4), np.nan)
    assert not loaded.transform(few)[:, :4].any()
    changes = [
        fitted,
        VectorBlocks.fit(old, [1, 2]),
        VectorBlocks.fit({"image": old["image"] + 1, "(text)": old["(text)"]}, [1, 3]),
        VectorBlocks.fit({"x": old["image"], "(text)": old["(text)"]}, [1, 3]),
    ]
    assert all(one.sha256 != other.sha256 for one, other in combinations(changes, 2))
    (tmp_path / "blocks" / "blocks.json").write_text("{}")
    with pytest.raises(ArtefactError, match="holds no fitted blocks"):
        VectorBlocks.from_pretrained(tmp_path / "blocks")


def test_items_that_are_all_alike_become_zeros() -> None:
    vectors = {"a": np.full((5, 3), 0.1, dtype=np.float32), "b": np.ones((5, 1))}
    np.testing.assert_allclose(VectorBlocks.fit(vectors).transform(vectors), 0, atol=1e-6)
    one = {"a": np.ones((1, 3))}
    assert VectorBlocks.fit(one).transform(one).tolist() == [[0, 0, 0]]


def test_misuse_is_refused() -> None:
    vectors = {"a": np.ones((4, 2)), "b": np.ones((4, 3))}
    with pytest.raises(DataError, match="no vectors to join"):
        VectorBlocks.fit({})
    with pytest.raises(DataError, match=r"3 weight.* 2 block.* \(a, b\)"):
        VectorBlocks.fit(vectors, [1, 2, 3])
    for weights in ([1, -1], [0, 0], [1, np.inf], [1, np.nan]):
        with pytest.raises(DataError, match="are no shares"):
            VectorBlocks.fit(vectors, weights)
    with pytest.raises(DataError, match="different numbers of items"):
        VectorBlocks.fit({"a": np.ones((4, 2)), "b": np.ones((3, 2))})
    with pytest.raises(DataError, match="No item has a vector in 'b'"):
        VectorBlocks.fit({**vectors, "b": np.full((4, 3), np.nan)})
    fitted = VectorBlocks.fit(vectors)
    with pytest.raises(DataError, match="Blocks b, a are not the fitted a, b"):
        fitted.transform({"b": vectors["b"], "a": vectors["a"]})
    with pytest.raises(DataError, match="'b' have 2 numbers, those it was fitted on 3"):
        fitted.transform({"a": np.ones((4, 2)), "b": np.ones((4, 2))})
