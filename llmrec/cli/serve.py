"""`llmrec serve`: checks the artefact and becomes vLLM's server."""

import os

from llmrec import artefact as folders
from llmrec.engine.launch import server_command
from llmrec.guard import guarded


def serve(
    artefact: str,
    host: str,
    port: int,
    dtype: str,
    max_num_seqs: int | None,
    max_model_len: int | None,
    kv_cache_gib: float | None,
    max_beams: int | None,
    revision: str | None,
    vllm_args: list[str],
) -> None:
    """Replaces this process by the server, so that signals and `kill` reach the server itself."""
    folder = folders.resolve(artefact, revision)
    optional = {
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
        "kv_cache_gib": kv_cache_gib,
        "max_beams": max_beams,
    }
    command, environment = server_command(
        folder,
        host=host,
        port=port,
        dtype=dtype,
        name=artefact.rstrip("/").rpartition("/")[2],
        extra=vllm_args,
        **{name: value for name, value in optional.items() if value is not None},  # type: ignore[arg-type]
    )
    guard = guarded(command)
    os.execve(guard[0], guard, environment)
