"""The checks of an engine: a right one passes, each kind of wrong one is told."""

import asyncio
from dataclasses import replace

import pytest
import torch
from factories import random_recommender

from llmrec.engine.request import Found
from llmrec.exceptions import EngineError
from llmrec.service.canary import TOLERANCE, canary, check
from llmrec.service.catalogs import LiveCatalogs
from llmrec.service.transformers_engine import TransformersEngine


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def served(request, tmp_path):
    """An engine of this dtype, and a catalog's version."""
    made = random_recommender(1, dtype=request.param)
    made.settings.softmax = "semantic_ids"
    made.catalog.save(tmp_path / "catalog")
    catalogs = LiveCatalogs(
        {"main": tmp_path / "catalog"}, (made.tokenizer, made.prompt, made.settings, {}), tmp_path / "index"
    )
    engine = TransformersEngine(made.model, tmp_path / "index")
    with catalogs.using() as version:
        yield engine, version
    engine.close()


class Wrong:
    """An engine that changes what another found; a search has more than one beam, or none for a token."""

    def __init__(self, engine, change):
        self.engine, self.change = engine, change
        self.dtype, self.max_tokens, self.adapters, self.errored = engine.dtype, engine.max_tokens, [], False
        self.asked = []

    async def search(self, prompt, parameters, adapter=None):
        self.asked.append((prompt, parameters))
        return self.change(parameters, await self.engine.search(prompt, parameters, adapter))


def test_a_right_engine_passes(served):
    engine, version = served
    watched = Wrong(engine, lambda _, found: found)
    difference = asyncio.run(check(watched, version))
    assert 0 <= difference <= TOLERANCE[engine.dtype]
    assert len(watched.asked) == 4  # the search, and the item's tokens
    assert [parameters.num_beams for _, parameters in watched.asked] == [4, 0, 0, 0]
    assert {parameters.index for _, parameters in watched.asked} == {version.index}
    prompts = [prompt for prompt, _ in watched.asked]
    tokens = [parameters.token for _, parameters in watched.asked[1:]]
    assert prompts == [prompts[0], prompts[0], prompts[0] + tokens[:1], prompts[0] + tokens[:2]]
    watched.asked.clear()
    asyncio.run(canary(watched, version))
    assert [(parameters.k, parameters.num_beams) for _, parameters in watched.asked] == [(1, 1)]


def shifted(by, of_search):
    def change(parameters, found):
        return replace(found, scores=[found.scores[0] + by]) if bool(parameters.num_beams) == of_search else found

    return change


@pytest.mark.parametrize("change", [shifted(1.0, True), shifted(-1.0, True), shifted(0.5, False)])
def test_a_search_that_is_not_the_sum_of_its_prefills_is_told(served, change):
    with pytest.raises(EngineError, match=r"A beam search gave the log-probability -.*, ordinary prefill -"):
        asyncio.run(check(Wrong(served[0], change), served[1]))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Found([], [], [], 0.0), "found 0: the model's scores are not numbers"),
        (Found([0], [float("nan")], [[0.0]], 0.0), "are not numbers"),
        (Found([0], [float("-inf")], [[0.0]], 0.0), "are not numbers"),
        (Found([40], [-1.0], [[0.0]], 0.0), "found the row 40, which is no live"),
        (Found([0, 1], [-1.0, -2.0], [[0.0]] * 2, 0.0), "found 2"),
    ],
)
def test_an_engine_that_finds_no_item_is_told(served, found, message):
    wrong = Wrong(served[0], lambda *_: found)
    for ask in (check, canary):
        with pytest.raises(EngineError, match=message):
            asyncio.run(ask(wrong, served[1]))


def test_a_retired_item_is_no_answer(served):
    engine, version = served
    retired = replace(version, catalog=version.catalog.with_retired([7], True))
    with pytest.raises(EngineError, match="found the row 7, which is no live item"):
        asyncio.run(canary(Wrong(engine, lambda *_: Found([7], [-1.0], [[0.0]], 0.0)), retired))


def test_scores_that_are_no_numbers_in_the_prefill_are_told(served):
    with pytest.raises(EngineError, match="ordinary prefill nan"):
        asyncio.run(check(Wrong(served[0], shifted(float("nan"), False)), served[1]))
