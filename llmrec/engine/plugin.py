"""vLLM's general plugin: in every process of a server, registers the models and ties the process to its parent."""

import multiprocessing
import os
import signal
import threading
import time

EXIT_WITH_PARENT = "LLMREC_EXIT_WITH_PARENT"
ARCHITECTURES = "LLMREC_ARCHITECTURES"
MAX_BEAMS = "LLMREC_MAX_BEAMS"


def register() -> None:
    """Called by vLLM, several times over a process's life."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture in filter(None, os.environ.get(ARCHITECTURES, "").split(",")):
        if (name := f"LlmRec{architecture}") not in known:
            ModelRegistry.register_model(name, f"llmrec.engine.model:{name}")
    if multiprocessing.parent_process() is not None or os.environ.get(EXIT_WITH_PARENT) == str(os.getppid()):
        _watch_parent()


def _watch_parent() -> None:
    """Kills this process when its parent is gone: a server killed with -9 leaves no engine behind."""
    if any(thread.name == "llmrec-parent-watch" for thread in threading.enumerate()):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="llmrec-parent-watch", daemon=True).start()
