"""ItemTokenizer: the frozen way from an item's embedding to its semantic ID, by which new items join a catalog."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from llmrec.catalog import Catalog
from llmrec.embedding.fusion import Fusion
from llmrec.embedding.whitening import Whitening
from llmrec.exceptions import ArtefactError
from llmrec.quantization.assignment import Assignment, assign
from llmrec.quantization.codebooks import MANIFEST_FILE
from llmrec.quantization.hashed import HashedCodes
from llmrec.quantization.quantizer import Quantizer
from llmrec.storage import write_json

RECORD_FILE = "semantic_ids.json"
TOKENIZER_FOLDER = "item_tokenizer"  # of an artefact
CODEBOOKS_FOLDER, FUSION_FOLDER, WHITENING_FOLDER = "codebooks", "fusion", "whitening"
# Arguments of a build that are places on the machine where it ran.
_PLACES = ("embeddings", "out", "items", "interactions", "collaborative_embeddings")


@dataclass(frozen=True)
class ItemTokenizer:
    """What `semantic_ids/build.py` fitted: embedding -> whitening -> fusion -> codes.

    Attributes:
        quantizer: vectors to codes.
        whitening: applied to the text embedding first, if there is one.
        fusion: puts the collaborative block beside it, if there is one. A new item has no collaborative signal yet.
        record: `semantic_ids.json`: how all of it was built, and which model embedded the texts ("embeddings").
    """

    quantizer: Quantizer
    whitening: Whitening | None = None
    fusion: Fusion | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    def vectors(
        self, embeddings: npt.NDArray[np.floating], collaborative: npt.NDArray[np.floating] | None = None
    ) -> npt.NDArray[np.floating]:
        """What the quantizer encodes, (N, D'), of text embeddings (N, D).

        Items without collaborative rows (N, C), or with rows of zeros, stand where their text alone puts them.
        """
        if self.whitening is not None:
            embeddings = self.whitening.transform(embeddings)
        return embeddings if self.fusion is None else self.fusion.transform(embeddings, collaborative)

    def assign(self, item_ids: Sequence[str], embeddings: npt.NDArray[np.floating], catalog: Catalog) -> Assignment:
        """Codes (M, L) for new items with text embeddings (M, D), none of which an item of the catalog has.

        Retired items keep their codes, so these are not given away either.

        Raises:
            TokenizerError: if the embeddings are not of the width that was fitted on, or no code is free.
        """
        vectors = self.vectors(embeddings)
        # Random codes come from the ids: an item's embedding has no say in them.
        codes = self.quantizer.encode_ids(item_ids) if isinstance(self.quantizer, HashedCodes) else None
        return assign(vectors, self.quantizer, catalog.codes, catalog.codebook_sizes, codes=codes)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what `semantic_ids/build.py` wrote; raises ArtefactError if a part is missing or unreadable."""
        folder = Path(folder)
        if not (folder / RECORD_FILE).is_file():
            raise ArtefactError(
                f"{folder} holds no {RECORD_FILE}, so new items cannot be tokenized by it. "
                "Point to a folder that semantic_ids/build.py wrote, or to an artefact trained on one."
            )
        try:
            record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtefactError(
                f"{folder / RECORD_FILE} is no JSON ({error}). Build the semantic IDs again."
            ) from error
        whitening, fusion = folder / WHITENING_FOLDER, folder / FUSION_FOLDER
        return cls(
            read_quantizer(folder / CODEBOOKS_FOLDER),
            Whitening.from_pretrained(whitening) if whitening.is_dir() else None,
            Fusion.from_pretrained(fusion) if fusion.is_dir() else None,
            record,
        )


def read_quantizer(folder: str | Path) -> Quantizer:
    """The quantizer of a codebooks folder, of whichever kind; raises ArtefactError if it is unknown or unreadable."""
    folder = Path(folder)
    try:
        kind = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["quantizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{folder} does not say which quantizer made its codes ({error!r}). Build the semantic IDs again."
        ) from error
    from llmrec.quantization.product import ProductQuantizer
    from llmrec.quantization.residual_kmeans import NAME, ResidualKMeans
    from llmrec.quantization.residual_vq import ResidualVQ
    from llmrec.quantization.scalar import ScalarQuantizer

    if kind == "rqvae":
        from llmrec.quantization.rqvae import RQVAE

        return RQVAE.from_pretrained(folder)
    if kind == NAME:
        return ResidualKMeans.from_pretrained(folder)
    if kind == "product":
        return ProductQuantizer.from_pretrained(folder)
    if kind == "residual_vq":
        return ResidualVQ.from_pretrained(folder)
    if kind == "scalar":
        return ScalarQuantizer.from_pretrained(folder)
    if kind == "hashed":
        return HashedCodes.from_pretrained(folder)
    raise ArtefactError(
        f"{folder} holds a quantizer of the kind {kind!r}, which encodes no vectors here. "
        "Point to the codebooks of semantic_ids/build.py, or install a newer llmrec."
    )


def without_places(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A build's arguments without paths, which an artefact that is published should not tell.

    >>> without_places({"quantizer": "opq", "out": "/home/me/ids"})
    {'quantizer': 'opq'}
    """
    return {name: value for name, value in arguments.items() if name not in _PLACES}


def copy_tokenizer(source: str | Path, target: str | Path, catalog: str | None = None) -> None:
    """Copies the tokenizer's files from a build, or from an artefact's own copy, without paths of this machine.

    Args:
        source: the folder of a build, or an artefact's copy.
        target: the folder to write.
        catalog: content hash of the catalog that it will stand beside; by default as it was.

    Raises:
        ArtefactError: if the source has none.
    """
    source, target = Path(source), Path(target)
    if not (source / RECORD_FILE).is_file():
        raise ArtefactError(f"{source} holds no {RECORD_FILE}. Point to a folder that semantic_ids/build.py wrote.")
    record = json.loads((source / RECORD_FILE).read_text(encoding="utf-8"))
    target.mkdir(parents=True, exist_ok=True)
    record = {**record, "arguments": without_places(record.get("arguments", {}))}
    embedded = record.get("embeddings") or {}
    if embedded.get("model") and Path(embedded["model"]).expanduser().is_dir():
        record["embeddings"] = {**embedded, "model": Path(embedded["model"]).name}
    if catalog is not None:
        record["catalog"] = catalog
    write_json(target / RECORD_FILE, record)
    for part in (CODEBOOKS_FOLDER, FUSION_FOLDER, WHITENING_FOLDER):
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, dirs_exist_ok=True)
