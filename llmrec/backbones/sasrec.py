"""SASRec: causal self-attention over a history of items, an item table, and the softmax over all items.

Source: Kang and McAuley, "Self-Attentive Sequential Recommendation" (2018), arXiv 1808.09781; its equations are named
where they stand. Knows nothing of users, splits or files of interactions.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from llmrec.exceptions import BackboneError

# Scores that the loss holds at once, 16 MB in float32: small enough for a CPU's cache, large enough for its matmul.
CHUNK_SCORES = 1 << 22


class SASRecConfig(PreTrainedConfig):
    """Sizes of a SASRec.

    Attributes:
        num_items: N, the rows of the item table.
        hidden_size: D.
        num_hidden_layers: blocks of self-attention and feed-forward network.
        num_attention_heads: H, of width D / H each.
        max_position_embeddings: the longest history, in items.
        dropout: on the embedded history and on what every block adds.
        layer_norm_eps: of the layer normalisations.
        initializer_range: the standard deviation of a new item table and of new positions.
    """

    model_type = "sasrec"

    num_items: int = 1
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 1
    max_position_embeddings: int = 50
    dropout: float = 0.5
    layer_norm_eps: float = 1e-8
    initializer_range: float = 0.02


class SelfAttention(nn.Module):
    """softmax(QKᵀ / √(D/H)) V (equations 2 and 3), heads side by side, without biases or an output projection."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        """x (B, S, D), allowed (B, 1, S, S) with True where a query may look, or None for causal -> (B, S, D)."""
        queries, keys, values = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, S, D / H)
            for layer in (self.query, self.key, self.value)
        )
        read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed, is_causal=allowed is None)
        return read.transpose(1, 2).flatten(-2)


class FeedForward(nn.Module):
    """ReLU(x W₁ + b₁) W₂ + b₂ at every place alike (equation 4); both matrices are D × D."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(config.hidden_size, config.hidden_size)
        self.outer = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        widened: Tensor = self.outer(F.relu(self.inner(x)))
        return widened


class Block(nn.Module):
    """x + dropout(g(LayerNorm(x))) for g = attention, then for g = the feed-forward network (section III-C)."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), allowed))
        added: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return added


class SASRecModel(PreTrainedModel):
    """Item representations -> hidden states, with an item table that also scores (the paper's shared embedding).

    Blocks are pre-norm, as the paper writes them, with a last LayerNorm behind them. The authors' code differs in two
    things: there the keys and values of a block are not normalised, and the residual is added to the normalised input.
    Two departures from the paper: positions count from the oldest item that is there, not from the end of a window of
    fixed length, so that a later item changes no earlier hidden state and a history may be padded on either side; and
    the item table is trained by the softmax over all items (`full_softmax_loss`) instead of by one negative.

    `represent`, `forward` and `score` are apart, so that other representations (of texts, say) can enter `forward`.
    """

    config_class = SASRecConfig
    base_model_prefix = "sasrec"
    main_input_name = "representations"
    _supports_sdpa = True

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__(config)
        if config.hidden_size % config.num_attention_heads:
            raise BackboneError(
                f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
                f"{config.num_attention_heads}. Choose sizes that divide."
            )
        self.items = nn.Embedding(config.num_items, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def represent(self, items: Tensor) -> Tensor:
        """Item rows (B, S) -> their rows of the table (B, S, D). What stands at padded places is never used."""
        rows: Tensor = self.items(items)
        return rows

    def forward(
        self,
        representations: Tensor,
        mask: Tensor | None = None,
        timestamps: Tensor | None = None,
        actions: Tensor | None = None,
        domains: Tensor | None = None,
    ) -> Tensor:
        """The state after every item of a history, which knows that item and those before it.

        Args:
            representations: (B, S, D), oldest first; multiplied by √D before the positions are added, as the authors'
                code does, so that a table of small values is not drowned by them.
            mask: (B, S), true where there is an item; padding may stand on the left or on the right. None: no padding.
            timestamps: (B, S), not used by SASRec; here for the sake of one interface of all sequence encoders.
            actions: (B, S), not used.
            domains: (B, S), not used.

        Returns:
            (B, S, D), zeros at padded places.

        Raises:
            BackboneError: if a history has more items than `max_position_embeddings`.
        """
        length = representations.shape[1]
        limit = self.config.max_position_embeddings
        if length > limit and (longest := length if mask is None else int(mask.sum(dim=1).max())) > limit:
            raise BackboneError(
                f"A history holds {longest} items, and this SASRec has positions for {limit}. Keep its last {limit}."
            )
        allowed = None
        if mask is None:
            places = torch.arange(length, device=representations.device).expand(representations.shape[:2])
        else:
            mask = mask.bool()
            places = (mask.cumsum(dim=1) - 1).clamp_min(0)
            past = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
            # Padding looks at itself: a query that may look nowhere has no softmax.
            alone = torch.eye(length, dtype=torch.bool, device=mask.device)
            allowed = ((past & mask[:, None, :]) | alone)[:, None]  # (B, 1, S, S)
            # Not even a NaN that stands at a padded place gets out: a weight of 0 would not stop it.
            representations = representations.masked_fill(~mask[..., None], 0)
        x = representations * math.sqrt(self.config.hidden_size) + self.positions(places)  # equation 1
        x = self.dropout(x)
        for block in self.blocks:  # equation 5
            x = block(x, allowed)
        x = self.norm(x)
        states: Tensor = x if mask is None else x.masked_fill(~mask[..., None], 0)
        return states

    def score(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…, N), the product with every row of the item table (equation 6, with the shared table)."""
        scores: Tensor = hidden @ self.items.weight.T
        return scores

    def get_input_embeddings(self) -> nn.Embedding:
        """The item table."""
        return self.items

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the item table."""
        self.items = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_normal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


def register() -> None:
    """Makes AutoConfig and AutoModel know SASRec; may be called again."""
    AutoConfig.register(SASRecConfig.model_type, SASRecConfig, exist_ok=True)
    AutoModel.register(SASRecConfig, SASRecModel, exist_ok=True)


def full_softmax_loss(hidden: Tensor, targets: Tensor, table: Tensor, chunk_scores: int = CHUNK_SCORES) -> Tensor:
    """The mean over tokens of -log softmax(hidden · tableᵀ)[target], without ever holding all T × N scores.

    Equal to `F.cross_entropy(hidden @ table.T, targets)` in value and gradient. Gradients are made in the forward
    pass, chunk by chunk, so nothing is computed twice; they cannot be differentiated again. Sums are kept in float32
    at least.

    Args:
        hidden: (T, D).
        targets: (T,) rows of the table.
        table: (N, D).
        chunk_scores: how many scores are held at once; at least one token's N.

    Raises:
        BackboneError: if there is no token, or `chunk_scores` is not positive.
    """
    if not len(targets) or chunk_scores < 1:
        raise BackboneError(
            f"A loss over {len(targets)} tokens with {chunk_scores} scores at once has no value. "
            "Give at least one of each."
        )
    loss: Tensor = _FullSoftmax.apply(hidden, targets, table, max(1, chunk_scores // len(table)))
    return loss


class _FullSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, table: Tensor, chunk: int) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=exact)
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for_table = torch.zeros_like(table, dtype=exact) if ctx.needs_input_grad[2] else None
        for states, wanted, slot in zip(
            hidden.split(chunk), targets.split(chunk), range(0, len(targets), chunk), strict=True
        ):
            scores = (states @ table.T).to(exact)  # (chunk, N)
            norms = scores.logsumexp(dim=1, keepdim=True)
            total += (norms - scores.gather(1, wanted[:, None])).sum()
            if for_hidden is None and for_table is None:
                continue
            # The gradient of a token's loss with respect to its scores: softmax - onehot(target).
            slopes = scores.sub_(norms).exp_()
            slopes.scatter_add_(1, wanted[:, None], slopes.new_full((len(wanted), 1), -1))
            slopes = slopes.to(table.dtype) / len(targets)
            if for_hidden is not None:
                for_hidden[slot : slot + len(wanted)] = slopes @ table
            if for_table is not None:
                for_table += slopes.T @ states
        ctx.save_for_backward(for_hidden, None if for_table is None else for_table.to(table.dtype))
        return total / len(targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        for_hidden, for_table = ctx.saved_tensors
        return (
            None if for_hidden is None else for_hidden * slope.to(for_hidden.dtype),
            None,
            None if for_table is None else for_table * slope.to(for_table.dtype),
            None,
        )
