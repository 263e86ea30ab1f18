"""vLLM's general plugin: in every process of a server, registers the models that search."""

import os

ARCHITECTURES = "LLMREC_ARCHITECTURES"
MAX_BEAMS = "LLMREC_MAX_BEAMS"
# The catalog's version, found once: both of the server's processes read it, perhaps at different times.
CATALOG_VERSION = "LLMREC_CATALOG_VERSION"
LAUNCH = "LLMREC_LAUNCH"


def register() -> None:
    """Called by vLLM, several times over a process's life."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture in filter(None, os.environ.get(ARCHITECTURES, "").split(",")):
        if (name := f"LlmRec{architecture}") not in known:
            ModelRegistry.register_model(name, f"llmrec.engine.model:{name}")
