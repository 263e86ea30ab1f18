"""A study's means, table and page."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from llmrec.study import report, results
from llmrec.study.place import RunPlace
from llmrec.study.plan import StudyPlan


def finished(place, **test):
    place.folder.mkdir(parents=True)
    place.note(20.0)
    metrics = {
        "split": "ab" * 32,
        "validation": [
            {"epoch": float(epoch), "step": 5.0 * epoch, "eval_NDCG@10": 0.02 * epoch, "eval_runtime": 1.0}
            for epoch in (1, 2)
        ],
        "test": {"cases": 9, "slices": {}, "coverage@10": 1.0, "HR@10 interval95": [0, 1]} | test,
        "training": {"system": "x", "trainer": dict(place.run.flags)},
        "cost": {"parameters": 1_250_000, "device": "cpu"},
        "versions": {"llmrec": "1"},
    }
    (place.folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def study(tmp_path):
    """Two variants by three depths by three seeds; one run has failed, one is not done, the others are."""
    plan = StudyPlan(
        "What | of <depth>",
        {"lr": 0.1},
        {"hstu": {}, "sasrec_x": {"lr": 0.2}},
        {"layers": [2, 4, 16]},
        [0, 1, 2],
        ["NDCG@10", "HR@10"],
        "A note.",
        {"hstu": {"NDCG@10": 0.172}, "hstu-layers=4": {"NDCG@10": 0.18}},
    )
    places = [RunPlace(tmp_path, run) for run in plan.runs]
    for place in places:
        depth, seed = place.run.axes["layers"], place.run.seed
        if (place.run.variant, depth, seed) == ("sasrec_x", 16, 2):
            continue
        if (place.run.variant, depth, seed) == ("sasrec_x", 16, 1):
            place.folder.mkdir()
            place.note(failed={"code": 1, "why": "it ended with code 1", "lines": []})
            continue
        finished(place, **{"NDCG@10": 0.1 + 0.01 * depth + 0.002 * seed, "HR@10": 0.3 + 0.1 * seed**2})
    return plan, places


def test_the_document_has_every_run(study, tmp_path):
    plan, places = study
    document = results.collect(plan, places)
    results.save(document, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == document
    assert [run["state"] for run in document["runs"]].count("done") == 16
    first = document["runs"][0]
    assert first["test"] == {"NDCG@10": pytest.approx(0.12), "HR@10": 0.3, "HR@10 interval95": [0, 1]}
    assert first["validation"][0] == {"epoch": 1.0, "step": 5.0, "eval_NDCG@10": 0.02}
    assert (first["parameters"], first["seconds"], first["device"]) == (1_250_000, 20.0, "cpu")
    assert document["splits"] == ["ab" * 32]


def test_means_are_over_seeds_with_student_s_interval(study):
    cells = {cell.name: cell for cell in results.cells_of(results.collect(*study))}
    values = [0.3, 0.4, 0.7]
    mean = cells["hstu-layers=2"].means["HR@10"]
    half = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (mean.value, mean.low, mean.high, mean.seeds) == (
        pytest.approx(np.mean(values)),
        *map(pytest.approx, half),
        3,
    )
    one = cells["sasrec_x-layers=16"].means["HR@10"]
    assert (one.value, one.low, one.high, one.seeds) == (pytest.approx(0.3), None, None, 1)
    assert cells["hstu-layers=4"].published == {"NDCG@10": 0.18}
    assert cells["hstu-layers=2"].published == {"NDCG@10": 0.172}


def test_the_table_has_a_row_for_each_cell(study):
    header, rows = report.table(results.collect(*study))
    assert header == ["variant", "layers", "seeds", "NDCG@10", "HR@10", "NDCG@10 published", "parameters", "time"]
    half = stats.t.ppf(0.975, 2) * 0.002 / 3**0.5
    assert rows[0] == ["hstu", "2", "3", f"0.1220 ± {half:.4f}", "0.4667 ± 0.5171", "0.1720", "1.25 M", "20 s"]
    assert rows[5] == ["sasrec_x", "16", "1 of 3", "0.2600", "0.3000", "–", "1.25 M", "20 s"]
    assert len(rows) == 6


def test_markdown_is_escaped_and_says_what_is_missing(study):
    text = report.markdown(results.collect(*study))
    assert text.startswith("# What \\| of \\<depth>\n")
    assert "| sasrec\\_x | 16 | 1 of 3 |" in text
    assert "16 of 18 runs are done, in 5.33 min." in text
    assert "sasrec\\_x-layers=16, seed 1 failed: it ended with code 1" in text
    assert "Fewer than three seeds have no interval" in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {9}


@pytest.mark.parametrize("curve", ["layers", None], ids=["curves", "dots"])
def test_the_page_has_a_plot_and_the_same_figures_as_a_table(study, tmp_path, curve):
    plan, places = study
    document = results.collect(plan, places)
    report.write(document, tmp_path, curve)
    text = (tmp_path / "study.html").read_text()
    assert (tmp_path / "table.md").read_text() == report.markdown(document)
    assert "<title>What | of &lt;depth&gt;</title>" in text
    _, rows = report.table(document)
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text)
    assert cells == [cell for row in rows for cell in row]
    captions = re.findall(r"<figcaption>([^<]*)</figcaption>", text)
    assert len(captions) == 2
    if curve:
        assert "hstu is best at layers 16 (0.2620); sasrec_x is best at layers 16 (0.2600)" in captions[0]
    else:
        assert captions[0] == "Best is hstu-layers=16 with 0.2620. A cross is what was published."
    assert "sasrec_x-layers=4 0.0400" in captions[1]
    assert text.count("failed: it ended with code 1") == 1


def test_a_study_of_which_nothing_is_done_has_a_page(tmp_path):
    plan = StudyPlan("t", {}, {"a": {}}, seeds=[0])
    document = results.collect(plan, [RunPlace(tmp_path, run) for run in plan.runs])
    report.write(document, tmp_path, plan.curve)
    assert "0 of 1 runs are done" in (tmp_path / "study.html").read_text()
    assert "<svg" not in (tmp_path / "study.html").read_text()


def test_runs_of_several_splits_are_said_to_be(study):
    document = results.collect(*study)
    document["splits"] = ["a" * 64, "b" * 64]
    assert "The runs are of 2 splits" in report.markdown(document)
    assert "Warning" in report.page(document).render()


@pytest.mark.parametrize(
    ("metric", "stands"),
    [("HR@5", "HR@10"), ("later_day HR@10", "HR@10"), ("tail NDCG@100", "NDCG@50"), ("head MRR@20", "NDCG@10")],
)
def test_the_course_is_of_the_measure_that_validation_knows(metric, stands):
    assert report._validated(metric) == stands
