"""`llmrec recommend`: the next items after a history, as a table or as JSON."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmrec.exceptions import RequestError

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
    events: str | None = None,
) -> None:
    """Prints `k` items to follow `history` (item ids, oldest first), for a user with this `preference` in words.

    `events` is a JSON list with one object per item of the history: its action, domain and timestamp, each optional.

    Raises:
        ArtefactError: the artefact cannot be loaded.
        RequestError: the history cannot be answered, no prompt of the artefact has a place for a preference, or the
            events cannot be read.
    """
    from llmrec.recommender import Recommender

    more: dict[str, Any] = {} if preference is None else {"preference": preference}
    if events is not None:
        more["events"] = _read_events(events)
    recommender = Recommender.from_pretrained(artefact, revision=revision)
    show(recommender.recommend(history, k=k, exclude_seen=exclude_seen, **more), as_json)


def _read_events(text: str) -> list[dict[str, Any]]:
    try:
        events = json.loads(text)
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise ValueError("no list of objects")
    except ValueError as error:
        raise RequestError(
            f"The events {text[:80]!r} cannot be read ({error}). "
            'Write a JSON list of objects, such as [{"action": "view", "timestamp": 1700000000}].'
        ) from error
    return events


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
