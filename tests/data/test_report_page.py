"""The report's page: it shows the figures, in order, for every kind of log, and hostile ids stay text."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from logs import START, inside_days, logged, shop, split_of
from pages import Seen

from llmrec.data.interactions import Interactions
from llmrec.data.protocols import leave_one_out
from llmrec.data.report import report
from llmrec.data.report_page import page

HOSTILE = "</style></svg><script>alert(1)</script>$\\frac{$"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    interactions, items, split = logged(inside_days(shop(0, days=True), key=str))
    # As `llmrec data report --json` stores it.
    return dict(json.loads(json.dumps(report(interactions, items, split))))


def test_findings_come_first_then_every_section(found: dict[str, Any]) -> None:
    text = page(found, "A shop").render()
    places = [text.index(f"<h2>{name}") for name in ("Findings", "Counts", "Sequence lengths", "Popularity", "Time")]
    assert places == sorted(places)
    seen = Seen(text)
    assert seen.tags.count("svg") == 5
    assert seen.tags.count("h1") == 1
    joined = "".join(seen.texts)
    for finding in found["findings"]:
        assert finding["sentence"] in joined
    assert joined.index(found["findings"][0]["sentence"]) < joined.index(found["findings"][-1]["sentence"])
    assert found["split"]["content_hash"] in joined
    assert "leave-one-out" in joined


def test_figures_are_those_of_the_report(found: dict[str, Any]) -> None:
    joined = "".join(Seen(page(found).render()).texts)
    assert f"{found['counts']['interactions']:,}" in joined
    assert f"{found['entropy']['real']:.4f}" in joined
    assert f"{found['entropy']['compression']['ratio']:.3f}" in joined
    assert f"{found['entropy']['approximate_users']['mean']:.4f}" in joined
    assert found["entropy"]["approximate_users"]["warning"] in joined
    assert f"Gini {found['popularity']['gini']:.3f}" in joined
    assert f"{100 * found['sensitivity']['expected_changed_share']:.1f} % of" in joined
    assert f"Ids ascend (same time) in {100 * found['id_order']['ties']['ascending_share']:.1f} %" in joined
    first = datetime.fromtimestamp(found["times"]["first"], UTC).date()
    assert f"From {first} to" in joined
    found["counts"]["interactions"] = 12_345_678
    assert "12,345,678" in page(found).render()


def test_the_same_report_gives_the_same_page(found: dict[str, Any], tmp_path: Path) -> None:
    page(found).write(tmp_path / "one.html")
    page(found).write(tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_hostile_ids_stay_text() -> None:
    rows = [(f"{user}{HOSTILE}", f"{item}{HOSTILE}", time) for user, item, time in shop(1, users=30)]
    own = [row for row in rows if row[0] == rows[0][0]]
    rows[0] = (own[0][0], own[-1][1], own[0][2])
    interactions, items, split = logged(rows)
    found = report(interactions, items, split, seen=interactions)
    seen = Seen(page(found, HOSTILE).render())
    assert "script" not in seen.tags
    assert seen.tags.count("style") == 1
    # Title twice, the finding's example, and user and item of the table's row.
    assert sum(HOSTILE in text for text in seen.texts) >= 5


def test_logs_without_times_with_counted_times_and_tiny_ones_have_a_page() -> None:
    for timed in (True, False):
        interactions, items, split = logged(shop(2, users=20), timed)
        text = page(report(interactions, items, split)).render()
        assert ("<h2>Time</h2>" in text) == timed
    tiny = [("a", "x", START), ("a", "y", START), ("a", "x", START), ("b", "x", START)]
    interactions, items, split = logged(tiny)
    assert "<h2>Entropy</h2>" in page(report(interactions, items, split)).render()
    # Milliseconds that are taken as an order would be the year 46334.
    frame = interactions.frame.with_columns(timestamp=pl.col("timestamp") * 1000)
    ordered = Interactions.from_frame(frame, timestamp_unit="order")
    made = leave_one_out(ordered, items)
    assert "in a unit that is not unix seconds" in page(report(ordered, items, made)).render()
    # Numbers that only order interactions, and in another log no known time at all.
    for times in ([1.0, 2.0, 3.0, 4.0], [None] * 4):
        counted = report(interactions, items, split_of([[0, 1, 0], [0]], [times[:3], times[3:]]))
        assert ("in a unit that is not unix seconds" in page(counted).render()) == (times[0] is not None)
