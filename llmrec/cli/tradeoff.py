"""`llmrec tradeoff`: quality against latency and size of finished runs, timed together."""

from pathlib import Path
from typing import Annotated

import typer


def tradeoff(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders of sft.py, seqrec.py, rl.py or distill.py: metrics.json beside an artefact."),
    ],
    out: Annotated[Path | None, typer.Option(metavar="PAGE", help="Write the plot and its table as a page.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON to this file.")
    ] = None,
    repetitions: Annotated[
        int, typer.Option(min=1, help="Timed requests of each batch size and model, after two for warming up.")
    ] = 20,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Histories of a request; repeat it. Default: 1 and 32.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: a GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the histories that are asked.")] = 0,
) -> None:
    """Weigh finished runs: NDCG@10 against the time of a request and against parameters, and which none outdoes.

    All models are timed here and now, in turns: times of other machines and days do not belong beside each other. Of
    a distillation the control stands beside the student.

    Example: `llmrec tradeoff runs/sft runs/distilled runs/sasrec --out tradeoff.html --json tradeoff.json`
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from llmrec.cli.observed import observed
    from llmrec.distillation.measurement import BATCH_SIZES
    from llmrec.distillation.tradeoff import tradeoff as weigh
    from llmrec.distillation.tradeoff_page import table_of, tradeoff_page
    from llmrec.storage import write_json

    with observed() as announce:
        found = weigh(runs, repetitions, sorted(set(batch or BATCH_SIZES)), device, seed, announce)
    if json_file is not None:
        write_json(json_file, found)
    if out is not None:
        tradeoff_page(found).write(out)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    header, rows = table_of(found)
    table = Table(title="Quality, size and time", title_justify="left", box=None, pad_edge=False)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < 2 else "right")
    for row in rows:
        table.add_row(*map(Text, row))  # a name is no markup
    console.print(table)
    for path in (json_file, out):
        if path is not None:
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)
