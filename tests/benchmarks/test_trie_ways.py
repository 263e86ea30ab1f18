"""The benchmark's four ways answer alike, and its numbers are what their names say."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def benchmark(checkout: Path):
    """benchmarks/trie.py as a module."""
    sys.path.insert(0, str(checkout / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("trie_benchmark", checkout / "benchmarks" / "trie.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@pytest.mark.parametrize("size", [1, 2, 700])
@pytest.mark.parametrize("name", ["trie", "dict", "compare", "static"])
def test_ways_are_brute_force(benchmark, size, name):
    rng = np.random.default_rng(size)
    # Few codes, so that prefixes are shared, and the codebook's ends.
    codes = np.unique(rng.choice([0, 1, 2, 3, 128, 254, 255], size=(size, 4)), axis=0).astype(np.int32)
    codes = rng.permutation(codes)
    way = benchmark.WAYS[name](codes)
    for depth in range(4):
        asked = [rng.choice([0, 1, 4, 255], size=(40, depth)), codes[rng.integers(0, len(codes), 40), :depth]]
        prefixes = np.concatenate(asked).astype(np.int32)
        expected = np.zeros((80, 256), dtype=bool)
        for row, prefix in enumerate(prefixes):
            expected[row, codes[(codes[:, :depth] == prefix).all(axis=1), depth]] = True
        assert np.array_equal(way.mask(prefixes), expected)


def test_batches_are_mostly_of_the_catalog(benchmark):
    codes = np.arange(400).reshape(100, 4)
    known = set(map(tuple, codes[:, :3].tolist()))
    for prefixes in benchmark.batches(codes, 3):
        assert prefixes.shape == (benchmark.BATCH, 3)
        assert np.mean([tuple(prefix) in known for prefix in prefixes.tolist()]) == pytest.approx(0.75, abs=0.01)


def test_the_whole_run_writes_its_ratios(checkout: Path, tmp_path: Path):
    command = [sys.executable, str(checkout / "benchmarks" / "trie.py"), "--quick", "--sizes", "300", "3000"]
    command += ["--json", str(tmp_path / "out.json")]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["sizes"] == [300, 3000]
    for size in ("300", "3000"):
        trie = written["measured"][size]["trie"]
        assert trie["bytes"] <= 3 * trie["codes_bytes"] + 20
        assert trie["codes_bytes"] == 16 * int(size)
        assert len(trie["milliseconds"]["nodes, numpy"]) == len(trie["milliseconds"]["allowed, torch"]) == 4
        assert f"static over trie at {size}, mask" in written["ratios"]
    assert "nodes, numpy: 3000 over 300 items" in written["ratios"]
    assert {"machine", "versions", "commit"} <= written.keys()
