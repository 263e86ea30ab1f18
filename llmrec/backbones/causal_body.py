"""CausalBody: the layers of a causal language model, Llama or GPT-2, over item vectors in place of token embeddings.

The bodies are transformers'; here are what goes in, who sees whom, and what comes out. arXiv 2412.00714 compares both
with HSTU and SASRec; a pretrained body gives what a language model learnt from text to items that text describes.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedConfig
from transformers import initialization as init

from llmrec.backbones.attention_cache import AttentionCache, KeysAndValues
from llmrec.backbones.encoder import SequenceEncoder, check_length, places_of
from llmrec.backbones.hub import one_line, require_file
from llmrec.backbones.reasoning_branches import AttentionBranches, Sight
from llmrec.backbones.transformer_block import causal_mask
from llmrec.exceptions import BackboneError

BODIES = ("llama", "gpt2")


class CausalBodyConfig(PreTrainedConfig):
    """Sizes of a body, or the config of the checkpoint that it is from.

    Attributes:
        body: "llama" or "gpt2".
        hidden_size: D, of representations and hidden states.
        body_hidden_size: width of the layers; None: D. If it is not D, a matrix stands before and behind them.
        intermediate_size: width of the MLPs; None: with "gpt2" four times the layers' width, with "llama" 8/3 of it,
            rounded up to a multiple of 8, so that both have as many weights.
        num_hidden_layers: layers.
        num_attention_heads: H.
        num_key_value_heads: of "llama"; None: H.
        max_position_embeddings: the longest history, in items.
        dropout: where the body has it: in attention and on the embedded history; with "gpt2" on what layers add too.
        initializer_range: the standard deviation of new weights.
        body_config: the whole config of a checkpoint's body, from which the layers' sizes are then taken.
    """

    model_type = "causal_body"

    body: str = "llama"
    hidden_size: int = 64
    body_hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 50
    dropout: float = 0.1
    initializer_range: float = 0.02
    body_config: dict[str, Any] | None = None

    @classmethod
    def of_checkpoint(cls, checkpoint: str, revision: str | None = None, **sizes: Any) -> "CausalBodyConfig":
        """The config of an encoder around a checkpoint's body, whose weights `CausalBodyModel.load_body` loads.

        Args:
            checkpoint: Hub id or folder of a Llama or GPT-2.
            revision: branch, tag or commit on the Hub.
            sizes: this config's own: hidden_size (default: the body's width), max_position_embeddings (default: the
                body's), dropout.

        Raises:
            BackboneError: if there is no such checkpoint, or it is of another type.
        """
        require_file(checkpoint, revision, "config.json")
        try:
            found = AutoConfig.from_pretrained(checkpoint, revision=revision)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BackboneError(
                f"The config of {checkpoint!r} is of no model type that this transformers knows: {one_line(error)}. "
                "Choose a Llama or a GPT-2."
            ) from error
        if found.model_type not in BODIES:
            raise BackboneError(
                f"{checkpoint!r} is of type {found.model_type!r}, and bodies are {' or '.join(BODIES)}. "
                "Choose a checkpoint of one of these."
            )
        width = found.hidden_size
        return cls(
            **{
                "body": found.model_type,
                "hidden_size": width,
                "body_hidden_size": width,
                "num_hidden_layers": found.num_hidden_layers,
                "num_attention_heads": found.num_attention_heads,
                "max_position_embeddings": found.max_position_embeddings,
                "body_config": found.to_dict(),
                **sizes,
            }
        )

    def make_body_config(self) -> Any:
        """The body's own config; raises BackboneError for sizes or types that cannot be."""
        if self.body not in BODIES:
            raise BackboneError(f"body is {self.body!r}. Choose one of {', '.join(BODIES)}.")
        # The table of token embeddings is dropped: one row costs nothing until then.
        nothing: dict[str, Any] = {"vocab_size": 1, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))}
        if self.body_config is not None:
            found = AutoConfig.for_model(**{"model_type": self.body, **self.body_config, **nothing})
            # Positions of GPT-2 are learnt: there are no more than the checkpoint has.
            if self.body == "gpt2" and found.max_position_embeddings < self.max_position_embeddings:
                raise BackboneError(
                    f"max_position_embeddings is {self.max_position_embeddings}, and the checkpoint's body has "
                    f"positions for {found.max_position_embeddings}. Ask for no more."
                )
            return found
        width, heads = self.body_hidden_size or self.hidden_size, self.num_attention_heads
        if heads < 1 or width % heads or (self.body == "llama" and width // heads % 2):
            raise BackboneError(
                f"A width of {width} cannot be shared by {heads} heads of a {self.body}. "
                "Choose sizes that divide; the heads of a llama have an even width."
            )
        shared = self.num_key_value_heads
        if shared is not None and (self.body != "llama" or shared < 1 or heads % shared):
            raise BackboneError(
                f"num_key_value_heads is {shared}, and a {self.body} has {heads} heads. "
                "Choose a number that divides them, for a llama; a gpt2 shares none."
            )
        sizes: dict[str, Any] = {
            **nothing,
            "hidden_size": width,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": heads,
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
        }
        if self.body == "llama":
            sizes |= {
                "intermediate_size": self.intermediate_size or 8 * math.ceil(width / 3),
                "num_key_value_heads": shared or heads,
                "head_dim": width // heads,
                "attention_dropout": self.dropout,
            }
        else:
            sizes |= {"n_inner": self.intermediate_size or 4 * width}
            sizes |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), self.dropout)
        return AutoConfig.for_model(self.body, **sizes)


class CausalBodyModel(SequenceEncoder):
    """Item representations -> hidden states by a language model's layers and last norm."""

    config_class = CausalBodyConfig
    base_model_prefix = "causal_body"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: CausalBodyConfig) -> None:
        super().__init__(config)
        inner = config.make_body_config()
        self.body = AutoModel.from_config(inner, attn_implementation=config._attn_implementation)
        self.body.set_input_embeddings(None)
        same = inner.hidden_size == config.hidden_size
        self.inward = nn.Identity() if same else nn.Linear(config.hidden_size, inner.hidden_size, bias=False)
        self.outward = nn.Identity() if same else nn.Linear(inner.hidden_size, config.hidden_size, bias=False)
        # GPT-2 has a dropout of its own behind its positions.
        self.dropout = nn.Dropout(config.dropout if config.body == "llama" else 0.0)
        self.post_init()

    def load_body(self, checkpoint: str, revision: str | None = None) -> None:
        """Puts a checkpoint's weights in place of the body's, all but the token embeddings.

        Raises:
            BackboneError: if they cannot be loaded, or are of other sizes.
        """
        require_file(checkpoint, revision, "config.json")
        try:
            found = AutoModel.from_pretrained(checkpoint, revision=revision, dtype=self.dtype)
            found.set_input_embeddings(None)
            self.body.load_state_dict(found.state_dict())
        except (OSError, ValueError, RuntimeError) as error:
            raise BackboneError(
                f"The weights of {checkpoint!r} are not those of this body: {one_line(error)}. "
                "Make the config with CausalBodyConfig.of_checkpoint of the same checkpoint."
            ) from error

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

        Times, actions and domains are not used. The rest as in `SequenceEncoder.forward`.
        """
        return self._read(representations, mask, None)

    def prefill(
        self,
        representations: Tensor,
        mask: Tensor | None = None,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> tuple[Tensor, AttentionCache]:
        """`forward`, and what `extend` needs to go on from there."""
        cache = DynamicCache()
        hidden = self._read(representations, mask, cache)
        if mask is None:
            mask = torch.ones(representations.shape[:2], dtype=torch.bool, device=representations.device)
        return hidden, AttentionCache(_kept(cache), mask.bool())

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
            timestamps: (B, m), not used.
            next_timestamps: (B, m), not used.
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
        grown = cache.growth(self.config, mask, isolated=isolated)
        # transformers' caches are changed by their users: this one is made for this call.
        scratch = DynamicCache(cache.layers)
        representations = representations.masked_fill(~mask[..., None], 0)
        hidden = self._encode(representations, grown.places, grown.allowed, scratch)
        hidden = hidden.masked_fill(~mask[..., None], 0)
        return hidden, cache if isolated else AttentionCache(_kept(scratch), grown.mask)

    def branches(
        self,
        places: Tensor,
        representations: Tensor,
        mask: Tensor,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> tuple[Tensor, AttentionBranches]:
        """See `SequenceEncoder.branches`. GPT-2 adds its own positions to thoughts as it does to items."""
        states, cache = self.prefill(representations, mask)
        return states, AttentionBranches.begin(self._think, cache, cache.mask, places, None, None)

    def _think(
        self,
        cache: AttentionCache,
        thoughts: Tensor,
        sight: Sight,
        timestamps: Tensor | None,
        next_timestamps: Tensor | None,
    ) -> tuple[Tensor, AttentionCache]:
        """Thoughts (B, m, D) through the body."""
        grown = cache.thought(sight)
        scratch = DynamicCache(cache.layers)  # changed by its users, and the branches before may be thought on again
        hidden = self._encode(thoughts, grown.places, grown.allowed, scratch)
        return hidden, AttentionCache(_kept(scratch), grown.mask, None, grown.key_places)

    def _read(self, representations: Tensor, mask: Tensor | None, cache: DynamicCache | None) -> Tensor:
        length = representations.shape[1]
        check_length(self.config, length, mask)
        if not representations.numel():
            return representations
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
        hidden = self._encode(representations, places, allowed, cache)
        return hidden if mask is None else hidden.masked_fill(~mask[..., None], 0)

    def _encode(
        self, representations: Tensor, places: Tensor, allowed: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        x = self.dropout(self.inward(representations))
        if allowed is not None:  # as numbers, which every implementation of attention adds
            allowed = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill(
                ~allowed, torch.finfo(x.dtype).min
            )
        states: Tensor = self.body(
            inputs_embeds=x,
            attention_mask=allowed,
            position_ids=places,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        hidden: Tensor = self.outward(states)
        return hidden

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_normal_(module.weight)
        else:
            super()._init_weights(module)


def _kept(cache: DynamicCache) -> tuple[KeysAndValues, ...]:
    """What a cache holds: every layer's, or nothing of no columns."""
    return tuple(KeysAndValues(layer.keys, layer.values) for layer in cache.layers)


def register() -> None:
    """Makes AutoConfig and AutoModel know CausalBody; may be called again."""
    AutoConfig.register(CausalBodyConfig.model_type, CausalBodyConfig, exist_ok=True)
    AutoModel.register(CausalBodyConfig, CausalBodyModel, exist_ok=True)
