"""CTRModel: a candidate behind a user's history, read by any encoder, to the logits of several labels.

Target-aware ranking as in HSTU ("Actions Speak Louder than Words", arXiv 2402.17152, sections 2.2 and 3.1): the
candidate is the last token of the sequence, so what the user did is weighed in the light of it.

B batch, S events (the candidate included), D width, K labels, P places that are asked for, N items.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from llmrec.backbones.encoder import UNKNOWN_TIME, SequenceEncoder
from llmrec.backbones.encoders import register_encoders
from llmrec.ctr.scorers import DotScorer, build_scorer
from llmrec.exceptions import BackboneError
from llmrec.representations.build import build_representation

Layout = Literal["target", "interleaved"]

MAX_LABELS = 8
UNKNOWN_ACTION = 0


def action_of(labels: Tensor) -> Tensor:
    """What the labels (…, K) of an event are to a model that reads it: an action (…), int64.

    1 + Σ_k label_k 2^k, where an unknown label (negative) counts as 0; `UNKNOWN_ACTION` if all are unknown.

    >>> action_of(torch.tensor([[0], [1], [-100]])), action_of(torch.tensor([[1, 1], [-100, 0]]))
    (tensor([1, 2, 0]), tensor([4, 1]))
    """
    bits = 2 ** torch.arange(labels.shape[-1], device=labels.device)
    codes = 1 + ((labels > 0) * bits).sum(dim=-1)
    return torch.where((labels >= 0).any(dim=-1), codes, UNKNOWN_ACTION)


class CTRConfig(PreTrainedConfig):
    """What a ranking model is made of.

    Attributes:
        num_items: N.
        hidden_size: D.
        labels: names of the K labels.
        max_history: the most recent events that it reads before a candidate.
        layout: "target": a token an event, its item's vector plus its action's; the candidate's action is a vector of
            its own. "interleaved": item, action, item, action, …, candidate (HSTU's), so that a causal encoder
            predicts every event of a history in one pass.
        encoder: the encoder's own configuration with its `model_type`.
        representation: see `llmrec.representations.build`.
        scorer: "dot", "mlp" or "ffn", see `llmrec.ctr.scorers`.
        dropout: of the scorer.
        unknown_rate: in training, the share of items that are taken for the unknown one (row 0), so that its vector
            stands for an item of which nothing is known.
        initializer_range: of the actions' vectors.
    """

    model_type = "llmrec_ctr"

    num_items: int = 1
    hidden_size: int = 64
    labels: list[str] | None = None
    max_history: int = 50
    layout: str = "target"
    encoder: dict[str, Any] | None = None
    representation: dict[str, Any] | None = None
    scorer: str = "mlp"
    dropout: float = 0.0
    unknown_rate: float = 0.0
    initializer_range: float = 0.02

    @property
    def num_actions(self) -> int:
        """Codes of `action_of`, the unknown one included."""
        return int(2 ** len(self.labels or ["label"])) + 1

    @property
    def asked(self) -> int:
        """The action of a candidate, whose labels are asked for."""
        return self.num_actions

    @property
    def positions(self) -> int:
        """The tokens of `max_history` events and a candidate."""
        return positions_of(self.max_history, self.layout)


def positions_of(max_history: int, layout: str) -> int:
    """The positions that an encoder needs for `max_history` events and a candidate, or one more event."""
    return (2 if layout == "interleaved" else 1) * (max_history + 1)


class Tokens(NamedTuple):
    """What the encoder reads: (B, T, D), (B, T) and (B, T); T is S, or 2 S interleaved."""

    representations: Tensor
    mask: Tensor
    timestamps: Tensor


class CTRModel(PreTrainedModel):
    """Events and candidates -> logits of labels."""

    config_class = CTRConfig
    base_model_prefix = "ctr"
    main_input_name = "items"
    _supports_sdpa = True

    def __init__(self, config: CTRConfig) -> None:
        super().__init__(config)
        labels = list(config.labels or ["label"])
        if len(set(labels)) != len(labels) or len(labels) > MAX_LABELS:
            raise BackboneError(
                f"The labels are {', '.join(map(repr, labels))}. Give up to {MAX_LABELS} different names."
            )
        if config.layout not in ("target", "interleaved"):
            raise BackboneError(f"There is no layout {config.layout!r}. Choose target or interleaved.")
        register_encoders()
        settings = dict(config.encoder or {"model_type": "sasrec", "hidden_size": config.hidden_size})
        self.representation = build_representation(
            config.representation or {"kind": "ids"}, config.num_items, config.hidden_size
        )
        # One a action, and the candidate's, which no interleaved sequence has a token for.
        rows = config.num_actions + (0 if config.layout == "interleaved" else 1)
        self.actions = nn.Embedding(rows, config.hidden_size)
        self.encoder: SequenceEncoder = AutoModel.from_config(AutoConfig.for_model(**settings))
        self.scorer = build_scorer(config.scorer, config.hidden_size, len(labels), config.dropout)
        has = getattr(self.encoder.config, "max_position_embeddings", None)
        if has is not None and has < config.positions:
            raise BackboneError(
                f"Histories of {config.max_history} events and a candidate need {config.positions} positions, and the "
                f"encoder has {has}. Give it more, or shorten the histories."
            )
        if config.layout == "interleaved" and not self.encoder.causal:
            raise BackboneError(
                f"{settings['model_type']} reads to both sides, and would see an event's action before it is to "
                "predict it. Choose the layout target."
            )
        self.post_init()
        self.representation.reset_parameters()  # transformers' own draws know nothing of its range

    @property
    def labels(self) -> list[str]:
        """Names of the K labels."""
        return list(self.config.labels or ["label"])

    def forward(
        self,
        items: Tensor,
        mask: Tensor,
        timestamps: Tensor | None = None,
        actions: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """The logits of the labels at places of sequences.

        Args:
            items: (B, S) item rows, oldest first, padded on the right; a candidate is the last of its sequence.
            mask: (B, S), true where there is an event or a candidate.
            timestamps: (B, S) int64 unix seconds, `UNKNOWN_TIME` where unknown; a candidate's is the request's.
                None: all unknown.
            actions: (B, S) int64 of `action_of`, `config.asked` for a candidate. None: all unknown.
            places: (B, S) bool, where labels are asked for: None: at candidates. In the layout "interleaved" any place
                may be asked for: its own action comes behind it and is not seen.

        Returns:
            (P, K) logits, places in the order of `places.nonzero()`.

        Raises:
            BackboneError: if a place is asked for whose own action the model has read.
        """
        actions = torch.full_like(items, UNKNOWN_ACTION) if actions is None else actions
        asked = (actions == self.config.asked) & mask
        places = asked if places is None else places & mask
        if self.config.layout == "target" and bool((places & ~asked).any()):
            raise BackboneError(
                "The layout target adds an action to its item, so a place whose action is known says nothing when it "
                "is asked for. Ask for candidates alone, or train a model of the layout interleaved."
            )
        if self.training and self.config.unknown_rate > 0:
            items = items.masked_fill(torch.rand(items.shape, device=items.device) < self.config.unknown_rate, 0)
        represented = self.representation(items)
        tokens = self.tokens(represented, mask, timestamps, actions)
        states = self.encoder(*tokens)
        if self.config.layout == "interleaved":
            states = states[:, ::2]
        logits: Tensor = self.scorer(states[places], represented[places])
        return logits

    def tokens(self, represented: Tensor, mask: Tensor, timestamps: Tensor | None, actions: Tensor) -> Tokens:
        """What the encoder reads of events: see `forward`; `represented` (B, S, D) are the items' vectors."""
        times = torch.full_like(actions, UNKNOWN_TIME) if timestamps is None else timestamps
        if self.config.layout == "target":
            return Tokens(represented + self.actions(actions), mask, times)
        asked = actions == self.config.asked
        # A candidate's action token is no token: the row that it would have is not looked at.
        done = self.actions(actions.masked_fill(asked, UNKNOWN_ACTION))
        return Tokens(
            torch.stack([represented, done], dim=2).flatten(1, 2),
            torch.stack([mask, mask & ~asked], dim=2).flatten(1, 2),
            times.repeat_interleave(2, dim=1),
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.actions:
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, DotScorer):
            module.reset_parameters()
        else:
            super()._init_weights(module)


def ctr_config(
    encoder: PreTrainedConfig,
    num_items: int,
    max_history: int,
    labels: list[str],
    layout: str = "target",
    scorer: str = "mlp",
    dropout: float = 0.0,
    unknown_rate: float = 0.0,
    representation: dict[str, Any] | None = None,
) -> CTRConfig:
    """The configuration of a model around an encoder, whose width is the model's."""
    return CTRConfig(
        num_items=num_items,
        hidden_size=int(encoder.hidden_size),
        labels=list(labels),
        max_history=max_history,
        layout=layout,
        encoder={**encoder.to_diff_dict(), "model_type": encoder.model_type},
        representation=representation or {"kind": "ids"},
        scorer=scorer,
        dropout=dropout,
        unknown_rate=unknown_rate,
    )


def register() -> None:
    """Makes AutoConfig and AutoModel know ranking models; may be called again."""
    AutoConfig.register(CTRConfig.model_type, CTRConfig, exist_ok=True)
    AutoModel.register(CTRConfig, CTRModel, exist_ok=True)
