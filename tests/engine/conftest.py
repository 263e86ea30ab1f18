"""Real vLLM servers: a Llama that most tests share, one that writes titles, and a GPT-2 that is killed at its end."""

import asyncio
import random
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from factories import random_recommender

from llmrec.engine.launch import running_server
from llmrec.recommender import Recommender
from llmrec.title_spelling import title_catalog
from llmrec.vocabulary import train_tokenizer

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


def serve(folder: Path, recommender: Recommender, **options):
    pytest.importorskip("vllm", reason="this environment has no vLLM")
    recommender.save_pretrained(folder / "artefact")
    port, log = free_port(), folder / "server.log"
    with running_server(folder / "artefact", port, log, **options) as server:
        server.wait_until_ready(timeout=400)
        yield Served(server.url, psutil.Process(server.process.pid), recommender, folder / "artefact")


def recommender_of(model_type: str) -> Recommender:
    return random_recommender(
        7, model_type, NUM_ITEMS, (16, 16, 16), dtype=torch.float32, max_history=20, max_positions=256
    )


@pytest.fixture(scope="session")
def llama_server(tmp_path_factory):
    yield from serve(tmp_path_factory.mktemp("llama"), recommender_of("llama"))


@pytest.fixture(scope="session")
def gpt2_server(tmp_path_factory):
    # Probabilities are over the semantic IDs' tokens alone, which the server has to read from the artefact.
    made = recommender_of("gpt2")
    settings = replace(made.settings, softmax="semantic_ids")
    recommender = Recommender(made.model, made.tokenizer, made.catalog, made.prompt, settings)
    # So few tokens a step that prompts are prefilled in chunks, beside the searches of others.
    extra = ["--max-num-batched-tokens", "48"]
    yield from serve(tmp_path_factory.mktemp("gpt2"), recommender, max_num_seqs=8, extra=extra)


@pytest.fixture(scope="session")
def title_server(tmp_path_factory):
    """Items are spelt as titles of one to ten tokens; prompts of equally long histories so differ in length."""
    whole = random_recommender(5, max_positions=128, dtype=torch.float32)
    tokenizer = train_tokenizer(["red lamp blue shade"], vocab_size=270)
    rng = random.Random(3)
    items = [
        {"item_id": f"item-{row}", "title": "".join(rng.choices("ab c", k=rng.randint(1, 9)))} for row in range(300)
    ]
    catalog = title_catalog(items, tokenizer, max_title_tokens=9)
    whole.model.resize_token_embeddings(len(tokenizer))
    recommender = Recommender(whole.model, tokenizer, catalog, whole.prompt, whole.settings)
    yield from serve(tmp_path_factory.mktemp("titles"), recommender, max_beams=300)
