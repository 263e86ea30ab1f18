"""The flags of latent reasoning: how an encoder thinks, and what it learns that by."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from llmrec.exceptions import BackboneError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmrec.losses.loss import ItemLoss
    from llmrec.reasoning.tasks import StepTask
    from llmrec.sequence.arguments import EncoderArguments
    from llmrec.sequence.events import EventConfig

_STEPS, _BLOCK = 2, 4


@dataclass
class ReasoningArguments:
    """Whether and how a sequence model thinks before it answers."""

    reasoning: Literal["none", "erl", "prl", "block"] = field(
        default="none",
        metadata={
            "help": "erl: answers with the mean of all steps, which are to differ; prl: with the last step, each "
            "surer than the one before (ReaRec); block: feeds back several states at once, and each step has a task "
            "(OnePiece)."
        },
    )
    reasoning_steps: int | None = field(
        default=None, metadata={"help": f"K, steps of thought; 0: the encoder as it is; default: {_STEPS}."}
    )
    reasoning_block: int | None = field(
        default=None, metadata={"help": f"block: states that are fed back at once; default: {_BLOCK}."}
    )
    reasoning_diversity: float | None = field(
        default=None, metadata={"help": "erl: lambda, what the steps' difference counts; default: 0.01."}
    )
    reasoning_alpha: float | None = field(
        default=None,
        metadata={"help": "prl: step k of K has the temperature times alpha^(K - k); default: 1.2."},
    )
    reasoning_noise: float | None = field(
        default=None, metadata={"help": "prl: gamma, variance of the noise of contrasted thoughts; default: 0.01."}
    )
    reasoning_contrast: float | None = field(
        default=None, metadata={"help": "prl: what the contrast with noised thoughts counts; default: 0.1."}
    )
    reasoning_tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "block: what each step is to find, and what that counts: any=1 like=1 buy=2 for three steps (any: "
            "the next item, whatever is done with it); default: all of them the next item."
        },
    )

    def check(self) -> None:
        """Raises RecipeError for flags that do not go together."""
        owners = {
            "steps": ("erl", "prl", "block"), "block": ("block",), "diversity": ("erl",), "alpha": ("prl",),
            "noise": ("prl",), "contrast": ("prl",), "tasks": ("block",),
        }  # fmt: skip
        if self.reasoning not in ("none", *owners["steps"]):
            raise RecipeError(f"--reasoning is {self.reasoning!r}. Choose none, erl, prl or block.")
        for name, kinds in owners.items():
            if getattr(self, f"reasoning_{name}") is not None and self.reasoning not in kinds:
                raise RecipeError(
                    f"--reasoning_{name} is given, and reasoning {self.reasoning!r} has no use for it. Leave it out, "
                    f"or say --reasoning {kinds[0]}."
                )
        for name, least in (("steps", 0), ("block", 1), ("diversity", 0), ("contrast", 0)):
            value = getattr(self, f"reasoning_{name}")
            if value is not None and not least <= value < float("inf"):
                raise RecipeError(f"--reasoning_{name} is {value}. Give {least} or more.")
        for name in ("alpha", "noise"):
            value = getattr(self, f"reasoning_{name}")
            if value is not None and not 0 < value < float("inf"):
                raise RecipeError(f"--reasoning_{name} is {value}. Give a positive number.")
        if self.reasoning_tasks is not None and len(self._tasks()) != self.steps:
            raise RecipeError(
                f"--reasoning_tasks names {len(self._tasks())} tasks for {self.steps} steps. Give one for each."
            )

    @property
    def steps(self) -> int:
        """K; 0 without reasoning."""
        if self.reasoning == "none":
            return 0
        return _STEPS if self.reasoning_steps is None else self.reasoning_steps

    @property
    def actions(self) -> list[str]:
        """The actions that tasks name; the model has to know them."""
        from llmrec.reasoning.tasks import ANY

        return [name for name, _ in self._tasks() if name != ANY]

    def config(self, encoder: "EncoderArguments", positions: int) -> "PreTrainedConfig":
        """The configuration of the encoder, which thinks if it shall; without steps, the encoder's own.

        Args:
            encoder: the encoder's flags.
            positions: that items and the tokens of their events need.

        Raises:
            RecipeError: if such an encoder cannot think.
        """
        if not self.steps:
            return encoder.config(positions)
        from llmrec.backbones.reasoning import ReasoningConfig

        if encoder.encoder == "bert4rec":
            raise RecipeError(
                f"--reasoning is {self.reasoning!r}, and a bert4rec reads to both sides and is asked by a hidden "
                "item. Choose another encoder."
            )
        block = 1 if self.reasoning != "block" else _BLOCK if self.reasoning_block is None else self.reasoning_block
        if encoder.encoder == "gru4rec" and block > 1:
            raise RecipeError(
                f"A block has {block} thoughts that see one another, and a gru4rec reads one after another. Say "
                "--reasoning_block 1, or choose an encoder that attends."
            )
        return ReasoningConfig.around(
            encoder.config(positions + self.steps * block), self.steps, self.reasoning, block
        )

    def loss(self, loss: "ItemLoss", events: "EventConfig") -> "ItemLoss":
        """The loss of all steps; without steps, the given one.

        Args:
            loss: what a query and its target cost.
            events: of which the tasks' actions are.

        Raises:
            RecipeError: if the loss does not go with this kind of reasoning, or there is no such action.
        """
        if not self.steps:
            return loss
        from llmrec.reasoning.losses import EnsembleLoss, ProgressiveLoss, TaskLoss

        try:
            if self.reasoning == "erl":
                return EnsembleLoss(loss, _or(self.reasoning_diversity, 0.01))
            if self.reasoning == "prl":
                contrast = _or(self.reasoning_contrast, 0.1)
                return ProgressiveLoss(loss, _or(self.reasoning_alpha, 1.2), _or(self.reasoning_noise, 0.01), contrast)
            return TaskLoss(loss, self._of_events(events))
        except BackboneError as error:
            raise RecipeError(f"--reasoning {self.reasoning}: {error}") from error

    def _of_events(self, events: "EventConfig") -> "list[StepTask]":
        from llmrec.reasoning.tasks import ANY, StepTask

        found = []
        for name, weight in self._tasks():
            number = None if name == ANY else events.action(name)
            if number == 0:
                raise RecipeError(
                    f"--reasoning_tasks names {name!r}, and the training interactions have the actions "
                    f"{', '.join(events.actions) or 'none'}. Name one of these, or {ANY}."
                )
            found.append(StepTask(number, weight))
        return found

    def _tasks(self) -> list[tuple[str, float]]:
        found = []
        for entry in self.reasoning_tasks or ():
            name, sign, text = entry.rpartition("=")
            try:
                weight = float(text) if sign else -1.0
            except ValueError:
                weight = -1.0
            if not name or not 0 <= weight < float("inf"):
                raise RecipeError(f"--reasoning_tasks has {entry!r}. Write ACTION=NUMBER, from 0 on.")
            found.append((name, weight))
        return found


def _or(given: float | None, usual: float) -> float:
    return usual if given is None else given
