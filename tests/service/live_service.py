"""Whole servers for the tests: a tiny artefact, its service in this process, or in one of its own."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import random_recommender

from llmrec.client import Client
from llmrec.engine.request import Found
from llmrec.service.service import Service
from llmrec.service.settings import ServiceSettings

CATEGORIES = ("Lamps", "Sofas", "Beds", "Ünïcode 🛋")


def save_artefact(folder: Path, seed: int = 0, num_items: int = 60, num_beams: int = 8, num_retired: int = 0) -> Path:
    """An untrained model's artefact whose items have attributes of every kind, some of them none."""
    recommender = random_recommender(
        seed, num_items=num_items, num_beams=num_beams, dtype=torch.float32, sizes=(6, 5, 8)
    )
    rng = np.random.default_rng(seed)
    for item in recommender.catalog.items:
        if rng.random() < 0.9:
            item["category"] = CATEGORIES[rng.integers(len(CATEGORIES))]
        if rng.random() < 0.9:
            item["price"] = float(np.round(rng.uniform(1, 100), 2))
        if rng.random() < 0.9:
            item["in_stock"] = bool(rng.integers(2))
        if rng.random() < 0.8:
            item["tags"] = [f"tag {tag}" for tag in rng.choice(5, size=rng.integers(0, 4), replace=False)]
    recommender.catalog.retired[rng.choice(num_items, size=num_retired, replace=False)] = True
    recommender.save_pretrained(folder)
    return folder


def within(
    artefact: Path, settings: ServiceSettings, folder: Path, body: Callable[[Service], Awaitable[None]]
) -> None:
    """Runs `body` with the service of an artefact in this process; `folder` is for its index files."""
    from llmrec.service.standalone import load_model, service_of
    from llmrec.service.transformers_engine import TransformersEngine

    engine = TransformersEngine(load_model(artefact, {}), folder)

    async def whole() -> None:
        service = service_of(engine, artefact, settings, folder)
        try:
            await body(service)
        finally:
            await service.close()

    try:
        asyncio.run(whole())
    finally:
        engine.close()


@contextmanager
def running(
    artefact: Path, settings: ServiceSettings, key: str | None = None, seconds: float = 0.0, timeout: float = 300.0
) -> Iterator[tuple[str, int]]:
    """A standalone server in a process of its own: its URL and its process id. It must end by itself at SIGTERM.

    With `seconds`, each of its searches takes so much longer, so that how much it can do is known.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    command = [sys.executable, __file__, str(artefact), str(port), json.dumps(asdict(settings)), str(seconds)]
    places = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    environment |= {} if key is None else {"LLMREC_API_KEY": key}
    process = subprocess.Popen(command, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        with Client(url, key) as client:
            end = time.monotonic() + timeout
            while not client.ready():
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < end, "the server did not become ready"
                time.sleep(0.1)
        yield url, process.pid
        assert process.poll() is None, "the server ended"
        process.terminate()
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()


def main(artefact: str, port: str, settings: str, seconds: str) -> None:
    from llmrec.service.keys import Keys
    from llmrec.service.limits import Limits
    from llmrec.service.standalone import serve_standalone
    from llmrec.service.transformers_engine import TransformersEngine

    if float(seconds):
        search = TransformersEngine.search

        async def slower(*arguments: Any, **keywords: Any) -> Found:
            await asyncio.sleep(float(seconds))
            return await search(*arguments, **keywords)

        TransformersEngine.search = slower
    torch.set_num_threads(1)
    given = json.loads(settings)
    given["limits"] = Limits(**given["limits"])
    keys = Keys.from_environment(os.environ)
    serve_standalone(Path(artefact), port=int(port), settings=ServiceSettings(**given), keys=keys)


if __name__ == "__main__":
    main(*sys.argv[1:])
