"""Adapters: each row is run with its request's, and vLLM's notes are as they were afterwards."""

import json
from types import SimpleNamespace

import pytest
import torch

from llmrec.engine.lora import lora_arguments, lora_rows, lora_slots, punica_wrapper
from llmrec.exceptions import ArtefactError


class Wrapper:
    """vLLM's punica wrapper as far as it is written to, for a batch of prompts of 3, 1 and 4 tokens."""

    def __init__(self, gpu=False, prefill=True):
        self._token_lora_indices = torch.full((24,), 77)
        self._sampler_indices = torch.full((24,), 77)
        self._embeddings_indices = torch.full((24,), 77)
        self._token_lora_indices[:8] = torch.tensor([1, 1, 1, -1, 0, 0, 0, 0])
        self._sampler_indices[:3] = torch.tensor([1, -1, 0])
        self._embeddings_indices[:8] = torch.tensor([100, 100, 100, 0, 0, 0, 0, 0])
        self.indices_len = [8, 3, 3, 8]
        self.is_prefill = prefill
        self.prepared = []
        if gpu:
            made = [SimpleNamespace(prepare_tensors=lambda rows, n=n: self.note(n, rows)) for n in ("token", "prompt")]
            self.token_mapping_meta, self.prompt_mapping_meta = made

    @property
    def token_lora_indices(self):
        return self._token_lora_indices[: self.indices_len[0]]

    @property
    def sampler_indices(self):
        return self._sampler_indices[: self.indices_len[1]]

    def note(self, name, rows):
        self.prepared.append((name, rows.tolist()))

    def _update_prefill_metadata(self, rows):
        self.note("prefill", rows)

    def state(self):
        tensors = (self._token_lora_indices, self._sampler_indices, self._embeddings_indices)
        return [tensor.tolist() for tensor in tensors], list(self.indices_len)


@pytest.mark.parametrize("gpu", [False, True])
def test_rows_follow_their_requests_and_notes_come_back(gpu):
    wrapper = Wrapper(gpu)
    before = wrapper.state()
    with lora_rows(wrapper) as rows:
        assert rows.most_rows == 24
        for width in (1, 8, 2):  # a wide step overwrites what was noted of the prompts
            rows.use(torch.tensor([2, 7, 3]), width)
            expected = [1] * width + [0] * width + [-1] * width
            assert wrapper.token_lora_indices.tolist() == expected
            assert wrapper.sampler_indices.tolist() == expected
            assert wrapper._embeddings_indices[: 3 * width].tolist() == [100] * width + [0] * 2 * width
            assert wrapper.indices_len == [3 * width] * 4
            names = ("token", "prompt") if gpu else ("prefill",)
            assert wrapper.prepared[-len(names) :] == [(name, expected) for name in names]
    assert wrapper.state() == before
    assert wrapper.prepared[-1] == (("prompt", [1, -1, 0]) if gpu else ("prefill", before[0][0][:8]))


def test_notes_come_back_after_an_error_too():
    wrapper = Wrapper()
    before = wrapper.state()

    def fail():
        with lora_rows(wrapper) as rows:
            rows.use(torch.tensor([0]), 20)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert wrapper.state() == before
    with lora_rows(None) as rows:
        assert rows is None


def test_the_wrapper_is_found_in_the_model():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert punica_wrapper(model) is None
    model[1].punica_wrapper = wrapper = Wrapper()
    assert punica_wrapper(model) is wrapper


def adapter(folder, **config):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_the_command_line_leaves_a_slot_empty(tmp_path):
    assert lora_arguments({}) == []
    assert lora_slots(2) == 3
    first, second = adapter(tmp_path / "a", r=4), adapter(tmp_path / "b=c", r=8, rank_pattern={"q": 9})
    found = lora_arguments({"one": first, "the other": second})
    assert found[:5] == ["--enable-lora", "--max-loras", "3", "--max-lora-rank", "16"]
    assert found[5] == "--lora-modules"
    assert [json.loads(module) for module in found[6:]] == [
        {"name": "one", "path": str(first)},
        {"name": "the other", "path": str(second)},
    ]
    assert lora_arguments({"one": first})[4] == "8"


@pytest.mark.parametrize("config", [{}, {"r": 0}, {"r": 513}, {"r": "many"}, {"r": 8, "rank_pattern": 3}])
def test_what_is_no_adapter_is_refused(tmp_path, config):
    with pytest.raises(ArtefactError, match=str(tmp_path)):
        lora_arguments({"one": adapter(tmp_path / "a", **config)})
    with pytest.raises(ArtefactError, match="no LoRA adapter"):
        lora_arguments({"one": tmp_path / "nowhere"})
