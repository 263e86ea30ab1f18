"""What every stage's script does alike: reads a recipe and flags, logs, and ends an error with a message."""

import difflib
import errno
import gc
import logging
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llmrec.exceptions import LLMRecError, RecipeError

if TYPE_CHECKING:
    from trl import TrlParser

CONFIG = "--config"


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
    # PEFT imports bitsandbytes wherever it is installed, which then warns of a kernel that speeds up nothing here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from trl import TrlParser

    return TrlParser(list(arguments), description=description, formatter_class=_Formatter)


def parse(arguments: "TrlParser", argv: Sequence[str]) -> tuple[Any, ...]:
    """The dataclasses that a command line asks for.

    Mistakes in a recipe are found before a dataclass is made, because argparse takes a recipe's values as defaults,
    which it does not check.

    Raises:
        RecipeError: if the recipe cannot be read, or it or the command line names what the script does not know, or
            values do not go together.
    """
    recipe, flags = _recipe(list(argv))
    if recipe is not None:
        _check_recipe(arguments, recipe, _read_recipe(recipe))
    known = {flag for action in arguments._actions for flag in action.option_strings}
    for flag in flags:
        name = flag.partition("=")[0]
        # A negative number is a value; an unambiguous beginning of a flag is taken by argparse.
        if name.startswith("--") and not any(candidate.startswith(name) for candidate in known):
            raise RecipeError(f"There is no flag {name}. {_nearest(name, known)}")
    config = [] if recipe is None else [CONFIG, recipe]
    try:
        parsed: tuple[Any, ...] = arguments.parse_args_and_config([*config, *flags], fail_with_unknown_args=True)
    except (ValueError, ImportError) as error:
        # What a dataclass says of values that do not go together, such as transformers' of precisions and devices.
        raise RecipeError(f"These flags do not go together: {' '.join(str(error).split())} Change one of them.") from (
            error
        )
    return parsed


def run(main: Callable[..., None], arguments: "TrlParser") -> None:
    """Calls `main` with what the command line says; an LLMRecError becomes one line on stderr and exit code 1.

    So does a disk without room. Processes that main shared its work with are left in order (`leave_processes`).
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("llmrec").setLevel(logging.INFO)
    codes: list[Any] = []
    try:
        main(*parse(arguments, sys.argv[1:]))
    except SystemExit as stop:
        codes.append(stop.code)  # alone: the exception holds the frames, and these what was trained
    except LLMRecError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if not _is_out_of_room(error):
            raise
        sys.exit(
            f"error: A file could not be written: {error}. Make room on that disk, and start the same command again."
        )
    leave_processes()
    if codes:
        sys.exit(codes[0])


def leave_processes() -> None:
    """Leaves gloo's process group, so that its threads end, after work that ended or that all agreed to stop.

    Where they still run when the interpreter is gone, a process is now and then aborted that had done all its work.
    NCCL's is left as it is: to destroy it, all processes would have to wait for the first one's last words.
    """
    distributed = sys.modules.get("torch.distributed")  # a script without it is not to load it at its end
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_backend() == "gloo":
        gc.collect()  # a Trainer refers to itself, and its model to the group
        distributed.destroy_process_group()


def _is_out_of_room(error: Exception) -> bool:
    """Whether a disk is full, a quota used up or a file too large; safetensors tells it in words."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in numbers
    return type(error).__name__ == "SafetensorError" and any(f"os error {number})" in str(error) for number in numbers)


def _recipe(argv: list[str]) -> tuple[str | None, list[str]]:
    """The recipe's path, and the flags without it."""
    for place, word in enumerate(argv):
        if word == CONFIG:
            if place + 1 == len(argv):
                raise RecipeError(f"{CONFIG} names no file. Write {CONFIG} RECIPE.yaml.")
            return argv[place + 1], argv[:place] + argv[place + 2 :]
        if word.startswith(f"{CONFIG}="):
            return word.partition("=")[2], argv[:place] + argv[place + 1 :]
    return None, argv


def _read_recipe(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"The recipe {path} cannot be read: {reason}. Give a YAML file.") from error
    if not isinstance(values, dict):
        raise RecipeError(f"The recipe {path} holds no names with values. Write lines such as learning_rate: 0.001.")
    return values


def _check_recipe(arguments: "TrlParser", path: str, values: dict[Any, Any]) -> None:
    actions = {action.dest: action for action in arguments._actions}
    for name, value in values.items():
        if name == "env":  # environment variables, which TrlParser sets
            continue
        if name not in actions:
            raise RecipeError(f"The recipe {path} has an unknown key {name!r}. {_nearest(str(name), actions)}")
        choices = actions[name].choices
        given = value if isinstance(value, list) else [value]
        if choices is not None and any(one is not None and one not in choices for one in given):
            allowed = ", ".join(map(str, choices))
            raise RecipeError(f"The recipe {path} says {name}: {value}. Choose one of {allowed}.")


def _nearest(name: str, known: Any) -> str:
    """What to do about an unknown name."""
    near = difflib.get_close_matches(name, [str(other) for other in known], n=1)
    return f"Did you mean {near[0]}?" if near else "See --help for all there are."
