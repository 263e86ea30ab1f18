"""Every architecture through vLLM itself, against transformers with each sequence run in full."""

import pytest
from engine_models import CONFIGS, assert_found, make_model, make_prompts, make_trie, offline, reference

from llmrec.engine.request import SearchParameters

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.parametrize("model_type", CONFIGS)
def test_architecture(model_type, tmp_path):
    """One batch of mixed lengths and widths; the windows of Mistral and Gemma are shorter than most prompts."""
    pytest.importorskip("vllm", reason="this environment has no vLLM")
    model, trie = make_model(model_type, tmp_path), make_trie()
    prompts = [*make_prompts(1, 12, 120), [5], [7, 9]]
    asked = [SearchParameters(k=10, num_beams=10 + 10 * (place % 2)) for place in range(len(prompts))]
    with offline(tmp_path, trie) as engine:
        for _ in range(2):  # the second time from the prefix cache
            for prompt, parameters, found in zip(prompts, asked, engine.search(prompts, asked), strict=True):
                assert_found(found, reference(model, prompt, trie, parameters), parameters.k)
