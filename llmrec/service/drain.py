"""A server's polite end: new work is refused at once, what is being answered is answered, then the process ends.

The first SIGTERM or SIGINT begins it, a second one ends it early, and after a limit it ends by itself. Also here, the
impolite one: a server whose engine has died ends with an exit code for which supervisors start it again.
"""

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from signal import SIGINT, SIGTERM
from types import FrameType
from typing import Any, Protocol

import uvicorn

logger = logging.getLogger(__name__)

DEFAULT_DRAIN_SECONDS = 30.0
# What the end itself may take when nothing is being answered any more: writing last bytes, ending child processes.
END_SECONDS = 5.0
# What answers of "the engine has died" may take to reach their clients.
_LAST_WORDS = 2.0
_POLL = 0.05


class Drained(Protocol):
    """What is brought to an end.

    Attributes:
        draining: set here; from then on new work is refused (503 with Retry-After) and `/ready` answers 503.
        in_flight: requests that were accepted and have not been answered.
    """

    draining: bool
    in_flight: int


class Drain:
    """One drain of one service; safe to use from any thread."""

    def __init__(self, service: Drained, seconds: float) -> None:
        self._service = service
        self._seconds = seconds
        self._hurried = threading.Event()
        self._deadline: float | None = None

    @property
    def begun(self) -> bool:
        return self._deadline is not None

    @property
    def done(self) -> bool:
        """Whether it has begun, and nothing is being answered any more or the time for that is over."""
        if self._deadline is None:
            return False
        return self._service.in_flight == 0 or self._hurried.is_set() or time.monotonic() >= self._deadline

    def begin(self) -> None:
        """Refuses new work from here on; again: stops waiting for the old."""
        if self.begun:
            self._hurried.set()
            return
        self._service.draining = True
        self._deadline = time.monotonic() + self._seconds
        logger.info("Stopping: %d requests are being answered, no new one is accepted", self._service.in_flight)
        # Whatever hangs then, a thread or a client that never reads its answer: the promise is that the process ends.
        _after(self._seconds + 2 * END_SECONDS, "The server did not end by itself within its limit")

    @property
    def patience(self) -> float:
        """Seconds for what is left when it is done: bytes on their way, or answers that nobody waits for any more."""
        return 0.0 if self._service.in_flight else END_SECONDS

    def wait(self) -> None:
        """Returns once it is done; not for the thread of the event loop, which has answers to give."""
        while not self.done:
            self._hurried.wait(_POLL)
        if self._service.in_flight:
            logger.warning("Stopped with %d requests unanswered", self._service.in_flight)


def install(engine_client: Any, service: Drained, seconds: float, state: Any = None) -> None:
    """Makes a server of vLLM's drain before it ends, and end with exit code 1 when its engine has died.

    vLLM puts its own signal handlers in place after plugins have been loaded; what they call first is
    `engine_client.shutdown`, on a thread beside the event loop, which goes on answering. So that is where to wait.

    Args:
        engine_client: vLLM's; its `shutdown` is replaced on this instance.
        service: what is drained.
        seconds: the limit.
        state: the application's state, where vLLM keeps its HTTP server (`state.server`).

    Must be called on the event loop (in a plugin's `init_state`).
    """
    loop = asyncio.get_running_loop()
    drain = Drain(service, seconds)
    shutdown: Callable[..., None] = engine_client.shutdown

    def hear_again() -> None:
        for signal in (SIGTERM, SIGINT):  # vLLM's handlers take no notice of a second signal
            loop.add_signal_handler(signal, drain.begin)

    def drained_shutdown(timeout: float | None = None) -> None:
        if not drain.begun and not _on_loop():
            drain.begin()
            loop.call_soon_threadsafe(hear_again)
            drain.wait()
            if (server := getattr(state, "server", None)) is not None:
                server.config.timeout_graceful_shutdown = drain.patience
        shutdown(timeout=END_SECONDS if drain.begun else timeout)

    engine_client.shutdown = drained_shutdown
    watch = loop.create_task(_end_with(engine_client, service, drain))
    if state is not None:
        state.llmrec_watch = watch  # the loop itself keeps tasks by weak references only


async def _end_with(engine_client: Any, service: Drained, drain: Drain) -> None:
    """Ends the process when the engine has died. vLLM would notice within 5 s, and then end with exit code 0."""
    while not engine_client.errored:
        await asyncio.sleep(5 * _POLL)
    if drain.begun:
        return
    service.draining = True
    logger.critical("The engine has died, and the server with it. What it said before is above; start it again.")
    begin = time.monotonic()
    while service.in_flight and time.monotonic() < begin + _LAST_WORDS:
        await asyncio.sleep(_POLL)
    await asyncio.sleep(2 * _POLL)
    _end()


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which by itself would close its port at the first signal and leave requests unrefused."""

    def __init__(self, config: uvicorn.Config, service: Drained, seconds: float) -> None:
        super().__init__(config)
        self._drain = Drain(service, seconds)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._drain.begin()

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; whether to end."""
        if self._drain.done:
            self.config.timeout_graceful_shutdown = self._drain.patience  # type: ignore[assignment]  # of asyncio's
            self.should_exit = True
        return await super().on_tick(counter)


def _on_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _after(seconds: float, reason: str) -> None:
    def give_up() -> None:
        logger.critical("%s; it is ended.", reason)
        _end()

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()


def _end() -> None:
    """Ends the process as it stands, with exit code 1."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
