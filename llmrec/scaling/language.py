"""LanguageShape: what it costs to train a causal language model on rows of semantic IDs, as train/sft.py does.

T tokens a row, V words, D width, I inner width, H heads of d, of which G have keys and values of their own.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from llmrec.exceptions import DataError
from llmrec.scaling.flops import Flops
from llmrec.scaling.memory import NUMBER, ROW, attention_numbers, network_numbers
from llmrec.scaling.shape import Device

MODELS = ("llama", "gpt2", "qwen3")


@dataclass(frozen=True)
class LanguageShape:
    """A causal language model, the rows that it reads, and what of it is trained.

    A row of the task `sequence` holds a window's items, of which all, or those that no other window has, are learnt; a
    row of `next_item` holds a history and one item to be learnt: `length` the history's and 1, `targets` 1.

    Attributes:
        model_type: llama, gpt2 or qwen3; others that are built alike cost alike.
        depth: layers.
        width: D.
        vocabulary: V, of text and semantic IDs.
        codes: tokens of an item.
        length: items of a row, learnt ones included.
        heads: H.
        targets: items of a row that are learnt; None: all.
        other_tokens: of a row, beside its items': the start token, and a prompt's words.
        key_value_heads: G; None: H.
        head_dim: d; None: D / H.
        inner: I; None: 4 D, as train/sft.py makes it from scratch.
        tied: whether one matrix is input embeddings and output head.
        max_positions: rows of gpt2's position table; None: a row's tokens.
        loss_vocabulary: words that the loss is over; None: V.
        lora_rank: of adapters on every linear layer but the head, below which the model is frozen; None: all is
            trained. DoRA's magnitudes and what quantised weights cost to unpack are left out.
        lora_dropout: whether adapters drop some of their input.
        new_rows: with LoRA, rows of the embeddings (and of an untied head) that are trained.
        dropout: whether the model itself has dropout; none has by default.
        checkpointing: whether layers are computed again for the backward pass instead of being kept.
        device: "cpu" or "gpu".
    """

    model_type: Literal["llama", "gpt2", "qwen3"]
    depth: int
    width: int
    vocabulary: int
    codes: int
    length: float
    heads: int = 4
    targets: float | None = None
    other_tokens: float = 1
    key_value_heads: int | None = None
    head_dim: int | None = None
    inner: int | None = None
    tied: bool = True
    max_positions: int | None = None
    loss_vocabulary: int | None = None
    lora_rank: int | None = None
    lora_dropout: bool = True
    new_rows: int = 0
    dropout: bool = False
    checkpointing: bool = False
    device: Device = "cpu"

    def __post_init__(self) -> None:
        """Raises DataError for sizes that no model has."""
        if self.model_type not in MODELS or self.device not in ("cpu", "gpu"):
            raise DataError(
                f"There are no costs of a {self.model_type!r} on a {self.device!r}. Choose {', '.join(MODELS)}, and "
                "cpu or gpu."
            )
        for entry in fields(self):
            value = getattr(self, entry.name)
            least = -1 if entry.name in ("new_rows", "other_tokens") else 0
            if isinstance(value, int | float) and not isinstance(value, bool) and not least < value < math.inf:
                raise DataError(f"{entry.name} of a language model is {value}. Give a positive number.")
        if (self.head_dim is None and self.width % self.heads) or self.heads % self.groups:
            raise DataError(
                f"{self.heads} heads do not share a width of {self.width} and {self.groups} heads of keys and values. "
                "Choose sizes that divide."
            )
        if self.model_type == "gpt2" and (self.head_dim is not None or self.groups != self.heads):
            raise DataError("A gpt2 has heads that share its width. Leave head_dim and key_value_heads out.")
        if self.window_tokens > self.length:
            raise DataError(f"A row holds {self.length:g} items, and learns {self.targets}. Give fewer targets.")
        if self.new_rows and self.lora_rank is None:
            raise DataError(f"new_rows is {self.new_rows} without LoRA, where all rows are trained. Leave it out.")

    @property
    def groups(self) -> int:
        """G."""
        return self.key_value_heads or self.heads

    @property
    def head_width(self) -> int:
        """d."""
        return self.head_dim or self.width // self.heads

    @property
    def inner_width(self) -> int:
        """I."""
        return self.inner or 4 * self.width

    @property
    def tokens(self) -> float:
        """T."""
        return self.other_tokens + self.codes * self.length

    @property
    def window_tokens(self) -> float:
        """Events that a row counts for: its targets."""
        return self.length if self.targets is None else self.targets

    @property
    def labels(self) -> float:
        """Tokens of a row that are learnt."""
        return self.codes * self.window_tokens

    @property
    def fused(self) -> bool:
        """Whether attention keeps no T × T weights: always, but with dropout on a CPU."""
        return not (self.device == "cpu" and self.dropout)

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's linear layers, those that read the layer's input first."""
        width, inner = self.width, self.inner_width
        queries, keys = self.heads * self.head_width, self.groups * self.head_width
        if self.model_type == "gpt2":
            return [(width, 3 * width), (width, width), (width, inner), (inner, width)]
        return [
            *((width, queries), (width, keys), (width, keys), (queries, width)),
            *((width, inner), (width, inner), (inner, width)),
        ]


def language_parameters(shape: LanguageShape) -> int:
    """Weights of the model without adapters, exactly.

    A layer's matrices; two RMS norms of D, and qwen3's of d for queries and keys; with gpt2 a bias behind each matrix
    and layer norms of 2 D. One more norm at the end, V D for the embeddings and as many for an untied head.
    """
    layer = sum(inputs * outputs for inputs, outputs in shape.matrices)
    tables = shape.vocabulary * shape.width * (1 if shape.tied else 2)
    if shape.model_type == "gpt2":
        layer += sum(outputs for _, outputs in shape.matrices) + 4 * shape.width
        positions = shape.max_positions or math.ceil(shape.tokens)
        return tables + positions * shape.width + shape.depth * layer + 2 * shape.width
    layer += 2 * shape.width + (2 * shape.head_width if shape.model_type == "qwen3" else 0)
    return tables + shape.depth * layer + shape.width


def trained_parameters(shape: LanguageShape) -> int:
    """Weights that are trained: all, or an adapter's r (inputs + outputs) of every matrix, and the new rows."""
    if shape.lora_rank is None:
        return language_parameters(shape)
    adapters = shape.lora_rank * sum(inputs + outputs for inputs, outputs in shape.matrices)
    return shape.depth * adapters + shape.new_rows * shape.width * (1 if shape.tied else 2)


def row_flops(shape: LanguageShape) -> Flops:
    """Operations of training on one row, counted as in `llmrec.scaling.flops`.

    A trained matrix costs 6 a weight and token. A frozen one costs 4, because it needs no gradient of itself, and its
    adapter 6 r (inputs + outputs). Where nothing below the first layer is trained, the matrices that read its input
    need no gradient of that either. The head meets labelled tokens alone: 6 V D each; frozen, 4 V D, and 2 D a new
    row.
    Checkpointing computes the layers forwards once more, all but each one's last matrix, whose output nothing needs.
    """
    tokens, depth = shape.tokens, shape.depth
    weights = depth * sum(inputs * outputs for inputs, outputs in shape.matrices)
    words = shape.loss_vocabulary or shape.vocabulary
    attention = depth * tokens**2 * shape.heads * shape.head_width
    last = shape.matrices[-1]
    if shape.lora_rank is None:
        again, layers, head = 2.0 * (weights - depth * last[0] * last[1]), 6.0 * weights, 6.0 * words
    else:
        # An adapter's product with its matrix comes before its own two, of which the second is then the last.
        adapters = depth * shape.lora_rank * sum(inputs + outputs for inputs, outputs in shape.matrices)
        again = 2.0 * (weights + adapters - depth * shape.lora_rank * last[1])
        layers = 4.0 * weights + 6.0 * adapters
        if not shape.new_rows:
            first = shape.matrices[: 1 if shape.model_type == "gpt2" else 3]
            layers -= sum(2.0 * inputs * (outputs + shape.lora_rank) for inputs, outputs in first)
        head = 4.0 * words + 2.0 * shape.new_rows
    return Flops(
        (layers + (again if shape.checkpointing else 0.0)) * tokens,
        ((14.0 if shape.fused else 12.0) + (4.0 if shape.checkpointing else 0.0)) * attention,
        head * shape.width * shape.labels,
    )


def language_activation_bytes(shape: LanguageShape, rows: float = 1) -> float:
    """Bytes kept for the backward pass of a batch of rows, in float32, as `llmrec.scaling.memory` counts them.

    Below adapters a frozen matrix keeps nothing of its input, and a frozen norm its input alone; each adapter keeps
    its input with dropout applied, the mask, and r numbers. The loss makes its gradients in the forward pass: D a
    labelled token, and all of the head's, or its new rows'. With checkpointing a layer keeps its input alone, and one
    layer at a time the rest.
    """
    tokens = rows * shape.tokens
    layer = _layer_numbers(shape)
    layers = shape.depth * shape.width + layer if shape.checkpointing else shape.depth * layer
    frozen = shape.lora_rank is not None
    last = shape.width * (1 if frozen or shape.model_type == "gpt2" else 2)
    mask = (1.0 if shape.device == "cpu" else 1 / NUMBER) if shape.dropout and shape.model_type == "gpt2" else 0.0
    if frozen and not shape.new_rows and not shape.checkpointing:
        # Nothing flows back to the first layer's norm, nor through the dropout behind it.
        readers = 1 if shape.model_type == "gpt2" else 3
        drops = (1.0 if shape.device == "cpu" else 1 / NUMBER) * readers if shape.lora_dropout else 0.0
        layers -= shape.width * (1 + drops)
    words = (shape.new_rows if frozen else shape.loss_vocabulary or shape.vocabulary) * shape.width
    return (
        tokens * (NUMBER * (layers + last + mask * shape.width) + ROW)
        + rows * shape.labels * (NUMBER * shape.width + 2 * ROW)
        + NUMBER * words
    )


def _layer_numbers(shape: LanguageShape) -> float:
    """What a layer keeps a token, in numbers."""
    width, frozen, gpt2 = shape.width, shape.lora_rank is not None, shape.model_type == "gpt2"
    queries, keys = shape.heads * shape.head_width, shape.groups * shape.head_width
    byte = 1.0 if shape.device == "cpu" else 1 / NUMBER
    # Norms: what they read, and, RMS and trained, that divided by its size. What they give is kept by who reads it.
    kept = 2.0 * (width + (2 if gpt2 else 1 + (0 if frozen else width)))
    if shape.model_type == "qwen3":
        kept += (queries + keys) * (1 if frozen else 2) + shape.heads + shape.groups
    mask = byte if shape.dropout else 0.0
    kept += attention_numbers(
        shape.heads, shape.tokens, queries, queries + 2 * keys if shape.fused else 3 * queries,
        shape.fused, shape.dropout, mask,
    )  # fmt: skip
    kept += 2 * mask * width if gpt2 else 0
    inner = network_numbers("gelu" if gpt2 else "swiglu", shape.inner_width, gpt2) - shape.inner_width
    kept += inner
    # What the matrices read: the two norms' output, what attention read, and the network's inner width.
    if not frozen or not shape.lora_dropout:
        kept += 2 * width + (0 if shape.fused else queries) + shape.inner_width
    else:
        kept += sum(inputs for inputs, _ in shape.matrices) * (1 + byte)
    return kept + (len(shape.matrices) * (shape.lora_rank or 0))
