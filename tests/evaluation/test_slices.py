from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from llmrec.data.arguments import SplitArguments
from llmrec.data.distribution import thirds
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.evaluation.slices import slices_of

DAY = 86_400
BASE = 16_000 * DAY


def random_split(seed, name="leave-one-out", **columns):
    rng = np.random.default_rng(seed)
    rows = 600
    frame = pl.DataFrame(
        {
            "user_id": rng.integers(0, 60, rows).astype(str),
            "item_id": np.minimum(rng.zipf(1.5, rows), 40).astype(str),
            "timestamp": BASE + rng.integers(0, 20 * DAY, rows) // (DAY // 3) * (DAY // 3),
            "domain": rng.choice(["books", "toys"], rows),
            "action": rng.choice(["view", "buy", ""], rows),
        }
    ).select("user_id", "item_id", "timestamp", *columns)
    items = Items.from_frame(pl.DataFrame({"item_id": [str(n) for n in range(1, 46)]}))
    return SplitArguments(name).make(Interactions.from_frame(frame), items)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["leave-one-out", "global-temporal"])
def test_slices_equal_their_definition(seed, name):
    split = random_split(seed, name)
    counts = Counter(row for rows in split.train for row in rows.tolist())
    learnt = {user for user, rows in zip(split.all_users, split.train, strict=True) if len(rows)}
    groups = thirds(np.array([counts[row] for row in range(split.num_items)]))
    found = slices_of(split, "test")
    expected = {name: [] for name in ("head", "torso", "tail", "cold", "later_day")}

    def add(slice_name, case):
        expected.setdefault(slice_name, []).append(case)

    zipped = zip(split.users("test"), split.histories("test"), split.targets("test").tolist(), strict=True)
    for case, (user, history, target) in enumerate(zipped):
        if not counts[target]:
            add("cold", case)
        if user not in learnt:
            add("cold_user", case)
        if name == "global-temporal" and (not counts[target] or user not in learnt):
            continue
        if counts[target]:
            add(["head", "torso", "tail"][groups[target]], case)
        place = split.positions["test"][case]
        if len(history):
            later = split.timestamps[place] // DAY > split.timestamps[place - 1] // DAY
            add("later_day" if later else "not_later_day", case)
        lows = [low for low in (0, 1, 5, 10, 20, 50) if len(history) >= low]
        add(
            {0: "history_0", 1: "history_1_4", 5: "history_5_9", 10: "history_10_19"}.get(lows[-1], "history_20_49"),
            case,
        )
    assert {slice_name: np.flatnonzero(mask).tolist() for slice_name, mask in found.items()} == expected


def test_domains_and_actions_have_slices_of_their_own():
    split = random_split(1, domain=True, action=True)
    found = slices_of(split, "test")
    places = split.positions["test"]
    assert {n for n in found if "=" in n} == {"domain=books", "domain=toys", "action=view", "action=buy"}
    domains, actions = split.domains.to_list(), split.actions.to_list()
    for name in ("books", "toys"):
        assert found[f"domain={name}"].tolist() == [domains[place] == name for place in places]
    assert found["action=buy"].tolist() == [actions[place] == "buy" for place in places]


def test_without_times_there_is_no_later_day():
    interactions = Interactions.from_frame(pl.DataFrame({"user_id": ["a"] * 4, "item_id": list("wxyz")}))
    split = SplitArguments().make(interactions, Items.from_interactions(interactions))
    found = slices_of(split, "test")
    assert {name for name, mask in found.items() if mask.any()} == {"cold", "history_1_4"}
    assert set(found) == {"head", "torso", "tail", "cold", "history_1_4"}


@pytest.mark.parametrize("seed", range(4))
def test_a_history_that_holds_another_domain_has_a_slice(seed):
    split = random_split(seed, domain=True)
    rng = np.random.default_rng(seed)
    names = rng.choice(["a", "b", "c"], len(split.rows), p=[0.9, 0.07, 0.03]).tolist()
    names = [None if rng.random() < 0.1 else name for name in names]
    split = replace(split, domains=pl.Series(names, dtype=pl.String))
    expected = []
    for place, user in zip(split.positions["test"].tolist(), split.case_users("test").tolist(), strict=True):
        before = names[split.offsets[user] : place]
        expected.append(names[place] is not None and any(name not in (None, names[place]) for name in before))
    assert slices_of(split, "test")["other_domain"].tolist() == expected
    assert 0 < sum(expected) < len(expected)
    alone = replace(split, domains=pl.Series(["a"] * len(names)))
    assert "other_domain" not in slices_of(alone, "test")
