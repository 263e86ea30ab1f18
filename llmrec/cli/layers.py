"""`llmrec layers`: which layers of a trained recommender matter, and how many could go."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmrec.cli.options import (
    ActionColumn,
    Artefact,
    DomainColumn,
    InteractionsSource,
    InvalidRows,
    ItemColumn,
    PositionColumn,
    RatingColumn,
    Revision,
    TimestampColumn,
    TimestampUnit,
    UserColumn,
    WeightColumn,
    columns,
)

if TYPE_CHECKING:
    from rich.table import Table


def layers(
    artefact: Artefact,
    interactions: InteractionsSource,
    part: Annotated[
        Literal["valid", "test"], typer.Option(help="The held-out part that is asked; valid, to choose by.")
    ] = "valid",
    cases: Annotated[int, typer.Option(min=0, help="Cases that are asked, drawn with the seed; 0: all.")] = 500,
    greedy: Annotated[
        bool,
        typer.Option("--greedy", help="Also remove one layer after another, each time the one that is missed least."),
    ] = False,
    num_beams: Annotated[int, typer.Option(min=10, help="Beams of a language model's searches.")] = 20,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON to this file.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="PAGE", help="Write the curves as a page to this file.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed by which cases are drawn, and of the intervals.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: a GPU if there is one.")] = None,
    revision: Revision = None,
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    timestamp_column: TimestampColumn = None,
    position_column: PositionColumn = None,
    rating_column: RatingColumn = None,
    action_column: ActionColumn = None,
    domain_column: DomainColumn = None,
    weight_column: WeightColumn = None,
    timestamp_unit: TimestampUnit = "auto",
    invalid_rows: InvalidRows = "error",
) -> None:
    """Tell which layers matter: quality without each layer, and with the first layers alone.

    Of a language model (Llama, GPT-2, Qwen, …) or a sequence model (SASRec, HSTU, Llama and GPT-2 over items), on
    validation cases of the split that it was trained on. NDCG@10, HR@10 and the loss stand beside those of the whole
    model, with paired intervals. Nothing is trained; `train/distill.py` trains a student of some of the layers.

    Example: `llmrec layers runs/sft/artefact --interactions log.parquet --json layers.json --html layers.html`

    Example: `llmrec layers runs/sasrec/artefact --interactions log.parquet --greedy --cases 0`
    """
    import numpy as np
    from rich.console import Console

    from llmrec.artefact import resolve
    from llmrec.cli.observed import observed
    from llmrec.cli.preparation import Sources
    from llmrec.distillation.layer_curves import LayerCases, layer_curves
    from llmrec.distillation.layer_page import layer_page
    from llmrec.recommender import Recommender
    from llmrec.storage import write_json
    from llmrec.trained_split import refuse_grown, trained_split

    names = columns(
        user=user_column,
        item=item_column,
        timestamp=timestamp_column,
        position=position_column,
        rating=rating_column,
        action=action_column,
        domain=domain_column,
        weight=weight_column,
    )
    with observed() as announce:
        announce("loading the artefact", None)
        folder = resolve(artefact, revision)
        recommender = Recommender.from_pretrained(folder, device=device)
        refuse_grown(recommender.catalog, artefact)
        announce("reading the interactions", None)
        log = Sources(interactions, None, names, timestamp_unit, invalid_rows).read_interactions()
        split = trained_split(log, recommender.catalog, recommender.settings)
        chosen = np.arange(len(split.targets(part)))
        if 0 < cases < len(chosen):
            chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:cases])
        asked = LayerCases(recommender, split, chosen, part, num_beams)
        found = layer_curves(asked, greedy, seed=seed, announce=announce)
    found = {"artefact": folder.name, "split": split.content_hash, "num_beams": num_beams, **found}
    written = [path for path in (json_file, html_file) if path is not None]
    if json_file is not None:
        write_json(json_file, found)
    if html_file is not None:
        layer_page(found, folder.name).write(html_file)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    whole = found["whole"]
    shown = ", ".join(f"{name} {one['mean']:.4f}" for name, one in whole.items())
    console.print(f"{found['layers']} layers, {found['cases']:,} cases; the whole model: {shown}", highlight=False)
    for key, title in (
        ("drop_one", "Without one layer"),
        ("keep_first", "The first layers alone"),
        ("greedy", "Greedily"),
    ):
        if key in found:
            console.print(_table(title, found[key]))
    console.print(found["advice"], markup=False, highlight=False, soft_wrap=True)
    for path in written:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def _table(title: str, points: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    from llmrec.distillation.layer_page import table_of

    header, rows = table_of(points)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table
