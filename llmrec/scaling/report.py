"""The report of a pilot: one HTML file with the points, the laws, what was predicted and what was measured."""

from collections.abc import Sequence

from llmrec.page import Page
from llmrec.scaling import report_figures as figures
from llmrec.scaling.account import COSTS, EncoderAccount
from llmrec.scaling.fit_document import summary
from llmrec.scaling.scaling_fit import ScalingFit

_LAWS = {"performance_law": "Performance Law", "power_law": "power law", "chinchilla": "Chinchilla's form"}
_AXES = ("depth", "width", "effective")


def report_page(
    accounts: Sequence[EncoderAccount], metric: str = "NDCG@10", title: str = "Scaling", note: str = ""
) -> Page:
    """The report of several encoders' trainings.

    Args:
        accounts: one or more.
        metric: what the points' metric is.
        title: heading.
        note: what a reader has to know first.
    """
    page = Page(title)
    if note:
        page.paragraph(note)
    page.paragraph(
        f"The Performance Law (arXiv 2412.00430) beside a power law and Chinchilla's form, fitted to {metric} on test "
        "by depth, width and effective data D' = tokens / real entropy. Intervals are 90 %. Nothing reaches farther "
        "than three times beyond the points unless it says so."
    )
    for account in accounts:
        page.heading(account.name)
        if account.fit is None:
            page.finding("warning", f"No law was fitted. {account.refusal}")
        else:
            _laws(page, account, account.fit, metric)
        if (drawn := figures.loss_figure(account, metric)) is not None:
            page.heading("Loss and metric", 3)
            agreement = account.loss_agreement()
            if agreement is not None and agreement < 0.8:
                page.finding("warning", "The loss would choose other models than the metric: select by the metric.")
            page.figure(*drawn)
        _points(page, account, metric)
    return page


def _laws(page: Page, account: EncoderAccount, fit: ScalingFit, metric: str) -> None:
    document = account.document()["fit"]
    page.finding("ok" if fit.form == "peaked" else "note", fit.verdict())
    for reason in fit.reasons():
        page.finding("note", reason)
    page.paragraph(summary(document))
    for axis in _AXES:
        if fit.grid.levels(axis) > 1:
            page.figure(*figures.law_figure(fit, axis, metric))
    page.heading("Laws", 3)
    rows = []
    for name, spelt in _LAWS.items():
        entry = document["law"] | document if name == "performance_law" else document[name]
        left = entry["leave_one_out"]
        values = ", ".join(f"{key} {_number(value)}" for key, value in _parameters(document, name).items())
        chosen = " (predicts)" if document["chosen"] == name else ""
        rows.append(
            [
                spelt + chosen,
                f"{entry['r2']:.3f}",
                f"{entry['mae']:.4f}",
                f"{left['r2']:.3f}",
                f"{left['mae']:.4f}",
                values,
            ]
        )
    page.table(
        ["law", "R²", "MAE", "left out: R²", "left out: MAE", "parameters"],
        rows,
        "Left out: each cell predicted by a fit of the others.",
    )
    page.figure(*figures.residual_figure(fit, metric))
    page.heading("Optimum", 3)
    page.figure(*figures.optimum_figure(fit))
    _gains(page, fit)
    if account.held_out:
        _held_out(page, account, metric)
    if (drawn := figures.frontier_figure(account, metric)) is not None:
        page.heading("Cost", 3)
        page.figure(*drawn)


def _gains(page: Page, fit: ScalingFit) -> None:
    rows = [
        [_LAWS[law], name, f"{gain.value:+.4f}", f"{gain.low:+.4f}", f"{gain.high:+.4f}"]
        for law in dict.fromkeys((fit.chosen, "power_law"))
        for name, gain in fit.gains(law).items()
    ]
    if rows:
        depth, width = fit.base
        page.table(
            ["law", "doubling", "gain", "low", "high"],
            rows,
            f"What doubling is predicted to add at depth {depth:g}, width {width:g} and {fit.most[0]:,.0f} effective "
            "data.",
        )


def _held_out(page: Page, account: EncoderAccount, metric: str) -> None:
    assert account.fit is not None
    page.heading("Predicted, then measured", 3)
    rows = []
    for cell in account.held_out:
        low, high = cell.interval
        rows.append(
            [
                f"{cell.depth:g}",
                f"{cell.width:g}",
                f"{cell.effective:,.0f}",
                str(cell.seeds),
                f"{cell.metric:.4f}",
                f"{cell.predicted[account.fit.chosen]:.4f}",
                f"{low:.4f}",
                f"{high:.4f}",
                f"{cell.predicted['power_law']:.4f}",
                ("inside" if low <= cell.metric <= high else "outside") + (", beyond reach" if cell.beyond else ""),
            ]
        )
    page.table(
        [
            "depth",
            "width",
            "D'",
            "seeds",
            metric,
            _LAWS[account.fit.chosen],
            "low",
            "high",
            "power law",
            "the interval",
        ],
        rows,
        "Trainings that no law was fitted to; the interval is that of one more training.",
    )


def _points(page: Page, account: EncoderAccount, metric: str) -> None:
    points = account.points
    page.heading("Points", 3)
    header = ["depth", "width", "tokens", "quality S'", "D'", "seed", metric]
    rows = []
    for row in range(len(points)):
        cells = [f"{points.depth[row]:g}", f"{points.width[row]:g}", f"{points.tokens[row]:,.0f}"]
        cells += [f"{points.quality[row]:.4f}", f"{points.effective[row]:,.0f}"]
        cells += ["" if points.seed is None else str(points.seed[row]), f"{points.metric[row]:.4f}"]
        rows.append(cells)
    if account.costs is not None and account.cost is not None:
        header.append(COSTS[account.cost])
        rows = [[*cells, f"{cost:.4g}"] for cells, cost in zip(rows, account.costs, strict=True)]
    page.table(header, rows, "One row a training.")


def _parameters(document: dict[str, object], name: str) -> dict[str, float | None]:
    found = document["law"] if name == "performance_law" else document[name]
    assert isinstance(found, dict)
    return dict(found["parameters"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
