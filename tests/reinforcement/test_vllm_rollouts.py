import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_rollouts import cases_of, policy, same, weights

from llmrec.backbones.adapters import adapt
from llmrec.backbones.causal_lm import BackboneArguments
from llmrec.exceptions import RecipeError
from llmrec.reinforcement.rollouts import TransformersRollouts
from llmrec.reinforcement.vllm_rollouts import VLLMRollouts, weights_of

GROUP = 5


def close(wanted, found):
    """The same items, and log-probabilities to 1e-4."""
    np.testing.assert_array_equal(found.items, wanted.items)
    assert found.tokens == wanted.tokens
    np.testing.assert_allclose(np.array(found.logprobs), np.array(wanted.logprobs), atol=1e-4)


def disturb(model, size):
    torch.manual_seed(int(size * 1000))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


@pytest.mark.slow
def test_groups_after_each_change_of_weights_are_those_of_transformers(tmp_path):
    """Beams and draws, over the semantic IDs alone, whole and with an adapter, from one engine."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("this environment has no vLLM")
    # In a process of its own, as of train/rl.py: what a thousand tests leave in theirs is not the engine's to bear.
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("compared 4 generations\n")


def compare(folder):
    # Prompts of more than a block of 32 tokens, which the engine remembers.
    recommender = policy("semantic_ids", hidden_size=64, num_items=60, max_history=20, max_positions=256)
    recommender.save_pretrained(folder / "artefact")
    cases, catalog, model = cases_of(recommender, 7, longest=18), recommender.catalog, recommender.model
    options = {"softmax": "semantic_ids"}
    with VLLMRollouts(model, folder / "artefact", catalog, cases, GROUP, seed=3, **options) as engine:
        chosen = [4, 0, 6, 2, 1]
        assert max(len(cases.prompts[case]) for case in chosen) > 40
        before = engine.generate(chosen)
        close(TransformersRollouts(model, catalog, cases, GROUP, **options).generate(chosen), before)
        disturb(model, 0.05)
        after = engine.generate(chosen)
        assert (after.items != before.items).any()
        close(TransformersRollouts(model, catalog, cases, GROUP, **options).generate(chosen), after)
        engine.weighted = True
        weighted = TransformersRollouts(model, catalog, cases, GROUP, weighted=True, **options).generate(chosen)
        np.testing.assert_allclose(engine.generate(chosen).weights, weighted.weights, atol=1e-4)
        engine.weighted, engine.temperature = False, 1.3
        drawn = TransformersRollouts(model, catalog, cases, GROUP, temperature=1.3, seed=3, **options)
        close(drawn.generate(chosen, step=2), engine.generate(chosen, step=2))
        engine.temperature, adapted = None, adapted_of(model, recommender)
        disturb(adapted, 0.2)
        engine.model, held = adapted, weights(adapted)
        close(
            TransformersRollouts(adapted, catalog, cases, GROUP, **options).generate(chosen), engine.generate(chosen)
        )
        assert same(weights(adapted), held)


def adapted_of(model, recommender):
    new = np.unique(recommender.catalog.item_tokens).tolist()
    torch.manual_seed(0)
    return adapt(BackboneArguments(backbone="none", method="lora", lora_rank=4), model, new)


def test_weights_of_an_adapted_policy_are_its_merged_ones_and_it_is_left_alone():
    recommender = policy()
    plain = copy.deepcopy(recommender.model)
    adapted = adapted_of(recommender.model, recommender)
    disturb(adapted, 0.2)
    held = weights(adapted)
    loaded = dict(weights_of(adapted))
    missing, unexpected = plain.load_state_dict(loaded, strict=False)
    assert not unexpected
    assert set(missing) <= set(plain.all_tied_weights_keys)
    plain.tie_weights()
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        adapted.eval()
        torch.testing.assert_close(plain(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-4)
    assert same(weights(adapted), held)


def test_what_the_engine_cannot_do_is_refused_before_it_starts(tmp_path, monkeypatch):
    recommender = policy()
    cases = cases_of(recommender)
    given = (recommender.model, tmp_path, recommender.catalog, cases)
    monkeypatch.setattr("llmrec.reinforcement.vllm_rollouts.check_vllm", lambda: None)
    with pytest.raises(RecipeError, match=r"items to propose.*smaller groups"):
        VLLMRollouts(*given, 40)
    with pytest.raises(RecipeError, match="how likely its draws were"):
        VLLMRollouts(*given, 4, temperature=1.0, weighted=True)
    monkeypatch.setitem(cases.__dict__, "prompts", [[1] * 127, *cases.prompts[1:]])
    with pytest.raises(RecipeError, match=r"130 tokens.*128 positions"):
        VLLMRollouts(*given, 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="2 processes"):
        VLLMRollouts(*given, 4)


if __name__ == "__main__":
    compare(Path(sys.argv[1]))
    sys.stdout.write("compared 4 generations\n")
