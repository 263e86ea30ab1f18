import json
import os
import sys
from pathlib import Path

import pytest

from llmrec.exceptions import DataError, StageError
from llmrec.scaling import probing
from llmrec.scaling.cost import cost_of
from llmrec.scaling.shape import Shape
from llmrec.study.launching import launch_options

COST = cost_of(Shape("sasrec", 1, 8, 100, 10))

# A script that logs as a Trainer does, three steps an epoch, and does not end by itself.
SCRIPT = """
import json, os, pathlib, sys, time
said = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(said["--output_dir"])
folder.mkdir(parents=True)
told = {"pid": os.getpid(), "place": str(folder.parent), "said": said}
pathlib.Path(said["--told"]).write_text(json.dumps(told))
for step in range(5, int(said["--reached"]) + 1, 5):
    time.sleep(0.05)
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": step, "epoch": step / 3, "loss": 1.0}) + chr(10))
if said["--then"] == "ends":
    print("out of words")
    sys.exit(3)
time.sleep(600)
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Puts the script in the place of the stages; arguments that say what it does, and what it was told."""
    path, told = tmp_path / "script.py", tmp_path / "told.json"
    path.write_text(SCRIPT)
    told.write_text("")  # so that it is a file from the first probe on
    launched = []

    def command(name, args, launcher, launcher_args=()):
        launched.append((name, launcher, list(launcher_args)))
        return [sys.executable, str(path), *args]

    monkeypatch.setattr(probing, "stage_command", command)
    monkeypatch.setattr(probing, "matmul_peak", lambda device, dtype: 1e10)

    def arguments(reached=50, then="waits"):
        return ["--told", str(told), "--reached", str(reached), "--then", then]

    arguments.launched, arguments.told = launched, lambda: json.loads(told.read_text())
    return arguments


def ended(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


def test_a_training_is_watched_to_its_last_step_and_ended(script):
    found = probing.probe(COST, 300.0, script())
    told = script.told()
    assert ended(told["pid"])
    assert not Path(told["place"]).exists()
    assert script.launched == [("train/seqrec.py", "accelerate", launch_options(1))]
    # Three steps are the epoch's 300 events.
    assert found.tokens_per_step == pytest.approx(100)
    assert found.flops_per_step == pytest.approx(100 * COST.flops_per_token)
    assert (found.encoder, found.depth, found.width, found.steps, found.dtype) == ("sasrec", 1, 8, 40, "float32")
    said = told["said"]
    assert said["--max_steps"] == "50"
    assert {said[f"--{name}"] for name in ("eval_strategy", "save_strategy")} == {"no"}
    assert {said[f"--{name}"] for name in ("bf16", "fp16", "load_best_model_at_end")} == {"false"}


def test_seconds_are_those_behind_the_warm_up(script, monkeypatch):
    """Two steps a second, but for the first: 20 seconds of start, and 7 for the first five."""
    times = {step: 27.0 + 0.5 * (step - 5) for step in range(5, 51, 5)}
    monkeypatch.setattr(probing, "_trained", lambda *given: (times, 25.0))
    found = probing.probe(COST, 300.0, script())
    assert found.seconds_per_step == pytest.approx(0.5)
    assert found.startup_seconds == pytest.approx(27.0 - 2.5)
    assert found.tokens_per_step == pytest.approx(150.0)
    assert found.flops_per_second == pytest.approx(150 * COST.flops_per_token / 0.5)
    assert found.mfu == pytest.approx(found.flops_per_second / 1e10)
    slower = {step: taken + (20.0 if step <= 10 else 20.0 + (step - 10)) for step, taken in times.items()}
    monkeypatch.setattr(probing, "_trained", lambda *given: (slower, 25.0))
    assert probing.probe(COST, 300.0, script()).seconds_per_step == pytest.approx(1.5)


def test_steps_that_cannot_be_timed(script, monkeypatch):
    monkeypatch.setattr(probing, "_trained", lambda *given: (dict.fromkeys(range(5, 51, 5), 3.0), 25.0))
    with pytest.raises(StageError, match="so that they have no time"):
        probing.probe(COST, 300.0, script())


def test_several_processes_have_as_many_peaks(script, monkeypatch):
    found = probing.probe(COST, 300.0, script(), processes=2)
    assert script.launched == [("train/seqrec.py", "accelerate", launch_options(2))]
    assert (found.peak, found.processes) == (2e10, 2)


def test_a_probe_is_measured_once(script, tmp_path, monkeypatch):
    folder, log = tmp_path / "probes", tmp_path / "log.csv"
    log.write_text("a")
    given = [*script(), "--interactions", str(log)]
    first = probing.probe(COST, 300.0, given, folder=folder)
    assert len(script.launched) == 1
    assert probing.probe(COST, 300.0, given, folder=folder) == first
    assert len(script.launched) == 1
    wider = cost_of(Shape("sasrec", 1, 16, 100, 10))
    changed = tmp_path / "other.csv"
    changed.write_text("b")
    for number, (cost, tokens, flags, more) in enumerate(
        (
            (wider, 300.0, given, {}),
            (COST, 200.0, given, {}),
            (COST, 300.0, [*given, "--seed", "1"], {}),
            (COST, 300.0, [*given[:-1], str(changed)], {}),
            (COST, 300.0, given, {"steps": 30}),
            (COST, 300.0, given, {"dtype": "bfloat16"}),
        ),
        start=2,
    ):
        probing.probe(cost, tokens, flags, folder=folder, **more)
        assert len(script.launched) == number
    assert len(list(folder.iterdir())) == 7
    assert script.told()["said"]["--bf16"] == "true"


def test_what_is_in_the_files_counts_and_not_their_name(tmp_path):
    log, other = tmp_path / "log.csv", tmp_path / "other.csv"
    log.write_text("a")
    other.write_text("b")
    assert probing._digest([], [str(log)]) != probing._digest([], [str(other)])
    assert probing._digest([1], [str(log)]) != probing._digest([2], [str(log)])


def test_a_training_that_ends_too_early_says_its_last_words(script):
    with pytest.raises(StageError, match=r"ended with code 3 after step 20 of 50, with the words: out of words"):
        probing.probe(COST, 300.0, script(20, "ends"))
    assert not Path(script.told()["place"]).exists()


def test_a_training_that_takes_too_long_is_given_up(script):
    with pytest.raises(StageError, match=r"took more than 3 seconds after step \d+ of 50, with the words: none"):
        probing.probe(COST, 300.0, script(20), max_seconds=3)


def test_a_training_that_ends_with_its_last_step_was_measured(script):
    assert probing.probe(COST, 300.0, script(50, "ends")).steps == 40


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 10}, "A probe of 10 steps after 10"),
        ({"steps": 52}, "A probe of 52 steps"),
        ({"warm_up": 0}, "after 0 to warm up"),
        ({"dtype": "int8"}, "Nothing trains in 'int8'"),
    ],
)
def test_a_probe_that_cannot_be(given, message):
    with pytest.raises(DataError, match=message):
        probing.probe(COST, 300.0, [], **given)


def test_no_events_are_no_training():
    with pytest.raises(DataError, match="are no training"):
        probing.probe(COST, 0.0, [])


@pytest.mark.parametrize(
    ("recipe", "flags", "expected"),
    [
        ("", [], "cuda"),
        ("use_cpu: true", [], "cpu"),
        ("use_cpu: true", ["--use_cpu", "false"], "cuda"),
        ("use_cpu: false", ["--use_cpu"], "cpu"),
        ("use_cpu: false", ["--use_cpu=true"], "cpu"),
        ("- no names", [], "cuda"),
    ],
)
def test_the_device_is_the_training_s_by_recipe_and_flags(tmp_path, monkeypatch, recipe, flags, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    assert probing._device(["--config", str(path), *flags])[0] == expected
