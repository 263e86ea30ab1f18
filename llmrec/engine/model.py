"""Pooling models around vLLM's causal language models: `LlmRec<Architecture>` for every architecture asked for."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.models.registry import ModelRegistry

from llmrec.artefact_parts import read_settings
from llmrec.catalog import CATALOG_FOLDER
from llmrec.catalog_versions import CatalogVersions
from llmrec.engine.attention import fused, refuse_unsupported, teach_beams
from llmrec.engine.flash import FlashReader
from llmrec.engine.indexes import DEFAULT_FILES, Indexes
from llmrec.engine.lora import punica_wrapper
from llmrec.engine.memory import DEFAULT_MIB, SearchMemory
from llmrec.engine.plugin import CATALOG_VERSION, INDEX, INDEX_FILES, INDEX_FOLDER, MAX_BEAMS, SEARCH_MEMORY
from llmrec.engine.pooler import BeamPooler
from llmrec.exceptions import EngineError
from llmrec.trie_tensors import TrieTensors

PREFIX = "LlmRec"
# Scoring given items is a search as wide as they are many, whatever the widest search proper is.
_LEAST_MAX_BEAMS = 1_000
_ADVICE = "Serve a model with plain paged attention, or use `llmrec serve --backend transformers`."


def __getattr__(name: str) -> Any:
    """Makes `LlmRecLlamaForCausalLM` and its kin on demand: vLLM asks for a registered class by module and name."""
    if name.startswith(PREFIX):
        return beam_model(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def beam_model(architecture: str) -> type:
    """The subclass of vLLM's `architecture` whose pooler searches the catalog beside the weights.

    The class keeps its language-model head, its weight loading and its layers; only `forward` takes a note of the
    attention metadata. vLLM takes a class with `is_pooling_model` as it is, without converting it.
    """
    original: Any = ModelRegistry._try_load_model_cls(architecture)
    if original is None:
        raise EngineError(f"vLLM has no model {architecture!r}. Serve an architecture that vLLM supports.")

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:  # noqa: N807
        refuse_settings(vllm_config)
        original.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self._llmrec_config = vllm_config

        def run(input_ids: torch.Tensor, positions: torch.Tensor) -> Any:
            return original.forward(self, input_ids, positions, None)

        self.pooler = BeamPooler(vllm_config, run, lambda hidden: self.compute_logits(hidden))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.pooler.remember(get_forward_context().attn_metadata if is_forward_context_available() else None)
        return original.forward(self, *args, **kwargs)

    def process_weights_after_loading(self: Any) -> None:
        if hasattr(original, "process_weights_after_loading"):
            original.process_weights_after_loading(self)
        layers = attention_layers(self._llmrec_config.compilation_config.static_forward_context)
        for layer in layers.values():
            teach_beams(layer.impl)
        indexes = _indexes(self._llmrec_config)
        most_beams = max(int(os.environ.get(MAX_BEAMS, 0)), _LEAST_MAX_BEAMS)
        on_gpu = torch.device(self._llmrec_config.device_config.device).type == "cuda"
        readers = {name: FlashReader.of(layer) for name, layer in layers.items()} if on_gpu else None
        gathered = readers is None or None in readers.values()
        memory = _memory(self._llmrec_config, layers, indexes.of("").token_levels, gathered)
        with_lora = self._llmrec_config.lora_config is not None
        punica = (lambda: punica_wrapper(self)) if with_lora else (lambda: None)
        ranks = self._llmrec_config.parallel_config.tensor_parallel_size
        self.pooler.prepare(indexes, layers, memory, most_beams, punica, readers, *([all_agree] if ranks > 1 else []))

    return type(
        PREFIX + architecture,
        (original,),
        {
            "__module__": __name__,
            "__init__": __init__,
            "forward": forward,
            "process_weights_after_loading": process_weights_after_loading,
            "is_pooling_model": True,
        },
    )


def all_agree(held: list[bool]) -> list[bool]:
    """What holds on every rank of the tensor-parallel group; all of them ask, with as many entries."""
    from vllm.distributed import get_tp_group

    if not held:
        return held
    counted = torch.tensor(held, dtype=torch.int32)
    torch.distributed.all_reduce(counted, torch.distributed.ReduceOp.MIN, get_tp_group().cpu_group)
    return [bool(value) for value in counted.tolist()]


def refuse_settings(vllm_config: Any) -> None:
    """Raises EngineError if the engine is to be run in a way that beams cannot be run in; asked before loading."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    cache_dtype = str(vllm_config.cache_config.cache_dtype)
    expert_ranks = parallel.data_parallel_size > 1 and getattr(parallel, "is_moe_model", None) is not False
    breakable = os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH", "0") == "1"
    settings = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "experts under data parallelism": expert_ranks,
        "dual batch overlap": bool(parallel.use_ubatching),
        "breakable CUDA graphs (VLLM_USE_BREAKABLE_CUDAGRAPH)": breakable,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        f"a KV cache of {cache_dtype}": any(word in cache_dtype for word in ("fp8", "int8", "fp4")),
    }
    if found := [what for what, present in settings.items() if present]:
        raise EngineError(
            f"The engine was started with {' and '.join(found)}, and beams cannot be run so. Start it without."
        )
    properties = {
        "multi-head latent attention": model.use_mla,
        "linear attention or a state-space layer": model.is_hybrid or model.has_inner_state,
        "no attention": model.is_attention_free,
        "an encoder": model.is_encoder_decoder,
        "positions in several dimensions (M-RoPE)": model.uses_mrope,
    }
    if found := [what for what, present in properties.items() if present]:
        raise EngineError(
            f"The model has {' and '.join(found)}, which the in-engine beam search does not do. {_ADVICE}"
        )


def attention_layers(context: dict[str, Any]) -> dict[str, Any]:
    """The layers of vLLM's static forward context, all of them plain attention; raises EngineError if one is not."""
    layers = {name: layer for name, layer in context.items() if hasattr(layer, "impl")}
    if stateful := [name for name, layer in context.items() if hasattr(layer, "kv_cache") and name not in layers]:
        raise EngineError(
            f"Layer {stateful[0]} keeps a state that is no paged attention, and beams cannot share it. {_ADVICE}"
        )
    if not layers:
        raise EngineError(
            f"The model has no attention layer that vLLM knows of, and beams share nothing else. {_ADVICE}"
        )
    for name, layer in layers.items():
        refuse_unsupported(name, layer)
    return layers


def _indexes(vllm_config: Any) -> Indexes:
    """The tries of the server's index folder; without one, the trie of the catalog beside the weights."""
    device = vllm_config.device_config.device
    artefact = Path(vllm_config.model_config.model)

    def own() -> TrieTensors:
        catalog = CatalogVersions(artefact / CATALOG_FOLDER).load(os.environ.get(CATALOG_VERSION))
        return TrieTensors.of(catalog, read_settings(artefact).softmax, device)

    most = int(os.environ.get(INDEX_FILES, DEFAULT_FILES))
    return Indexes(os.environ.get(INDEX_FOLDER), os.environ.get(INDEX) or own, device, most)


def _memory(vllm_config: Any, layers: dict[str, Any], levels: int, gathered: bool) -> SearchMemory:
    config, device = vllm_config.model_config.hf_text_config, torch.device(vllm_config.device_config.device)
    cap = max(float(getattr(layer.impl, "logits_soft_cap", None) or 0.0) for layer in layers.values())
    return SearchMemory.of(
        limit=int(os.environ.get(SEARCH_MEMORY, DEFAULT_MIB)) << 20,
        layers=list(layers.values()),
        config=config,
        bytes_each=vllm_config.model_config.dtype.itemsize,
        steps=max(1, levels - 1),
        gathered=gathered,
        fused=fused(device, cap) or not gathered,
    )
