"""The verdict: every planted disease is found and told apart from the others, and the healthy are left in peace."""

import copy
import re
from pathlib import Path
from typing import Any

import kinds
import numpy as np
import pytest
from kinds import ids_of

from llmrec.diagnostics import verdict
from llmrec.diagnostics.report import report
from llmrec.diagnostics.verdict import verdicts


def examined(
    table: np.ndarray, sizes: tuple[int, ...] | None = None, sold: Any = None, **given: Any
) -> dict[str, Any]:
    """The report on these codes, with texts and sales that follow the items' kinds unless told otherwise."""
    facts = {name: given.pop(name) for name in ("origin", "quantised_levels", "codebook_sizes_known") if name in given}
    split = kinds.log(kinds.codes()[:, 0] if sold is None else sold)
    return report(ids_of(table, sizes, **facts), **{"split": split, "texts": kinds.texts(), **given})


def levels(found: dict[str, Any]) -> dict[str, str]:
    for finding in found["verdict"]:
        assert re.search(r"[.:;] [A-Z]|\. No ", finding["sentence"]), finding
        assert finding["sentence"].endswith(".")
    return {finding["check"]: finding["level"] for finding in found["verdict"]}


def sentence(found: dict[str, Any], check: str) -> str:
    return next(finding["sentence"] for finding in found["verdict"] if finding["check"] == check)


@pytest.fixture(scope="module")
def healthy() -> dict[str, Any]:
    return examined(kinds.codes(), vectors=kinds.texts(), quantizer=kinds.kind_points())


def test_the_healthy_get_one_good_sentence(healthy: dict[str, Any]) -> None:
    assert levels(healthy) == {"health": "ok"}
    told = sentence(healthy, "health")
    assert "600 items with 3 code(s) each, no two alike" in told
    assert "100 % of items sold together have the same first code (by chance 4.0 %)" in told
    assert "50 beams keep 100 % of a reference's best" in told


def test_codes_alone_can_be_healthy_too() -> None:
    found = report(ids_of(kinds.codes()))
    assert levels(found) == {"health": "ok"}
    assert "sold together" not in sentence(found, "health")


def test_an_appended_digit_is_no_disease() -> None:
    table = np.column_stack([kinds.codes()[:, :2], np.zeros(600, dtype=int), np.arange(600) % 5])
    table[:, 2] = np.arange(600) % 5 // 2  # 3, 2, 1 items share the first three codes
    table[:, 3] = [0, 1, 0, 1, 0] * 120
    found = examined(table, (24, 5, 3, 200), quantised_levels=3, origin={"collisions": {"policy": "append"}})
    assert levels(found) == {"collisions as quantised": "warning"}
    assert "80.0 % of the items shared an ID as quantised, and the appended code" in sentence(
        found, "collisions as quantised"
    )


def test_an_appended_digit_that_few_items_need_is_no_disease() -> None:
    table = np.column_stack([kinds.codes(), np.zeros(600, dtype=int)])
    table[1] = [*table[0, :3], 1]
    found = examined(table, quantised_levels=3, origin={"collisions": {"policy": "append"}})
    assert levels(found) == {"health": "ok"}
    assert levels(examined(table)) == {"more levels than needed": "note", "health": "ok"}


def test_dead_codes() -> None:
    found = examined(kinds.codes(), (24, 256, 5), origin={"quantizer": "rqvae"})
    assert levels(found)["dead codes"] == "warning"
    told = sentence(found, "dead codes")
    assert "Level 2 uses 5 of 256 codes (2.0 %)" in told
    assert "more --epochs" in told
    assert "--codebook-size 4" in told
    assert levels(examined(kinds.codes(), (28, 5, 5)))["dead codes"] == "note"
    assert "dead codes" not in levels(examined(kinds.codes(), (26, 5, 5)))


def test_codes_that_are_used_but_hardly_ever() -> None:
    table = kinds.codes()
    table[:, 1] = np.where(np.arange(600) % 25 == 0, table[:, 0], 0)
    table[:, 2] = np.arange(600) % 25
    found = examined(table)
    assert levels(found)["uneven codes"] == "warning"
    assert "Level 2 uses its codes unevenly: its perplexity is 1.3 of 24" in sentence(found, "uneven codes")
    assert "dead codes" not in levels(found)


def test_collisions() -> None:
    table = kinds.codes()
    table[:, 2] //= 2
    found = examined(table)
    assert levels(found)["collisions"] == "warning"
    # Of every 5 items 2, 2 and 1 share an ID.
    assert "480 items (80.0 %) share their ID with another, at most 2 one ID" in sentence(found, "collisions")
    assert f"HR@1 {found['ceiling']['collision']['HR@1']:.3f}" in sentence(found, "collisions")
    assert "no two alike" not in str(found["verdict"])
    few = kinds.codes()
    few[1] = few[0]
    found = examined(few)
    assert levels(found) == {"collisions": "note", "health": "ok"}
    assert "no two alike" not in sentence(found, "health")


def test_collisions_that_were_resolved_are_told_by_what_it_cost() -> None:
    record = {"policy": "reassign", "items": 600, "collision_rate": 0.2, "sharing_rate": 0.3, "largest_group": 4}
    record |= {"moved_items": 90, "distortion_before": 2.0, "added_distortion": 0.2}
    found = examined(kinds.codes(), origin={"collisions": record})
    assert levels(found) == {"collisions as quantised": "note", "cost of reassignment": "note", "health": "ok"}
    assert "30.0 % of the items shared an ID as quantised, and other last codes" in str(found["verdict"])
    assert "90 items have other last codes" in sentence(found, "cost of reassignment")
    assert "added 10.0 % to" in sentence(found, "cost of reassignment")
    found = examined(kinds.codes(), origin={"collisions": {**record, "sharing_rate": 0.6}})
    assert levels(found)["collisions as quantised"] == "warning"
    mild = {**record, "sharing_rate": 0.1, "added_distortion": 0.02}
    assert levels(examined(kinds.codes(), origin={"collisions": mild})) == {"health": "ok"}


def test_one_giant_prefix() -> None:
    rows = np.arange(600)
    table = np.column_stack([np.where(rows < 200, 1 + rows % 63, 0), rows % 25, rows // 25])
    found = examined(table, (64, 25, 24))
    assert levels(found)["giant prefix"] == "warning"
    assert "66.7 % of the items have the same first code, 43 times an even share" in sentence(found, "giant prefix")


@pytest.mark.parametrize(
    ("last", "told"), [("copy", "says what the codes before it say"), ("one", "has one code for")]
)
def test_a_level_without_information(last: str, told: str) -> None:
    table = kinds.codes()
    table[:, 2] = table[:, 1] if last == "copy" else 0
    found = examined(table)
    assert levels(found)["level without information"] == "warning"
    assert f"Level 3 {told}" in sentence(found, "level without information")
    assert "though 100 % of the items still share the codes before it" in sentence(found, "level without information")


def test_a_level_that_is_not_needed_is_a_note() -> None:
    table = kinds.codes()
    table = np.column_stack([table, table[:, 2]])
    found = examined(table)
    assert levels(found) == {"more levels than needed": "note", "health": "ok"}
    assert "After 3 code(s) 100 % of the items are alone, and level 4 adds 0.00 bits" in str(found["verdict"])


def test_ids_like_names_and_too_few_items() -> None:
    found = examined(np.stack([np.arange(600), np.zeros(600, dtype=int)], axis=1))
    assert levels(found)["IDs like names"] == "warning"
    assert "100 % of the items have a first code of their own" in sentence(found, "IDs like names")
    table = np.stack(np.unravel_index(np.arange(600), (200, 3)), axis=1)
    found = examined(table)
    assert levels(found)["few items for the codebook"] == "warning"
    assert "600 items for 200 codes are 3.0 per code" in sentence(found, "few items for the codebook")


def test_codes_like_a_hash() -> None:
    table = np.random.default_rng(1).permutation(kinds.codes())
    found = examined(table)
    assert levels(found)["codes like a hash"] == "warning"
    assert "Check that the embeddings belong to these items" in sentence(found, "codes like a hash")
    assert levels(examined(table, split=None))["codes like a hash"] == "warning"
    assert "codes like a hash" not in levels(examined(table, split=None, texts=None))
    found = examined(table, origin={"quantizer": "hash"})
    assert "This is the control" in sentence(found, "codes like a hash")


def test_purity_that_chance_may_explain_is_faint(healthy: dict[str, Any]) -> None:
    for low, told in ((0.010, True), (0.015, False)):
        changed = copy.deepcopy(healthy)
        for lengths in changed["neighbours"].values():
            lengths[0] |= {"purity": 0.02, "chance": 0.0125, "lift": 1.6, "interval95": [low, 0.03]}
        assert ("codes like a hash" in {finding["check"] for finding in verdicts(changed)}) is told


def test_codes_that_follow_one_of_texts_and_sales() -> None:
    other = np.random.default_rng(2).permutation(kinds.codes()[:, 0])
    found = examined(kinds.codes(), sold=other)
    assert levels(found)["codes beside the sales"] == "warning"
    assert "--collaborative-weight of 0.5" in sentence(found, "codes beside the sales")
    shuffled = np.random.default_rng(3).permutation(kinds.texts())
    assert levels(examined(kinds.codes(), texts=shuffled)) == {"codes beside the texts": "note", "health": "ok"}


def test_poor_reconstruction() -> None:
    vectors = np.random.default_rng(4).permutation(kinds.texts())
    found = examined(kinds.codes(), vectors=vectors, quantizer=kinds.kind_points())
    assert levels(found)["reconstruction"] == "warning"
    blurred = kinds.texts() + np.random.default_rng(5).normal(scale=1.3, size=(600, 16))
    found = examined(kinds.codes(), vectors=blurred, quantizer=kinds.kind_points())
    assert 0.6 < found["reconstruction"]["relative"] < 0.8
    assert levels(found)["reconstruction"] == "note"


def test_a_beam_that_loses_what_is_best(healthy: dict[str, Any]) -> None:
    # 600 first codes of equal weight for 50 beams: the user's 25 items are spread over them at random.
    spread = np.column_stack([np.random.default_rng(6).integers(0, 100, 600), np.zeros(600, dtype=int)])
    spread[:, 1] = np.arange(600) % 20
    found = examined(np.column_stack([spread, np.arange(600) // 20]))
    assert found["ceiling"]["beam"]["recall"]["10"] < healthy["ceiling"]["beam"]["recall"]["10"]
    assert found["ceiling"]["beam_random"]["recall"]["10"] < healthy["ceiling"]["beam"]["recall"]["10"]


@pytest.mark.parametrize(
    ("recall", "random", "level"),
    [
        ({"20": 0.5, "50": 0.8}, 0.83, "warning"),
        ({"20": 0.5, "50": 0.8}, 0.81, "note"),  # within what the cases leave open
        ({"20": 0.5, "50": 0.8}, 0.4, "note"),
        ({"20": 0.5, "50": 0.8}, None, "note"),
        ({"20": 0.5, "50": 0.96}, 1.0, "note"),
        ({"20": 0.91, "50": 0.96}, 1.0, None),
    ],
)
def test_what_beams_keep_is_judged_beside_random_codes(
    healthy: dict[str, Any], recall: dict[str, float], random: float | None, level: str | None
) -> None:
    changed = copy.deepcopy(healthy)
    changed["ceiling"]["beam"]["recall"] = recall
    changed["ceiling"]["beam_random"]["recall"]["50"] = random
    told = {finding["check"]: finding for finding in verdicts(changed)}
    if level is None:
        assert set(told) == {"health"}
        return
    assert told["beams"]["level"] == level
    words = told["beams"]["sentence"]
    assert f"{100 * recall['20']:.1f} % with 20, {100 * recall['50']:.1f} % with 50 beams" in words
    assert ("less than random codes keep" in words) is (level == "warning")
    assert ("through random codes" in words) is (random is not None)
    assert ("A model that is surer of itself than this reference loses less" in words) is (level == "note")
    assert "No model" not in words
    changed["source"]["quantizer"] = "hash"
    assert next(one for one in verdicts(changed) if one["check"] == "beams")["level"] == "note"


# What semantic_ids/build.py has for each quantizer; --quantizer itself and what follows it is for all.
OF_ALL = {"--num-levels", "--collisions"}
OF_VECTORS = {"--interactions", "--collaborative-weight", "--text-columns"}
FLAGS = {
    "rkmeans": OF_ALL | OF_VECTORS | {"--codebook-size", "--balanced", "--normalise-residuals"},
    "rqvae": OF_ALL | OF_VECTORS | {"--codebook-size", "--epochs"},
    "rvq": OF_ALL | OF_VECTORS | {"--codebook-size"},
    "pq": OF_ALL | OF_VECTORS | {"--codebook-size"},
    "opq": OF_ALL | OF_VECTORS | {"--codebook-size"},
    "fsq": OF_ALL | OF_VECTORS | {"--fsq-levels"},
    "hash": OF_ALL | {"--codebook-size"},
    "titles": {"--num-levels", "--codebook-size"},
    None: OF_ALL | OF_VECTORS | {"--codebook-size"},
}


@pytest.fixture(scope="module")
def sick(healthy: dict[str, Any]) -> list[dict[str, Any]]:
    """Reports that have every disease between them."""
    rows, table = np.arange(600), kinds.codes()
    rare = np.where(rows % 25 == 0, table[:, 0], 0)
    record = {"policy": "reassign", "items": 600, "collision_rate": 0.2, "sharing_rate": 0.6, "largest_group": 4}
    record |= {"moved_items": 90, "distortion_before": 2.0, "added_distortion": 0.2}
    lost = copy.deepcopy(healthy)
    lost["ceiling"]["beam"]["recall"] = {"50": 0.5}
    equal = kinds.texts()
    equal[:100] = equal[0]
    shuffled = np.random.default_rng(4).permutation(kinds.texts())
    return [
        lost,
        examined(table, (24, 256, 5)),
        examined(np.column_stack([table[:, 0], rare, rows % 25]), origin={"collisions": record}),
        examined(table // [1, 1, 2]),
        examined(np.column_stack([np.where(rows < 200, 1 + rows % 63, 0), rows % 25, rows // 25]), (64, 25, 24)),
        examined(np.column_stack([table, table[:, 2]])),
        examined(np.column_stack([table[:, :2], table[:, 1]])),
        examined(np.column_stack([rows, rows % 2])),
        examined(np.stack(np.unravel_index(rows, (200, 3)), axis=1)),
        examined(np.random.default_rng(1).permutation(table)),
        examined(table, sold=np.random.default_rng(2).permutation(table[:, 0])),
        examined(table, vectors=shuffled, quantizer=kinds.kind_points(), texts=shuffled),
        examined(table, texts=equal),
        report(ids_of(table).with_titles({f"i{row}": "same" for row in range(200)})),
    ]


def told_of(sick: list[dict[str, Any]], quantizer: str | None) -> list[dict[str, Any]]:
    """The findings on the same codes as if this quantizer had made them."""
    changed = [one | {"source": one["source"] | {"quantizer": quantizer}} for one in sick]
    return [finding for one in changed for finding in verdicts(one) if finding["check"] != "health"]


def test_the_sick_have_every_disease(sick: list[dict[str, Any]]) -> None:
    checks = {"dead codes", "uneven codes", "collisions", "collisions as quantised", "cost of reassignment", "beams"}
    checks |= {"giant prefix", "level without information", "more levels than needed", "IDs like names"}
    checks |= {"few items for the codebook", "codes like a hash", "codes beside the sales", "codes beside the texts"}
    assert {finding["check"] for finding in told_of(sick, "rkmeans")} >= checks | {"reconstruction", "equal titles"}


@pytest.mark.parametrize("quantizer", FLAGS)
def test_only_flags_that_a_quantizer_has_are_advised(sick: list[dict[str, Any]], quantizer: str | None) -> None:
    advised = set()
    for finding in told_of(sick, quantizer):
        assert finding["sentence"].endswith(".")
        assert re.search(r"[.:;] [A-Z]", finding["sentence"]), finding
        own = re.sub(r"--quantizer( rkmeans( with( --[a-z-]+)( with a --[a-z-]+)?)?)?", "", finding["sentence"])
        advised |= set(re.findall(r"--[a-z-]+", own))
    assert advised <= FLAGS[quantizer]
    assert advised >= FLAGS[quantizer] - {"--text-columns"} - OF_ALL - OF_VECTORS
    stages = Path(__file__).parents[2] / "semantic_ids"
    known = (stages / "build.py").read_text() + (stages / "embed.py").read_text()
    for flag in advised:
        assert f"    {flag[2:].replace('-', '_')}: " in known or flag == "--text-columns", flag


def test_steps_and_controls_are_not_told_of_centroids(sick: list[dict[str, Any]]) -> None:
    told = [one for one in told_of(sick, "fsq") if one["check"] in ("dead codes", "uneven codes", "IDs like names")]
    assert {one["check"] for one in told} == {"dead codes", "uneven codes", "IDs like names"}
    assert all(one["level"] == "note" and "--fsq-levels" in one["sentence"] for one in told)
    assert "few items for the codebook" not in {finding["check"] for finding in told_of(sick, "fsq")}
    for quantizer in ("hash", "titles"):
        checks = {finding["check"] for finding in told_of(sick, quantizer)}
        assert not checks & {"few items for the codebook", "dead codes", "uneven codes"}
        assert "giant prefix" in checks
    for quantizer in ("rkmeans", "rqvae", "rvq", "pq", "opq", None):
        warned = {finding["check"] for finding in told_of(sick, quantizer) if finding["level"] == "warning"}
        assert warned >= {"few items for the codebook", "dead codes", "uneven codes", "IDs like names"}


def test_equal_texts_and_titles() -> None:
    vectors = kinds.texts()
    vectors[:100] = np.repeat(vectors[:20], 5, axis=0)
    found = examined(kinds.codes(), texts=vectors)
    assert levels(found) == {"equal texts": "warning"}
    assert "100 items (16.7 %) have the same text as another" in sentence(found, "equal texts")
    vectors = kinds.texts()
    vectors[1::60] = 2 * vectors[::60]  # of one direction
    assert levels(examined(kinds.codes(), texts=vectors)) == {"equal texts": "note", "health": "ok"}
    ids = ids_of(kinds.codes()).with_titles({f"i{row}": "same" for row in range(200)})
    found = report(ids)
    assert levels(found) == {"equal titles": "note", "health": "ok"}
    assert "200 items (33.3 %) have the same title" in sentence(found, "equal titles")


def test_targets_without_an_id() -> None:
    split = kinds.log(kinds.codes()[:, 0])
    found = report(ids_of(kinds.codes()[:560]), split=split)
    missed = int((split.targets("test") >= 560).sum())
    assert f"{missed} of 400 test targets" in sentence(found, "targets without an ID")
    assert levels(found)["targets without an ID"] == "warning"
    found = report(ids_of(np.delete(kinds.codes(), slice(599, None), axis=0)), split=split)
    assert levels(found)["targets without an ID"] == "note"


def test_what_is_not_known_is_said() -> None:
    found = report(ids_of(kinds.codes(), codebook_sizes_known=False), skipped={"reconstruction": "It is so. Do that."})
    assert levels(found) == {"codebook sizes": "note", "reconstruction left out": "note", "health": "ok"}
    assert "24 × 5 × 5" in sentence(found, "codebook sizes")


def test_warnings_come_first_and_the_good_sentence_only_without() -> None:
    table = kinds.codes()
    table[:, 2] //= 2
    found = examined(table, (28, 5, 256), codebook_sizes_known=False)
    order = [finding["level"] for finding in found["verdict"]]
    assert order == sorted(order, key=["warning", "note", "ok"].index)
    assert {"warning", "note"} == set(order)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiny_catalogs_have_a_verdict(count: int) -> None:
    found = report(ids_of(np.zeros((count, 1), dtype=int)), texts=np.eye(3)[:count])
    assert all(finding["level"] in ("ok", "note", "warning") for finding in found["verdict"])
    assert "IDs like names" not in levels(found)


def test_thresholds_are_in_order() -> None:
    for low, high in (("FEW_USED", "SOME_UNUSED"), ("COLLAPSED", "UNEVEN"), ("OFTEN_SHARED", "MOSTLY_SHARED")):
        assert getattr(verdict, low) < getattr(verdict, high)
    assert verdict.MEDIOCRE_ERROR < verdict.POOR_ERROR
