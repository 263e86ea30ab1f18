"""The cached search with transformers, against each sequence run in full: windows, soft caps, learned positions."""

import pytest
import torch
from engine_models import CONFIGS, make_model, make_prompts, make_trie, reference

from llmrec.decoding import decode
from llmrec.engine.request import SearchParameters


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_prompts_longer_than_a_window(model_type, attention, tmp_path):
    model, trie = make_model(model_type, tmp_path), make_trie()
    prompts = [*make_prompts(1, 5, 120, shortest=40), [5], [7, 9]]
    expected = [reference(model, prompt, trie, SearchParameters(k=12, num_beams=12)) for prompt in prompts]
    model.set_attn_implementation(attention)  # the reference's is the eager one, which computes soft caps
    found = decode(model, prompts, trie, 12)
    for row, beams in enumerate(expected):
        assert torch.allclose(found.scores[row], beams.scores[0], atol=1e-4)
        assert torch.allclose(found.levels[row], beams.levels[0], atol=1e-4)
        assert (found.items[row] == beams.items[0]).float().mean() > 0.8  # near-ties may change places
    assert model.config._attn_implementation == attention
