"""ServerLog: a server's output, read as it comes: how far its start has got, and why it ended."""

import json
import re
import sys
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO, Self

# What vLLM's log and llmrec's own lines in it say when a part of the start begins.
_STAGES = (
    (r"llmrec: building the index", "building the catalog's index"),
    (r"llmrec: starting vLLM|Started server process", "starting the server"),
    (r"Starting to load model|llmrec: loading the model", "loading the weights"),
    (r"Available KV cache memory|GPU KV cache size|KV cache size", "making the KV cache"),
    (r"Supported tasks:|llmrec: checking", "checking the search"),
)
# What a server says when it cannot start, and what that means. The first that is found is told.
_REASONS = (
    (
        r"address already in use|Errno 98",
        "Something listens on the server's port already. Stop it, or choose another --port.",
    ),
    (
        r"No available memory for the cache blocks|KV cache is needed, which is larger than the available",
        "There is too little memory for the KV cache. Raise --kv-cache-gib (on a CPU), or lower --max-model-len.",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError|can't allocate memory|std::bad_alloc|\bMemoryError\b",
        "The server ran out of memory. Lower --max-num-seqs, --max-model-len or --kv-cache-gib, or give it more.",
    ),
    (
        r"Free memory on device .* is less than desired",
        "Other processes use the GPU's memory. End them, or pass a lower --gpu-memory-utilization after `--`.",
    ),
    (
        r"error: unrecognized arguments: .*",
        "vLLM does not know an argument that stood after `--`. See `llmrec serve --help` for those that need no `--`.",
    ),
)
_OWN = re.compile(r"llmrec\.exceptions\.\w+: (.+)")
_ERROR = re.compile(r"(?:^|\s)((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): .+)")
_NO_CAUSE = re.compile(
    r"Engine core initialization failed|EngineDeadError|EngineCore encountered an issue|Executor failed"
)
_DIED = re.compile(r"The engine has died|Executor failed")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_KEPT, _SHOWN = 2_000, 25


class ServerLog:
    """The output of one start of a server.

    It goes to this process's own output unless `quiet`, and is appended to `file` where one is given.
    """

    def __init__(self, quiet: bool = False, file: Path | None = None, since: float | None = None) -> None:
        self._quiet = quiet
        self._file = file
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._since = time.monotonic() if since is None else since
        self._stages: list[tuple[str, float]] = []
        self._is_ready = False
        self._complained = False

    @classmethod
    def of(cls, file: Path) -> Self:
        """The log of a server that has ended, from its file."""
        log = cls(quiet=True)
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            log._lines.append(_COLOURS.sub("", line).rstrip())
        return log

    def copy(self, pipe: BinaryIO) -> None:
        """Reads the output to its end, whatever becomes of the file: a server that nobody reads stands still."""
        with self._opened() as file:
            for line in pipe:
                if file is not None:
                    self._write(file, line)
                if not self._quiet:
                    _put(line)
                self._read(_COLOURS.sub("", line.decode("utf-8", errors="replace")).rstrip())

    def _read(self, line: str) -> None:
        self._lines.append(line)
        if self._is_ready:
            return
        known = {name for name, _ in self._stages}
        for pattern, name in _STAGES:
            if name not in known and re.search(pattern, line):
                self._stages.append((name, time.monotonic()))
                self.say(f"{time.monotonic() - self._since:6.1f} s  {name}")
                return

    def ready(self, url: str, locked: bool) -> None:
        """Says that the server is ready, what its start took, and how to ask it."""
        self._is_ready = True
        now = time.monotonic()
        ends = [begin for _, begin in self._stages[1:]] + [now]
        parts = [f"{name} {end - begin:.1f} s" for (name, begin), end in zip(self._stages, ends, strict=True)]
        self.say(f"ready at {url} after {now - self._since:.1f} s" + (f" ({', '.join(parts)})" if parts else ""))
        key = '-H "Authorization: Bearer $LLMREC_API_KEY" ' if locked else ""
        body = json.dumps({"history": [], "k": 10})
        self.say(f"try it: curl {url}/v1/recommend {key}-H 'Content-Type: application/json' -d '{body}'")

    def reason(self, code: int) -> str:
        """Two sentences on why the server ended with this exit code (-N: by signal N), from what it said."""
        if code == -9:
            return (
                "The server was killed with signal 9, as Linux does when memory runs out. See the kernel's log; lower "
                "--kv-cache-gib or --max-num-seqs, or give it more memory."
            )
        if code < 0:
            return f"The server was ended by signal {-code}. Find who sent it, or see the log's end for a crash."
        own = [match[1] for line in self._lines if (match := _OWN.search(line))]
        if own:
            return own[-1]
        for pattern, told in _REASONS:
            if any(re.search(pattern, line) for line in self._lines):
                return told
        errors = [
            match[1] for line in self._lines if (match := _ERROR.search(line)) and not _NO_CAUSE.search(match[1])
        ]
        if not errors and any(_DIED.search(line) for line in self._lines):
            return (
                "The engine, or a worker of it, was killed without a word, as Linux does when memory runs out. See "
                "the kernel's log; lower --kv-cache-gib or --max-num-seqs, or give it more memory."
            )
        said = (errors or [line.strip() for line in self._lines if line.strip()] or ["nothing"])[-1]
        return (
            f"The server ended with code {code}; the last that it said of a cause is: {said[:500].rstrip('. ')}. "
            "Mend what it names, or run `llmrec doctor`."
        )

    def end(self) -> list[str]:
        """The last lines."""
        return list(self._lines)[-_SHOWN:]

    def say(self, text: str) -> None:
        """A line of this process's own, in the terminal and the file."""
        line = f"llmrec: {text}\n".encode()
        _put(line)
        with self._opened() as file:
            if file is not None:
                self._write(file, line)

    def _opened(self) -> AbstractContextManager[BinaryIO | None]:
        """The file, to append to; None where there is none, or none to be had."""
        if self._file is None:
            return nullcontext()
        try:
            return open(self._file, "ab", buffering=0)
        except OSError as error:
            self._complain(error)
            return nullcontext()

    def _write(self, file: BinaryIO, line: bytes) -> None:
        try:
            file.write(line)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        """Says once that the file lacks lines."""
        if not self._complained:
            self._complained = True
            _put(f"llmrec: the log file lacks lines: {error}\n".encode())


def _put(line: bytes) -> None:
    try:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    except (OSError, ValueError):
        pass  # whoever read this has gone; the server goes on
