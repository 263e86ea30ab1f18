"""`llmrec ids`: a semantic ID tokenizer's report, and the versions of a living catalog."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmrec.exceptions import CatalogError

if TYPE_CHECKING:
    from llmrec.catalog_versions import CatalogVersions

app = typer.Typer(
    help="Semantic IDs: a report on their health; items added, retired, restored; versions and the way back.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
# What these two commands do not name is the stage's own, such as the files' columns and the split.
_STAGE = {"ignore_unknown_options": True, "allow_extra_args": True}

CatalogFolder = Annotated[Path, typer.Argument(help="An artefact folder, or one that semantic_ids/build.py wrote.")]
Names = Annotated[list[str] | None, typer.Argument(help="Item ids.")]
FromFile = Annotated[Path | None, typer.Option("--file", metavar="FILE", help="More item ids, one a line.")]
Note = Annotated[str, typer.Option(help="For the log.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command(context_settings=_STAGE)
def report(
    context: typer.Context,
    ids: Annotated[str, typer.Argument(help="Artefact, its Hub id, a built folder, or a JSON file: item to tokens.")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots here.")] = None,
    interactions: Annotated[str | None, typer.Option(help="A log: what sells together, and test cases.")] = None,
    items: Annotated[str | None, typer.Option(help="The table of items, for their titles.")] = None,
    embeddings: Annotated[Path | None, typer.Option(help="What semantic_ids/embed.py wrote: nearest texts.")] = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="Other tables of semantic IDs to compare with; repeatable.")
    ] = None,
) -> None:
    """Look a tokenizer over: use of codes, collisions, branching, purity, what beams keep, and a verdict in words.

    Example: `llmrec ids report runs/quickstart/artefact --interactions log.parquet --json ids.json --html ids.html`

    Example: `llmrec ids report published_ids.json.gz --interactions log.csv --against runs/quickstart/semantic_ids`
    """
    from llmrec.cli.run import run_stage

    options = {"--json": json_file, "--html": html, "--interactions": interactions, "--items": items}
    options |= {"--embeddings": embeddings}
    named = [part for flag, value in options.items() if value is not None for part in (flag, str(value))]
    others = ["--against", *map(str, against)] if against else []
    run_stage("semantic_ids/report.py", ["--ids", ids, *named, *others, *context.args])


@app.command(context_settings=_STAGE)
def assign(
    context: typer.Context,
    catalog: CatalogFolder,
    items: Annotated[str, typer.Option(help="The table of new items: parquet, csv, tsv, jsonl, ….")],
    embeddings: Annotated[
        Path | None, typer.Option(help="What semantic_ids/embed.py wrote for them; default: embed them now.")
    ] = None,
    note: Note = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here.")] = None,
) -> None:
    """Give new items codes from the frozen codebooks; a new version of the catalog, in which no old item changes.

    Where items are spelt as their titles, new ones are spelt by the artefact's tokenizer, and nothing is embedded.

    Example: `llmrec ids assign runs/quickstart/artefact --items new_items.jsonl`
    """
    from llmrec.cli.run import run_stage

    options = {"--embeddings": embeddings, "--note": note or None, "--json": json_file}
    named = [part for flag, value in options.items() if value is not None for part in (flag, str(value))]
    switches = ["--dry_run"] if dry_run else []
    run_stage(
        "semantic_ids/assign.py", ["--catalog", str(catalog), "--items", items, *named, *switches, *context.args]
    )


@app.command()
def retire(catalog: CatalogFolder, item_ids: Names = None, file: FromFile = None, note: Note = "") -> None:
    """Take items out of what is recommended; they keep their codes, and histories may name them.

    Example: `llmrec ids retire runs/quickstart/artefact P00376 P00064 --note "sold out"`
    """
    versions = _versions(catalog)
    _told(versions, versions.retire(_asked(item_ids, file), note))


@app.command()
def restore(catalog: CatalogFolder, item_ids: Names = None, file: FromFile = None, note: Note = "") -> None:
    """Bring retired items back, under the codes that they had.

    Example: `llmrec ids restore runs/quickstart/artefact P00376`
    """
    versions = _versions(catalog)
    _told(versions, versions.restore(_asked(item_ids, file), note))


@app.command()
def rollback(
    catalog: CatalogFolder,
    to: Annotated[str | None, typer.Option(metavar="VERSION", help="Default: the current one's parent.")] = None,
) -> None:
    """Make an earlier version of the catalog current again; nothing is lost, and one can go forth in the same way.

    Example: `llmrec ids rollback runs/quickstart/artefact`
    """
    versions = _versions(catalog)
    _told(versions, versions.rollback(to))


@app.command()
def log(catalog: CatalogFolder, as_json: AsJson = False) -> None:
    """List the catalog's versions: what each changed of its parent, and which is current.

    Example: `llmrec ids log runs/quickstart/artefact`
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    versions = _versions(catalog)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if as_json:
        console.print_json(json.dumps({"versions": versions.log(), "moves": versions.moves()}))
        return
    table = Table("", box=None, pad_edge=False)
    for name in ("version", "made (UTC)", "items", "live", "change"):
        table.add_column(name, no_wrap=True)
    table.add_column("note", overflow="fold")
    for row in versions.log():
        mark = "*" if row["current"] else ""
        if row["damaged"]:
            table.add_row(mark, row["version"], "", "", "", "damaged", Text(row["damaged"]))
            continue
        counts = {"+": row["added"], "-": len(row["retired"]), "back ": len(row["restored"])}
        change = " ".join(f"{sign}{count:,}" for sign, count in counts.items() if count)
        made = (row["created"] or "")[:16].replace("T", " ")
        table.add_row(mark, row["version"], made, f"{row['items']:,}", f"{row['live']:,}", change, Text(row["note"]))
    console.print(table)
    console.print("* current")


def _versions(folder: Path) -> "CatalogVersions":
    from llmrec.catalog_versions import CatalogVersions

    return CatalogVersions.inside(folder)


def _asked(item_ids: Sequence[str] | None, file: Path | None) -> list[str]:
    asked = list(item_ids or [])
    if file is not None:
        try:
            # Only line feeds end a line: an id may hold any other separator.
            lines = file.read_bytes().decode("utf-8-sig").split("\n")
            asked += [line.removesuffix("\r") for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise CatalogError(
                f"{file} cannot be read as a list of item ids ({error}). Give one id a line."
            ) from error
    if not asked:
        raise CatalogError("No item is named. Give item ids, or a file of them with --file.")
    return asked


def _told(versions: "CatalogVersions", version: str) -> None:
    from rich.console import Console

    live = versions.load(version).num_live
    Console(highlight=False).print(f"{live:,} live items, version {version}", markup=False)
