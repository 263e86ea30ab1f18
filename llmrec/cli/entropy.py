"""`llmrec data entropy`: how much there is to learn from in a log, and in shares of its users."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from rich.table import Table


def entropy(
    interactions: InteractionsSource,
    items: OptionalItemsSource = None,
    share: Annotated[
        list[float] | None,
        typer.Option(help="A share of the training users to look at besides all; repeat it. Default: 0.25 and 0.5."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Only so many of each user's latest training interactions; default: all.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Entropies of no more tokens than these: whole users are drawn.")
    ] = 20_000_000,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON to this file.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed by which users are drawn.")] = 0,
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
    """Tell how much there is to learn from: tokens, entropies, compression, and effective data.

    Of the training sequences alone, and of nested shares of the users as `--train_share` of the training scripts
    draws them. Effective data D' are tokens * S', S' = 1 / real entropy, as the Performance Law takes them; the logs
    that its authors published stand beside.

    Example: `llmrec data entropy --interactions log.parquet --json runs/entropy.json`

    Example: `llmrec data entropy --interactions log.csv --split global-temporal --share 0.1 --share 0.3`
    """
    from rich.console import Console

    from llmrec.cli.observed import observed
    from llmrec.cli.preparation import Sources
    from llmrec.data.arguments import SplitArguments
    from llmrec.scaling.quality import SHARES, data_quality
    from llmrec.storage import write_json

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
    sources = Sources(interactions, items, names, timestamp_unit, invalid_rows)
    with observed() as announce:
        announce("reading", None)
        log = sources.read_interactions()
        table = sources.read_items(log)
        announce("splitting", None)
        made = arguments.make(log, table)
        found = data_quality(made, share or SHARES, seed, max_length, max_tokens, announce)
    if json_file is not None:
        write_json(json_file, found)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for part in (_figures(found), _beside(found)):
        console.print(part)
        console.print()
    for note in found["notes"]:
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if json_file is not None:
        console.print(str(json_file), markup=False, highlight=False, soft_wrap=True)


def _figures(found: dict[str, Any]) -> "Table":
    """A line for each figure, a column for each share."""
    from rich.table import Table

    table = Table(title="Training sequences; entropies in nats", title_justify="left", box=None, pad_edge=False)
    table.add_column("share of users")
    for part in found["shares"]:
        table.add_column(f"{part['share']:.4g}", justify="right")
    for lines in zip(*(_lines(part) for part in found["shares"]), strict=True):
        table.add_row(lines[0][0], *(value for _, value in lines))
    return table


def _lines(part: dict[str, Any]) -> Iterator[tuple[str, str]]:
    of_users, looked = part["approximate_users"], part["looked_at"]
    yield "users", f"{part['users']:,}"
    yield "items", f"{part['items']:,}"
    yield "tokens", f"{part['tokens']:,}"
    yield "tokens that entropies are of", f"{looked['tokens']:,}"
    yield "median length", f"{part['median_length']:,.4g}"
    yield "mean length", f"{part['mean_length']:,.4g}"
    yield "repeat rate", f"{part['repeat_rate']:.2%}"
    yield "Shannon entropy of items", f"{part['shannon']:.4f}"
    yield "approximate entropy, m = 1", f"{part['approximate_m1']:.4f}"
    yield "approximate entropy, m = 2", f"{part['approximate_m2']:.4f}"
    yield "the same, mean over users", "-" if of_users["mean"] is None else f"{of_users['mean']:.4f}"
    yield f"compression ratio (zstd {part['compression']['level']})", f"{part['compression']['ratio']:.3f}"
    yield "real entropy S (Lempel-Ziv)", f"{part['real']:.4f}"
    yield "quality S' = 1 / S", f"{part['quality']:.4f}"
    yield "effective data D' = tokens * S'", f"{part['effective_data']:,.0f}"
    yield "S', dictionary variant", f"{part['dictionary_quality']:.4f}"
    yield "D', dictionary variant", f"{part['dictionary_effective_data']:,.0f}"


def _beside(found: dict[str, Any]) -> "Table":
    """The shares and the published logs in the order of their effective data."""
    from rich.table import Table

    table = Table(title="Beside published logs", title_justify="left", box=None, pad_edge=False)
    table.add_column("log")
    for name in ("longest", "tokens", "S'", "D'"):
        table.add_column(name, justify="right")
    longest = "all" if found["longest"] is None else f"{found['longest']:,}"
    rows = [
        (log["effective_data"], log["name"], f"{log['longest']:,}", log["tokens"], log["quality"], "")
        for log in found["published"]
    ] + [
        (
            *(part["effective_data"], "this log" if part["share"] == 1 else f"{part['share']:.4g} of its users"),
            *(longest, part["tokens"], part["quality"], "bold"),
        )
        for part in found["shares"]
    ]
    for effective, name, cap, tokens, quality, style in sorted(rows, key=lambda row: row[0]):
        table.add_row(name, cap, f"{tokens:,}", f"{quality:.4f}", f"{effective:,.0f}", style=style)
    return table
