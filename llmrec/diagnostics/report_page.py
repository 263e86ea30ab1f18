"""The doctor's report as a page: the verdict first, then codes, tree, collisions, neighbours, beams, comparison."""

from typing import Any

from llmrec.page import Page, plot

# Colours that can be told apart in the light, in the dark, and by those who see fewer.
_COLOURS = ("#3b82c4", "#d9822b", "#4c9f70", "#a05fb5", "#c0504d", "#8a8f98")
_KINDS = {"co_sold": "sold together", "texts": "nearest texts"}
_PAIRS = {"co_sold": "pairs sold together", "texts": "pairs of nearest texts"}


def page(report: dict[str, Any], title: str = "Semantic IDs") -> Page:
    """The page of a report.

    Args:
        report: what `llmrec.diagnostics.report.report` returned, or the same read from JSON.
        title: the page's first heading, such as the tokenizer's name.
    """
    found = Page(title)
    sizes = " × ".join(f"{size:,}" for size in report["codebook_sizes"])
    quantizer = report["source"]["quantizer"]
    found.paragraph(
        f"{report['items']:,} items with {report['levels']} code(s) each, {sizes}"
        + ("" if report["codebook_sizes_known"] else " (by the codes that occur)")
        + (f"; quantizer: {quantizer}" if quantizer else "")
        + f".\nRead from: {report['source']['name'] or report['source']['kind']}"
    )
    found.heading("Verdict")
    for finding in report["verdict"]:
        found.finding(finding["level"], f"{_capital(finding['check'])}. {finding['sentence']}")
    _usage(found, report)
    _branching(found, report)
    _collisions(found, report)
    _neighbours(found, report)
    _ceiling(found, report)
    _reconstruction(found, report)
    _others(found, report)
    return found


def _usage(found: Page, report: dict[str, Any]) -> None:
    found.heading("Use of the codes")
    found.paragraph(
        "Perplexity is how many codes, used evenly, would be as uncertain. A flat line in the plot is even use; where "
        "it falls to 0, codes are dead."
    )
    rows = [
        [
            _level(level["level"], report),
            f"{level['codebook_size']:,}",
            f"{level['used']:,}",
            _percent(level["used_share"]),
            f"{level['dead']:,}",
            f"{level['perplexity']:,.1f}",
            f"{level['entropy_bits']:.2f}",
            _percent(level["largest_share"]),
        ]
        for level in report["usage"]
    ]
    header = ["level", "codes", "used", "share", "dead", "perplexity", "bits", "items on the commonest"]
    found.table(header, rows)
    figure, axes = plot()
    for place, curve in enumerate(report["code_counts"]):
        colour = _COLOURS[place % len(_COLOURS)]
        axes.plot(curve["rank"], curve["items"], color=colour, label=f"level {place + 1}")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.set(xlabel="codes by falling number of items", ylabel="items on the code")
    told = "; ".join(
        f"level {place}: {curve['items'][0]:,} items on the commonest code, {curve['items'][-1]:,} on the rarest"
        for place, curve in enumerate(report["code_counts"], start=1)
    )
    found.figure(figure, f"{_capital(told)}.")


def _branching(found: Page, report: dict[str, Any]) -> None:
    found.heading("The tree of codes")
    found.paragraph(
        "What a beam search walks down. Bits are what a level still tells once the codes before it are known; an item "
        "is alone where no other begins like it."
    )
    rows = [
        [
            str(level["level"]),
            f"{level['prefixes']:,}",
            f"{level['children_mean']:,.1f}",
            f"{level['children_max']:,}",
            f"{level['items_mean']:,.1f}",
            f"{level['items_max']:,}",
            _percent(level["alone_share"]),
            f"{level['conditional_entropy_bits']:.2f}",
        ]
        for level in report["branching"]
    ]
    header = ["codes", "prefixes", "children, mean", "most", "items below, mean", "most", "items alone", "bits"]
    found.table(header, rows)


def _collisions(found: Page, report: dict[str, Any]) -> None:
    section = report["collisions"]
    found.heading("Items that share an ID")
    found.paragraph(
        f"{section['sharing_items']:,} items ({_percent(report['sharing_rate'])}) share their ID with another; "
        f"{_percent(report['collision_rate'])} are beyond one item per ID, and the largest group has "
        f"{section['largest_group']:,}." + _before(report["quantised"])
    )
    if section["histogram"]:
        rows = [[f"{size:,}", f"{count:,}"] for size, count in section["histogram"]]
        found.table(["items on one ID", "such IDs"], rows)
    if section["groups"]:
        rows = []
        for group in section["groups"]:
            items = [f"{item['title']} ({item['item_id']})" for item in group["items"]]
            more = group["size"] - len(items)
            items += [f"and {more:,} more"] if more else []
            rows.append([" ".join(map(str, group["code"])), f"{group['size']:,}", "; ".join(items)])
        found.table(["code", "items", "which"], rows, f"The {len(rows)} largest groups.")


def _before(section: dict[str, Any] | None) -> str:
    if section is None or section.get("sharing_rate") is None:
        return ""
    told = (
        f"\nAs quantised, {_percent(section['sharing_rate'])} shared one ({_percent(section['collision_rate'])} were "
        f"beyond one item per ID, the largest group had {section['largest_group']:,})"
    )
    if section["policy"]:
        told += f"; then: {section['policy']}"
    if section["moved_items"]:
        told += f", {section['moved_items']:,} items moved"
        told += f", squared error + {_percent(section['added_share'])}" if section["added_share"] is not None else ""
    return told + "."


def _neighbours(found: Page, report: dict[str, Any]) -> None:
    known = {kind: rows for kind, rows in report["neighbours"].items() if rows}
    if not known:
        return
    found.heading("Neighbours")
    found.paragraph(
        "Whether items that belong together begin alike: of all pairs of an item and one of its nearest, the share "
        "with the same first codes. Unique IDs end at 0."
    )
    rows = [
        [
            _KINDS[kind],
            str(row["prefix"]),
            _optional_percent(row["purity"]),
            "–" if row["interval95"] is None else " to ".join(_percent(end) for end in row["interval95"]),
            _optional_percent(row["chance"]),
            "–" if row["lift"] is None else f"{row['lift']:,.1f}",
            f"{row['pairs']:,}",
        ]
        for kind, lengths in known.items()
        for row in lengths
    ]
    found.table(["items", "codes", "alike", "95 % interval", "by chance", "lift", "pairs"], rows)
    figure, axes = plot()
    for kind, colour in zip(known, _COLOURS, strict=False):
        lengths = [row for row in known[kind] if row["purity"] is not None]
        prefixes = [row["prefix"] for row in lengths]
        axes.plot(prefixes, [100 * row["purity"] for row in lengths], marker="o", color=colour, label=_KINDS[kind])
        chance = [100 * row["chance"] for row in lengths]
        axes.plot(prefixes, chance, linestyle="--", color=colour, label=f"{_KINDS[kind]}, by chance")
    axes.set_xticks(range(1, report["levels"] + 1))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.set(xlabel="first codes", ylabel="pairs that have the same (%)")
    told = [
        f"{_percent(rows[0]['purity'])} of the {_PAIRS[kind]} have the same first code, by chance "
        f"{_percent(rows[0]['chance'])}"
        for kind, rows in known.items()
        if rows[0]["purity"] is not None
    ]
    found.figure(figure, "; ".join(told) + ".")


def _ceiling(found: Page, report: dict[str, Any]) -> None:
    section = report["ceiling"]
    found.heading("What sharing and beams cost")
    of_test = "the test's targets, without what their users had before"
    basis = of_test if section["basis"] == "test targets" else "all items alike"
    found.paragraph(
        "Items of one ID are in random order to any model that writes IDs: the table is what a perfect one reaches, "
        f"over {basis}. A beam search loses an item whose first codes are not among the best; how often "
        "depends on the model, too, so the plot says what beams keep of the best of one reference, beside random "
        "codes of the same sizes. It bounds no model: of a surer one the same beams keep more."
    )
    if section["collision"] is not None:
        ks = sorted({int(name.partition("@")[2]) for name in section["collision"]})
        rows = [
            [str(k), f"{section['collision'][f'HR@{k}']:.4f}", f"{section['collision'][f'NDCG@{k}']:.4f}"] for k in ks
        ]
        found.table(["k", "HR at most", "NDCG at most"], rows)
    beam = section["beam"]
    recall = [] if beam is None else [(int(w), share) for w, share in beam["recall"].items() if share is not None]
    if not recall:
        return
    recall.sort()
    figure, axes = plot()
    widths = [width for width, _ in recall]
    axes.plot(widths, [100 * share for _, share in recall], marker="o", color=_COLOURS[0], label="of the best items")
    mass = [100 * beam["kept_mass"][str(width)] for width in widths]
    axes.plot(widths, mass, marker="o", color=_COLOURS[1], label="of the probability")
    control = section.get("beam_random")
    random = {} if control is None else {int(width): share for width, share in control["recall"].items()}
    if random:
        shares = [100 * random[width] for width in widths]
        axes.plot(widths, shares, linestyle="--", color=_COLOURS[5], label="of the best items, random codes")
    axes.set_xticks(widths)
    axes.set_ylim(0, 102)
    axes.legend(frameon=False)
    axes.set(xlabel="beams", ylabel="kept (%)")
    told = ", ".join(f"{_percent(share)} with {width}" for width, share in recall)
    told_random = ", ".join(f"{_percent(random[width])} with {width}" for width in widths if width in random)
    found.figure(
        figure,
        f"Of the {section['k']} best items of {section['reference']}, a beam search keeps {told} beams "
        f"({beam['cases']:,} test histories)"
        + (f"; through random codes of these sizes {told_random} beams." if random else "."),
    )


def _reconstruction(found: Page, report: dict[str, Any]) -> None:
    section = report["reconstruction"]
    if section is None:
        return
    found.heading("Reconstruction")
    found.paragraph("How near the codes' points are to the vectors; a relative error of 1 is one point for all items.")
    rows = [
        ["mean squared error", f"{section['mse']:.5g}"],
        ["relative error", "–" if section["relative"] is None else f"{section['relative']:.4f}"],
        ["mean cosine", "–" if section["cosine"] is None else f"{section['cosine']:.4f}"],
    ]
    rows += [
        [f"relative error after {level} code(s)", f"{error:.4f}"]
        for level, error in enumerate(section["per_level"], start=1)
    ]
    found.table(["what", "value"], rows)


def _others(found: Page, report: dict[str, Any]) -> None:
    if not report["others"]:
        return
    found.heading("Beside other tokenizers")
    found.paragraph(
        "Each pair of rows is on the items that both have. Few first codes put more neighbours together by chance "
        "alone: read purity beside its lift."
    )
    rows = []
    for other in report["others"]:
        shared = f"{other['shared_items']:,}"
        if other["other"] is None:
            rows.append([other["name"], shared, *[""] * 7])
            continue
        rows.append([other["name"], shared, *_headline(other["other"])])
        rows.append(["these", shared, *_headline(other["these"])])
    header = ["tokenizer", "items", "codes", "sharing an ID", "dead codes", "perplexity"]
    found.table([*header, "neighbours' first code alike", "lift", "kept by 20 beams"], rows)


def _headline(figures: dict[str, Any]) -> list[str]:
    beam = figures["beam"]
    return [
        " × ".join(f"{size:,}" for size in figures["codebook_sizes"]),
        _percent(figures["sharing_rate"]),
        " ".join(f"{dead:,}" for dead in figures["dead_codes"]),
        " ".join(f"{perplexity:,.0f}" for perplexity in figures["perplexity"]),
        _optional_percent(figures["neighbour_purity"]),
        "–" if figures["neighbour_lift"] is None else f"{figures['neighbour_lift']:,.1f}",
        "–" if beam is None else _optional_percent(beam["recall"].get("20")),
    ]


def _level(level: int, report: dict[str, Any]) -> str:
    return str(level) if level <= report["quantised_levels"] else f"{level} (appended)"


def _optional_percent(share: float | None) -> str:
    return "–" if share is None else _percent(share)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.01 or not share else f"{100 * share:.2g} %"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
