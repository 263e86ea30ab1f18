"""The comparison card: what `compare` found, as Markdown, as an HTML page, and as JSON.

The three hold the same numbers. Names of systems, folders and settings come from files and are escaped.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmrec.page import Page
from llmrec.storage import atomic_path, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Card = Mapping[str, Any]

BETTER, WORSE = "▲", "▼"
_NONE = "–"
_TITLE = "Comparison card"
# Cells made of nothing but numbers and signs; anything else may have come from a file.
_PLAIN = re.compile(r"^[-+−±0-9., %\[\]▲▼–p=e]*$")


class CardTable(NamedTuple):
    """One table of the card; every row has a cell per column."""

    title: str
    header: list[str]
    rows: list[list[str]]
    caption: str


def write_card(card: Card, folder: str | Path) -> list[Path]:
    """Writes card.json, card.md and card.html into the folder, each whole or not at all; returns their paths."""
    paths = [Path(folder) / f"card.{suffix}" for suffix in ("json", "md", "html")]
    write_json(paths[0], dict(card))
    with atomic_path(paths[1]) as temporary:
        temporary.write_text(markdown(card), encoding="utf-8")
    page(card).write(paths[2])
    return paths


def markdown(card: Card) -> str:
    """The card in GitHub's Markdown."""
    lines = [f"# {_TITLE}", "", _escaped(summary(card)), ""]
    for table in tables(card):
        lines += [f"## {table.title}", "", _escaped(table.caption), ""]
        lines.append("| " + " | ".join(_escaped(cell) for cell in table.header) + " |")
        lines.append("|---" * len(table.header) + "|")
        lines += ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in table.rows]
        lines.append("")
    lines += ["## Notes", "", *(f"- {_escaped(note)}" for note in _notes(card)), ""]
    return "\n".join(lines)


def page(card: Card) -> Page:
    """The card as a page, with a forest plot of the primary metric."""
    made = Page(_TITLE)
    made.paragraph(summary(card))
    first, *others = tables(card)
    made.heading(first.title)
    made.table(first.header, first.rows, first.caption)
    best = card["systems"][0]
    found = best["metrics"][card["primary"]]
    made.figure(
        forest(card),
        f"{card['primary']} and its 95 % interval over users, the best system first ({best['name']}: "
        f"{_interval(found['mean'], found['interval95'])}). The dotted line is the reference, {card['reference']}; "
        "a filled point differs from it significantly.",
    )
    for table in others:
        made.heading(table.title)
        made.table(table.header, table.rows, table.caption)
    made.heading("Notes")
    for note in _notes(card):
        made.finding("note", note)
    return made


def summary(card: Card) -> str:
    """The card's first sentences: what was compared, on what, and which system leads."""
    best, primary = card["systems"][0], card["primary"]
    found = best["metrics"][primary]
    text = (
        f"{_count(len(card['systems']), 'system')} on the {card['part']} part of the split {card['split'][:12]} "
        f"({card['protocol'].get('split', 'unknown')}): {_count(card['users'], 'user')}, "
        f"{_count(card['cases'], 'case')}, {_count(card['items'], 'item')}, ranked in full. "
        f"{best['name']} has the highest {primary}, {_interval(found['mean'], found['interval95'])}."
    )
    if card["cases_kept_apart"]:
        text += f" {_count(card['cases_kept_apart'], 'case')} of users or items unseen in training are kept apart."
    return text


def tables(card: Card) -> list[CardTable]:
    """The card's tables, the main one first."""
    return [
        _main(card),
        *([_differences(card)] if card["tests"] else []),
        *([_id_level(card)] if any(system["id_level"] for system in card["systems"]) else []),
        *([_slices(card)] if card["systems"][0]["slices"] else []),
        _beyond(card),
        _costs(card),
        _origins(card),
        _facts(card),
    ]


def forest(card: Card) -> "Figure":
    """A point and an interval per system for the primary metric, the best system on top."""
    from matplotlib.figure import Figure

    systems, primary = card["systems"], card["primary"]
    figure = Figure(figsize=(7.0, 1.0 + 0.36 * len(systems)), layout="constrained")
    axes = figure.add_subplot()
    for place, system in enumerate(systems):
        found = system["metrics"][primary]
        low, high = found["interval95"]
        axes.plot([low, high], [place, place], color="#0a63c9", linewidth=2)
        filled = "#0a63c9" if found.get("significant") else "#ffffff"
        axes.plot(found["mean"], place, "o", color="#0a63c9", markerfacecolor=filled, markersize=7)
        if system["name"] == card["reference"]:
            axes.axvline(found["mean"], color="#000000", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(systems)), [_short(system["name"]) for system in systems])
    axes.set_ylim(len(systems) - 0.5, -0.5)
    axes.set_xlabel(primary)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _main(card: Card) -> CardTable:
    rows = []
    for system in card["systems"]:
        cells = []
        for metric in card["metrics"]:
            found = system["metrics"][metric]
            cell = _interval(found["mean"], found["interval95"], found["sd_over_seeds"])
            if found.get("significant"):
                cell += f" {BETTER if found['difference'] > 0 else WORSE}"
            cells.append(cell)
        rows.append([_named(card, system), _seeds(system), *cells])
    caption = (
        f"Mean [95 % interval, bootstrap over users, {card['resamples']} resamples]; ± is the standard deviation over "
        "seeds, where there are several. Hits are counted on items."
    )
    if card["tests"]:
        caption += (
            f" {BETTER} above and {WORSE} below {card['reference']}: paired difference over the same users, "
            f"p < {card['level']} after Holm's correction for {_count(card['tests'], 'test')}."
        )
    return CardTable("Systems", ["system", "seeds", *card["metrics"]], rows, caption)


def _differences(card: Card) -> CardTable:
    rows = []
    for system in card["systems"]:
        if system["name"] == card["reference"]:
            continue
        cells = []
        for metric in card["metrics"]:
            found = system["metrics"][metric]
            low, high = found["difference interval95"]
            cells.append(f"{found['difference']:+.4f} [{low:+.4f}, {high:+.4f}] p={found['p_holm']:.2g}")
        rows.append([system["name"], *cells])
    caption = (
        "System minus reference, paired over users, with 95 % intervals (not corrected) and p-values (Holm-corrected)."
    )
    return CardTable(f"Difference from {card['reference']}", ["system", *card["metrics"]], rows, caption)


def _id_level(card: Card) -> CardTable:
    rows = []
    for system in card["systems"]:
        for metric, found in system["id_level"].items():
            bounds = found["inflation interval95"]
            inflation = _number(found["inflation"])
            if bounds:
                inflation += f" [{bounds[0]:.4f}, {bounds[1]:.4f}]"
            levels = (_number(found["item_level"]), _number(found["id_level"]), inflation, _number(found["ratio"]))
            rows.append([system["name"], metric, *levels])
    caption = (
        "The same rankings, read by semantic IDs: a hit if any item of the target's ID is meant. Where items share an "
        "ID, this is no number about items and cannot stand beside one; many papers print it."
    )
    header = ["system", "metric", "item level", "ID level", "difference", "ratio"]
    return CardTable("ID level beside item level", header, rows, caption)


def _slices(card: Card) -> CardTable:
    systems, primary = card["systems"], card["primary"]
    rows = []
    for name, slice_ in systems[0]["slices"].items():
        cells = [
            _interval(system["slices"][name][primary], system["slices"][name][f"{primary} interval95"])
            for system in systems
        ]
        rows.append([name, f"{slice_['cases']:,}", f"{100 * slice_['share']:.1f} %", *cells])
    header = ["slice", "cases", "share", *(system["name"] for system in systems)]
    caption = f"{primary} [95 % interval] of parts of the cases, tested nowhere: many slices make chance finds likely."
    return CardTable("Slices", header, rows, caption)


def _beyond(card: Card) -> CardTable:
    """Rates, and what lists look like at one cut-off: the primary metric's, if it is there."""
    cut = card["primary"].partition("@")[2]
    keys = list(dict.fromkeys(key for system in card["systems"] for key in system["beyond"]))
    at_cut = [key for key in keys if key.endswith(f"@{cut}")]
    kept = [key for key in keys if "@" not in key or key in at_cut or not at_cut]
    rows = [[system["name"], *(_number(system["beyond"].get(key)) for key in kept)] for system in card["systems"]]
    caption = (
        "Coverage: share of the catalog that is recommended to anyone. Gini: 0 if all items are recommended equally "
        "often. Novelty: mean of -log2 of the items' training share. Rates: slots without an item, slots that repeat "
        "one, cases whose target the list does not hold (misses)."
    )
    labels = [key.replace("_", " ") for key in kept]
    return CardTable("Beyond accuracy", ["system", *labels], rows, caption)


def _costs(card: Card) -> CardTable:
    columns = {
        "fit_seconds": "training, s",
        "parameters": "parameters",
        "ms_per_request": "ms per request",
        "device": "device",
    }
    extra = dict.fromkeys(key for system in card["systems"] for key in system["cost"] if key not in columns)
    names = {**columns, **{key: key.replace("_", " ") for key in extra}}
    rows = [[system["name"], *(_amount(system["cost"].get(key)) for key in names)] for system in card["systems"]]
    caption = (
        "As the evaluations measured them, means over seeds; requests were answered in batches. Compare times of one "
        "machine alone."
    )
    return CardTable("Cost", ["system", *names.values()], rows, caption)


def _origins(card: Card) -> CardTable:
    rows = [
        [
            system["name"],
            _spelt(system["seeds"][0]) if len(system["seeds"]) == 1 else _spelt(system["seeds"]),
            _spelt(system["settings"]),
            ", ".join(f"{package} {version}" for package, version in system["versions"].items()) or _NONE,
            ", ".join(commit[:12] for commit in system["commits"]) or _NONE,
            ", ".join(system["runs"]),
        ]
        for system in card["systems"]
    ]
    header = ["system", "seeds", "settings", "versions", "commit", "run folders"]
    return CardTable("Where the numbers come from", header, rows, "Settings are those of the first run of a system.")


def _facts(card: Card) -> CardTable:
    rows = [
        ["split", card["split"]],
        ["protocol", _spelt(card["protocol"])],
        ["part", card["part"]],
        ["users", f"{card['users']:,}"],
        ["cases", f"{card['cases']:,}"],
        ["cases kept apart", f"{card['cases_kept_apart']:,}"],
        ["items", f"{card['items']:,}"],
        ["candidates", "all items but the history's" if card["exclude_seen"] else "all items"],
        [
            "ties",
            "; ".join(sorted({str(system["ties"]) for system in card["systems"]}))
            + " (as listed: by the system's own rule; expected: the mean over all orders)",
        ],
        ["bootstrap", f"{card['resamples']:,} resamples of users, seed {card['seed']}"],
    ]
    return CardTable("What was compared", ["what", "value"], rows, "The same for every system.")


def _notes(card: Card) -> Sequence[str]:
    return card["notes"] or ["Nothing else has to be said."]


def _named(card: Card, system: Card) -> str:
    return f"{system['name']} (reference)" if system["name"] == card["reference"] and card["tests"] else system["name"]


def _seeds(system: Card) -> str:
    return "one seed" if len(system["seeds"]) == 1 else f"{len(system['seeds'])} seeds"


def _interval(mean: float, interval: Sequence[float], deviation: float | None = None) -> str:
    spread = "" if deviation is None else f" ± {deviation:.4f}"
    return f"{mean:.4f}{spread} [{interval[0]:.4f}, {interval[1]:.4f}]"


def _number(value: Any) -> str:
    return _NONE if value is None else f"{value:.4f}" if isinstance(value, int | float) else str(value)


def _amount(value: Any) -> str:
    """A quantity in four significant digits, never in powers of ten; whole numbers as they are."""
    if value is None:
        return _NONE
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 0.0001 else f"{value:.1g}"
    return str(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _spelt(value: Any) -> str:
    """A JSON value on one line; a mapping without its braces."""
    if not value:
        return _NONE
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {json.dumps(one, ensure_ascii=False)}" for key, one in value.items())
    if isinstance(value, list):
        return "; ".join(_spelt(one) for one in value)
    return str(value)


def _short(name: str, longest: int = 40) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line, also inside a table."""
    line = " ".join(text.split())
    if _PLAIN.match(line):
        return line
    return re.sub(r"([\\`*\[\]|~$])", r"\\\1", html.escape(line, quote=False))
