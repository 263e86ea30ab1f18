"""`llmrec scale plan` and `llmrec scale run`: the trainings from which a scaling law is learnt."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from llmrec.cli.options import (
    InteractionsSource,
    InvalidRows,
    ItemColumn,
    MinHistory,
    PositionColumn,
    SplitName,
    SplitSeed,
    Targets,
    TestShare,
    TestTime,
    TieOrder,
    TieSeed,
    TimestampColumn,
    TimestampUnit,
    UserColumn,
    ValidShare,
    ValidTime,
)

if TYPE_CHECKING:
    from rich.console import Console

Number = TypeVar("Number", int, float)

_GRID = "The grid"
_TRAININGS = "The trainings"


def plan(
    interactions: InteractionsSource,
    budget_minutes: Annotated[
        float, typer.Option("--budget-minutes", help="For all trainings, one after another, on this machine.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The pilot's folder.")],
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="hstu, sasrec, bert4rec, gru4rec, llama or gpt2 by train/seqrec.py; `lm:RECIPE` by train/sft.py. "
            "Repeat it for several, which share the budget; default: hstu.",
        ),
    ] = None,
    depths: Annotated[str, typer.Option(help="Numbers of layers.", rich_help_panel=_GRID)] = "1,2,4,8",
    widths: Annotated[str, typer.Option(help="Hidden sizes.", rich_help_panel=_GRID)] = "16,32,64",
    shares: Annotated[str, typer.Option(help="Shares of the training users.", rich_help_panel=_GRID)] = "0.25,0.5,1",
    seeds: Annotated[str, typer.Option(help="Seeds of the trainings.", rich_help_panel=_GRID)] = "0,1",
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DEPTHxWIDTH",
            help="A size to hold a prediction against: trained on the largest share, and not fitted to. Repeat it.",
            rich_help_panel=_GRID,
        ),
    ] = None,
    share_seed: Annotated[
        int, typer.Option(min=0, help="By which the users of a share are drawn.", rich_help_panel=_GRID)
    ] = 0,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe of train/seqrec.py, by its path or its name in train/recipes, for all of its encoders; "
            "default: sasrec.yaml.",
            rich_help_panel=_TRAININGS,
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A flag over the recipes', such as num_train_epochs=10; repeat it. null takes one away.",
            rich_help_panel=_TRAININGS,
        ),
    ] = None,
    metric: Annotated[str, typer.Option(help="Of the test.", rich_help_panel=_TRAININGS)] = "NDCG@10",
    items: Annotated[
        str | None,
        typer.Option(help="The table of items; for `lm:`, their titles spell them.", rich_help_panel=_TRAININGS),
    ] = None,
    semantic_ids: Annotated[
        str | None,
        typer.Option(help="For `lm:`: a folder that semantic_ids/build.py wrote.", rich_help_panel=_TRAININGS),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Of each training, as `run` will have them.", rich_help_panel=_TRAININGS)
    ] = 1,
    split: SplitName = "leave-one-out",
    valid_share: ValidShare = 0.1,
    test_share: TestShare = 0.1,
    valid_time: ValidTime = None,
    test_time: TestTime = None,
    targets: Targets = "all",
    min_history: MinHistory = 3,
    split_seed: SplitSeed = 0,
    ties: TieOrder = "stable",
    tie_seed: TieSeed = 0,
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    timestamp_column: TimestampColumn = None,
    position_column: PositionColumn = None,
    timestamp_unit: TimestampUnit = "auto",
    invalid_rows: InvalidRows = "error",
) -> None:
    """Plan a pilot: a grid of depths, widths, shares of the users and seeds that fits a budget of time.

    What a training takes is measured: fifty steps of the smallest and of the largest model of each encoder. Where the
    whole grid is too long, repetitions with further seeds go first, then cells, the longest first, never below what a
    fit needs. Writes DIR/pilot.json; the probes stay in DIR/probes.

    Example: `llmrec scale plan --interactions log.parquet --encoder hstu --budget-minutes 60 --out runs/pilot`

    Example: `llmrec scale plan --interactions log.parquet --encoder hstu --encoder sasrec --depths 1,2,4
    --widths 16,32,64 --hold-out 8x64 --override num_train_epochs=10 --budget-minutes 120 --out runs/pilot`
    """
    from llmrec.cli.pilot_tables import grid_tables
    from llmrec.data.arguments import ColumnArguments, SplitArguments
    from llmrec.data.items import Items
    from llmrec.scaling.grid import GridRequest
    from llmrec.scaling.pilot import LM, PilotEncoder
    from llmrec.scaling.pilot_estimates import measured
    from llmrec.scaling.pilot_planner import plan_pilot
    from llmrec.stages import stages_root
    from llmrec.study.arguments import overrides
    from llmrec.study.runner import duration

    request = GridRequest(
        _numbers("--depths", depths, int),
        _numbers("--widths", widths, int),
        _numbers("--shares", shares, float),
        _numbers("--seeds", seeds, int),
        [_size(text) for text in hold_out or ()],
    )
    given: dict[str, Any] = {
        **{"user_column": user_column, "item_column": item_column, "timestamp_column": timestamp_column},
        **{"position_column": position_column, "timestamp_unit": timestamp_unit, "invalid_rows": invalid_rows},
    }
    names = ColumnArguments(**{name: value for name, value in given.items() if value is not None})
    splits = SplitArguments(
        split, valid_share, test_share, valid_time, test_time, targets, min_history, split_seed, ties, tie_seed
    )
    recipes, own = stages_root() / "train" / "recipes", overrides(override or [])
    encoders = []
    for name in encoder or ["hstu"]:
        files = {"items": items} | ({"semantic_ids": semantic_ids} if name.startswith(LM) else {})
        placed = {flag: str(Path(path).resolve()) for flag, path in files.items() if path is not None}
        encoders.append(PilotEncoder.read(name, recipes, recipe, {**own, **placed}))
    console = _console()
    logged = names.read_interactions(interactions)
    table = Items.from_interactions(logged)
    if items is not None:
        table = names.read_items(items).with_missing(logged)
    whole = splits.make(logged, table)
    source = str(Path(interactions).resolve()) if Path(interactions).exists() else interactions
    data: dict[str, Any] = {"interactions": source, **_changed(names), **_changed(splits)}
    sizes = [*((depth, width) for depth in request.depths for width in request.widths), *request.held_out]
    with _Prober(out / "probes", processes) as prober:
        pilot = plan_pilot(
            encoders,
            request,
            whole,
            data,
            budget_minutes,
            lambda entry: measured(entry, whole, sizes, data, out / "probes", prober.of(entry)),
            metric,
            share_seed,
        )
    path = pilot.save(out)
    for name in pilot.encoders:
        for part in grid_tables(pilot, name):
            console.print(part)
        for note in pilot.grids[name].notes():
            _say(console, f"{name}: {note}")
    trainings = sum(len(grid.trials) for grid in pilot.grids.values())
    _say(
        console,
        f"{trainings} trainings, about {duration(pilot.seconds)} of {duration(60 * budget_minutes)}; early stopping "
        f"may spare some. {path}; train them with: llmrec scale run {out}",
    )


def run(
    pilot: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that `llmrec scale plan` wrote.")],
    max_minutes: Annotated[
        float, typer.Option(min=0, help="Begin no training after so many minutes; 0: no limit.")
    ] = 0.0,
    processes: Annotated[int, typer.Option(min=1, help="Processes of each training, which accelerate starts.")] = 1,
) -> None:
    """Train what a pilot plans, and keep a table of its points.

    Each training has a folder of its own in DIR/runs, with its recipe, log, artefact and metrics.json. The same
    command goes on after an interruption; what is done is not repeated. After each training DIR/points.csv is written
    anew, for `llmrec scale fit --points DIR/points.csv`. Exit code 1 if a training failed.

    Example: `llmrec scale run runs/pilot`

    Example, in parts: `llmrec scale run runs/pilot --max-minutes 30`
    """
    import logging

    from llmrec.cli.pilot_tables import progress_table
    from llmrec.scaling.pilot_runner import POINTS, PilotRunner
    from llmrec.study.runner import StudyRunner

    runner = PilotRunner(pilot, processes=processes)
    console = _console()
    _say(console, f"{runner.left} of {len(runner.places)} trainings are left")
    # Its sentences about each training are this command's output.
    logger, handler = logging.getLogger(StudyRunner.__module__), logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        code = runner.run(max_minutes)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    console.print(progress_table(runner))
    points = pilot / POINTS
    _say(console, f"{points}: {len(runner.points())} points; fit a law: llmrec scale fit --points {points}")
    if code:
        raise typer.Exit(code)


class _Prober:
    """Measures trainings, and says on stderr what it is at."""

    def __init__(self, folder: Path, processes: int) -> None:
        from rich.console import Console

        self.folder, self.processes = folder, processes
        self.status = Console(stderr=True).status("reading")

    def __enter__(self) -> "_Prober":
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def of(self, entry: Any) -> Any:
        from llmrec.scaling.peak import DType
        from llmrec.scaling.probing import probe
        from llmrec.scaling.throughput import Probe

        flags = entry.flags
        dtype: DType = "bfloat16" if flags.get("bf16") else "float16" if flags.get("fp16") else "float32"

        def measure(cost: Any, tokens: float, arguments: Sequence[str], script: str) -> Probe:
            shape = cost.shape
            self.status.update(f"measuring fifty steps of {entry.name}, depth {shape.depth}, width {shape.width}")
            return probe(cost, tokens, arguments, script, folder=self.folder, dtype=dtype, processes=self.processes)

        return measure


def _changed(flags: Any) -> dict[str, Any]:
    """What of a dataclass' values is not its default."""
    from dataclasses import fields

    return {
        entry.name: getattr(flags, entry.name)
        for entry in fields(flags)
        if getattr(flags, entry.name) != entry.default
    }


def _numbers(flag: str, text: str, kind: "type[Number]") -> "list[Number]":
    """What stands between commas or spaces."""
    from llmrec.exceptions import RecipeError

    try:
        return [kind(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        wanted = "whole numbers, such as 1,2,4" if kind is int else "numbers, such as 0.25,0.5,1"
        raise RecipeError(f"{flag} is {text!r}. Give {wanted}.") from error


def _size(text: str) -> tuple[int, int]:
    """DEPTHxWIDTH."""
    from llmrec.exceptions import RecipeError

    depth, sign, width = text.lower().partition("x")
    if not sign or not (depth.isascii() and depth.isdigit() and width.isascii() and width.isdigit()):
        raise RecipeError(f"--hold-out is {text!r}. Write DEPTHxWIDTH, such as 8x64.")
    return int(depth), int(width)


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def _say(console: "Console", sentence: str) -> None:
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
