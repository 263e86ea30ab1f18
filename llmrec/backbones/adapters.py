"""Adapters on a causal LM by PEFT: LoRA and its kin, the new tokens' rows alone, and merging them without loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrec.backbones.bits import dequantise, is_quantised
from llmrec.backbones.causal_lm import WITH_LORA, BackboneArguments
from llmrec.exceptions import ArtefactError, BackboneError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def adapt(arguments: BackboneArguments, model: "PreTrainedModel", new_rows: Sequence[int]) -> "PeftModel":
    """Freezes `model` and puts on it what `arguments.method` trains.

    LoRA, DoRA and rsLoRA stand on every linear layer of the blocks. The embeddings' new rows (and an untied head's)
    are trained in full, as deltas of these rows alone; with "new_tokens" nothing else is. Works with gradient
    checkpointing of either kind.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022); Liu et al., "DoRA:
    Weight-Decomposed Low-Rank Adaptation" (ICML 2024); Kalajdzievski, "A Rank Stabilization Scaling Factor for
    Fine-Tuning with LoRA" (2023), alpha / √rank; Dettmers et al., "QLoRA" (NeurIPS 2023).

    Args:
        arguments: method, rank, alpha, dropout.
        model: an extended base: plain, or in 4 or 8 bits for "qlora" and "int8" (`bits.load_quantised`).
        new_rows: rows of the embeddings to train, as `extend_embeddings` gave them; none where items are spelt as
            text.

    Raises:
        BackboneError: if the method is "full", has nothing to train, or does not fit the base's number format.
    """
    from peft import LoraConfig, TaskType, TrainableTokensConfig, get_peft_model, prepare_model_for_kbit_training

    arguments.check()
    if arguments.method == "full":
        raise BackboneError("The method 'full' trains the model itself. Adapt it by another, or train it as it is.")
    if arguments.quantised != is_quantised(model):
        raise BackboneError(
            f"The method {arguments.method!r} was given a base that is {'' if is_quantised(model) else 'not '}"
            "quantised. Load the extended base for this method."
        )
    rows = sorted(set(new_rows))
    config: Any
    if arguments.method == "new_tokens":
        if not rows:
            raise BackboneError(
                "The method 'new_tokens' has none to train: items are spelt with old ones. Take --method lora or full."
            )
        config = TrainableTokensConfig(task_type=TaskType.CAUSAL_LM, token_indices=rows, target_modules=_tables(model))
    else:
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=arguments.rank,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules="all-linear",
            use_dora=arguments.method == "dora",
            use_rslora=arguments.method == "rslora",
            trainable_token_indices=dict.fromkeys(_tables(model), rows) if rows else None,
        )
    if arguments.quantised:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return _with_head_bias(get_peft_model(model, config))


def attach(model: "PreTrainedModel", folder: str | Path) -> "PeftModel":
    """Puts a saved adapter on its extended base, in eval mode.

    Raises:
        ArtefactError: if the files do not fit this base.
    """
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, IndexError, KeyError) as error:
        raise ArtefactError(
            f"The adapter in {folder} does not fit its base: {' '.join(str(error).split())[:300]}. "
            "Give the base that it was trained on, or copy the adapter again."
        ) from error
    return _with_head_bias(adapted.eval())


@torch.no_grad()
def merge(model: Any) -> "PreTrainedModel":
    """The plain model that an adapted one computes as, in float32; a model without adapters comes back as it is.

    A quantised base is dequantised and the update added to the plain weights: nothing is quantised again. The adapted
    model is used up.

    >>> merge(torch.nn.Linear(1, 1))
    Linear(in_features=1, out_features=1, bias=True)
    """
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    if not isinstance(model, PeftModel):
        return model
    if is_quantised(model):
        config = model.peft_config[model.active_adapter]
        trained = {
            name: tensor.clone()
            for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }
        plain = dequantise(model.unload()).float()
        model = get_peft_model(plain, config).eval()
        set_peft_model_state_dict(model, trained)
    else:
        model.float()
    merged = model.merge_and_unload()
    merged.requires_grad_(True)
    merged.config.dtype = torch.float32
    return merged


def uses_lora(method: str) -> bool:
    """Whether a method's adapter has LoRA matrices.

    >>> uses_lora("dora"), uses_lora("new_tokens")
    (True, False)
    """
    return method in WITH_LORA


def _tables(model: "PreTrainedModel") -> list[str]:
    """The last parts of the names of the embeddings, and of an untied head."""
    names = {module: name for name, module in model.named_modules()}
    tables = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not tables[0].weight:
        tables.append(head)
    return [names[table].rpartition(".")[2] for table in tables]


def _with_head_bias(model: "PeftModel") -> "PeftModel":
    """Gives the adapted head its bias back, which PEFT's layer for token rows leaves out of its product.

    Also makes `bias` readable on the adapted head, where a fused loss asks for it.
    """
    head = model.get_output_embeddings()
    layer = getattr(head, "token_adapter", head)
    base = getattr(layer, "base_layer", None)
    if base is None:
        return model
    bias: Any = getattr(base, "bias", None)

    def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
        # Merged or switched off, the layer asks the head itself, which has its bias.
        plain = module.disable_adapters or module.merged or not module.active_adapters
        return output if plain else output + bias.to(output.dtype)

    if bias is not None:
        layer.register_forward_hook(add)
    for wrapper in {head, layer}:
        wrapper.__dict__["bias"] = bias  # not as a parameter, of which the base has it already
    return model
