"""Real vLLM servers: one with a Llama that most tests share, one with a GPT-2 that is killed at its end."""

import asyncio
import socket
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from factories import random_recommender

from llmrec.engine.launch import running_server
from llmrec.recommender import Recommender

NUM_ITEMS = 500


@dataclass
class Served:
    """A running server and the recommender that it must agree with."""

    url: str
    process: psutil.Process
    recommender: Recommender
    artefact: Path

    def post(self, **body):
        return httpx.post(f"{self.url}/v1/recommend", json=body, timeout=120.0)

    def post_all(self, bodies):
        """All requests at once, so that the engine batches them."""

        async def send():
            async with httpx.AsyncClient(timeout=120.0) as client:
                return await asyncio.gather(*(client.post(f"{self.url}/v1/recommend", json=body) for body in bodies))

        return asyncio.run(send())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(folder: Path, model_type: str, **options):
    pytest.importorskip("vllm", reason="this environment has no vLLM")
    recommender = random_recommender(
        7, model_type, NUM_ITEMS, (16, 16, 16), dtype=torch.float32, max_history=20, max_positions=256
    )
    recommender.save_pretrained(folder / "artefact")
    port, log = free_port(), folder / "server.log"
    with running_server(folder / "artefact", port, log, **options) as server:
        server.wait_until_ready(timeout=400)
        yield Served(server.url, psutil.Process(server.process.pid), recommender, folder / "artefact")


@pytest.fixture(scope="session")
def llama_server(tmp_path_factory):
    yield from serve(tmp_path_factory.mktemp("llama"), "llama", max_beams=600)


@pytest.fixture(scope="session")
def gpt2_server(tmp_path_factory):
    # So few tokens a step that prompts are prefilled in chunks, beside the searches of others.
    extra = ["--max-num-batched-tokens", "48"]
    yield from serve(tmp_path_factory.mktemp("gpt2"), "gpt2", max_num_seqs=8, extra=extra)
