"""benchmarks/reasoning.py: what its card says of two seeds, by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("reasoning_benchmark", BENCHMARKS / "reasoning.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def told(first, oracle, over_thinking):
    """A report of `llmrec reasoning` of one step."""
    return {
        "by_step": [{"NDCG@10": first, "HR@10": 2 * first}, {"NDCG@10": 0.2, "HR@10": 0.4}],
        "oracle": {"NDCG@10": oracle, "HR@10": 0.5},
        "slices": {
            "all": {"NDCG@10": [first, 0.2], "over_thinking": over_thinking, "sentence": "Over-thinking over all."},
            "tail items": {"NDCG@10": [0.0, 0.5], "over_thinking": None, "sentence": "None."},
        },
        "latency": {
            "device": "cpu",
            "batches": [{"histories": 1, "milliseconds": [1.0, 1.5], "ratio": [1.0, 1.52]}, {"histories": 64}],
        },
    }


def test_the_card_has_means_over_seeds_and_what_a_step_costs(benchmark, tmp_path):
    runs = []
    for seed, (first, oracle, over) in enumerate([(0.1, 0.3, None), (0.3, 0.5, {"step": 0})]):
        folder = tmp_path / f"erl-1-{seed}"
        folder.mkdir()
        (folder / "metrics.json").write_text("{}")
        (folder / "reasoning.json").write_text(json.dumps(told(first, oracle, over)))
        runs.append({"cell": "erl-1", "folder": folder.name, "seed": seed})
    found = benchmark.thought("erl-1", {"runs": [*runs, {"cell": "none", "folder": "none"}]}, tmp_path, tmp_path)
    assert found["seeds"] == 2
    assert found["by_step"] == [{"NDCG@10": pytest.approx(0.2), "HR@10": pytest.approx(0.4)}] * 2
    text = benchmark.card("data", {"steps": {"erl": found}}, "# Title\n\nA note.\n\n| the study's table |\n")
    assert text.startswith("# Latent reasoning: data\n\nA note.\n")
    assert "| erl-1 | step 0 | 0.2000 | 0.4000 | 1.00 | 1.00 |" in text
    assert "| erl-1 | step 1 | 0.2000 | 0.4000 | 1.50 | 1.52 |" in text
    assert "| erl-1 | each case's best step | 0.4000 | 0.5000 | – | – |" in text
    assert "- erl-1, seed 1: Over-thinking over all." in text
    assert "No over-thinking" not in text
    assert "- erl-1, tail items: 0.0000, 0.5000" in text
    assert "Means over 2 seed(s)" in text


def test_without_over_thinking_the_card_says_so(benchmark, tmp_path):
    folder = tmp_path / "prl-1"
    folder.mkdir()
    (folder / "metrics.json").write_text("{}")
    (folder / "reasoning.json").write_text(json.dumps(told(0.1, 0.3, None)))
    study = {"runs": [{"cell": "prl-1", "folder": "prl-1", "seed": 0}]}
    found = benchmark.thought("prl-1", study, tmp_path, tmp_path)
    assert "No over-thinking can be told in any slice." in benchmark.card("d", {"steps": {"prl": found}}, "")


def test_a_part_of_the_whole_has_a_file_of_its_own(benchmark):
    kinds, datasets = benchmark.KINDS, benchmark.DATASETS
    assert benchmark.result_name("reasoning", (list(kinds), kinds), (list(datasets), datasets)) == "reasoning"
    assert benchmark.result_name("reasoning", (["erl"], kinds), (datasets, datasets)) == "reasoning_erl"
    both = benchmark.result_name("reasoning", (["erl", "prl"], kinds), (["amazon-beauty"], datasets))
    assert both == "reasoning_erl_prl_amazon-beauty"
