"""What every rank of a tensor-parallel engine has to do alike, and what is searched together."""

import logging

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="this environment has no vLLM")

from engine_models import make_trie
from test_pooler import AMPLE, FINE, POSITIONS, TOY, TRIE, assert_same, pooled, pooler_of

from llmrec.engine import model as model_module
from llmrec.engine.indexes import Indexes
from llmrec.engine.memory import SearchMemory
from llmrec.engine.request import OK, REFUSED, SearchParameters
from llmrec.trie import CatalogTrie
from llmrec.trie_tensors import TrieTensors


def test_a_request_that_another_rank_cannot_search_is_searched_by_none(tmp_path):
    """Its file went between the two: the one that has it would wait for the other's part of every layer."""
    make_trie(1, 30, (8, 6, 8)).save(tmp_path / "other")
    asked = [FINE, SearchParameters(k=3, num_beams=4, index="other"), SearchParameters(k=0, num_beams=4), FINE]
    told, ran = [], []

    def agree(held):
        told.append(held)
        return [held[0], False, *held[2:]]

    pooler = pooler_of()
    indexes = Indexes(tmp_path, lambda: TRIE)
    pooler.prepare(indexes, TOY.layers, AMPLE, 100, agree=agree)
    whole = pooler._search
    pooler._search = lambda batch, group, portion: ran.extend(group) or whole(batch, group, portion)
    given = [one.pack() if one.k else FINE.pack() | {"k": 0} for one in asked]
    prompts = [[5, 6], [7], [9], [8, 9]]
    results = pooled(pooler, prompts, given)
    assert told == [[True, True, False, True]]
    assert [float(result[0, 0]) for result in results] == [OK, REFUSED, REFUSED, OK]
    assert sorted(asked.row for asked in ran) == [0, 3]
    assert_same(results[0], prompts[0], FINE)
    # A rank asks in every step, whatever it holds: all or none would be there to answer.
    told.clear()
    pooled(pooler, prompts[:1], [given[2]])
    assert told == [[False]]
    pooled(pooler, prompts, given, [False, True, False, True])
    assert told[1] == [True, True]


def test_ranks_agree_on_what_holds_on_all(monkeypatch, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = type("Group", (), {"cpu_group": torch.distributed.group.WORLD})
        monkeypatch.setattr("vllm.distributed.get_tp_group", lambda: group)
        assert model_module.all_agree([True, False, True]) == [True, False, True]
        assert model_module.all_agree([]) == []

        def lowest(tensor, operation, group):
            assert operation == torch.distributed.ReduceOp.MIN
            tensor.copy_(torch.minimum(tensor, torch.tensor([0, 1, 1], dtype=tensor.dtype)))

        monkeypatch.setattr(torch.distributed, "all_reduce", lowest)
        assert model_module.all_agree([True, False, True]) == [False, False, True]
    finally:
        torch.distributed.destroy_process_group()


def test_items_of_fewer_tokens_are_not_run_beyond_the_last_position(tmp_path, caplog):
    """As many levels, but the last bears no token: with the others it would be given a step beyond its positions."""
    codes = np.array([[0, 0], [0, 0], [1, 2], [3, 1]])
    shared = TrieTensors(CatalogTrie(codes, shared=True), [np.arange(20, 28), np.arange(30, 38)])
    assert (shared.num_levels, shared.token_levels) == (3, 2)
    other = make_trie(1, 30, (8, 6, 8))
    assert other.num_levels == shared.num_levels
    shared.save(tmp_path / "shared")
    asked = [FINE, SearchParameters(k=3, num_beams=4, index="shared")]
    prompts = [[5, 6], [3] * (POSITIONS - 1)]
    with caplog.at_level(logging.WARNING):
        results = pooled(pooler_of(Indexes(tmp_path, lambda: TRIE)), prompts, [one.pack() for one in asked])
    assert [float(result[0, 0]) for result in results] == [OK, OK]
    assert "failed" not in caplog.text
    assert_same(results[1], prompts[1], asked[1], shared)


def test_a_gpu_s_profile_run_counts_with_the_whole_bound(monkeypatch):
    """The catalog at start may be small: what is swapped in later is searched within the same bound."""
    taken = []
    monkeypatch.setattr(torch, "empty", lambda number, dtype, device: taken.append((number, dtype, device.type)))
    memory = SearchMemory(12_345, 1, 1, 1, 1, 0)
    memory.reserve(torch.device("cuda"))
    memory.reserve(torch.device("cpu"))
    assert taken == [(12_345, torch.uint8, "cuda")]
    monkeypatch.undo()
    reserved = []
    monkeypatch.setattr(SearchMemory, "reserve", lambda self, device: reserved.append((self.limit, device.type)))
    pooler = pooler_of(memory=SearchMemory(40_000, 80, 60, 40, 100, 3), most_beams=20)
    pooler.run_widest(torch.zeros(60, 16), 3)
    assert reserved == [(40_000, "cpu")]
