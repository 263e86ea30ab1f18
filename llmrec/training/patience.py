"""What a resumed training knows of early stopping: the patience that was left, and that it had ended."""

from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object


class KeptPatience(Trainer):
    """A mixin over `transformers.Trainer`, before `WholeCheckpoints`.

    A training that had ended (its last step, or early stopping) takes no step more when it is resumed, and early
    stopping goes on with the patience that was left at the checkpoint.
    """

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; an early stopping begins with all its patience, wherever else it was used before."""
        for callback in self._early_stoppings():
            callback.early_stopping_patience_counter = 0
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_callback_state(self) -> None:
        """The patience that an early stopping had left at a checkpoint is what it goes on with."""
        super()._load_callback_state()
        stored = self.state.stateful_callbacks.get(EarlyStoppingCallback.__name__, {})
        for callback in self._early_stoppings():
            attributes = (stored[0] if isinstance(stored, list) else stored).get("attributes", {})
            callback.early_stopping_patience_counter = attributes.get("early_stopping_patience_counter", 0)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's; none where a training had ended that is resumed, of which the Trainer takes a step more."""
        if self.state.global_step >= self.state.max_steps or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self._early_stoppings()
        ):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _early_stoppings(self) -> list[EarlyStoppingCallback]:
        return [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
