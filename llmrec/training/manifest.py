"""The list of a checkpoint's files with sizes and hashes, which is written last: what has one was finished."""

import json
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from llmrec import __version__
from llmrec.storage import fsync, sha256_of, write_json

MANIFEST = "manifest.json"

# From this many bytes on, reading a checkpoint to check it takes long enough for a bar.
_SHOW_FROM = 1 << 30


def write_manifest(checkpoint: Path, step: int, processes: int, resumable: bool) -> None:
    """Fsyncs all that the checkpoint holds, and lists it; what is listed is on the disk."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            files[path.relative_to(checkpoint).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        fsync(path)
    about = {"step": step, "processes": processes, "resumable": resumable, "llmrec_version": __version__}
    write_json(checkpoint / MANIFEST, about | {"files": files})


def why_not_whole(checkpoint: str | Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None if it can: see `newest_whole_checkpoint`."""
    checkpoint = Path(checkpoint)
    path = checkpoint / MANIFEST
    if not path.exists():
        return _why_not_whole_by_archives(checkpoint)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        step, resumable = int(manifest["step"]), bool(manifest["resumable"])
        files = {str(name): (int(file["size"]), str(file["sha256"])) for name, file in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if checkpoint.name != f"checkpoint-{step}":
        return f"its {MANIFEST} is of step {step}"
    if not resumable:
        return "it holds weights alone (save_only_model), and no optimiser to go on with"
    for name, (size, _) in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"its {MANIFEST} names {name!r}, which lies outside"
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if (found := (checkpoint / name).stat().st_size) != size:
            return f"{name} has {found} bytes, and its {MANIFEST} says {size}"
    total = sum(size for size, _ in files.values())
    short = total < _SHOW_FROM
    with tqdm(total=total, desc=f"Checking {checkpoint.name}", unit="B", unit_scale=True, disable=short) as bar:
        for name, (size, sha256) in files.items():
            try:
                digest = sha256_of(checkpoint / name)
            except OSError as error:
                return f"{name} cannot be read ({error})"
            if digest != sha256:
                return f"the bytes of {name} are not those that its {MANIFEST} lists"
            bar.update(size)
    return None


def _why_not_whole_by_archives(checkpoint: Path) -> str | None:
    weights = {path.name for path in checkpoint.glob("*.safetensors")}
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for path in checkpoint.glob("*.safetensors.index.json"):
            weights |= set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(weights):
            with safe_open(checkpoint / name, framework="numpy") as file:
                file.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return f"it has no {MANIFEST} and is torn ({type(error).__name__}: {error})"
    if not weights:
        return f"it has no {MANIFEST}, and no weights as safetensors"
    for name in ("optimizer.pt", "scheduler.pt"):
        if not zipfile.is_zipfile(checkpoint / name):
            return f"it has no {MANIFEST}, and its {name} is torn or missing"
    return None
