"""Runs a training for some steps in a process of its own, and measures what it does a second."""

import hashlib
import json
import logging
import os
import platform
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmrec.exceptions import DataError, StageError
from llmrec.guard import guarded
from llmrec.scaling.cost import Cost
from llmrec.scaling.peak import DType, matmul_peak
from llmrec.scaling.throughput import Probe, encoder_name
from llmrec.stages import stage_command
from llmrec.study.launching import launch_options

logger = logging.getLogger(__name__)

STEPS = 50
WARM_UP = 10
_LOGGED = 5  # steps between two lines of the log
_LOOK = 0.002  # seconds between two looks at it
# What is measured is training alone: nothing is evaluated or saved on the way.
_FLAGS = {
    **{"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": "false", "early_stopping": "0"},
    **{"logging_strategy": "steps", "logging_steps": str(_LOGGED), "logging_first_step": "false"},
    **{"disable_tqdm": "true", "fresh": "true"},
}


def probe(
    cost: Cost,
    tokens: float,
    arguments: Sequence[str],
    script: str = "train/seqrec.py",
    *,
    folder: str | Path | None = None,
    dtype: DType = "float32",
    steps: int = STEPS,
    warm_up: int = WARM_UP,
    processes: int = 1,
    max_seconds: float = 3600.0,
) -> Probe:
    """Trains for some steps, and says how fast that was.

    The process is ended as soon as it has logged the last step: what it would save and test is not waited for. What
    it wrote is removed.

    Args:
        cost: of the model that `arguments` describe, on windows as they will be.
        tokens: events that are learnt in an epoch of these data.
        arguments: of the script, without --artefact.
        script: a stage that trains: train/seqrec.py or train/sft.py.
        folder: where probes are kept: one that is there for these arguments, files and this machine is not measured
            again. None: measured each time.
        dtype: what products are computed in; given to the script as its flags of precision.
        steps: of the training, a multiple of 5.
        warm_up: the first of them, which are not measured; likewise.
        processes: of the training, which accelerate starts, as `llmrec.study.runner` does.
        max_seconds: after which the probe is given up.

    Raises:
        StageError: if the training ends, or takes longer, before it has logged its steps, with its last words; or if
            its steps are too short to be timed.
        DataError: if the numbers of steps or events make no sense.
    """
    if not 0 < warm_up < steps or steps % _LOGGED or warm_up % _LOGGED:
        raise DataError(
            f"A probe of {steps} steps after {warm_up} to warm up cannot be measured. Give multiples of {_LOGGED}, "
            "and more steps than warm up."
        )
    cost.flops(tokens)  # refuses what is no training
    if dtype not in ("float32", "bfloat16", "float16"):
        raise DataError(f"Nothing trains in {dtype!r}. Choose float32, bfloat16 or float16.")
    precision = {"bf16": str(dtype == "bfloat16").lower(), "fp16": str(dtype == "float16").lower()}
    flags = [*arguments, *_flags({**_FLAGS, **precision, "max_steps": str(steps)})]
    device, name = _device(flags)
    path = None
    if folder is not None:
        described = [script, flags, name, dtype, steps, warm_up, processes, asdict(cost.shape), tokens]
        path = Path(folder) / f"probe-{_digest(described, arguments)}.json"
        if path.is_file():
            logger.info("the probe is taken from %s", path)
            return Probe.load(path)
    times, epoch = _trained(script, flags, steps, processes, max_seconds)
    each = (times[steps] - times[warm_up]) / (steps - warm_up)
    if not each > 0:
        raise StageError(
            f"The probe's {steps} steps went by between two looks at them, so that they have no time. Give it more."
        )
    learnt = tokens * epoch / steps
    operations = cost.flops_per_token * learnt
    peak = processes * matmul_peak(device, dtype)
    found = Probe(
        encoder=encoder_name(cost),
        depth=cost.shape.depth,
        width=cost.shape.width,
        seconds_per_step=each,
        startup_seconds=max(0.0, times[_LOGGED] - _LOGGED * each),
        tokens_per_step=learnt,
        flops_per_step=operations,
        flops_per_second=operations / each,
        peak=peak,
        mfu=operations / each / peak,
        device=name,
        dtype=dtype,
        steps=steps - warm_up,
        processes=processes,
    )
    if path is not None:
        found.save(path)
    return found


def _trained(
    script: str, flags: Sequence[str], steps: int, processes: int, max_seconds: float
) -> tuple[dict[int, float], float]:
    """Seconds from the start to each logged step, and the epochs that all of them were."""
    # Before the clock runs: it imports transformers, which takes its time.
    from llmrec.training.curve import LOG_FILE

    with tempfile.TemporaryDirectory(prefix="llmrec-probe-") as name:
        place = Path(name)
        told = _flags({"artefact": str(place / "artefact"), "output_dir": str(place / "training")})
        command = stage_command(script, [*flags, *told], "accelerate", launch_options(processes))
        begun = time.monotonic()
        with open(place / "log.txt", "wb") as log:
            # A session of its own, so that all of it can be ended at once.
            child = subprocess.Popen(
                guarded(command, with_parent=True),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return _watched(child, place, place / "training" / LOG_FILE, steps, begun, max_seconds)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _watched(
    child: "subprocess.Popen[bytes]", place: Path, path: Path, steps: int, begun: float, max_seconds: float
) -> tuple[dict[int, float], float]:
    from llmrec.training.curve import read_log

    size, times = 0, dict[int, float]()
    while True:
        ended = child.poll() is not None  # before the look, so that what was written last is seen
        now = time.monotonic() - begun
        if path.is_file() and path.stat().st_size != size:
            size = path.stat().st_size
            for line in read_log(path):
                times.setdefault(line["step"], now)
                if line["step"] >= steps:
                    return times, float(line["epoch"])
        if ended or now > max_seconds:
            lines = (place / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
            last = [line for line in lines if line.strip()][-1:] or ["none"]
            why = f"ended with code {child.returncode}" if ended else f"took more than {max_seconds:g} seconds"
            raise StageError(
                f"The probe's training {why} after step {max(times, default=0)} of {steps}, with the words: "
                f"{last[0].strip()} Mend its arguments, or give it more time."
            )
        time.sleep(_LOOK)


def _device(flags: Sequence[str]) -> tuple[str, str]:
    """The device that a training takes, as torch calls it, and its name with the threads that a CPU has."""
    import torch

    # A flag may stand with its value in one word or two; without a value it is true.
    words = [word for flag in flags for word in flag.split("=", 1)]
    cpu = any(_recipe(path).get("use_cpu") for flag, path in pairwise(words) if flag == "--config")
    for place, word in enumerate(words):
        if word == "--use_cpu":
            cpu = words[place + 1 : place + 2] not in (["false"], ["False"])
    if torch.cuda.is_available() and not cpu:
        return "cuda", torch.cuda.get_device_name()
    return "cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _recipe(path: str) -> dict[str, Any]:
    """The values of a recipe; none, if it cannot be read, which the script itself complains of."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _flags(values: dict[str, str]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def _digest(described: object, arguments: Sequence[str]) -> str:
    """Sixteen letters of a hash of what decides a probe: the files that arguments name by what is in them."""
    import torch
    import transformers

    from llmrec.study.place import first_digest

    files = {word: first_digest(word) for word in arguments if Path(word).exists()}
    versions = [torch.__version__, transformers.__version__, platform.node()]
    text = json.dumps([described, files, versions], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
