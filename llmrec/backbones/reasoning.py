"""ReasoningEncoder: any causal sequence encoder that thinks before it answers: its last state is fed back to it.

Sources: ReaRec, "Think Before Recommend" (2025), arXiv 2503.22675: the state r_{k-1} behind a history and a learnt
vector p_k of the step are read as one more place, whose state is r_k (r_0 is the encoder's own); "erl" answers with
the mean of r_0 … r_K, "prl" with r_K. OnePiece (2025), arXiv 2509.18091: "block" feeds back the states of the last M
items at once, under a mask that lets a block see the history, all blocks before it and the whole of itself, and
answers with the last of the last block.

Here every place of a history thinks, each on a branch of its own (`llmrec.backbones.reasoning_branches`), so that
training has as many targets as without. What a thought is given: neither the scale nor the learnt positions of items;
the place behind what its branch has read, for biases of distance and rotations; the times of its item. GPT-2 adds its
own positions to everything.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers import initialization as init

from llmrec.backbones.encoder import SequenceEncoder, check_length, places_of
from llmrec.exceptions import BackboneError

KINDS = ("erl", "prl", "block")


class ReasoningConfig(PreTrainedConfig):
    """An encoder and how it thinks.

    Attributes:
        encoder: the encoder's own configuration with its `model_type`; it has positions for the thoughts too.
        steps: K; 0 is the encoder as it is.
        kind: "erl", "prl" or "block".
        block_size: M, how many states are fed back at once; 1 but for "block".
        hidden_size: D, the encoder's.
        max_position_embeddings: the longest history, in items.
        initializer_range: the standard deviation of new step vectors.
    """

    model_type = "reasoning"

    encoder: dict[str, Any] | None = None
    steps: int = 0
    kind: str = "erl"
    block_size: int = 1
    hidden_size: int = 64
    max_position_embeddings: int = 50
    initializer_range: float = 0.02

    @classmethod
    def around(
        cls, encoder: PreTrainedConfig, steps: int, kind: str = "erl", block_size: int = 1
    ) -> "ReasoningConfig":
        """The config that makes an encoder think; its positions are shared by items and thoughts.

        Raises:
            BackboneError: if they are too few for that.
        """
        limit = int(encoder.max_position_embeddings) - steps * block_size
        if limit < 1:
            raise BackboneError(
                f"{steps} steps of {block_size} thoughts leave no place for an item: the {encoder.model_type} has "
                f"{encoder.max_position_embeddings} positions. Give it more."
            )
        return cls(
            encoder={**encoder.to_diff_dict(), "model_type": encoder.model_type},
            steps=steps,
            kind=kind,
            block_size=block_size,
            hidden_size=int(encoder.hidden_size),
            max_position_embeddings=limit,
        )

    def encoder_config(self) -> Any:
        """The encoder's config."""
        return AutoConfig.for_model(**dict(self.encoder or {"model_type": "sasrec", "hidden_size": self.hidden_size}))

    @property
    def relative_bias(self) -> str:
        """The encoder's; "" for one that has none."""
        return str(getattr(self.encoder_config(), "relative_bias", ""))


class Reasoned(NamedTuple):
    """What was thought at P places.

    Attributes:
        states: (B, P, K + 1, D) r_0 … r_K, zeros at places that hold no item.
        noised: (B, P, K, D) r_1 … r_K of a second line of thought, each of whose steps was fed with noise; or None.
    """

    states: Tensor
    noised: Tensor | None


class ReasoningEncoder(SequenceEncoder):
    """An encoder whose states are what it has come to after K steps.

    Attributes:
        encoder: the encoder.
        steps: how many steps are thought; `config.steps`, or fewer inside `thinking`.
    """

    config_class = ReasoningConfig
    base_model_prefix = "reasoning"
    _supports_sdpa = True

    def __init__(self, config: ReasoningConfig) -> None:
        super().__init__(config)
        from llmrec.backbones.encoders import register_encoders

        register_encoders()
        inner = config.encoder_config()
        _check(config, inner)
        self.encoder: SequenceEncoder = AutoModel.from_config(inner)
        self.steps = config.steps
        self.step_vectors = nn.Parameter(torch.empty(config.steps, config.hidden_size)) if config.steps else None
        self.post_init()

    @contextlib.contextmanager
    def thinking(self, steps: int) -> Iterator[None]:
        """Answers after fewer steps, as long as the context lasts.

        Raises:
            BackboneError: if the encoder has not learnt so many.
        """
        if not 0 <= steps <= self.config.steps:
            raise BackboneError(
                f"{steps} steps of thought are asked for, and the encoder has learnt {self.config.steps}. Ask for 0 "
                "to so many."
            )
        before, self.steps = self.steps, steps
        try:
            yield
        finally:
            self.steps = before

    def forward(
        self,
        representations: Tensor,
        mask: Tensor | None = None,
        timestamps: Tensor | None = None,
        actions: Tensor | None = None,
        domains: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> Tensor:
        """The state after every item of a history that was thought about as if nothing came behind it.

        Arguments as of `SequenceEncoder.forward`. Without steps this is the encoder's own `forward`.
        """
        check_length(self.config, representations.shape[1], mask)
        given = (representations, mask, timestamps, actions, domains, next_timestamps)
        if not self.steps or not representations.numel():
            return cast(Tensor, self.encoder(*given))
        columns = torch.arange(representations.shape[1], device=representations.device)
        return self.answer(self.reason(columns.expand(len(representations), -1), *given).states)

    def states_at(
        self,
        places: Tensor,
        representations: Tensor,
        mask: Tensor | None = None,
        timestamps: Tensor | None = None,
        actions: Tensor | None = None,
        domains: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> Tensor:
        """See `SequenceEncoder.states_at`; nothing is thought at other places."""
        check_length(self.config, representations.shape[1], mask)
        given = (representations, mask, timestamps, actions, domains, next_timestamps)
        if not self.steps or not representations.numel():
            return self.encoder.states_at(places, *given)
        return self.answer(self.reason(places, *given).states)

    def reason(
        self,
        places: Tensor,
        representations: Tensor,
        mask: Tensor | None = None,
        timestamps: Tensor | None = None,
        actions: Tensor | None = None,
        domains: Tensor | None = None,
        next_timestamps: Tensor | None = None,
        noise: float = 0.0,
    ) -> Reasoned:
        """What is thought at some places, step by step.

        Args:
            places: (B, P) int64 columns 0..S - 1.
            representations, mask, timestamps, actions, domains, next_timestamps: as of `forward`; actions and domains
                are not used.
            noise: γ, the variance of the noise that a second line of thought is fed with: r̃_k is the state of
                r̃_{k-1} + p_k + ε_k with r̃_0 = r_0 and ε_k from N(0, γ I). 0: there is none.

        Raises:
            BackboneError: if a history is too long.
        """
        check_length(self.config, representations.shape[1], mask)
        if mask is None:
            mask = torch.ones(representations.shape[:2], dtype=torch.bool, device=representations.device)
        mask = mask.bool()
        found, branches = self.encoder.branches(places, representations, mask, timestamps, next_timestamps)
        columns, there = self._block(places, mask)
        width = found.shape[-1]
        # (B, P, M, D), the oldest first, so that the place itself is the last.
        block = found.gather(1, columns.flatten(1)[..., None].expand(-1, -1, width)).view(*columns.shape, width)
        block = block.masked_fill(~there[..., None], 0)
        states, noised = [block[:, :, -1]], []
        other, other_branches = block, branches
        for vector in () if self.step_vectors is None else self.step_vectors[: self.steps]:
            block, branches = branches.think(block + vector, there)
            states.append(block[:, :, -1])
            if noise:
                drawn = noise**0.5 * torch.randn_like(other)
                other, other_branches = other_branches.think(other + vector + drawn, there)
                noised.append(other[:, :, -1])
        return Reasoned(torch.stack(states, dim=2), torch.stack(noised, dim=2) if noised else None)

    def answer(self, states: Tensor) -> Tensor:
        """(…, k + 1, D) states r_0 … r_k -> (…, D) what is compared with items: their mean if "erl", else r_k."""
        answered: Tensor = states.mean(dim=-2) if self.config.kind == "erl" else states[..., -1, :]
        return answered

    def _block(self, places: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, M) the columns of the last M items up to each place, and which of them there are."""
        back = torch.arange(1 - self.config.block_size, 1, device=places.device)
        numbers = places_of(mask).gather(1, places)[..., None] + back
        there = (numbers >= 0) & mask.gather(1, places)[..., None]
        order = (~mask).long().argsort(dim=1, stable=True)  # items to the left, in their order
        columns = order.gather(1, numbers.clamp_min(0).flatten(1)).view(numbers.shape)
        return columns, there

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.step_vectors is not None:
            init.normal_(self.step_vectors, std=self.config.initializer_range)


def register() -> None:
    """Makes AutoConfig and AutoModel know ReasoningEncoder; may be called again."""
    AutoConfig.register(ReasoningConfig.model_type, ReasoningConfig, exist_ok=True)
    AutoModel.register(ReasoningConfig, ReasoningEncoder, exist_ok=True)


def _check(config: ReasoningConfig, inner: Any) -> None:
    """Raises BackboneError for a configuration that no model has."""
    if config.kind not in KINDS:
        raise BackboneError(f"The kind of reasoning is {config.kind!r}. Choose one of {', '.join(KINDS)}.")
    if config.steps < 0 or config.block_size < 1 or (config.block_size > 1 and config.kind != "block"):
        raise BackboneError(
            f"{config.steps} steps of {config.block_size} thoughts are no reasoning of kind {config.kind!r}. Give 0 "
            "steps or more, and 1 thought; or several, with the kind 'block'."
        )
    if inner.model_type in ("reasoning", "bert4rec"):
        why = (
            "thinks already"
            if inner.model_type == "reasoning"
            else "reads to both sides and is asked by a hidden item"
        )
        raise BackboneError(
            f"The encoder is a {inner.model_type}, which {why}. Choose an encoder that is causal: sasrec, hstu, "
            "gru4rec or causal_body."
        )
    if inner.model_type == "gru4rec" and config.block_size > 1:
        raise BackboneError(
            f"The block has {config.block_size} thoughts that see one another, and a gru4rec reads one after another. "
            "Give blocks of 1, or choose an encoder that attends."
        )
    needed = config.max_position_embeddings + config.steps * config.block_size
    if inner.max_position_embeddings < needed or inner.hidden_size != config.hidden_size:
        raise BackboneError(
            f"Histories of {config.max_position_embeddings} items and their thoughts need {needed} positions and a "
            f"width of {config.hidden_size}, and the encoder has {inner.max_position_embeddings} and "
            f"{inner.hidden_size}. Make the config with ReasoningConfig.around."
        )
