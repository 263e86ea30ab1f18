"""The page of `llmrec tradeoff`: quality against latency and against size, in one figure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmrec.page import Page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOUR, _FRONT = "#0a63c9", "#c2570c"


def tradeoff_page(found: Mapping[str, Any]) -> Page:
    """The page of a document of `tradeoff`."""
    page = Page("Quality against latency and size")
    machine = found["machine"]
    where = machine["gpu"] if str(found["device"]).startswith("cuda") and machine["gpu"] else machine["processor"]
    page.paragraph(
        f"{found['metric']} of the {found['part']} part with 95 % intervals over users. Latency: the {found['k']} "
        f"best items, medians and quartiles of {found['repetitions']} requests after {found['warm_ups']} for warming "
        f"up, all models in turns in one process, on {where} ({machine['cores']} cores, {machine['threads']} threads)."
    )
    page.figure(
        _figure(found),
        f"{found['metric']} against the median time of one request, and against parameters, both on logarithmic "
        "scales, by the numbers of the table. Orange and joined: the front, which no other model here outdoes.",
    )
    page.table(*table_of(found), caption="Times in milliseconds per request; in brackets quartiles.")
    return page


def table_of(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The points' header and rows as text."""
    sizes = sorted({int(size) for point in found["points"] for size in point["latency"]})
    header = ["", "system", found["metric"], "95 % interval", "parameters", "memory", "files"]
    header += [f"ms, batch of {size}" for size in sizes] + ["front"]
    rows = []
    for number, point in enumerate(found["points"], start=1):
        interval = point[f"{found['metric']} interval95"]
        front = [name for name, there in point["fronts"].items() if there]
        rows.append(
            [
                str(number),
                point["name"],
                f"{point[found['metric']]:.4f}",
                "" if interval is None else f"[{interval[0]:.4f}, {interval[1]:.4f}]",
                f"{point['parameters']:,}",
                *(f"{point[name] / 1e6:,.2f} MB" for name in ("bytes", "file_bytes")),
                *(
                    f"{taken['median']:.2f} [{taken['low']:.2f}, {taken['high']:.2f}]"
                    for taken in (point["latency"][str(size)] for size in sizes)
                ),
                " and ".join(front),
            ]
        )
    return header, rows


def _figure(found: Mapping[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    points = found["points"]
    smallest = str(min(int(size) for size in points[0]["latency"]))
    times = [point["latency"][smallest] for point in points]
    spread = [
        [max(0.0, one["median"] - one["low"]) for one in times],
        [max(0.0, one["high"] - one["median"]) for one in times],
    ]
    _panel(left, found, "latency", [one["median"] for one in times], spread)
    left.set_xlabel(f"ms per request (batch of {smallest})")
    left.set_ylabel(found["metric"])
    _panel(right, found, "parameters", [point["parameters"] for point in points], None)
    right.set_xlabel("parameters")
    return figure


def _panel(
    axes: "Axes", found: Mapping[str, Any], front: str, costs: list[float], spread: list[list[float]] | None
) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_facecolor("none")
    axes.set_xscale("log")
    points, metric = found["points"], found["metric"]
    quality = [point[metric] for point in points]
    intervals = [point[f"{metric} interval95"] or [value, value] for point, value in zip(points, quality, strict=True)]
    errors = [
        [max(0.0, value - low) for value, (low, _) in zip(quality, intervals, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(quality, intervals, strict=True)],
    ]
    colours = [_FRONT if point["fronts"][front] else _COLOUR for point in points]
    axes.errorbar(costs, quality, yerr=errors, xerr=spread, fmt="none", ecolor="#9aa5b1", elinewidth=1, zorder=1)
    axes.scatter(costs, quality, c=colours, s=28, zorder=3)
    best = sorted((cost, value) for cost, value, p in zip(costs, quality, points, strict=True) if p["fronts"][front])
    axes.plot([cost for cost, _ in best], [value for _, value in best], color=_FRONT, linewidth=1, zorder=2)
    for number, (cost, value) in enumerate(zip(costs, quality, strict=True), start=1):
        axes.annotate(str(number), (cost, value), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_ylim(bottom=0)
