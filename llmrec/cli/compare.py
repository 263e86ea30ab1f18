"""`llmrec compare`: finished evaluations of run folders in one table, or a reason why they cannot be."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrec.evaluation.card import summary, tables, write_card
from llmrec.evaluation.comparison import compare


def print_card(
    runs: Sequence[Path],
    out: Path | None,
    metrics: Sequence[str],
    reference: str | None,
    resamples: int,
    seed: int,
) -> None:
    """Prints the card's main tables and notes; with `out`, writes card.md, card.json and card.html there."""
    card = compare(runs, metrics, reference, resamples, seed)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(summary(card), markup=False, highlight=False)
    shown = [table for table in tables(card) if table.title in ("Systems", "Slices", "Beyond accuracy", "Cost")]
    for found in shown:
        table = Table(title=Text(found.title), title_justify="left")
        for name in found.header:
            table.add_column(Text(name), overflow="fold")
        for row in found.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        console.print(found.caption, style="dim", markup=False, highlight=False)
    for note in card["notes"]:
        console.print(f"- {note}", markup=False, highlight=False)
    if out is not None:
        paths = write_card(card, out)
        console.print("Written: " + ", ".join(map(str, paths)), markup=False, highlight=False, soft_wrap=True)
