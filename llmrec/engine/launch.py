"""Starting a server for an artefact: its command line and its environment.

This module is also what a server's process runs first. `python -m llmrec.engine.launch vllm ARTEFACT COMMAND …` makes
the index of the catalog's current version, which vLLM's workers map before the HTTP side is there, and becomes the
command. `python -m llmrec.engine.launch transformers ARTEFACT HOST PORT DTYPE` is the whole server without vLLM.
"""

import importlib.util
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from llmrec.artefact_parts import is_sequence, read_settings
from llmrec.catalog_versions import CatalogVersions
from llmrec.engine.lora import lora_arguments
from llmrec.engine.plugin import ARCHITECTURES, CATALOG_VERSION, INDEX, INDEX_FOLDER, LAUNCH, MAX_BEAMS
from llmrec.environment import DEFAULT_KV_CACHE_GIB
from llmrec.exceptions import DependencyError, EngineError, RequestError
from llmrec.guard import guarded, scratch_folder
from llmrec.probe import api_key, is_ready
from llmrec.server_log import ServerLog
from llmrec.service.drain import DEFAULT_DRAIN_SECONDS
from llmrec.service.limits import Limits
from llmrec.service.settings import ServiceSettings

logger = logging.getLogger(__name__)

Backend = Literal["vllm", "transformers"]

HISTORY_STORE = "LLMREC_HISTORY_STORE"
_FIRST = (sys.executable, "-m", "llmrec.engine.launch")
_KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"
# Parts of an index, and files that were not written to their end: names of `IndexFiles` and of `atomic_path`.
_LEFT_BEHIND = re.compile(r".+-[0-9a-f]{16}-[0-9a-f]{16}\.trie\.safetensors|\..+\.trie\.safetensors\.\d+\.tmp")


def server_command(
    artefact: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "auto",
    max_num_seqs: int = 64,
    max_model_len: int | None = None,
    kv_cache_gib: float | None = None,
    max_beams: int = 512,
    name: str | None = None,
    extra: Sequence[str] = (),
    *,
    backend: Backend = "vllm",
    limits: Limits | None = None,
    drain_seconds: float = DEFAULT_DRAIN_SECONDS,
    catalogs: Mapping[str, str | Path] | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    history_store: str | None = None,
    index_folder: str | Path | None = None,
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    retrieval: str = "exact",
    launch: str = "",
) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of a server for `artefact`.

    vLLM's module is started rather than the `vllm` script, which the CPU build's metadata breaks. `dtype` "auto" is
    the saved one: vLLM's own "auto" would turn float32 into half precision and its scores with it.

    Args:
        artefact: a checked artefact folder.
        max_num_seqs: requests searched together, at most.
        max_model_len: tokens of a prompt and of the longest item behind it; default: the model's positions.
        kv_cache_gib: memory for the KV cache on a CPU, rounded up to whole GiB (a GPU's is found by vLLM); default:
            VLLM_CPU_KVCACHE_SPACE, else 1.
        max_beams: the widest search that a request may ask for.
        name: of the model in `/v1/models`; default: the folder's name.
        extra: further arguments for vLLM, which win.
        backend: "vllm", or "transformers", which needs no vLLM and has no parallelism. A sequence model is always
            served by transformers.
        limits: of requests; `max_beams` is not taken from here.
        drain_seconds: what answers in flight may take when the server is stopped.
        catalogs: name -> folder of a catalog or an artefact, the default one first; default: the artefact's own.
        adapters: name -> folder of a LoRA adapter that requests may name.
        history_store: `memory:`, `sqlite:PATH` or `redis://…`; default: LLMREC_HISTORY_STORE. It is put into the
            environment, because a URL may have a password.
        index_folder: for the catalog's tries, kept from one start to the next, one server's alone; default: one that
            is made at the start and removed at the end.
        tensor_parallel_size: of vLLM: parts that each layer is split into.
        data_parallel_size: of vLLM: engines that share the requests.
        retrieval: of a sequence model: "exact", or one of faiss's indexes (`llmrec.sequence.index.Retrieval`).
        launch: what `/ready` repeats.

    Raises:
        DependencyError: if vLLM is not installed and needed.
        EngineError: if the artefact names no architecture, or the API key stands on the command line.
        RequestError: for limits out of their ranges, or settings that do not go together.
    """
    if backend not in get_args(Backend):
        raise RequestError(f"There is no backend {backend!r}. Choose one of {', '.join(get_args(Backend))}.")
    settings = ServiceSettings(
        model=name or artefact.name,
        catalogs={key: str(folder) for key, folder in (catalogs or {}).items()},
        history_store=os.environ.get(HISTORY_STORE, "") if history_store is None else history_store,
        adapters={key: str(folder) for key, folder in (adapters or {}).items()},
        retrieval=retrieval,
        drain_seconds=drain_seconds,
        launch=launch,
        limits=replace(limits or Limits(), max_beams=max_beams),
    )
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", LAUNCH: launch} | settings.environment()
    environment.pop(HISTORY_STORE, None)
    if index_folder is not None:
        environment[INDEX_FOLDER] = str(index_folder)
    sequence = is_sequence(artefact)
    settings.require_kind(artefact.name, sequence)
    if sequence or backend == "transformers":
        if extra or index_folder is not None or tensor_parallel_size > 1 or data_parallel_size > 1:
            raise RequestError(
                "Arguments for vLLM's server, an index folder or parallelism came with "
                f"{'a sequence model' if sequence else '--backend transformers'}, which has none of them. Leave them "
                f"out{'' if sequence else ', or serve with vLLM'}."
            )
        return [*_FIRST, "transformers", str(artefact), host, str(port), dtype], environment
    if "VLLM_API_KEY" in environment or any(_is_key(argument) for argument in extra):
        raise EngineError(
            "vLLM was given an API key of its own, by --api-key, which every user of the machine can read, or by "
            "VLLM_API_KEY; with it, routes stay open. Set LLMREC_API_KEY, or name a file with LLMREC_API_KEY_FILE."
        )
    if importlib.util.find_spec("vllm") is None:
        raise DependencyError(
            "vLLM is not installed, and serving with it needs it. Install llmrec[cpu] or llmrec[gpu] from the lane's "
            "lock (make env), or serve with --backend transformers."
        )
    config = json.loads((artefact / "config.json").read_text(encoding="utf-8"))
    architectures = config.get("architectures") or []
    if len(architectures) != 1:
        raise EngineError(
            f"config.json of {artefact} names the architectures {architectures}, and one is needed. "
            "Save the model again with save_pretrained."
        )
    if dtype == "auto":
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    arguments = {
        "--model": str(artefact),
        "--served-model-name": settings.model,
        "--host": host,
        "--port": str(port),
        "--runner": "pooling",
        "--hf-overrides": json.dumps({"architectures": [f"LlmRec{architectures[0]}"]}),
        "--pooler-config": json.dumps({"task": "embed", "seq_pooling_type": "LAST"}),
        "--dtype": dtype,
        "--max-num-seqs": str(max_num_seqs),
        "--block-size": "32",  # on a CPU the default is 128, and short prompts would never meet the prefix cache
        "--tensor-parallel-size": str(tensor_parallel_size),
        "--data-parallel-size": str(data_parallel_size),
        # For a service manager that stops all processes at once: the engine, too, then finishes what it has.
        "--shutdown-timeout": str(math.ceil(drain_seconds)),
    }
    if max_model_len is not None:
        arguments["--max-model-len"] = str(max_model_len)
    command = [*_FIRST, "vllm", str(artefact), sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [part for pair in arguments.items() for part in pair]
    command += ["--enforce-eager", "--no-enable-log-requests", *lora_arguments(settings.adapters), *extra]
    environment |= {
        "VLLM_PLUGINS": "llmrec,llmrec_http",
        ARCHITECTURES: architectures[0],
        MAX_BEAMS: str(max(max_beams, settings.limits.max_k)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if kv_cache_gib is not None:
        environment[_KV_CACHE] = str(max(1, math.ceil(kv_cache_gib)))
    environment.setdefault(_KV_CACHE, str(DEFAULT_KV_CACHE_GIB))
    # Longer than a proxy keeps a connection that it does not use: vLLM's 5 s would break off requests just sent.
    environment.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "30")
    return command, environment


def _is_key(argument: str) -> bool:
    # Shortened, too, as vLLM's parser takes it.
    return argument.partition("=")[0].replace("_", "-").startswith("--api-k")


def main(arguments: Sequence[str]) -> None:
    """See the module."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    backend, artefact, *rest = arguments
    if backend == "transformers":
        _serve_with_transformers(Path(artefact), *rest)
    else:
        _become_vllm(Path(artefact), rest)


def _become_vllm(artefact: Path, command: list[str]) -> None:
    from llmrec.service.index_files import IndexFiles

    folder = next(iter(ServiceSettings.from_environment(os.environ).catalogs.values()), artefact)
    versions = CatalogVersions.inside(folder)
    # Found once, and told to all processes of the server: each would read it at another time.
    version = versions.current
    logger.info("llmrec: building the index of catalog version %s", version)
    files = IndexFiles(os.environ.get(INDEX_FOLDER) or scratch_folder())
    _tidy(files.folder)
    index = files.index_of(versions.load(version), read_settings(artefact).softmax)
    environment = os.environ | {INDEX_FOLDER: str(files.folder), INDEX: index, CATALOG_VERSION: version}
    logger.info("llmrec: starting vLLM")
    os.execve(command[0], command, environment)


def _tidy(folder: Path) -> None:
    """Removes what a server that was killed left in its folder: nobody asks for it again, and it would add up."""
    for path in folder.iterdir():
        if _LEFT_BEHIND.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _serve_with_transformers(artefact: Path, host: str, port: str, dtype: str) -> None:
    from llmrec.service.keys import Keys
    from llmrec.service.standalone import serve_standalone

    tempfile.tempdir = str(scratch_folder())  # the index's, which so is removed however this process ends
    logger.info("llmrec: loading the model")
    settings = ServiceSettings.from_environment(os.environ)
    serve_standalone(artefact, host, int(port), settings, Keys.from_environment(os.environ), dtype)


@dataclass(frozen=True)
class Server:
    """A server that was started here.

    Attributes:
        process: its process; it and all its children die with this one.
        url: where it listens.
        log: what it prints.
        launch: what its `/ready` answers, and no other server's.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    launch: str

    def wait_until_ready(self, timeout: float = 600.0) -> None:
        """Returns when it answers; raises EngineError with the log's end if it dies or takes over `timeout` s."""
        begin, key = time.monotonic(), api_key(os.environ)
        while time.monotonic() - begin < timeout:
            if (code := self.process.poll()) is not None:
                said = ServerLog.of(self.log)
                raise EngineError(
                    f"{said.reason(code)} The server's log {self.log} ends with:\n" + "\n".join(said.end())
                )
            if is_ready(self.url, key, self.launch):
                return
            time.sleep(0.2)
        raise EngineError(
            f"The server was not ready after {timeout:.0f} s; its log is {self.log}. Run `llmrec doctor`."
        )


@contextmanager
def running_server(artefact: Path, port: int, log: Path, **options: object) -> Iterator[Server]:
    """Starts a server as a child that dies with this process, yields it at once, and ends it on the way out.

    Args:
        artefact: a checked artefact folder.
        port: where it will listen, on 127.0.0.1.
        log: file for what it prints.
        options: as for `server_command`.

    Raises:
        EngineError: if something listens on the port already.
    """
    check_port(port)
    launch = uuid.uuid4().hex
    command, environment = server_command(artefact, port=port, launch=launch, **options)  # type: ignore[arg-type]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            guarded(command, with_parent=True), env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield Server(process, f"http://127.0.0.1:{port}", log, launch)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def check_port(port: int, host: str = "127.0.0.1") -> None:
    """Raises EngineError if `port` of `host` is taken."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineError(f"Port {port} cannot be used: {error}. Choose another, or stop what uses it.") from error


if __name__ == "__main__":
    main(sys.argv[1:])
