"""How large a recommender is, and how long it takes to answer: of several in turns, so that they share what disturbs.

Times are of `recommend_rows` in this process: prompts, model and search, without a server. They are of this machine
and hour; only those of one call of `latencies` may be compared.
"""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.exceptions import DataError

if TYPE_CHECKING:
    from llmrec.recommender import Recommender

BATCH_SIZES = (1, 32)
WARM_UPS = 2  # requests before the first that counts


def size_of(model: Any) -> dict[str, int]:
    """Parameters, each counted once, and the bytes that they and the buffers take."""
    parameters = {id(one): one for one in model.parameters()}.values()
    buffers = {id(one): one for one in model.buffers()}.values()
    held = sum(one.numel() * one.element_size() for one in (*parameters, *buffers))
    return {"parameters": sum(one.numel() for one in parameters), "bytes": held}


def latencies(
    recommenders: Mapping[str, "Recommender"],
    histories: Sequence[Sequence[int]] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repetitions: int = 20,
    k: int = 10,
    seed: int = 0,
    announce: Callable[[str, float | None], None] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of each recommender's calls, by name and then by batch size.

    The recommenders take turns: each round asks all of them the same histories, beginning with another one each time.
    The first `WARM_UPS` rounds do not count.

    Args:
        recommenders: by name.
        histories: catalog rows, from which each round draws; None: of as many random items as a recommender reads at
            most, the longest that it can be asked.
        batch_sizes: histories of a call.
        repetitions: rounds that count, of each batch size.
        k: items that are asked for.
        seed: of the histories.
        announce: is told what is measured, and how much is done.

    Returns:
        By name and batch size ("1"): `median`, `low` and `high` (quartiles), `per_history` (the median divided by the
        batch size), all in milliseconds, and `repetitions`.

    Raises:
        DataError: if there is nothing to ask, or fewer than one repetition or history in a batch.
    """
    if repetitions < 1 or min(batch_sizes, default=0) < 1 or (histories is not None and not len(histories)):
        raise DataError(
            f"{repetitions} repetitions of batches of {list(batch_sizes)} measure nothing. Give one or more of each, "
            "and at least one history."
        )
    generator = np.random.default_rng(seed)
    names = list(recommenders)
    taken: dict[tuple[str, int], list[float]] = {(name, size): [] for name in names for size in batch_sizes}
    rounds = repetitions + WARM_UPS
    for place, size in enumerate(batch_sizes):
        for turn in range(rounds):
            drawn = generator.integers(2**31, size=size)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                asked = _asked(recommenders[name], histories, drawn)
                begun = time.perf_counter()
                recommenders[name].recommend_rows(asked, k)
                seconds = time.perf_counter() - begun
                if turn >= WARM_UPS:
                    taken[name, size].append(1000 * seconds)
            if announce is not None:
                announce(f"timing batches of {size}", (place * rounds + turn + 1) / (rounds * len(batch_sizes)))
    return {name: {str(size): _described(taken[name, size], size) for size in batch_sizes} for name in names}


def this_machine() -> dict[str, Any]:
    """What the times are of: processor, cores, threads, GPU, load, versions."""
    import torch
    import transformers

    import llmrec

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {package.__name__: str(package.__version__) for package in (llmrec, torch, transformers)},
    }


def _asked(
    recommender: "Recommender", histories: Sequence[Sequence[int]] | None, drawn: "np.ndarray[Any, Any]"
) -> list[list[int]]:
    if histories is not None:
        return [list(histories[int(number) % len(histories)]) for number in drawn]
    length, items = recommender.settings.max_history, len(recommender.catalog)
    return [np.random.default_rng(int(number)).integers(items, size=length).tolist() for number in drawn]


def _described(milliseconds: Sequence[float], size: int) -> dict[str, float]:
    low, median, high = np.quantile(milliseconds, [0.25, 0.5, 0.75]).tolist()
    return {
        "median": median,
        "low": low,
        "high": high,
        "per_history": median / size,
        "repetitions": len(milliseconds),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
