"""`llmrec serve`: checks what is to be served, and becomes the server's parent (`llmrec.supervisor`)."""

import math
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rich.console import Console

from llmrec import artefact as folders
from llmrec.engine.launch import Backend, check_port, server_command
from llmrec.exceptions import RequestError
from llmrec.service.keys import Keys
from llmrec.service.limits import Limits
from llmrec.supervisor import Plan, supervised

# How often `--supervise` starts a server again that never was ready for a minute.
_RESTARTS = 5
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
_LOCAL = {"127.0.0.1", "::1", "localhost"}


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
    vllm_args: Sequence[str],
    backend: Backend = "vllm",
    max_rows: int | None = None,
    max_body_bytes: int | None = None,
    deadline_ms: int | None = None,
    limit: Sequence[str] = (),
    drain_seconds: float = 30.0,
    catalog: Sequence[str] = (),
    adapter: Sequence[str] = (),
    history_store: str | None = None,
    index_folder: Path | None = None,
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    supervise: bool = False,
    quiet: bool = False,
    log_file: Path | None = None,
    retrieval: str = "exact",
) -> None:
    """Replaces this process by the server's parent, which ends with the server's exit code.

    Raises:
        ArtefactError: if the artefact, a catalog or an adapter is not there, or not whole.
        RequestError: if an option has no sense.
        EngineError: if the port is taken, or the model has no architecture.
        DependencyError: if vLLM is needed and not installed.
    """
    since = time.monotonic()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if not 0 <= drain_seconds < math.inf:
        raise RequestError(f"--drain-seconds {drain_seconds} is no time. Give seconds from 0 on.")
    catalogs, adapters = _named("--catalog", catalog), _named("--adapter", adapter)
    for option, given in (("--catalog", catalogs), ("--adapter", adapters)):
        for name, named in given.items():
            if not Path(named).is_dir():
                raise RequestError(f"{option} {name}={named} names no folder. Give one that is there.")
    if history_store is not None and _has_password(history_store):
        raise RequestError(
            "--history-store has a password, and every user of the machine can read command lines. Set the variable "
            "LLMREC_HISTORY_STORE instead."
        )
    locked = Keys.from_environment(os.environ) is not None  # now, and not after minutes of loading
    port = port or _free_port()
    check_port(port, _EVERYWHERE.get(host, host))
    if host not in _LOCAL and not locked:
        console.print(
            f"llmrec: warning: {host} can be reached from other machines, and there is no API key. Set LLMREC_API_KEY "
            "or LLMREC_API_KEY_FILE, or listen on 127.0.0.1."
        )
    console.print("llmrec:    0.0 s  checking the artefact")
    folder = folders.resolve(artefact, revision)
    optional = {
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
        "kv_cache_gib": kv_cache_gib,
        "max_beams": max_beams,
    }
    launch = uuid.uuid4().hex
    typed = {"max_rows_running": max_rows, "max_body_bytes": max_body_bytes, "deadline_ms": deadline_ms}
    command, environment = server_command(
        folder,
        host=host,
        port=port,
        dtype=dtype,
        name=artefact.rstrip("/").rpartition("/")[2],
        extra=list(vllm_args),
        **{name: value for name, value in optional.items() if value is not None},  # type: ignore[arg-type]
        backend=backend,
        limits=_limits(typed, limit),
        drain_seconds=drain_seconds,
        catalogs=catalogs,
        adapters=adapters,
        history_store=history_store,
        index_folder=index_folder,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        retrieval=retrieval,
        launch=launch,
    )
    address = _EVERYWHERE.get(host, host)
    plan = Plan(
        command=command,
        url=f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}",
        launch=launch,
        restarts=_RESTARTS if supervise else 0,
        drain_seconds=drain_seconds,
        quiet=quiet,
        log_file=None if log_file is None else _openable(log_file),
        since=since,
    )
    parent = supervised(plan)
    os.execve(parent[0], parent, environment)


def _limits(typed: Mapping[str, float | None], others: Sequence[str]) -> Limits:
    """The limits of typed options and of `--limit NAME=NUMBER`."""
    known = {each.name: each.type for each in fields(Limits) if each.name != "max_beams"}
    given: dict[str, Any] = {name: value for name, value in typed.items() if value is not None}
    for name, text in _named("--limit", others).items():
        if name not in known:
            raise RequestError(f"There is no limit {name!r}. Give one of {', '.join(sorted(known))}.")
        if name in given:
            raise RequestError(f"The limit {name} is given twice. Leave out one of the two.")
        try:
            given[name] = int(text) if known[name] in (int, "int") else float(text)
        except ValueError as error:
            raise RequestError(f"--limit {name}={text} is no number that fits. Give one, such as 100.") from error
    return Limits(**given)


def _named(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` pairs in their order."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise RequestError(f"{option} {pair!r} does not say which is which. Give NAME=VALUE.")
        if name in found:
            raise RequestError(f"{option} gives {name!r} twice. Give each name once.")
        found[name] = value
    return found


def _has_password(url: str) -> bool:
    """Whether a history store's URL shows a secret: before its host, or as redis-py's option; yes, if unreadable."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return True
    return parts.password is not None or (parts.scheme != "sqlite" and "password" in parse_qs(parts.query))


def _openable(file: Path) -> Path:
    """The log's file, made if need be, before minutes of loading have passed."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab"):
            return file.resolve()
    except OSError as error:
        raise RequestError(f"--log-file cannot be written: {error}. Name another.") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
