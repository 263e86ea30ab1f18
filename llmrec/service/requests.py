"""What a request means: who it is for becomes a prompt, what it asks for a search, what was found an answer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmrec.artefact_parts import RequestEncoder
from llmrec.catalog import Catalog
from llmrec.engine.request import Found, SearchParameters
from llmrec.exceptions import EngineError, RequestError
from llmrec.recommendation import check_request, rows_to_score
from llmrec.selection import require_levels
from llmrec.service.catalogs import Constraint, LiveCatalogs, ServedCatalog
from llmrec.service.filters import require
from llmrec.service.limits import Limits
from llmrec.service.schema import (
    ItemScore,
    RecommendedItem,
    RecommendRequest,
    ScoreRequest,
    SearchRequest,
    StoredEvent,
)


@dataclass(frozen=True)
class Search:
    """A request, ready for the engine.

    Attributes:
        prompt: token ids.
        parameters: of the engine's search.
        expected: how many items there will be; fewer only if `capped`.
        capped: whether a cap on branches may hold items back.
    """

    prompt: list[int]
    parameters: SearchParameters
    expected: int
    capped: bool = False


def beams_of(request: RecommendRequest | SearchRequest, encoder: RequestEncoder, limits: Limits) -> int:
    """The beams that a request is searched with, at least its k.

    Raises:
        RequestError: if it wants more than this server gives.
    """
    _at_most("k", request.k, limits.max_k, "--max-k")
    if request.num_beams is not None:
        _at_most("num_beams", request.num_beams, limits.max_beams, "--max-beams")
    return check_request(request.k, request.num_beams or encoder.settings.num_beams)


def rows_of(request: RecommendRequest | SearchRequest | ScoreRequest, encoder: RequestEncoder, limits: Limits) -> int:
    """The beam rows that a request costs.

    Raises:
        RequestError: if it wants more than this server gives.
    """
    if isinstance(request, ScoreRequest):
        _at_most("The number of items", len(request.items), limits.max_k, "--max-k")
        return len(request.items)
    return beams_of(request, encoder, limits)


def prompt_of(
    encoder: RequestEncoder, request: RecommendRequest | ScoreRequest, stored: Sequence[StoredEvent] | None = None
) -> tuple[list[int], list[int]]:
    """The prompt's token ids, and the catalog rows of the history, ascending.

    Args:
        encoder: of the catalog's version.
        request: for whom.
        stored: the history of its `user_id`, oldest first; items that the catalog lacks are passed over.

    Raises:
        UnknownItemError: if the request's history names items that the catalog does not hold.
        RequestError: if events do not fit the history, or the model has no place for the preference or the target.
        PromptError: if the prompt shows what was not given.
    """
    if request.text is not None:
        return encoder.encode_text(request.text), []
    ignore = request.ignore_unknown
    history: Sequence[str] = request.history or []
    events: list[dict[str, Any]] | None = None
    if request.events is not None:
        events = [event.model_dump() for event in request.events]
    if stored is not None:
        history, ignore = [event.item for event in stored], True
        events = [event.model_dump(exclude={"item"}) for event in stored]
    rows, known = encoder.known(history, events, ignore)
    given = {"preference": request.preference, "target": request.target and request.target.model_dump()}
    said = {name: value for name, value in given.items() if value is not None}
    return encoder.encode(rows, known, encoder.prompt_with(said), **said), sorted(set(rows))


def require_room(prompt: Sequence[int], catalog: Catalog, max_tokens: int) -> None:
    """Raises RequestError if a prompt and an item behind it are longer than the engine was started for."""
    room = max_tokens - catalog.num_levels + 1
    if len(prompt) > room:
        raise RequestError(
            f"The request's prompt has {len(prompt)} tokens, and the server was started for {room}. "
            "Send a shorter text, start the server with a longer --max-model-len, or train with a shorter max_history."
        )


async def recommendation(
    catalogs: LiveCatalogs,
    served: ServedCatalog,
    request: RecommendRequest,
    prompt: list[int],
    seen: list[int],
    beams: int,
) -> Search:
    """The search that answers a recommendation.

    Raises:
        FilterError: if a filter names what items do not have, or fewer items are left than `min_candidates`.
        RequestError: if a cap has more levels than the catalog.
    """
    excluded = seen if request.exclude_seen else []
    if request.prefix_cap is not None:
        # The engine would refuse it too, but with all that is searched together with it.
        require_levels(request.prefix_cap.levels, served.catalog.num_levels)
    constraint = await catalogs.constrain(served, request.filters, request.allow, request.deny, excluded)
    require(constraint.candidates, request.min_candidates)
    parameters = _constrained(served, constraint, request.k, beams)
    parameters = replace(parameters, renormalize=request.normalize == "legal")
    if request.prefix_cap is not None:
        parameters = replace(parameters, cap_levels=request.prefix_cap.levels, cap=request.prefix_cap.most)
    if request.sampling is not None:
        parameters = replace(parameters, temperature=request.sampling.temperature, seed=request.sampling.seed)
    return Search(prompt, parameters, min(request.k, constraint.candidates), request.prefix_cap is not None)


async def query(catalogs: LiveCatalogs, served: ServedCatalog, request: SearchRequest, beams: int) -> Search:
    """The search that answers a query; raises FilterError as a recommendation does, and RequestError if the model
    was not trained to search."""
    prompt = served.encoder.encode_query(request.query)
    constraint = await catalogs.constrain(served, request.filters)
    return Search(prompt, _constrained(served, constraint, request.k, beams), min(request.k, constraint.candidates))


def scoring(served: ServedCatalog, request: ScoreRequest, prompt: list[int]) -> Search:
    """The search that scores a request's items: of these alone, with a beam for each.

    Raises:
        RequestError: if an item is unknown, retired or named twice.
    """
    rows = rows_to_score(served.catalog, request.items)
    parameters = SearchParameters(k=len(rows), num_beams=len(rows), index=served.index, allowed=rows)
    return Search(prompt, parameters, len(rows))


def check_found(search: Search, found: Found) -> None:
    """Raises EngineError if an engine found other than as many items as there are, or scores that are no numbers."""
    count = len(found.rows)
    whole = count == search.expected or (search.capped and count < search.expected)
    if not whole or not all(math.isfinite(score) for score in found.scores):
        raise EngineError(
            f"A search for {search.expected} items found {count}: the model's scores are not numbers. "
            "Its weights are broken or its dtype overflows; serve it in float32."
        )


def items_of(catalog: Catalog, found: Found, explain: bool) -> list[RecommendedItem]:
    """The answer's items, best first."""
    return [
        RecommendedItem(
            id=catalog.ids[row],
            rank=rank,
            log_probability=score,
            title=catalog.title(row),
            semantic_id=catalog.codes[row].tolist() if explain else None,
            level_log_probabilities=list(levels) if explain else None,
        )
        for rank, (row, score, levels) in enumerate(zip(found.rows, found.scores, found.levels, strict=True), start=1)
    ]


def scores_of(catalog: Catalog, request: ScoreRequest, found: Found) -> list[ItemScore]:
    """The scores, in the order asked; raises EngineError if the engine found other items."""
    by_row: Mapping[int, tuple[float, list[float]]] = {
        row: (score, levels) for row, score, levels in zip(found.rows, found.scores, found.levels, strict=True)
    }
    rows = catalog.rows(request.items)
    if by_row.keys() != set(rows):
        raise EngineError("The engine scored other items than it was asked for. See its log, and restart the server.")
    return [
        ItemScore(id=item, log_probability=by_row[row][0], level_log_probabilities=list(by_row[row][1]))
        for item, row in zip(request.items, rows, strict=True)
    ]


def _constrained(served: ServedCatalog, constraint: Constraint, k: int, beams: int) -> SearchParameters:
    return SearchParameters(
        k=k,
        num_beams=beams,
        index=served.index,
        subset=constraint.subset,
        allowed=constraint.allowed,
        excluded=constraint.excluded,
    )


def _at_most(what: str, asked: int, most: int, flag: str) -> None:
    if asked > most:
        raise RequestError(
            f"{what} is {asked}, and this server gives at most {most}. Ask for at most {most}, or start the server "
            f"with a higher {flag}."
        )
