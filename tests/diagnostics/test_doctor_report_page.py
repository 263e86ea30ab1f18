"""The doctor's page: the verdict first, the report's figures in it, for every kind of report, and titles stay text."""

import copy
import json
from pathlib import Path
from typing import Any

import kinds
import numpy as np
import pytest
from kinds import ids_of
from pages import Seen

from llmrec.diagnostics.report import report
from llmrec.diagnostics.report_page import page

HOSTILE = "</style></svg><script>alert(1)</script>$\\frac{$ 🧦\x00"
SECTIONS = (
    "Verdict",
    "Use of the codes",
    "The tree of codes",
    "Items that share an ID",
    "Neighbours",
    "What sharing and beams cost",
    "Reconstruction",
    "Beside other tokenizers",
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    table = kinds.codes()
    table[:60, 2] = 0
    ids = ids_of(table, (24, 5, 5)).with_titles({"i0": HOSTILE})
    other = ids_of(np.random.default_rng(0).permutation(kinds.codes())[:500])
    strange = ids_of(np.zeros((1, 1), dtype=int)).from_mapping({"nobody": [1]})
    made = report(
        ids,
        split=kinds.log(kinds.codes()[:, 0]),
        texts=kinds.texts(),
        vectors=kinds.texts(),
        quantizer=kinds.kind_points(),
        others=[(HOSTILE, other), ("strange", strange)],
        skipped={"nothing": "Because. Do it."},
    )
    return dict(json.loads(json.dumps(made)))


def test_the_verdict_comes_first_then_every_section(found: dict[str, Any]) -> None:
    text = page(found, "Ours").render()
    places = [text.index(f"<h2>{name}</h2>") for name in SECTIONS]
    assert places == sorted(places)
    seen = Seen(text)
    assert (seen.tags.count("svg"), seen.tags.count("h1")) == (3, 1)
    joined = "".join(seen.texts)
    for finding in found["verdict"]:
        assert finding["sentence"] in joined
    assert joined.index(found["verdict"][0]["sentence"]) < joined.index(found["verdict"][-1]["sentence"])


def test_figures_are_those_of_the_report(found: dict[str, Any]) -> None:
    joined = "\n".join(Seen(page(found).render()).texts)
    assert "600 items with 3 code(s) each, 24 × 5 × 5" in joined
    assert f"{found['usage'][0]['perplexity']:,.1f}" in joined
    assert f"{100 * found['sharing_rate']:.1f} %) share their ID" in joined
    first = found["neighbours"]["co_sold"][0]
    assert f"{100 * first['purity']:.1f} % of the pairs sold together have the same first code, by chance" in joined
    assert f"{100 * first['chance']:.1f} %" in joined
    recall = found["ceiling"]["beam"]["recall"]
    assert f"a beam search keeps {100 * recall['10']:.1f} % with 10, {100 * recall['20']:.1f} % with 20" in joined
    random = found["ceiling"]["beam_random"]["recall"]
    assert f"; through random codes of these sizes {100 * random['10']:.1f} % with 10, " in joined
    assert "It bounds no model" in joined
    assert "what their users had before" in joined
    assert f"{found['ceiling']['collision']['HR@1']:.4f}" in joined
    assert f"{found['reconstruction']['relative']:.4f}" in joined
    other = found["others"][0]
    assert f"{other['shared_items']:,}" in joined
    assert f"{100 * other['other']['neighbour_purity']:.1f} %" in joined
    changed = copy.deepcopy(found)
    changed["items"] = 12_345_678
    assert "12,345,678" in page(changed).render()


def test_titles_and_names_stay_text(found: dict[str, Any]) -> None:
    seen = Seen(page(found, HOSTILE).render())
    assert "script" not in seen.tags
    assert seen.tags.count("style") == 1
    shown = HOSTILE.replace("\x00", "\ufffd")
    # Title twice, the group's first item, the other tokenizer's name.
    assert sum(shown in text for text in seen.texts) == 4


def test_the_same_report_gives_the_same_page(found: dict[str, Any], tmp_path: Path) -> None:
    page(found).write(tmp_path / "one.html")
    page(found).write(tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_what_is_not_known_has_no_section() -> None:
    seen = page(report(ids_of(kinds.codes(), codebook_sizes_known=False)), "Bare").render()
    for name in SECTIONS[4:5] + SECTIONS[6:]:
        assert f"<h2>{name}</h2>" not in seen
    for name in SECTIONS[:4] + SECTIONS[5:6]:
        assert f"<h2>{name}</h2>" in seen
    assert "(by the codes that occur)" in seen
    assert "all items alike" in seen
    tiny = report(ids_of(np.zeros((1, 1), dtype=int)), texts=np.ones((1, 2)))
    assert "<h2>Verdict</h2>" in page(tiny).render()


def test_what_was_quantised_is_told() -> None:
    table = np.column_stack([kinds.codes()[:, :2], np.arange(600) % 5])
    text = page(report(ids_of(table, quantised_levels=2, origin={"collisions": {"policy": "append"}}))).render()
    assert "As quantised, 100.0 % shared one (80.0 % were beyond one item per ID, the largest group had 5)" in text
    assert "; then: append." in text
    assert "3 (appended)" in text
    record = {"policy": "reassign", "items": 600, "collision_rate": 0.2, "sharing_rate": 0.3, "largest_group": 4}
    record |= {"moved_items": 90, "distortion_before": 2.0, "added_distortion": 0.2}
    text = page(report(ids_of(kinds.codes(), origin={"collisions": record}))).render()
    assert "then: reassign, 90 items moved, squared error + 10.0 %." in text
