import gzip
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from llmrec.evaluation.identifiers import Identifiers
from llmrec.exceptions import DataError


def run(checkout: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(checkout / "benchmarks" / "inflation.py"), "--quick", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)


def test_without_data_it_says_so_and_ends_well(checkout: Path, tmp_path: Path) -> None:
    result = run(checkout, "--data", str(tmp_path / "absent"), "--json", str(tmp_path / "out.json"))
    assert result.returncode == 0, result.stderr
    assert "skipped: No published semantic IDs below absent/" in result.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["ratios"] == {}
    assert {"machine", "versions"} <= written.keys()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty items in two cliques; one table gives every item an ID of its own, one gives each clique one ID."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        clique = user % 2
        rows += [(f"u{user}", f"i{10 * clique + item}") for item in rng.permutation(10)[:6]]
    folder = tmp_path / "data" / "toy"
    tables = folder / "published_semantic_ids"
    tables.mkdir(parents=True)
    pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row").write_csv(folder / "interactions.csv")
    pl.DataFrame({"item_id": [f"i{item}" for item in range(20)], "title": ["a"] * 20}).write_csv(folder / "items.csv")
    unique = {f"i{item}": [f"<a_{item}>", "<b_0>"] for item in range(20)}
    cliques = {f"i{item}": [f"<a_{item // 10}>", "<b_0>"] for item in range(20)}
    for name, codes in (("unique", unique), ("cliques", cliques)):
        (tables / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(codes).encode()))
    return folder.parent


def test_unique_ids_are_not_inflated_and_cliques_are_by_their_size(checkout: Path, data: Path, tmp_path: Path) -> None:
    result = run(checkout, "--data", str(data), "--json", str(tmp_path / "out.json"))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    study = written["datasets"]["toy"]["tables"]
    assert study["unique"]["beyond_unique_share"] == 0.0
    assert study["cliques"]["beyond_unique_share"] == pytest.approx(0.9)
    for read in study["unique"]["rankings"].values():
        assert read["HR@10 ratio"] == read["NDCG@10 ratio"] == 1.0
    summed = study["cliques"]["rankings"]["item-cf, sums"]
    # Every user stays in a clique of ten, of which five are in the history: a random one of five places.
    assert summed["NDCG@10 (ID level)"] == 1.0
    gain = np.mean([1 / np.log2(place + 2) for place in range(5)])
    assert summed["NDCG@10"] == pytest.approx(gain)
    key = "toy cliques item-cf, sums NDCG@10 (ID level / item level)"
    assert written["ratios"][key] == pytest.approx(1 / gain, abs=1e-4)
    assert "cliques" in result.stdout


@pytest.fixture
def script(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The script as a module, so that its functions can be called."""
    monkeypatch.syspath_prepend(str(checkout / "benchmarks"))
    return importlib.import_module("inflation")


def test_a_table_is_read_in_the_order_of_the_catalog(script: types.ModuleType, data: Path) -> None:
    path = data / "toy" / "published_semantic_ids" / "cliques.json.gz"
    assert script.read_table(path, ["i3", "i12", "i4", "i11"]).groups.tolist() == [0, 1, 0, 1]
    path.write_bytes(gzip.compress(b'{"i0": ["<a_0>"]}'))
    with pytest.raises(DataError, match="has no code for 2 items, such as 'i1'"):
        script.read_table(path, ["i0", "i1", "i2"])


def test_lists_are_made_long_enough_for_ten_ids(script: types.ModuleType) -> None:
    class InOrder:
        def recommend(self, histories: list[np.ndarray], k: int) -> list[np.ndarray]:
            return [np.arange(k) for _ in histories]

    ids = [Identifiers.from_groups(np.arange(2000) // size) for size in (1, 30)]
    (row,) = script.deep_enough(InOrder(), [np.array([0])], ids, 2000)
    assert len(np.unique(ids[1].groups[row])) >= 10
    (row,) = script.deep_enough(InOrder(), [np.array([0])], ids[:1], 2000)
    assert len(row) < 100
    few = Identifiers.from_groups(np.arange(2000) % 3)
    assert len(script.deep_enough(InOrder(), [np.array([0])], [few], 2000)[0]) >= 2000


def test_summed_scores_in_batches_are_those_of_all_at_once(
    script: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    monkeypatch.setattr(script, "BATCH", 7)
    table = rng.integers(0, 4, size=(30, 30)).astype(float)
    histories = [rng.choice(30, size=3, replace=False) for _ in range(40)]
    targets, counts = rng.integers(0, 30, size=40), rng.integers(0, 9, size=30)
    one, other = Identifiers.from_groups(rng.integers(0, 12, 30)), Identifiers.from_groups(rng.integers(0, 20, 30))

    def score(batch: list[np.ndarray]) -> np.ndarray:
        return np.stack([table[history].sum(axis=0) for history in batch])

    readings = {"a": (one, "expected"), "b": (other, "popularity")}
    found = script.sums(types.SimpleNamespace(scores=score), histories, targets, readings, counts)
    for key, (ids, rule) in readings.items():
        whole = ids.rank_scores(score, histories, targets, "sum", rule, counts)
        for level in ("items", "ids"):
            assert getattr(found[key], level).better.tolist() == getattr(whole, level).better.tolist()
            assert getattr(found[key], level).ties.tolist() == getattr(whole, level).ties.tolist()
