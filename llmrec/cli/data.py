"""`llmrec data`: names and options of its commands; their work is in `llmrec.cli.preparation`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from llmrec.cli.entropy import entropy
from llmrec.cli.options import (
    ActionColumn,
    DomainColumn,
    InteractionsSource,
    InvalidRows,
    ItemColumn,
    MinHistory,
    OptionalItemsSource,
    PositionColumn,
    RatingColumn,
    SplitName,
    SplitSeed,
    Targets,
    TestShare,
    TestTime,
    TieOrder,
    TieSeed,
    TimestampColumn,
    TimestampUnit,
    TitleColumn,
    UserColumn,
    ValidShare,
    ValidTime,
    WeightColumn,
    columns,
)

app = typer.Typer(
    help="Interactions and items: convert, clean, split, and report what to beware of.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

OutFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder for the files.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the account as JSON to this file too.")
]


@app.command()
def clean(
    interactions: InteractionsSource,
    out: OutFolder,
    items: OptionalItemsSource = None,
    empty_titles: Annotated[
        Literal["keep", "drop", "error"],
        typer.Option(
            help="Items without a title: keep with their first text (else id), drop with interactions, stop."
        ),
    ] = "keep",
    unknown_items: Annotated[
        Literal["keep", "drop", "error"],
        typer.Option(help="Items of interactions alone: add with their id as title, drop the interactions, stop."),
    ] = "keep",
    min_rating: Annotated[
        float | None, typer.Option(help="Keep interactions rated this or more, and count each as a positive one.")
    ] = None,
    unrated: Annotated[
        Literal["drop", "keep"], typer.Option(help="With --min-rating: what to do without a rating.")
    ] = "drop",
    duplicates: Annotated[
        Literal["exact", "first", "last", "keep"],
        typer.Option(
            help="exact: of equal user, item, time and action, one stays. first, last: one of each user and item."
        ),
    ] = "exact",
    k_core: Annotated[int, typer.Option(min=0, help="The fewest interactions of each user and each item.")] = 0,
    user_core: Annotated[int | None, typer.Option(min=0, help="The fewest of each user, if not --k-core.")] = None,
    item_core: Annotated[int | None, typer.Option(min=0, help="The fewest of each item, if not --k-core.")] = None,
    min_length: Annotated[int, typer.Option(min=0, help="Drop users with fewer interactions.")] = 0,
    max_length: Annotated[int | None, typer.Option(min=1, help="Keep each user's most recent interactions.")] = None,
    unused_items: Annotated[
        Literal["keep", "drop"], typer.Option(help="Items of the table that no interaction has.")
    ] = "keep",
    json_file: JsonFile = None,
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    timestamp_column: TimestampColumn = None,
    position_column: PositionColumn = None,
    rating_column: RatingColumn = None,
    action_column: ActionColumn = None,
    domain_column: DomainColumn = None,
    weight_column: WeightColumn = None,
    title_column: TitleColumn = None,
    timestamp_unit: TimestampUnit = "auto",
    invalid_rows: InvalidRows = "error",
) -> None:
    """Filter interactions and items, and account for every row that goes.

    Steps, in this order: titles, unknown items, ratings, duplicates; k-core, min and max length, repeated until
    nothing changes; unused items. Writes DIR/interactions.parquet, DIR/items.parquet and DIR/cleaning.json.

    Example: `llmrec data clean --interactions log.csv --items items.jsonl --k-core 5 --out runs/clean`

    Example: `llmrec data clean --interactions ratings.csv --min-rating 4 --duplicates first --out runs/clean`
    """
    from llmrec.cli import preparation

    names = columns(
        user=user_column,
        item=item_column,
        timestamp=timestamp_column,
        position=position_column,
        rating=rating_column,
        action=action_column,
        domain=domain_column,
        weight=weight_column,
        title=title_column,
    )
    preparation.clean(
        preparation.Sources(interactions, items, names, timestamp_unit, invalid_rows),
        out,
        json_file,
        empty_titles=empty_titles,
        unknown_items=unknown_items,
        min_rating=min_rating,
        unrated=unrated,
        duplicates=duplicates,
        user_core=k_core if user_core is None else user_core,
        item_core=k_core if item_core is None else item_core,
        min_length=min_length,
        max_length=max_length,
        unused_items=unused_items,
    )


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A file, a folder of shards, `hub:user/name`, or a data set's own file: RecBole, MovieLens, Amazon."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The parquet file to write.")],
    kind: Annotated[Literal["interactions", "items"], typer.Option(help="What the source holds.")] = "interactions",
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    timestamp_column: TimestampColumn = None,
    position_column: PositionColumn = None,
    rating_column: RatingColumn = None,
    action_column: ActionColumn = None,
    domain_column: DomainColumn = None,
    weight_column: WeightColumn = None,
    title_column: TitleColumn = None,
    timestamp_unit: TimestampUnit = "auto",
    invalid_rows: InvalidRows = "error",
) -> None:
    """Write any source that llmrec reads as parquet with canonical columns, and say what was found in it.

    Example: `llmrec data convert ml-1m/ratings.dat --out log.parquet`

    Example: `llmrec data convert ml-1m/movies.dat --kind items --out items.parquet`
    """
    from llmrec.cli import preparation

    names = columns(
        user=user_column,
        item=item_column,
        timestamp=timestamp_column,
        position=position_column,
        rating=rating_column,
        action=action_column,
        domain=domain_column,
        weight=weight_column,
        title=title_column,
    )
    preparation.convert(source, out, kind, names, timestamp_unit, invalid_rows)


@app.command()
def split(
    interactions: InteractionsSource,
    out: OutFolder,
    items: OptionalItemsSource = None,
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
    json_file: JsonFile = None,
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    timestamp_column: TimestampColumn = None,
    position_column: PositionColumn = None,
    rating_column: RatingColumn = None,
    action_column: ActionColumn = None,
    domain_column: DomainColumn = None,
    weight_column: WeightColumn = None,
    title_column: TitleColumn = None,
    timestamp_unit: TimestampUnit = "auto",
    invalid_rows: InvalidRows = "error",
) -> None:
    """Split interactions, and write what training, validation and test hold.

    DIR/train.parquet is a log; valid.parquet and test.parquet have one row per case: user_id, history (item ids,
    oldest first), target, timestamp. DIR/split.json has the protocol, the counts and the content hash.

    Example: `llmrec data split --interactions log.parquet --items items.parquet --out runs/split`

    Example: `llmrec data split --interactions log.parquet --split global-temporal --test-time 2014-07-01 --out split`
    """
    from llmrec.cli import preparation
    from llmrec.data.arguments import SplitArguments

    names = columns(
        user=user_column,
        item=item_column,
        timestamp=timestamp_column,
        position=position_column,
        rating=rating_column,
        action=action_column,
        domain=domain_column,
        weight=weight_column,
        title=title_column,
    )
    arguments = SplitArguments(
        split=split,
        valid_share=valid_share,
        test_share=test_share,
        valid_time=valid_time,
        test_time=test_time,
        targets=targets,
        min_history=min_history,
        split_seed=split_seed,
        ties=ties,
        tie_seed=tie_seed,
    )
    sources = preparation.Sources(interactions, items, names, timestamp_unit, invalid_rows)
    preparation.split(sources, arguments, out, json_file)


@app.command()
def report(
    interactions: InteractionsSource,
    items: OptionalItemsSource = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The folder for report.json and report.html; default: runs/report."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON to this file.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the page with plots to this file.")
    ] = None,
    seen: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="What a model was trained on, as interactions: test items in it are leaks."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of everything that is drawn.")] = 0,
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
    rating_column: RatingColumn = None,
    action_column: ActionColumn = None,
    domain_column: DomainColumn = None,
    weight_column: WeightColumn = None,
    title_column: TitleColumn = None,
    timestamp_unit: TimestampUnit = "auto",
    invalid_rows: InvalidRows = "error",
) -> None:
    """Look interactions and their split over: counts, distributions, ties, leaks, and what to beware of.

    Without --out, --json and --html it writes runs/report/report.json and report.html.

    Example: `llmrec data report --interactions log.parquet --items items.parquet --json report.json`

    Example: `llmrec data report --interactions log.parquet --split global-temporal --out runs/report`
    """
    from llmrec.cli import preparation
    from llmrec.data.arguments import SplitArguments

    names = columns(
        user=user_column,
        item=item_column,
        timestamp=timestamp_column,
        position=position_column,
        rating=rating_column,
        action=action_column,
        domain=domain_column,
        weight=weight_column,
        title=title_column,
    )
    arguments = SplitArguments(
        split=split,
        valid_share=valid_share,
        test_share=test_share,
        valid_time=valid_time,
        test_time=test_time,
        targets=targets,
        min_history=min_history,
        split_seed=split_seed,
        ties=ties,
        tie_seed=tie_seed,
    )
    if out is None and json_file is None and html_file is None:
        out = Path("runs/report")
    if out is not None:
        json_file, html_file = json_file or out / "report.json", html_file or out / "report.html"
    sources = preparation.Sources(interactions, items, names, timestamp_unit, invalid_rows)
    preparation.report(sources, arguments, seed, seen, json_file, html_file)


@app.command()
def merge(
    interactions: Annotated[
        list[str], typer.Argument(metavar="NAME=SOURCE …", help="Two logs or more, each under its domain's name.")
    ],
    out: OutFolder,
    items: Annotated[
        list[str] | None,
        typer.Option(
            "--items", metavar="NAME=SOURCE", help="A domain's table of items; repeat it for others. Else ids alone."
        ),
    ] = None,
    json_file: JsonFile = None,
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    timestamp_column: TimestampColumn = None,
    position_column: PositionColumn = None,
    rating_column: RatingColumn = None,
    action_column: ActionColumn = None,
    domain_column: DomainColumn = None,
    weight_column: WeightColumn = None,
    title_column: TitleColumn = None,
    timestamp_unit: TimestampUnit = "auto",
    invalid_rows: InvalidRows = "error",
) -> None:
    """Make one log of several domains, for a model of all of them.

    Users with one id are one user. Where all their times are known, they get one sequence in the order of time. Where
    some are not, the order between domains is unknown: then they become one user per domain, USER@NAME, who knows what
    the other domains have but for their last two, so that leave-one-out gives nothing away. Item ids that two domains
    have begin with their domain's name. Writes DIR/interactions.parquet, DIR/items.parquet and DIR/merging.json.

    Example: `llmrec data merge beauty=beauty.csv sports=sports.csv --out runs/both`
    """
    from llmrec.cli import preparation

    names = columns(
        user=user_column,
        item=item_column,
        timestamp=timestamp_column,
        position=position_column,
        rating=rating_column,
        action=action_column,
        domain=domain_column,
        weight=weight_column,
        title=title_column,
    )
    preparation.merge(interactions, items or [], out, json_file, names, timestamp_unit, invalid_rows)


app.command()(entropy)
