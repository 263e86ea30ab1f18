"""The split that an artefact was trained on: found again from its log, over its own items and users."""

import numpy as np
import polars as pl
import pytest

from llmrec.artefact_parts import Settings
from llmrec.catalog import Catalog
from llmrec.data.arguments import SplitArguments
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.exceptions import DataError, RecipeError
from llmrec.trained_split import learnt_part, refuse_grown, trained_split


@pytest.fixture
def log():
    rng = np.random.default_rng(0)
    rows = [(f"u{user}", f"i{rng.integers(12)}", 100 * step + user) for user in range(30) for step in range(6)]
    return Interactions.from_frame(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"))


def catalog_of(count, base=None):
    made = Catalog.of_rows([{"item_id": f"i{row}", "title": "T"} for row in range(count)])
    made.base_items = count if base is None else base
    return made


def trained(log, count, **flags):
    """Settings of an artefact that was trained on so many items."""
    items = Items.from_frame(pl.DataFrame({"item_id": [f"i{row}" for row in range(count)]}))
    split = SplitArguments(**flags).make(log, items)
    return Settings(split=split.content_hash, protocol=dict(split.protocol)), split


@pytest.mark.parametrize("flags", [{}, {"split": "global-temporal"}, {"min_history": 5}], ids=str)
def test_it_is_made_as_the_artefact_says_or_as_is_asked(log, flags):
    settings, split = trained(log, 12, **flags)
    for asked in (None, SplitArguments(), SplitArguments(**flags)):
        assert trained_split(log, catalog_of(12), settings, asked).content_hash == split.content_hash
    with pytest.raises(DataError, match=r"may hold what is held out here\. Give the file .* trained on\.$"):
        trained_split(log, catalog_of(12), settings, SplitArguments(split="by-sample"))
    with pytest.raises(DataError, match="or say --any_split"):
        trained_split(log, catalog_of(12), settings, SplitArguments(split="by-sample"), False)
    other = trained_split(log, catalog_of(12), settings, SplitArguments(split="by-sample"), True)
    assert other.content_hash == trained(log, 12, split="by-sample")[0].split


def test_items_that_came_later_are_part_of_it_only_if_the_log_knows_them(log):
    settings, split = trained(log, 12)
    found = trained_split(log, catalog_of(15, base=12), settings)
    assert (found.num_items, found.content_hash) == (12, split.content_hash)
    more = pl.concat([log.frame, log.frame.head(1).with_columns(item_id=pl.lit("i13"))])
    with pytest.raises(DataError, match="may hold"):
        trained_split(Interactions.from_frame(more), catalog_of(15, base=12), settings)
    assert trained_split(Interactions.from_frame(more), catalog_of(15, base=12), settings, None, True).num_items == 15
    refuse_grown(catalog_of(12), "runs/a")
    with pytest.raises(RecipeError, match=r"catalog of runs/a has 3 item\(s\) that came after .* Roll it back"):
        refuse_grown(catalog_of(15, base=12), "runs/a")


def test_who_was_left_out_of_the_training_teaches_nothing(log):
    settings, split = trained(log, 12)
    assert learnt_part(split, settings) is split
    settings.training["data"] = {"train_share": 0.5, "train_share_seed": 3}
    part = learnt_part(split, settings)
    lengths = part.train_ends - part.offsets[:-1]
    assert (lengths > 0).sum() == 15
    assert set(lengths[lengths > 0]) == set(split.train_ends - split.offsets[:-1])
    assert part.targets("test").tolist() == split.targets("test").tolist()
    settings.training["data"]["train_share_seed"] = 4
    assert learnt_part(split, settings).train_ends.tolist() != part.train_ends.tolist()
