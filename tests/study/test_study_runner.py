"""Runs of a study that are done, fail, stop and go on, with a script that stands for a training."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import yaml

from llmrec.exceptions import StageError
from llmrec.study import runner as module
from llmrec.study.launching import launch_options
from llmrec.study.place import RunPlace
from llmrec.study.plan import StudyPlan
from llmrec.study.runner import StudyRunner

# As a training does: counts its starts, saves on SIGTERM and ends with 143, goes on from there, and writes metrics.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import yaml
flags = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
folder = Path(sys.argv[sys.argv.index("--artefact") + 1]).parent
starts = folder / "starts"
begun = int(starts.read_text()) if starts.exists() else 0
starts.write_text(str(begun + 1))
print("start", begun + 1, "of", flags["system"], flush=True)
def stop(number, frame):
    time.sleep(0.5)
    (folder / "saved").write_text(str(number))
    print("saved", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, signal.SIG_IGN if flags.get("deaf") else stop)
signal.signal(signal.SIGINT, stop)
(folder / "pid").write_text(str(os.getpid()))
if flags.get("wait") and not (folder / "saved").exists():
    time.sleep(60)
if flags.get("breaks") and begun < flags["breaks"]:
    print("10%\\r90%\\nerror: it broke", flush=True)
    sys.exit(3)
if flags.get("silent"):
    sys.exit(0)
said = dict(flags, lr=flags.get("says", flags["lr"]))
metrics = {
    "split": "s" * 64, "validation": [{"epoch": 1.0, "step": 2.0, "eval_NDCG@10": 0.1, "eval_runtime": 3.0}],
    "test": {"HR@10": 0.2, "NDCG@10": 0.1 + 0.01 * flags["seed"], "cases": 4, "slices": {}},
    "training": {"system": "x", "trainer": said}, "cost": {"parameters": 10, "device": "cpu"}, "versions": {},
}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    commands = []

    def command(name, arguments, launcher, options=()):
        commands.append((name, launcher, list(options)))
        return [sys.executable, str(path), *arguments]

    monkeypatch.setattr(module, "stage_command", command)
    return commands


def runs(seeds=(0,), **variants):
    variants = variants or {"a": {}, "b": {}}
    return StudyPlan("t", {"lr": 0.1}, variants, seeds=seeds).runs


def starts(place):
    path = place.folder / "starts"
    return int(path.read_text()) if path.exists() else 0


def test_what_is_done_is_not_repeated(tmp_path, script, caplog):
    caplog.set_level(logging.INFO, "llmrec")
    told = []
    runner = StudyRunner(tmp_path / "study", runs([0, 1]), finished=lambda: told.append(1))
    assert runner.seconds_left() is None
    assert runner.run() == 0
    assert [place.state() for place in runner.places] == ["done"] * 4
    assert len(told) == 4  # after each
    assert runner.run() == 0
    assert len(told) == 5  # there was nothing to do, and is written all the same
    assert runner.seconds_left() == 0
    again = StudyRunner(tmp_path / "study", runs([0, 1, 2]))
    assert [place.run.seed for place in again.left] == [2, 2]
    assert again.run() == 0
    assert [starts(place) for place in again.places] == [1] * 6
    # The order is that of the plan, and a run's recipe is its flags.
    order = [record.getMessage() for record in caplog.records if record.getMessage().startswith("[")]
    assert [line.split(" (")[0] for line in order] == [
        *("[1/4] a, seed 0", "[2/4] b, seed 0", "[3/4] a, seed 1", "[4/4] b, seed 1"),
        *("[5/6] a, seed 2", "[6/6] b, seed 2"),
    ]
    recipe = yaml.safe_load((again.places[0].folder / "recipe.yaml").read_text())
    assert recipe == {"disable_tqdm": True, "lr": 0.1, "seed": 0, "system": "a"}
    assert script[0] == ("train/seqrec.py", "accelerate", launch_options(1))


def test_a_failed_run_is_recorded_and_the_others_go_on(tmp_path, script, caplog):
    chosen = runs(a={"breaks": 1}, b={"silent": True}, c={"says": 0.5}, d={})
    runner = StudyRunner(tmp_path, chosen)
    assert runner.run() == 1
    assert [place.state() for place in runner.places] == ["failed", "failed", "failed", "done"]
    failures = [place.record()["failed"] for place in runner.places]
    assert failures[0] == {
        "code": 3,
        "why": "it ended with code 3",
        "lines": ["start 1 of a", "90%", "error: it broke"],
    }
    assert failures[1]["why"] == "it wrote no metrics.json"
    assert failures[2]["why"] == "metrics.json says lr 0.5, and the run has 0.1"
    assert failures[3] is None
    assert "Its last words: error: it broke" in caplog.text
    # A further start tries the failed ones again.
    assert StudyRunner(tmp_path, chosen).run() == 1
    assert [starts(place) for place in runner.places] == [2, 2, 2, 1]
    assert runner.places[0].state() == "done"
    assert runner.places[0].record()["failed"] is None


def test_no_run_begins_after_the_time(tmp_path, script):
    runner = StudyRunner(tmp_path, runs())
    assert runner.run(max_minutes=1e-6) == 0
    assert [place.state() for place in runner.places] == ["new", "new"]
    assert runner.run(max_minutes=10) == 0
    assert [place.state() for place in runner.places] == ["done", "done"]


def test_what_is_left_is_estimated_by_its_like(tmp_path, script):
    chosen = runs([0, 1], a={}, b={})
    runner = StudyRunner(tmp_path, chosen)
    StudyRunner(tmp_path, chosen[:2]).run()
    for place, seconds in zip(runner.places, (10.0, 100.0), strict=False):
        record = place.record()
        (place.folder / "run.json").write_text(json.dumps(record | {"seconds": seconds}))
    assert runner.seconds_left() == 110
    runner.places[3].folder.mkdir()
    runner.places[3].note(30.0)  # interrupted after so long
    assert runner.places[3].state() == "begun"
    assert runner.seconds_left() == 80
    other = StudyRunner(tmp_path, [*chosen, *runs(c={})])
    assert other.seconds_left() == 80 + 55


def test_two_studies_do_not_share_a_folder(tmp_path, script):
    hold = f"file = open({str(tmp_path / '.lock')!r}, 'w'); fcntl.flock(file, 2)"
    code = f"import fcntl, time; {hold}; print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StageError, match="A study is running in"):
            StudyRunner(tmp_path, runs()).run()
        holder.kill()
    assert StudyRunner(tmp_path, runs()).run() == 0


def test_several_processes_are_started_by_accelerate(tmp_path, script):
    assert StudyRunner(tmp_path, runs(a={}), processes=2).run() == 0
    assert script == [("train/seqrec.py", "accelerate", launch_options(2))]


# A process as accelerate starts it: its rank, how many there are, its threads.
TOLD = """
import os, pathlib, sys
rank = os.environ.get("RANK", "0")
told = rank, os.environ.get("WORLD_SIZE", "1"), os.environ["OMP_NUM_THREADS"]
pathlib.Path(sys.argv[1], rank).write_text(" ".join(told))
"""


def test_runs_of_another_number_of_processes_are_no_part_of_it(tmp_path, script):
    runner = StudyRunner(tmp_path / "study", runs())
    assert runner.run() == 0
    path = runner.places[1].folder / "metrics.json"
    found = json.loads(path.read_text())
    found.setdefault("training", {}).setdefault("trainer", {})["world_size"] = 2
    path.write_text(json.dumps(found))
    with pytest.raises(StageError, match=r"was trained by 2 process\(es\), and --processes is 1"):
        runner.run()
    assert StudyRunner(tmp_path / "study", runs(), processes=2).run() == 0
    assert [starts(place) for place in runner.places] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_starts_as_many_processes_as_are_asked_for(tmp_path, monkeypatch, processes):
    """Without a GPU, too, where accelerate makes one of any number that no configuration stands behind."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (tmp_path / "told.py").write_text(TOLD)
    (tmp_path / "ranks").mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch_options(processes)]
    subprocess.run([*command, str(tmp_path / "told.py"), str(tmp_path / "ranks")], check=True, timeout=120)
    told = sorted(path.read_text() for path in (tmp_path / "ranks").iterdir())
    assert told == [f"{rank} {processes} 3" for rank in range(processes)]


def test_threads_are_shared_out_among_processes(monkeypatch):
    import torch

    def threads(processes):
        options = launch_options(processes)
        return int(options[options.index("--num_cpu_threads_per_process") + 1])

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert [threads(processes) for processes in (1, 2, 4, 8)] == [6, 3, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # which torch has heard, too: it is each process's
    assert [threads(processes) for processes in (1, 4)] == [2, 2]


DRIVER = """
import logging, sys
from llmrec.study import runner as module
from llmrec.study.plan import StudyPlan
logging.basicConfig(level=logging.INFO, format="%(message)s")
launcher = sys.argv[5:]
module.stage_command = lambda name, arguments, *rest: [sys.executable, *launcher, sys.argv[1], *arguments]
module._TOGETHER = float(sys.argv[3])
plan = StudyPlan("t", {"lr": 0.1}, {"a": {"wait": True, "deaf": sys.argv[4] == "deaf"}, "b": {}})
sys.exit(module.StudyRunner(sys.argv[2], plan.runs, finished=lambda: logging.info("written")).run())
"""


# As accelerate's for one process: it ends by the first signal, and tells of no other code than 1.
LAUNCHER = """
import subprocess, sys
sys.exit(min(1, abs(subprocess.call([sys.executable, *sys.argv[1:]]))))
"""


def drive(tmp_path, together="3", deaf="", launched=False):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER))
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    command = [sys.executable, "driver.py", "script.py", str(tmp_path / "study"), together, deaf]
    command += ["launcher.py"] if launched else []
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)


def pid_of(tmp_path):
    """The first run's process, once it is there."""
    for _ in range(600):
        found = list((tmp_path / "study").glob("a-*/pid"))
        if found and found[0].read_text():
            return int(found[0].read_text()), found[0].parent
        time.sleep(0.05)
    raise AssertionError("no run began")


def gone(pid):
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "launched"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_signal_reaches_the_training_which_saves_and_the_study_goes_on_later(tmp_path, number, launched):
    driver = drive(tmp_path, launched=launched)
    pid, folder = pid_of(tmp_path)
    driver.send_signal(number)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 128 + number, said
    assert "the same command continues the study" in said
    assert said.count("written") == 1
    assert (folder / "saved").read_text() == str(int(number))
    assert gone(pid)
    record = json.loads((folder / "run.json").read_text())
    assert record["failed"] is None
    assert not list((tmp_path / "study").glob("b-*"))
    driver = drive(tmp_path, launched=launched)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 0, said
    assert (folder / "starts").read_text() == "2"
    assert (folder / "log.txt").read_text().splitlines() == ["start 1 of a", "saved", "start 2 of a"]


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "launched"])
def test_a_second_signal_kills_what_does_not_listen(tmp_path, launched):
    driver = drive(tmp_path, together="0.2", deaf="deaf", launched=launched)
    pid, _ = pid_of(tmp_path)
    driver.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert driver.poll() is None
    driver.send_signal(signal.SIGTERM)
    driver.communicate(timeout=60)
    assert driver.returncode == 143
    assert gone(pid)


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "launched"])
def test_a_training_does_not_outlive_its_study(tmp_path, launched):
    driver = drive(tmp_path, launched=launched)
    pid, _ = pid_of(tmp_path)
    driver.kill()
    driver.communicate(timeout=60)
    assert gone(pid)


def test_a_run_is_what_its_flags_and_data_say(tmp_path):
    first, second = tmp_path / "one.csv", tmp_path / "two.csv"
    first.write_text("a")
    second.write_text("a")

    def place(path, **flags):
        return RunPlace(tmp_path, StudyPlan("t", {"interactions": str(path), **flags}, {"v": {}}, seeds=[4]).runs[0])

    one = place(first)
    assert one.folder.name == f"v-seed=4-{one.identity[:8]}"
    assert place(second).identity == one.identity  # the same data elsewhere
    assert place(first, lr=0.1).identity != one.identity
    third = tmp_path / "three.csv"
    third.write_text("b")
    assert place(third).identity != one.identity
    folders = []
    for name, file, text in (("f", "x", "1"), ("g", "x", "1"), ("h", "y", "1"), ("i", "x", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
        folders.append(place(first, items=str(tmp_path / name)).identity)
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3
    assert place(first, body="user/model").identity != place(first, body="user/other").identity


@pytest.mark.parametrize(
    ("said", "asked", "same"),
    [
        (3.0, 3, True),
        (0.001, "1e-3", True),
        (True, True, True),
        (True, 1, False),
        ([5, 10], [5, 10], True),
        ([5, 10], [5], False),
        ("silu", "softmax", False),
        (None, "x", False),
    ],
    ids=str,
)
def test_a_metrics_file_is_held_against_the_flags(tmp_path, said, asked, same):
    place = RunPlace(tmp_path, StudyPlan("t", {"flag": asked}, {"v": {}}).runs[0])
    place.folder.mkdir()
    place.note()
    metrics = {"test": {"HR@10": 0.1}, "training": {"system": "v", "encoder": {"flag": said}}}
    (place.folder / "metrics.json").write_text(json.dumps(metrics))
    assert (place.state() == "done") is same
    (Path(place.folder) / "metrics.json").write_text("{")
    assert place.state() == "begun"
