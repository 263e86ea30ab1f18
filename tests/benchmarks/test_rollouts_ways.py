"""The benchmark's ways propose whole groups for the same prompts, and its shares are what their names say."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from llmrec.catalog import Catalog


@pytest.fixture(scope="module")
def benchmark(checkout: Path):
    """benchmarks/rollouts.py as a module."""
    sys.path.insert(0, str(checkout / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("rollouts_benchmark", checkout / "benchmarks" / "rollouts.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def test_shares_of_invalid_and_repeated_proposals(benchmark):
    items = [{"item_id": name} for name in "abc"]
    catalog = Catalog(items, np.array([[0, 0], [0, 1], [1, 0]]), [2, 2], retired=np.array([False, False, True]))
    catalog = catalog.with_tokens([np.array([5, 6]), np.array([7, 8])])
    proposed = [[5, 7], [5, 7], [5, 8], [6, 8], [5, 8], [6, 7], [6, 7], [5]]
    found = benchmark.shares(proposed, 4, catalog)
    # An item in two groups is none twice; a retired one, an unknown one and half of one are no items.
    assert found == {"invalid": 4 / 8, "duplicate": 2 / 8, "fresh": 3 / 8}


def test_trl_generates_whole_groups_of_as_many_tokens_as_items_have(benchmark, tmp_path):
    recommender = benchmark.small_recommender(1, "cpu")
    cases = benchmark.cases_of(recommender, 3, 6)
    assert len(cases) == 3
    assert all(
        cases.prompts[place] == recommender.encoder.encode(cases.histories[place].tolist()) for place in range(3)
    )
    proposed = benchmark.trl_generation(recommender, cases, 4, str(tmp_path))()
    assert len(proposed) == 12
    assert max(map(len, proposed)) == recommender.catalog.num_levels
    assert len({tuple(tokens) for tokens in proposed[:4]}) > 1
