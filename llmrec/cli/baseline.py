"""`llmrec baseline`: names and options of the command; its work is in `llmrec.cli.scoring`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

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

_TUNING = "Tuning, on the validation part"


def baseline(
    name: Annotated[
        Literal["item-cf", "popularity", "popularity-recent", "ease", "markov", "text-knn"],
        typer.Argument(help="The baseline."),
    ],
    interactions: InteractionsSource,
    items: OptionalItemsSource = None,
    part: Annotated[Literal["test", "valid"], typer.Option(help="The held-out part that is ranked.")] = "test",
    ks: Annotated[str, typer.Option(metavar="K,K", help="Cut-offs.")] = "5,10,20",
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A parameter of the baseline; repeatable. Tuning leaves it alone."),
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="text-knn: what semantic_ids/embed.py wrote; by default the items' text is embedded now, with the "
            "best model that is installed.",
        ),
    ] = None,
    expected_ties: Annotated[
        bool,
        typer.Option(
            "--expected-ties",
            help="Rank by scores alone: tied items count as the mean over their orders, and the bounds are shown.",
        ),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write evaluation/NAME.json and .parquet, for `llmrec compare`.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap and of the grid's sample.")] = 0,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose the parameters by a grid search.", rich_help_panel=_TUNING)
    ] = False,
    budget: Annotated[
        int, typer.Option(min=1, help="The most configurations that are tried.", rich_help_panel=_TUNING)
    ] = 20,
    budget_seconds: Annotated[
        float, typer.Option(min=0, help="After so many seconds no other one begins.", rich_help_panel=_TUNING)
    ] = 300,
    metric: Annotated[
        str, typer.Option(help="What is best: HR, NDCG or MRR with a cut-off.", rich_help_panel=_TUNING)
    ] = "NDCG@10",
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
    """Fit a baseline, tuned or not, and evaluate it by full ranking: item-CF, popularity, EASE, Markov, kNN over text.

    Example: `llmrec baseline item-cf --interactions log.parquet --items items.parquet --json item-cf.json`

    Example: `llmrec baseline ease --interactions log.csv --tune --budget 10 --out runs/baselines`
    """
    from llmrec.cli import scoring
    from llmrec.cli.preparation import Sources
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
    scoring.score_baseline(
        name,
        Sources(interactions, items, names, timestamp_unit, invalid_rows),
        arguments,
        part=part,
        ks=ks,
        given=param or [],
        embeddings=embeddings,
        expected_ties=expected_ties,
        json_file=json_file,
        out=out,
        seed=seed,
        search=scoring.Search(budget, budget_seconds, metric) if tune else None,
    )
