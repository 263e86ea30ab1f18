"""The report of a training after SFT: what it was rewarded for, what it became, what that cost, and whether it helped.

It knows a log, the guard's document and an outcome, and nothing of models.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmrec.evaluation.outcome import outcome_rows
from llmrec.reinforcement.guard import ENTROPY, GRADIENT, KL, SIGNAL_FREE
from llmrec.reinforcement.trade_off import DECIDES

if TYPE_CHECKING:
    from llmrec.page import Level, Page

Series = dict[str, list[tuple[int, float]]]

# Told apart in the light, in the dark, and by those who see fewer colours.
_COLOURS = ("#0a63c9", "#c2570c", "#6f42c1", "#1a7f37", "#9a6700", "#bf3989", "#0b7285", "#5c5f66")
_KEPT = ("loss", "reward", "reward_std", SIGNAL_FREE, ENTROPY, KL, GRADIENT)


def course(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """What a log says of rewards and groups, one row a step; without what was not finite.

    Args:
        lines: of `read_log`.
    """
    rows: dict[int, dict[str, float]] = {}
    for line in lines:
        numbers = {
            name: float(value)
            for name, value in line.items()
            if (name in _KEPT or name.startswith("rewards/")) and isinstance(value, int | float)
        }
        if numbers and "train_runtime" not in line:
            rows.setdefault(line["step"], {"step": line["step"]}).update(numbers)
    return [rows[step] for step in sorted(rows)]


def closing_words(method: str, guard: Mapping[str, Any], outcome: Mapping[str, Any] | None) -> str:
    """Whether it helped, in a sentence or two.

    Args:
        method: its name.
        guard: of `RLGuard.document`.
        outcome: on the test part; None if nothing was evaluated.
    """
    if guard["returned_to_start"]:
        return (
            f"{method} did not help: no checkpoint was better on the validation slice than the SFT model. The "
            "artefact holds the SFT weights, bit for bit."
        )
    if outcome is None:
        return (
            f"Whether {method} helped is not known: no test cases were ranked. On the validation slice, by which the "
            f"checkpoint was chosen, it was better: {guard['sentence']}"
        )
    name = outcome["primary"]
    found = outcome["metrics"][name]
    low, high = found["difference interval95"]
    change = f"{name} {found['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    if outcome["verdict"] == "helped":
        return f"{method} helped: {change} on the {outcome['part']} part."
    if outcome["verdict"] == "hurt":
        return (
            f"{method} did harm: {change} on the {outcome['part']} part, although it was better on the validation "
            "slice. Keep the artefact that it began with."
        )
    return (
        f"{method} did not help: {change} on the {outcome['part']} part cannot be told from no difference, although "
        "it was better on the validation slice."
    )


def rl_page(
    method: str,
    lines: Sequence[Mapping[str, Any]],
    guard: Mapping[str, Any],
    outcome: Mapping[str, Any] | None = None,
) -> "Page":
    """A page of a training's course: rewards, entropy, KL, groups without signal, the trade-off, the closing table.

    Args:
        method: its name.
        lines: of `read_log`.
        guard: of `RLGuard.document`.
        outcome: as for `closing_words`.
    """
    from llmrec.page import Page

    page = Page(f"{method} after SFT")
    verdict = "warning" if guard["returned_to_start"] or outcome is None else _level(outcome["verdict"])
    page.finding(verdict, closing_words(method, guard, outcome))
    page.finding("warning" if guard["stopped"] else "note", guard["sentence"])
    if outcome is not None:
        page.heading("Before and after")
        header, rows = outcome_rows(outcome)
        caption = (
            f"{outcome['cases']:,} cases of {outcome['users']:,} users of the {outcome['part']} part; differences are "
            f"paired, with 95 % bootstrap intervals over users; p corrected by Holm for {outcome['tests']} tests."
        )
        page.table(header, rows, caption)
        page.paragraph(outcome["sentence"])
    rows_by_step = course(lines)
    terms = sorted({name for row in rows_by_step for name in row if name.startswith("rewards/")})
    means = [name for name in terms if not name.endswith("/std")]
    for heading, names, unit in (
        ("Rewards", ["reward", *means], "mean, without weights; reward: their weighted sum"),
        ("Loss", ["loss"], "as the method has it"),
        ("Entropy and KL", [ENTROPY, KL], "nats"),
        ("Groups without signal", [SIGNAL_FREE], "share of groups"),
    ):
        series = {
            name.removeprefix("rewards/").removesuffix("/mean"): points
            for name in names
            if (points := [(int(row["step"]), row[name]) for row in rows_by_step if name in row])
        }
        if series:
            page.heading(heading)
            _figure(page, series, unit)
    _trade_off(page, guard)
    return page


def _level(verdict: str) -> "Level":
    return {"helped": "ok", "hurt": "warning"}.get(verdict, "note")  # type: ignore[return-value]


def _trade_off(page: "Page", guard: Mapping[str, Any]) -> None:
    """Recall against sharpness by step, as figure and as table."""
    evaluations = guard["evaluations"]
    recall = f"HR@{guard['depth']}"
    page.heading("Recall against the first place, on the validation slice")
    series: Series = {
        name: [(one["step"], one["metrics"][name]["policy"]) for one in evaluations]
        for name in (recall, DECIDES, "NDCG@1")
    }
    _figure(page, series, "share")
    names = [recall, "HR@10", DECIDES, "NDCG@1"]
    rows = []
    for one in evaluations:
        cells = []
        for name in names:
            found = one["metrics"][name]
            low, high = found["difference interval95"]
            cells.append(f"{found['policy']:.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if one["step"] else ""))
        kept = "best so far" if one["better"] and one["step"] else ""
        rows.append([str(one["step"]), *cells, one["why"] or kept])
    page.table(
        ["step", *names, "guard"],
        rows,
        f"{guard['cases']:,} cases. In brackets: 95 % intervals of the difference from step 0, the SFT model.",
    )


def _figure(page: "Page", series: Mapping[str, Sequence[tuple[int, float]]], unit: str) -> None:
    from llmrec.page import plot

    figure, axes = plot()
    for place, (name, points) in enumerate(series.items()):
        steps, values = zip(*points, strict=True)
        mark = "o" if len(points) < 40 else None
        axes.plot(steps, values, color=_COLOURS[place % len(_COLOURS)], marker=mark, markersize=4, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.legend(frameon=False)
    ends = ", ".join(f"{name} {points[0][1]:.4f} to {points[-1][1]:.4f}" for name, points in series.items())
    page.figure(figure, f"From the first step to the last: {ends} ({unit}).")
