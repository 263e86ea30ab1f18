"""Ties and orders: closed forms against simulation and definition, and what shuffled logs must not be accused of."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from logs import DAY, START, logged, shop, split_of

from llmrec.data.order import (
    fixed_order,
    id_order,
    id_places,
    neighbours,
    order_sensitivity,
    same_day,
    tie_groups,
    ties,
)
from llmrec.data.split import Split


def random_split(seed: int, users: int = 30, items: int = 5) -> Split:
    generator = np.random.default_rng(seed)
    sequences, times = [], []
    for _ in range(users):
        length = int(generator.integers(1, 9))
        sequences.append(generator.integers(0, items, length).tolist())
        own = np.sort(generator.integers(0, 4, length)) * 40_000.0 + START
        times.append([None if generator.random() < 0.1 else float(t) for t in own])
    return split_of(sequences, times, num_items=items)


def groups_by_definition(split: Split) -> list[list[int]]:
    assert split.timestamps is not None
    found: list[list[int]] = []
    for user in range(len(split.all_users)):
        for place in range(split.offsets[user], split.offsets[user + 1]):
            time = split.timestamps[place]
            if place > split.offsets[user] and time == split.timestamps[place - 1]:
                found[-1].append(place)
            else:
                found.append([place])
    return found


@pytest.mark.parametrize("seed", range(5))
def test_tie_groups_and_shares_are_those_of_the_definition(seed: int) -> None:
    split = random_split(seed)
    assert split.timestamps is not None
    groups = groups_by_definition(split)
    assert tie_groups(split).tolist() == [number for number, group in enumerate(groups) for _ in group]
    found = ties(split)
    assert found is not None
    tied = {place for group in groups for place in group[1:]}
    later = [place for place in range(len(split.rows)) if place not in set(split.offsets[:-1].tolist())]
    assert found["tied_share"] == pytest.approx(len(tied) / len(later))
    test = split.positions["test"].tolist()
    assert found["tied_test_share"] == pytest.approx(np.mean([place in tied for place in test]))
    assert found["tied_valid_share"] == pytest.approx(np.mean([p in tied for p in split.positions["valid"].tolist()]))
    assert found["largest_group"] == max(map(len, groups))
    assert found["unknown_times"] == int(np.isnan(split.timestamps).sum()) > 0
    day = same_day(split)
    assert day is not None
    by_definition = [
        place in set(later) and split.timestamps[place] // DAY == split.timestamps[place - 1] // DAY
        for place in range(len(split.rows))
    ]
    assert day.tolist() == by_definition
    assert found["same_day_test_share"] == pytest.approx(np.mean([by_definition[place] for place in test]))


@pytest.mark.parametrize("seed", range(5))
def test_the_expected_share_of_changed_targets_is_exact(seed: int) -> None:
    """Against all orders of every group that holds a target."""
    split = random_split(seed)
    group_of = {place: group for group in groups_by_definition(split) for place in group}
    chances = []
    for place in split.positions["test"].tolist():
        group = group_of[place]
        orders = list(itertools.permutations([split.rows[p] for p in group]))
        chances.append(sum(order[group.index(place)] != split.rows[place] for order in orders) / len(orders))
    found = order_sensitivity(split, seed=1)
    assert found is not None
    assert found["expected_changed_share"] == pytest.approx(np.mean(chances))
    assert found["tied_cases"] == sum(chance > 0 for chance in chances)
    assert found["cases"] == len(chances)


def test_shuffles_measure_what_is_expected_and_follow_the_seed() -> None:
    split = random_split(7, users=4000)
    found = order_sensitivity(split, seed=3)
    assert found is not None
    deviation = math.sqrt(0.25 / found["cases"] / found["shuffles"])
    assert found["measured_changed_share"] == pytest.approx(found["expected_changed_share"], abs=4 * deviation)
    assert len(found["measured_changed_shares"]) == 5
    assert len(set(found["measured_changed_shares"])) > 1
    assert found == order_sensitivity(split, seed=3)
    assert found != order_sensitivity(split, seed=4)


def test_items_that_are_equal_do_not_count_as_change() -> None:
    times = [[START, START + 5.0, START + 5.0, START + 5.0]]
    same = order_sensitivity(split_of([[0, 1, 1, 1]], times))
    assert same is not None
    assert same["expected_changed_share"] == same["measured_changed_share"] == 0
    other = order_sensitivity(split_of([[0, 1, 2, 1]], times))
    assert other is not None
    assert other["expected_changed_share"] == pytest.approx(1 / 3)


def test_without_times_nothing_is_said_of_ties() -> None:
    split = split_of([[0, 1, 2], [2, 1, 0]])
    assert ties(split) is None
    assert order_sensitivity(split) is None
    assert fixed_order(split) is None
    assert same_day(split) is None
    assert tie_groups(split).tolist() == [0, 1, 2, 3, 4, 5]
    found = id_order(split)
    assert found["ties"] is None
    assert found["day"] is None
    # The first user's items appear for the first time, and what stands beside them says nothing.
    assert (found["untimed"]["pairs"], found["untimed"]["ascending_share"]) == (2, 0)
    assert id_order(split_of([[0, 1, 2], [3, 4, 5]]))["untimed"] is None
    seen = id_order(split_of([[0, 1, 2], [2, 1, 0], [0, 2, 1]]))
    assert (seen["untimed"]["pairs"], seen["untimed"]["ascending_share"]) == (4, 0.25)
    # Numbers that only order interactions are no days.
    counted = split_of([[0, 1, 2]], [[1.0, 2.0, 3.0]])
    assert same_day(counted) is None
    assert ties(counted)["resolution"] == "unknown"  # type: ignore[index]


@pytest.mark.parametrize(
    ("step", "resolution"), [(DAY, "day"), (3600, "hour"), (60, "minute"), (1, "second"), (0.25, "finer")]
)
def test_resolution_of_times(step: float, resolution: str) -> None:
    steps = [0, 1, 3, 4, 7, 9]
    for shift in (0, 5 * 3600):  # days of another time zone are days
        times = [[START + shift + step * k for k in steps]]
        assert ties(split_of([[0, 1, 2, 3, 4, 5]], times))["resolution"] == resolution  # type: ignore[index]


def test_ids_are_compared_as_numbers_and_as_strings() -> None:
    assert id_places(["9", "10", "100", "1"])["numbers"].tolist() == [1, 2, 3, 0]
    assert id_places(["9", "10", "100", "1"])["strings"].tolist() == [3, 1, 2, 0]
    assert id_places(["item-9", "item-10", "item-1"])["numbers"].tolist() == [1, 2, 0]
    assert id_places(["B2-10", "B2-9"])["numbers"].tolist() == [1, 0]
    assert id_places(["b1", "b10", "b12"])["numbers"].tolist() == [0, 1, 2]
    assert list(id_places(["only", "words"])) == ["strings"]
    assert id_places(["2" * 30, "1" * 31])["numbers"].tolist() == [0, 1]


def test_ids_of_other_forms_do_not_hide_the_order_of_numbers() -> None:
    assert id_places(["B9", "A10", "Z1", "A9"])["numbers"].tolist() == [2, 1, 3, 0]
    assert id_places(["10", "n/a", "9"])["numbers"].tolist() == [1, 2, 0]
    assert id_places(["100.html", "12.html", "9"])["numbers"].tolist() == [2, 1, 0]
    assert id_places(["a10b2", "a10b10", "a9b3"])["numbers"].tolist() == [1, 2, 0]
    generator = np.random.default_rng(4)
    drawn = [sorted(generator.choice(400, 4, replace=False).tolist()) for _ in range(300)]
    split = split_of([[0], *drawn], [[START - DAY], *([START] * 4 for _ in drawn)], num_items=400)
    split.item_ids[:] = ["unknown", *map(str, range(1, 400))]
    section = id_order(split)["ties"]
    assert section["compared"] == "numbers"
    assert section["ascending_share"] > 0.98


@pytest.mark.parametrize("timed", ["none", "order"])
@pytest.mark.parametrize("seed", range(4))
def test_ids_numbered_as_items_appear_ascend_by_themselves(seed: int, timed: str) -> None:
    generator = np.random.default_rng(seed)
    numbers: dict[int, int] = {}
    sequences = []
    for _ in range(200):
        drawn = generator.choice(800, 12, replace=False, p=np.arange(800, 0, -1) / 320_400).tolist()
        sequences.append([numbers.setdefault(item, len(numbers)) for item in drawn])
    times = None if timed == "none" else [[float(k) for k in range(12)] for _ in sequences]
    split = split_of(sequences, times)
    pairs = [(a, b) for own in sequences for a, b in itertools.pairwise(own)]
    assert np.mean([a < b for a, b in pairs]) > 0.55
    found = id_order(split)["untimed"]
    assert 50 < found["pairs"] < len(pairs)
    assert abs(found["ascending_share"] - 0.5) < 4 * 0.5 / math.sqrt(found["pairs"])


def test_neighbours_are_those_of_the_definition() -> None:
    times = [[START, START, START + 9.0, START + DAY, None, START + DAY], [START + DAY]]
    split = split_of([[0, 1, 2, 3, 4, 5], [0]], times)
    assert np.flatnonzero(neighbours(split, "ties")).tolist() == [1]  # type: ignore[arg-type]
    assert np.flatnonzero(neighbours(split, "day")).tolist() == [2]  # type: ignore[arg-type]
    assert neighbours(split, "untimed") is None
    counted = split_of([[0, 1, 2], [1, 2]], [[1.0, 1.0, 2.0], [3.0, 4.0]])
    assert np.flatnonzero(neighbours(counted, "ties")).tolist() == [1]  # type: ignore[arg-type]
    assert np.flatnonzero(neighbours(counted, "untimed")).tolist() == [2, 4]  # type: ignore[arg-type]
    assert neighbours(counted, "day") is None
    assert np.flatnonzero(neighbours(split_of([[0, 1], [1, 2]]), "untimed")).tolist() == [1, 3]  # type: ignore[arg-type]


def test_an_order_of_ids_as_strings_or_as_numbers_is_found() -> None:
    """Days of four of the items 0 to 119, sorted one way or the other."""
    generator = np.random.default_rng(4)
    drawn = [generator.choice(120, 4, replace=False).tolist() for _ in range(200)]
    times = [[START] * 4 for _ in drawn]
    for key, name in ((int, "numbers"), (str, "strings")):
        section = id_order(split_of([sorted(items, key=key) for items in drawn], times, num_items=120))["ties"]
        assert (section["compared"], section["ascending_share"]) == (name, 1)
        assert section["z"] > 5


@pytest.mark.parametrize("seed", range(4))
def test_ascending_share_is_that_of_the_definition(seed: int) -> None:
    split = random_split(seed)
    groups = groups_by_definition(split)
    signs = [
        split.rows[a] < split.rows[b]
        for g in groups
        for a, b in itertools.pairwise(g)
        if split.rows[a] != split.rows[b]
    ]
    found = id_order(split)["ties"]
    assert found["pairs"] == len(signs)
    assert found["ascending_share"] == pytest.approx(np.mean(signs))
    tied = {place for group in groups for place in group[1:]}
    day = same_day(split)
    assert day is not None
    others = [p for p in np.flatnonzero(day).tolist() if p not in tied and split.rows[p] != split.rows[p - 1]]
    section = id_order(split)["day"]
    assert section["pairs"] == len(others)
    assert section["ascending_share"] == pytest.approx(np.mean([split.rows[p - 1] < split.rows[p] for p in others]))


@pytest.mark.parametrize("seed", range(4))
def test_fixed_order_is_that_of_the_definition(seed: int) -> None:
    """Votes counted one by one; chance by listing all outcomes of the coins."""
    split = random_split(seed, users=60, items=6)
    seen: dict[tuple[int, int], dict[int, bool]] = defaultdict(dict)
    for group in groups_by_definition(split):
        for a, b in itertools.pairwise(group):
            first, second = int(split.rows[a]), int(split.rows[b])
            if first != second:
                key = (min(first, second), max(first, second))
                seen[key].setdefault(int(split.owner[b]), first < second)
    votes = [Counter(users.values()) for users in seen.values() if len(users) >= 2]
    total = sum(sum(vote.values()) for vote in votes)
    mean = variance = 0.0
    for vote in votes:
        number = sum(vote.values())
        agree = [max(sum(coins), number - sum(coins)) for coins in itertools.product((0, 1), repeat=number)]
        mean, variance = mean + float(np.mean(agree)), variance + float(np.var(agree))
    agreeing = sum(max(vote.values()) for vote in votes)
    found = fixed_order(split)
    assert found is not None
    assert (found["pairs"], found["votes"]) == (len(votes), total)
    assert found["agreeing_share"] == pytest.approx(agreeing / total)
    assert found["chance_share"] == pytest.approx(mean / total)
    assert found["agreement"] == pytest.approx((agreeing - mean) / (total - mean))
    assert found["z"] == pytest.approx((agreeing - mean) / math.sqrt(variance))


def test_in_shuffled_ties_the_deviations_are_those_of_chance() -> None:
    """Over many logs the z of both detectors have about mean 0 and deviation 1, so that 5 is far."""
    orders, ids = [], []
    for seed in range(25):
        split = logged(shop(seed, users=150, items=40, days=True))[2]
        fixed = fixed_order(split)
        assert fixed is not None
        orders.append(fixed["z"])
        ids.append(id_order(split, seed)["ties"]["z"])
    for values in (orders, ids):
        assert abs(np.mean(values)) < 0.8
        assert 0.6 < np.std(values) < 1.6
        assert np.abs(values).max() < 4.5


def test_correlation_of_ids_with_use() -> None:
    generator = np.random.default_rng(2)
    sequences = [generator.choice(20, size=8, p=np.arange(20, 0, -1) / 210).tolist() for _ in range(400)]
    times = [[START + 100.0 * k for k in range(8)] for _ in sequences]
    found = id_order(split_of(sequences, times))
    assert found["with_popularity"] < -0.95
    ordered = split_of(
        [[k % 20 for k in range(u, u + 3)] for u in range(18)],
        [[START + 50.0 * u + k for k in range(3)] for u in range(18)],
    )
    assert id_order(ordered)["with_first_time"] == pytest.approx(1)
    assert id_order(split_of([[0, 1, 0]]))["with_popularity"] is None


def test_beauty_is_found_out_and_movielens_100k_is_not_accused(shared_data: object) -> None:
    from pathlib import Path

    import polars as pl

    from llmrec.data.interactions import Interactions
    from llmrec.data.items import Items
    from llmrec.data.protocols import leave_one_out

    folder = Path(str(shared_data))
    beauty = Interactions.read(folder / "amazon-beauty" / "interactions.csv.gz")
    split = leave_one_out(beauty, Items.from_interactions(beauty))
    found = fixed_order(split)
    assert found is not None
    assert found["agreeing_share"] == 1
    assert found["z"] > 100
    assert abs(id_order(split)["ties"]["ascending_share"] - 0.5) < 0.01  # the ids are shuffled
    raw = pl.read_csv(folder / "movielens-100k" / "ml-100k.inter", separator="\t")
    films = Interactions.from_frame(raw.rename({name: name.split(":")[0] for name in raw.columns}))
    clean = fixed_order(leave_one_out(films, Items.from_interactions(films)))
    assert clean is not None
    assert clean["agreement"] < 0.05
    assert clean["z"] < 4
