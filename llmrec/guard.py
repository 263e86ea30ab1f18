"""Runs a command so that nothing of it outlives it: `python -m llmrec.guard [--with-parent PID] -- COMMAND …`.

The process becomes the command. Two watchers, forked off before, wait for its end and kill whatever it left running: a
server killed with -9 cannot tidy up after itself, and its engine would live on. Each watcher also watches the other,
and puts a new one in the place of one that was killed. With `--with-parent` the command is killed, too, when the
process that started it ends, however that ends.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

MARK = "LLMREC_GUARD"
_PR_SET_PDEATHSIG = 1
_LOOK = 1.0  # seconds between two looks at what a command has started


def guarded(command: Sequence[str], with_parent: bool = False) -> list[str]:
    """The argument vector that runs `command` under guard; `with_parent` ties it to this process."""
    tie = ["--with-parent", str(os.getpid())] if with_parent else []
    return [sys.executable, "-m", "llmrec.guard", *tie, "--", *command]


def scratch_folder() -> Path:
    """Makes a folder for what a command needs while it runs; under guard it is removed when the command has ended.

    Raises:
        OSError: if it cannot be made, or is there already.
    """
    if (mark := os.environ.get(MARK)) is None:
        return Path(tempfile.mkdtemp(prefix="llmrec-"))
    folder = _scratch(mark)
    folder.mkdir(mode=0o700)
    return folder


def main(arguments: Sequence[str]) -> None:
    """Forks the watchers and becomes the command."""
    options, command = arguments[: arguments.index("--")], list(arguments[arguments.index("--") + 1 :])
    if options and sys.platform == "linux":
        # Kept across exec. The parent may have ended before this call, which then comes too late: hence the check.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(options[1]):
            return
    mark = f"{os.getpid()}.{time.time_ns()}"
    os.environ[MARK] = mark
    guarded_process = psutil.Process()
    session = os.getpid() if os.getsid(0) == os.getpid() else None  # one that it leads, and not a terminal's
    if os.fork() == 0:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nowhere, standard)
        # A supervisor's "end all of them" must not end the watchers first. One that is killed leaves no zombie.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        _Watcher(guarded_process, mark, session).run()
        os._exit(0)
    os.execvp(command[0], command)


class _Watcher:
    """One of the two that wait for a process's end."""

    def __init__(self, process: psutil.Process, mark: str, session: int | None) -> None:
        self._process = process
        self._mark = mark
        self._session = session
        self._known: set[psutil.Process] = set()
        self._ended = end_of(process.pid)
        self._other: psutil.Process | None = None
        self._other_ended: int | None = None

    def run(self) -> None:
        """Notes the descendants of the process while it lives, and kills those that are left when it has ended."""
        while _runs(self._process):
            if self._other is None or not _runs(self._other):
                self._fork()
            try:
                found = set(self._process.children(recursive=True))
            except psutil.NoSuchProcess:
                break
            self._known = {child for child in self._known | found if self._is_prey(child)}
            ends = [end for end in (self._ended, self._other_ended) if end is not None]
            if len(ends) == 2:
                select.select(ends, [], [], _LOOK)
            else:
                time.sleep(_LOOK / 10)
        self._clear()

    def _fork(self) -> None:
        """Puts another watcher beside this one, or in the place of the one that was there; returns in both."""
        if self._other_ended is not None:
            os.close(self._other_ended)
            self._other_ended = None
        this = psutil.Process()
        pid = os.fork()
        try:
            self._other = psutil.Process(pid) if pid else this
        except psutil.NoSuchProcess:
            self._other = None  # killed already: the next round forks again
            return
        if pid == 0:
            os.setsid()
        self._other_ended = end_of(self._other.pid)

    def _clear(self) -> None:
        quiet = 0
        while quiet < 3:  # a child may be forking another right now
            left = {child for child in self._known | self._kin() if self._is_prey(child)}
            for child in left:
                try:
                    child.kill()
                except psutil.NoSuchProcess:
                    continue
            quiet = 0 if left else quiet + 1
            time.sleep(0.2)
        shutil.rmtree(_scratch(self._mark), ignore_errors=True)

    def _is_prey(self, process: psutil.Process) -> bool:
        return process.pid != os.getpid() and process != self._other and _runs(process)

    def _kin(self) -> set[psutil.Process]:
        """Processes that inherited the command's mark or session: those born since the last look.

        Some hide the mark behind a title, and some leave the session; hardly any does both within that second.
        """
        found = set()
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self._session or process.environ().get(MARK) == self._mark:
                    found.add(process)
            except (psutil.Error, OSError):
                continue
        return found


def _scratch(mark: str) -> Path:
    return Path(tempfile.gettempdir()) / f"llmrec-{mark}"


def end_of(pid: int) -> int | None:
    """A file descriptor that becomes readable when the process ends; None where there is no such thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Runs `command` to its end, tied to this process, its output on this terminal; returns its exit code."""
    return subprocess.run(guarded(command, with_parent=True), env=environment, check=False).returncode


if __name__ == "__main__":
    main(sys.argv[1:])
