"""The page of `llmrec layers`: which layers matter, as two or three curves with their tables."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmrec.page import Page, plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOUR, _WHOLE = "#0a63c9", "#6e7781"


def layer_page(found: Mapping[str, Any], name: str) -> Page:
    """The page of a document of `layer_curves`; `name` is the artefact's."""
    page = Page(f"Which layers matter: {name}")
    whole = found["whole"]
    page.paragraph(
        f"{found['layers']} layers, {found['cases']:,} cases of {found['users']:,} users of the {found['part']} part. "
        f"The whole model: NDCG@10 {_with_interval(whole['NDCG@10'])}, HR@10 {_with_interval(whole['HR@10'])}, loss "
        f"{_with_interval(whole['loss'])} nats per item. Differences are paired by case; intervals resample users."
    )
    page.finding("note", found["advice"])
    page.heading("Without one layer")
    drop = found["drop_one"]
    page.figure(
        _figure(drop, [one["removed"][0] for one in drop], "layer left out", whole["NDCG@10"]["mean"], joined=False),
        "NDCG@10 without each layer, from the first to the last; the line is the whole model, the bars are paired "
        "95 % intervals of the difference.",
    )
    page.table(*table_of(drop))
    for key, title in (("keep_first", "The first layers alone"), ("greedy", "Removed one after another")):
        if key not in found:
            continue
        points = found[key]
        page.heading(title)
        page.figure(
            _figure(points, [len(one["kept"]) for one in points], "layers left", whole["NDCG@10"]["mean"], True),
            "NDCG@10 by the number of layers that are left; the line is the whole model, the bars are paired 95 % "
            "intervals of the difference.",
        )
        page.table(*table_of(points))
    return page


def table_of(points: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A curve's header and rows as text."""
    header = ["left out", "layers left", "NDCG@10", "difference", "95 % interval", "HR@10", "loss", "loss difference"]
    rows = []
    for one in points:
        low, high = one["NDCG@10"]["difference interval95"]
        rows.append(
            [
                _numbers(one["removed"]),
                str(len(one["kept"])),
                f"{one['NDCG@10']['mean']:.4f}",
                f"{one['NDCG@10']['difference']:+.4f}",
                f"[{low:+.4f}, {high:+.4f}]",
                f"{one['HR@10']['mean']:.4f}",
                f"{one['loss']['mean']:.4f}",
                f"{one['loss']['difference']:+.4f}",
            ]
        )
    return header, rows


def _numbers(places: list[int]) -> str:
    """Ascending numbers, runs as ranges.

    >>> _numbers([0, 2, 3, 4, 7])
    '0, 2-4, 7'
    """
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _with_interval(metric: Mapping[str, Any]) -> str:
    low, high = metric["interval95"]
    return f"{metric['mean']:.4f} [{low:.4f}, {high:.4f}]"


def _figure(points: list[dict[str, Any]], places: list[int], label: str, whole: float, joined: bool) -> "Figure":
    figure, axes = plot()
    means = [one["NDCG@10"]["mean"] for one in points]
    bounds = [one["NDCG@10"]["difference interval95"] for one in points]
    gaps = [one["NDCG@10"]["difference"] for one in points]
    # Percentile intervals of few users need not hold the mean itself.
    below = [max(0.0, gap - low) for gap, (low, _) in zip(gaps, bounds, strict=True)]
    above = [max(0.0, high - gap) for gap, (_, high) in zip(gaps, bounds, strict=True)]
    axes.axhline(whole, color=_WHOLE, linewidth=1, linestyle="--")
    axes.errorbar(
        places, means, yerr=[below, above], fmt="o-" if joined else "o", color=_COLOUR, capsize=3, linewidth=1
    )
    axes.set_xlabel(label)
    axes.set_ylabel("NDCG@10")
    axes.set_xticks(sorted(places) if len(places) <= 24 else sorted(places)[:: len(places) // 12])
    axes.set_ylim(bottom=0)
    return figure
