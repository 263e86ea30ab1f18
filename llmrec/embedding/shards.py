"""Embedding in shards: batches of like length, parts that survive an interruption, rows in the order of the texts."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from llmrec.embedding.matrix import map_safetensors, new_matrix
from llmrec.embedding.store import TENSOR, text_sha256
from llmrec.exceptions import DataError
from llmrec.storage import atomic_path

Encode = Callable[[list[str]], npt.NDArray[np.float32]]


def encode_in_shards(
    texts: Sequence[str],
    encode: Encode,
    *,
    settings: Sequence[object] = (),
    batch_size: int = 32,
    batches_together: int = 1,
    shard_size: int = 2048,
    width: int | None = None,
    progress: bool = False,
    work_folder: str | Path | None = None,
    target: str | Path | None = None,
) -> npt.NDArray[np.float32]:
    """Runs `encode` over batches of texts of similar length; see `llmrec.embedding.encoder.encode_texts`.

    Which texts share a batch depends on the texts and sizes alone, never on where a former run stopped: padding, and
    with it the last bits of a vector, are the same in a continued run.

    Args:
        texts: N texts; equal ones are embedded once.
        encode: texts -> (len, D).
        settings: what else the vectors depend on; parts made with other settings are not taken up.
        batches_together: how many batches `encode` is handed at once, where it cuts them into `batch_size` itself.
        shard_size: texts per part that is kept, rounded down to whole batches.
        width: D, if it is known: a first part of another width is not taken up.
        batch_size, progress, work_folder, target: as for `encode_texts`.

    Returns:
        (N, D) float32, mapped from `target` if there is one.

    Raises:
        DataError: if there are no texts, the batch size is not positive, a vector is not finite, or the vectors differ
            in width from those of the parts before.
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
    places = {text: place for place, text in enumerate(unique)}
    place_of = np.array([places[text] for text in texts], dtype=np.int64)  # (N,) into `unique`
    by_place = np.argsort(place_of, kind="stable")
    begins = np.searchsorted(place_of[by_place], np.arange(len(unique) + 1))
    with ExitStack() as stack:
        result: npt.NDArray[np.float32] | None = None
        bar = stack.enter_context(tqdm(total=len(unique), desc="Embedding", unit="text", disable=not progress))
        for begin in range(0, len(unique), shard_size):
            shard = unique[begin : begin + shard_size]
            path = Path(work_folder) / key[:16] / f"shard-{begin:09d}.safetensors" if work_folder else None
            vectors = _read_shard(path, len(shard), width) if path else None
            if vectors is None:
                parts = []
                for start in range(0, len(shard), batch_size * batches_together):
                    parts.append(encode(shard[start : start + batch_size * batches_together]))
                    bar.update(len(parts[-1]))
                vectors = np.concatenate(parts)
                if result is not None and vectors.shape[1] != result.shape[1]:
                    raise DataError(
                        f"The model returned vectors of {vectors.shape[1]} numbers, those before have "
                        f"{result.shape[1]}. "
                        + (f"Delete {work_folder} and run it again." if work_folder else "Use another model.")
                    )
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
            if result is None:
                width = int(vectors.shape[1])
                shape = (len(texts), width)
                if target is None:
                    result = np.empty(shape, dtype=np.float32)
                else:
                    result = stack.enter_context(new_matrix(target, TENSOR, shape))
            rows = np.sort(by_place[begins[begin] : begins[begin + len(shard)]])
            for start in range(0, len(rows), shard_size):  # a text that many items share must not fill the memory
                some = rows[start : start + shard_size]
                result[some] = vectors[place_of[some] - begin]
    assert result is not None  # there is at least one shard
    return result if target is None else map_safetensors(target, TENSOR)


def _read_shard(path: Path, size: int, width: int | None) -> npt.NDArray[np.float32] | None:
    """A part that an earlier run kept, (size, width); None if there is none or it is not what such a run writes."""
    try:
        vectors: npt.NDArray[np.float32] = load_file(path)["vectors"]
    except (OSError, KeyError, SafetensorError):
        return None
    is_whole = vectors.dtype == np.float32 and vectors.ndim == 2 and len(vectors) == size and 0 not in vectors.shape
    if not is_whole or (width is not None and vectors.shape[1] != width) or not np.isfinite(vectors).all():
        return None
    return vectors
