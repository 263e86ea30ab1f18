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
    return [child for child in process.children(recursive=True) if alive(child) and not is_watcher(child)]


def is_watcher(process):
    return "llmrec.guard" in process.cmdline()


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


def test_a_watcher_that_is_killed_is_replaced_and_nothing_is_left_behind():
    """Whichever of the two it is, again and again; then the server itself."""
    name = f"guarded-{time.monotonic_ns()}"
    process = subprocess.Popen(guarded([*tree(1), name]))
    family = psutil.Process(process.pid)
    try:
        assert wait_for(lambda: len(sleepers(family)) == 1 and len(watchers(name)) == 2)
        for place in (0, 1, 0):
            killed = watchers(name)[place]
            killed.kill()
            assert wait_for(lambda killed=killed: len([each for each in watchers(name) if each != killed]) == 2)
            assert alive(family)  # the server goes on
            assert len(sleepers(family)) == 1
        everything = [*sleepers(family), *watchers(name)]
    finally:
        process.kill()
        process.wait()
    assert wait_for(lambda: not any(map(alive, everything)))


def watchers(name):
    """Also those whose own parent, a watcher, was killed; their command line has what they guard."""
    found = []
    for each in psutil.process_iter():
        try:
            if is_watcher(each) and name in each.cmdline() and alive(each):
                found.append(each)
        except psutil.Error:
            continue
    return found


def test_children_that_hide_their_mark_are_known_by_their_session(tmp_path):
    """Born right before the end, with an environment of their own, as a process title that overwrites it has it."""
    program = (
        "import os, subprocess, sys, time\n"
        "time.sleep(0.2)\n"
        "child = subprocess.Popen(['sleep', '300'], env={})\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    process = subprocess.Popen(guarded([sys.executable, "-c", program]), start_new_session=True)
    process.wait()
    child = int((tmp_path / "child").read_text())
    assert wait_for(lambda: not psutil.pid_exists(child) or not alive(psutil.Process(child)))


def test_scratch_is_removed_with_the_command_however_it_ends(tmp_path):
    program = (
        "import sys, time\nfrom llmrec.guard import scratch_folder\nfolder = scratch_folder()\n"
        "(folder / 'part').mkdir()\n(folder / 'part' / 'file').write_text('x')\n"
        f"open({str(tmp_path / 'name')!r}, 'w').write(str(folder))\n"
        "time.sleep(float(sys.argv[1]))\n"
    )
    for seconds, kill in (("300", True), ("0", False)):
        (tmp_path / "name").unlink(missing_ok=True)
        process = subprocess.Popen(guarded([sys.executable, "-c", program, seconds]))
        assert wait_for(lambda: (tmp_path / "name").exists() and (tmp_path / "name").read_text() != "", 30)
        folder = tmp_path / (tmp_path / "name").read_text()
        if kill:
            assert (folder / "part/file").exists()
            assert folder.stat().st_mode & 0o077 == 0
            process.kill()
        process.wait()
        assert wait_for(lambda folder=folder: not folder.exists())
