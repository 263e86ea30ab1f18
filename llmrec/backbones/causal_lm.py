"""Causal language models with a catalog's tokens: from a config or from a checkpoint, and what can go wrong before."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llmrec.backbones.attention import choose_attention
from llmrec.backbones.hub import one_line, require_file
from llmrec.backbones.new_rows import INITIALISATIONS, Start, extend_embeddings, padded
from llmrec.exceptions import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

METHODS = ("full", "lora", "dora", "rslora", "qlora", "int8", "new_tokens")
WITH_LORA = ("lora", "dora", "rslora", "qlora", "int8")
QUANTISED = ("qlora", "int8")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_RANK = 16


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
        default="auto",
        metadata={
            "help": "auto, sdpa, eager, flex_attention, flash_attention_2 or _3, or kernels-community/flash-attn2; "
            "auto takes the fastest that runs here, and says why."
        },
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Number format of the weights that are loaded. Full training wants float32 (with --bf16 true it "
            "computes in bfloat16 all the same); a frozen base may be bfloat16.",
            "choices": list(DTYPES),
        },
    )
    method: str = field(
        default="full",
        metadata={
            "help": "What is trained: 'full': every weight; 'lora', 'dora', 'rslora': adapters and the new tokens' "
            "rows; 'qlora', 'int8': the same as lora on a base of 4-bit NormalFloats, or of 8 bits (bitsandbytes); "
            "'new_tokens': their rows alone.",
            "choices": list(METHODS),
        },
    )
    new_token_init: str = field(
        default="mean",
        metadata={
            "help": "What a new token's embedding starts from: 'mean' of the vocabulary's; 'text': the mean of the "
            "tokens in the texts of the items that have the code; 'codebook': the geometry of the code's vectors.",
            "choices": list(INITIALISATIONS),
        },
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": f"Rank of the adapters, for the methods that have them; {DEFAULT_RANK}."}
    )
    lora_alpha: int = field(
        default=32, metadata={"help": "LoRA's scale: updates are multiplied by alpha / rank (rslora: alpha / √rank)."}
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on LoRA's input."})

    def check(self) -> None:
        """Raises BackboneError for values that no backbone has, or that contradict one another."""
        for name, choices in (("method", METHODS), ("new_token_init", INITIALISATIONS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise BackboneError(f"{name} is {getattr(self, name)!r}. Choose one of {', '.join(choices)}.")
        if self.backbone is None and self.method != "full":
            raise BackboneError(
                f"method is {self.method!r} for a model from scratch, whose frozen weights would stay random. "
                "Name a checkpoint with --backbone, or take --method full."
            )
        if self.method not in WITH_LORA and self.lora_rank:
            raise BackboneError(
                f"lora_rank is {self.lora_rank}, and the method {self.method!r} has no adapters. "
                "Say --method lora (dora, rslora, qlora, int8), or leave lora_rank out."
            )
        if self.method in WITH_LORA and (self.rank < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1):
            raise BackboneError(
                f"lora_rank {self.lora_rank}, lora_alpha {self.lora_alpha} and lora_dropout {self.lora_dropout} are "
                "no LoRA. Ranks count from 1, alpha is above 0, and dropout is in [0, 1)."
            )

    @property
    def rank(self) -> int:
        """The adapters' rank, where the method has any."""
        return DEFAULT_RANK if self.lora_rank is None else self.lora_rank

    @property
    def quantised(self) -> bool:
        """Whether the base is loaded in 4 or 8 bits."""
        return self.method in QUANTISED


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
    arguments: BackboneArguments,
    tokenizer: "PreTrainedTokenizerBase",
    max_positions: int,
    compute_dtype: torch.dtype | None = None,
) -> "PreTrainedModel":
    """A randomly initialised model for `tokenizer`; the caller sets torch's seed.

    Args:
        arguments: sizes, attention, dtype.
        tokenizer: with the catalog's tokens.
        max_positions: tokens of the longest row.
        compute_dtype: what attention is computed in, if not in the weights' format (autocast's).

    Raises:
        BackboneError: for sizes, an attention or a method that cannot be.
    """
    from transformers import AutoModelForCausalLM

    arguments.check()
    config = build_config(
        arguments,
        vocab_size=padded(len(tokenizer)),
        max_positions=max_positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    dtype = getattr(torch, arguments.dtype)
    attention = attention_for(arguments, config, compute_dtype)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def from_checkpoint(
    arguments: BackboneArguments,
    tokenizer: "PreTrainedTokenizerBase",
    new_ids: Sequence[int],
    seed: int,
    start: Start | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple["PreTrainedModel", list[int]]:
    """A checkpoint from the Hub or a folder, its embeddings extended to `tokenizer`, and the rows that are new.

    The weights are whole here whatever the method: a quantised base is loaded from the extended one that
    `save_extended_base` wrote (`bits.load_quantised`).

    Args:
        arguments: which checkpoint, attention, dtype.
        tokenizer: the checkpoint's, with the catalog's tokens.
        new_ids: the catalog's token ids; none where items are spelt as text.
        seed: of the new rows.
        start: what the new rows start from (`new_rows.starts`); default: the mean.
        compute_dtype: what attention is computed in, if not in the weights' format (autocast's).

    Raises:
        BackboneError: if the checkpoint cannot be loaded as a causal LM.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(arguments)
    attention = attention_for(arguments, config, compute_dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            arguments.backbone,
            revision=arguments.backbone_revision,
            attn_implementation=attention,
            dtype=getattr(torch, arguments.dtype),
        )
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{arguments.backbone!r} has a config, but its weights cannot be loaded: {one_line(error)}. "
            "Download it again, or convert its weights to safetensors."
        ) from error
    return model, extend_embeddings(model, len(tokenizer), new_ids, seed, start)


def attention_for(arguments: BackboneArguments, config: Any, compute_dtype: torch.dtype | None = None) -> str:
    """`choose_attention` for these arguments on this machine; the reason is logged.

    Raises:
        BackboneError: if a named attention cannot run here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype or getattr(torch, arguments.dtype)
    choice = choose_attention(arguments.attn_implementation, config, device, dtype)
    logger.info("attention: %s", choice.reason)
    return choice.implementation


def load_config(arguments: BackboneArguments) -> Any:
    """The checkpoint's config, before any weight is loaded; only its config file is downloaded.

    Raises:
        BackboneError: if there is no such folder or repository, it is gated, the Hub is out of reach, or what is there
            is no causal language model of transformers.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    arguments.check()
    name = arguments.backbone
    if name is None:
        raise BackboneError("No backbone is named, so there is no checkpoint to load. Name one with --backbone.")
    require_file(name, arguments.backbone_revision, "config.json")
    try:
        config = AutoConfig.from_pretrained(name, revision=arguments.backbone_revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(
            f"The config of {name!r} is of no model type that this transformers knows: {one_line(error)}. "
            "Choose a checkpoint of a supported architecture, or install a newer transformers."
        ) from error
    try:
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    except KeyError:
        architecture = None
    stored = [found.lower() for found in getattr(config, "architectures", None) or []]
    headless = stored and architecture is not None and architecture.lower() not in stored
    if architecture is None or (headless and not _head_is_tied(config)):
        what = (getattr(config, "architectures", None) or [config.model_type])[0]
        raise BackboneError(
            f"{name!r} holds a {what}, which is no causal language model. "
            "Choose a decoder such as gpt2, meta-llama/Llama-3.2-1B or Qwen/Qwen3-0.6B."
        )
    return config


def load_tokenizer(arguments: BackboneArguments) -> "PreTrainedTokenizerBase":
    """The checkpoint's tokenizer; one without a padding token pads with its end of sequence.

    Raises:
        BackboneError: if it has none that loads, or one with neither a padding nor an end token.
    """
    from transformers import AutoTokenizer

    name = arguments.backbone
    if name is None:
        raise BackboneError("No backbone is named, so there is no tokenizer to load. Name one with --backbone.")
    require_file(name, arguments.backbone_revision, "config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=arguments.backbone_revision)
    except Exception as error:  # tokenizers' own errors are bare Exceptions
        raise BackboneError(
            f"{name!r} has no tokenizer that loads: {one_line(error)}. "
            "Put its tokenizer.json and tokenizer_config.json beside the weights."
        ) from error
    if not len(tokenizer):
        raise BackboneError(
            f"{name!r} has no tokenizer that loads: its vocabulary is empty. "
            "Put its tokenizer.json and tokenizer_config.json beside the weights."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BackboneError(
                f"The tokenizer of {name!r} has neither a padding nor an end-of-sequence token. "
                "Set pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_limit(config: Any) -> int | None:
    """The most tokens that a model of this config has positions for, None if it has no such limit.

    >>> from transformers import AutoConfig
    >>> context_limit(AutoConfig.for_model("gpt2"))
    1024
    """
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
        limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def _head_is_tied(config: Any) -> bool:
    """Whether a checkpoint of a bare model has a head all the same, in its embeddings; an encoder has none."""
    bare = all(name.endswith("Model") for name in config.architectures)
    encoder = getattr(config, "is_decoder", True) is False
    return bare and not encoder and bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
