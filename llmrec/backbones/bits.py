"""Bases of 4 and 8 bits with bitsandbytes: loading them, and turning them back into plain weights."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrec.exceptions import BackboneError, DependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = 64  # weights that share a constant


def quantisation_config(method: str, compute_dtype: torch.dtype) -> Any:
    """How `qlora` (4-bit NormalFloats with quantised constants) or `int8` load a base; a config of transformers.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (NeurIPS 2023), sections 3 (NF4) and 3
    (double quantisation); Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale"
    (NeurIPS 2022).

    Raises:
        DependencyError: if bitsandbytes is not installed.
        BackboneError: for another method.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise DependencyError(
            f"bitsandbytes is not installed, and the method {method!r} needs it. "
            "Install llmrec[cpu] or llmrec[gpu], or take --method lora."
        )
    if method == "qlora":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    raise BackboneError(f"The method {method!r} quantises nothing. Take 'qlora' or 'int8'.")


def load_quantised(
    folder: str | Path,
    method: str,
    compute_dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    device: torch.device | None = None,
) -> "PreTrainedModel":
    """An extended base with its blocks' linear layers in 4 or 8 bits; embeddings and head stay as they were saved.

    Args:
        folder: that `save_extended_base` wrote.
        method: "qlora" or "int8".
        compute_dtype: of the products in 4 bits, and of what is not quantised.
        attention: for `attn_implementation`.
        device: default: this process's GPU if there is one.

    Raises:
        DependencyError: if bitsandbytes is not installed.
        BackboneError: if nothing was quantised, the weights do not load, or bitsandbytes would misread them.
    """
    from transformers import AutoModelForCausalLM

    config = quantisation_config(method, compute_dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=config,
            dtype=compute_dtype,
            attn_implementation=attention,
            device_map=None if device is None else {"": device},
        )
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"The base in {folder} cannot be loaded for {method!r}: {' '.join(str(error).split())[:300]}. "
            "Save it again, or take --method lora."
        ) from error
    quantised = [module for module in model.modules() if _is_quantised(module)]
    if not quantised:
        raise BackboneError(
            f"A {model.config.model_type} has no linear layers that bitsandbytes quantises. Take --method lora."
        )
    # bitsandbytes' CPU code counts blocks by the row where its GPU code, and its quantisation, count through.
    odd = sorted({module.in_features % _BLOCK and module.in_features for module in quantised} - {0})
    if odd and method == "qlora" and model.device.type == "cpu":
        raise BackboneError(
            f"bitsandbytes reads 4-bit weights wrongly on a CPU where a layer has {odd[0]} inputs, no multiple of "
            f"{_BLOCK}. Use a GPU, or take --method lora."
        )
    for module in quantised:
        # On a CPU with bfloat16 instructions, a 4-bit layer's first pass in eval mode repacks its weights for good and
        # computes in bfloat16 from then on, without gradients: an evaluation would end the training of all before it.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def dequantise(model: "PreTrainedModel") -> "PreTrainedModel":
    """Replaces every quantised layer by a plain one of the architecture's own kind, in place; returns the model.

    The weights are those that the quantised layers compute with: a 4-bit layer's are exactly what it multiplies by;
    an 8-bit layer also rounds its inputs, which plain weights do not show.
    """
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if not _is_quantised(module):
            continue
        weight = _weight(module)  # (out, in)
        bias = module.bias
        plain: Any
        if issubclass(getattr(module, "source_cls", nn.Linear), Conv1D):  # GPT-2 keeps (in, out)
            plain = Conv1D(1, 1)
            plain.nf, plain.nx = weight.shape
            plain.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
            plain.bias = nn.Parameter(
                torch.zeros(len(weight), dtype=weight.dtype, device=weight.device) if bias is None else bias.detach(),
                requires_grad=False,
            )
        else:
            plain = nn.Linear(1, 1, bias=bias is not None)
            plain.out_features, plain.in_features = weight.shape
            plain.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
        plain.train(module.training)
        model.set_submodule(name, plain)
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    return model


def is_quantised(model: nn.Module) -> bool:
    """Whether any layer is in 4 or 8 bits."""
    return any(_is_quantised(module) for module in model.modules())


def _is_quantised(module: nn.Module) -> bool:
    # By name, so that nothing of bitsandbytes is imported where it is not installed.
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def _weight(module: Any) -> torch.Tensor:
    """The plain weight (out, in) of a quantised layer, in the format that it computes with; float32 for 8 bits."""
    import bitsandbytes

    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        plain: torch.Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        return plain
    # Before the first forward pass the scales are the weight's, afterwards the layer's.
    codes = weight.CB if getattr(weight, "CB", None) is not None else weight.data
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
    plain = bitsandbytes.functional.int8_vectorwise_dequant(codes, scales)
    return plain
