"""vLLM's general plugin: in every process of a server, registers the models that search."""

import os

# Names of variables that the server's start sets and its processes read.
ARCHITECTURES = "LLMREC_ARCHITECTURES"
MAX_BEAMS = "LLMREC_MAX_BEAMS"
# The catalog's version, found once: both of the server's processes read it, perhaps at different times.
CATALOG_VERSION = "LLMREC_CATALOG_VERSION"
LAUNCH = "LLMREC_LAUNCH"
# The folder of tries that requests name (`SearchParameters.index`), and the file there that is the one without a name.
INDEX_FOLDER = "LLMREC_INDEX_FOLDER"
INDEX = "LLMREC_INDEX"
# How many of the folder's files a worker keeps mapped.
INDEX_FILES = "LLMREC_INDEX_FILES"
# MiB that the searches of one engine step may hold at once, see `llmrec.engine.memory`.
SEARCH_MEMORY = "LLMREC_SEARCH_MEMORY_MIB"


def register() -> None:
    """Called by vLLM, several times over a process's life."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture in filter(None, os.environ.get(ARCHITECTURES, "").split(",")):
        if (name := f"LlmRec{architecture}") not in known:
            ModelRegistry.register_model(name, f"llmrec.engine.model:{name}")
