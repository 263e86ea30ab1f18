"""Tiny random models of many architectures, run by vLLM offline and by transformers without a cache."""

import gc
import json
import os
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import random_codes

from llmrec.beam import Beams, Draw, PrefixCap, beam_search
from llmrec.engine.plugin import ARCHITECTURES, INDEX, INDEX_FOLDER, register
from llmrec.engine.request import OK, Found, SearchParameters
from llmrec.trie import CatalogTrie
from llmrec.trie_tensors import TrieTensors

VOCABULARY, SIZES, NUM_ITEMS, POSITIONS = 160, (16, 16, 16), 400, 256
INDEX_FILE = "base.trie.safetensors"

# Heads of 32, as vLLM's CPU kernels need at least; windows shorter than most prompts.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 1, "head_dim": 32}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 32}),
    "mistral": ("MistralForCausalLM", {"num_key_value_heads": 1, "head_dim": 32, "sliding_window": 20}),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "n_positions": POSITIONS,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 2,
            "n_inner": 96,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            "num_key_value_heads": 1,
            "head_dim": 32,
            "sliding_window": 24,
            "num_hidden_layers": 3,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            "num_key_value_heads": 1,
            "head_dim": 32,
            "sliding_window": 24,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "opt": (
        "OPTForCausalLM",
        {
            "ffn_dim": 96,
            "word_embed_proj_dim": 64,
            "do_layer_norm_before": True,
            "dropout": 0.0,
            "tie_word_embeddings": True,
        },
    ),
}


def make_model(
    model_type: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A random model of one of CONFIGS, saved to a folder; weights wide enough that scores differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _, special = CONFIGS[model_type]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **(sizes | special | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases too: one that is lost must show.
            parameter.normal_(0.0, 0.15) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of as many words as the models have tokens: vLLM wants one, though prompts come as token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w3")
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(folder)


def make_trie(seed: int = 0, num_items: int = NUM_ITEMS, sizes: tuple[int, ...] = SIZES) -> TrieTensors:
    """A catalog's trie whose codes are tokens from 10 on."""
    ids = np.split(np.arange(10, 10 + sum(sizes)), np.cumsum(sizes)[:-1])
    return TrieTensors(CatalogTrie(random_codes(seed, num_items, sizes)), ids)


def make_prompts(seed: int, count: int, longest: int = 70, shortest: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, size=rng.integers(shortest, longest + 1)).tolist() for _ in range(count)]


def tries_of(trie: TrieTensors, parameters: Sequence[SearchParameters]) -> list[TrieTensors]:
    return [trie if p.allowed is None else trie.subset(p.allowed) for p in parameters]


@torch.inference_mode()
def reference(
    model: Any, prompt: list[int], trie: TrieTensors, parameters: SearchParameters, device: str = "cpu"
) -> Beams:
    """The search with every beam's whole sequence run anew by transformers: no cache, no mask, no padding."""
    paths: list[list[int]] = [[]]

    def run(sequences: list[list[int]]) -> torch.Tensor:
        return model(input_ids=torch.tensor(sequences, device=device), use_cache=False).logits[:, -1]

    def step(tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        nonlocal paths
        paths = [[*paths[p], t] for t, p in zip(tokens[0].tolist(), parents[0].tolist(), strict=True)]
        return run([[*prompt, *path] for path in paths]).unsqueeze(0)

    (part,) = tries_of(trie, [parameters])
    cap = PrefixCap(parameters.cap_levels, parameters.cap) if parameters.cap else None
    draw = Draw(parameters.temperature, parameters.seed) if parameters.temperature else None
    return beam_search(
        run([prompt]),
        step,
        part,
        parameters.num_beams,
        [np.array(parameters.excluded, dtype=np.int64)],
        parameters.renormalize,
        [cap],
        [draw],
    )


def assert_found(found: Found, beams: Beams, k: int, tolerance: float = 1e-4) -> None:
    """The engine's answer is the reference's; items of nearly one score may stand in each other's place."""
    items = [item for item in beams.items[0].tolist() if item >= 0][:k]
    scores = beams.scores[0, : len(items)].tolist()
    assert len(found.rows) == len(items) == len(set(found.rows))
    np.testing.assert_allclose(found.scores, scores, atol=tolerance)
    np.testing.assert_allclose(np.sum(found.levels, axis=1) if items else [], found.scores, atol=1e-5)
    for place, (row, item) in enumerate(zip(found.rows, items, strict=True)):
        if row == item:
            np.testing.assert_allclose(found.levels[place], beams.levels[0, place].tolist(), atol=tolerance)
        else:
            neighbours = [score for other, score in enumerate(beams.scores[0].tolist()) if other != place]
            assert min(abs(score - scores[place]) for score in neighbours) < 2 * tolerance


class Offline:
    """vLLM with the engine inside, without a server."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def raw(
        self, prompts: Sequence[list[int]], parameters: Sequence[dict[str, Any]], adapters: Any = None
    ) -> list[torch.Tensor]:
        """The packed results of all requests, which vLLM batches as it likes."""
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt

        outputs = self.llm.encode(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            pooling_params=[PoolingParams(task="embed", extra_kwargs=one) for one in parameters],
            lora_request=adapters,
            pooling_task="embed",
            use_tqdm=False,
        )
        return [output.outputs.data.double() for output in outputs]

    def search(
        self, prompts: Sequence[list[int]], parameters: Sequence[SearchParameters], adapters: Any = None
    ) -> list[Found]:
        results = self.raw(prompts, [one.pack() for one in parameters], adapters)
        assert [float(result[0, 0]) for result in results] == [OK] * len(results)
        return [Found.unpack(result) for result in results]


@contextmanager
def engine_environment(folder: Path, trie: TrieTensors, **more: str):
    """The variables of an engine's processes, set while it lives; its index folder holds the trie."""
    indexes = folder / "indexes"
    indexes.mkdir(exist_ok=True)
    trie.save(indexes / INDEX_FILE)
    environment = {
        "VLLM_PLUGINS": "llmrec",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        # All of them: vLLM loads its plugins once in the life of a process, and several models follow one another.
        ARCHITECTURES: ",".join(name for name, _ in CONFIGS.values()),
        INDEX_FOLDER: str(indexes),
        INDEX: INDEX_FILE,
    }
    before = dict(os.environ)
    os.environ.update(environment | more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def engine_settings(folder: Path, **options: Any) -> dict[str, Any]:
    """vLLM's arguments for a model's folder."""
    from vllm.config import PoolerConfig

    (architecture,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    settings = {
        "model": str(folder),
        "runner": "pooling",
        "hf_overrides": {"architectures": [f"LlmRec{architecture}"]},
        "pooler_config": PoolerConfig(task="embed", seq_pooling_type="LAST"),
        "dtype": "float32",
        "max_num_seqs": 16,
        "max_model_len": POSITIONS,
        "block_size": 32,
        "enforce_eager": True,
    }
    return settings | options


@contextmanager
def offline(folder: Path, trie: TrieTensors, environment: dict[str, str] | None = None, **options: Any):
    """vLLM on a model's folder, with these arguments beside the usual ones."""
    with engine_environment(folder, trie, **(environment or {})):
        from vllm import LLM

        # vLLM calls plugins once in a process, which an earlier test may have made it do without these variables.
        register()
        llm = LLM(**engine_settings(folder, **options))
        try:
            yield Offline(llm)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
