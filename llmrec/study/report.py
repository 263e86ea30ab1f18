"""A study's table and page: means over seeds, a curve over an axis or a dot for each variant, and their courses."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.page import Page, plot
from llmrec.storage import atomic_path
from llmrec.study.plan import spelt
from llmrec.study.results import Cell, Mean, cells_of
from llmrec.study.runner import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE, PAGE = "table.md", "study.html"

# Told apart in the light, in the dark, and without colours.
_COLOURS = ("#0a63c9", "#c2570c", "#6f42c1", "#1a7f37", "#9a6700", "#bf3989", "#59636e", "#0f766e")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", "-.", ":")
_MOST_COURSES = 8  # lines in one plot of courses


def write(document: Mapping[str, Any], folder: str | Path, curve: str | None = None) -> None:
    """Writes table.md and study.html.

    Args:
        document: of `llmrec.study.results.collect`.
        folder: where to.
        curve: the axis to draw curves over; None: dots.
    """
    with atomic_path(Path(folder) / TABLE) as temporary:
        temporary.write_text(markdown(document), encoding="utf-8")
    page(document, curve).write(Path(folder) / PAGE)


def markdown(document: Mapping[str, Any]) -> str:
    """The study as Markdown: what was asked, what came out, and what has to be said about it."""
    header, rows = table(document)
    lines = [f"# {_escaped(document['title'])}", ""]
    lines += [_escaped(document["note"]), ""] if document["note"] else []
    lines += _lines(header, rows)
    lines += ["", *(f"- {_escaped(sentence)}" for sentence in sentences(document))]
    if (found := document.get("differences")) and (found["cells"] or found["left_out"]):
        lines += ["", f"## Against {_escaped(found['reference'])}", ""]
        lines += _lines(*difference_table(found)) if found["cells"] else []
        lines += ["", *(f"- {_escaped(sentence)}" for sentence in difference_sentences(found))]
    return "\n".join(lines) + "\n"


def table(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and a row for each cell; what is not there yet is a dash."""
    cells = cells_of(document)
    axes = list(dict.fromkeys(name for cell in cells for name in cell.axes))
    quoted = [metric for metric in document["metrics"] if any(metric in cell.published for cell in cells)]
    header = ["variant", *axes, "seeds", *document["metrics"], *(f"{metric} published" for metric in quoted)]
    rows = []
    for cell in cells:
        done = max((mean.seeds for mean in cell.means.values()), default=0)
        rows.append(
            [
                cell.variant,
                *(spelt(cell.axes[name]) if name in cell.axes else "–" for name in axes),
                str(done) if done == cell.planned else f"{done} of {cell.planned}",
                *(_shown(cell.means.get(metric)) for metric in document["metrics"]),
                *(f"{cell.published[metric]:.4f}" if metric in cell.published else "–" for metric in quoted),
                "–" if cell.parameters is None else f"{cell.parameters / 1e6:.2f} M",
                "–" if cell.seconds is None else duration(cell.seconds),
            ]
        )
    return [*header, "parameters", "time"], rows


def sentences(document: Mapping[str, Any]) -> list[str]:
    """What has to be said about the figures."""
    runs = document["runs"]
    done = [run for run in runs if run["state"] == "done"]
    said = [f"{len(done)} of {len(runs)} runs are done, in {duration(sum(run['seconds'] for run in done))}."]
    seeds = {mean.seeds for cell in cells_of(document) for mean in cell.means.values()}
    if seeds and max(seeds) >= 3:
        said.append("Means over seeds; ± is half of Student's 95 % interval of the mean, for three seeds or more.")
    if seeds and min(seeds) < 3:
        said.append("Fewer than three seeds have no interval: differences may be chance.")
    if len(document["splits"]) == 1:
        said.append(f"Test cases of one split, {document['splits'][0][:12]}; all items are ranked.")
    elif document["splits"]:
        short = ", ".join(split[:12] for split in document["splits"])
        said.append(f"The runs are of {len(document['splits'])} splits ({short}): compare within each alone.")
    if document["devices"]:
        said.append(f"Trained on {', '.join(document['devices'])}.")
    said += [
        f"{run['cell']}, seed {run['seed']} failed: {run['failed']['why']} ({run['folder']}/log.txt)."
        for run in runs
        if run["state"] == "failed" and run["failed"]
    ]
    return said


def difference_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and a row for each cell beside its reference; of a study's `differences`."""
    metrics = list(dict.fromkeys(metric for cell in found["cells"].values() for metric in cell["metrics"]))
    several = len({cell["against"] for cell in found["cells"].values()}) > 1
    rows = [
        [
            name,
            *([cell["against"]] if several else []),
            str(len(cell["seeds"])),
            *(_changed(cell["metrics"].get(metric), found["level"]) for metric in metrics),
        ]
        for name, cell in found["cells"].items()
    ]
    return ["variant", *(["against"] if several else []), "seeds", *metrics], rows


def difference_sentences(found: Mapping[str, Any]) -> list[str]:
    """What has to be said about a study's `differences`."""
    cells, level = found["cells"], found["level"]
    said = []
    if cells:
        said += [
            "Paired by test case, each with its mean over the seeds: the difference, its 95 % interval over users "
            "(for this figure alone), sd: the standard deviation of the seeds' own differences, and p after Holm's "
            f"correction over all {found['tests']} tests of this table, by {found['resamples']:,} resamples. "
            f"†: p below {level}.",
            "Intervals and p are about which users were sampled, and hold for these trained models: what other seeds "
            "would bring is only seen where there are several.",
        ]
    few = [name for name, cell in cells.items() if len(cell["seeds"]) < 3]
    said += [f"Of fewer than three seeds: {', '.join(few)}."] if few else []
    return said + [f"Left out: {why}" for why in found["left_out"]]


def page(document: Mapping[str, Any], curve: str | None = None) -> Page:
    """The study as one HTML file; arguments as of `write`."""
    found = Page(document["title"])
    if document["note"]:
        found.paragraph(document["note"])
    cells = [cell for cell in cells_of(document) if cell.means]
    for sentence in sentences(document):
        if " failed: " in sentence or "splits (" in sentence:
            found.finding("warning", sentence)
        elif "no interval" in sentence:
            found.finding("note", sentence)
    metric = document["metrics"][0]
    shown = [cell for cell in cells if metric in cell.means]
    if shown:
        found.heading(f"{metric} of the test")
        if curve is not None:
            _curves(found, shown, metric, curve)
        else:
            _dots(found, shown, metric)
    found.heading("All figures")
    header, rows = table(document)
    found.table(header, rows, " ".join(s for s in sentences(document) if " failed: " not in s))
    if (changes := document.get("differences")) and (changes["cells"] or changes["left_out"]):
        found.heading(f"Against {changes['reference']}")
        for why in changes["left_out"]:
            found.finding("warning", f"Left out: {why}")
        if changes["cells"]:
            _gaps(found, changes, metric)
            found.table(*difference_table(changes), " ".join(difference_sentences({**changes, "left_out": []})))
    courses = [cell for cell in cells if len(_course(cell, metric)) > 1]
    if courses:
        found.heading("Validation on the way")
        for begin in range(0, len(courses), _MOST_COURSES):
            _courses(found, courses[begin : begin + _MOST_COURSES], metric)
    return found


def _curves(page: Page, cells: Sequence[Cell], metric: str, axis: str) -> None:
    """A line for each variant and each setting of the other axes, over the numbers of one axis."""
    lines: dict[str, list[tuple[float, Mean]]] = {}
    for cell in cells:
        others = [f"{name} {spelt(value)}" for name, value in cell.axes.items() if name != axis]
        lines.setdefault(", ".join([cell.variant, *others]), []).append((float(cell.axes[axis]), cell.means[metric]))
    figure, axes = plot(4.0)
    for place, (name, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point[0])
        heights = [mean.value for _, mean in points]
        halves = [_half(mean) for _, mean in points]
        axes.errorbar([at for at, _ in points], heights, yerr=halves, capsize=3, label=name, **_style(place))
    at = sorted({point for points in lines.values() for point, _ in points})
    if at[0] > 0 and at[-1] >= 4 * at[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(at, [f"{point:g}" for point in at])
    axes.minorticks_off()
    axes.set_xlabel(axis)
    _finish(axes, metric, len(lines))
    best = [
        f"{name} is best at {axis} {point:g} ({mean.value:.4f})"
        for name, points in lines.items()
        for point, mean in [max(points, key=lambda one: (one[1].value, -one[0]))]
    ]
    page.figure(figure, f"{metric} by {axis}. " + "; ".join(best) + ".")


def _dots(page: Page, cells: Sequence[Cell], metric: str) -> None:
    """A dot for each cell with its interval, the first at the top."""
    figure, axes = plot(0.9 + 0.32 * len(cells))
    for place, cell in enumerate(cells):
        mean = cell.means[metric]
        axes.errorbar([mean.value], [place], xerr=[_half(mean)], capsize=3, color=_COLOURS[0], marker="o")
        if metric in cell.published:
            axes.plot([cell.published[metric]], [place], color=_COLOURS[1], marker="x", linestyle="none")
    axes.set_yticks(range(len(cells)), [cell.name for cell in cells])
    axes.invert_yaxis()
    axes.set_xlabel(metric)
    axes.grid(axis="x", alpha=0.3)
    best = max(cells, key=lambda cell: cell.means[metric].value)
    crosses = " A cross is what was published." if any(metric in cell.published for cell in cells) else ""
    page.figure(figure, f"Best is {best.name} with {best.means[metric].value:.4f}.{crosses}")


def _gaps(page: Page, changes: Mapping[str, Any], metric: str) -> None:
    """A dot for each cell's difference from its reference, with its paired interval and the seeds' own."""
    shown = {name: cell["metrics"][metric] for name, cell in changes["cells"].items() if metric in cell["metrics"]}
    if not shown:
        return
    figure, axes = plot(0.9 + 0.32 * len(shown))
    axes.axvline(0.0, color=_COLOURS[6], linewidth=1)
    for place, one in enumerate(shown.values()):
        low, high = one["difference interval95"]
        arms = [[max(0.0, one["difference"] - low)], [max(0.0, high - one["difference"])]]
        axes.plot(one["by_seed"], [place] * len(one["by_seed"]), color=_COLOURS[1], marker="|", linestyle="none")
        axes.errorbar([one["difference"]], [place], xerr=arms, capsize=3, color=_COLOURS[0], marker="o")
    axes.set_yticks(range(len(shown)), list(shown))
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric} minus that of {changes['reference']}")
    axes.grid(axis="x", alpha=0.3)
    clear = [name for name, one in shown.items() if one["p_holm"] < changes["level"]]
    told = f"after correction clear of which users were sampled: {', '.join(clear) or 'no difference'}"
    page.figure(figure, f"Differences in {metric}; {told}. Strokes are single seeds.")


def _courses(page: Page, cells: Sequence[Cell], metric: str) -> None:
    figure, axes = plot(4.0)
    for place, cell in enumerate(cells):
        points = _course(cell, metric)
        axes.plot(*zip(*points, strict=True), label=cell.name, **(_style(place) | {"markersize": 3}))
    axes.set_xlabel("epoch")
    _finish(axes, _validated(metric), len(cells))
    last = ", ".join(f"{cell.name} {_course(cell, metric)[-1][1]:.4f}" for cell in cells)
    page.figure(figure, f"{_validated(metric)} of validation, first seed. At the end: {last}.")


def _course(cell: Cell, metric: str) -> list[tuple[float, float]]:
    name = f"eval_{_validated(metric)}"
    return [(row["epoch"], row[name]) for row in cell.curve if name in row and "epoch" in row]


def _validated(metric: str) -> str:
    """The metric of the validation that stands for this one: trainings measure HR and NDCG at 10 and 50, over all."""
    name, _, k = metric.rpartition(" ")[2].partition("@")
    return f"{name if name in ('HR', 'NDCG') else 'NDCG'}@{50 if int(k) >= 50 else 10}"


def _style(place: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "marker": _MARKS[place % len(_MARKS)],
        "linestyle": _LINES[place // len(_COLOURS) % len(_LINES)],
    }


def _finish(axes: "Axes", label: str, lines: int) -> None:
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=2 if lines > 5 else 1)


def _half(mean: Mean) -> float:
    """Half of the interval; NaN, which is not drawn, where there is none."""
    return math.nan if mean.high is None else mean.high - mean.value


def _shown(mean: Mean | None) -> str:
    if mean is None:
        return "–"
    return f"{mean.value:.4f}" + ("" if mean.high is None else f" ± {mean.high - mean.value:.4f}")


def _changed(one: Mapping[str, Any] | None, level: float) -> str:
    if one is None:
        return "–"
    low, high = one["difference interval95"]
    spread = "" if one["sd_over_seeds"] is None else f", sd {one['sd_over_seeds']:.4f}"
    sign = " †" if one["p_holm"] < level else ""
    return f"{one['difference']:+.4f} [{low:+.4f}, {high:+.4f}]{spread}, p {one['p_holm']:.3f}{sign}"


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_escaped, header)) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]


def _escaped(text: str) -> str:
    for sign in ("\\", "|", "<", "*", "_", "`", "["):
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())
