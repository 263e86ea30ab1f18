"""Writing files and folders so that a crash leaves the old content or the new, never a torn one."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit it is fsynced and renamed onto `path`, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on a clean exit its files are fsynced and it takes `path`'s place.

    A folder that stood at `path` is moved aside first and removed last, so at every moment one whole folder exists
    under `path` or under its `.old` name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    _sweep(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            fsync(file)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        fsync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Puts right what killed processes left beside `path`: an old folder comes back, half-written ones go."""
    import psutil  # here, so that what only reads artefacts (benchmarks/gpu_check.py) runs without it

    for left in sorted(path.parent.glob(f".{glob.escape(path.name)}.*.old")) + sorted(
        path.parent.glob(f".{glob.escape(path.name)}.*.tmp")
    ):
        pid = left.name.split(".")[-2]
        if not pid.isdigit() or (int(pid) != os.getpid() and psutil.pid_exists(int(pid))):
            continue
        if left.suffix == ".old" and not path.exists():
            os.replace(left, path)
        else:
            shutil.rmtree(left, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON, atomically; NaN is refused, because JSON has none."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Returns when the file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
