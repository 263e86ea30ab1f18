"""EventLayout: how what is known of an event beside its item (action, domain, time) enters a sequence model."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.exceptions import BackboneError

Place = Literal["none", "added", "before", "after"]
_DAY = 86_400  # seconds


@dataclass
class EventConfig:
    """What a model is told of events.

    Attributes:
        actions: names of actions; the number of a name is its place here + 1, and 0 is any other or none.
        domains: names of domains, likewise.
        action_tokens: "none"; "added": implicit, the action's vector is added to its item's; "before": explicit, a
            token of its own before each item, so that the next item is asked for under an action (MBGen, "Multi-
            Behavior Generative Recommendation", 2024); "after": a token behind each item (HSTU's interleaving).
        domain_tokens: "none", "added" or "before", likewise; with actions before items both share one token.
        target_action: the action under which items are asked for where a request names none; "" for unknown.
        time_features: whether hour of the day, day of the week and month are added to every token (UTC).
        request_time: whether the time of the request, which in an evaluation is the time of the interaction to be
            predicted, is known to the model, as in HSTU's own code. If not, times count from the last interaction.
    """

    actions: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    action_tokens: Place = "none"
    domain_tokens: Place = "none"
    target_action: str = ""
    time_features: bool = False
    request_time: bool = False

    def __post_init__(self) -> None:
        known: tuple[tuple[str, str, tuple[str, ...]], ...] = (
            ("action_tokens", self.action_tokens, ("none", "added", "before", "after")),
            ("domain_tokens", self.domain_tokens, ("none", "added", "before")),
        )
        for name, value, allowed in known:
            if value not in allowed:
                raise BackboneError(f"{name} is {value!r}. Choose one of {', '.join(allowed)}.")
        if self.action_tokens == "after" and self.domain_tokens == "before":
            raise BackboneError(
                "Actions stand after items and domains before them, which no layout here has. Add one of them instead."
            )
        if self.target_action and self.target_action not in self.actions:
            raise BackboneError(
                f"target_action is {self.target_action!r}, and the actions are {', '.join(self.actions) or 'none'}. "
                "Name one of these."
            )

    @property
    def tokens_before(self) -> bool:
        """Whether a token stands before each item."""
        return "before" in (self.action_tokens, self.domain_tokens)

    @property
    def tokens_per_event(self) -> int:
        """1, or 2 where actions or domains have tokens of their own."""
        return 2 if self.tokens_before or self.action_tokens == "after" else 1

    def positions(self, max_history: int) -> int:
        """The positions that an encoder needs for `max_history` items."""
        return max_history * self.tokens_per_event + (1 if self.tokens_before else 0)

    def action(self, name: str | None) -> int:
        """The number of an action's name; 0 for an unknown one or none."""
        return self.actions.index(name) + 1 if name in self.actions else 0

    def asked(self, actions: Tensor) -> Tensor:
        """Numbers of actions, in which -1 stands for the target action."""
        return torch.where(actions < 0, self.action(self.target_action), actions)

    def domain(self, name: str | None) -> int:
        """The number of a domain's name; 0 for an unknown one or none."""
        return self.domains.index(name) + 1 if name in self.domains else 0


class Tokens(NamedTuple):
    """What an encoder reads.

    Attributes:
        representations: (B, S', D).
        mask: (B, S').
        timestamps, actions, domains, next_timestamps: (B, S') each, or None.
        reads: (B, S) the place in S' whose state is asked for the item after place s; None where S' is S.
    """

    representations: Tensor
    mask: Tensor
    timestamps: Tensor | None
    actions: Tensor | None
    domains: Tensor | None
    next_timestamps: Tensor | None
    reads: Tensor | None


class EventLayout(nn.Module):
    """Item vectors and what is known of each event -> the tokens of an encoder."""

    def __init__(self, config: EventConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        has = {"actions": config.action_tokens != "none", "domains": config.domain_tokens != "none"}
        self.actions = nn.Embedding(len(config.actions) + 1, hidden_size) if has["actions"] else None
        self.domains = nn.Embedding(len(config.domains) + 1, hidden_size) if has["domains"] else None
        # Of each the last row is for a time that nobody knows.
        sizes = (25, 8, 13) if config.time_features else ()
        self.times = nn.ModuleList(nn.Embedding(size, hidden_size) for size in sizes)

    def forward(
        self,
        representations: Tensor,
        mask: Tensor,
        timestamps: Tensor | None = None,
        actions: Tensor | None = None,
        domains: Tensor | None = None,
        next_timestamps: Tensor | None = None,
        next_actions: Tensor | None = None,
        next_domains: Tensor | None = None,
    ) -> Tokens:
        """Lays events out.

        Args:
            representations: (B, S, D) of the items.
            mask: (B, S).
            timestamps, actions, domains: (B, S) of the events; None: unknown.
            next_timestamps, next_actions, next_domains: (B, S) of the event after each place; at the last one, of
                the request. None: its action is the target action (also where it is -1); its domain and time are
                those of the place itself.
        """
        config = self.config
        actions, domains = self._numbers(actions, mask), self._numbers(domains, mask)
        if next_actions is not None:
            next_actions = config.asked(next_actions)
        else:
            next_actions = torch.full_like(actions, config.action(config.target_action))
            next_actions[:, :-1] = torch.where(mask[:, 1:] & mask[:, :-1], actions[:, 1:], next_actions[:, :-1])
        if next_domains is None:
            next_domains = domains.clone()
            next_domains[:, :-1] = torch.where(mask[:, 1:] & mask[:, :-1], domains[:, 1:], domains[:, :-1])
        next_timestamps = next_timestamps if config.request_time else None
        items = representations
        if self.actions is not None and config.action_tokens == "added":
            items = items + self.actions(actions)
        if self.domains is not None and config.domain_tokens == "added":
            items = items + self.domains(domains)
        if config.tokens_per_event == 1:
            items = items + self._clock(timestamps, mask)
            return Tokens(items, mask, timestamps, actions, domains, next_timestamps, None)
        if config.tokens_before:
            return self._before(items, mask, timestamps, actions, domains, next_timestamps, next_actions, next_domains)
        assert self.actions is not None
        reads = 2 * torch.arange(mask.shape[1], device=mask.device) + 1
        times, followed = _twice(timestamps), _twice(next_timestamps)
        tokens = torch.stack([items, self.actions(actions)], dim=2).flatten(1, 2)  # (B, 2 S, D)
        both = mask.repeat_interleave(2, dim=1)
        tokens = tokens + self._clock(times, both)
        return Tokens(
            *(tokens, both, times, _twice(actions), _twice(domains), followed),
            reads.expand_as(mask),
        )

    def _before(
        self,
        items: Tensor,
        mask: Tensor,
        timestamps: Tensor | None,
        actions: Tensor,
        domains: Tensor,
        next_timestamps: Tensor | None,
        next_actions: Tensor,
        next_domains: Tensor,
    ) -> Tokens:
        """Tokens c_0 i_0 c_1 i_1 … i_{S-1} c_S: c_s says under what the item i_s is, or would be, taken."""
        length = mask.shape[1]
        slot_mask = _joined(mask, mask)[:, : length + 1]

        def slots(own: Tensor, following: Tensor) -> Tensor:
            """(B, S + 1): of event s where there is one, else what follows event s - 1."""
            after = torch.cat([own[:, :1], following], dim=1)
            here = torch.cat([own, following[:, -1:]], dim=1)
            there = torch.cat([mask, torch.zeros_like(mask[:, :1])], dim=1)
            return torch.where(there, here, after)

        asked_actions, asked_domains = slots(actions, next_actions), slots(domains, next_domains)
        contexts = items.new_zeros((*slot_mask.shape, items.shape[-1]))
        if self.actions is not None and self.config.action_tokens == "before":
            contexts = contexts + self.actions(asked_actions)
        if self.domains is not None and self.config.domain_tokens == "before":
            contexts = contexts + self.domains(asked_domains)
        times = followed = None
        if timestamps is not None:
            known = timestamps if next_timestamps is None else next_timestamps
            # When c_s is said: at the request, if that is known, and else when the item before was taken.
            asked = torch.cat([timestamps[:, :1], known], dim=1)
            before = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1)
            own = torch.cat([timestamps, timestamps[:, -1:]], dim=1)
            asked = torch.where(before, asked, own)
            times = _interleaved(asked, timestamps)
            if next_timestamps is not None:
                # What stands before an item is followed by that item itself.
                followed = _interleaved(asked, next_timestamps)
        tokens = _interleaved(contexts, items)
        every = _interleaved(slot_mask, mask)
        tokens = tokens + self._clock(times, every)
        reads = 2 * torch.arange(1, length + 1, device=mask.device)
        return Tokens(
            *(tokens, every, times, _interleaved(asked_actions, actions), _interleaved(asked_domains, domains)),
            *(followed, reads.expand_as(mask)),
        )

    def _numbers(self, given: Tensor | None, mask: Tensor) -> Tensor:
        return torch.zeros_like(mask, dtype=torch.long) if given is None else given.masked_fill(~mask, 0)

    def _clock(self, timestamps: Tensor | None, mask: Tensor) -> Tensor | float:
        """(B, S', D) the vectors of hour, weekday and month, in UTC; 0 without time features."""
        if not len(self.times):
            return 0.0
        known = torch.zeros_like(mask) if timestamps is None else mask & (timestamps != UNKNOWN_TIME)
        seconds = torch.zeros_like(mask, dtype=torch.long) if timestamps is None else timestamps.masked_fill(~known, 0)
        days = seconds.div(_DAY, rounding_mode="floor")
        numbers = ((seconds - days * _DAY) // 3600, (days + 3) % 7, _month(days))  # 1970-01-01 was a Thursday
        added = 0.0
        for table, number in zip(self.times, numbers, strict=True):
            assert isinstance(table, nn.Embedding)
            added = added + table(torch.where(known, number, table.num_embeddings - 1))
        return added


def _month(days: Tensor) -> Tensor:
    """0 for January to 11 for December, of days since 1970-01-01 in the Gregorian calendar.

    By eras of 400 years that begin in March, in which leap days come last.

    >>> _month(torch.tensor([0, 30, 31, 364, -1, 11016]))  # the last is 2000-02-29
    tensor([ 0,  0,  1, 11, 11,  1])
    """
    day = (days + 719_468) % 146_097
    year = (day - day // 1460 + day // 36_524 - day // 146_096) // 365
    in_year = day - (365 * year + year // 4 - year // 100)
    return ((5 * in_year + 2) // 153 + 2) % 12


def _twice(one: Tensor | None) -> Tensor | None:
    return None if one is None else one.repeat_interleave(2, dim=1)


def _interleaved(slots: Tensor, events: Tensor) -> Tensor:
    """(B, S + 1, …) and (B, S, …) -> (B, 2 S + 1, …): slot, event, slot, event, …, slot."""
    pairs = torch.stack([slots[:, :-1], events], dim=2).flatten(1, 2)
    return torch.cat([pairs, slots[:, -1:]], dim=1)


def _joined(own: Tensor, before: Tensor) -> Tensor:
    """(B, S + 1) whether there is an event s, or one s - 1."""
    none = torch.zeros_like(own[:, :1])
    return torch.cat([own, none], dim=1) | torch.cat([none, before], dim=1)
