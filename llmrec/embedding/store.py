"""EmbeddingStore: one float32 vector per item in a folder that says where they come from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmrec import __version__
from llmrec.exceptions import ArtefactError, DataError
from llmrec.storage import atomic_folder, sha256_of, write_json

EMBEDDINGS_FILE, ITEMS_FILE, MANIFEST_FILE = "embeddings.safetensors", "items.json", "embedding.json"
TENSOR = "embeddings"


class EmbeddingStore:
    """Items and their embeddings, row by row.

    Attributes:
        item_ids: N item ids, unique.
        embeddings: (N, D) float32; after `load` a read-only memory map.
        origin: what made them, for the manifest: "model", "weights_sha256", "text_sha256" and the encoder's settings.
    """

    def __init__(
        self, item_ids: Sequence[str], embeddings: npt.NDArray[np.floating], origin: Mapping[str, Any] | None = None
    ) -> None:
        """Raises DataError if ids repeat, or ids and vectors differ in number, or a vector is not finite."""
        self.item_ids = [str(item) for item in item_ids]
        # asanyarray lets a memory map through.
        self.embeddings: npt.NDArray[np.float32] = np.asanyarray(embeddings, dtype=np.float32)
        self.origin = dict(origin or {})
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.item_ids):
            raise DataError(
                f"{len(self.item_ids)} items cannot have embeddings of shape {self.embeddings.shape}. "
                "Give one row per item."
            )
        self._rows = {item: row for row, item in enumerate(self.item_ids)}
        if len(self._rows) != len(self.item_ids):
            raise DataError(f"{len(self.item_ids) - len(self._rows)} item id(s) repeat. Keep one row per item.")
        finite = np.isfinite(self.embeddings).all(axis=1)
        if not finite.all():
            first = self.item_ids[int(finite.argmin())]
            raise DataError(
                f"{int((~finite).sum())} embedding(s) hold NaN or infinity, item {first!r} first. "
                "Embed the items again."
            )

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def dimension(self) -> int:
        """D, the width of the vectors."""
        return int(self.embeddings.shape[1])

    def rows(self, item_ids: Sequence[str]) -> npt.NDArray[np.float32]:
        """The embeddings of `item_ids`, (len, D), in the order given; raises DataError that names those without."""
        missing = [item for item in item_ids if item not in self._rows]
        if missing:
            raise DataError(
                f"{len(missing)} item(s) have no embedding: {', '.join(map(repr, missing[:5]))}. "
                "Run semantic_ids/embed.py on the same items and interactions."
            )
        return np.asarray(self.embeddings[[self._rows[item] for item in item_ids]])

    def save(self, folder: str | Path) -> None:
        """Writes the folder, whole or not at all."""
        with atomic_folder(folder) as temporary:
            save_file({TENSOR: np.ascontiguousarray(self.embeddings)}, temporary / EMBEDDINGS_FILE)
            write_json(temporary / ITEMS_FILE, self.item_ids)
            write_json(
                temporary / MANIFEST_FILE,
                {
                    **self.origin,
                    "items": len(self),
                    "dimension": self.dimension,
                    "dtype": "float32",
                    "sha256": {name: sha256_of(temporary / name) for name in (EMBEDDINGS_FILE, ITEMS_FILE)},
                    "llmrec_version": __version__,
                },
            )

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; the vectors stay on disk until they are used.

        Raises:
            ArtefactError: if a file is missing, unreadable or not the one that the manifest describes.
        """
        folder = Path(folder)
        missing = [name for name in (EMBEDDINGS_FILE, ITEMS_FILE, MANIFEST_FILE) if not (folder / name).is_file()]
        if missing:
            raise ArtefactError(
                f"{folder} lacks {', '.join(missing)}. Point to a folder that semantic_ids/embed.py wrote."
            )
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            expected = dict(manifest["sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"{folder / MANIFEST_FILE} is no embedding manifest ({error!r}). Run semantic_ids/embed.py again."
            ) from error
        for name in (EMBEDDINGS_FILE, ITEMS_FILE):
            if sha256_of(folder / name) != expected.get(name):
                raise ArtefactError(
                    f"{folder / name} is not the file that {MANIFEST_FILE} describes: its sha256 differs. "
                    "Restore the folder or run semantic_ids/embed.py again."
                )
        item_ids = json.loads((folder / ITEMS_FILE).read_text(encoding="utf-8"))
        embeddings = _memory_map(folder / EMBEDDINGS_FILE)
        derived = ("items", "dimension", "dtype", "sha256", "llmrec_version")
        return cls(item_ids, embeddings, {key: value for key, value in manifest.items() if key not in derived})


def text_sha256(texts: Sequence[str]) -> str:
    """A hash of texts in their order; different splits of the same characters have different hashes."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _memory_map(path: Path) -> npt.NDArray[np.float32]:
    # safetensors copies a tensor as it reads it; the format itself (8 bytes of header length, a JSON header, then raw
    # little-endian data) can be mapped, so that millions of items cost no memory before they are used.
    try:
        with safe_open(path, framework="numpy") as file:
            described = file.get_slice(TENSOR)
            shape, dtype = described.get_shape(), described.get_dtype()
    except SafetensorError as error:
        raise ArtefactError(f"{path} cannot be read ({error}). Run semantic_ids/embed.py again.") from error
    if dtype != "F32" or len(shape) != 2:
        raise ArtefactError(f"{path} holds {dtype} of shape {shape}, not an F32 matrix. Embed the items again.")
    if 0 in shape:
        return np.zeros(shape, dtype=np.float32)
    with open(path, "rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        begin = json.loads(file.read(header_length))[TENSOR]["data_offsets"][0]
    return np.memmap(path, dtype="<f4", mode="r", offset=8 + header_length + begin, shape=tuple(shape))
