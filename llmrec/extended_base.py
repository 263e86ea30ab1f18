"""The extended base: a checkpoint with a catalog's tokens, and the hash by which an adapter knows it."""

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from llmrec.exceptions import ArtefactError
from llmrec.storage import atomic_folder, sha256_of, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE_FILE = "base.json"
# What makes a base the one that an adapter was trained on; configs name versions of libraries as well.
_IDENTITY = ("*.safetensors", "*.safetensors.index.json", "tokenizer.json", "*.model", "vocab.json", "merges.txt")


def save_extended_base(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> str:
    """Writes a base with the catalog's tokens, whole or not at all; returns its hash, which `base.json` holds too.

    Args:
        model: as `from_checkpoint` gave it, before adapters.
        tokenizer: with the catalog's tokens.
        folder: replaced if it exists.
    """
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        return write_base(temporary)


def base_hash(folder: str | Path) -> str:
    """The hash of an extended base; every file is read and compared with `base.json`.

    Raises:
        ArtefactError: if the folder is none, or a file of it is missing, torn or altered.
    """
    folder = Path(folder)
    path = folder / BASE_FILE
    again = "Give the folder that was saved beside the adapter, or train again."
    if not path.is_file():
        raise ArtefactError(f"{folder} holds no {BASE_FILE}, so it is no extended base. {again}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        identity, files = str(stored["sha256"]), dict(stored["files"])
        version = stored["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} is torn ({type(error).__name__}: {error}). {again}") from error
    if version != 1:
        raise ArtefactError(f"{path} has version {version!r}; this llmrec reads version 1. Install a newer llmrec.")
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise ArtefactError(f"{folder / name} is missing, though {BASE_FILE} lists it. {again}")
        if sha256_of(folder / name) != digest:
            raise ArtefactError(f"{folder / name} is torn or was altered: {BASE_FILE} lists another hash. {again}")
    if identity != _identity(files):
        raise ArtefactError(f"{path} was altered: its hash is not that of its files. {again}")
    return identity


def write_base(folder: Path) -> str:
    """Writes `base.json` over the files of a folder, and returns the hash."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and file.name != BASE_FILE)
    files = {name: sha256_of(folder / name) for name in names}
    identity = _identity(files)
    write_json(folder / BASE_FILE, {"version": 1, "sha256": identity, "files": files})
    return identity


def _identity(files: dict[str, str]) -> str:
    """One hash over the weights' and the tokenizer's."""
    chosen = {name: files[name] for name in sorted(files) if any(fnmatch(name, pattern) for pattern in _IDENTITY)}
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
