"""The files of a catalog's folder: items as JSON lines, codes as tensors, a description as JSON; knows no catalog."""

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from llmrec.exceptions import CatalogError
from llmrec.title_spelling import TitleSpelling, unpacked

ITEMS_FILE, CODES_FILE, CATALOG_FILE = "items.jsonl", "codes.safetensors", "catalog.json"
TOKEN_IDS = "token_ids."  # and the level, among the tensors


def read_items(path: Path) -> list[dict[str, Any]]:
    """The items of a JSON-lines file, in its order; raises CatalogError for a file that is none."""
    collecting = gc.isenabled()
    # A million new dictionaries would be looked through for garbage again and again; there is none among them.
    gc.disable()
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file if line != "\n"]
        # One document is parsed three times as fast as a million lines.
        items: list[dict[str, Any]] = json.loads(f"[{','.join(lines)}]")
        if len(items) != len(lines) or not all(isinstance(item, dict) and "item_id" in item for item in items):
            raise ValueError("a line is not one item with an item_id")
    except (OSError, ValueError, RecursionError) as error:
        raise CatalogError(f"{path} is no table of items ({error}). Restore the file, or build it again.") from error
    finally:
        if collecting:
            gc.enable()
    return items


def item_lines(items: Sequence[Mapping[str, Any]]) -> bytes:
    """Items as JSON lines; raises CatalogError for a value that JSON does not have, or half a character."""
    try:
        lines = (json.dumps(dict(item), ensure_ascii=False, allow_nan=False) + "\n" for item in items)
        return "".join(lines).encode()
    except (TypeError, ValueError) as error:
        raise CatalogError(f"An item cannot be written ({error}). Give texts, numbers, lists and null.") from error


def read_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a codes file, "codes" among them; raises CatalogError if it is torn or holds none."""
    try:
        tensors: dict[str, npt.NDArray[Any]] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CatalogError(f"{path} cannot be read ({error}). Restore the file, or build it again.") from error
    if "codes" not in tensors:
        raise CatalogError(f"{path} holds {sorted(tensors)}, but no codes. Restore the file, or build it again.")
    return tensors


def codes_in(tensors: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.int32]:
    """(N, L) the codes of what `Catalog.code_tensors` made; raises CatalogError if its parts do not fit together."""
    return unpacked(tensors["codes"], tensors["lengths"]) if "lengths" in tensors else tensors["codes"]


def token_ids_in(tensors: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """The token ids of each level, in order of levels; none if no tokenizer has been extended."""
    levels = sorted(int(name.removeprefix(TOKEN_IDS)) for name in tensors if name.startswith(TOKEN_IDS))
    return [tensors[f"{TOKEN_IDS}{level}"] for level in levels]


def spelling_in(described: Mapping[str, Any], path: Path) -> TitleSpelling | None:
    """The spelling that a catalog's description names; None if it is one of semantic IDs."""
    if "titles" not in described and "codebook_sizes" not in described:
        raise CatalogError(f"{path} cannot be read (it has no codebook_sizes). Restore the folder, or build it again.")
    try:
        return TitleSpelling(**described["titles"]) if "titles" in described else None
    except TypeError as error:
        raise CatalogError(f"{path} cannot be read ({error}). Restore the folder, or build it again.") from error


def read_object(path: Path, *names: str) -> dict[str, Any]:
    """A JSON object with these keys."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"it has no {missing[0]}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CatalogError(f"{path} cannot be read ({error}). Restore the folder, or build it again.") from error
    return found
