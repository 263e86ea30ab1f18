import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.evaluation.comparison import compare
from llmrec.evaluation.evaluation import Evaluation
from llmrec.evaluation.ranks import Ranks
from llmrec.exceptions import DataError

CASES = 300


def save_run(
    folder: Path,
    system: str,
    draw: int,
    quality: float = 20.0,
    seeds: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    cases: int = CASES,
    first_user: int = 0,
    apart: int = 0,
    ties: bool = False,
    **facts: Any,
) -> Evaluation:
    """Saves a made-up evaluation: places are geometric around `quality`, beyond 20 the list ends."""
    rng = np.random.default_rng(draw)
    better = np.minimum(rng.geometric(1 / quality, size=cases) - 1, 20)
    better[better == 20] = -1
    tied = np.where((better >= 0) & ties, rng.integers(0, 3, size=cases), 0)
    counted = np.arange(cases) >= apart
    evaluation = Evaluation(
        system=system,
        # Every third user has two cases.
        user_ids=[f"u{first_user + case * 3 // 4}" for case in range(cases)],
        targets=[f"i{case % 50}" for case in range(cases)],
        ranks=Ranks(better.astype(np.int64), tied.astype(np.int64)),
        counted=counted,
        slices={"head": counted & (np.arange(cases) % 2 == 0), "cold": np.arange(cases) < max(apart, 1)},
        ks=(5, 10, 20),
        facts={
            "split": "ab" * 32,
            "protocol": {"split": "leave-one-out", "min_history": 3},
            "part": "test",
            "items": 50,
            "exclude_seen": True,
            "invalid_rate": 0.25,
            "duplicate_rate": 0.0,
            "coverage@10": 0.5,
            "seeds": seeds or {},
            "settings": settings or {},
            "cost": {"fit_seconds": 2.0 + draw, "parameters": 1000, "ms_per_request": 0.5, "device": "cpu"},
            "versions": {"llmrec": "0.1.0", "numpy": "2.0"},
            **facts,
        },
    )
    evaluation.save(folder, evaluation.document(resamples=20))
    return evaluation


def edit(folder: Path, system: str, **changes: Any) -> None:
    path = folder / "evaluation" / f"{system}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def by_name(card: dict[str, Any]) -> dict[str, Any]:
    return {system["name"]: system for system in card["systems"]}


def gains(evaluation: Evaluation, metric: str, k: int) -> np.ndarray:
    """Every case's value by its definition, averaged over all orders of the tied."""
    found = []
    for better, ties in zip(evaluation.ranks.better, evaluation.ranks.ties, strict=True):
        places = range(better, better + ties + 1) if better >= 0 else []
        gain = [(1.0 if metric == "HR" else 1 / np.log2(place + 2)) * (place < k) for place in places]
        found.append(np.mean(gain) if gain else 0.0)
    return np.array(found)


def test_numbers_are_those_of_the_counted_cases(tmp_path: Path) -> None:
    ours = save_run(tmp_path / "a", "ours", 1, 8.0, apart=20, ties=True)
    base = save_run(tmp_path / "b", "item-cf", 2, 12.0, apart=20, ties=True)
    card = compare([tmp_path / "a", tmp_path / "b"], ["HR@10", "NDCG@5"], resamples=400, seed=3)
    systems = by_name(card)
    counted = ours.counted
    for metric, k in (("HR", 10), ("NDCG", 5)):
        a, b = gains(ours, metric, k)[counted], gains(base, metric, k)[counted]
        found = systems["ours"]["metrics"][f"{metric}@{k}"]
        assert found["mean"] == pytest.approx(a.mean())
        assert found["difference"] == pytest.approx((a - b).mean())
        # Users with two cases are resampled whole: the deviation of their sums makes the interval.
        users = np.array(ours.user_ids)[counted]
        sums = np.array([(a - a.mean())[users == user].sum() for user in np.unique(users)])
        error = 1.96 * np.sqrt((sums**2).sum()) / len(a)
        low, high = found["interval95"]
        assert high - low == pytest.approx(2 * error, rel=0.25)
        assert low < a.mean() < high
    assert "difference" not in systems["item-cf"]["metrics"]["HR@10"]
    assert (card["cases"], card["cases_kept_apart"]) == (CASES - 20, 20)
    assert card["users"] == len({user for user, c in zip(ours.user_ids, counted, strict=True) if c})
    assert card["reference"] == "item-cf"
    assert [system["name"] for system in card["systems"]] == ["ours", "item-cf"]
    assert json.loads(json.dumps(card, allow_nan=False)) == card


def test_slices_are_of_their_cases_also_of_those_kept_apart(tmp_path: Path) -> None:
    ours = save_run(tmp_path / "a", "ours", 1, apart=30)
    slices = compare([tmp_path / "a"], ["HR@10", "NDCG@10"], resamples=50)["systems"][0]["slices"]
    for name, mask in ours.slices.items():
        assert slices[name]["NDCG@10"] == pytest.approx(gains(ours, "NDCG", 10)[mask].mean())
        assert slices[name]["cases"] == mask.sum()
        low, high = slices[name]["NDCG@10 interval95"]
        assert low <= slices[name]["NDCG@10"] <= high
    assert slices["cold"]["cases"] == 30


def test_default_metrics_and_reference(tmp_path: Path) -> None:
    save_run(tmp_path / "a", "ours", 1, 3.0)
    save_run(tmp_path / "a", "popularity", 2, 30.0)
    save_run(tmp_path / "a", "item_cf", 3, 9.0)
    card = compare([tmp_path / "a"], resamples=30)
    assert card["metrics"] == ["HR@5", "NDCG@5", "HR@10", "NDCG@10"]
    assert card["primary"] == "NDCG@10"
    assert card["reference"] == "item_cf"  # the better of the two baselines, though ours is best
    assert card["tests"] == 8
    assert compare([tmp_path / "a"], reference="popularity", resamples=30)["reference"] == "popularity"
    with pytest.raises(DataError, match=r"no system 'sasrec'.*ours, item_cf, popularity"):
        compare([tmp_path / "a"], reference="sasrec")
    save_run(tmp_path / "b", "one", 1, 9.0)
    save_run(tmp_path / "b", "two", 2, 3.0)
    assert compare([tmp_path / "b"], resamples=30)["reference"] == "two"  # no baseline: the first row, the best


def test_metrics_are_parsed_and_no_deeper_than_the_lists(tmp_path: Path) -> None:
    save_run(tmp_path / "a", "ours", 1)
    card = compare([tmp_path / "a"], ["recall@10", "HR@10", "MAP@5", "ndcg@20"], resamples=20)
    assert card["metrics"] == ["HR@10", "MRR@5", "NDCG@20"]
    assert card["primary"] == "HR@10"
    for wrong in ("AUC@10", "HR", "HR@0", "HR@-1", "HR@x", "@10", "HR@²"):
        with pytest.raises(DataError, match="no metric of a comparison"):
            compare([tmp_path / "a"], [wrong])
    with pytest.raises(DataError, match="HR@21 looks deeper than the evaluations, of which one ended at 20"):
        compare([tmp_path / "a"], ["HR@21"])


def test_different_splits_parts_users_and_candidates_are_refused(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    save_run(a, "ours", 1)
    save_run(b, "item-cf", 2, split="cd" * 32)
    with pytest.raises(DataError) as caught:
        compare([a, b])
    message = str(caught.value)
    assert all(part in message for part in (str(a), str(b), "abababababab", "cdcdcdcdcdcd", "one table"))
    assert message.count(". ") == 1
    assert "two item tables" in message
    save_run(b, "item-cf", 2, split="cd" * 32, first_user=1)
    with pytest.raises(DataError, match="Evaluate both on the same one"):
        compare([a, b])
    save_run(b, "item-cf", 2, part="valid")
    with pytest.raises(DataError, match=r"the part test.*the part valid"):
        compare([a, b])
    for others in ({"first_user": 1}, {"cases": CASES - 1}, {"apart": 2}):
        save_run(b, "item-cf", 2, **others)
        with pytest.raises(DataError, match=r"not the same users"):
            compare([a, b])
    save_run(b, "item-cf", 2, exclude_seen=False)
    with pytest.raises(DataError, match="different candidates"):
        compare([a, b])
    save_run(b, "item-cf", 2)
    assert len(compare([a, b], resamples=20)["systems"]) == 2


def test_a_target_that_differs_is_no_common_case(tmp_path: Path) -> None:
    save_run(tmp_path / "a", "ours", 1)
    save_run(tmp_path / "b", "item-cf", 2)
    path = tmp_path / "b" / "evaluation" / "item-cf.parquet"
    frame = pl.read_parquet(path)
    frame.with_columns(target=pl.Series(["i49", *frame["target"].to_list()[1:]])).write_parquet(path)
    with pytest.raises(DataError, match="not the same users"):
        compare([tmp_path / "a", tmp_path / "b"])


def test_seeds_of_one_system_become_one_row(tmp_path: Path) -> None:
    runs = [
        save_run(tmp_path / f"s{seed}", "ours", seed, 8.0, {"training": seed}, {"beams": 20, "artefact": f"s{seed}"})
        for seed in range(3)
    ]
    base = save_run(tmp_path / "b", "item-cf", 9)
    card = compare([*(tmp_path / f"s{seed}" for seed in range(3)), tmp_path / "b"], resamples=200)
    ours = by_name(card)["ours"]
    table = np.stack([gains(run, "NDCG", 10) for run in runs])
    found = ours["metrics"]["NDCG@10"]
    assert found["by_seed"] == pytest.approx(table.mean(axis=1))
    assert found["mean"] == pytest.approx(table.mean())
    assert found["sd_over_seeds"] == pytest.approx(table.mean(axis=1).std(ddof=1))
    assert found["difference"] == pytest.approx(table.mean() - gains(base, "NDCG", 10).mean())
    assert ours["seeds"] == [{"training": 0}, {"training": 1}, {"training": 2}]
    assert ours["cost"] == {"fit_seconds": 3.0, "parameters": 1000, "ms_per_request": 0.5, "device": "cpu"}
    assert by_name(card)["item-cf"]["metrics"]["NDCG@10"]["sd_over_seeds"] is None
    single = [note for note in card["notes"] if note.startswith("One seed")]
    assert len(single) == 1
    assert "item-cf" in single[0]
    assert "ours" not in single[0]


def test_other_settings_and_indistinct_seeds_are_no_seeds_of_one_system(tmp_path: Path) -> None:
    save_run(tmp_path / "a", "ours", 1, seeds={"training": 0}, settings={"beams": 10})
    save_run(tmp_path / "b", "ours", 2, seeds={"training": 1}, settings={"beams": 20})
    card = compare([tmp_path / "a", tmp_path / "b"], resamples=20)
    assert set(by_name(card)) == {f"ours ({tmp_path / 'a'})", f"ours ({tmp_path / 'b'})"}
    save_run(tmp_path / "b", "ours", 2, seeds={"training": 0}, settings={"beams": 10})
    card = compare([tmp_path / "a", tmp_path / "b"], resamples=20)
    assert len(card["systems"]) == 2
    assert any("not every one names a seed of its own" in note for note in card["notes"])


def test_seeds_of_the_evaluation_make_no_second_model(tmp_path: Path) -> None:
    for seed in range(2):
        save_run(tmp_path / f"s{seed}", "ours", seed, seeds={"training": 0, "users": seed, "bootstrap": seed})
    card = compare([tmp_path / "s0", tmp_path / "s1"], resamples=20)
    assert len(card["systems"]) == 2
    assert all(system["metrics"]["NDCG@10"]["sd_over_seeds"] is None for system in card["systems"])


def test_models_of_other_training_or_revision_are_no_seeds_of_one(tmp_path: Path) -> None:
    one = {"training": {"backbone": {"hidden_size": 64}, "trainer": {"seed": 0}}, "revision": None}
    other = {"training": {"backbone": {"hidden_size": 128}, "trainer": {"seed": 1}}, "revision": None}
    same = {"training": {"backbone": {"hidden_size": 64}, "trainer": {"seed": 1}}, "revision": None}
    for settings, rows in ((other, 2), (same, 1), (same | {"revision": "v2"}, 2)):
        save_run(tmp_path / "a", "ours", 1, seeds={"training": 0}, settings=one)
        save_run(tmp_path / "b", "ours", 2, seeds={"training": 1}, settings=settings)
        assert len(compare([tmp_path / "a", tmp_path / "b"], resamples=20)["systems"]) == rows


def test_students_of_teachers_that_differ_by_seeds_are_one_row(tmp_path: Path) -> None:
    def student(place: int, trained: str, **seeds: int) -> None:
        teacher = {"weights": f"hash {place}", "settings": trained, "seed": seeds["teacher"]}
        settings = {"training": {"distillation": {"alpha": 0.5, "teacher": teacher}}}
        save_run(tmp_path / f"{place}", "student", place, seeds=seeds, settings=settings)

    student(1, "eight passes", training=0, teacher=0)
    student(2, "eight passes", training=1, teacher=1)
    student(3, "eight passes", training=0, teacher=2)
    student(4, "nine passes", training=2, teacher=3)
    card = compare([tmp_path / f"{place}" for place in (1, 2, 3, 4)], resamples=20)
    assert {row["name"]: len(row["seeds"]) for row in card["systems"]} == {
        f"student ({tmp_path / '1'})": 3,
        f"student ({tmp_path / '4'})": 1,
    }


def test_students_of_teachers_known_by_their_weights_alone_are_no_seeds_of_one(tmp_path: Path) -> None:
    for place in (1, 2):
        settings = {"training": {"distillation": {"teacher": {"weights": f"hash {place}"}}}}
        save_run(tmp_path / f"{place}", "student", place, seeds={"training": place}, settings=settings)
    assert len(compare([tmp_path / "1", tmp_path / "2"], resamples=20)["systems"]) == 2


def test_two_ways_with_ties_are_said(tmp_path: Path) -> None:
    save_run(tmp_path / "a", "ours", 1)
    save_run(tmp_path / "b", "item-cf", 2)
    edit(tmp_path / "b", "item-cf", ties="as listed")
    edit(tmp_path / "a", "ours", ties="expected")
    notes = compare([tmp_path / "a", tmp_path / "b"], resamples=20)["notes"]
    assert any(note.startswith("Tied items are treated in two ways: ") for note in notes)
    edit(tmp_path / "a", "ours", ties="as listed")
    notes = compare([tmp_path / "a", tmp_path / "b"], resamples=20)["notes"]
    assert not any(note.startswith("Tied items") for note in notes)


def test_the_same_evaluation_found_twice_is_shown_once(tmp_path: Path) -> None:
    save_run(tmp_path / "a", "item-cf", 1, seeds={"users": 0})
    save_run(tmp_path / "b", "item-cf", 1, seeds={"users": 1})
    card = compare([tmp_path / "a", tmp_path / "b", tmp_path / "a"], resamples=20)
    (only,) = card["systems"]
    assert only["runs"] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert len(only["seeds"]) == 1
    assert any("equal ranks" in note for note in card["notes"])
    alone = compare([tmp_path / "a", tmp_path / "a" / ".." / "a"], resamples=20)
    assert alone["systems"][0]["runs"] == [str(tmp_path / "a")]
    assert not any("equal ranks" in note for note in alone["notes"])
    # Under another name they are two systems; with other ties they are two evaluations.
    save_run(tmp_path / "c", "other", 1)
    save_run(tmp_path / "d", "item-cf", 1, ties=True)
    assert len(compare([tmp_path / "a", tmp_path / "c"], resamples=20)["systems"]) == 2
    assert len(compare([tmp_path / "a", tmp_path / "d"], resamples=20)["systems"]) == 2


def test_seeds_that_rank_alike_are_all_counted(tmp_path: Path) -> None:
    # Two trainings were undone, and have the ranks of what they began with; the third one was not.
    for seed, draw in ((0, 1), (1, 1), (2, 2)):
        save_run(tmp_path / str(seed), "rl", draw, quality=20.0 - 9 * draw, seeds={"training": seed})
        save_run(tmp_path / str(seed), "sft", 1, quality=11.0, seeds={"training": 7})
    found = by_name(compare([tmp_path / name for name in "012"], reference="sft", resamples=20))
    assert len(found["sft"]["seeds"]) == 1
    rl = found["rl"]["metrics"]["NDCG@10"]
    before, *_ = found["sft"]["metrics"]["NDCG@10"]["by_seed"]
    assert rl["by_seed"][:2] == pytest.approx([before, before])
    assert rl["mean"] == pytest.approx((2 * before + rl["by_seed"][2]) / 3)
    assert rl["difference"] == pytest.approx((rl["by_seed"][2] - before) / 3)


def test_files_that_are_no_evaluation_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no evaluation/\*.json"):
        compare([tmp_path / "absent"])
    with pytest.raises(DataError, match="No run folder"):
        compare([])
    save_run(tmp_path / "a", "ours", 1)
    edit(tmp_path / "a", "ours", **{"NDCG@10": 0.9})
    with pytest.raises(DataError, match=r"says NDCG@10 = 0.9, the cases in ours.parquet give 0\.\d{6}"):
        compare([tmp_path / "a"])
    save_run(tmp_path / "a", "ours", 1)
    (tmp_path / "a" / "evaluation" / "ours.parquet").unlink()
    with pytest.raises(DataError, match="no evaluation that can be read"):
        compare([tmp_path / "a"])
    save_run(tmp_path / "b", "ours", 1, apart=CASES - 2)
    path = tmp_path / "b" / "evaluation" / "ours.parquet"
    pl.read_parquet(path).with_columns(counted=pl.lit(False)).write_parquet(path)
    with pytest.raises(DataError, match="no case that counts"):
        compare([tmp_path / "b"])


def test_equal_systems_are_seldom_called_different_and_unequal_ones_often(tmp_path: Path) -> None:
    found = []
    for draw in range(8):
        folder = tmp_path / str(draw)
        save_run(folder, "item-cf", 3 * draw, 12.0)
        save_run(folder, "alike", 3 * draw + 1, 12.0)
        save_run(folder, "better", 3 * draw + 2, 3.0)
        systems = by_name(compare([folder], ["NDCG@10"], reference="item-cf", resamples=200))
        found.append([systems[name]["metrics"]["NDCG@10"]["significant"] for name in ("alike", "better")])
        assert systems["better"]["metrics"]["NDCG@10"]["p_value"] <= systems["better"]["metrics"]["NDCG@10"]["p_holm"]
    alike, better = np.array(found).sum(axis=0)
    assert alike <= 2
    assert better == 8


def test_too_few_resamples_for_any_significance_are_said(tmp_path: Path) -> None:
    for name, quality in (("item-cf", 30.0), ("a", 3.0), ("b", 2.0)):
        save_run(tmp_path / "a", name, 1, quality)
    card = compare([tmp_path / "a"], resamples=100)
    note = next(note for note in card["notes"] if "nothing can be significant" in note)
    assert "8 tests" in note
    assert not any(
        found["significant"] for s in card["systems"] for found in s["metrics"].values() if "significant" in found
    )
    enough = compare([tmp_path / "a"], resamples=1000)
    assert not any("nothing can be significant" in note for note in enough["notes"])
    assert by_name(enough)["b"]["metrics"]["HR@10"]["significant"]
