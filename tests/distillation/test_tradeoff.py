"""Quality against cost: the front against its definition, and runs as they lie in folders."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import Seen
from small_teachers import language_recommender, sequence_recommender

from llmrec.distillation.measurement import size_of
from llmrec.distillation.tradeoff import find_trained, pareto, tradeoff
from llmrec.distillation.tradeoff_page import table_of, tradeoff_page
from llmrec.exceptions import DataError
from llmrec.recommender import Recommender
from llmrec.storage import write_json

numbers = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9)


@given(points=numbers)
def test_the_front_is_its_definition(points):
    front = pareto([good for good, _ in points], [dear for _, dear in points])
    for place, (good, dear) in enumerate(points):
        outdone = any(g >= good and d <= dear and (g > good or d < dear) for g, d in points)
        assert front[place] == (not outdone)
    assert front.any()


def save_run(folder, recommender, system, ndcg, split="ab" * 32, artefact="artefact", metrics=None, part="test"):
    """A finished run as the training scripts leave it."""
    recommender.save_pretrained(folder / artefact)
    document = {"system": system, "split": split, "part": part, "NDCG@10": ndcg}
    write_json(folder / "evaluation" / f"{system}.json", document | {"NDCG@10 interval95": [ndcg - 0.1, ndcg + 0.1]})
    write_json(folder / "metrics.json", {"system": system, "test": document, **(metrics or {})})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "large", language_recommender(layers=3), "llm", 0.4)
    save_run(folder / "plain", sequence_recommender(layers=2), "sasrec", 0.3, artefact="model")
    write_json(folder / "plain" / "model.checkpoints" / "llmrec.json", {})  # is no artefact
    named = {"artefacts": {"after": "artefact", "control": "artefact.control"}}
    save_run(folder / "small", sequence_recommender(layers=1), "sasrec", 0.2, metrics=named)
    save_run(
        folder / "small", sequence_recommender(layers=1, seed=1), "sasrec-control", 0.1, artefact="artefact.control"
    )
    write_json(folder / "small" / "metrics.json", {"system": "sasrec", **named})
    return folder


def test_runs_are_weighed_together(runs):
    told = []
    found = tradeoff(
        [runs / "large", runs / "plain", runs / "small"], 2, (1, 3), announce=lambda *one: told.append(one)
    )
    points = {point["name"]: point for point in found["points"]}
    assert list(points) == ["llm", "sasrec (plain)", "sasrec (small)", "sasrec-control"]
    assert [point["NDCG@10"] for point in points.values()] == [0.4, 0.3, 0.2, 0.1]
    assert points["llm"]["NDCG@10 interval95"] == pytest.approx([0.3, 0.5])
    model = Recommender.from_pretrained(runs / "large" / "artefact").model
    assert {name: points["llm"][name] for name in ("parameters", "bytes")} == size_of(model)
    assert (
        points["llm"]["file_bytes"]
        == sum(file.stat().st_size for file in (runs / "large" / "artefact").rglob("*") if file.is_file())
        - (runs / "large" / "artefact" / "sha256.json").stat().st_size
    )
    for cost in ("latency", "parameters"):
        taken = [
            point["parameters"] if cost == "parameters" else point["latency"]["1"]["median"]
            for point in points.values()
        ]
        front = pareto([0.4, 0.3, 0.2, 0.1], taken)
        assert [point["fronts"][cost] for point in points.values()] == front.tolist()
    assert points["llm"]["fronts"] == {"latency": True, "parameters": True}  # the best of all is always there
    assert points["sasrec-control"]["fronts"]["parameters"] is False  # the student is better and as small
    assert set(points["llm"]["latency"]) == {"1", "3"}
    assert (found["split"], found["part"], found["repetitions"]) == ("ab" * 32, "test", 2)
    assert found["machine"]["cores"]
    assert told[0] == ("loading llm", 0.0)
    json.dumps(found, allow_nan=False)
    page = Seen(tradeoff_page(found).render())
    assert page.tags.count("svg") == page.tags.count("table") == 1
    assert "sasrec-control" in page.texts
    header, rows = table_of(found)
    assert [len(row) for row in rows] == [len(header)] * 4
    assert rows[0][-1] == "latency and parameters"


def test_a_run_of_rl_names_its_system_in_what_came_after(runs, tmp_path):
    save_run(tmp_path / "rl", sequence_recommender(), "grpo", 0.5)
    write_json(tmp_path / "rl" / "metrics.json", {"before": {"system": "sft"}, "after": {"system": "grpo"}})
    write_json(tmp_path / "rl" / "evaluation" / "sft.json", {"system": "sft", "NDCG@10": 0.2})
    (found,) = find_trained([tmp_path / "rl"])
    assert (found.name, found.document["NDCG@10"]) == ("grpo", 0.5)


def test_folders_that_are_no_finished_runs_are_refused(runs, tmp_path):
    with pytest.raises(DataError, match="Give the folder of a finished run"):
        find_trained([tmp_path])
    save_run(tmp_path / "two", sequence_recommender(), "a", 0.1, artefact="one")
    sequence_recommender().save_pretrained(tmp_path / "two" / "other")
    with pytest.raises(DataError, match="holds 2 artefacts"):
        find_trained([tmp_path / "two"])
    save_run(tmp_path / "other", sequence_recommender(), "a", 0.1, split="cd" * 32)
    with pytest.raises(DataError, match="not belong in one plot"):
        find_trained([runs / "plain", tmp_path / "other"])
    save_run(tmp_path / "valid", sequence_recommender(), "a", 0.1, part="valid")
    with pytest.raises(DataError, match="evaluated on the part test"):
        find_trained([runs / "plain", tmp_path / "valid"])
    sample, path = tmp_path / "sample", runs / "plain" / "evaluation" / "sasrec.json"
    save_run(sample, sequence_recommender(), "a", 0.1)
    document = json.loads(path.read_text(encoding="utf-8"))
    write_json(sample / "evaluation" / "a.json", document | {"system": "a", "cases": 40})
    with pytest.raises(DataError, match="on None cases"):
        find_trained([runs / "plain", sample])
    (tmp_path / "other" / "evaluation" / "a.json").unlink()
    with pytest.raises(DataError, match="has no evaluation of a"):
        find_trained([tmp_path / "other"])
    write_json(tmp_path / "valid" / "evaluation" / "a.json", {"system": "a", "NDCG@5": 0.1})
    with pytest.raises(DataError, match="has no NDCG@10"):
        find_trained([tmp_path / "valid"])
    named = {"artefacts": {"after": "gone"}}
    save_run(tmp_path / "gone", sequence_recommender(), "a", 0.1, metrics=named)
    with pytest.raises(DataError, match="is no artefact"):
        find_trained([tmp_path / "gone"])
    with pytest.raises(DataError, match="No run was given"):
        tradeoff([])


def test_equal_points_share_the_front():
    assert pareto([1, 1, 0.5], [2, 2, 2]).tolist() == [True, True, False]
    assert pareto(np.array([1.0]), np.array([3.0])).tolist() == [True]
