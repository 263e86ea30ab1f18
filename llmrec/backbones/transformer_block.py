"""Blocks of self-attention and feed-forward networks, with the choices that SASRec, its descendants and BERT4Rec make.

Shapes: B histories, S places in them, Sq of which ask and Sk of which answer, H heads, D width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.backbones.attention_cache import KeysAndValues
from llmrec.backbones.relative_bias import Relations, RelativeBias, rotate
from llmrec.exceptions import BackboneError

NORMS = ("pre", "authors", "post")
FEED_FORWARDS = ("relu", "gelu", "swiglu")


class Surroundings(NamedTuple):
    """Where queries stand, which keys they may look at, and how the two stand to each other: alike for all blocks.

    Attributes:
        places: (B or 1, Sq) of the queries, counted from each history's oldest item.
        allowed: (B or 1, 1, Sq, Sk), true where a query may look; None: at its own place and all before it.
        relations: what relative biases are made of.
    """

    places: Tensor
    allowed: Tensor | None
    relations: Relations


@dataclass(frozen=True)
class BlockShape:
    """What a block is made of.

    Attributes:
        width: D.
        heads: H, which share D.
        norm: "pre": x + g(norm(x)); "authors": as the code of SASRec's authors: attention asks with norm(x), reads x
            itself, and is added to norm(x), as the feed-forward network is; "post": norm(x + g(x)).
        rms: RMSNorm in place of LayerNorm.
        eps: of the norms.
        feed_forward: "relu", "gelu": outer(act(inner(x))); "swiglu": outer(silu(inner(x)) * beside(x)).
        inner_width: of the feed-forward network.
        attention_bias: biases in the attention's matrices.
        feed_forward_bias: biases in the feed-forward network's.
        output_projection: a matrix behind the heads.
        gate: what attention and feed-forward network add is multiplied by sigmoid(W x + b) of the block's unnormalised
            input (LiGR, arXiv 2502.03417).
        relative_bias: a kind of `RelativeBias`, of the block's own.
        max_length: the longest history.
        num_time_buckets: of the time bias.
        dropout: on what attention and feed-forward network add.
        attention_dropout: on the attention's weights.
        feed_forward_dropout: inside the feed-forward network.
    """

    width: int
    heads: int
    norm: str
    rms: bool
    eps: float
    feed_forward: str
    inner_width: int
    attention_bias: bool
    feed_forward_bias: bool
    output_projection: bool
    gate: bool
    relative_bias: str
    max_length: int
    num_time_buckets: int
    dropout: float
    attention_dropout: float
    feed_forward_dropout: float

    def __post_init__(self) -> None:
        """Raises BackboneError for sizes or choices that no block has."""
        if self.heads < 1 or self.width % self.heads:
            raise BackboneError(
                f"hidden_size {self.width} is not a multiple of num_attention_heads {self.heads}. "
                "Choose sizes that divide."
            )
        for name, choices in (("norm", NORMS), ("feed_forward", FEED_FORWARDS)):
            if getattr(self, name) not in choices:
                raise BackboneError(f"{name} is {getattr(self, name)!r}. Choose one of {', '.join(choices)}.")

    def make_norm(self) -> nn.Module:
        """A new norm of the block's kind."""
        return (nn.RMSNorm if self.rms else nn.LayerNorm)(self.width, eps=self.eps)


class SelfAttention(nn.Module):
    """softmax(QKᵀ / √(D/H) + relative bias) V, heads side by side."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.dropout = shape.attention_dropout
        self.query, self.key, self.value = (
            nn.Linear(shape.width, shape.width, bias=shape.attention_bias) for _ in range(3)
        )
        self.output = (
            nn.Linear(shape.width, shape.width, bias=shape.attention_bias) if shape.output_projection else None
        )
        self.relative = RelativeBias(shape.relative_bias, shape.max_length, shape.num_time_buckets)
        self.rotates = "rope" in shape.relative_bias

    def forward(
        self, x: Tensor, memory: Tensor, around: Surroundings, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues]:
        """Queries of x (B, Sq, D), keys and values of memory (B, Sq, D) behind those of the past -> (B, Sq, D)."""
        queries, keys, values = (
            layer(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, Sq, D / H)
            for layer, states in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        if self.rotates:
            queries, keys = rotate(queries, keys, around.places)
        if past is not None:
            keys, values = torch.cat((past.keys, keys), dim=2), torch.cat((past.values, values), dim=2)
        allowed, bias = around.allowed, self.relative.of(around.relations)
        if bias is not None:
            if allowed is None:
                allowed = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=keys.device).tril()
            allowed = torch.where(allowed, bias.to(queries.dtype), -torch.inf)
        read = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=allowed is None,
        )
        states = read.transpose(1, 2).flatten(-2)
        return states if self.output is None else self.output(states), KeysAndValues(keys, values)


class FeedForward(nn.Module):
    """A network of one hidden layer at every place alike."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.kind = shape.feed_forward
        self.inner = nn.Linear(shape.width, shape.inner_width, bias=shape.feed_forward_bias)
        self.beside = (
            nn.Linear(shape.width, shape.inner_width, bias=shape.feed_forward_bias) if self.kind == "swiglu" else None
        )
        self.outer = nn.Linear(shape.inner_width, shape.width, bias=shape.feed_forward_bias)
        self.dropout = nn.Dropout(shape.feed_forward_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        inner = self.inner(x)
        if self.beside is not None:
            inner = F.silu(inner) * self.beside(x)
        else:
            inner = F.relu(inner) if self.kind == "relu" else F.gelu(inner)
        states: Tensor = self.outer(self.dropout(inner))
        return states


class Block(nn.Module):
    """Attention, then the feed-forward network, each with its norm, residual and gate (`BlockShape`)."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.norm = shape.norm
        self.attention_norm = shape.make_norm()
        self.attention = SelfAttention(shape)
        self.feed_forward_norm = shape.make_norm()
        self.feed_forward = FeedForward(shape)
        self.attention_gate, self.feed_forward_gate = (
            nn.Linear(shape.width, shape.width) if shape.gate else None for _ in range(2)
        )
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self, x: Tensor, around: Surroundings, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues]:
        """(B, Sq, D) -> (B, Sq, D), and the keys and values of the past and of x."""
        normed = x if self.norm == "post" else self.attention_norm(x)
        read, kept = self.attention(normed, x if self.norm == "authors" else normed, around, past)
        x = self._add(x, normed, read, self.attention_norm, self.attention_gate)
        normed = x if self.norm == "post" else self.feed_forward_norm(x)
        return self._add(x, normed, self.feed_forward(normed), self.feed_forward_norm, self.feed_forward_gate), kept

    def _add(self, x: Tensor, normed: Tensor, added: Tensor, norm: nn.Module, gate: nn.Linear | None) -> Tensor:
        """The residual connection around what made `added` from `normed`."""
        added = self.dropout(added)
        if gate is not None:
            added = added * torch.sigmoid(gate(x))
        states: Tensor = norm(x + added) if self.norm == "post" else (normed if self.norm == "authors" else x) + added
        return states


def causal_mask(mask: Tensor | None) -> Tensor | None:
    """Which places (B, 1, S, S) each place may look at: itself, and the items before it.

    None where order alone says it: without padding, or with all of it behind the items. Kernels for causal attention
    take no mask. Padding looks at itself in any case: a query that may look nowhere has no softmax.

    Args:
        mask: (B, S), true where there is an item; None: no padding.
    """
    if mask is None or bool((mask[:, :-1] | ~mask[:, 1:]).all()):
        return None
    past = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    alone = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return ((past & mask[:, None, :]) | alone)[:, None]
