"""From an adapter to an artefact without loss: the extended base, the adapter on it, and the two merged.

A LoRA adapter of a model with new tokens means nothing without the very base that it was trained on, whose new rows
are in no checkpoint of the Hub. So the extended base is saved first, with a hash (`base.json`); the adapter records
the hash (`adapter.json`) beside everything of an artefact but the weights; and `export` puts the two together, and
measures that nothing was lost.
"""

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrec import artefact
from llmrec.backbones.adapters import attach, merge, uses_lora
from llmrec.backbones.bits import dequantise, load_quantised
from llmrec.backbones.causal_lm import DTYPES, METHODS, QUANTISED
from llmrec.catalog import CATALOG_FOLDER
from llmrec.catalog_versions import refuse_to_replace
from llmrec.exceptions import ArtefactError, BackboneError, PromptError
from llmrec.extended_base import BASE_FILE, write_base
from llmrec.extended_base import base_hash as base_hash
from llmrec.extended_base import save_extended_base as save_extended_base
from llmrec.storage import atomic_folder, write_json

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from llmrec.recommender import Recommender

ADAPTER_FILE = "adapter.json"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", BASE_FILE, ".*")
_PROMPTS, _PROMPT_SEED = 8, 0


@dataclass(frozen=True)
class Export:
    """What an export did.

    Attributes:
        folder: the artefact; of an unmerged export, the folder with `base/` and `adapter/`.
        method: how the adapter was trained.
        difference: the largest absolute difference of a log-probability between the trained model (quantised, if it
            was trained so) and the exported one, over the vocabulary at the places of the items' codes.
        prompts: how many prompts that was measured on.
    """

    folder: Path
    method: str
    difference: float
    prompts: int


def save_adapter(
    recommender: "Recommender",
    folder: str | Path,
    base: str,
    method: str,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Writes an adapter with everything of an artefact but the weights, whole or not at all.

    Args:
        recommender: whose model is an adapted one (`adapt`).
        folder: replaced if it exists.
        base: hash of the extended base, as `save_extended_base` returned it.
        method: of training.
        compute_dtype: what a quantised base was loaded to compute in.

    Raises:
        BackboneError: if the model has no adapter.
        CatalogError: if an artefact lies there whose catalog has versions, which would be lost.
    """
    from peft import PeftModel

    if not isinstance(recommender.model, PeftModel):
        raise BackboneError(
            f"A {type(recommender.model).__name__} has no adapter to save. Save it with save_pretrained."
        )
    record = {
        "version": 1,
        "base": base,
        "method": method,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
    }
    adapted = copy.copy(recommender)
    adapted.model = _AdapterFiles(recommender.model, record)
    adapted.save_pretrained(folder)


def export(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    dtype: str = "float32",
    prompts: Sequence[Sequence[int]] | None = None,
    device: str | torch.device | None = None,
) -> Export:
    """Merges an adapter into its base and writes the artefact, whole or not at all.

    LoRA, DoRA and rsLoRA are added to the weights in float32, and the new tokens' rows put in their places. A base of
    4 or 8 bits is dequantised first, so that the merged weights are those that the adapter was trained on, not the
    ones before quantisation; how far the two models are apart is measured.

    Args:
        adapter: a folder that `save_adapter` wrote, or its id on the Hub.
        base: the folder that `save_extended_base` wrote.
        out: the artefact's folder.
        dtype: of the artefact's weights; any but float32 rounds.
        prompts: token ids to measure the difference on; default: eight random histories of the catalog's items,
            each followed by an item.
        device: default: a GPU if there is one.

    Raises:
        ArtefactError: if the adapter or the base is not whole, or the base is not the adapter's.
        BackboneError: for an unknown dtype.
        CatalogError: if an artefact lies at `out` whose catalog has versions, which would be lost.
    """
    if dtype not in DTYPES:
        raise BackboneError(f"dtype is {dtype!r}. Choose one of {', '.join(DTYPES)}.")
    refuse_to_replace(Path(out) / CATALOG_FOLDER)
    folder, record = _read_adapter(adapter, base)
    trained = attach(_load_base(base, record, device), folder)
    asked, last = _prompts(folder, prompts)
    before = _log_probabilities(trained, asked, last)
    merged = merge(trained).eval()
    for weight in merged.parameters():  # not the rotary frequencies beside them, which a loaded model has in float32
        weight.data = weight.data.to(getattr(torch, dtype))
    merged.config.dtype = getattr(torch, dtype)
    after = _log_probabilities(merged, asked, last)
    with atomic_folder(out) as temporary:
        _copy_parts(folder, temporary)
        merged.save_pretrained(temporary, safe_serialization=True)
        artefact.write_manifest(temporary)
    return Export(Path(out), record["method"], _largest(before, after), len(asked))


def export_unmerged(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    prompts: Sequence[Sequence[int]] | None = None,
    device: str | torch.device | None = None,
) -> Export:
    """Folds the trained token rows into the base, and leaves a plain LoRA adapter on it, which vLLM serves.

    `out/base` is an extended base of its own, in float32 (dequantised, if the adapter was trained on 4 or 8 bits);
    `out/adapter` is an adapter of PEFT on attention and MLP alone: `--enable-lora --lora-modules name=out/adapter`.
    `export` merges the two into the same model as the adapter and the base that they came from.

    Args:
        adapter, base, prompts, device: as for `export`.
        out: replaced if it exists.

    Raises:
        ArtefactError: as for `export`, or if the adapter is not one that can be served unmerged.
    """
    folder, record = _read_adapter(adapter, base)
    if not uses_lora(record["method"]) or record["method"] == "dora":
        raise ArtefactError(
            f"An adapter of the method {record['method']!r} cannot be served unmerged: vLLM applies plain LoRA alone. "
            "Leave --unmerged out."
        )
    trained = attach(_load_base(base, record, device), folder)
    asked, last = _prompts(folder, prompts)
    before = _log_probabilities(trained, asked, last)
    plain = _with_rows(trained)
    with atomic_folder(out) as temporary:
        (temporary / "base").mkdir()
        plain.save_pretrained(temporary / "base", safe_serialization=True)
        for file in sorted(Path(base).iterdir()):  # the tokenizer's: the model's own were written just now
            if file.is_file() and not any(fnmatch(file.name, pattern) for pattern in _MODEL_FILES):
                shutil.copyfile(file, temporary / "base" / file.name)
        identity = write_base(temporary / "base")
        (temporary / "adapter").mkdir()
        _copy_parts(folder, temporary / "adapter")
        _write_plain_lora(folder, temporary / "adapter")
        method = "lora" if record["method"] in QUANTISED else record["method"]
        write_json(
            temporary / "adapter" / ADAPTER_FILE,
            {**record, "base": identity, "method": method, "compute_dtype": "float32"},
        )
        artefact.write_manifest(temporary / "adapter")
        after = _log_probabilities(attach(plain, temporary / "adapter"), asked, last)
    return Export(Path(out), record["method"], _largest(before, after), len(asked))


class _AdapterFiles:
    """Stands for the model in a recommender that is being saved: writes the adapter's files alone."""

    def __init__(self, model: "PeftModel", record: dict[str, Any]) -> None:
        self._model, self._record = model, record
        self.device = model.device

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        # PEFT's own word for saving whole tables beside the rows, after a vocabulary was resized.
        self._model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # a template, with nothing filled in
        config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        # A path of this machine, and sets in the order of their hashes: neither belongs into what is published.
        config["base_model_name_or_path"] = None
        for name in ("target_modules", "exclude_modules"):
            if isinstance(config.get(name), list):
                config[name] = sorted(config[name])
        write_json(folder / PEFT_CONFIG, config)
        write_json(folder / ADAPTER_FILE, self._record)


def _read_adapter(adapter: str | Path, base: str | Path) -> tuple[Path, dict[str, Any]]:
    """The verified folder of an adapter and its record, whose base is the one given."""
    folder = artefact.resolve(adapter)
    path = folder / ADAPTER_FILE
    if not path.is_file() or not (folder / PEFT_WEIGHTS).is_file():
        raise ArtefactError(
            f"{folder} is no adapter of llmrec: it holds no {ADAPTER_FILE if not path.is_file() else PEFT_WEIGHTS}. "
            "Give the adapter folder of a run of train/sft.py; an artefact is merged already."
        )
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
        wanted, method, dtype = record["base"], record["method"], record["compute_dtype"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} is torn ({type(error).__name__}: {error}). Copy the adapter again.") from error
    if method not in METHODS or dtype not in DTYPES:
        raise ArtefactError(
            f"{path} names the method {method!r} and the dtype {dtype!r}, which this llmrec does not know. "
            "Install a newer llmrec."
        )
    if not Path(base).is_dir():
        raise ArtefactError(
            f"There is no folder {str(base)!r} with the base {wanted[:12]} of this adapter. "
            "Give the extended base that the run saved; the checkpoint it was made from is not enough."
        )
    if (found := base_hash(base)) != wanted:
        raise ArtefactError(
            f"The adapter in {folder} was trained on the base {wanted[:12]}, and {base} is {found[:12]}. "
            "Give the extended base of the adapter's own run."
        )
    return folder, record


def _load_base(folder: str | Path, record: dict[str, Any], device: str | torch.device | None) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, record["compute_dtype"])
    try:
        if record["method"] in QUANTISED:
            model = load_quantised(folder, record["method"], dtype, device=place)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(place)
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"The base in {folder} does not load: {' '.join(str(error).split())[:300]}. Copy it again."
        ) from error
    return model.eval()


def _prompts(folder: Path, given: Sequence[Sequence[int]] | None) -> tuple[list[list[int]], int]:
    """Prompts of token ids, and how many of their last places are looked at."""
    if given is not None:
        return [list(prompt) for prompt in given], max(map(len, given))
    from transformers import AutoTokenizer

    from llmrec.artefact_parts import PromptEncoder, load_parts
    from llmrec.vocabulary import start_token

    tokenizer, catalog, prompt, settings = load_parts(folder, AutoTokenizer.from_pretrained(folder))
    encoder = PromptEncoder(tokenizer, catalog, prompt, settings)
    rng = np.random.default_rng(_PROMPT_SEED)
    longest = max(1, min(settings.max_history, 10))
    asked, width = [], 1
    for row in rng.integers(0, len(catalog), _PROMPTS).tolist():
        history = rng.integers(0, len(catalog), rng.integers(0, longest + 1)).tolist()
        item = [int(token) for token in catalog.item_tokens[row] if token >= 0]
        try:
            shown = encoder.encode(history)
        except PromptError:  # a template of more than a history: the items' tokens will do
            shown = [start_token(tokenizer), *catalog.tokens_of_rows(history)]
        asked.append(shown + item)
        width = max(width, len(item))
    return asked, width + 1


@torch.inference_mode()
def _log_probabilities(model: Any, prompts: Sequence[Sequence[int]], last: int) -> list[torch.Tensor]:
    """For every prompt the log-probabilities (≤ last, V) at its last places, float32 on the CPU."""
    found = []
    for prompt in prompts:
        logits = model(input_ids=torch.tensor([list(prompt)], device=model.device), use_cache=False).logits
        found.append(logits[0, -last:].float().log_softmax(-1).cpu())
    return found


def _largest(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    return max(float((one - two).abs().max()) for one, two in zip(before, after, strict=True))


@torch.no_grad()
def _with_rows(trained: "PeftModel") -> "PreTrainedModel":
    """The plain base of an adapted model, in float32, with the trained token rows and without the adapters."""
    for module in trained.modules():
        rows = getattr(module, "token_adapter", None)
        if rows is not None and not rows.merged:
            rows.base_layer.float()
            rows.merge()
    plain = dequantise(trained.unload()).float().eval()
    plain.config.dtype = torch.float32
    return plain


def _write_plain_lora(source: Path, target: Path) -> None:
    """PEFT's two files without the tokens' rows."""
    from safetensors.torch import load_file, save_file

    config = json.loads((source / PEFT_CONFIG).read_text(encoding="utf-8"))
    config["trainable_token_indices"] = None
    write_json(target / PEFT_CONFIG, config)
    tensors = load_file(source / PEFT_WEIGHTS)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "trainable_tokens" not in name},
        target / PEFT_WEIGHTS,
        metadata={"format": "pt"},
    )


def _copy_parts(source: Path, target: Path) -> None:
    """Copies what an artefact holds besides its weights: all that the adapter's manifest lists but PEFT's files."""
    listed = {"README.md", *json.loads((source / artefact.MANIFEST).read_text(encoding="utf-8"))["files"]}
    listed -= {PEFT_CONFIG, PEFT_WEIGHTS, ADAPTER_FILE}
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source).as_posix()
        if name in listed or name.startswith(artefact.LIVING):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)
