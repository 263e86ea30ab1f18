"""The report on steps: figures by hand, paired differences, slices, over-thinking in words, and its page."""

import json
from typing import Any

import numpy as np
import pytest

from llmrec.evaluation.evaluation import Evaluation
from llmrec.evaluation.ranks import Ranks
from llmrec.evaluation.uncertainty import bootstrap_means, holm, paired_difference
from llmrec.exceptions import DataError
from llmrec.reasoning.report import reasoning_report
from llmrec.reasoning.report_page import page, slice_rows, step_rows

C = 240


def step(better: Any, number: int, counted: Any = None) -> Evaluation:
    heads = np.arange(C) % 3 == 0
    return Evaluation(
        f"m-steps={number}",
        [f"u{case}" for case in range(C)],
        ["i0"] * C,
        Ranks(np.asarray(better, dtype=np.int64), np.zeros(C, dtype=np.int64)),
        np.ones(C, dtype=bool) if counted is None else counted,
        {"head": heads, "torso": np.zeros(C, dtype=bool), "tail": ~heads},
        (10,),
        {"split": "ab", "protocol": {}, "part": "test", "items": 99},
    )


LENGTHS = np.arange(C) % 12 + 1
LATENCY = {
    "device": "cpu", "threads": 1, "rounds": 3,
    "batches": [{"histories": 1, "milliseconds": [1.0, 1.5, 2.5], "ratio": [1.0, 1.5, 2.4]}],
}  # fmt: skip


def over_thinking() -> list[Evaluation]:
    """A first step that helps everyone, and a second that loses the long users' targets again."""
    none = np.full(C, 6)
    first = np.full(C, 2)
    second = np.where(LENGTHS > 8, 9, 1)
    return [step(one, number) for number, one in enumerate((none, first, second))]


def test_figures_are_those_of_the_ranks() -> None:
    evaluations = over_thinking()
    report = reasoning_report(evaluations, LENGTHS, LATENCY, {"kind": "prl"}, resamples=1000)
    assert (report["kind"], report["steps"], report["cases"], report["users"]) == ("prl", 2, C, C)
    gains = [np.full(C, 1 / np.log2(8)), np.full(C, 0.5), np.where(LENGTHS > 8, 1 / np.log2(11), 1 / np.log2(3))]
    for number, row in enumerate(report["by_step"]):
        assert row["step"] == number
        assert row["NDCG@10"] == pytest.approx(gains[number].mean())
        assert row["HR@10"] == 1.0
        own = bootstrap_means(gains[number][:, None], np.arange(C))
        assert row["NDCG@10 interval95"] == pytest.approx([own.low[0], own.high[0]])
    assert "against step 0" not in report["by_step"][0]
    gap = paired_difference(gains[2][:, None], gains[0][:, None], np.arange(C))
    found = report["by_step"][2]["against step 0"]["NDCG@10"]
    assert found["difference"] == pytest.approx(gap.mean[0])
    assert found["difference interval95"] == pytest.approx([gap.low[0], gap.high[0]])
    assert found["p_value"] == pytest.approx(gap.p_value[0])
    best = np.max(gains, axis=0)
    assert report["oracle"]["NDCG@10"] == pytest.approx(best.mean())
    assert report["oracle"]["cases_by_step"] == [0, int((LENGTHS > 8).sum()), int((LENGTHS <= 8).sum())]
    assert report["oracle"]["cases_alike"] == 0
    json.dumps(report)


def test_holm_spans_every_test() -> None:
    report = reasoning_report(over_thinking(), LENGTHS)
    tests = [test for row in report["by_step"][1:] for test in row["against step 0"].values()]
    again = report["slices"]["all"]["against"][0]  # the last step against none, which by_step has tested
    tests += [test for part in report["slices"].values() for test in part["against"] if test is not again]
    assert len(tests) == report["tests"] == 2 * 2 + 2 * 5 - 1
    assert again == {"step": 0, **report["by_step"][-1]["against step 0"]["NDCG@10"]}
    assert [test["p_holm"] for test in tests] == pytest.approx(holm([test["p_value"] for test in tests]).tolist())


def test_slices_tell_long_users_and_what_over_thinking_is() -> None:
    report = reasoning_report(over_thinking(), LENGTHS, LATENCY)
    slices = report["slices"]
    assert list(slices) == [
        *("all", "head items", "tail items"),
        *("short users (up to 4 items)", "long users (more than 8 items)"),
    ]
    assert slices["long users (more than 8 items)"]["cases"] == C // 3
    longest = slices["long users (more than 8 items)"]
    assert longest["best_step"] == 1
    assert longest["NDCG@10"] == pytest.approx([1 / 3, 0.5, 1 / np.log2(11)])
    assert longest["over_thinking"]["step"] == 1
    assert longest["over_thinking"]["difference"] == pytest.approx(1 / np.log2(11) - 0.5)
    assert longest["sentence"].startswith("Over-thinking on long users (more than 8 items): after 2 steps")
    assert longest["sentence"].endswith("against 1 step.")
    shortest = slices["short users (up to 4 items)"]
    assert shortest["over_thinking"] is None
    assert shortest["sentence"].endswith("the last step came out best: no over-thinking.")
    texts = [(finding["level"], finding["text"]) for finding in report["findings"]]
    assert texts[0][0] == "ok"
    assert texts[0][1].startswith("Thinking helped. NDCG@10 0.3333 without and")
    assert [level for level, text in texts if "Over-thinking" in text] == ["warning"]
    assert any("A ceiling, which nothing can serve" in text for _, text in texts)
    assert any("2 steps take 2.40 times the time of none for 1 history at once" in text for _, text in texts)


def test_chance_is_called_chance_and_harm_harm() -> None:
    generator = np.random.default_rng(0)
    same = generator.integers(0, 15, C)
    other = np.where(np.arange(C) < 6, (same + 1) % 15, same)
    report = reasoning_report([step(same, 0), step(other, 1)], LENGTHS)
    assert report["findings"][0]["text"].startswith("Thinking made no difference to be seen.")
    assert report["findings"][0]["level"] == "note"
    assert all(part["over_thinking"] is None for part in report["slices"].values())
    if report["slices"]["all"]["best_step"] == 0:
        assert "no over-thinking can be told" in report["slices"]["all"]["sentence"]
    worse = reasoning_report([step(np.full(C, 1), 0), step(np.full(C, 5), 1)], LENGTHS)
    assert worse["findings"][0]["text"].startswith("Thinking hurt.")
    assert worse["findings"][0]["level"] == "warning"
    assert worse["slices"]["all"]["over_thinking"]["step"] == 0
    assert worse["latency"] is None


def test_cases_kept_apart_count_nowhere() -> None:
    counted = np.arange(C) % 2 == 0
    better = np.where(counted, 3, 0)
    report = reasoning_report([step(better, 0, counted), step(better, 1, counted)], LENGTHS)
    assert report["cases"] == C // 2
    assert report["by_step"][0]["NDCG@10"] == pytest.approx(1 / np.log2(5))
    assert report["oracle"]["cases_alike"] == C // 2
    assert report["by_step"][1]["against step 0"]["NDCG@10"]["p_holm"] == 1


def test_what_is_no_report_is_refused() -> None:
    good = over_thinking()
    with pytest.raises(DataError, match="of none and of one at least"):
        reasoning_report(good[:1], LENGTHS)
    with pytest.raises(DataError, match="different cases"):
        reasoning_report([good[0], step(np.zeros(C), 1, np.arange(C) < 9)], LENGTHS)
    with pytest.raises(DataError, match="different cases"):
        reasoning_report(good, LENGTHS[:-1])
    nothing = np.zeros(C, dtype=bool)
    with pytest.raises(DataError, match="no headline figure"):
        reasoning_report([step(np.zeros(C), number, nothing) for number in range(2)], LENGTHS)
    with pytest.raises(DataError, match=r"With 100 resamples .* Ask for 260"):
        reasoning_report(good, LENGTHS, resamples=100)


@pytest.mark.parametrize("latency", [None, LATENCY], ids=["quality", "both"])
def test_the_page_shows_tables_and_a_plot(latency: Any) -> None:
    report = json.loads(json.dumps(reasoning_report(over_thinking(), LENGTHS, latency)))
    html = page(report, "Steps <b>").render()
    assert html.count("<svg") == 1
    assert ("ms to an answer" in html) == (latency is not None)
    assert "oracle step (a ceiling)" in html
    assert "Steps &lt;b&gt;" in html
    header, rows = step_rows(report)
    assert [row[0] for row in rows] == ["0", "1", "2", "oracle"]
    assert all(len(row) == len(header) for row in rows)
    assert ("2.50 (× 2.40)" in rows[2]) == (latency is not None)
    report["by_step"][1]["NDCG@10 interval95"] = [report["by_step"][1]["NDCG@10"] + 1e-12] * 2
    page(report, "of few users, whose interval need not hold their mean").render()
    header, rows = slice_rows(report)
    assert header[:5] == ["slice", "cases", "0 steps", "1 steps", "2 steps"]
    assert [row[0] for row in rows if row[-1] == "over-thinking"] == ["long users (more than 8 items)"]
