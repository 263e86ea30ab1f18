"""Causal language models with a catalog's tokens: from a config or a checkpoint, trained in full or by LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llmrec.exceptions import BackboneError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class BackboneArguments:
    """Which language model, and how it is trained."""

    backbone: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local path of a causal LM. Left out: a model from the sizes below, from scratch."
        },
    )
    backbone_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    model_type: str = field(
        default="llama", metadata={"help": "From scratch: a transformers model type, such as llama, gpt2 or qwen3."}
    )
    hidden_size: int = field(default=128, metadata={"help": "From scratch: width D."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "From scratch: width of the MLP; left out, four times the hidden size."}
    )
    num_hidden_layers: int = field(default=4, metadata={"help": "From scratch: layers."})
    num_attention_heads: int = field(
        default=4,
        metadata={"help": "From scratch: heads H; vLLM on a CPU needs hidden_size / H of 32, 64, 80, 96, 128 …"},
    )
    dropout: float = field(default=0.0, metadata={"help": "From scratch: dropout, where the architecture has it."})
    tie_word_embeddings: bool = field(
        default=True, metadata={"help": "From scratch: one matrix for input embeddings and output head."}
    )
    text_vocab_size: int = field(
        default=512, metadata={"help": "From scratch: size of the text vocabulary learnt from the item texts."}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa, eager, flash_attention_2 (needs flash-attn and a GPU)."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 trains all weights."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's scale: updates are multiplied by alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on LoRA's input."})


def build_config(arguments: BackboneArguments, vocab_size: int, max_positions: int, **token_ids: int | None) -> Any:
    """A transformers config of `arguments`' sizes; raises BackboneError for an unknown type or a bad head size."""
    from transformers import AutoConfig

    if arguments.hidden_size % arguments.num_attention_heads:
        raise BackboneError(
            f"hidden_size {arguments.hidden_size} is not a multiple of num_attention_heads "
            f"{arguments.num_attention_heads}. Choose sizes that divide."
        )
    mlp = arguments.intermediate_size or 4 * arguments.hidden_size
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": arguments.num_hidden_layers,
        "num_attention_heads": arguments.num_attention_heads,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": arguments.tie_word_embeddings,
    }
    try:
        probe = AutoConfig.for_model(arguments.model_type)
    except ValueError as error:
        raise BackboneError(
            f"transformers knows no model type {arguments.model_type!r}. Name one such as llama, gpt2 or qwen3."
        ) from error
    # Families name these sizes differently; a size is given under every name that the family's config knows.
    optional = {
        "intermediate_size": mlp,
        "n_inner": mlp,
        "num_key_value_heads": arguments.num_attention_heads,
        "head_dim": arguments.hidden_size // arguments.num_attention_heads,
        "attention_dropout": arguments.dropout,
        "attn_pdrop": arguments.dropout,
        "embd_pdrop": arguments.dropout,
        "resid_pdrop": arguments.dropout,
    }
    sizes |= {name: value for name, value in optional.items() if hasattr(probe, name)}
    return AutoConfig.for_model(arguments.model_type, **sizes, **token_ids)


def from_scratch(
    arguments: BackboneArguments, tokenizer: "PreTrainedTokenizerBase", max_positions: int
) -> "PreTrainedModel":
    """A randomly initialised model for `tokenizer`; the caller sets torch's seed. fp32."""
    from transformers import AutoModelForCausalLM

    config = build_config(
        arguments,
        vocab_size=_padded(len(tokenizer)),
        max_positions=max_positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=arguments.attn_implementation)


def from_checkpoint(
    arguments: BackboneArguments, tokenizer: "PreTrainedTokenizerBase", new_ids: Sequence[int], seed: int
) -> tuple["PreTrainedModel", list[int]]:
    """A checkpoint from the Hub or a folder, its embeddings extended to `tokenizer`, and the rows that are new.

    Raises:
        BackboneError: if the checkpoint cannot be loaded as a causal LM.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            arguments.backbone,
            revision=arguments.backbone_revision,
            attn_implementation=arguments.attn_implementation,
            dtype=torch.float32,
        )
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{arguments.backbone!r} cannot be loaded as a causal language model: {error}. "
            "Give a local folder or a Hub id, and check the network or HF_HUB_OFFLINE."
        ) from error
    return model, extend_embeddings(model, len(tokenizer), new_ids, seed)


@torch.no_grad()
def extend_embeddings(model: "PreTrainedModel", vocab_size: int, new_ids: Sequence[int], seed: int) -> list[int]:
    """Resizes input and output embeddings to at least `vocab_size` rows and initialises the new rows in place.

    New are `new_ids` and every row that the resizing added, padding included: padding rows are in the softmax too.
    They are returned, ascending.

    A new row is the mean of the old rows plus Gaussian noise of a tenth of their standard deviation per dimension: it
    starts where the model knows what to do with it, and no two tokens start equal. Seeded. Never shrinks: some
    checkpoints have more rows than their tokenizer has tokens.
    """
    old_size = model.get_input_embeddings().weight.shape[0]
    if vocab_size > old_size:
        model.resize_token_embeddings(_padded(vocab_size), mean_resizing=False)
    new = torch.tensor(sorted({*new_ids, *range(old_size, model.get_input_embeddings().weight.shape[0])}))
    generator = torch.Generator().manual_seed(seed)
    weights = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not weights[0]:
        weights.append(head.weight)
    for weight in weights:
        known = torch.ones(min(old_size, weight.shape[0]), dtype=torch.bool)
        known[new[new < len(known)]] = False
        old = weight[: len(known)][known].float()
        noise = torch.randn((len(new), weight.shape[1]), generator=generator)
        weight[new] = (old.mean(0) + 0.1 * old.std(0, correction=0) * noise).to(weight.dtype)
    return new.tolist()


def with_lora(arguments: BackboneArguments, model: "PreTrainedModel", new_rows: Sequence[int]) -> "PeftModel":
    """Puts LoRA on the blocks' linear layers; the embeddings' new rows (and an untied head's) are trained in full."""
    from peft import LoraConfig, TaskType, get_peft_model

    names = {module: name for name, module in model.named_modules()}
    tables = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not tables[0].weight:
        tables.append(head)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear",
        trainable_token_indices={names[table].rpartition(".")[2]: sorted(new_rows) for table in tables},
    )
    adapted = get_peft_model(model, config)
    wrapped = adapted.get_output_embeddings()
    if not hasattr(wrapped, "bias"):  # trl's fused loss asks the head for one, and PEFT's wrapper has no such name
        wrapped.bias = None
    return adapted


def _padded(vocab_size: int, multiple: int = 64) -> int:
    """Rounded up, because tensor cores want embedding tables of round sizes."""
    return -(-vocab_size // multiple) * multiple
