"""What each method of a client sends, and how its answer is read; knows neither sockets nor retries."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from llmrec.exceptions import RequestError, ServerError
from llmrec.service.schema import (
    AppendRequest,
    CatalogItems,
    CatalogsResponse,
    CatalogState,
    Condition,
    HistoryEvent,
    PrefixCap,
    RecommendBatch,
    RecommendBatchResponse,
    RecommendRequest,
    RecommendResponse,
    Sampling,
    ScoreRequest,
    ScoreResponse,
    SearchRequest,
    StoredEvent,
    SwapRequest,
    SwapResponse,
    UserHistory,
    UserId,
)

API_KEY = "LLMREC_API_KEY"
LONGEST_DEADLINE = 600.0  # seconds; the schema's limit of deadline_ms

_USER_ID: TypeAdapter[str] = TypeAdapter(UserId)

Answer = TypeVar("Answer")
Values = TypeVar("Values", bound=BaseModel)


class AskedOptions(TypedDict, total=False):
    """What a recommendation and a score may be asked with; `llmrec.service.schema` says what each means."""

    user_id: str | None
    text: str | None
    events: Sequence[HistoryEvent | Mapping[str, Any]] | None
    preference: str | None
    target: HistoryEvent | Mapping[str, Any] | None
    ignore_unknown: bool
    adapter: str | None
    catalog: str | None
    deadline_ms: int | None


class RecommendOptions(AskedOptions, total=False):
    """What a recommendation may be asked with."""

    k: int
    num_beams: int | None
    exclude_seen: bool
    filters: Mapping[str, Condition | Mapping[str, Any]]
    allow: Sequence[str] | None
    deny: Sequence[str]
    min_candidates: int
    normalize: Literal["vocabulary", "legal"]
    prefix_cap: PrefixCap | Mapping[str, Any] | None
    sampling: Sampling | Mapping[str, Any] | None
    explain: bool


class SearchOptions(TypedDict, total=False):
    """What a search may be asked with."""

    k: int
    num_beams: int | None
    filters: Mapping[str, Condition | Mapping[str, Any]]
    adapter: str | None
    catalog: str | None
    deadline_ms: int | None
    explain: bool


class _Forgotten(BaseModel):
    deleted: bool


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One method call, before it is sent.

    Attributes:
        method, path: of HTTP; the path is behind the server's URL and begins without a slash.
        read: what the method returns, from a response of status 2xx.
        body: JSON, if there is any.
        timed: the objects within `body` that take a `deadline_ms` and were given none.
        params: of the query.
        repeatable: whether it may be sent again where nobody knows if the server has done it.
        unavailable: what the method returns where the server is busy or cannot be reached; none: an error.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], Answer]
    body: dict[str, Any] | None = None
    timed: Sequence[dict[str, Any]] = ()
    params: dict[str, str | int] = field(default_factory=dict)
    repeatable: bool = True
    unavailable: Answer | None = None

    def content(self, seconds: float) -> bytes | None:
        """The body as JSON; the server is told to stop when the caller does, `seconds` from now."""
        if self.body is None:
            return None
        deadline = max(1, int(min(seconds, LONGEST_DEADLINE) * 1000))
        for request in self.timed:
            request["deadline_ms"] = deadline
        return json.dumps(self.body, ensure_ascii=False, allow_nan=False).encode()


def api_key_of(given: str | None) -> str | None:
    """The key given, or that of the environment.

    Raises:
        RequestError: if it cannot stand in a header; the message does not show it.
    """
    key = os.environ.get(API_KEY) if given is None else given
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise RequestError(f"The API key has spaces, line ends or characters beyond ASCII. Look at {API_KEY}.")
    return key or None


def server_url(url: str) -> str:
    """The URL without a slash at its end.

    Raises:
        RequestError: if it is none of a server's. A password in it is not shown.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise RequestError("The server's URL cannot be read. Give one such as http://127.0.0.1:8000.") from error
    if parsed.userinfo:
        raise RequestError("The server's URL holds a user or password, which would be shown. Give the key as api_key.")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise RequestError(f"{url[:200]!r} is no server's URL. Give one such as http://127.0.0.1:8000.")
    return str(parsed.copy_with(query=None, fragment=None)).rstrip("/")


def recommend(history: Sequence[str] | None, options: Mapping[str, Any]) -> Call[RecommendResponse]:
    body = _body(RecommendRequest, {"history": history, **options})
    return Call("POST", "v1/recommend", _reader(RecommendResponse), body, _timed([body]))


def recommend_many(requests: Sequence[RecommendRequest | Mapping[str, Any]]) -> Call[list[RecommendResponse]]:
    body = _body(RecommendBatch, {"requests": list(requests)})
    read = _reader(RecommendBatchResponse)
    return Call("POST", "v1/recommend", lambda response: read(response).responses, body, _timed(body["requests"]))


def search(query: str, options: Mapping[str, Any]) -> Call[RecommendResponse]:
    body = _body(SearchRequest, {"query": query, **options})
    return Call("POST", "v1/search", _reader(RecommendResponse), body, _timed([body]))


def score(history: Sequence[str] | None, items: Sequence[str], options: Mapping[str, Any]) -> Call[ScoreResponse]:
    body = _body(ScoreRequest, {"history": history, "items": items, **options})
    return Call("POST", "v1/score", _reader(ScoreResponse), body, _timed([body]))


def catalogs() -> Call[list[CatalogState]]:
    read = _reader(CatalogsResponse)
    return Call("GET", "v1/catalog", lambda response: read(response).catalogs)


def swap(version: str, catalog: str | None) -> Call[SwapResponse]:
    # Done a second time, it would name the new version as the previous one.
    body = _body(SwapRequest, {"version": version, "catalog": catalog})
    return Call("PUT", "v1/catalog", _reader(SwapResponse), body, repeatable=False)


def items(search: str, catalog: str | None, offset: int, limit: int) -> Call[CatalogItems]:
    params: dict[str, str | int] = {"search": search, "offset": offset, "limit": limit}
    if catalog is not None:
        params["catalog"] = catalog
    return Call("GET", "v1/catalog/items", _reader(CatalogItems), params=params)


def history(user_id: str, last: int | None) -> Call[UserHistory]:
    params: dict[str, str | int] = {} if last is None else {"last": last}
    return Call("GET", f"v1/users/{_segment(user_id)}/history", _reader(UserHistory), params=params)


def append(user_id: str, events: Sequence[StoredEvent | Mapping[str, Any] | str]) -> Call[None]:
    whole = [{"item": event} if isinstance(event, str) else event for event in events]
    body = _body(AppendRequest, {"events": whole})
    return Call("POST", f"v1/users/{_segment(user_id)}/events", lambda _: None, body, repeatable=False)


def forget(user_id: str) -> Call[bool]:
    read = _reader(_Forgotten)
    # Sent again, it would answer that there was nothing to forget.
    path = f"v1/users/{_segment(user_id)}"
    return Call("DELETE", path, lambda response: read(response).deleted, repeatable=False)


def ready() -> Call[bool]:
    return Call("GET", "ready", lambda _: True, unavailable=False)


def health() -> Call[bool]:
    return Call("GET", "health", lambda _: True, unavailable=False)


def _body(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of a request's body, with what was given alone; None and the default are the same there.

    Raises:
        RequestError: if the values do not fit the schema.
    """
    try:
        checked = model.model_validate(dict(values))
    except ValidationError as error:
        raise RequestError(explained(error.errors(include_url=False))) from error
    body: dict[str, Any] = checked.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return body


def _timed(bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [body for body in bodies if "deadline_ms" not in body]


def explained(errors: Sequence[Mapping[str, Any]]) -> str:
    """A message out of pydantic's list of what does not fit, which FastAPI sends as it is."""
    parts = []
    for error in errors[:3]:
        place = ".".join(str(step) for step in error.get("loc", ()) if step != "body")
        said = str(error.get("msg", "does not fit")).removeprefix("Value error, ")
        parts.append(f"{place}: {said}" if place else said)
    more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    return f"The request does not fit: {'; '.join(parts)}{more}. See the API's description in llmrec.service.schema."


def _reader(model: type[Values]) -> Callable[[httpx.Response], Values]:
    """Reads a response's JSON as that model; what a newer server adds is passed over."""

    def read(response: httpx.Response) -> Values:
        try:
            return model.model_validate_json(response.content)
        except ValidationError as error:
            raise ServerError(
                f"The answer of {response.url.copy_with(query=None)} is not llmrec's ({len(response.content)} bytes, "
                f"{error.error_count()} mistakes). Look at the URL, and whether client and server are of one version.",
                response.status_code,
            ) from error

    return read


def _segment(user_id: str) -> str:
    """A user's id as one segment of a path: nothing of it is a slash, and it is none of the dots that paths resolve.

    Raises:
        RequestError: if it is no id.
    """
    try:
        _USER_ID.validate_python(user_id)
    except ValidationError as error:
        raise RequestError(
            f"{str(user_id)[:80]!r} is no user id. Give a string of 1 to 1,000 characters that UTF-8 can spell."
        ) from error
    return quote(user_id, safe="").replace(".", "%2E")
