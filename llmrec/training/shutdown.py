"""What a training does when it is asked to stop: it finishes the step, saves, and says how to go on."""

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ShutdownCallback(TrainerCallback):
    """SIGTERM, or Ctrl-C once: the training finishes its step, saves a checkpoint and stops; a second ends it at once.

        shutdown = ShutdownCallback()
        MyTrainer(..., callbacks=[shutdown]).train()
        shutdown.exit_if_stopped()

    Use it with `WholeCheckpoints`, and as the last callback. The processes of a distributed training agree after every
    step, by one number that is reduced over them, so all stop after the same step, though only one got the signal.
    Schedulers and launchers send one request several times (to the launcher, which forwards it, and to every process):
    what arrives within `together` seconds of the first counts as the first.

    An evaluation that is due after the step takes place first, so that a continued training has the same history as
    one that was not stopped. A checkpoint must be saved before whoever sent the signal loses patience (torchrun waits
    30 s, Kubernetes `terminationGracePeriodSeconds`); if it is not, the one before is there, whole.

    The Trainer's own `enable_jit_checkpoint` is not used: it saves in place, between a step's backward pass and its
    update as well, lets each process decide for itself, waits a fixed time first, knows SIGTERM alone, and the script
    cannot tell that it was stopped.
    """

    def __init__(self, together: float = 3.0) -> None:
        """
        Args:
            together: seconds in which further signals are taken for the first one's echo.
        """
        self.signal: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._since = 0.0
        self._together = together
        self._before: dict[signal.Signals, Any] = {}
        self._saved = -1
        self._step = 0

    @property
    def exit_code(self) -> int | None:
        """128 + the signal's number, as shells count (143 for SIGTERM, 130 for SIGINT); None if none stopped it."""
        return None if self.signal is None else 128 + self.signal

    def exit_if_stopped(self) -> None:
        """Ends the process with `exit_code`, if a signal stopped the training.

        Raises:
            SystemExit: with that code.
        """
        if self.signal is None:
            return
        if _is_first():
            logger.warning(
                "stopped by %s after step %d; the same command continues the training", self.signal.name, self._step
            )
        raise SystemExit(self.exit_code)

    def restore(self) -> None:
        """Gives the signals back to whom they belonged before; `WholeCheckpoints` does it after a crash, too."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.signal, self._received, self._saved = None, None, -1
        if threading.current_thread() is not threading.main_thread():
            logger.warning("the training runs beside the main thread: a signal will end it without a checkpoint")
            return
        for number in _SIGNALS:
            self._before.setdefault(number, signal.getsignal(number))
            signal.signal(number, self._receive)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        number = _largest(0 if self._received is None else self._received, args)
        if number:
            self.signal = signal.Signals(number)
            self._step = state.global_step
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.signal is None:
            return
        if not float(state.epoch or 0.0).is_integer():
            # The Trainer takes the break for the epoch's end; what belongs there would change the run.
            control.should_evaluate = control.should_log = control.should_save = False
        # What belongs to an epoch's end came after the checkpoint and is to be in it; and with save_strategy="best" an
        # evaluation after the step, if it was not the best, has taken back the order to save.
        late = control.should_evaluate or control.should_log or self._saved != state.global_step
        control.should_save = control.should_save or late

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.signal is None:  # it may have come since the last step, in an evaluation or the last save
            self._agree(args, state)
        self.restore()

    def _agree(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether any process got a signal; all processes take the same one for their own."""
        number = _largest(0 if self._received is None else self._received, args)
        if number:
            self.signal, self._step = signal.Signals(number), state.global_step
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received, self._since = signal.Signals(number), time.monotonic()
            if _is_first():
                # Not by a logger, whose stream the signal may have interrupted.
                os.write(2, f"\n{self._received.name}: the training finishes its step, saves and stops\n".encode())
        elif time.monotonic() - self._since > self._together:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _largest(number: int, args: TrainingArguments) -> int:
    """The largest `number` of all processes."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return number
    # On the device that the processes' backend speaks of: NCCL knows no other.
    value = torch.tensor(number, device=args.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)
