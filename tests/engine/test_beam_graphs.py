"""Recorded work, with a recording that does what a CUDA graph does: the same operations on the same addresses."""

import numpy as np
import pytest
import torch
from factories import random_codes

from llmrec.beam import TrieTensors
from llmrec.engine.beam_graphs import BeamGraphs, bucket
from llmrec.exceptions import EngineError
from llmrec.kernels.static_search import StaticSearch
from llmrec.trie import CatalogTrie

VOCABULARY, SIZES = 30, (4, 5, 6)


class Replayed:
    """Runs the work again and leaves its results where the first ones were."""

    def __init__(self, work):
        self.work, self.outputs, self.replays = work, work(), 0

    def replay(self):
        self.replays += 1
        for place, value in zip(self.outputs, self.work(), strict=True):
            place.copy_(value)


def record(work):
    graph = Replayed(work)
    graph.outputs[0].fill_(-7)  # a CUDA graph's outputs hold nothing until it is replayed
    return graph, graph.outputs


def a_search(seed):
    token_ids = np.split(np.random.default_rng(seed).permutation(VOCABULARY)[: sum(SIZES)], np.cumsum(SIZES)[:-1])
    return StaticSearch(TrieTensors(CatalogTrie(random_codes(seed, 40, SIZES)), token_ids), 6)


def search_of(search, tables):
    """A whole search as work on tensors: logits depend on the newest token, and on the tables that are given."""

    def step_of(given):
        level = 0

        def step(tokens, parents):
            nonlocal level
            level += 1
            return given["tables"][level].gather(1, tokens.unsqueeze(-1).expand(-1, -1, VOCABULARY))

        return step

    return lambda given: tuple(search.run(given["tables"][0, :, 0], step_of(given)))


def test_a_recorded_search_is_the_search_on_other_logits():
    search, graphs = a_search(0), BeamGraphs(record=record)
    for seed in range(4):
        tables = torch.randn(3, 2, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        work = search_of(search, tables)
        found = graphs.run(("v1", 2, 6), work, {"tables": tables})
        assert all(torch.equal(one, other) for one, other in zip(found, work({"tables": tables}), strict=True))


def test_outputs_outlive_the_next_run():
    graphs = BeamGraphs(record=record)
    first = graphs.run("double", lambda given: (given["x"] * 2,), {"x": torch.tensor([1.0])})
    second = graphs.run("double", lambda given: (given["x"] * 2,), {"x": torch.tensor([5.0])})
    assert first[0].tolist() == [2.0]
    assert second[0].tolist() == [10.0]


def test_work_is_recorded_once_per_key_and_the_oldest_goes():
    recorded = []

    def counted(work):
        recorded.append(work)
        return record(work)

    graphs, one = BeamGraphs(2, counted), {"x": torch.ones(1)}
    for key in ("a", "b", "a", "a", "c", "a", "b"):
        graphs.run(key, lambda given: (given["x"] + 1,), one)
    assert len(recorded) == 4  # a, b, c, and b again, which c had taken the place of
    graphs.forget()
    graphs.run("a", lambda given: (given["x"] + 1,), one)
    assert len(recorded) == 5


def test_inputs_of_the_caller_are_left_alone_and_other_shapes_refused():
    graphs, mine = BeamGraphs(record=record), torch.ones(2)
    graphs.run("a", lambda given: (given["x"].add_(1),), {"x": mine})
    assert mine.tolist() == [1.0, 1.0]
    with pytest.raises(EngineError, match="were recorded"):
        graphs.run("a", lambda given: (given["x"],), {"x": torch.ones(3)})
    with pytest.raises(EngineError, match="were recorded"):
        graphs.run("a", lambda given: (given["x"],), {"x": torch.ones(2, dtype=torch.float64)})


def test_requests_are_rounded_up():
    assert [bucket(requests) for requests in (1, 2, 5, 64)] == [1, 2, 8, 64]
