"""`llmrec reasoning`: what each step of thought of a sequence model is worth, and what it costs."""

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
    from llmrec.artefact_parts import Settings
    from llmrec.catalog import Catalog
    from llmrec.data.split import Split
    from llmrec.sequence.model import SequenceModel


def reasoning(
    artefact: Artefact,
    interactions: InteractionsSource,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write the report as JSON to this file.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="PAGE", help="Write it as a page to this file.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A run folder for every step's evaluation, for `llmrec compare`."),
    ] = None,
    part: Annotated[Literal["test", "valid"], typer.Option(help="The held-out part that is ranked.")] = "test",
    max_cases: Annotated[int, typer.Option(min=0, help="Rank so many cases, drawn with the seed; 0: all.")] = 0,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of the timing; 0: none.")] = 30,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap and of the tests.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling, and of the cases drawn.")] = 0,
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
    """Tell what each step of thought is worth and costs: quality and latency after 0 to K steps, and over-thinking.

    For a sequence model that was trained with `--reasoning`. It ranks the part's cases once for every number of steps;
    differences are paired, with intervals over users. The oracle (each case's own best step) is a ceiling. The split
    is the artefact's own.

    Example: `llmrec reasoning runs/prl/artefact --interactions log.parquet --json runs/prl/reasoning.json`

    Example: `llmrec reasoning runs/erl/artefact --interactions log.parquet --html runs/erl/reasoning.html`
    """
    from llmrec.cli.observed import observed
    from llmrec.cli.preparation import Sources
    from llmrec.evaluation.evaluation import check_name
    from llmrec.reasoning.report_page import page
    from llmrec.storage import write_json
    from llmrec.trained_split import trained_split

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
        announce("loading", None)
        model, settings, catalog = _opened(artefact, revision, device)
        system = str(settings.training.get("system") or "model")
        check_name(system)
        announce("reading", None)
        log = Sources(interactions, None, names, timestamp_unit, invalid_rows).read_interactions()
        split = trained_split(log, catalog, settings)
        announce("ranking and timing", None)
        facts = {
            "system": system,
            "seeds": {"training": settings.training.get("trainer", {}).get("seed"), "cases": seed},
        }
        report, evaluations = _report(model, split, part, facts, max_cases, rounds, resamples, seed)
    if out is not None:
        for evaluation in evaluations:
            evaluation.save(out)
    if json_file is not None:
        write_json(json_file, report)
    if html is not None:
        page(report, f"Steps of thought: {system}").write(html)
    _show(report, [path for path in (json_file, html, out) if path is not None])


def _opened(name: str, revision: str | None, device: str | None) -> "tuple[SequenceModel, Settings, Catalog]":
    """An artefact's model that thinks, its settings, and its catalog.

    Raises:
        ArtefactError: if it is no sequence model's.
        BackboneError: if its encoder does not think.
    """
    from llmrec import artefact
    from llmrec.artefact_parts import is_sequence, read_settings
    from llmrec.catalog import CATALOG_FOLDER
    from llmrec.catalog_versions import CatalogVersions
    from llmrec.exceptions import ArtefactError
    from llmrec.reasoning.steps import thinker
    from llmrec.sequence.recommender import load_model

    folder = artefact.resolve(name, revision)
    if not is_sequence(folder):
        raise ArtefactError(
            f"{name} is no sequence model's artefact, and steps of thought are theirs. Name one that train/seqrec.py "
            "wrote with --reasoning."
        )
    model = load_model(folder, device=device)
    thinker(model)
    return model, read_settings(folder), CatalogVersions(folder / CATALOG_FOLDER).load()


def _report(
    model: "SequenceModel",
    split: "Split",
    part: Literal["test", "valid"],
    facts: dict[str, Any],
    max_cases: int,
    rounds: int,
    resamples: int,
    seed: int,
) -> tuple[dict[str, Any], list[Any]]:
    """The report, and the evaluations that it is made of."""
    import numpy as np

    from llmrec.reasoning.latency import step_latency
    from llmrec.reasoning.report import CUTOFF, reasoning_report
    from llmrec.reasoning.steps import evaluate_steps, thinker
    from llmrec.sequence.histories import LoggedHistories

    config = thinker(model).config
    number = len(split.positions[part])
    drawn = np.random.default_rng(seed).permutation(number)[: max_cases or number]
    cases = np.sort(drawn)
    seeds = {"seeds": facts["seeds"]}
    evaluations = evaluate_steps(model, split, part, system=facts["system"], ks=(CUTOFF,), cases=cases, facts=seeds)
    latency = None
    if rounds:
        logged = LoggedHistories(split, model.events).cases(part, cases[:256])
        latency = step_latency(model, logged, rounds=rounds)
    lengths = (split.positions[part] - split.offsets[split.case_users(part)])[cases]
    said = facts | {"kind": config.kind, "encoder": str(config.encoder_config().model_type)}
    said |= {"block_size": config.block_size, "split": split.content_hash, "part": part}
    return reasoning_report(evaluations, lengths, latency, said, resamples, seed), evaluations


def _show(report: dict[str, Any], written: list[Path]) -> None:
    """Prints both tables and the findings."""
    import sys

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from llmrec.reasoning.report_page import slice_rows, step_rows

    console = Console(width=None if sys.stdout.isatty() else 160)
    for title, (header, rows) in (("By step", step_rows(report)), ("Slices", slice_rows(report))):
        table = Table(title=Text(title), title_justify="left")
        for place, name in enumerate(header):
            table.add_column(Text(name), justify="right" if place else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    styles = {"warning": "red", "ok": "green"}
    for finding in report["findings"]:
        console.print(Text(finding["text"], style=styles.get(finding["level"], "")), soft_wrap=True)
    if written:
        console.print(f"Written: {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)
