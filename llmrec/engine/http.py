"""The HTTP side: `POST /v1/recommend` and `/v1/search`, attached to vLLM's own server as an endpoint plugin."""

import asyncio
import logging
import os
import uuid
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

from llmrec.artefact import TEMPLATES_FOLDER
from llmrec.artefact_parts import PromptEncoder, load_parts
from llmrec.catalog import Catalog
from llmrec.engine.plugin import CATALOG_VERSION, LAUNCH, MAX_BEAMS
from llmrec.engine.request import FAILED, SearchParameters
from llmrec.exceptions import EngineError, PromptError, RequestError
from llmrec.recommender import check_request
from llmrec.tasks.templates import load_templates

logger = logging.getLogger(__name__)

DEFAULT_MAX_BEAMS = 512
# Routes of vLLM's pooling server that would hand out a search's raw tensor as if it were an embedding.
_HIDDEN = (
    "/pooling",
    "/invocations",
    "/v1/embeddings",
    "/v2/embed",
    "/classify",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
)
# Prefill and beam step of one model agree to rounding; a wrong cache layout is off by orders of magnitude.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}


class HistoryEvent(BaseModel):
    """What is known of one place of a history, beside its item."""

    model_config = ConfigDict(extra="forbid")

    action: str | None = Field(default=None, max_length=1_000, description="What the user did there, as in the log.")
    domain: str | None = Field(default=None, max_length=1_000, description="The shop or category, as in the log.")
    timestamp: float | None = Field(default=None, allow_inf_nan=False, description="Unix seconds.")


class RecommendRequest(BaseModel):
    """What to recommend for."""

    model_config = ConfigDict(extra="forbid")

    history: list[str] = Field(
        max_length=10_000, description="Item ids, oldest first. Empty: what the model expects of a new user."
    )
    k: int = Field(default=10, ge=1, strict=True, description="Items wanted. Fewer come back only where fewer remain.")
    exclude_seen: bool = Field(default=True, description="Whether items of the history are no candidates.")
    num_beams: int | None = Field(
        default=None,
        ge=1,
        strict=True,
        description="Beams of the search, at least k. More find better items, at more cost.",
    )
    ignore_unknown: bool = Field(
        default=False, description="Skip ids that the catalog does not hold, instead of refusing the request."
    )
    events: list[HistoryEvent] | None = Field(
        default=None,
        max_length=10_000,
        description="One per item of the history; for a prompt that shows actions, domains or gaps.",
    )
    preference: str | None = Field(
        default=None,
        max_length=10_000,
        description="What the user likes, in words; for a model trained on preferences.",
    )


class SearchRequest(BaseModel):
    """What to search for."""

    model_config = ConfigDict(extra="forbid")

    query: str = Field(max_length=10_000, description="Some words.")
    k: int = Field(default=10, ge=1, strict=True, description="Items wanted. Fewer come back only where fewer remain.")
    num_beams: int | None = Field(default=None, ge=1, strict=True, description="Beams of the search, at least k.")


class RecommendedItem(BaseModel):
    """One item of the answer."""

    id: str
    rank: int = Field(description="1 for the best.")
    log_probability: float = Field(description="Natural logarithm of the item's probability given the history.")
    title: str


class RecommendResponse(BaseModel):
    """The answer, best item first."""

    items: list[RecommendedItem]
    model: str
    catalog_version: str


class Endpoint:
    """Answers requests: ids to prompt, one engine request, rows to items."""

    def __init__(
        self, engine: Any, encoder: PromptEncoder, catalog: Catalog, model: str, max_beams: int, max_tokens: int
    ) -> None:
        self.engine = engine
        self.encoder = encoder
        self.catalog = catalog
        self.model = model
        self.max_beams = max_beams
        self.max_tokens = max_tokens

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """Raises RequestError or PromptError for what cannot be answered, EngineError if the engine fails."""
        events = None if request.events is None else [event.model_dump() for event in request.events]
        rows, known = self.encoder.known(request.history, events, request.ignore_unknown)
        said = {} if request.preference is None else {"preference": request.preference}
        prompt = self.encoder.encode(rows, known, self.encoder.prompt_with(said), **said)
        seen = sorted(set(rows)) if request.exclude_seen else []
        return await self._answer(prompt, request.k, request.num_beams, seen)

    async def search(self, request: SearchRequest) -> RecommendResponse:
        """The items that a query means; raises as `recommend` does, and if the model was not trained to search."""
        return await self._answer(self.encoder.encode_query(request.query), request.k, request.num_beams, [])

    async def _answer(self, prompt: list[int], k: int, num_beams: int | None, seen: list[int]) -> RecommendResponse:
        beams = check_request(k, num_beams or self.encoder.settings.num_beams)
        if beams > self.max_beams:
            raise RequestError(
                f"k or num_beams is {beams}, and this server searches with at most {self.max_beams} beams. "
                f"Ask for at most {self.max_beams}, or start the server with a higher --max-beams."
            )
        if len(prompt) > self.max_tokens:
            raise RequestError(
                f"The history's prompt has {len(prompt)} tokens, and the server was started for {self.max_tokens}. "
                "Start it with a longer --max-model-len, or train with a shorter max_history."
            )
        found = await self._encode(prompt, SearchParameters(k, beams, seen))
        items = [
            RecommendedItem(
                id=self.catalog.ids[int(row)],
                rank=rank,
                log_probability=score,
                title=self.catalog.title(int(row)),
            )
            for rank, (row, score) in enumerate(found, start=1)
        ]
        if len(items) != min(k, self.catalog.candidates(seen)):
            raise EngineError("The engine returned too few items: the model's scores are not numbers. See its log.")
        return RecommendResponse(items=items, model=self.model, catalog_version=self.catalog.version)

    async def check(self) -> None:
        """Compares a search with ordinary prefills, so that a drift of vLLM's internals stops the server at its start.

        Raises:
            EngineError: if the best item's log-probability is not the sum over its tokens.
        """
        prompt = self.encoder.example()
        ((row, score),) = await self._encode(prompt, SearchParameters(k=1, num_beams=4))
        total = 0.0
        for token in self.catalog.tokens_of(int(row)):
            ((_, value),) = await self._encode(prompt, SearchParameters(num_beams=0, token=token))
            total += value
            prompt = [*prompt, token]
        dtype = str(self.engine.model_config.dtype).removeprefix("torch.")
        if not abs(total - score) <= _TOLERANCE.get(dtype, 1e-3):
            raise EngineError(
                f"A beam search gave the log-probability {score:.6f}, ordinary prefill {total:.6f}. "
                "This vLLM works otherwise than the one llmrec was built for: use vllm 0.32."
            )
        logger.info("llmrec: beam search and prefill agree to %.1e", abs(total - score))

    async def _encode(self, prompt: list[int], parameters: SearchParameters) -> list[list[float]]:
        from vllm.inputs import TokensPrompt
        from vllm.pooling_params import PoolingParams

        params = PoolingParams(task="embed", extra_kwargs=parameters.pack())
        result = None
        async for output in self.engine.encode(
            TokensPrompt(prompt_token_ids=prompt), params, f"recommend-{uuid.uuid4().hex}"
        ):
            result = output
        if result is None:
            raise EngineError("The engine ended without an answer. See its log, and restart the server.")
        found: list[list[float]] = result.outputs.data.double().tolist()
        if found and found[0][0] == FAILED:
            raise EngineError("The engine could not answer this request. Its log has the reason.")
        return found


class RecommendRoutes:
    """vLLM's endpoint plugin: an object with these three names."""

    name = "llmrec_http"
    required_tasks = ("embed",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds llmrec's routes to vLLM's application, and takes away those that make no sense for a recommender."""
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in _HIDDEN]
        app.include_router(_router())

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Loads the artefact's catalog, tokenizer and prompt, and checks the engine before the server answers."""
        from transformers import AutoTokenizer

        folder = Path(engine_client.model_config.model)
        positions = engine_client.model_config.max_model_len
        tokenizer, catalog, prompt, settings = await asyncio.to_thread(
            lambda: load_parts(folder, AutoTokenizer.from_pretrained(folder), os.environ.get(CATALOG_VERSION))
        )
        if positions < catalog.num_levels:
            raise EngineError(
                f"The server was started for {positions} tokens, and an item alone may have {catalog.num_levels}. "
                "Start it with a longer --max-model-len."
            )
        state.llmrec = Endpoint(
            engine=engine_client,
            encoder=PromptEncoder(tokenizer, catalog, prompt, settings, load_templates(folder / TEMPLATES_FOLDER)),
            catalog=catalog,
            model=(args.served_model_name or [folder.name])[0],
            max_beams=int(os.environ.get(MAX_BEAMS, DEFAULT_MAX_BEAMS)),
            max_tokens=positions - catalog.num_levels + 1,
        )
        await state.llmrec.check()


def _router() -> APIRouter:
    router = APIRouter(tags=["recommend"])

    async def answered(answer: Awaitable[RecommendResponse]) -> RecommendResponse:
        try:
            return await answer
        except (RequestError, PromptError) as error:
            raise HTTPException(status_code=422, detail=str(error)) from error
        except EngineError as error:
            raise HTTPException(status_code=500, detail=str(error)) from error

    @router.post("/v1/recommend")
    async def recommend(request: RecommendRequest, raw: Request) -> RecommendResponse:
        """The k most probable next items of a history, none outside the catalog and none twice."""
        return await answered(raw.app.state.llmrec.recommend(request))

    @router.post("/v1/search")
    async def search(request: SearchRequest, raw: Request) -> RecommendResponse:
        """The k items that a query most probably means, for a model that was trained to search."""
        return await answered(raw.app.state.llmrec.search(request))

    @router.get("/ready")
    async def ready(raw: Request) -> dict[str, Any]:
        """Answers once the server has loaded its catalog and its search has been checked against ordinary prefill."""
        endpoint: Endpoint | None = getattr(raw.app.state, "llmrec", None)
        if endpoint is None or endpoint.engine.errored:
            raise HTTPException(status_code=503, detail="The engine is not running. See the server's log.")
        return {
            "ready": True,
            "items": len(endpoint.catalog),
            "catalog_version": endpoint.catalog.version,
            "launch": os.environ.get(LAUNCH),
        }

    return router
