"""HSTU: pointwise attention without softmax, gated, over a history of items and what was done with them when.

Source: Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
Recommendations" (2024), arXiv 2402.17152; its equations are named where they stand. What it leaves open is done as the
authors' published research code does it; the flags of `HSTUConfig` take the ablations of arXiv 2412.00714.
"""

import math
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from llmrec.backbones.encoder import UNKNOWN_TIME, SequenceEncoder, check_length, places_of
from llmrec.backbones.hstu_cache import Attend, Continuation, HSTUCache
from llmrec.backbones.jagged import offsets_of, places_in, with_padding, without_padding
from llmrec.backbones.reasoning_branches import AttentionBranches, Sight
from llmrec.backbones.relative_bias import RelativeBias, query_times, turned
from llmrec.exceptions import BackboneError
from llmrec.kernels.hstu_attention import hstu_attention

Score = Literal["silu", "softmax"]
Normaliser = Literal["max_length", "length"]
Residual = Literal["hstu", "llama", "sasrec", "post"]
# The keys (T, H, qk_dim) and values (T, H, v_dim) of every layer.
Kept = list[tuple[Tensor, Tensor]]


class HSTUConfig(PreTrainedConfig):
    """Sizes and parts of an HSTU; every ablation is one flag.

    Attributes:
        hidden_size: D.
        num_hidden_layers: layers, each of one attention and no feed-forward network.
        num_attention_heads: H.
        qk_dim: width of a head's queries and keys.
        v_dim: width of a head's values and gates.
        max_position_embeddings: the longest history, in places.
        dropout: on the embedded input and on what enters each layer's last matrix.
        relative_bias: "none" | "position" | "time" | "position+time" (HSTU) | "rope" | "rope+time".
        num_time_buckets: the greatest bucket of elapsed time.
        score: "silu": silu(qkᵀ + rab) / n (HSTU); "softmax": softmax(qkᵀ / √qk_dim + rab).
        gate: whether U multiplies what attention read; without, U is not there at all.
        concat_ua: whether the last matrix reads [U, Y, U ⊙ Y] and not U ⊙ Y alone.
        normalize_by: what n is. "max_length": max_position_embeddings (HSTU); "length": the number of keys that the
            query sees, its place + 1. Neither depends on padding or later items. Softmax knows no n.
        residual: what a layer f does to x. "hstu": x + f(LN(x)), LN without weights, nothing behind the last layer.
            "llama": x + f(RMSNorm(x)), norms with weights, a last RMSNorm. "sasrec": LN(x) + f(LN(x)), LN with
            weights, a last LayerNorm; as in SASRec's code the residual passes the norm. "post": LN(x + f(x)), LN with
            weights, the first Transformer's.
        position_embeddings: whether learnt vectors of absolute places are added to the input.
        layer_norm_eps: of all normalisations.
        initializer_range: the standard deviation of new U, V, Q, K projections and relative biases.
    """

    model_type = "hstu"

    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 1
    qk_dim: int = 64
    v_dim: int = 64
    max_position_embeddings: int = 200
    dropout: float = 0.2
    relative_bias: str = "position+time"
    num_time_buckets: int = 128
    score: str = "silu"
    gate: bool = True
    concat_ua: bool = False
    normalize_by: str = "max_length"
    residual: str = "hstu"
    position_embeddings: bool = True
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02


class HSTULayer(GradientCheckpointingLayer):
    """One layer of HSTU. Knows nothing of batches: `attend` says who looks at whom."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.hidden_size, config.num_attention_heads
        values, queries = heads * config.v_dim, heads * config.qk_dim
        self.widths = (values if config.gate else 0, values, queries, queries)
        self.norm = _norm(config)
        self.uvqk = nn.Linear(width, sum(self.widths), bias=False)
        self.bias = RelativeBias(config.relative_bias, config.max_position_embeddings, config.num_time_buckets)
        self.read_norm = nn.LayerNorm(values, eps=config.layer_norm_eps, elementwise_affine=False)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(3 * values if config.concat_ua else values, width)

    def forward(self, x: Tensor, places: Tensor, attend: Attend) -> Tensor:
        """x (…, D), places (…) -> (…, D)."""
        config = self.config
        entering = x if config.residual == "post" else self.norm(x)
        # Equation 1: U, V, Q, K = Split(φ₁(f₁(X))), φ₁ = SiLU.
        u, v, q, k = F.silu(self.uvqk(entering)).split(self.widths, dim=-1)
        v, q, k = (part.unflatten(-1, (config.num_attention_heads, -1)) for part in (v, q, k))
        if "rope" in config.relative_bias:
            q, k = turned(q, places[..., None]), turned(k, places[..., None])
        if config.score == "softmax":
            q = q / math.sqrt(config.qk_dim)
        # Equation 2: A(X) V(X) = φ₂(Q(X) K(X)ᵀ + rab) V(X); φ₂ = SiLU / n.
        read = self.read_norm(attend(q, k, v, self.bias).flatten(-2))
        # Equation 3: Y(X) = f₂(Norm(A(X) V(X)) ⊙ U(X)).
        if config.gate:
            read = torch.cat((u, read, u * read), dim=-1) if config.concat_ua else u * read
        y: Tensor = self.output(self.dropout(read))
        if config.residual == "post":
            return cast(Tensor, self.norm(x + y))
        return y + (entering if config.residual == "sasrec" else x)


class HSTUModel(SequenceEncoder):
    """Item representations -> hidden states by layers of equations 1-3.

    The input is multiplied by √D and learnt positions are added to it, as in the authors' code. Histories are read
    without padding, one after another, through `llmrec.kernels.hstu_attention`. A place's state depends on its
    `next_timestamps` (the relative bias counts from there) and on all places before it.
    """

    config_class = HSTUConfig
    base_model_prefix = "hstu"
    supports_gradient_checkpointing = True

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__(config)
        _check(config)
        if config.position_embeddings:
            self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_hidden_layers))
        self.norm = _norm(config) if config.residual in ("llama", "sasrec") else nn.Identity()
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
        """The state after every item of a history; see `SequenceEncoder.forward`. Actions and domains are not used."""
        return self._forward(representations, mask, timestamps, next_timestamps)

    def forward_jagged(
        self,
        representations: Tensor,
        offsets: Tensor,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> Tensor:
        """`forward` of histories that lie one after another, without padding.

        Args:
            representations: (T, D).
            offsets: (B + 1,) int64, ascending from 0 to T: history b is offsets[b]:offsets[b + 1]. None may hold more
                than `max_position_embeddings` items.
            timestamps: (T,) or None, as in `forward`.
            next_timestamps: (T,) or None.

        Returns:
            (T, D).
        """
        limit = self.config.max_position_embeddings
        if len(representations) > limit and (longest := int(offsets.diff().max())) > limit:
            raise BackboneError(
                f"A history holds {longest} items, and this hstu has positions for {limit}. Keep its last {limit}."
            )
        return self._read(representations, offsets, timestamps, next_timestamps)

    def _forward(
        self,
        representations: Tensor,
        mask: Tensor | None,
        timestamps: Tensor | None,
        next_timestamps: Tensor | None,
        kept: Kept | None = None,
    ) -> Tensor:
        """`forward`; `kept` gets the keys and values (T, H, …) of every layer."""
        batch, length, _ = representations.shape
        check_length(self.config, length, mask)
        if mask is None:
            offsets = length * torch.arange(batch + 1, device=representations.device)
        else:
            mask = mask.bool()
            offsets = offsets_of(mask)
        tokens = without_padding(representations, mask)
        times = [None if time is None else without_padding(time, mask) for time in (timestamps, next_timestamps)]
        states = self._read(tokens, offsets, times[0], times[1], kept)
        return states.unflatten(0, (batch, length)) if mask is None else with_padding(states, mask)

    def _read(
        self,
        representations: Tensor,
        offsets: Tensor,
        timestamps: Tensor | None,
        next_timestamps: Tensor | None,
        kept: Kept | None = None,
    ) -> Tensor:
        """`forward_jagged` of histories that are known to be short enough."""
        places = places_in(offsets, len(representations))
        asked = query_times(timestamps, next_timestamps)

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias) -> Tensor:
            if kept is not None:
                kept.append((k, v))
            return hstu_attention(
                q,
                k,
                v,
                offsets,
                self.config.max_position_embeddings,
                position_bias=None if bias.position is None else bias.position[0],
                time_bias=None if bias.time is None else bias.time[0],
                timestamps=timestamps,
                query_timestamps=asked,
                normalize_by=self.config.normalize_by,
                score=self.config.score,
            )

        x = self._embedded(representations, places)
        for layer in self.layers:
            x = layer(x, places, attend)
        states: Tensor = self.norm(x)
        return states

    def prefill(
        self,
        representations: Tensor,
        mask: Tensor | None = None,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> tuple[Tensor, HSTUCache]:
        """`forward`, and what `extend` needs to go on from there. Arguments and states as of `forward`."""
        kept: Kept = []
        states = self._forward(representations, mask, timestamps, next_timestamps, kept)
        if mask is None:
            mask = representations.new_ones(representations.shape[:2], dtype=torch.bool)
        if timestamps is None:
            timestamps = torch.full_like(mask, UNKNOWN_TIME, dtype=torch.int64)
        mask = mask.bool()
        keys, values = (tuple(with_padding(tokens, mask) for tokens in layers) for layers in zip(*kept, strict=True))
        return states, HSTUCache(keys, values, places_of(mask), mask, timestamps)

    def extend(
        self,
        cache: HSTUCache,
        representations: Tensor,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
        isolated: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, HSTUCache]:
        """States of m more items behind histories that were read already, without reading them again.

        What was read with some `next_timestamps` stays as it was: the last cached place knows the next time that it
        was read with, not `timestamps` given here.

        Args:
            cache: of `prefill` or `extend`. Its batch of 1 serves only a batch of 1: give many candidates along m.
            representations: (B, m, D).
            timestamps: (B, m), None: all unknown; `mask` and `next_timestamps` (B, m) likewise as in `forward`.
            isolated: false: the m items follow one another, after the history. True (M-FALCON, section 3.4): each of
                them alone follows the history: it sees the history and itself and stands where the next item would.

        Returns:
            (B, m, D), zeros at padded places: what `forward` gives for the whole history with these items behind
            (isolated: with each of them alone behind); and the cache of the longer histories (isolated: `cache`).

        Raises:
            BackboneError: if the histories get longer than `max_position_embeddings`.
        """
        batch, count, _ = representations.shape
        mask = representations.new_ones(batch, count, dtype=torch.bool) if mask is None else mask.bool()
        added = mask.any(dim=1).long() if isolated else mask.sum(dim=1)
        limit = self.config.max_position_embeddings
        width = cache.mask.shape[1] + (1 if isolated else count)
        if width > limit and (longest := int((cache.lengths + added).max())) > limit:
            raise BackboneError(
                f"A history would hold {longest} items, and this hstu has positions for {limit}. "
                f"Prefill fewer, so that all together are {limit} at most."
            )
        steps = torch.zeros_like(mask, dtype=torch.int64) if isolated else places_of(mask)
        places = (cache.lengths[:, None] + steps).masked_fill(~mask, 0)
        if timestamps is None:
            timestamps = torch.full_like(places, UNKNOWN_TIME)
        behind = Continuation(
            cache,
            places,
            mask,
            timestamps,
            next_timestamps,
            isolated,
            normaliser=limit if self.config.normalize_by == "max_length" else (places + 1)[:, None, :, None],
            softmax=self.config.score == "softmax",
            bias=cast(HSTULayer, self.layers[0]).bias,
        )
        x = self._embedded(representations.masked_fill(~mask[..., None], 0), places)
        for number, layer in enumerate(self.layers):
            x = layer(x, places, behind.layer(number))
        states = self.norm(x).masked_fill(~mask[..., None], 0)
        return states, cache if isolated else behind.grown()

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
        return states, AttentionBranches.begin(
            self._think, cache, cache.mask, places, cache.timestamps, next_timestamps
        )

    def _think(
        self,
        cache: HSTUCache,
        thoughts: Tensor,
        sight: Sight,
        timestamps: Tensor | None,
        next_timestamps: Tensor | None,
    ) -> tuple[Tensor, HSTUCache]:
        """Thoughts (B, m, D) through the layers: neither scaled nor given the positions of items.

        Where attention is divided by the length, that is the number of keys that a thought sees.
        """
        places, allowed = sight.places, sight.allowed
        if timestamps is None:
            timestamps = torch.full_like(places, UNKNOWN_TIME)
        by_limit = self.config.normalize_by == "max_length"
        behind = Continuation(
            cache,
            places,
            sight.mask,
            timestamps,
            next_timestamps,
            isolated=False,
            normaliser=self.config.max_position_embeddings if by_limit else allowed.sum(dim=-1, keepdim=True),
            softmax=self.config.score == "softmax",
            bias=cast(HSTULayer, self.layers[0]).bias,
            looks=allowed,
        )
        x = self.dropout(thoughts)
        for number, layer in enumerate(self.layers):
            x = layer(x, places, behind.layer(number))
        return self.norm(x), behind.grown()

    def _embedded(self, representations: Tensor, places: Tensor) -> Tensor:
        """(…, D), (…) -> (…, D): what enters the first layer."""
        x = representations * math.sqrt(self.config.hidden_size)
        if self.config.position_embeddings:
            x = x + self.positions(places)
        embedded: Tensor = self.dropout(x)
        return embedded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RelativeBias):
            module.reset_parameters(self.config.initializer_range)
        elif isinstance(module, nn.Embedding):
            init.trunc_normal_(module.weight, std=self.config.hidden_size**-0.5)
        elif isinstance(module, nn.Linear) and module.bias is not None:  # f₂ of equation 3
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


def register() -> None:
    """Makes AutoConfig and AutoModel know HSTU; may be called again."""
    AutoConfig.register(HSTUConfig.model_type, HSTUConfig, exist_ok=True)
    AutoModel.register(HSTUConfig, HSTUModel, exist_ok=True)


def _norm(config: HSTUConfig) -> nn.Module:
    """The normalisation of a residual style."""
    if config.residual == "llama":
        return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
    affine = config.residual != "hstu"
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=affine)


def _check(config: HSTUConfig) -> None:
    """Raises BackboneError for a configuration that no model has."""
    for name, legal in (
        ("score", get_args(Score)),
        ("normalize_by", get_args(Normaliser)),
        ("residual", get_args(Residual)),
    ):
        if getattr(config, name) not in legal:
            raise BackboneError(f"{name} is {getattr(config, name)!r}. Choose one of {', '.join(legal)}.")
    if config.concat_ua and not config.gate:
        raise BackboneError("concat_ua needs U, which gate=False leaves out. Set one of them the other way.")
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "qk_dim",
        "v_dim",
        "max_position_embeddings",
    ):
        if getattr(config, name) < 1:
            raise BackboneError(f"{name} is {getattr(config, name)}. Use a positive number.")
    if "rope" in config.relative_bias and config.qk_dim % 2:
        raise BackboneError(f"RoPE turns pairs of numbers, and qk_dim is {config.qk_dim}. Choose an even one.")
