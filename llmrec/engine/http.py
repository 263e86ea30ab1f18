"""vLLM's endpoint plugin: puts the service on vLLM's own HTTP server, and takes away what recommenders do not use."""

import asyncio
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY

from llmrec.engine.plugin import CATALOG_VERSION, INDEX_FOLDER, LAUNCH
from llmrec.engine.vllm_engine import VLLMEngine
from llmrec.exceptions import EngineError
from llmrec.service.app import attach
from llmrec.service.drain import install
from llmrec.service.keys import Keys
from llmrec.service.settings import ServiceSettings
from llmrec.service.standalone import service_of

# Of vLLM's routes these stay. Others would hand out a search's raw tensor as an embedding, tokenize for anybody, or
# change the server.
KEPT = frozenset(("/v1/models", "/metrics", "/version", "/docs", "/openapi.json"))


class RecommendRoutes:
    """vLLM's endpoint plugin: an object with these names."""

    name = "llmrec_http"
    required_tasks = ("embed",)

    def __init__(self) -> None:
        self._app: FastAPI | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Notes the application: vLLM adds routes, handlers and layers to it after this, and ours are to be last."""
        self._app = app

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Loads the artefact beside the engine, checks a recommendation, and attaches the service.

        vLLM calls this before the server listens.

        Raises:
            EngineError: if the first recommendation is wrong, or vLLM was started otherwise than by `llmrec serve`.
            ArtefactError, CatalogError, RequestError: as `service_of`.
        """
        if self._app is None or not os.environ.get(INDEX_FOLDER):
            raise EngineError(f"The variable {INDEX_FOLDER} is not set. Start the server with llmrec serve.")
        artefact = Path(engine_client.model_config.model)
        settings = ServiceSettings.from_environment(os.environ)
        settings = settings.named(
            model=settings.model or (args.served_model_name or [artefact.name])[0],
            launch=settings.launch or os.environ.get(LAUNCH, ""),
        )
        keys = Keys.from_environment(os.environ)
        service = await asyncio.to_thread(
            service_of,
            VLLMEngine(engine_client, getattr(state.openai_serving_models, "lora_requests", {})),
            artefact,
            settings,
            Path(os.environ[INDEX_FOLDER]),
            os.environ.get(CATALOG_VERSION),
            REGISTRY,  # the one that vLLM's /metrics shows
        )
        await service.start()
        attach(self._app, service, keys=keys, kept=KEPT)
        install(engine_client, service, settings.drain_seconds, state)
