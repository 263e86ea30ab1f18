"""The benchmark's five ways find the same scores, and each figure is what its name says."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def benchmark(checkout: Path):
    """benchmarks/selection.py as a module, with small catalogs: some levels have one child per node, as great ones."""
    sys.path.insert(0, str(checkout / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("selection_benchmark", checkout / "benchmarks" / "selection.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    module.CATALOGS = {"few": (300, 3, 8), "long": (500, 32, 4), "wide": (2000, 2, 4096)}
    return module


@pytest.mark.parametrize("name", ["few", "long", "wide"])
def test_ways_agree(benchmark, name):
    found = benchmark.measure(name, "cpu", 1)
    assert found["agree"] == dict.fromkeys(("ragged", "padded", "static", "dense", "searchsorted"), True)
    assert found["bytes"].keys() == found["milliseconds_per_level"].keys() == found["agree"].keys()
    assert min(found["bytes"].values()) > 0


def test_a_way_that_finds_other_scores_is_told(benchmark, monkeypatch):
    wrong = benchmark.Dense.advance

    def shifted(self, level, logits, score, node, width):
        return wrong(self, level, logits, score + 0.01 * level, node, width)

    monkeypatch.setattr(benchmark.Dense, "advance", shifted)
    agree = benchmark.measure("few", "cpu", 1)["agree"]
    assert not agree.pop("dense")
    assert all(agree.values())


def test_the_drawn_trie_is_a_trie(benchmark):
    for items, levels, size in ((300, 3, 8), (500, 32, 4)):
        trie = benchmark.RandomTrie(items, levels, size, 1, "cpu")
        assert trie.num_leaves == len(trie.token[-1]) == len(trie.item_of_leaf)
        above = 1
        for level, (start, code) in enumerate(zip(trie.start, trie.code, strict=True)):
            assert len(start) == above + 1
            assert (start[0], start[-1]) == (0, len(code))
            assert trie.fan_out[level] == int(start.diff().max())
            keys = trie.prefix_keys(level)
            assert (keys.diff() > 0).all()  # siblings ascend and differ
            assert torch.equal(trie.token[level], code + 1 + level * size)
            above = len(code)
        assert np.isin(trie.code[0].numpy(), np.arange(size)).all()


@pytest.mark.slow
def test_gpu_check_says_that_there_is_no_gpu(checkout):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, str(checkout / "benchmarks" / "gpu_check.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "There is no GPU" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_gpu_check_holds(checkout, tmp_path):
    command = [
        sys.executable,
        str(checkout / "benchmarks" / "gpu_check.py"),
        "--quick",
        "--json",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "out").read_text())["held"]
