"""`llmrec recommend`: the next items after a history, as a table or as JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmrec.cli.options import Artefact, Revision
from llmrec.exceptions import FilterError, RequestError

if TYPE_CHECKING:
    from llmrec.recommendation import Recommendation

_CONDITION = re.compile(r"(.+?)(!=|<=|>=|=)(.*)", re.DOTALL)
_PARTS = {"=": "any_of", "!=": "none_of", "<=": "max", ">=": "min"}


def command(
    artefact: Artefact,
    history: Annotated[str, typer.Option(help="The history's item ids, oldest first: `id,id,id`.")] = "",
    item: Annotated[
        list[str] | None, typer.Option(help="One more item of the history; repeatable, and its id may hold a comma.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="In the place of a history: the whole prompt in words.")] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="How many items to recommend.")] = 10,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Beams of the search, at least k; by default the artefact's.")
    ] = None,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Items of the history may come again.")] = False,
    preference: Annotated[
        str | None, typer.Option(help="What the user likes, in words; for a model trained on the task preference.")
    ] = None,
    events: Annotated[
        str | None,
        typer.Option(
            help='JSON, one object per item: `[{"action": "view", "timestamp": 1700000000}]`; may lack keys.'
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help='JSON, what is known of the event asked for: `{"action": "buy"}`; for a sequence model.'),
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            help="Only items whose attribute is so: `brand=Norvik`, `brand!=Norvik`, `price<=20`, `price>=5`; "
            "repeatable: all must hold, and of several `=` on one attribute any.",
        ),
    ] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Only this item may come back; repeatable.")] = None,
    deny: Annotated[list[str] | None, typer.Option(help="This item may not come back; repeatable.")] = None,
    normalize: Annotated[
        Literal["vocabulary", "legal"],
        typer.Option(help="Probabilities over the model's vocabulary, or over what may be recommended."),
    ] = "vocabulary",
    prefix_cap: Annotated[
        str | None,
        typer.Option(help="For variety: `1:3` for at most 3 items whose semantic IDs have the first code in common."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="For variety: draw the items, at this temperature, in the place of the best.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also show each item's semantic ID, and the log-probability per level.")
    ] = False,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Recommend the next items after a history, in this process (with transformers; no server).

    The artefact is a language model's or a sequence model's.

    Example: `llmrec recommend runs/quickstart/artefact --history P00376,P00064 -k 5 --filter "price<=20" --explain`

    Example: `llmrec recommend user/name --history P00376 --preference "fragrance-free, for sensitive skin"`
    """
    ids = [part.strip() for part in history.split(",") if part.strip()] + (item or [])
    given: dict[str, Any] = {
        "explain": explain or None,
        "preference": preference,
        "events": events,
        "target": target,
        "text": text,
        "num_beams": num_beams,
        "filters": filters,
        "allow": allow,
        "deny": deny,
        "normalize": None if normalize == "vocabulary" else normalize,
        "prefix_cap": prefix_cap,
        "sampling": None if temperature is None else {"temperature": temperature, "seed": seed},
    }
    recommend(
        artefact,
        history=ids if ids or text is None else None,
        k=k,
        exclude_seen=not include_seen,
        revision=revision,
        as_json=as_json,
        **{name: value for name, value in given.items() if value is not None},
    )


def recommend(
    artefact: str,
    history: Sequence[str] | None,
    k: int = 10,
    exclude_seen: bool = True,
    revision: str | None = None,
    as_json: bool = False,
    explain: bool = False,
    events: str | None = None,
    filters: Sequence[str] = (),
    prefix_cap: str | None = None,
    target: str | None = None,
    **more: Any,
) -> None:
    """Prints `k` items to follow `history` (item ids, oldest first).

    Args:
        artefact: a folder, or a Hub id.
        history, k, exclude_seen: as for `Recommender.recommend`, which `more` goes to.
        revision: on the Hub.
        as_json: JSON instead of a table.
        explain: also show semantic IDs and the log-probability of each level.
        events: a JSON list with one object per item of the history: its action, domain and timestamp, each optional.
        target: a JSON object with some of the attributes of an event.
        filters: conditions as `read_filters` takes them.
        prefix_cap: "LEVELS:MOST".

    Raises:
        ArtefactError: the artefact cannot be loaded.
        RequestError: the history cannot be answered, no prompt of the artefact has a place for a preference, or an
            option cannot be read.
    """
    from llmrec.recommender import Recommender

    if events is not None:
        more["events"] = _read_events(events)
    if target is not None:
        more["target"] = _read_target(target)
    if prefix_cap is not None:
        more["prefix_cap"] = _read_cap(prefix_cap)
    recommender = Recommender.from_pretrained(artefact, revision=revision)
    if filters:
        more["filters"] = read_filters(filters, recommender.attributes.kinds)
    show(recommender.recommend(history, k=k, exclude_seen=exclude_seen, **more), as_json, explain)


def read_filters(said: Sequence[str], kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Conditions by attribute, of texts such as "price<=20", read by the attributes' kinds.

    Raises:
        FilterError: if a text is no condition, or its value none of the attribute's kind.

    >>> read_filters(["price<=20", "brand=a", "brand=b", "new!=true"], {"price": "number", "new": "flag"})
    {'price': {'max': 20.0}, 'brand': {'any_of': ['a', 'b']}, 'new': {'none_of': [True]}}
    """
    found: dict[str, dict[str, Any]] = {}
    for text in said:
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise FilterError(
                f"The filter {text[:80]!r} cannot be read. Write one such as brand=Norvik, brand!=Norvik, price<=20."
            )
        name, sign, value = match.group(1).strip(), match.group(2), match.group(3).strip()
        condition, part = found.setdefault(name, {}), _PARTS[sign]
        if part in ("any_of", "none_of"):
            condition.setdefault(part, []).append(_read_value(text, value, kinds.get(name, "text")))
        elif part in condition:
            raise FilterError(f"The filter {text[:80]!r} gives {name!r} a second {part}. Give one.")
        else:
            condition[part] = _read_value(text, value, "number")
    return found


def _read_value(text: str, value: str, kind: str) -> str | float | bool:
    try:
        if kind == "number":
            return float(value)
        if kind == "flag":
            return {"true": True, "false": False}[value.lower()]
    except (ValueError, KeyError) as error:
        wanted = "a number" if kind == "number" else "true or false"
        raise FilterError(f"The filter {text[:80]!r} compares with {value[:80]!r}. Give {wanted} there.") from error
    return value


def _read_cap(text: str) -> dict[str, int]:
    levels, _, most = text.partition(":")
    try:
        return {"levels": int(levels), "most": int(most)}
    except ValueError as error:
        raise RequestError(f"The prefix cap is {text[:80]!r}. Write LEVELS:MOST, such as 1:3.") from error


def _read_target(text: str) -> dict[str, Any]:
    try:
        target = json.loads(text)
        if not isinstance(target, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise RequestError(
            f'The target {text[:80]!r} cannot be read ({error}). Write a JSON object, such as {{"action": "buy"}}.'
        ) from error
    return target


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


def show(found: "Sequence[Recommendation]", as_json: bool = False, explain: bool = False) -> None:
    """Prints recommendations as a table, or as JSON."""
    if as_json:
        rows: list[dict[str, Any]] = [
            {"item_id": row.item_id, "rank": row.rank, "log_probability": row.log_probability, "title": row.title}
            for row in found
        ]
        if explain:
            for shown, row in zip(rows, found, strict=True):
                shown["semantic_id"] = list(row.semantic_id)
                shown["level_log_probabilities"] = list(row.level_log_probabilities)
        Console(soft_wrap=True).print_json(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("rank", justify="right")
    table.add_column("item")
    table.add_column("log p", justify="right")
    if explain:
        table.add_column("semantic ID and log p per level")
    table.add_column("title")
    for row in found:
        levels = zip(row.semantic_id, row.level_log_probabilities, strict=True) if explain else ()
        why = [" ".join(f"{code} ({part:.2f})" for code, part in levels)] if explain else []
        table.add_row(
            str(row.rank), escape(str(row.item_id)), f"{row.log_probability:.3f}", *why, escape(row.title or "")
        )
    Console().print(table)
