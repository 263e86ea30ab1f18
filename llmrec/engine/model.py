"""Pooling models around vLLM's causal language models: `LlmRec<Architecture>` for every architecture asked for."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.models.registry import ModelRegistry

from llmrec.artefact_parts import read_settings
from llmrec.beam import TrieTensors
from llmrec.catalog import CATALOG_FOLDER
from llmrec.catalog_versions import CatalogVersions
from llmrec.engine.attention import refuse_unsupported, teach_beams
from llmrec.engine.plugin import CATALOG_VERSION
from llmrec.engine.pooler import BeamPooler
from llmrec.exceptions import EngineError

PREFIX = "LlmRec"


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
        original.__init__(self, vllm_config=vllm_config, prefix=prefix)
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise EngineError("The beam search needs all layers in one worker. Serve without pipeline parallelism.")
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
        context = self._llmrec_config.compilation_config.static_forward_context
        layers = {name: layer for name, layer in context.items() if hasattr(layer, "impl")}
        if stateful := [name for name, layer in context.items() if hasattr(layer, "kv_cache") and name not in layers]:
            raise EngineError(
                f"Layer {stateful[0]} keeps a state that is no paged attention, and beams cannot share it. "
                "Serve a model with plain paged attention, or recommend with transformers."
            )
        for name, layer in layers.items():
            refuse_unsupported(name, layer)
            teach_beams(layer.impl)
        folder = Path(self._llmrec_config.model_config.model) / CATALOG_FOLDER
        catalog = CatalogVersions(folder).load(os.environ.get(CATALOG_VERSION))
        device = self._llmrec_config.device_config.device
        softmax = read_settings(folder.parent).softmax
        self.pooler.prepare(TrieTensors.of(catalog, softmax, device), layers)

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
