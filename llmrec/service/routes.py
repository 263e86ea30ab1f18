"""The HTTP API's routes. They hold no logic: a body goes to the `Service`, its answer back."""

from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query, Request, Response
from pydantic import BaseModel, Discriminator, Field, Tag

from llmrec.service.errors import ErrorBody, Problem
from llmrec.service.schema import (
    CatalogItems,
    CatalogsResponse,
    Name,
    RecommendBatch,
    RecommendBatchResponse,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
    SearchRequest,
    SwapRequest,
    SwapResponse,
)
from llmrec.service.service import Service

MAX_OFFSET = 2**53

_SAID = {
    HTTPStatus.BAD_REQUEST: "The body is no JSON, or nested too deep.",
    HTTPStatus.UNAUTHORIZED: "The API key is missing or wrong.",
    HTTPStatus.NOT_FOUND: "There is no such catalog, version or user.",
    HTTPStatus.REQUEST_TIMEOUT: "The body took too long to arrive.",
    HTTPStatus.CONFLICT: "That catalog is being swapped already.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is too long.",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "The body is not said to be JSON.",
    HTTPStatus.UNPROCESSABLE_ENTITY: "A field is missing, unknown or out of range, or the request cannot be answered.",
    HTTPStatus.TOO_MANY_REQUESTS: "The server has as much to do as it takes. See Retry-After.",
    HTTPStatus.INTERNAL_SERVER_ERROR: "The server failed; its log has the reason.",
    HTTPStatus.SERVICE_UNAVAILABLE: "The server is not ready, or is being stopped, or its history store is away.",
    HTTPStatus.GATEWAY_TIMEOUT: "The request's deadline passed.",
}
ALWAYS = (401, 429, 500)
WITH_BODY = (*ALWAYS, 400, 408, 413, 415, 422)
WORK = (*WITH_BODY, 404, 503, 504)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these errors."""
    return {status: {"model": ErrorBody, "description": _SAID[HTTPStatus(status)]} for status in sorted(set(statuses))}


class Health(BaseModel):
    """The process is alive, and so is its engine."""

    alive: Literal[True] = True


class Ready(BaseModel):
    """The server answers recommendations."""

    ready: Literal[True] = True
    items: int = Field(description="Live items of the default catalog.")
    catalog_version: str = Field(description="Of the default catalog.")
    catalogs: dict[str, str] = Field(description="Every catalog's version.")
    launch: str | None = Field(default=None, description="What the server was started with, to know it by.")


class Model(BaseModel):
    """The model, or an adapter of it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llmrec"
    root: str
    parent: str | None = None
    max_model_len: int | None = None


class Models(BaseModel):
    """What requests may name; adapters have the model for their parent."""

    object: Literal["list"] = "list"
    data: list[Model]


def _kind(body: Any) -> str:
    return "batch" if isinstance(body, RecommendBatch) or (isinstance(body, dict) and "requests" in body) else "one"


OneOrMany = Annotated[
    Annotated[RecommendRequest, Tag("one")] | Annotated[RecommendBatch, Tag("batch")], Discriminator(_kind)
]


OneOrManyAnswers = RecommendResponse | RecommendBatchResponse


def service_of(request: Request) -> Service:
    """The application's service."""
    service: Service = request.app.state.llmrec
    return service


def _json(answer: BaseModel) -> Response:
    # The models were made here: to validate them again would cost more than to write them.
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


def routes() -> APIRouter:
    """All routes that every server has; the service is `app.state.llmrec`."""
    router = APIRouter(tags=["llmrec"])

    @router.post("/v1/recommend", responses=documented(*WORK), response_model=OneOrManyAnswers)
    async def recommend(body: Annotated[OneOrMany, Body()], request: Request) -> Response:
        """The k most probable next items of a history, none outside the catalog and none twice; or of several."""
        service = service_of(request)
        if isinstance(body, RecommendBatch):
            return _json(await service.recommend_together(body))
        return _json(await service.recommend(body))

    @router.post("/v1/search", responses=documented(*WORK), response_model=RecommendResponse)
    async def search(body: SearchRequest, request: Request) -> Response:
        """The k items that a query most probably means, for a model that was trained to search."""
        return _json(await service_of(request).search(body))

    @router.post("/v1/score", responses=documented(*WORK), response_model=ScoreResponse)
    async def score(body: ScoreRequest, request: Request) -> Response:
        """The log-probabilities of given items as the next one of a history."""
        return _json(await service_of(request).score(body))

    @router.get("/v1/catalog", responses=documented(*ALWAYS))
    async def catalogs(request: Request) -> CatalogsResponse:
        """The server's catalogs, their versions, and what filters may name."""
        return await service_of(request).states()

    @router.put("/v1/catalog", responses=documented(*WITH_BODY, 404, 409, 503))
    async def swap(body: SwapRequest, request: Request) -> SwapResponse:
        """Sends requests that begin from now on to another version of a catalog; if it fails, the old one stays."""
        return await service_of(request).swap(body)

    @router.get("/v1/catalog/items", responses=documented(*ALWAYS, 404, 422, 504), response_model=CatalogItems)
    async def items(
        request: Request,
        catalog: Annotated[Name | None, Query(description="Default: the first.")] = None,
        search: Annotated[str, Query(max_length=1_000, description="What an id or a title holds.")] = "",
        offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> Response:
        """Items of a catalog, by row."""
        return _json(await service_of(request).items(catalog, search, offset, limit))

    @router.get("/health", responses=documented(500, 503), response_model=Health)
    async def health(request: Request) -> Response:
        """Answers without a key while the process and its engine live; whether it is of use is what `/ready` says."""
        if service_of(request).engine.errored:
            return _unavailable("The engine has ended. See the server's log, and start it again.")
        return _json(Health())

    @router.get("/ready", responses=documented(401, 500, 503), response_model=Ready)
    async def ready(request: Request) -> Response:
        """Answers 200 if the last canary recommendation passed, and the server is not being stopped."""
        service = service_of(request)
        why = service.unready
        service.metrics.ready(why is None)
        if why is not None:
            return _unavailable(why)
        versions: dict[str, str] = {}
        live = 0
        for place, name in enumerate(service.catalogs.names):
            with service.catalogs.using(name) as served:
                versions[name] = served.version
                live = live if place else served.catalog.num_live
        first = service.catalogs.names[0]
        answer = Ready(items=live, catalog_version=versions[first], catalogs=versions, launch=service.launch or None)
        return _json(answer)

    return router


def model_route() -> APIRouter:
    """`/v1/models`, for servers that have none of their own."""
    router = APIRouter(tags=["llmrec"])

    @router.get("/v1/models", responses=documented(*ALWAYS), response_model=Models)
    async def models(request: Request) -> Models:
        """The model and its adapters."""
        service = service_of(request)
        base = Model(
            id=service.model, created=service.created, root=service.model, max_model_len=service.engine.max_tokens
        )
        adapters = [
            Model(id=name, created=service.created, root=name, parent=service.model)
            for name in service.engine.adapters
        ]
        return Models(data=[base, *adapters])

    return router


def metrics_route() -> APIRouter:
    """`/metrics`, for servers that have none of their own."""
    from prometheus_client import CONTENT_TYPE_LATEST

    router = APIRouter(tags=["llmrec"])

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **documented(401, 500)},
    )
    async def metrics(request: Request) -> Response:
        """Everything for Prometheus, as text."""
        return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def _unavailable(why: str) -> Response:
    return Problem(int(HTTPStatus.SERVICE_UNAVAILABLE), why, "NotReadyError", headers={"Retry-After": "1"}).response()
