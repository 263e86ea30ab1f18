"""EmbeddingStore: one float32 vector per item in a folder that says where they come from."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from llmrec import __version__
from llmrec.embedding.matrix import blocks, first_bad_row, map_npy, map_safetensors, temporary_matrix, write_matrix
from llmrec.exceptions import ArtefactError, DataError
from llmrec.storage import atomic_folder, sha256_of, write_json

logger = logging.getLogger(__name__)

EMBEDDINGS_FILE, ITEMS_FILE, MANIFEST_FILE = "embeddings.safetensors", "items.json", "embedding.json"
TENSOR = "embeddings"


class EmbeddingStore:
    """Items and their embeddings, row by row.

    Attributes:
        item_ids: N item ids, unique.
        embeddings: (N, D) float32; after `load` and `from_file` a memory map.
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
        first, bad = first_bad_row(self.embeddings)
        if bad:
            raise DataError(
                f"{bad} embedding(s) hold NaN or infinity, item {self.item_ids[first]!r} first. Embed the items again."
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

    def aligned(self, item_ids: Sequence[str]) -> "EmbeddingStore":
        """The store of these items in this order: itself if it is that, else copied into a temporary file.

        Raises:
            DataError: if one of them has no embedding, or ids repeat.
        """
        if list(item_ids) == self.item_ids:
            return self
        missing = [item for item in item_ids if item not in self._rows]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(item_ids)} item(s) have no vector, such as "
                f"{', '.join(map(repr, missing[:5]))}. Give one for every item of the table and of the interactions."
            )
        if unused := len(self) - len(item_ids):
            logger.info("%d row(s) of the vectors belong to no item and are left out", unused)
        order = np.array([self._rows[item] for item in item_ids], dtype=np.int64)
        embeddings = temporary_matrix((len(order), self.dimension))
        for rows in blocks(embeddings):
            embeddings[rows] = self.embeddings[order[rows]]
        return EmbeddingStore(item_ids, embeddings, self.origin)

    def save(self, folder: str | Path) -> None:
        """Writes the folder, whole or not at all, block by block."""
        with self.writing(folder, self.item_ids, self.origin) as path:
            write_matrix(path, TENSOR, self.embeddings)

    @classmethod
    @contextmanager
    def writing(cls, folder: str | Path, item_ids: Sequence[str], origin: Mapping[str, Any]) -> Iterator[Path]:
        """Yields the path to which the caller writes the vectors, as `new_matrix` does with the name `TENSOR`.

        On a clean exit the file is checked and the folder takes its place; otherwise nothing is left.

        Raises:
            DataError: if the vectors do not belong to the items, or one is not finite.
        """
        with atomic_folder(folder) as temporary:
            yield temporary / EMBEDDINGS_FILE
            written = cls(item_ids, map_safetensors(temporary / EMBEDDINGS_FILE, TENSOR), origin)
            write_json(temporary / ITEMS_FILE, written.item_ids)
            write_json(
                temporary / MANIFEST_FILE,
                {
                    **written.origin,
                    "items": len(written),
                    "dimension": written.dimension,
                    "dtype": "float32",
                    "sha256": {name: sha256_of(temporary / name) for name in (EMBEDDINGS_FILE, ITEMS_FILE)},
                    "llmrec_version": __version__,
                },
            )

    @classmethod
    def from_file(cls, path: str | Path, item_ids: Sequence[str], tensor: str | None = None) -> Self:
        """Vectors of the user's own, which stay on disk; what is not float32 is converted block by block.

        Args:
            path: a .npy or .safetensors file of (N, D) floats; bfloat16 too in the latter.
            item_ids: the item of each row.
            tensor: which one of a .safetensors file; None takes its only one.

        Raises:
            DataError: if the file cannot be read, is not of that kind, has another number of rows than there are ids,
                or holds NaN or infinity (also what float32 cannot hold); or if ids repeat.
        """
        path = Path(path)
        if path.suffix not in (".npy", ".safetensors") or not path.is_file():
            raise DataError(f"{path} is no .npy or .safetensors file. Save the vectors as one of these.")
        if path.suffix == ".npy" and tensor is not None:
            raise DataError(f"{path} has no tensor {tensor!r}, because .npy files name none. Leave the name out.")
        embeddings = map_npy(path) if path.suffix == ".npy" else map_safetensors(path, tensor)
        if len(embeddings) != len(item_ids):
            raise DataError(
                f"{path} has {len(embeddings):,} rows for {len(item_ids):,} items, and rows are matched to items by "
                "their order. Give one row per item, or name each row's item with --vector_ids."
            )
        origin = {"model": "own vectors", "file": path.name, "file_sha256": sha256_of(path)}
        # The same file with its rows given to other items is another embedding.
        origin["row_ids_sha256"] = text_sha256([str(item) for item in item_ids])
        return cls(item_ids, embeddings, origin | ({"tensor": tensor} if tensor else {}))

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
        try:
            embeddings = map_safetensors(folder / EMBEDDINGS_FILE, TENSOR)
        except DataError as error:
            raise ArtefactError(
                f"{folder / EMBEDDINGS_FILE} is none of ours ({error}). Run semantic_ids/embed.py again."
            ) from error
        derived = ("items", "dimension", "dtype", "sha256", "llmrec_version")
        return cls(item_ids, embeddings, {key: value for key, value in manifest.items() if key not in derived})


def text_sha256(texts: Sequence[str]) -> str:
    """A hash of texts in their order; different splits of the same characters have different hashes."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def read_item_ids(path: str | Path) -> list[str]:
    """Item ids from a .json file with a list of them, or from any other file with one a line.

    Raises:
        DataError: if the file cannot be read, is no such list, or holds what is no id.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        ids = json.loads(text) if path.suffix == ".json" else text.removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a list of item ids ({error}). Write one id a line.") from error
    if not isinstance(ids, list):
        raise DataError(
            f'{path} holds no list but {type(ids).__name__}. Write ["id 1", "id 2"], in order of the rows.'
        )
    for place, item in enumerate(ids):
        if not isinstance(item, str | int) or isinstance(item, bool) or item == "":
            raise DataError(f"Entry {place + 1} of {path} is {item!r}, which is no item id. Write one id per row.")
    return [str(item) for item in ids]
