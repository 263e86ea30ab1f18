"""BERT4Rec: self-attention in both directions, trained by hiding items and asking for them (cloze).

Source: Sun et al. (2019), arXiv 1904.06690; its equations are named where they stand.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers import initialization as init

from llmrec.backbones.encoder import SequenceEncoder, check_length, places_of
from llmrec.backbones.relative_bias import Relations
from llmrec.backbones.transformer_block import Block, BlockShape, Surroundings


class BERT4RecConfig(PreTrainedConfig):
    """Sizes of a BERT4Rec.

    Attributes:
        hidden_size: D.
        num_hidden_layers: blocks of self-attention and feed-forward network.
        num_attention_heads: H, of width D / H each.
        max_position_embeddings: the longest history, in items, hidden places included.
        intermediate_size: width of the feed-forward network; None: 4 D.
        dropout: on the embedded history and on what every block adds.
        attention_dropout: on the attention's weights.
        layer_norm_eps: of the layer normalisations.
        initializer_range: the standard deviation of new weights.
    """

    model_type = "bert4rec"

    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    max_position_embeddings: int = 50
    intermediate_size: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def block_shape(self) -> BlockShape:
        """What every block is made of; raises BackboneError for sizes that do not divide."""
        return BlockShape(
            width=self.hidden_size,
            heads=self.num_attention_heads,
            norm="post",
            rms=False,
            eps=self.layer_norm_eps,
            feed_forward="gelu",
            inner_width=self.intermediate_size or 4 * self.hidden_size,
            attention_bias=True,
            feed_forward_bias=True,
            output_projection=True,
            gate=False,
            relative_bias="none",
            max_length=self.max_position_embeddings,
            num_time_buckets=1,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            feed_forward_dropout=0.0,
        )


class BERT4RecModel(SequenceEncoder):
    """Item representations -> hidden states, each of which knows the whole history.

    Blocks are post-norm with GELU (section 3.3). As in the authors' code, which is BERT's, the embedded history is
    normalised before the first block, and so are the states behind the output layer. Two departures: positions count
    from the oldest item that is there, and the output layer has no bias per item, because an encoder knows none.
    """

    causal = False
    config_class = BERT4RecConfig
    base_model_prefix = "bert4rec"
    _supports_sdpa = True

    def __init__(self, config: BERT4RecConfig) -> None:
        super().__init__(config)
        shape = config.block_shape()
        self.hidden_item = nn.Parameter(torch.empty(config.hidden_size))
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embedding_norm = shape.make_norm()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(config.num_hidden_layers))
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = shape.make_norm()
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
        """The state of every place, of which those that `hide` hid say what was there.

        Times, actions and domains are not used. The rest as in `SequenceEncoder.forward`.
        """
        check_length(self.config, representations.shape[1], mask)
        if mask is None:
            mask = torch.ones(representations.shape[:2], dtype=torch.bool, device=representations.device)
        mask = mask.bool()
        places = places_of(mask)
        # Not even a NaN that stands at a padded place gets out: a weight of 0 would not stop it.
        representations = representations.masked_fill(~mask[..., None], 0)
        # Padding looks at itself: a query that may look nowhere has no softmax.
        alone = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        allowed = (mask[:, None, :] | alone)[:, None]  # (B, 1, S, S)
        around = Surroundings(places, allowed, Relations(None, None))
        x = self.dropout(self.embedding_norm(representations + self.positions(places)))  # equation 6
        for block in self.blocks:
            x, _ = block(x, around)
        x = self.norm(F.gelu(self.output(x)))  # equation 7, without the item table
        states: Tensor = x.masked_fill(~mask[..., None], 0)
        return states

    def hide(self, representations: Tensor, hidden: Tensor) -> Tensor:
        """Puts the learnt vector of a hidden item where `hidden` (B, S) is true."""
        return torch.where(hidden[..., None].bool(), self.hidden_item.to(representations.dtype), representations)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.normal_(self.hidden_item, std=self.config.initializer_range)


def register() -> None:
    """Makes AutoConfig and AutoModel know BERT4Rec; may be called again."""
    AutoConfig.register(BERT4RecConfig.model_type, BERT4RecConfig, exist_ok=True)
    AutoModel.register(BERT4RecConfig, BERT4RecModel, exist_ok=True)
