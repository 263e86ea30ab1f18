"""Starting vLLM's server for an artefact: its command line and its environment."""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmrec.catalog import CATALOG_FOLDER
from llmrec.catalog_versions import CatalogVersions
from llmrec.engine.plugin import ARCHITECTURES, CATALOG_VERSION, LAUNCH, MAX_BEAMS
from llmrec.environment import DEFAULT_KV_CACHE_GIB
from llmrec.exceptions import DependencyError, EngineError
from llmrec.guard import guarded

_KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"


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
) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of vLLM's server for `artefact`.

    The module is started rather than the `vllm` script, which the CPU build's metadata breaks. `dtype` "auto" is the
    saved one: vLLM's own "auto" would turn float32 into half precision and its scores with it.

    Args:
        artefact: a checked artefact folder.
        max_num_seqs: requests searched together, at most.
        max_model_len: tokens of a prompt and of the longest item behind it; default: the model's positions.
        kv_cache_gib: memory for the KV cache on a CPU, rounded up to whole GiB (a GPU's is found by vLLM); default:
            VLLM_CPU_KVCACHE_SPACE, else 1.
        max_beams: the widest search that a request may ask for.
        name: of the model in `/v1/models`; default: the folder's name.
        extra: further arguments for vLLM, which win.

    Raises:
        DependencyError: if vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise DependencyError(
            "vLLM is not installed, and serving needs it. Install llmrec[cpu] or llmrec[gpu] from the lane's lock "
            "(make env)."
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
        "--served-model-name": name or artefact.name,
        "--host": host,
        "--port": str(port),
        "--runner": "pooling",
        "--hf-overrides": json.dumps({"architectures": [f"LlmRec{architectures[0]}"]}),
        "--pooler-config": json.dumps({"task": "embed", "seq_pooling_type": "LAST"}),
        "--dtype": dtype,
        "--max-num-seqs": str(max_num_seqs),
        "--block-size": "32",  # on a CPU the default is 128, and short prompts would never meet the prefix cache
    }
    if max_model_len is not None:
        arguments["--max-model-len"] = str(max_model_len)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [part for pair in arguments.items() for part in pair]
    command += ["--enforce-eager", "--no-enable-log-requests", *extra]
    environment = os.environ | {
        "VLLM_PLUGINS": "llmrec,llmrec_http",
        ARCHITECTURES: architectures[0],
        MAX_BEAMS: str(max_beams),
        CATALOG_VERSION: CatalogVersions(artefact / CATALOG_FOLDER).current,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if kv_cache_gib is not None:
        environment[_KV_CACHE] = str(max(1, math.ceil(kv_cache_gib)))
    environment.setdefault(_KV_CACHE, str(DEFAULT_KV_CACHE_GIB))
    return command, environment


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
        import httpx

        begin = time.monotonic()
        with httpx.Client(trust_env=False, timeout=5.0) as client:  # a proxy has no part in what stays on this machine
            while time.monotonic() - begin < timeout:
                if self.process.poll() is not None:
                    raise EngineError(
                        f"The server ended with code {self.process.returncode}; its log {self.log} ends with:\n"
                        f"{_tail(self.log)}\nMend what it names, or run `llmrec doctor`."
                    )
                try:
                    answer = client.get(f"{self.url}/ready")
                    if answer.status_code == 200 and answer.json().get("launch") == self.launch:
                        return
                except (httpx.HTTPError, ValueError):
                    pass
                time.sleep(0.5)
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
    command, environment = server_command(artefact, port=port, **options)  # type: ignore[arg-type]
    environment[LAUNCH] = launch = uuid.uuid4().hex
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


def check_port(port: int) -> None:
    """Raises EngineError if `port` of 127.0.0.1 is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise EngineError(f"Port {port} cannot be used: {error}. Choose another, or stop what uses it.") from error


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
