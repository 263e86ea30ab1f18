"""`llmrec recommend`: the next items after a history, as a table or as JSON."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from llmrec.recommender import Recommendation


def recommend(
    artefact: str,
    history: Sequence[str],
    k: int = 10,
    exclude_seen: bool = True,
    revision: str | None = None,
    as_json: bool = False,
    preference: str | None = None,
) -> None:
    """Prints `k` items to follow `history` (item ids, oldest first), for a user with this `preference` in words.

    Raises:
        ArtefactError: the artefact cannot be loaded.
        RequestError: the history cannot be answered, or no prompt of the artefact has a place for a preference.
    """
    from llmrec.recommender import Recommender

    recommender = Recommender.from_pretrained(artefact, revision=revision)
    variables: dict[str, Any] = {} if preference is None else {"preference": preference}
    show(recommender.recommend(history, k=k, exclude_seen=exclude_seen, **variables), as_json)


def show(found: "Sequence[Recommendation]", as_json: bool = False) -> None:
    """Prints recommendations as a table, or as JSON."""
    if as_json:
        rows = [
            {"item_id": row.item_id, "rank": row.rank, "log_probability": row.log_probability, "title": row.title}
            for row in found
        ]
        Console(soft_wrap=True).print_json(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("rank", justify="right")
    table.add_column("item")
    table.add_column("log p", justify="right")
    table.add_column("title")
    for row in found:
        table.add_row(str(row.rank), escape(str(row.item_id)), f"{row.log_probability:.3f}", escape(row.title or ""))
    Console().print(table)
