"""Writing files and folders so that a crash leaves the old content or the new, never a torn one."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt


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


def digest_of(path: str | Path) -> str:
    """The sha256 of a file, or of all files of a folder with their names; of what is neither, of the text itself."""
    found = Path(path)
    if found.is_file():
        return sha256_of(found)
    digest = hashlib.sha256()
    for file in sorted(found.rglob("*")) if found.is_dir() else ():
        if file.is_file():
            digest.update(f"{file.relative_to(found).as_posix()}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest() if found.is_dir() else hashlib.sha256(str(path).encode()).hexdigest()


def digest_of_arrays(arrays: Iterable[npt.NDArray[Any] | None]) -> str:
    """The sha256 of what arrays hold, with their types and shapes, in order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(b"none" if array is None else f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Returns when the file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
