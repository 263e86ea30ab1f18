"""The report on steps of thought as a page: findings, quality and latency by step, slices."""

from collections.abc import Mapping
from typing import Any

from llmrec.page import Page, plot
from llmrec.reasoning.report import NAMES, PRIMARY

_QUALITY, _TIME, _CEILING = "#3b82c4", "#d9822b", "#8a8f98"


def page(report: Mapping[str, Any], title: str = "Steps of thought") -> Page:
    """The page of a report of `llmrec.reasoning.report.reasoning_report`, or the same read from JSON."""
    found = Page(title)
    found.paragraph(
        f"{report['cases']:,} cases of {report['users']:,} users; the quality of one model when it answers after 0 to "
        f"{report['steps']} steps of thought, and the time that these take."
    )
    for finding in report["findings"]:
        found.finding(finding["level"], finding["text"])
    found.heading("Quality and latency by step")
    _plot(found, report)
    header, rows = step_rows(report)
    found.table(
        header,
        rows,
        f"95 % intervals over users; differences from step 0 are paired by case; p after Holm's correction for all "
        f"{report['tests']} tests of this page. The oracle is a ceiling: each case's best step, chosen by its answer.",
    )
    found.heading("Slices")
    header, rows = slice_rows(report)
    found.table(header, rows, f"{PRIMARY} by step.")
    for part in report["slices"].values():
        found.paragraph(part["sentence"])
    return found


def step_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table by step, as text; the oracle is the last row."""
    latency = report["latency"]
    batches = [] if latency is None else latency["batches"]
    header = ["steps"]
    for name in NAMES:
        header += [f"{name} [95 %]", "difference from 0", "p (Holm)"]
    header += [f"ms, {row['histories']} at once" for row in batches]
    rows = []
    for found in report["by_step"]:
        cells = [str(found["step"])]
        for name in NAMES:
            cells.append(_with_interval(found, name))
            gap = found.get("against step 0", {}).get(name)
            if gap is None:
                cells += ["", ""]
            else:
                low, high = gap["difference interval95"]
                cells += [f"{gap['difference']:+.4f} [{low:+.4f}, {high:+.4f}]", f"{gap['p_holm']:.3f}"]
        step = found["step"]
        cells += [f"{row['milliseconds'][step]:.2f} (× {row['ratio'][step]:.2f})" for row in batches]
        rows.append(cells)
    oracle = report["oracle"]
    cells = ["oracle"]
    for name in NAMES:
        cells += [_with_interval(oracle, name), "", ""]
    rows.append([*cells, *("" for _ in batches)])
    return header, rows


def slice_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table of slices, as text."""
    steps = range(report["steps"] + 1)
    rows = []
    for name, part in report["slices"].items():
        said = "over-thinking" if part["over_thinking"] is not None else ""
        rows.append(
            [
                name,
                f"{part['cases']:,}",
                *(f"{part[PRIMARY][step]:.4f}" for step in steps),
                str(part["best_step"]),
                said,
            ]
        )
    return ["slice", "cases", *(f"{step} steps" for step in steps), "best step", ""], rows


def _with_interval(found: Mapping[str, Any], name: str) -> str:
    low, high = found[f"{name} interval95"]
    return f"{found[name]:.4f} [{low:.4f}, {high:.4f}]"


def _plot(found: Page, report: Mapping[str, Any]) -> None:
    figure, axes = plot(3.6)
    steps = [row["step"] for row in report["by_step"]]
    values = [row[PRIMARY] for row in report["by_step"]]
    bounds = [row[f"{PRIMARY} interval95"] for row in report["by_step"]]
    # Percentile intervals of few users need not hold the mean itself.
    reach = [
        [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)],
    ]
    axes.errorbar(steps, values, reach, fmt="o-", color=_QUALITY, capsize=3, label=PRIMARY)
    axes.axhline(report["oracle"][PRIMARY], color=_CEILING, linestyle="--", label="oracle step (a ceiling)")
    axes.set_xticks(steps)
    axes.set_xlabel("steps of thought")
    axes.set_ylabel(PRIMARY)
    caption = f"{PRIMARY} by step: {', '.join(f'{value:.4f}' for value in values)}"
    lines, labels = axes.get_legend_handles_labels()
    if report["latency"] is not None:
        row = report["latency"]["batches"][0]
        beside = axes.twinx()
        beside.spines["top"].set_visible(False)
        beside.plot(steps, row["milliseconds"], "s:", color=_TIME, label="ms to an answer")
        beside.set_ylim(bottom=0)
        beside.set_ylabel(f"ms, {row['histories']} at once")
        more = beside.get_legend_handles_labels()
        lines, labels = [*lines, *more[0]], [*labels, *more[1]]
        caption += f"; milliseconds: {', '.join(f'{value:.2f}' for value in row['milliseconds'])}"
    axes.legend(lines, labels, frameon=False, loc="best")
    found.figure(figure, f"{caption}. Bars: 95 % intervals over users, which are wider than those of differences.")
