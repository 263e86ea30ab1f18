"""SequenceModel: item representations, events, an encoder and the similarity that ranks, as one `PreTrainedModel`."""

import math
from dataclasses import asdict, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from llmrec.backbones.encoder import UNKNOWN_TIME, SequenceEncoder
from llmrec.backbones.encoders import register_encoders
from llmrec.backbones.reasoning import ReasoningEncoder
from llmrec.examples import IGNORED
from llmrec.exceptions import BackboneError
from llmrec.losses.loss import ItemLoss
from llmrec.reasoning.losses import ReasoningLoss, StepQueries
from llmrec.reasoning.tasks import step_labels
from llmrec.representations.build import build_representation
from llmrec.sequence.events import EventConfig, EventLayout, Tokens


class SequenceConfig(PreTrainedConfig):
    """What a sequence model is made of.

    Attributes:
        num_items: N.
        hidden_size: D.
        max_history: the most recent items that it reads.
        encoder: the encoder's own configuration with its `model_type`.
        representation: see `llmrec.representations.build`.
        events: an `EventConfig`'s fields.
        similarity: "dot", or "cosine" of L2-normalised queries and items.
        temperature: that inner products are divided by.
        initializer_range: of the events' vectors.
    """

    model_type = "llmrec_sequence"

    num_items: int = 1
    hidden_size: int = 64
    max_history: int = 50
    encoder: dict[str, Any] | None = None
    representation: dict[str, Any] | None = None
    events: dict[str, Any] | None = None
    similarity: str = "dot"
    temperature: float = 1.0
    initializer_range: float = 0.02


class SequenceModel(PreTrainedModel):
    """Histories -> queries, of which the inner product with an item's vector is that item's logit.

    It is the `ItemVectors` of its own loss: `table` and `vectors` are the candidates as they are scored.
    """

    config_class = SequenceConfig
    base_model_prefix = "sequence"
    main_input_name = "items"
    _supports_sdpa = True

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__(config)
        if config.similarity not in ("dot", "cosine") or not 0 < config.temperature < math.inf:
            raise BackboneError(
                f"The similarity is {config.similarity!r} at a temperature of {config.temperature}. Choose 'dot' or "
                "'cosine', and a positive temperature."
            )
        register_encoders()
        settings = dict(config.encoder or {"model_type": "sasrec", "hidden_size": config.hidden_size})
        # Known are names alone: an artefact of a newer llmrec may say more.
        known = {entry.name for entry in fields(EventConfig)}
        event_config = EventConfig(**{name: value for name, value in (config.events or {}).items() if name in known})
        self.representation = build_representation(
            config.representation or {"kind": "ids"}, config.num_items, config.hidden_size
        )
        self.layout = EventLayout(event_config, config.hidden_size)
        self.encoder: SequenceEncoder = AutoModel.from_config(AutoConfig.for_model(**settings))
        # The query of a user of whom nothing is known.
        self.start = nn.Parameter(torch.zeros(config.hidden_size))
        needed = event_config.positions(config.max_history) + (0 if self.encoder.causal else 1)
        has = getattr(self.encoder.config, "max_position_embeddings", None)
        if has is not None and has < needed:
            raise BackboneError(
                f"Histories of {config.max_history} items need {needed} positions, and the encoder has {has}. Give it "
                "more, or shorten the histories."
            )
        if not self.encoder.causal and event_config.tokens_per_event > 1:
            raise BackboneError(
                f"{settings['model_type']} hides items and reads to both sides, where tokens between items would tell "
                "what is hidden. Add actions and domains to the items instead."
            )
        self.post_init()
        self.representation.reset_parameters()  # transformers' own draws know nothing of its range

    @property
    def events(self) -> EventConfig:
        """What it is told of events."""
        return self.layout.config

    @property
    def causal(self) -> bool:
        """Whether it predicts each next item; if not, hidden ones."""
        return self.encoder.causal

    @property
    def num_items(self) -> int:
        """N."""
        return self.representation.num_items

    def forward(
        self,
        items: Tensor,
        mask: Tensor,
        timestamps: Tensor | None = None,
        actions: Tensor | None = None,
        domains: Tensor | None = None,
        next_timestamps: Tensor | None = None,
        next_actions: Tensor | None = None,
        next_domains: Tensor | None = None,
        hidden: Tensor | None = None,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        first_items: Tensor | None = None,
        loss: ItemLoss | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """The query for the item after each place; of a model that hides items, for the item at each place.

        Args:
            items: (B, S) item rows; what stands at padded places does not matter, but is a row.
            mask: (B, S), true where there is an item.
            timestamps, actions, domains: (B, S), see `EventLayout`.
            next_timestamps, next_actions, next_domains: (B, S), likewise.
            hidden: (B, S) which items the model is not shown; only of one that is not causal.
            labels: (B, S) the rows that are asked for, `IGNORED` where none is. With them the loss comes back.
            weights: (B, S) what each label counts; None: 1 each.
            first_items: (F,) first items of histories, from which the query of a new user learns; its gradient reaches
                nothing else, and its loss is no part of what comes back.
            loss: with labels. A `ReasoningLoss` asks all steps of an encoder that thinks.
            places: (B, P) the places, 0..S - 1, whose queries come back; None: all. An encoder that thinks does so
                there alone.

        Returns:
            (B, S, D), or (B, P, D), zeros at padded places; or the sum of the labels' losses.
        """
        representations = self.representation(items)
        if hidden is not None:
            representations = self.encoder.hide(representations, hidden)
            if timestamps is not None and not self.events.request_time:
                timestamps = timestamps.masked_fill(hidden, UNKNOWN_TIME)
        tokens = self.layout(
            *(representations, mask, timestamps, actions, domains),
            *(next_timestamps, next_actions, next_domains),
        )
        if labels is None or loss is None:
            return self.queries(self._states(tokens, places))
        asked = labels != IGNORED
        counts = None if weights is None else weights[asked]
        total: Tensor
        if self._thinks:
            total = self._thought_loss(tokens, labels, asked, next_actions, counts, loss)
        else:
            total = loss(self.queries(self._states(tokens))[asked], labels[asked], self, counts)
        return total if first_items is None else total + self._start_loss(first_items)

    def last(
        self,
        items: Tensor,
        mask: Tensor,
        timestamps: Tensor | None = None,
        actions: Tensor | None = None,
        domains: Tensor | None = None,
        next_timestamps: Tensor | None = None,
        next_actions: Tensor | None = None,
        next_domains: Tensor | None = None,
    ) -> Tensor:
        """The query (B, D) for the item after each history; for an empty one, the query of a new user.

        Arguments as `forward`'s, padded on the right.
        """
        given = (timestamps, actions, domains, next_timestamps, next_actions, next_domains)
        ends = mask.sum(dim=1)  # (B,)
        rows = torch.arange(len(items), device=items.device)
        if self.causal:
            found: Tensor = self(items, mask, *given, places=(ends - 1).clamp_min(0)[:, None])[:, 0]
        else:
            longer = [_longer(one) for one in (items, mask)]
            hidden = torch.zeros_like(longer[1])
            hidden[rows, ends] = True
            longer[1] = longer[1] | hidden
            extended: list[Tensor | None] = []
            for own, following, unknown in (
                (timestamps, next_timestamps if self.events.request_time else None, UNKNOWN_TIME),
                (actions, next_actions, self.events.action(self.events.target_action)),
                (domains, next_domains, None),
            ):
                if own is None:
                    extended.append(None)
                    continue
                one = _longer(own)
                last = (ends - 1).clamp_min(0)
                if following is not None:
                    asked = following[rows, last]
                elif unknown is None:  # the last item's
                    asked = own[rows, last].masked_fill(ends == 0, 0)
                else:
                    asked = torch.full_like(ends, unknown)
                one[rows, ends] = self.events.asked(asked) if own is actions else asked
                extended.append(one)
            found = self(*longer, *extended, hidden=hidden)[rows, ends]
        new: Tensor = (ends == 0)[:, None] & self.causal
        return torch.where(new, self.queries(self.start), found)

    def queries(self, states: Tensor) -> Tensor:
        """Hidden states (…, D) as they are compared with items: normalised if cosine, divided by the temperature."""
        if self.config.similarity == "cosine":
            states = F.normalize(states, dim=-1, eps=1e-6)
        queries: Tensor = states / self.config.temperature
        return queries

    def table(self) -> Tensor:
        """(N, D) the items as they are scored."""
        return self._scored(self.representation.table())

    def vectors(self, rows: Tensor) -> Tensor:
        """Rows (…) -> (…, D), the same of some items."""
        return self._scored(self.representation(rows))

    @property
    def _thinks(self) -> bool:
        return isinstance(self.encoder, ReasoningEncoder) and bool(self.encoder.steps)

    def _states(self, tokens: Tokens, places: Tensor | None = None) -> Tensor:
        """(B, S, D) the encoder's states after events; after those at some places (B, P) alone, (B, P, D)."""
        columns = _columns(tokens, places)
        given = _inputs(tokens)
        states: Tensor = self.encoder(*given) if columns is None else self.encoder.states_at(columns, *given)
        return states

    def _thought_loss(
        self,
        tokens: Tokens,
        labels: Tensor,
        asked: Tensor,
        next_actions: Tensor | None,
        counts: Tensor | None,
        loss: ItemLoss,
    ) -> Tensor:
        """The sum of the labels' losses where the encoder thinks: at labelled places alone."""
        assert isinstance(self.encoder, ReasoningEncoder)
        # Labelled places to the left, in their order; at least one column, so that every weight has a gradient.
        width = max(1, int(asked.sum(dim=1).max())) if len(asked) else 0
        places = (~asked).long().argsort(dim=1, stable=True)[:, :width]
        there = asked.gather(1, places)
        columns = _columns(tokens, places)
        assert columns is not None
        noise = loss.noise if isinstance(loss, ReasoningLoss) else 0.0
        found = self.encoder.reason(columns, *_inputs(tokens), noise=noise)
        states = found.states[there]  # (T, K + 1, D), T in the order of labels[asked]
        served = self.queries(self.encoder.answer(states))
        if not isinstance(loss, ReasoningLoss):
            total: Tensor = loss(served, labels[asked], self, counts)
            return total
        steps = StepQueries(
            served=served,
            steps=self.queries(states),
            noised=None if found.noised is None else self.queries(found.noised[there]),
            keys=self._scored(states[:, 1:]),
            labels=step_labels(labels, next_actions, loss.tasks)[asked] if loss.tasks else None,
        )
        return loss.of_steps(steps, labels[asked], self, counts)

    def _start_loss(self, first_items: Tensor) -> Tensor:
        """0, with the gradient of the first items' softmax loss for the start vector."""
        with torch.no_grad():
            table = self.table().detach()  # which may be the parameter itself
        logits = table.float() @ self.queries(self.start).float()
        lost = -logits.log_softmax(dim=0)[first_items].sum()
        return lost - lost.detach()

    def _scored(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1, eps=1e-6) if self.config.similarity == "cosine" else vectors

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SequenceModel):
            init.zeros_(module.start)
        else:
            super()._init_weights(module)


def sequence_config(
    encoder: PreTrainedConfig,
    num_items: int,
    max_history: int,
    representation: dict[str, Any] | None = None,
    events: EventConfig | None = None,
    similarity: str = "dot",
    temperature: float = 1.0,
) -> SequenceConfig:
    """The configuration of a model around an encoder, whose width is the model's."""
    return SequenceConfig(
        num_items=num_items,
        hidden_size=int(encoder.hidden_size),
        max_history=max_history,
        encoder={**encoder.to_diff_dict(), "model_type": encoder.model_type},
        representation=representation or {"kind": "ids"},
        events=asdict(events or EventConfig()),
        similarity=similarity,
        temperature=temperature,
    )


def register() -> None:
    """Makes AutoConfig and AutoModel know sequence models; may be called again."""
    AutoConfig.register(SequenceConfig.model_type, SequenceConfig, exist_ok=True)
    AutoModel.register(SequenceConfig, SequenceModel, exist_ok=True)


def _columns(tokens: Tokens, places: Tensor | None) -> Tensor | None:
    """(B, P) where in the tokens the states of places are read; None: everywhere, in order."""
    if tokens.reads is None or places is None:
        return tokens.reads if places is None else places
    return tokens.reads.gather(1, places)


def _inputs(
    tokens: Tokens,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """What an encoder is given."""
    return (
        *(tokens.representations, tokens.mask, tokens.timestamps),
        *(tokens.actions, tokens.domains, tokens.next_timestamps),
    )


def _longer(one: Tensor) -> Tensor:
    """(B, S) -> (B, S + 1), with a 0 at the end."""
    return F.pad(one, (0, 1))
