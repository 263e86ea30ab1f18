"""What the benchmarks of tokenizers compute themselves: intervals over seeds, hits, held-out items."""

import importlib.util
import json
import sys
from pathlib import Path

import polars as pl
import pytest
from scipy import stats

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        loaded = []
        for name in ("environment", "item_tokenizers", "cold_items"):
            spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
            loaded.append(module)
        yield loaded[1:]


def test_intervals_over_seeds_are_students(modules) -> None:
    tokenizers, _ = modules
    numbers = [0.031, 0.034, 0.040]
    found = tokenizers.over_seeds(numbers)
    low, high = stats.t.interval(0.95, 2, loc=sum(numbers) / 3, scale=stats.sem(numbers))
    assert found["interval95"] == pytest.approx([low, high])
    assert (found["seeds"], found["mean"]) == (3, pytest.approx(0.035))
    assert tokenizers.over_seeds([0.5]) == {"mean": 0.5, "sd": None, "interval95": None, "seeds": 1}


def test_results_of_other_options_are_refused(modules, tmp_path) -> None:
    tokenizers, _ = modules
    tokenizers.check_options(tmp_path / "run/options.json", {"epochs": 4})
    tokenizers.check_options(tmp_path / "run/options.json", {"epochs": 4})
    with pytest.raises(SystemExit, match="was made with"):
        tokenizers.check_options(tmp_path / "run/options.json", {"epochs": 8})
    assert json.loads((tmp_path / "run/options.json").read_text()) == {"epochs": 4}


def test_hits_by_hand(modules) -> None:
    _, cold = modules
    lists = [[5, 6, 7], [*range(20)], [1], []]
    found = cold.hits(lists, [6, 12, 9, 3], "here")
    assert found["HR@10 here"] == 0.25
    assert found["HR@50 here"] == 0.5
    assert found["NDCG@10 here"] == pytest.approx(1 / 1.5849625007211562 / 4)


def test_held_out_items_are_nowhere_but_among_the_new_and_the_targets(modules, tmp_path) -> None:
    _, cold = modules
    rows = [(f"u{user}", f"i{(user * 7 + step * 3) % 60}", step) for user in range(50) for step in range(5)]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    log.write_parquet(tmp_path / "log.parquet")
    items = pl.DataFrame({"item_id": [f"i{n}" for n in range(60)], "title": [f"T{n}" for n in range(60)]})
    items.write_parquet(tmp_path / "items.parquet")
    cases = cold.held_out(str(tmp_path / "items.parquet"), str(tmp_path / "log.parquet"), 0, tmp_path / "out")
    new = set(pl.read_parquet(tmp_path / "out/new_items.parquet")["item_id"])
    kept = set(pl.read_parquet(tmp_path / "out/items.parquet")["item_id"])
    left = pl.read_parquet(tmp_path / "out/interactions.parquet")
    assert len(new) == 3
    assert new | kept == set(items["item_id"])
    assert not new & kept
    assert not new & set(left["item_id"])
    assert len(left) == len(log.filter(~pl.col("item_id").is_in(list(new))))
    lasts = {user: (found[:-1], found[-1]) for user, found in _histories(log).items()}
    wanted = [
        ([item for item in history if item not in new], target) for history, target in lasts.values() if target in new
    ]
    assert sorted((case[:-1], case[-1]) for case in cases.values()) == sorted(wanted)


def _histories(log: pl.DataFrame) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for user, item, _ in log.sort("user_id", "timestamp").iter_rows():
        found.setdefault(user, []).append(item)
    return found
