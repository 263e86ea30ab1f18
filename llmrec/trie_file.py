"""Files of tries: mapped into memory, and refused where they are torn, foreign or of another version."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from llmrec.exceptions import ArtefactError

DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
# Attributes of a `TrieTensors` that are no arrays.
MEASURES = ("sizes", "fan_out", "probes", "num_rows", "ragged", "shared", "several")


@contextmanager
def mapped_arrays(path: str | Path, kind: str, version: str | None) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The arrays of a file of tries, mapped into memory by name, and its measures, for the caller to look at.

    Args:
        path: a safetensors file whose metadata are "format", "version" and, as JSON, "measures".
        kind: the format that it must have.
        version: the version that it must have; None takes any.

    Raises:
        ArtefactError: if the file is missing, torn, of another format or version; and for what goes wrong while the
            caller looks (KeyError, TypeError, ValueError).
    """
    try:
        with safe_open(path, framework="np"), open(path, "rb") as file:  # checks header and length of the file
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            # Of the file that the header is from, should another take its place now. Copy on write: torch wants
            # arrays that it may write to, and the file stays as it is in any case.
            whole: npt.NDArray[Any] = np.asarray(np.memmap(file, dtype=np.uint8, mode="c"))
        described = header.pop("__metadata__", {})
        if described.get("format") != kind:
            raise ArtefactError(
                f"{path} is no trie (format {described.get('format')!r}). Build it again from the catalog."
            )
        if version is not None and described.get("version") != version:
            raise ArtefactError(
                f"{path} is the trie of version {described.get('version')!r}, not of {version!r}. "
                "Build it again from the catalog."
            )
        arrays = {}
        for name, tensor in header.items():
            begin, end = (8 + length + place for place in tensor["data_offsets"])
            arrays[name] = whole[begin:end].view(DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        yield arrays, json.loads(described["measures"])
    except ArtefactError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} holds no whole trie ({error}). Build it again from the catalog.") from error


def check_search_trie(arrays: dict[str, Any], measures: dict[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError if these are not the arrays and measures of a `TrieTensors`."""
    if sorted(measures) != sorted(MEASURES):
        raise ValueError(f"its measures are {sorted(measures)}")
    counts = [len(measures[name]) for name in ("sizes", "fan_out", "probes")]
    whole = [measures["num_rows"], *(n for name in ("sizes", "fan_out", "probes") for n in measures[name])]
    flags = [measures[name] for name in ("ragged", "shared", "several")]
    if min(counts) != max(counts) or not counts[0] or any(type(n) is not int or n < 0 for n in whole):
        raise ValueError("its measures are not numbers of levels")
    if any(type(flag) is not bool for flag in flags):
        raise ValueError("its flags are neither true nor false")
    nodes = [1, *(arrays[f"token.{level}"].size for level in range(counts[0]))]
    int32 = np.dtype("<i4")
    expected: dict[str, tuple[Any, tuple[int, ...]]] = {"item_of_leaf": (int32, (nodes[-1],))}
    for level in range(counts[0]):
        code = arrays[f"code.{level}"].dtype
        expected[f"code.{level}"] = (code if code in (np.uint8, int32) else int32, (nodes[level + 1],))
        expected[f"token.{level}"] = (int32, (nodes[level + 1],))
        expected[f"start.{level}"] = (int32, (nodes[level] + 1,))
    if "leaf_of_item" in arrays:
        expected["leaf_of_item"] = (int32, (measures["num_rows"],))
    else:
        expected |= {"row": (int32, (nodes[-1],)), "leaf_of_row": (int32, (nodes[-1],))}
    if "vocabulary" in arrays:
        expected["vocabulary"] = (np.dtype("<i8"), (arrays["vocabulary"].size,))
    if {name: (array.dtype, array.shape) for name, array in arrays.items()} != expected:
        raise ValueError("its arrays do not fit together")
    for level in range(counts[0]):
        begins = arrays[f"start.{level}"]
        if begins[0] != 0 or begins[-1] != nodes[level + 1]:
            raise ValueError("nodes of a level are not their parents' children")
