"""SASRec: causal self-attention over a history of items, as published, as its authors' code has it, and as others
have improved it: each departure is a flag of `SASRecConfig`.

Sources: Kang and McAuley, "Self-Attentive Sequential Recommendation" (2018), arXiv 1808.09781, whose equations are
named where they stand; LiGR blocks, arXiv 2502.03417, which eSASRec (arXiv 2508.06450) is made of; HSTU's relative
bias and Llama's residual, arXiv 2412.00714. Knows neither item tables nor losses, users or splits.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers import initialization as init

from llmrec.backbones.attention_cache import AttentionCache, KeysAndValues
from llmrec.backbones.encoder import SequenceEncoder, check_length, places_of
from llmrec.backbones.reasoning_branches import AttentionBranches, Sight
from llmrec.backbones.relative_bias import Relations, RelativeBias
from llmrec.backbones.transformer_block import Block, BlockShape, Surroundings, causal_mask
from llmrec.exceptions import BackboneError

RESIDUALS = ("sasrec", "llama")


class SASRecConfig(PreTrainedConfig):
    """Sizes of a SASRec, and its departures from the paper, which the defaults are.

    Attributes:
        hidden_size: D.
        num_hidden_layers: blocks of self-attention and feed-forward network.
        num_attention_heads: H, of width D / H each.
        max_position_embeddings: the longest history, in items.
        intermediate_size: width of the feed-forward network. None: D with "relu", as in the paper; 4 D with "gelu";
            8/3 D with "swiglu", rounded up to a multiple of 8, so that its three matrices weigh as much as two of 4 D.
        norm: where a block normalises: "pre", the paper's x + g(norm(x)); "authors", as their code does: attention
            asks with norm(x), reads x itself, and what a block adds is added to norm(x); "post", norm(x + g(x)).
        residual: "sasrec": LayerNorm, biases in the feed-forward network, no matrix behind the heads; "llama":
            RMSNorm, a matrix behind the heads, and no biases, with norm "pre".
        feed_forward: "relu", "gelu" or "swiglu"; None: "relu" with residual "sasrec", "swiglu" with "llama".
        output_projection: whether a matrix stands behind the heads; None: as `residual` says.
        gate: whether what a block adds is multiplied by sigmoid(W x + b) of its input x (LiGR, eSASRec).
        relative_bias: "none", or what `llmrec.backbones.relative_bias.RelativeBias` knows: "position", "time",
            "position+time", "rope", "rope+time".
        num_time_buckets: of the time bias.
        position_embeddings: whether learnt positions are added to the input (equation 1).
        dropout: on the embedded history and on what every block adds.
        attention_dropout: on the attention's weights; the authors' code has `dropout` there too.
        feed_forward_dropout: inside the feed-forward network; likewise.
        layer_norm_eps: of the norms.
        initializer_range: the standard deviation of new positions and relative biases.
    """

    model_type = "sasrec"

    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 1
    max_position_embeddings: int = 50
    intermediate_size: int | None = None
    norm: str = "pre"
    residual: str = "sasrec"
    feed_forward: str | None = None
    output_projection: bool | None = None
    gate: bool = False
    relative_bias: str = "none"
    num_time_buckets: int = 128
    position_embeddings: bool = True
    dropout: float = 0.5
    attention_dropout: float = 0.0
    feed_forward_dropout: float = 0.0
    layer_norm_eps: float = 1e-8
    initializer_range: float = 0.02

    def block_shape(self) -> BlockShape:
        """What every block is made of; raises BackboneError for choices that do not go together."""
        if self.residual not in RESIDUALS:
            raise BackboneError(f"residual is {self.residual!r}. Choose one of {', '.join(RESIDUALS)}.")
        llama = self.residual == "llama"
        if llama and self.norm != "pre":
            raise BackboneError(
                f"norm is {self.norm!r} with residual 'llama', which normalises first. Say norm 'pre'."
            )
        kind = self.feed_forward or ("swiglu" if llama else "relu")
        usual = {"relu": self.hidden_size, "gelu": 4 * self.hidden_size}
        return BlockShape(
            width=self.hidden_size,
            heads=self.num_attention_heads,
            norm=self.norm,
            rms=llama,
            eps=self.layer_norm_eps,
            feed_forward=kind,
            inner_width=self.intermediate_size or usual.get(kind, 8 * math.ceil(self.hidden_size / 3)),
            attention_bias=False,
            feed_forward_bias=not llama,
            output_projection=llama if self.output_projection is None else self.output_projection,
            gate=self.gate,
            relative_bias=self.relative_bias,
            max_length=self.max_position_embeddings,
            num_time_buckets=self.num_time_buckets,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            feed_forward_dropout=self.feed_forward_dropout,
        )


class SASRecModel(SequenceEncoder):
    """Item representations -> hidden states by blocks of causal self-attention.

    With the default flags blocks are pre-norm, as the paper writes them, with a last norm behind them. One departure
    from the paper: positions count from the oldest item that is there, not from the end of a window of fixed length,
    so that a later item changes no earlier hidden state and a history may be padded on either side.
    """

    config_class = SASRecConfig
    base_model_prefix = "sasrec"
    _supports_sdpa = True

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__(config)
        shape = config.block_shape()
        self.positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.position_embeddings else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(config.num_hidden_layers))
        # A block of the post-norm kind ends with one.
        self.norm = nn.Identity() if config.norm == "post" else shape.make_norm()
        self.post_init()

    def forward(
        self,
        representations: Tensor,
        mask: Tensor | None = None,
        timestamps: Tensor | None = None,
        actions: Tensor | None = None,
        domains: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> Tensor:
        """The state after every item of a history, which knows that item and those before it.

        Representations are multiplied by √D before the positions are added, as the authors' code does, so that a table
        of small values is not drowned by them. Timestamps matter to the relative time bias alone, actions and domains
        not at all. The rest as in `SequenceEncoder.forward`.
        """
        return self._read(representations, mask, timestamps, next_timestamps)[0]

    def prefill(
        self,
        representations: Tensor,
        mask: Tensor | None = None,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> tuple[Tensor, AttentionCache]:
        """`forward`, and what `extend` needs to go on from there."""
        hidden, layers = self._read(representations, mask, timestamps, next_timestamps)
        if mask is None:
            mask = torch.ones(representations.shape[:2], dtype=torch.bool, device=representations.device)
        return hidden, AttentionCache(layers, mask.bool(), timestamps)

    def extend(
        self,
        cache: AttentionCache,
        representations: Tensor,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
        isolated: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, AttentionCache]:
        """The states (B, m, D) of m more items behind each history, equal to those of `forward` on all of it.

        Args:
            cache: of `prefill` or of an earlier `extend`.
            representations: (B, m, D).
            timestamps: (B, m), as in `forward`.
            next_timestamps: (B, m), likewise.
            isolated: the m are rival continuations (M-FALCON, arXiv 2402.17152): each of them alone follows the
                history, and stands where the next item would.
            mask: (B, m), true where there is an item; None: everywhere.

        Returns:
            The states, zeros at padded places; and the cache with the m items, or the given one if isolated.

        Raises:
            BackboneError: if a history gets longer than `max_position_embeddings`.
        """
        if not representations.shape[1]:
            return representations, cache
        if mask is None:
            mask = torch.ones(representations.shape[:2], dtype=torch.bool, device=representations.device)
        mask = mask.bool()
        grown = cache.growth(self.config, mask, timestamps, isolated)
        times = None if grown.timestamps is None else grown.timestamps[:, -mask.shape[1] :]
        relations = self._relations(grown.places, times, next_timestamps, grown.key_places, grown.timestamps)
        around = Surroundings(grown.places, grown.allowed, relations)
        representations = representations.masked_fill(~mask[..., None], 0)
        hidden, layers = self._encode(representations, around, cache.layers)
        hidden = hidden.masked_fill(~mask[..., None], 0)
        return hidden, cache if isolated else AttentionCache(layers, grown.mask, grown.timestamps)

    def branches(
        self,
        places: Tensor,
        representations: Tensor,
        mask: Tensor,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> tuple[Tensor, AttentionBranches]:
        """See `SequenceEncoder.branches`."""
        states, cache = self.prefill(representations, mask, timestamps, next_timestamps)
        return states, AttentionBranches.begin(self._think, cache, cache.mask, places, timestamps, next_timestamps)

    def _think(
        self,
        cache: AttentionCache,
        thoughts: Tensor,
        sight: Sight,
        timestamps: Tensor | None,
        next_timestamps: Tensor | None,
    ) -> tuple[Tensor, AttentionCache]:
        """Thoughts (B, m, D) through the blocks: neither scaled nor given the positions of items."""
        grown = cache.thought(sight, timestamps)
        times = None if grown.timestamps is None else grown.timestamps[:, -sight.mask.shape[1] :]
        relations = self._relations(grown.places, times, next_timestamps, grown.key_places, grown.timestamps)
        hidden, layers = self._through(thoughts, Surroundings(grown.places, grown.allowed, relations), cache.layers)
        return hidden, AttentionCache(layers, grown.mask, grown.timestamps, grown.key_places)

    def _read(
        self,
        representations: Tensor,
        mask: Tensor | None,
        timestamps: Tensor | None,
        next_timestamps: Tensor | None,
    ) -> tuple[Tensor, tuple[KeysAndValues, ...]]:
        length = representations.shape[1]
        check_length(self.config, length, mask)
        if mask is not None:
            mask = mask.bool()
            # Not even a NaN that stands at a padded place gets out: a weight of 0 would not stop it.
            representations = representations.masked_fill(~mask[..., None], 0)
        allowed = causal_mask(mask)
        if mask is not None and allowed is not None:
            places = places_of(mask)
        else:
            # Padding behind the items may stand beyond the last position there is.
            places = torch.arange(length, device=representations.device)
            places = places.clamp_max(self.config.max_position_embeddings - 1)[None]
        around = Surroundings(places, allowed, self._relations(places, timestamps, next_timestamps))
        hidden, layers = self._encode(representations, around, (None,) * len(self.blocks))
        return hidden if mask is None else hidden.masked_fill(~mask[..., None], 0), layers

    def _relations(self, places: Tensor, *others: Tensor | None) -> Relations:
        """What all blocks' biases are made of; arguments of `RelativeBias.relations`."""
        if not len(self.blocks):
            return Relations(None, None)
        first = cast("Block", self.blocks[0])
        return first.attention.relative.relations(places, *others)

    def _encode(
        self, representations: Tensor, around: Surroundings, past: tuple[KeysAndValues | None, ...]
    ) -> tuple[Tensor, tuple[KeysAndValues, ...]]:
        x = representations * math.sqrt(self.config.hidden_size)
        if self.positions is not None:
            x = x + self.positions(around.places)  # equation 1
        return self._through(x, around, past)

    def _through(
        self, x: Tensor, around: Surroundings, past: tuple[KeysAndValues | None, ...]
    ) -> tuple[Tensor, tuple[KeysAndValues, ...]]:
        """What enters the first block (B, Sq, D) through all of them."""
        x = self.dropout(x)
        layers = []
        for block, before in zip(self.blocks, past, strict=True):  # equation 5
            x, kept = block(x, around, before)
            layers.append(kept)
        return self.norm(x), tuple(layers)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_normal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RelativeBias):
            for table in module.parameters():
                init.normal_(table, std=self.config.initializer_range)
        else:
            super()._init_weights(module)


def register() -> None:
    """Makes AutoConfig and AutoModel know SASRec; may be called again."""
    AutoConfig.register(SASRecConfig.model_type, SASRecConfig, exist_ok=True)
    AutoModel.register(SASRecConfig, SASRecModel, exist_ok=True)
