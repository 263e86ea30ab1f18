"""A server without vLLM: uvicorn, the service and an engine in this process; up in seconds, for small loads."""

import asyncio
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.artefact import TEMPLATES_FOLDER
from llmrec.artefact_parts import is_sequence, load_parts, read_settings
from llmrec.catalog import CATALOG_FOLDER
from llmrec.catalog_versions import CatalogVersions
from llmrec.engine.request import SearchEngine
from llmrec.exceptions import EngineError
from llmrec.history_store import open_store
from llmrec.service.app import build_app
from llmrec.service.batched_engine import BatchedEngine
from llmrec.service.catalogs import LiveCatalogs
from llmrec.service.drain import DEFAULT_DRAIN_SECONDS, DrainingServer
from llmrec.service.keys import Keys
from llmrec.service.metrics import Metrics
from llmrec.service.service import Service
from llmrec.service.settings import ServiceSettings
from llmrec.service.transformers_engine import TransformersEngine
from llmrec.tasks.templates import load_templates

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

logger = logging.getLogger(__name__)

_KEEP_ALIVE = 30  # seconds; longer than a proxy keeps a connection that it does not use


def serve_standalone(
    artefact: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: ServiceSettings | None = None,
    keys: Keys | None = None,
    dtype: str = "auto",
    device: str | None = None,
    catalog_version: str | None = None,
) -> None:
    """Serves an artefact with transformers until SIGTERM or SIGINT, and then until what is in flight is answered.

    Args:
        artefact: a checked artefact folder.
        host, port: where to listen.
        settings: catalogs, limits, the history store, adapters.
        keys: who may use it; None: everybody.
        dtype: of the weights; "auto" is the saved one.
        device: default: a GPU if there is one.
        catalog_version: that the default catalog begins with; default: the current one.

    Raises:
        EngineError: if the first recommendation is wrong, or the port cannot be used.
        ArtefactError, CatalogError, RequestError: if something cannot be loaded, or a limit does not fit the model.
    """
    settings = settings or ServiceSettings()
    with tempfile.TemporaryDirectory(prefix="llmrec-index-") as folder:
        engine = engine_of(artefact, settings, Path(folder), dtype, device)
        try:
            service = service_of(engine, artefact, settings, Path(folder), catalog_version)
            asyncio.run(serve(service, host, port, keys, settings.drain_seconds))
        finally:
            engine.close()


def engine_of(
    artefact: Path, settings: ServiceSettings, index_folder: Path, dtype: str = "auto", device: str | None = None
) -> BatchedEngine:
    """The engine of an artefact of either kind; it is the caller's to close.

    Raises:
        RequestError: if the settings are for a model of the other kind.
        DependencyError: if faiss is asked for and not installed.
    """
    settings.require_kind(artefact.name, is_sequence(artefact))
    if not is_sequence(artefact):
        return TransformersEngine(load_model(artefact, settings.adapters, dtype, device), index_folder)
    from llmrec.sequence.engine import SequenceEngine
    from llmrec.sequence.recommender import load_model as load_sequence_model

    retrieval: Any = settings.retrieval
    return SequenceEngine(load_sequence_model(artefact, dtype, device), retrieval)


def load_model(artefact: Path, adapters: Mapping[str, str], dtype: str = "auto", device: str | None = None) -> Any:
    """An artefact's model in transformers; with adapters (name -> folder), in PEFT around it."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(artefact, dtype=dtype)
    for place, (name, folder) in enumerate(adapters.items()):
        from peft import PeftModel

        if place:
            model.load_adapter(folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def service_of(
    engine: SearchEngine,
    artefact: Path,
    settings: ServiceSettings,
    index_folder: Path,
    catalog_version: str | None = None,
    registry: "CollectorRegistry | None" = None,
) -> Service:
    """The service of an artefact and an engine, of whatever kind: catalogs, tokenizer, prompts and store are loaded.

    Args:
        artefact: a checked artefact folder.
        index_folder: that the engine reads tries from.
        catalog_version: that the default catalog begins with; default: the current one.
        registry: for the metrics; default: one of its own.

    Raises:
        ArtefactError, CatalogError, RequestError: if something cannot be loaded, or a limit does not fit the model.
    """
    folders = {name: CatalogVersions.inside(folder).folder for name, folder in settings.catalogs.items()}
    folders = folders or {"default": artefact / CATALOG_FOLDER}
    return Service(
        engine=engine,
        catalogs=_catalogs(engine, artefact, folders, index_folder, catalog_version),
        model=settings.model or artefact.name,
        histories=open_store(settings.history_store) if settings.history_store else None,
        limits=settings.limits,
        metrics=Metrics(registry, list(folders), engine.adapters),
        launch=settings.launch,
    )


def _catalogs(
    engine: SearchEngine,
    artefact: Path,
    folders: Mapping[str, Path],
    index_folder: Path,
    catalog_version: str | None,
) -> LiveCatalogs:
    """The catalogs, with what makes prompts of them."""
    versions = {} if catalog_version is None else {next(iter(folders)): catalog_version}
    if is_sequence(artefact):
        from llmrec.sequence.engine import SequenceEngine
        from llmrec.sequence.history_encoder import HistoryEncoder

        assert isinstance(engine, SequenceEngine)
        settings, events = read_settings(artefact), engine.events
        return LiveCatalogs.of(
            folders, engine.items, lambda catalog: HistoryEncoder(catalog, settings, events), versions
        )
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(artefact)
    tokenizer, _, prompt, settings = load_parts(artefact, loaded, catalog_version)
    parts = (tokenizer, prompt, settings, load_templates(artefact / TEMPLATES_FOLDER))
    return LiveCatalogs(folders, parts, index_folder, versions)


async def serve(
    service: Service, host: str, port: int, keys: Keys | None = None, drain_seconds: float = DEFAULT_DRAIN_SECONDS
) -> None:
    """Serves any service until SIGTERM or SIGINT; returns when what was in flight is answered.

    Raises:
        EngineError: if its first recommendation is wrong, or the port cannot be used.
    """
    import uvicorn

    try:
        await service.start()
        config = uvicorn.Config(
            build_app(service, keys=keys),
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            lifespan="off",
        )
        server = DrainingServer(config, service, drain_seconds)
        logger.info("listening on http://%s:%d", host, port)
        try:
            await server.serve()
        except SystemExit as error:  # how uvicorn ends where it cannot listen
            raise EngineError(f"Port {port} of {host} cannot be used. Choose another, or free it.") from error
    finally:
        await service.close()
