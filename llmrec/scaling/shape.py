"""Shape: the sizes of a sequence model that decide what its training costs, as the flags of train/seqrec.py say them.

It knows no torch: what a size that is left out becomes is written here once more, and tests hold it to the models.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from llmrec.exceptions import DataError

Encoder = Literal["hstu", "sasrec", "bert4rec", "gru4rec", "llama", "gpt2"]
Device = Literal["cpu", "gpu"]

ENCODERS: tuple[Encoder, ...] = ("hstu", "sasrec", "bert4rec", "gru4rec", "llama", "gpt2")
TRANSFORMERS = ("sasrec", "bert4rec", "llama", "gpt2")
# Which encoders have which flag; the others of a Shape are everyone's.
OWNERS = {
    "heads": ("hstu", *TRANSFORMERS),
    "inner": TRANSFORMERS,
    "relative_bias": ("hstu", "sasrec"),
    "position_embeddings": ("hstu", "sasrec"),
    "residual": ("hstu", "sasrec"),
    "gate": ("hstu", "sasrec"),
    "concat_ua": ("hstu",),
    "score": ("hstu",),
    "qk_dim": ("hstu",),
    "v_dim": ("hstu",),
    "norm": ("sasrec",),
    "feed_forward": ("sasrec",),
    "attention_dropout": ("sasrec", "bert4rec"),
    "gru_size": ("gru4rec",),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "encoder": ENCODERS,
    "loss": ("softmax", "sampled_softmax", "bce"),
    "device": ("cpu", "gpu"),
    "relative_bias": ("none", "position", "time", "position+time", "rope", "rope+time"),
    "residual": ("hstu", "llama", "sasrec", "post"),
    "score": ("silu", "softmax"),
    "norm": ("pre", "authors", "post"),
    "feed_forward": ("relu", "gelu", "swiglu"),
}


@dataclass(frozen=True)
class Shape:
    """A sequence model over a table of items, the windows that it reads, and its loss.

    What is None is the encoder's own default; a flag that an encoder does not have has to stay None. Items are `ids`,
    a row of a table each; events have no tokens of their own.

    Attributes:
        encoder: hstu, sasrec, bert4rec, gru4rec, llama or gpt2.
        depth: layers.
        width: D, of items, states and queries.
        items: N.
        length: S, items that a window holds; where windows differ, their mean.
        heads: H.
        negatives: k of a sampled loss; None: softmax over all N items.
        shared_negatives: whether all targets of a batch share the k negatives.
        loss: "softmax", "sampled_softmax" or "bce"; None: as `negatives` says. bce and gbce cost the same.
        max_history: the longest history, for which there are positions; None: `length`, rounded up.
        targets: items of a window that are learnt; None: all S. More windows, with fewer targets each, cost more.
        inner: width of the feed-forward network.
        relative_bias, position_embeddings, residual, gate, concat_ua, score, qk_dim, v_dim, norm, feed_forward,
        attention_dropout, gru_size: as the encoder's flags.
        time_buckets: of a time bias.
        dropout: whether there is any; its masks are kept for the backward pass.
        hidden_share: bert4rec: of the items that are hidden.
        device: "cpu" or "gpu", which differ in the kernels of softmax attention and of dropout.
    """

    encoder: Encoder
    depth: int
    width: int
    items: int
    length: float
    heads: int | None = None
    negatives: int | None = None
    shared_negatives: bool = False
    loss: Literal["softmax", "sampled_softmax", "bce"] | None = None
    max_history: int | None = None
    targets: float | None = None
    inner: int | None = None
    relative_bias: str | None = None
    position_embeddings: bool | None = None
    residual: str | None = None
    gate: bool | None = None
    concat_ua: bool | None = None
    score: str | None = None
    qk_dim: int | None = None
    v_dim: int | None = None
    norm: str | None = None
    feed_forward: str | None = None
    attention_dropout: bool | None = None
    gru_size: int | None = None
    time_buckets: int = 128
    dropout: bool = True
    hidden_share: float = 0.2
    device: Device = "cpu"

    def __post_init__(self) -> None:
        """Raises DataError for sizes and flags that no model has."""
        for name, known in _CHOICES.items():
            if getattr(self, name) is not None and getattr(self, name) not in known:
                raise DataError(f"{name} of a model is {getattr(self, name)!r}. Choose one of {', '.join(known)}.")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < math.inf:
                raise DataError(f"{entry.name} of a model is {value}. Give a positive number.")
        for name, owners in OWNERS.items():
            if getattr(self, name) is not None and self.encoder not in owners:
                raise DataError(f"{name} is given, and {self.encoder} has none. Leave it out.")
        self._check_choices()

    def _check_choices(self) -> None:
        if self.items < 2 or self.hidden_share >= 1:
            raise DataError(
                f"A model has {self.items} item(s) and a hidden share of {self.hidden_share}. Give 2 items or more, "
                "and a share below 1."
            )
        if self.max_history is not None and self.max_history < self.length:
            raise DataError(
                f"Windows hold {self.length:g} items, and the longest history {self.max_history}. Give a max_history "
                "that is no less."
            )
        sampled = self.negatives is not None
        if (self.loss == "softmax" and sampled) or (self.loss not in (None, "softmax") and not sampled):
            raise DataError(
                f"The loss is {self.loss!r} with {self.negatives} negatives. Give a number of negatives to a sampled "
                "loss alone."
            )
        if self.shared_negatives and (not sampled or self.loss == "bce"):
            raise DataError("shared_negatives is true without a sampled softmax. Give its negatives, or leave it out.")
        if self.encoder == "sasrec" and self.residual not in (None, "sasrec", "llama"):
            raise DataError(f"residual of a sasrec is {self.residual!r}. Choose sasrec or llama.")
        if self.encoder == "sasrec" and self.residual == "llama" and self.norm not in (None, "pre"):
            raise DataError(f"norm is {self.norm!r} with residual 'llama'. Say pre, or leave it out.")
        if self.encoder == "hstu" and self.concat_ua and self.gate is False:
            raise DataError("concat_ua needs the gate that gate=False leaves out. Set one of them the other way.")
        if self.encoder in TRANSFORMERS and self.width % self.num_heads:
            raise DataError(f"{self.num_heads} heads do not share a width of {self.width}. Choose sizes that divide.")

    @property
    def num_heads(self) -> int:
        """H; 1 for an encoder without heads."""
        return self.heads or (2 if self.encoder in ("bert4rec", "llama", "gpt2") else 1)

    @property
    def places(self) -> float:
        """What the encoder reads of a window: S, and one more where the item that is asked for is a hidden place."""
        return self.length + (1 if self.encoder == "bert4rec" else 0)

    @property
    def positions(self) -> int:
        """Places that the encoder is built for."""
        return (self.max_history or math.ceil(self.length)) + (1 if self.encoder == "bert4rec" else 0)

    @property
    def window_tokens(self) -> float:
        """Events that a window counts for: its targets."""
        return self.targets or self.length

    @property
    def labels(self) -> float:
        """Places of a window that have a loss. A cloze model hides each item with the hidden share in half of the
        windows, in the others, and where that hid none, the last alone: 1/2 + (S h + (1 - h)^S) / 2 of S places."""
        if self.encoder != "bert4rec":
            return self.window_tokens
        share, places = self.hidden_share, self.places
        none: float = (1 - share) ** places
        return 0.5 + 0.5 * (places * share + none)

    @property
    def bias(self) -> str:
        """The kind of relative bias."""
        return self.relative_bias or ("position+time" if self.encoder == "hstu" else "none")

    @property
    def has_positions(self) -> bool:
        """Whether there is a table of absolute places."""
        return self.encoder in ("bert4rec", "gpt2") or (
            self.encoder in ("hstu", "sasrec") and self.position_embeddings is not False
        )

    @property
    def residual_style(self) -> str:
        """Of hstu and sasrec."""
        return self.residual or self.encoder

    @property
    def gated(self) -> bool:
        """Of hstu, where it is the default, and sasrec."""
        return self.encoder == "hstu" if self.gate is None else self.gate

    @property
    def qk_width(self) -> int:
        """Width of all heads' queries, and of their keys."""
        if self.encoder != "hstu":
            return self.width
        return self.num_heads * (self.qk_dim or max(1, self.width // self.num_heads))

    @property
    def v_width(self) -> int:
        """Width of all heads' values."""
        if self.encoder != "hstu":
            return self.width
        return self.num_heads * (self.v_dim or max(1, self.width // self.num_heads))

    @property
    def network(self) -> str:
        """The feed-forward network's kind: relu, gelu or swiglu."""
        if self.encoder == "sasrec":
            return self.feed_forward or ("swiglu" if self.residual_style == "llama" else "relu")
        return "swiglu" if self.encoder == "llama" else "gelu"

    @property
    def inner_width(self) -> int:
        """Width of the feed-forward network: D with sasrec's relu, else what makes 8 D² weights."""
        if self.inner is not None:
            return self.inner
        if self.network == "swiglu":
            return 8 * math.ceil(self.width / 3)
        return self.width if self.network == "relu" else 4 * self.width

    @property
    def projects(self) -> bool:
        """Whether a matrix stands behind the heads of softmax attention."""
        return self.encoder != "sasrec" or self.residual_style == "llama"

    @property
    def state(self) -> int:
        """Width of gru4rec's state."""
        return self.gru_size or self.width

    @property
    def drops_attention(self) -> bool:
        """Whether softmax attention drops weights; llama and gpt2 have one dropout for all."""
        if self.encoder == "bert4rec":
            return self.attention_dropout is not False
        return self.dropout if self.encoder in ("llama", "gpt2") else bool(self.attention_dropout)

    @property
    def fused(self) -> bool:
        """Whether softmax attention runs in one kernel that keeps no S × S weights and computes them again for the
        backward pass: not with a bias that is learnt, and on a CPU not with dropout on the weights."""
        learnt = "position" in self.bias or "time" in self.bias
        return self.encoder in TRANSFORMERS and not learnt and not (self.device == "cpu" and self.drops_attention)
