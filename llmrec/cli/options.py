"""Options that several commands share: the files, their columns, the split.

Nothing of the library is imported before a command runs, so that `llmrec --help` answers at once.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from llmrec.data.columns import ColumnNames

_FILES = "What the files are called and hold"
_SPLIT = "Split"

Artefact = Annotated[str, typer.Argument(help="An artefact folder, or its id on the Hub (`user/name`).")]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of the Hub's repository.")]
InteractionsSource = Annotated[
    str,
    typer.Option(
        "--interactions",
        metavar="SOURCE",
        help="Interactions: parquet, csv, tsv, jsonl (.gz, .zst or not), a folder of such, or `hub:user/name`.",
    ),
]
ItemsSource = Annotated[
    str, typer.Option("--items", metavar="SOURCE", help="The table of items, in the same formats.", show_default=False)
]
OptionalItemsSource = Annotated[
    str | None,
    typer.Option("--items", metavar="SOURCE", help="The table of items, in the same formats; without one, ids alone."),
]

UserColumn = Annotated[
    str | None,
    typer.Option("--user-column", metavar="NAME", help="The column of user ids.", rich_help_panel=_FILES),
]
ItemColumn = Annotated[
    str | None,
    typer.Option("--item-column", metavar="NAME", help="The column of item ids, in both.", rich_help_panel=_FILES),
]
TimestampColumn = Annotated[
    str | None, typer.Option("--timestamp-column", metavar="NAME", help="The times.", rich_help_panel=_FILES)
]
PositionColumn = Annotated[
    str | None,
    typer.Option(
        "--position-column",
        metavar="NAME",
        help="Places in a user's history, which order what time leaves open.",
        rich_help_panel=_FILES,
    ),
]
RatingColumn = Annotated[
    str | None, typer.Option("--rating-column", metavar="NAME", help="The ratings.", rich_help_panel=_FILES)
]
ActionColumn = Annotated[
    str | None,
    typer.Option(
        "--action-column", metavar="NAME", help="What was done: view, click, purchase, ….", rich_help_panel=_FILES
    ),
]
DomainColumn = Annotated[
    str | None, typer.Option("--domain-column", metavar="NAME", help="Shop or category.", rich_help_panel=_FILES)
]
WeightColumn = Annotated[
    str | None,
    typer.Option("--weight-column", metavar="NAME", help="How much an interaction counts.", rich_help_panel=_FILES),
]
TitleColumn = Annotated[
    str | None, typer.Option("--title-column", metavar="NAME", help="The items' titles.", rich_help_panel=_FILES)
]
TimestampUnit = Annotated[
    Literal["auto", "s", "ms", "us", "ns", "iso", "order"],
    typer.Option("--timestamp-unit", help="The times' unit; by default detected, and said.", rich_help_panel=_FILES),
]
InvalidRows = Annotated[
    Literal["error", "drop"],
    typer.Option(
        "--invalid-rows",
        help="Rows without ids or with impossible values: stop, or leave out and count.",
        rich_help_panel=_FILES,
    ),
]

SplitName = Annotated[
    Literal["leave-one-out", "global-temporal", "by-sample", "cold-users"],
    typer.Option(
        "--split",
        help="leave-one-out: every user's last item. global-temporal: what comes after a moment, for everyone. "
        "by-sample: samples sorted by time, 8:1:1. cold-users: users held out whole.",
        rich_help_panel=_SPLIT,
    ),
]
ValidShare = Annotated[
    float,
    typer.Option(
        "--valid-share",
        help="Share for validation: of interactions, samples or users. Not leave-one-out.",
        rich_help_panel=_SPLIT,
    ),
]
TestShare = Annotated[
    float, typer.Option("--test-share", help="Share for the test, likewise.", rich_help_panel=_SPLIT)
]
ValidTime = Annotated[
    str | None,
    typer.Option(
        "--valid-time",
        metavar="TIME",
        help="global-temporal: when training ends, unix seconds or ISO 8601 (UTC, also YYYYMMDD); default: by share.",
        rich_help_panel=_SPLIT,
    ),
]
TestTime = Annotated[
    str | None,
    typer.Option(
        "--test-time", metavar="TIME", help="global-temporal: when the test begins, likewise.", rich_help_panel=_SPLIT
    ),
]
Targets = Annotated[
    Literal["all", "first"],
    typer.Option(
        "--targets",
        help="global-temporal: ask for every later item of a user, or for the first.",
        rich_help_panel=_SPLIT,
    ),
]
MinHistory = Annotated[
    int,
    typer.Option(
        "--min-history",
        help="leave-one-out: users with fewer interactions are training alone.",
        rich_help_panel=_SPLIT,
    ),
]
SplitSeed = Annotated[
    int,
    typer.Option("--split-seed", min=0, help="cold-users: the seed by which users are drawn.", rich_help_panel=_SPLIT),
]
TieOrder = Annotated[
    Literal["stable", "shuffle"],
    typer.Option(
        "--ties",
        help="Equal times keep position or file order, or are shuffled, to measure what order matters.",
        rich_help_panel=_SPLIT,
    ),
]
TieSeed = Annotated[int, typer.Option("--tie-seed", min=0, help="The seed of shuffled ties.", rich_help_panel=_SPLIT)]


def columns(
    user: str | None = None,
    item: str | None = None,
    timestamp: str | None = None,
    position: str | None = None,
    rating: str | None = None,
    action: str | None = None,
    domain: str | None = None,
    weight: str | None = None,
    title: str | None = None,
) -> "ColumnNames":
    """The files' column names as the readers take them; None leaves the canonical name and its aliases."""
    from dataclasses import replace

    from llmrec.data.columns import ColumnNames

    given: dict[str, Any] = {
        **{"user": user, "item": item, "timestamp": timestamp, "position": position, "rating": rating},
        **{"action": action, "domain": domain, "weight": weight, "title": title},
    }
    return replace(ColumnNames(), **{name: column for name, column in given.items() if column is not None})
