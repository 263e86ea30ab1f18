import hashlib
import subprocess
import sys

import pytest

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import leave_one_out
from llmrec.data.sample import make_sample
from llmrec.evaluation.baselines import ItemCF, Popularity
from llmrec.evaluation.metrics import hit_rate, ranks_of
from llmrec.exceptions import DataError

DIGEST = """
import hashlib
from llmrec.data.sample import make_sample
print(hashlib.sha256("".join(frame.write_csv() for frame in make_sample(3, 200, 50)).encode()).hexdigest())
"""


def digest(seed):
    return hashlib.sha256("".join(frame.write_csv() for frame in make_sample(seed, 200, 50)).encode()).hexdigest()


def test_the_same_seed_makes_the_same_bytes_in_another_process_and_another_seed_does_not():
    environment = {"PYTHONHASHSEED": "12345"}
    printed = subprocess.run(
        [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == digest(3) != digest(4)


@pytest.fixture(scope="module")
def sample():
    return make_sample()


def test_its_shape(sample):
    interactions, items = sample
    assert interactions.columns == ["user_id", "item_id", "timestamp"]
    assert items.columns == [
        "item_id",
        "title",
        "brand",
        "category",
        "subcategory",
        "collection",
        "description",
        "price",
    ]
    assert items.height == items["title"].n_unique() == items["item_id"].n_unique() == 1000
    assert interactions["user_id"].n_unique() == 3000
    assert set(interactions["item_id"]) <= set(items["item_id"])
    lengths = interactions["user_id"].value_counts()["count"]
    assert 5 <= lengths.min() <= lengths.max() <= 40
    assert 11 <= lengths.mean() <= 13


def test_nobody_takes_an_item_twice_and_time_goes_on(sample):
    frame = Interactions.from_frame(sample[0]).frame
    assert not frame.select("user_id", "item_id").is_duplicated().any()
    same_user = (frame["user_id"] == frame["user_id"].shift()).fill_null(False)
    assert frame["timestamp"].diff().filter(same_user).min() > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_there_is_something_to_learn(seed):
    interactions, items = make_sample(seed)
    split = leave_one_out(Interactions.from_frame(interactions), Items.from_frame(items))
    rates = [
        hit_rate(
            ranks_of(
                model.fit(split.train, split.num_items).recommend(split.histories("test"), 10), split.targets("test")
            ),
            10,
        )
        for model in (Popularity(), ItemCF())
    ]
    assert 0.02 < rates[0] < 0.06
    assert 0.15 < rates[1] < 0.35


def test_other_sizes():
    for num_items in (100, 123, 999, 2500):
        interactions, items = make_sample(1, num_items, 20)
        assert items.height == items["title"].n_unique() == num_items
        assert set(interactions["item_id"]) <= set(items["item_id"])
        assert interactions["user_id"].n_unique() == 20
    with pytest.raises(DataError, match="99 items"):
        make_sample(0, 99)
    with pytest.raises(DataError, match="0 users"):
        make_sample(0, 100, 0)
