"""What a recipe or a command line says wrongly is said back in one line, before anything is loaded."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from safetensors import SafetensorError

from llmrec.exceptions import RecipeError
from llmrec.script import parse, parser, run


@dataclass
class Arguments:
    artefact: str = field(metadata={"help": "Where to."})
    learning_rate: float = field(default=0.1, metadata={"help": "Step size."})
    supervision: str = field(default="sequence", metadata={"help": "Rows.", "choices": ["sequence", "next_item"]})
    ks: list[int] = field(default_factory=lambda: [5], metadata={"help": "Cut-offs."})

    def __post_init__(self):
        if self.learning_rate == 13:
            raise ValueError("thirteen is unlucky.")


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def read(*argv):
    return parse(parser((Arguments,), "A script."), argv)[0]


def test_flags_override_the_recipe(recipe):
    path = recipe("artefact: there\nlearning_rate: 1e-3\nks: [1, 2]\n")
    for argv in (["--config", path], [f"--config={path}"]):
        read_back = read(*argv, "--supervision", "next_item")
        assert read_back == Arguments("there", 0.001, "next_item", [1, 2])
    assert read("--learning_rate", "-3", "--config", path, "--artefact", "here").artefact == "here"
    assert read("--config", path, "--learning_rate=-3").learning_rate == -3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lerning_rate: 1", "unknown key 'lerning_rate'. Did you mean learning_rate?"),
        ("colour: red", "unknown key 'colour'. See --help"),
        ("1: 2", "unknown key 1"),
        ("supervision: fast", "Choose one of sequence, next_item."),
        ("- a list", "holds no names with values"),
        ("", "holds no names with values"),
        ("a: [", "cannot be read"),
        ("learning_rate: 13", "thirteen is unlucky."),
    ],
)
def test_a_recipe_that_is_wrong(recipe, text, said):
    with pytest.raises(RecipeError) as caught:
        read("--artefact", "x", "--config", recipe(text))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lerning_rate", "1"], "no flag --lerning_rate. Did you mean --learning_rate?"),
        (["--lerning_rate=1"], "no flag --lerning_rate. Did you mean --learning_rate?"),
        (["--config"], "names no file"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml cannot be read"),
        (["--learning_rate", "1", "stray"], "stray"),
    ],
)
def test_a_command_line_that_is_wrong(argv, said):
    with pytest.raises(RecipeError) as caught:
        read("--artefact", "x", *argv)
    assert said in str(caught.value)


def test_an_error_is_one_line_and_a_code(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--artefact", "x", "--config", "/nowhere.yaml"])
    with pytest.raises(SystemExit) as caught:
        run(lambda arguments: None, parser((Arguments,), "A script."))
    assert str(caught.value).startswith("error: The recipe /nowhere.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_ends_in_one_line(error, monkeypatch):
    def main(arguments):
        raise error

    monkeypatch.setattr("sys.argv", ["script", "--artefact", "there"])
    with pytest.raises(SystemExit, match=r"error: A file could not be written: .*Make room"):
        run(main, parser((Arguments,), "A script."))


def test_other_errors_of_a_script_keep_their_trace(monkeypatch):
    def main(arguments):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("sys.argv", ["script", "--artefact", "there"])
    with pytest.raises(OSError, match="broken"):
        run(main, parser((Arguments,), "A script."))


TRAINING = """
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments

from llmrec.script import parser, run


@dataclass
class Arguments:
    stopped: bool = False


class Loop:
    def __init__(self):
        self.me = self
        torch.distributed.init_process_group("gloo", init_method=os.environ["STORE"], rank=0, world_size=1)
        self.model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        self.model(torch.ones(1, 2)).sum().backward()


def threads():
    return [one.name for one in Path("/proc/self/task").iterdir() if "gloo" in (one / "comm").read_text()]


def main(arguments):
    loop = Loop()
    assert threads() and loop.me is loop
    if arguments.stopped:
        raise SystemExit(143)


code = 0
try:
    run(main, parser((Arguments,), "A script."))
except SystemExit as stop:
    code = stop.code
assert not torch.distributed.is_initialized()
assert not threads(), threads()
sys.exit(code)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
@pytest.mark.parametrize(("stopped", "code"), [("False", 0), ("True", 143)])
def test_no_thread_of_gloo_outlives_a_training_that_ended_or_was_stopped(stopped, code, tmp_path):
    command = [sys.executable, "-c", TRAINING, "--stopped", stopped]
    variables = {**os.environ, "STORE": f"file://{tmp_path}/store"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-2000:]


def test_processes_are_not_waited_for_after_an_error(tmp_path, monkeypatch):
    import torch.distributed as processes

    def main(arguments):
        processes.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        raise RecipeError("Wrong. Right it.")

    monkeypatch.setattr("sys.argv", ["script", "--artefact", "there"])
    try:
        with pytest.raises(SystemExit, match=r"error: Wrong\. Right it\."):
            run(main, parser((Arguments,), "A script."))
        assert processes.is_initialized()
    finally:
        processes.destroy_process_group()
