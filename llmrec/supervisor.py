"""A server's parent: `python -m llmrec.supervisor --url URL [--restarts N] … -- COMMAND …`.

It says how a start gets on, hands the server's log through, and forwards signals; when the server ends without having
been asked to, it says why and, if it may, starts it again. The two die together: the server when this process is
killed, however, and this process when the server has ended for good, with the server's exit code.

A small process: nothing heavy is imported here, and it lives as long as the server.
"""

import argparse
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from llmrec.guard import end_of, guarded
from llmrec.probe import api_key, is_ready
from llmrec.server_log import ServerLog

_PR_SET_CHILD_SUBREAPER = 36
# A server that was ready for so long did not fail because of how it was started.
_SETTLED = 60.0
_LONGEST_PAUSE = 30.0
# What the server may take beyond its own limit for stopping, before it is killed; and one that never was ready, which
# may be deaf to signals while it loads a model, and has nobody to answer.
_MERCY, _MERCY_AT_START = 15.0, 3.0


@dataclass(frozen=True)
class Plan:
    """What to supervise, and how.

    Attributes:
        command: the server's; it is run under guard.
        url: where it will listen.
        restarts: how often in a row it may be started again without ever having been ready for a minute; 0: never
            started again at all.
        drain_seconds: what the server takes at most to stop when asked to.
        quiet: the server's log does not appear on this terminal.
        log_file: to which the log is appended, too.
        launch: what the server's `/ready` repeats, and no other server's; "" for any.
        since: `time.monotonic()` of the command's begin, from which the times of the start are counted.
    """

    command: Sequence[str]
    url: str
    restarts: int = 0
    drain_seconds: float = 30.0
    quiet: bool = False
    log_file: Path | None = None
    launch: str = ""
    since: float = field(default_factory=time.monotonic)


class Supervisor:
    """Runs a plan; `run` is to be called on the main thread, once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping: float | None = None  # when it was first asked to stop

    def run(self) -> int:
        """Returns when the server has ended for good; its exit code, 128 + N where it was killed by signal N."""
        if sys.platform == "linux":
            # What a server leaves behind becomes a child of this process, which so knows when all of it has ended.
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(each, self._forward)
        failures, since = 0, self._plan.since
        while True:
            log = ServerLog(self._plan.quiet, self._plan.log_file, since)
            code, lasted = self._live(log)
            if self._stopping is not None:
                return 0 if lasted is None or code in (-signal.SIGTERM, -signal.SIGINT) else _exit_code(code)
            code = code or 1  # whatever it says: it was not asked to end
            failures = 1 if lasted is not None and lasted >= _SETTLED else failures + 1
            log.say(log.reason(code))
            if failures > self._plan.restarts:
                if self._plan.restarts:
                    log.say(f"It failed {failures} times in a row, and is not started again. Its log ends with:")
                    for line in log.end():
                        log.say(f"  {line}")
                return _exit_code(code)
            pause = min(2.0 ** (failures - 1), _LONGEST_PAUSE)
            log.say(f"It is started again in {pause:.0f} s ({failures} of {self._plan.restarts}).")
            if self._asked_within(pause):
                return 0
            since = time.monotonic()

    def _live(self, log: ServerLog) -> tuple[int, float | None]:
        """One life of the server: its exit code (-N for signal N), and for how long it was ready (None: never)."""
        self._process = process = subprocess.Popen(
            guarded(self._plan.command, with_parent=True),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C goes to a terminal's whole group: the engine would stop before the answers in flight are there.
            start_new_session=True,
        )
        if self._stopping is not None:  # asked to just before
            process.terminate()
        assert process.stdout is not None
        reader = threading.Thread(target=log.copy, args=(process.stdout,), daemon=True)
        reader.start()
        key, ended = api_key(os.environ), end_of(process.pid)
        ready: float | None = None
        while process.poll() is None:
            if ready is None and self._stopping is None and is_ready(self._plan.url, key, self._plan.launch):
                ready = time.monotonic()
                log.ready(self._plan.url, bool(key))
            mercy = _MERCY_AT_START if ready is None else self._plan.drain_seconds + _MERCY
            if self._stopping is not None and time.monotonic() > self._stopping + mercy:
                process.kill()
            pause = 0.5 if ready is None or self._stopping is not None else 5.0
            if ended is None:
                time.sleep(pause)
            else:
                select.select([ended], [], [], pause)
        if ended is not None:
            os.close(ended)
        lasted = None if ready is None else time.monotonic() - ready
        self._await_the_last()
        reader.join(5.0)
        return process.returncode, lasted

    def _await_the_last(self) -> None:
        """Waits until the guard has cleared up: a new server needs the old one's port and memory."""
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.05)
            except ChildProcessError:
                return

    def _asked_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._stopping is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return self._stopping is not None

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._stopping is None:
            self._stopping = time.monotonic()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def supervised(plan: Plan) -> list[str]:
    """The argument vector of a process that runs `plan`; the key is not in it, but in the environment."""
    options = {
        "--url": plan.url,
        "--launch": plan.launch,
        "--restarts": str(plan.restarts),
        "--drain-seconds": str(plan.drain_seconds),
        "--since": str(plan.since),
    }
    if plan.log_file is not None:
        options["--log-file"] = str(plan.log_file)
    flags = [part for pair in options.items() for part in pair] + (["--quiet"] if plan.quiet else [])
    return [sys.executable, "-m", "llmrec.supervisor", *flags, "--", *plan.command]


def main(arguments: Sequence[str]) -> int:
    """Reads a plan from a command line, and runs it."""
    end = arguments.index("--")
    parser = argparse.ArgumentParser(prog="llmrec.supervisor", allow_abbrev=False)
    parser.add_argument("--url", required=True)
    parser.add_argument("--launch", default="")
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--drain-seconds", type=float, default=30.0)
    parser.add_argument("--since", type=float, default=time.monotonic())
    parser.add_argument("--log-file", type=Path)
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args(arguments[:end])
    return Supervisor(Plan(command=arguments[end + 1 :], **vars(options))).run()


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
