"""`llmrec scale`: which model for my data and my budget. The commands' work is in the modules of their names."""

from pathlib import Path
from typing import Annotated

import typer

from llmrec.cli import scale_cost, scale_fit, scale_pilot

app = typer.Typer(
    help="Which model for my data and my budget: costs, a pilot that fits a budget, scaling laws, predictions.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


app.command()(scale_cost.cost)
app.command()(scale_pilot.plan)
app.command()(scale_pilot.run)
app.command()(scale_fit.fit)
app.command()(scale_fit.predict)


@app.command()
def report(
    points: Annotated[
        Path, typer.Option(metavar="FILE", help="The trainings, as `llmrec scale fit` reads them; all encoders.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The HTML file.")] = Path("scaling.html"),
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what it says as JSON to this file too.")
    ] = None,
    metric: Annotated[str, typer.Option(help="What the points' metric is.")] = "NDCG@10",
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Which model for these data",
    note: Annotated[str, typer.Option(help="What a reader has to know first.")] = "",
    resamples: Annotated[int, typer.Option(min=20, help="Of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap, the tests and the search.")] = 0,
) -> None:
    """Write one HTML file: points, laws, residuals, the optimum's interval, costs, losses, and held-out trainings.

    It needs nothing else to be read, not even a network. Rows marked held_out are predicted, and not fitted to.

    Example: `llmrec scale report --points runs/pilot/points.csv --out runs/pilot/report.html`
    """
    from rich.console import Console

    from llmrec.scaling.account import accounts
    from llmrec.scaling.points import read_trainings
    from llmrec.scaling.report import report_page
    from llmrec.storage import write_json

    found = accounts(read_trainings(points), resamples, seed)
    report_page(found, metric, title, note).write(out)
    if json_file is not None:
        write_json(json_file, {"metric": metric, "encoders": [account.document() for account in found]})
    console = Console(width=140)
    for account in found:
        said = account.refusal if account.fit is None else account.fit.verdict()
        console.print(f"{account.name}: {said}", markup=False, highlight=False)
    console.print(f"Written: {out}", markup=False, highlight=False, soft_wrap=True)
