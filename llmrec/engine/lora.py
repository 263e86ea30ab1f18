"""LoRA adapters: each beam is run with its request's, and what vLLM noted for the prompts is put back afterwards."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmrec.exceptions import ArtefactError

# What vLLM takes as --max-lora-rank.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_BUFFERS = ("_token_lora_indices", "_sampler_indices", "_embeddings_indices")


def lora_slots(adapters: int) -> int:
    """The slots (`--max-loras`) for so many adapters: one more than there are.

    On a CPU vLLM 0.32 runs rows without an adapter through the last slot (their index -1 addresses it), which
    therefore has to stay empty, or requests of the base model would get an adapter's answers.
    """
    return adapters + 1


def lora_arguments(adapters: Mapping[str, str | Path]) -> list[str]:
    """vLLM's command line for adapters: name -> folder as peft saved it; empty without any.

    Raises:
        ArtefactError: if a folder holds no LoRA adapter, or one of a rank that vLLM does not take.
    """
    if not adapters:
        return []
    rank = max(_rank_of(Path(folder)) for folder in adapters.values())
    allowed = next(size for size in _RANKS if size >= rank)
    modules = [json.dumps({"name": name, "path": str(folder)}) for name, folder in adapters.items()]
    return [
        "--enable-lora",
        "--max-loras",
        str(lora_slots(len(adapters))),
        "--max-lora-rank",
        str(allowed),
        "--lora-modules",
        *modules,
    ]


def _rank_of(folder: Path) -> int:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"{folder} holds no LoRA adapter ({error}). Name a folder that peft's save_pretrained wrote."
        ) from error
    if not 1 <= rank <= _RANKS[-1]:
        raise ArtefactError(
            f"The adapter in {folder} has rank {rank}, and vLLM takes ranks from 1 to {_RANKS[-1]}. "
            "Train one of a lower rank, or merge it into the model."
        )
    return rank


class LoraRows:
    """Which adapter each row of a forward pass is run with, in vLLM's punica wrapper.

    Made when a batch's prompts have been run: the wrapper then says which slot each prompt token belongs to.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._saved = {name: getattr(wrapper, name).clone() for name in _BUFFERS}
        self._lengths = list(wrapper.indices_len)

    @property
    def most_rows(self) -> int:
        """Rows that the wrapper has room for."""
        return len(self._wrapper._token_lora_indices)

    def use(self, tokens: torch.Tensor, width: int) -> None:
        """Lets the next R·width rows, and their logits, run as the prompt tokens (R,) of the batch did."""
        wrapper, number = self._wrapper, len(tokens) * width
        slots = self._saved["_token_lora_indices"][tokens].repeat_interleave(width)
        wrapper._token_lora_indices[:number] = slots
        wrapper._sampler_indices[:number] = slots
        wrapper._embeddings_indices[:number] = self._saved["_embeddings_indices"][tokens].repeat_interleave(width)
        wrapper.indices_len[:] = [number] * len(wrapper.indices_len)
        self._prepare()

    def restore(self) -> None:
        """Puts back what vLLM had written: it does not write again while the next batch's mapping is the same."""
        for name, saved in self._saved.items():
            getattr(self._wrapper, name).copy_(saved)
        self._wrapper.indices_len[:] = self._lengths
        self._prepare()

    def _prepare(self) -> None:
        """Derives what the kernels read from the indices, as the wrapper's own `update_metadata` does."""
        wrapper = self._wrapper
        if hasattr(wrapper, "token_mapping_meta"):  # a GPU's
            wrapper.token_mapping_meta.prepare_tensors(wrapper.token_lora_indices)
            wrapper.prompt_mapping_meta.prepare_tensors(wrapper.sampler_indices)
        elif wrapper.is_prefill and len(wrapper.token_lora_indices):
            wrapper._update_prefill_metadata(wrapper.token_lora_indices)


def punica_wrapper(model: Any) -> Any:
    """The wrapper that the model's LoRA layers share; None for a model without such layers."""
    for module in model.modules():
        if (wrapper := getattr(module, "punica_wrapper", None)) is not None:
            return wrapper
    return None


@contextmanager
def lora_rows(wrapper: Any) -> Iterator[LoraRows | None]:
    """The rows of one pooling step, put back as they were on the way out; None without adapters."""
    if wrapper is None:
        yield None
        return
    rows = LoraRows(wrapper)
    try:
        yield rows
    finally:
        rows.restore()
