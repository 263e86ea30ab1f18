"""What a command says while it works: what the library logs, and how far it is, on standard error."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text


class Teller(logging.Handler):
    """Prints what the library logs, above the progress, on standard error; what was said once is not said again."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message in self._said:
            return
        self._said.add(message)
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self._console.print(Text(f"{record.levelname.lower()}: {message}", style=style), soft_wrap=True)


@contextmanager
def observed() -> Iterator[Callable[[str, float | None], None]]:
    """While it lasts, what the library finds out and warns of is printed, and a line says what is going on.

    Both go to standard error. The function that it yields takes what is begun, and how much of it is done, if known.
    """
    console = Console(stderr=True)
    logger, teller = logging.getLogger("llmrec"), Teller(console)
    level = logger.level
    logger.addHandler(teller)
    logger.setLevel(logging.INFO)
    shown = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*shown, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=None)

            def announce(name: str, done: float | None) -> None:
                progress.update(task, description=name, total=None if done is None else 1.0, completed=done or 0.0)

            yield announce
    finally:
        logger.removeHandler(teller)
        logger.setLevel(level)
