"""A matrix in a file: written block by block, mapped rather than read, so that it may be larger than memory."""

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from llmrec.exceptions import DataError
from llmrec.storage import atomic_path

# Numbers worked on at once: 64 MiB of float32.
BLOCK_NUMBERS = 1 << 24
# safetensors' names of the types of floats; numpy has no bfloat16, which is the upper half of a float32.
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def blocks(matrix: npt.NDArray[np.generic]) -> Iterator[slice]:
    """Slices that cover a matrix's rows, each of at most 64 MiB as float32 (but of one row at least)."""
    size = max(1, BLOCK_NUMBERS // max(1, matrix.shape[1]))
    return (slice(begin, min(begin + size, len(matrix))) for begin in range(0, len(matrix), size))


def first_bad_row(matrix: npt.NDArray[np.floating]) -> tuple[int, int]:
    """The first row with NaN or infinity (-1 if there is none) and how many such rows there are, block by block.

    >>> first_bad_row(np.array([[1.0, 2.0], [np.nan, 0.0], [3.0, np.inf]]))
    (1, 2)
    """
    first, bad = -1, 0
    for rows in blocks(matrix):
        finite = np.isfinite(matrix[rows]).all(axis=1)
        if not finite.all():
            first = first if bad else rows.start + int(finite.argmin())
            bad += int((~finite).sum())
    return first, bad


def matrix_sha256(matrix: npt.NDArray[np.generic]) -> str:
    """A hash of a matrix's shape, type and numbers, worked out block by block."""
    digest = hashlib.sha256(f"{matrix.shape} {matrix.dtype.str}".encode())
    for rows in blocks(matrix):
        digest.update(np.ascontiguousarray(matrix[rows]).data)
    return digest.hexdigest()


@contextmanager
def new_matrix(path: str | Path, name: str, shape: tuple[int, int]) -> Iterator[npt.NDArray[np.float32]]:
    """Yields a mapped (N, D) float32 to be filled, the only tensor of a safetensors file that is there whole or not.

    The file has the bytes that safetensors itself would write.

    Raises:
        OSError: if the disk has no room for it, before anything is filled in.
    """
    size = 4 * shape[0] * shape[1]
    described = {name: {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}}
    header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            _reserve(file.fileno(), 8 + len(header) + size)
        if size == 0:
            yield np.zeros(shape, dtype=np.float32)
            return
        matrix = np.memmap(temporary, dtype="<f4", mode="r+", offset=8 + len(header), shape=shape)
        yield matrix
        matrix.flush()


def write_matrix(path: str | Path, name: str, matrix: npt.NDArray[np.floating]) -> None:
    """Writes (N, D) floats, block by block, as the float32 that `new_matrix` makes."""
    with new_matrix(path, name, (matrix.shape[0], matrix.shape[1])) as written:
        for rows in blocks(written):
            written[rows] = matrix[rows]


def map_safetensors(path: str | Path, name: str | None = None) -> npt.NDArray[np.float32]:
    """A matrix of a safetensors file, read-only; float32 is mapped, other floats are converted (`as_float32`).

    safetensors copies a tensor as it reads it; the format itself (8 bytes of header length, a JSON header, then raw
    little-endian data) can be mapped.

    Args:
        path: the file.
        name: of the tensor; None takes the only one there is.

    Raises:
        DataError: if the file is unreadable, has no such tensor, or it is no matrix of floats; or if it has several
            and none is named.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if name is None and len(names) == 1:
                name = names[0]
            if name not in names:
                asked = "none was named" if name is None else f"there is no {name!r}"
                raise DataError(
                    f"{path} holds {len(names)} tensor(s) and {asked}. Name one of {', '.join(map(repr, names[:10]))}."
                )
            described = file.get_slice(name)
            shape, dtype = tuple(described.get_shape()), described.get_dtype()
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read as safetensors ({error}). Write it again.") from error
    if dtype not in _FLOATS or len(shape) != 2:
        raise DataError(
            f"{path} holds {dtype} of shape {list(shape)}, no (N, D) matrix of floats. Save it as float32."
        )
    if 0 in shape:
        return np.zeros(shape, dtype=np.float32)
    with open(path, "rb") as file:
        header_length = struct.unpack("<Q", file.read(8))[0]
        begin = json.loads(file.read(header_length))[name]["data_offsets"][0]
    stored = np.memmap(path, dtype=_FLOATS[dtype], mode="r", offset=8 + header_length + begin, shape=shape)
    return as_float32(stored, is_bfloat16=dtype == "BF16")


def map_npy(path: str | Path) -> npt.NDArray[np.float32]:
    """The matrix of a .npy file, read-only; float32 is mapped, other floats are converted; nothing is unpickled.

    Raises:
        DataError: if the file is unreadable, holds Python objects, or no (N, D) matrix of floats.
    """
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npy ({error}). Save an (N, D) array of floats.") from error
    if not isinstance(stored, np.ndarray) or stored.ndim != 2 or not np.issubdtype(stored.dtype, np.floating):
        found = f"{stored.dtype} of shape {list(stored.shape)}" if isinstance(stored, np.ndarray) else "an archive"
        raise DataError(f"{path} holds {found}, no (N, D) matrix of floats. Save it as float32.")
    return as_float32(stored)


def as_float32(stored: npt.NDArray[np.generic], is_bfloat16: bool = False) -> npt.NDArray[np.float32]:
    """A matrix as little-endian float32: itself if it is that, else converted into a nameless temporary file.

    Args:
        stored: (N, D) floats, or the bits of bfloat16 as 16-bit integers.
        is_bfloat16: whether it is the latter.
    """
    if stored.dtype == np.dtype("<f4"):
        return stored  # type: ignore[return-value]
    converted = temporary_matrix((stored.shape[0], stored.shape[1]))
    for rows in blocks(stored):
        if is_bfloat16:
            converted[rows] = (stored[rows].astype("<u4") << 16).view("<f4")
        else:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, which is refused as such
                converted[rows] = stored[rows]
    return converted


def temporary_matrix(shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """A mapped (N, D) float32 in a temporary file without a name, whose room is free again when nothing maps it."""
    if 0 in shape:
        return np.zeros(shape, dtype=np.float32)
    with tempfile.TemporaryFile(prefix="llmrec-") as file:
        _reserve(file.fileno(), 4 * shape[0] * shape[1])
        return np.memmap(file, dtype="<f4", mode="r+", shape=shape)


def _reserve(descriptor: int, size: int) -> None:
    # A hole in the file that finds no room when a mapping fills it kills the process without a word.
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
