"""What quantizers that keep codebooks share: checks of settings and codes, samples, means, and their files."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from llmrec import __version__
from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.storage import atomic_path, write_json

logger = logging.getLogger(__name__)

CODEBOOKS_FILE, MANIFEST_FILE = "codebooks.safetensors", "quantizer.json"
# As in faiss: more items per centroid hardly move it.
ITEMS_PER_CENTROID = 256


def check_positive(**values: int) -> None:
    """Raises TokenizerError if one of the named settings is below 1."""
    for name, value in values.items():
        if value < 1:
            raise TokenizerError(f"{name} is {value}. Use at least 1.")


def check_codes(codes: npt.NDArray[np.integer], sizes: Sequence[int]) -> npt.NDArray[np.int32]:
    """The codes (N, L) as int32; raises TokenizerError if they are no whole numbers 0 ≤ code < sizes[l]."""
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] != len(sizes):
        raise TokenizerError(f"Codes of shape {codes.shape} do not have {len(sizes)} levels. Give (N, L).")
    if codes.dtype.kind not in "iu":
        raise TokenizerError(f"Codes are of type {codes.dtype}, not whole numbers. Give the codes of this quantizer.")
    outside = ((codes < 0) | (codes >= np.asarray(sizes))).any(axis=1)
    if outside.any():
        row = int(outside.argmax())
        raise TokenizerError(
            f"{int(outside.sum())} row(s) of codes are outside the codebooks of {list(sizes)} entries, such as row "
            f"{row} ({codes[row].tolist()}). Decode the codes of this quantizer."
        )
    return codes.astype(np.int32)


def fitting_size(codebook_size: int, items: int) -> int:
    """min(K, N), with a warning if that is less than K: N items cannot place more than N centroids."""
    if items < codebook_size:
        logger.warning("%d items: codebooks have %d codes, not %d.", items, items, codebook_size)
    return min(codebook_size, items)


def means_of(
    vectors: npt.NDArray[np.floating], chosen: npt.NDArray[np.integer], codebook: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """The codebook (K, D) with each centroid on the mean of the vectors (N, D) that have chosen it, if any has.

    >>> means_of(np.array([[1.0], [3.0], [7.0]]), np.array([2, 2, 0]), np.array([[0.0], [5.0], [0.0]])).tolist()
    [[7.0], [5.0], [2.0]]
    """
    means = codebook.astype(np.float64)
    counts = np.bincount(chosen, minlength=len(codebook))
    used = np.flatnonzero(counts)
    ordered = vectors[np.argsort(chosen, kind="stable")].astype(np.float64)
    begins = np.concatenate([[0], np.cumsum(counts[used])[:-1]])
    means[used] = np.add.reduceat(ordered, begins, axis=0) / counts[used, None]
    return means


def sampled_rows(items: int, limit: int, seed: int) -> npt.NDArray[np.int64]:
    """All rows, or `limit` of them drawn without repetition, ascending."""
    if items <= limit:
        return np.arange(items)
    return np.sort(np.random.default_rng(seed).choice(items, limit, replace=False))


def require_fitted(codebooks: tuple[npt.NDArray[Any], ...]) -> tuple[npt.NDArray[Any], ...]:
    """The codebooks; raises TokenizerError if there are none yet."""
    if not codebooks:
        raise TokenizerError("The quantizer has no codebooks yet. Call fit, or load one with from_pretrained.")
    return codebooks


def save_quantizer(
    folder: str | Path, manifest: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[np.floating]]
) -> None:
    """Writes the tensors and the manifest, in which "quantizer" names the kind; each file whole or not at all."""
    folder = Path(folder)
    with atomic_path(folder / CODEBOOKS_FILE) as temporary:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, temporary)
    write_json(folder / MANIFEST_FILE, {**manifest, "llmrec_version": __version__})


def load_quantizer(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """The settings and tensors that `save_quantizer` wrote.

    Raises:
        ArtefactError: if a file is missing, torn or of another kind, or a tensor holds NaN or infinity.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["quantizer"] != kind:
            raise ValueError(f"its quantizer is {manifest['quantizer']!r}")
        tensors = load_file(folder / CODEBOOKS_FILE)
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise ValueError(f"{name} holds NaN or infinity")
        settings = {name: value for name, value in manifest.items() if name not in ("quantizer", "llmrec_version")}
    except Exception as error:
        raise ArtefactError(
            f"{folder} holds no {kind} quantizer ({error!r}). Point to the codebooks folder of a build."
        ) from error
    return settings, tensors
