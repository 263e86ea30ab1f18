"""Nothing outlives a guarded command, however it ends."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from llmrec.guard import guarded, run

# A command with children and grandchildren that ignore what a polite supervisor would send. It gets its own source, to
# hand it on.
TREE = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
depth, source = int(sys.argv[1]), sys.argv[2]
if depth:
    subprocess.Popen([sys.executable, "-c", source, str(depth - 1), source])
time.sleep(300)
"""


def tree(depth):
    return [sys.executable, "-c", TREE, str(depth), TREE]


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def sleepers(process):
    return [child for child in process.children(recursive=True) if "llmrec.guard" not in " ".join(child.cmdline())]


@pytest.mark.parametrize("pause", [0.0, 1.2])
def test_killed_with_9_its_children_go_too(pause):
    """Also right after they were born, when the watcher has not looked yet."""
    process = subprocess.Popen(guarded(tree(2)))
    family = psutil.Process(process.pid)
    assert wait_for(lambda: len(sleepers(family)) == 2)
    children = sleepers(family)
    time.sleep(pause)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert wait_for(lambda: not any(map(alive, children)))


def test_with_its_parent_it_goes_too(tmp_path):
    program = f"""
import subprocess, time
from llmrec.guard import guarded
process = subprocess.Popen(guarded({tree(1)!r}, with_parent=True))
open({str(tmp_path / "pid")!r}, "w").write(str(process.pid))
time.sleep(300)
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    assert wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", 30)
    server = psutil.Process(int((tmp_path / "pid").read_text()))
    assert wait_for(lambda: len(sleepers(server)) == 1)
    family = [server, *sleepers(server)]
    parent.kill()
    parent.wait()
    assert wait_for(lambda: not any(map(alive, family)))


def test_a_parent_that_is_gone_already_starts_nothing(tmp_path):
    command = guarded(["touch", str(tmp_path / "started")], with_parent=True)
    command[command.index("--with-parent") + 1] = "1"  # not the process that starts it
    assert subprocess.run(command, check=False).returncode == 0
    assert not (tmp_path / "started").exists()


def test_it_becomes_the_command(tmp_path):
    assert run([sys.executable, "-c", "raise SystemExit(7)"], dict(os.environ)) == 7
    output = subprocess.run(guarded(["echo", "--", "a b"]), capture_output=True, text=True, check=True).stdout
    assert output == "-- a b\n"
