"""Runs a command so that nothing of it outlives it: `python -m llmrec.guard [--with-parent PID] -- COMMAND …`.

The process becomes the command. A watcher, forked off before, waits for its end and kills whatever it left running: a
server killed with -9 cannot tidy up after itself, and its engine would live on. With `--with-parent` the command is
killed, too, when the process that started it ends, however that ends.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

MARK = "LLMREC_GUARD"
_PR_SET_PDEATHSIG = 1


def guarded(command: Sequence[str], with_parent: bool = False) -> list[str]:
    """The argument vector that runs `command` under guard; `with_parent` ties it to this process."""
    tie = ["--with-parent", str(os.getpid())] if with_parent else []
    return [sys.executable, "-m", "llmrec.guard", *tie, "--", *command]


def main(arguments: Sequence[str]) -> None:
    """Forks the watcher and becomes the command."""
    options, command = arguments[: arguments.index("--")], list(arguments[arguments.index("--") + 1 :])
    if options and sys.platform == "linux":
        # Kept across exec. The parent may have ended before this call, which then comes too late: hence the check.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(options[1]):
            return
    mark = f"{os.getpid()}.{time.time_ns()}"
    os.environ[MARK] = mark
    guarded_process = psutil.Process()
    if os.fork() == 0:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nowhere, standard)
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # a supervisor's "end all of them" must not end the watcher first
        _watch(guarded_process, mark)
        os._exit(0)
    os.execvp(command[0], command)


def _watch(process: psutil.Process, mark: str) -> None:
    """Notes the descendants of `process` while it lives, and kills those that are left when it has ended."""
    known: set[psutil.Process] = set()
    ended = os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else None
    while True:
        try:
            known |= {child for child in process.children(recursive=True) if child.pid != os.getpid()}
        except psutil.NoSuchProcess:
            break
        known = {child for child in known if _runs(child)}
        if ended is None:
            time.sleep(0.5)
        elif select.select([ended], [], [], 0.5)[0]:
            break
        if not _runs(process):
            break
    quiet = 0
    while quiet < 3:  # a child may be forking another right now
        left = {child for child in known if _runs(child)} | _marked(mark)
        for child in left:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        quiet = 0 if left else quiet + 1
        time.sleep(0.2)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _marked(mark: str) -> set[psutil.Process]:
    """Processes that inherited the command's mark: those born since the last look. (Some hide it behind a title.)"""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark and _runs(process):
                found.add(process)
        except (psutil.Error, OSError):
            continue
    return found


def run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Runs `command` to its end, tied to this process, its output on this terminal; returns its exit code."""
    return subprocess.run(guarded(command, with_parent=True), env=environment, check=False).returncode


if __name__ == "__main__":
    main(sys.argv[1:])
