"""StudyRunner: runs a plan's trainings one after another, each a process of its own, and goes on where it stopped."""

import fcntl
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from llmrec.exceptions import StageError
from llmrec.guard import guarded
from llmrec.stages import stage_command
from llmrec.storage import atomic_path
from llmrec.study.launching import launch_options
from llmrec.study.place import LOG, METRICS, RunPlace
from llmrec.study.plan import StudyRun

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK = 0.2  # seconds between two looks at a running training
_SAY = 60.0  # seconds between two sentences about it
_TOGETHER = 3.0  # seconds in which a further signal is the first one's echo
RECIPE = "recipe.yaml"


class StudyRunner:
    """Runs a study's trainings in the order of the plan.

    A run that is done is not repeated; one that was interrupted is started again and continues from its checkpoint;
    one that failed is recorded, and the others go on. SIGTERM, or Ctrl-C, goes to the training, which saves and ends,
    and no further one begins; a second signal kills it. A training does not outlive this process, however that ends.
    """

    def __init__(
        self,
        folder: str | Path,
        runs: Sequence[StudyRun],
        script: str = "train/seqrec.py",
        processes: int = 1,
        finished: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            folder: of the study; each run gets a folder in it.
            runs: in the order in which they are to be run.
            script: the stage that trains, which takes --config, --artefact and the runs' flags.
            processes: of each training, which accelerate starts.
            finished: called after each run, and when all is over.
        """
        self.folder = Path(folder)
        self.places = [RunPlace(self.folder, run) for run in runs]
        self.script, self.processes, self.finished = script, processes, finished
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def left(self) -> list[RunPlace]:
        """The places of the runs that are not done."""
        return [place for place in self.places if place.state() != "done"]

    def seconds_left(self) -> float | None:
        """An estimate for what is left: by what done runs took that differ in the seed alone, else by all; or None."""
        by_cell: dict[str, list[float]] = {}
        for place in self.places:
            if place.state() == "done":
                by_cell.setdefault(place.run.cell, []).append(float(place.record()["seconds"]))
        every = [seconds for taken in by_cell.values() for seconds in taken]
        if not every:
            return None
        total = 0.0
        for place in self.left:
            alike = by_cell.get(place.run.cell, every)
            total += max(0.0, sum(alike) / len(alike) - float(place.record().get("seconds", 0.0)))
        return total

    def run(self, max_minutes: float = 0.0) -> int:
        """Runs what is left.

        Args:
            max_minutes: after which no further run begins; 0: no limit.

        Returns:
            0 if all runs that were begun are done, 1 if one failed, 128 + the signal's number if one stopped it.

        Raises:
            StageError: if another process is running this study, or runs of it were trained by another number of
                processes, which is another batch.
        """
        self.check_processes()
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        failed = written = False
        with open(self.folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StageError(f"A study is running in {self.folder}. Wait for it, or name another.") from error
            before = self._take_signals()
            try:
                for number, place in enumerate(self.places, 1):
                    if self.signal is not None:
                        break
                    if place.state() == "done":
                        continue
                    if max_minutes and time.monotonic() - begun >= 60 * max_minutes:
                        logger.info("%g minutes are over: no further run begins", max_minutes)
                        break
                    left = self.seconds_left()
                    logger.info(
                        "[%d/%d] %s, seed %d%s",
                        *(number, len(self.places), place.run.cell, place.run.seed),
                        "" if left is None else f" (about {duration(left)} for all that is left)",
                    )
                    failed |= not self._train(place)
                    written = self.signal is None  # who stops a study waits for one writing, not for two
                    if self.finished is not None and written:
                        self.finished()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        if self.finished is not None and not written:
            self.finished()
        if self.signal is not None:
            logger.warning("stopped by %s; the same command continues the study", self.signal.name)
            return 128 + self.signal
        return 1 if failed else 0

    def check_processes(self) -> None:
        """Raises StageError if runs of it that are done were trained by another number of processes."""
        for place in self.places:
            found = (place.metrics() or {}).get("training", {}).get("trainer", {}).get("world_size", self.processes)
            if found != self.processes:
                raise StageError(
                    f"{place.folder} was trained by {found} process(es), and --processes is {self.processes}, which "
                    f"makes other batches. Say --processes {found}, or name another folder."
                )

    def _train(self, place: RunPlace) -> bool:
        """One training; whether it did not fail."""
        place.folder.mkdir(parents=True, exist_ok=True)
        place.note()
        write_recipe(place)
        arguments = ["--config", str(place.folder / RECIPE), "--artefact", str(place.artefact)]
        command = stage_command(self.script, arguments, "accelerate", launch_options(self.processes))
        begun = time.monotonic()
        with open(place.folder / LOG, "ab") as log:
            # A session of its own: what is typed at the terminal reaches it through this process alone, once.
            self._child = subprocess.Popen(
                guarded(command, with_parent=True),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            if self.signal is not None:  # it came before there was whom to tell
                self._pass_on(self.signal)
            code = self._wait(place)
        taken = time.monotonic() - begun
        if self.signal is not None and code != 0:
            place.note(taken)
            return True
        place.note(taken)
        if code == 0 and place.metrics() is not None:
            logger.info("%s, seed %d: done in %s", place.run.cell, place.run.seed, duration(taken))
            return True
        why = f"it ended with code {code}"
        if code == 0:
            why = _what_is_wrong(place)
        lines = place.last_lines()
        place.note(failed={"code": code, "why": why, "lines": lines})
        logger.error(
            "%s, seed %d failed: %s. %s; the study goes on. Its last words: %s",
            *(place.run.cell, place.run.seed, why, place.folder / LOG, lines[-1] if lines else "none"),
        )
        return False

    def _wait(self, place: RunPlace) -> int:
        assert self._child is not None
        said = time.monotonic()
        while (code := self._child.poll()) is None:
            time.sleep(_LOOK)
            if time.monotonic() - said >= _SAY:
                said = time.monotonic()
                if progress := _progress(place):
                    logger.info("  %s", progress)
        self._child = None
        return code

    def _take_signals(self) -> dict[signal.Signals, Any]:
        """Whose the signals were before; none are taken beside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
            self._pass_on(self.signal)
        elif time.monotonic() - self._since > _TOGETHER:
            self._pass_on(signal.SIGKILL)

    def _pass_on(self, number: signal.Signals) -> None:
        if self._child is None or self._child.poll() is not None:
            return
        if number != signal.SIGKILL and self.processes == 1 and (training := _behind(self._child.pid)):
            # accelerate waits for a single process no longer once it has the signal, which has yet to save.
            for process in training:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
            return
        try:
            os.killpg(self._child.pid, number)
        except ProcessLookupError:  # it ended in between, or its session has not begun, and it gets none
            self._child.send_signal(number)


def _behind(launcher: int) -> list[int]:
    """The processes that a launcher has started in the session that it leads."""
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process(launcher).children(recursive=True):
            with suppress(ProcessLookupError):
                if os.getpgid(process.pid) == launcher:
                    found.append(process.pid)
    return found


def write_recipe(place: RunPlace) -> Path:
    """The run's flags as a recipe in its folder."""
    import yaml

    # Progress bars would fill the log.
    values = {"disable_tqdm": True, **place.run.flags, "system": place.run.cell}
    path = place.folder / RECIPE
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def duration(seconds: float) -> str:
    """Seconds as a reader takes them in.

    >>> duration(42), duration(150), duration(9000)
    ('42 s', '2.5 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.3g} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"


def _what_is_wrong(place: RunPlace) -> str:
    """Why a script that ended well has left no result."""
    import json

    path = place.folder / METRICS
    if not path.is_file():
        return f"it wrote no {METRICS}"
    try:
        return place.disagreement(json.loads(path.read_text(encoding="utf-8"))) or f"{METRICS} has no test"
    except (OSError, ValueError):
        return f"{METRICS} cannot be read"


def _progress(place: RunPlace) -> str:
    """How far a training is, by what it logged last."""
    from llmrec.training.curve import LOG_FILE, read_log

    lines = read_log(Path(f"{place.artefact}.checkpoints") / LOG_FILE)
    if not lines:
        return ""
    measured = [line for line in lines if "eval_NDCG@10" in line]
    best = f", validation NDCG@10 {measured[-1]['eval_NDCG@10']:.4f}" if measured else ""
    return f"epoch {lines[-1].get('epoch') or 0:.4g}, step {lines[-1]['step']}{best}"
