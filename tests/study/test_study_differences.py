"""What a study's variants changed against its reference: by its definition, and what cannot be paired."""

import json
import math

import numpy as np
import pytest

from llmrec.evaluation.evaluation import Evaluation
from llmrec.evaluation.ranks import Ranks
from llmrec.evaluation.uncertainty import holm, paired_difference
from llmrec.exceptions import RecipeError
from llmrec.study import report, results
from llmrec.study.differences import _resamples, differences
from llmrec.study.place import RunPlace
from llmrec.study.plan import StudyPlan

CASES = 60
COUNTED = np.arange(CASES) % 7 != 0
TAIL = COUNTED & (np.arange(CASES) % 3 == 0)
USERS = [f"u{case // 2}" for case in range(CASES)]


def finished(place, places_of_targets, split="s", exclude_seen=True, users=USERS):
    """A run that is done, with the evaluation of its test."""
    evaluation = Evaluation(
        place.run.cell,
        list(users),
        [f"i{case}" for case in range(CASES)],
        Ranks(np.asarray(places_of_targets), np.zeros(CASES, int)),
        COUNTED,
        {"tail": TAIL, "cold": np.zeros(CASES, bool)},
        (5, 10),
        {"split": split, "protocol": {}, "part": "test", "items": 99, "exclude_seen": exclude_seen},
    )
    place.folder.mkdir(parents=True, exist_ok=True)
    place.note(10.0)
    evaluation.save(place.folder)
    metrics = {
        "split": split,
        "validation": [],
        "test": {"cases": int(COUNTED.sum()), "slices": {}, "NDCG@10": 0.5, "HR@5": 0.5},
        "training": {},
        "cost": {"parameters": 10, "device": "cpu"},
        "versions": {},
    }
    (place.folder / "metrics.json").write_text(json.dumps(metrics))


def planned(tmp_path, metrics=("NDCG@10", "tail HR@5"), seeds=(0, 1, 2), axes=None, reference="none"):
    variants = {"one": {"x": 1}, "none": {}, "two": {"x": 2}}
    plan = StudyPlan("t", {}, variants, axes or {}, seeds, metrics, reference=reference)
    return plan, [RunPlace(tmp_path, run) for run in plan.runs]


def gain(metric, place):
    if place < 0 or place >= int(metric.split("@")[1]):
        return 0.0
    return 1.0 if metric.startswith("HR") else 1 / math.log2(place + 2)


def test_every_number_equals_its_definition(tmp_path):
    plan, places = planned(tmp_path)
    rng = np.random.default_rng(3)
    drawn = {(place.run.cell, place.run.seed): rng.integers(-1, 15, CASES).tolist() for place in places}
    for place in places:
        finished(place, drawn[place.run.cell, place.run.seed])
    found = differences(plan, places)
    assert list(found["cells"]) == ["one", "two"]
    assert found["tests"] == 4
    assert not found["left_out"]
    p_values = []
    for cell, one in found["cells"].items():
        assert (one["against"], one["seeds"], one["users"]) == ("none", [0, 1, 2], len(set(np.array(USERS)[COUNTED])))
        for name, mask in (("NDCG@10", COUNTED), ("tail HR@5", TAIL)):
            metric, row = name.split()[-1], one["metrics"][name]
            chosen = np.flatnonzero(mask)
            by_case = [
                [[gain(metric, drawn[system, seed][case]) for case in chosen] for seed in range(3)]
                for system in ("none", cell)
            ]
            before, after = np.mean(by_case, axis=1)
            gap = paired_difference(
                after[:, None], before[:, None], np.arange(CASES)[mask] // 2, found["resamples"], 0
            )
            assert row["cases"] == len(chosen)
            assert row["before"] == pytest.approx(before.mean())
            assert row["after"] == pytest.approx(after.mean())
            assert row["difference"] == pytest.approx(after.mean() - before.mean())
            assert row["difference interval95"] == pytest.approx([gap.low[0], gap.high[0]])
            seeds = [np.mean(by_case[1][seed]) - np.mean(by_case[0][seed]) for seed in range(3)]
            assert row["by_seed"] == pytest.approx(seeds)
            assert row["sd_over_seeds"] == pytest.approx(np.std(seeds, ddof=1))
            assert row["p_value"] == gap.p_value[0]
            p_values.append(gap.p_value[0])
    corrected = [row["p_holm"] for one in found["cells"].values() for row in one["metrics"].values()]
    assert corrected == pytest.approx(holm(p_values).tolist())
    assert json.loads(json.dumps(found)) == found


def test_a_cell_is_compared_with_the_reference_at_the_same_axes_and_seeds(tmp_path):
    plan, places = planned(tmp_path, axes={"depth": [2, 4]}, seeds=(0, 1))
    good, bad = np.zeros(CASES, int), np.full(CASES, -1)
    for place in places:
        run = place.run
        if (run.variant, run.axes["depth"], run.seed) in {("none", 4, 1), ("two", 2, 0), ("two", 2, 1)}:
            continue
        # At depth 2 the reference is right and at 4 wrong; the others the other way round.
        finished(place, good if (run.variant == "none") == (run.axes["depth"] == 2) else bad)
    found = differences(plan, places)["cells"]
    assert {name: (one["against"], one["seeds"]) for name, one in found.items()} == {
        "one-depth=2": ("none-depth=2", [0, 1]),
        "one-depth=4": ("none-depth=4", [0]),
        "two-depth=4": ("none-depth=4", [0]),
    }
    assert [one["metrics"]["NDCG@10"]["difference"] for one in found.values()] == [-1.0, 1.0, 1.0]
    assert found["one-depth=4"]["metrics"]["NDCG@10"]["sd_over_seeds"] is None
    header, rows = report.difference_table(differences(plan, places))
    assert header == ["variant", "against", "seeds", "NDCG@10", "tail HR@5"]
    assert len(rows) == 3
    assert rows[0][:4] == ["one-depth=2", "none-depth=2", "2", "-1.0000 [-1.0000, -1.0000], sd 0.0000, p 0.001 †"]


@pytest.mark.parametrize(
    "other",
    [{"split": "t"}, {"exclude_seen": False}, {"users": [f"v{case}" for case in range(CASES)]}],
    ids=["split", "candidates", "users"],
)
@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["all", "one of two"])
def test_seeds_that_were_tested_otherwise_are_left_out_and_said(tmp_path, other, seeds):
    plan, places = planned(tmp_path, seeds=seeds)
    for place in places:
        last = place.run.cell == "two" and place.run.seed == seeds[-1]
        finished(place, np.arange(CASES) % 12, **(other if last else {}))
    found = differences(plan, places)
    assert {cell: one["seeds"] for cell, one in found["cells"].items()} == {"one": list(seeds)} | (
        {"two": [0]} if len(seeds) > 1 else {}
    )
    said = f"two, seed {seeds[-1]}, was tested on other cases or candidates than none"
    assert len(found["left_out"]) == 1
    assert said in found["left_out"][0]
    document = results.collect(plan, places)
    assert said in report.markdown(document)
    assert said in report.page(document).render()


def test_a_reference_of_another_split_than_its_own_first_seed_is_left_out(tmp_path):
    plan, places = planned(tmp_path, seeds=(0, 1, 2))
    for place in places:
        finished(place, np.arange(CASES) % 12, **({"split": "t"} if place.run.seed == 1 else {}))
    found = differences(plan, places)
    assert {cell: one["seeds"] for cell, one in found["cells"].items()} == {"one": [0, 2], "two": [0, 2]}
    assert [one.partition(" were tested")[0] for one in found["left_out"]] == [
        "one and none, seed 1,",
        "two and none, seed 1,",
    ]
    assert all("than with seed 0" in one for one in found["left_out"])


def test_a_seed_whose_cases_are_gone_is_left_out_once_and_no_folder_is_named(tmp_path):
    plan, places = planned(tmp_path, seeds=(0, 1))
    for place in places:
        finished(place, np.arange(CASES) % 12)
    gone = next(place for place in places if place.run.cell == "none" and place.run.seed == 1)
    (gone.folder / "evaluation" / "none.parquet").unlink()
    found = differences(plan, places)
    assert {cell: one["seeds"] for cell, one in found["cells"].items()} == {"one": [0], "two": [0]}
    (said,) = found["left_out"]
    assert said.startswith(f"none, seed 1: {gone.folder.name}/evaluation holds no evaluation that can be read")
    assert str(tmp_path) not in json.dumps(found)


def test_where_nothing_can_be_compared_the_page_says_why(tmp_path):
    plan, places = planned(tmp_path, seeds=(0,))
    for place in places:
        finished(place, np.arange(CASES) % 12, **({} if place.run.cell == "none" else {"split": "t"}))
    document = results.collect(plan, places)
    assert document["differences"]["cells"] == {}
    report.write(document, tmp_path)
    for text in ((tmp_path / "table.md").read_text(), (tmp_path / "study.html").read_text()):
        assert text.count("was tested on other cases or candidates than none") == 2


def test_metrics_that_were_not_evaluated_and_empty_slices_are_left_out(tmp_path):
    plan, places = planned(tmp_path, metrics=("NDCG@10", "HR@50", "cold HR@5", "other HR@5"), seeds=(0,))
    for place in places:
        finished(place, np.arange(CASES) % 12)
    assert [list(one["metrics"]) for one in differences(plan, places)["cells"].values()] == [["NDCG@10"]] * 2


def test_many_tests_get_as_many_resamples_as_could_show_something(tmp_path):
    metrics = tuple(f"{metric}@{k}" for metric in ("HR", "NDCG", "MRR") for k in range(1, 15))
    plan, places = planned(tmp_path, metrics=metrics, seeds=(0,))
    for place in places:
        finished(place, np.zeros(CASES, int) if place.run.cell == "none" else np.full(CASES, -1))
    found = differences(plan, places)
    assert found["resamples"] == 10_000  # twenty for each of the smallest p-values would be 33,600
    assert all(row["p_holm"] < 0.05 for one in found["cells"].values() for row in one["metrics"].values())


def test_resamples_show_small_p_values_well_and_never_too_few():
    assert [_resamples(tests) for tests in (0, 1, 3, 25, 60, 1000)] == [1000, 1000, 1200, 10_000, 10_000, 40_000]


def test_what_is_resampled_together_is_as_if_alone(tmp_path):
    plan, places = planned(tmp_path, metrics=("NDCG@10", "tail NDCG@10", "HR@5", "tail HR@5"))
    rng = np.random.default_rng(5)
    for place in places:
        finished(place, rng.integers(-1, 15, CASES))
    whole = differences(plan, places)
    for metric in plan.metrics:
        alone, there = planned(tmp_path, metrics=(metric,))
        few = differences(alone, there)
        for cell, one in few["cells"].items():
            row = whole["cells"][cell]["metrics"][metric]
            kept = {"cases", "before", "after", "difference", "by_seed", "sd_over_seeds"}
            assert {name: row[name] for name in kept} == {name: one["metrics"][metric][name] for name in kept}


def test_without_a_reference_there_is_nothing_and_before_the_first_pair_no_table(tmp_path):
    plan, places = planned(tmp_path, reference="")
    assert differences(plan, places) is None
    plan, places = planned(tmp_path)
    finished(places[0], np.zeros(CASES, int))
    found = differences(plan, places)
    assert (found["cells"], found["tests"]) == ({}, 0)
    assert "Against" not in report.markdown(results.collect(plan, places))


def test_the_page_shows_what_changed_and_what_is_told_from_chance(tmp_path):
    plan, places = planned(tmp_path)
    for place in places:
        finished(place, np.full(CASES, {"none": 3, "one": 0, "two": 3}[place.run.cell]))
    document = results.collect(plan, places)
    report.write(document, tmp_path)
    text = (tmp_path / "study.html").read_text()
    assert "<h2>Against none</h2>" in text
    assert "after correction clear of which users were sampled: one. Strokes are single seeds." in text
    assert "+0.5693 [+0.5693, +0.5693], sd 0.0000, p 0.002 †" in text
    assert "+0.0000 [+0.0000, +0.0000], sd 0.0000, p 1.000" in text
    assert "## Against none" in (tmp_path / "table.md").read_text()


def test_the_reference_has_to_be_a_variant():
    with pytest.raises(RecipeError, match=r"The reference .nothing. is no variant of the study"):
        StudyPlan("t", {}, {"a": {}, "b": {}}, reference="nothing")
