"""The work of `llmrec data`: reads what the user brought, calls the library, writes files, and says what was found."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrec.cli.observed import observed
from llmrec.data.arguments import SplitArguments
from llmrec.data.cases import write_split
from llmrec.data.cleaning import CleaningReport
from llmrec.data.cleaning import clean as clean_all
from llmrec.data.columns import ITEM, TIMESTAMP, USER, ColumnNames
from llmrec.data.flaws import find_flaws
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.table import open_table
from llmrec.data.timestamps import TimestampUnit
from llmrec.exceptions import DataError
from llmrec.storage import write_json

_CLOCK = (315_532_800, 4_102_444_800)  # 1980 to 2100 in unix seconds: a number outside is no time, but an order's
_SIGNS = {"ok": ("ok", "green"), "note": ("note", "blue"), "warning": ("warning", "bold yellow")}


@dataclass(frozen=True)
class Sources:
    """What the user brought, and how it is read.

    Attributes:
        interactions: a path or a Hub id.
        items: likewise, or None for ids alone.
        names: what the files call their columns.
        timestamp_unit: of the interactions.
        invalid_rows: what happens to rows that cannot be used.
    """

    interactions: str
    items: str | None
    names: ColumnNames
    timestamp_unit: TimestampUnit
    invalid_rows: Literal["error", "drop"]

    def read_interactions(self) -> Interactions:
        """The log."""
        return Interactions.read(self.interactions, self.names, self.timestamp_unit, self.invalid_rows)

    def read_pairs(self, source: str) -> Interactions:
        """Users and items of another log, which calls them as this one does, or else by their canonical names."""
        columns = open_table(source).columns
        chosen = {USER: self.names.user, ITEM: self.names.item}
        user, item = (
            name if {name, name.split(":")[0]} & set(columns) else canonical for canonical, name in chosen.items()
        )
        pairs = ColumnNames(user, item, timestamp="", position="", rating="", action="", domain="", weight="")
        return Interactions.read(source, pairs, invalid=self.invalid_rows)

    def read_items(self, interactions: Interactions) -> Items:
        """The table, or where there is none the ids of the interactions; with a row for every item of those."""
        if self.items is None:
            return Items.from_interactions(interactions)
        return Items.read(self.items, self.names, self.invalid_rows).with_missing(interactions)


def clean(sources: Sources, out: Path, json_file: Path | None, **settings: Any) -> None:
    """Reads, cleans, writes interactions.parquet, items.parquet and, last, cleaning.json; prints the account.

    Raises:
        DataError: if the sources cannot be read, the settings leave nothing, or the folder cannot be written.
    """
    console = _console()
    with observed() as announce:
        announce("reading", None)
        interactions = sources.read_interactions()
        flaws = None
        if sources.items is None:
            # A table made of the log's ids has no rows of its own to keep.
            items = Items.from_interactions(interactions)
            settings["unused_items"] = "drop"
        else:
            frame, source = open_table(sources.items).read()
            items = Items.from_frame(frame, sources.names, source.name, sources.invalid_rows)
            flaws = find_flaws(frame, sources.names, source)
        interactions, items, report = clean_all(
            interactions, items, flaws=flaws, **settings, announce=lambda step: announce(step, None)
        )
        announce("writing", None)
        with _writing():
            out.mkdir(parents=True, exist_ok=True)
            # Until the end, the folder's files may be of two runs, and there is no account of them.
            (out / "cleaning.json").unlink(missing_ok=True)
            interactions.write(out / "interactions.parquet")
            items.write(out / "items.parquet")
            for file in {out / "cleaning.json", json_file or out / "cleaning.json"}:
                write_json(file, report.document())
    console.print(_account(report))
    for part, reasons in report.left_out.items():
        for reason, count in reasons.items():
            _say(console, f"  reading left out {count:,} row(s) of {part}: {reason}")
    for step in report.steps:
        for name, count in step.notes.items():
            if count and name != "passes":
                _say(console, f"  {step.name}: {count:,} {name.replace('_', ' ')}")
    _say(console, f"{out}: interactions.parquet, items.parquet, cleaning.json")


def convert(
    source: str,
    out: Path,
    kind: Literal["interactions", "items"],
    names: ColumnNames,
    timestamp_unit: TimestampUnit,
    invalid_rows: Literal["error", "drop"],
) -> None:
    """Writes a source as canonical parquet, and says which columns, unit and rows it held.

    Raises:
        DataError: if it cannot be read, or the file cannot be written.
    """
    console = _console()
    with observed() as announce:
        announce("reading", None)
        table = open_table(source)
        if kind == "interactions":
            interactions = Interactions.read(source, names, timestamp_unit, invalid_rows)
            frame = interactions.frame
        else:
            items = Items.read(source, names, invalid_rows)
            frame = items.frame
        announce("writing", None)
        with _writing():
            interactions.write(out) if kind == "interactions" else items.write(out)
    _say(console, f"{table.name} ({table.kind}) has the columns {', '.join(table.columns)}")
    console.print(_columns(frame))
    if kind == "interactions":
        counts = (
            f"{len(frame):,} interactions of {frame[USER].n_unique():,} users with {frame[ITEM].n_unique():,} items"
        )
        _say(console, f"{out}: {counts}, {_span(interactions)}")
    else:
        _say(console, f"{out}: {len(frame):,} items, {items.missing_titles:,} of them without a title")


def merge(
    logs: Sequence[str],
    tables: Sequence[str],
    out: Path,
    json_file: Path | None,
    names: ColumnNames,
    timestamp_unit: TimestampUnit,
    invalid_rows: Literal["error", "drop"],
) -> None:
    """Merges the logs of several domains, and writes interactions.parquet, items.parquet and, last, merging.json.

    Raises:
        DataError: if the sources cannot be read, do not fit together, or the files cannot be written.
    """
    from llmrec.data.merging import merge as merge_all

    console = _console()
    with observed() as announce:
        announce("reading", None)
        interactions, items, report = merge_all(
            {
                name: Interactions.read(source, names, timestamp_unit, invalid_rows)
                for name, source in _named(logs).items()
            },
            {name: Items.read(source, names, invalid_rows) for name, source in _named(tables).items()},
        )
        announce("writing", None)
        with _writing():
            out.mkdir(parents=True, exist_ok=True)
            (out / "merging.json").unlink(missing_ok=True)
            interactions.write(out / "interactions.parquet")
            items.write(out / "items.parquet")
            for file in {out / "merging.json", json_file or out / "merging.json"}:
                write_json(file, asdict(report))
    for name in report.interactions:
        counts = f"{report.users[name]:,} users, {report.items[name]:,} items"
        _say(console, f"{name}: {report.interactions[name]:,} interactions, {counts}")
    _say(
        console,
        f"{report.shared_users:,} users of several domains: {report.merged_users:,} in one sequence by time, "
        f"{report.separated_users:,} as one user per domain; {report.renamed_items:,} item ids renamed",
    )
    _say(console, f"{out}: interactions.parquet ({report.rows:,} rows), items.parquet, merging.json")


def split(sources: Sources, arguments: SplitArguments, out: Path, json_file: Path | None) -> None:
    """Splits, and writes train.parquet, valid.parquet, test.parquet and, last, split.json.

    Raises:
        DataError: if the sources cannot be read, cannot be split so, or the files cannot be written.
    """
    console = _console()
    with observed() as announce:
        announce("reading", None)
        interactions = sources.read_interactions()
        items = sources.read_items(interactions)
        announce("splitting", None)
        made = arguments.make(interactions, items)
        with _writing():
            write_split(made, out, announce)
            document = json.loads((out / "split.json").read_text(encoding="utf-8"))
            if json_file is not None:
                write_json(json_file, document)
    console.print(_pairs(document["protocol"] | document["counts"], bool(made.clock)))
    _say(console, f"content hash {made.content_hash}")
    _say(console, f"{out}: train.parquet, valid.parquet, test.parquet, split.json")


def report(
    sources: Sources,
    arguments: SplitArguments,
    seed: int,
    seen: str | None,
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    """Makes the data report, writes the files asked for, and prints its findings.

    Raises:
        DataError: if the sources cannot be read, cannot be split so, or the files cannot be written.
    """
    from llmrec.data.report import report as examine
    from llmrec.data.report_page import page

    console = _console()
    with observed() as announce:
        announce("reading", None)
        interactions = sources.read_interactions()
        items = sources.read_items(interactions)
        other = None if seen is None else sources.read_pairs(seen)
        announce("splitting", None)
        made = arguments.make(interactions, items)
        announce("looking", None)
        found = examine(interactions, items, made, seed=seed, seen=other)
        announce("writing", None)
        with _writing():
            if json_file is not None:
                write_json(json_file, found)
            if html_file is not None:
                page(found).write(html_file)
    console.print(_pairs(found["counts"]))
    console.print(_findings(found["findings"]))
    for file in (json_file, html_file):
        if file is not None:
            _say(console, str(file))


def _named(pairs: Sequence[str]) -> dict[str, str]:
    """`NAME=SOURCE` arguments; raises DataError for one that is none, or a name that comes twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, sign, source = pair.partition("=")
        if not (name and sign and source):
            raise DataError(f"{pair!r} is no NAME=SOURCE. Write such as beauty=beauty.csv.")
        if name in found:
            raise DataError(f"The domain {name!r} is given twice. Give each a name of its own.")
        found[name] = source
    return found


@contextmanager
def _writing() -> Iterator[None]:
    """Turns what the file system refuses into a DataError that names the path."""
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        # Of two names, as of a renaming, the second is the one that was asked for.
        path = error.filename2 or error.filename
        raise DataError(f"{path} cannot be written: {error.strerror}. Name another file or folder.") from error


def _account(report: CleaningReport) -> Table:
    """One line per step that was asked for: what it removed, and what is left."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("step", "round"):
        table.add_column(name)
    for name in ("interactions", "users", "items", "item table"):
        table.add_column(name, justify="right")
    parts = ("interactions", "users", "items", "table")
    table.add_row("as it came", "", *(f"{report.before[part]:,}" for part in parts))
    for step in report.steps:
        asked = ", ".join(str(value) for value in step.settings.values())
        name = f"{step.name} ({asked})" if asked else step.name
        table.add_row(
            name, str(step.round), *(f"{-step.removed[part]:+,}" if step.removed[part] else "" for part in parts)
        )
    table.add_row("left", "", *(f"{report.after[part]:,}" for part in parts), style="bold")
    return table


def _columns(frame: pl.DataFrame) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("column", "type", "filled", "first"):
        table.add_column(name, justify="right" if name == "filled" else "left", no_wrap=name == "first")
    for name in frame.columns:
        values = frame[name]
        first = str(values[0])
        shown = first if len(first) <= 40 else first[:39] + "…"
        table.add_row(Text(name), Text(str(values.dtype)), f"{len(values) - values.null_count():,}", Text(shown))
    return table


def _pairs(values: dict[str, Any], clock: bool = False) -> Table:
    """Names and what they stand for, times as dates if they are a clock's; other values stay in the file."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("name")
    table.add_column("value", justify="right")
    for name, value in values.items():
        if not isinstance(value, str | int | float):
            continue
        if clock and name.endswith("_time") and not isinstance(value, str) and _CLOCK[0] <= value < _CLOCK[1]:
            shown = datetime.fromtimestamp(value, UTC).isoformat(timespec="seconds")
        elif isinstance(value, float):
            shown = f"{value:,.6g}"
        else:
            shown = value if isinstance(value, str) else f"{value:,}"
        table.add_row(Text(name.replace("_", " ")), Text(shown))
    return table


def _findings(findings: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        sign, style = _SIGNS[finding["level"]]
        table.add_row(Text(sign, style=style), Text(finding["sentence"]))
    return table


def _span(interactions: Interactions) -> str:
    """From which time to which, and in which unit the source had them."""
    if TIMESTAMP not in interactions.frame.columns:
        return "without times"
    times = interactions.frame[TIMESTAMP]
    first, last = times.min(), times.max()
    assert isinstance(first, int | float)
    assert isinstance(last, int | float)
    if interactions.time_unit == "order":
        return f"ordered by the numbers {first:,} to {last:,}"
    days = (datetime.fromtimestamp(moment, UTC).date().isoformat() for moment in (first, last))
    unknown = f", {times.null_count():,} times unknown" if times.null_count() else ""
    return "from {} to {}".format(*days) + f" (times in {interactions.time_unit}){unknown}"


def _console() -> Console:
    # Where nobody watches, lines are as long as they are: a log is searched, not read column by column.
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
