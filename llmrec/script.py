"""What every stage's script does alike: reads a recipe and flags, logs, and ends an error with a message."""

import logging
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llmrec.exceptions import LLMRecError

if TYPE_CHECKING:
    from trl import TrlParser


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps a script's examples as they are written, and shows defaults."""


def parser(arguments: Sequence[type], description: str | None) -> "TrlParser":
    """A parser of `--config RECIPE.yaml` and flags, flags first, into one instance of each dataclass.

    Args:
        arguments: the dataclasses.
        description: the script's docstring, shown by --help with its examples.
    """
    # Threads that wait by spinning take the cores from those that work, wherever there are fewer free cores than
    # threads; OpenMP reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from trl import TrlParser

    return TrlParser(list(arguments), description=description, formatter_class=_Formatter)


def run(main: Callable[..., None], arguments: "TrlParser") -> None:
    """Calls `main` with what the command line says; an LLMRecError becomes one line on stderr and exit code 1."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("llmrec").setLevel(logging.INFO)
    parsed: tuple[Any, ...] = arguments.parse_args_and_config(fail_with_unknown_args=True)
    try:
        main(*parsed)
    except LLMRecError as error:
        sys.exit(f"error: {error}")
