"""GRU4Rec: gated recurrent units over a history of items.

Source: Hidasi et al., "Session-based Recommendations with Recurrent Neural Networks" (2016), arXiv 1511.06939.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers import initialization as init

from llmrec.backbones.encoder import SequenceEncoder, check_length, places_of
from llmrec.backbones.reasoning_branches import RecurrentBranches


class GRU4RecConfig(PreTrainedConfig):
    """Sizes of a GRU4Rec.

    Attributes:
        hidden_size: D, of representations and hidden states.
        gru_size: width of the recurrent state; None: D. Of another width than D, a matrix stands behind the layers.
        num_hidden_layers: recurrent layers.
        max_position_embeddings: the longest history, in items. Nothing in the model depends on it.
        dropout: on the representations and on the states between layers.
    """

    model_type = "gru4rec"

    hidden_size: int = 64
    gru_size: int | None = None
    num_hidden_layers: int = 1
    max_position_embeddings: int = 50
    dropout: float = 0.5


@dataclass(frozen=True)
class GRU4RecCache:
    """All that a GRU4Rec keeps of histories that it has read; never changed, only followed by another.

    Attributes:
        states: (layers, B, gru_size) after each history's last item.
        lengths: (B,) the items read.
    """

    states: Tensor
    lengths: Tensor


class GRU4RecModel(SequenceEncoder):
    """Item representations -> hidden states by recurrent layers over the items alone, padding left out."""

    config_class = GRU4RecConfig
    base_model_prefix = "gru4rec"

    def __init__(self, config: GRU4RecConfig) -> None:
        super().__init__(config)
        width = config.gru_size or config.hidden_size
        layers = config.num_hidden_layers
        self.dropout = nn.Dropout(config.dropout)
        self.gru = nn.GRU(
            config.hidden_size, width, layers, batch_first=True, dropout=config.dropout if layers > 1 else 0.0
        )
        self.output = nn.Identity() if width == config.hidden_size else nn.Linear(width, config.hidden_size)
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
        """The state after every item of a history.

        Times, actions and domains are not used. The rest as in `SequenceEncoder.forward`.
        """
        return self._read(representations, mask)[0]

    def prefill(
        self,
        representations: Tensor,
        mask: Tensor | None = None,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> tuple[Tensor, GRU4RecCache]:
        """`forward`, and what `extend` needs to go on from there."""
        return self._read(representations, mask)

    def extend(
        self,
        cache: GRU4RecCache,
        representations: Tensor,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
        isolated: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, GRU4RecCache]:
        """The states (B, m, D) of m more items behind each history, equal to those of `forward` on all of it.

        Args:
            cache: of `prefill` or of an earlier `extend`.
            representations: (B, m, D).
            timestamps: (B, m), not used.
            next_timestamps: (B, m), not used.
            isolated: the m are rival continuations (M-FALCON, arXiv 2402.17152): each of them alone follows the
                history.
            mask: (B, m), true where there is an item; None: everywhere.

        Returns:
            The states, zeros at padded places; and the cache with the m items, or the given one if isolated.

        Raises:
            BackboneError: if a history gets longer than `max_position_embeddings`.
        """
        batch, added, _ = representations.shape
        if not added:
            return representations, cache
        if not isolated:
            return self._read(representations, mask, cache)
        states = cache.states.repeat_interleave(added, dim=1)
        each = GRU4RecCache(states, cache.lengths.repeat_interleave(added))
        alone = None if mask is None else mask.reshape(-1, 1)
        hidden, _ = self._read(representations.reshape(batch * added, 1, -1), alone, each)
        return hidden.view_as(representations), cache

    def branches(
        self,
        places: Tensor,
        representations: Tensor,
        mask: Tensor,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> tuple[Tensor, RecurrentBranches]:
        """See `SequenceEncoder.branches`. A thought enters the layers as an item does, from its place's own state."""
        mask = mask.bool()
        if len(mask):
            check_length(self.config, int(mask.sum(dim=1).max()), None)
        width = self.gru.hidden_size
        if not mask.numel():
            nothing = representations.new_zeros(self.gru.num_layers, places.numel(), width)
            return representations, RecurrentBranches(self._think, nothing)
        order = (~mask).long().argsort(dim=1, stable=True)[..., None]  # items to the left, in their order
        x = self.dropout(representations.masked_fill(~mask[..., None], 0)).gather(1, order.expand_as(representations))
        begin = x.new_zeros(1, len(mask), width)
        # Layer by layer, because a GRU of several tells the states of its last one alone.
        layers = []
        for number in range(self.gru.num_layers):
            weights: list[Tensor] = [weight for weight in self.gru.all_weights[number] if weight is not None]
            if number:
                x = F.dropout(x, self.gru.dropout, self.training)
            x = torch.gru(x, begin, weights, True, 1, 0.0, self.training, False, True)[0]
            layers.append(x)
        hidden = self.output(x)
        hidden = torch.zeros_like(hidden).scatter(1, order.expand_as(hidden), hidden).masked_fill(~mask[..., None], 0)
        numbers = places_of(mask).gather(1, places)[..., None].expand(-1, -1, width)
        states = torch.stack([layer.gather(1, numbers).flatten(0, 1) for layer in layers])
        return hidden, RecurrentBranches(self._think, states)

    def _think(self, thoughts: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """(R, 1, D) thoughts behind (layers, R, W) states -> (R, 1, D) and the states after them."""
        if not len(thoughts):
            return thoughts, states
        hidden, states = self.gru(self.dropout(thoughts), states)
        return self.output(hidden), states

    def _read(
        self, representations: Tensor, mask: Tensor | None, cache: GRU4RecCache | None = None
    ) -> tuple[Tensor, GRU4RecCache]:
        if mask is None:
            mask = torch.ones(representations.shape[:2], dtype=torch.bool, device=representations.device)
        mask = mask.bool()
        added = mask.sum(dim=1)
        before = torch.zeros_like(added) if cache is None else cache.lengths
        if len(mask):
            check_length(self.config, int((before + added).max()), None)
        old = representations.new_zeros(self.gru.num_layers, len(mask), self.gru.hidden_size)
        old = old if cache is None else cache.states
        if not mask.numel():
            return representations, GRU4RecCache(old, before)
        # Not even a NaN that stands at a padded place gets out: a weight of 0 would not stop it.
        inputs = self.dropout(representations.masked_fill(~mask[..., None], 0))
        # Items to the left, in their order; packed, so that a state is that after its history's own last item.
        order = (~mask).long().argsort(dim=1, stable=True)[..., None]  # (B, S, 1)
        inputs = inputs.gather(1, order.expand_as(inputs))
        # There are no packed sequences of nothing: an empty history reads one zero, and forgets it again.
        packed = pack_padded_sequence(inputs, added.clamp_min(1).cpu(), batch_first=True, enforce_sorted=False)
        packed, states = self.gru(packed, old)
        hidden, _ = pad_packed_sequence(packed, batch_first=True, total_length=mask.shape[1])
        hidden = self.output(hidden)
        hidden = torch.zeros_like(hidden).scatter(1, order.expand_as(hidden), hidden).masked_fill(~mask[..., None], 0)
        return hidden, GRU4RecCache(torch.where((added == 0)[:, None], old, states), before + added)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.GRU):
            for name, parameter in module.named_parameters():
                if name.startswith("bias"):
                    init.zeros_(parameter)
                else:
                    init.xavier_uniform_(parameter)
        elif isinstance(module, nn.Linear):
            init.xavier_normal_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


def register() -> None:
    """Makes AutoConfig and AutoModel know GRU4Rec; may be called again."""
    AutoConfig.register(GRU4RecConfig.model_type, GRU4RecConfig, exist_ok=True)
    AutoModel.register(GRU4RecConfig, GRU4RecModel, exist_ok=True)
