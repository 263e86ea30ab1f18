import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llmrec
import llmrec.cli.main
from llmrec.cli.main import app, main
from llmrec.exceptions import ArtefactError

COMMANDS = [
    *("quickstart", "serve", "demo", "recommend", "search", "push", "stages", "run", "doctor", "compare", "baseline"),
    *("layers", "reasoning", "tradeoff", "export"),
]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch):
    """Runs `llmrec ARGS` in this process through the console script's function; returns the exit code."""

    def run(*args: str) -> int:
        monkeypatch.setattr(sys, "argv", ["llmrec", *args])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0)

    return run


def _record(monkeypatch: pytest.MonkeyPatch, command: str) -> dict[str, object]:
    """Puts a stand-in in place of a command's module; returns the dict that will hold its call's options."""
    seen: dict[str, object] = {}
    module = types.ModuleType(f"llmrec.cli.{command}")
    setattr(module, command, lambda **options: seen.update(options))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["serve", "--help"], ["stages"], ["doctor"]])
def test_light_commands_import_nothing_heavy(args: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["llmrec", *{args!r}]
from llmrec.cli.main import main
try:
    main()
finally:
    heavy = {{"torch", "transformers", "vllm", "datasets", "sentence_transformers", "faiss", "numpy", "polars"}}
    print("HEAVY", sorted(heavy & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.strip().endswith("HEAVY []"), result.stdout + result.stderr


def test_version(call, capsys) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"llmrec {llmrec.__version__}\n"


def test_commands_are_those_documented_and_each_help_has_an_example() -> None:
    runner = CliRunner()
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert names == COMMANDS
    for name in names:
        result = runner.invoke(app, [name, "--help"])
        assert result.exit_code == 0
        assert f"Example: llmrec {name}" in result.output or "Example, " in result.output, name


def test_llmrec_error_is_red_on_stderr_with_exit_code_2(call, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("LLMREC_DEBUG", raising=False)
    assert call("push", str(tmp_path / "[absent]"), "me/rec") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.replace("\n", " ").startswith(f"There is no artefact folder {tmp_path / '[absent]'}. Give the path")
    assert "Traceback" not in err


def test_llmrec_error_keeps_its_traceback_when_debugging(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("LLMREC_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["llmrec", "push", str(tmp_path / "absent"), "me/rec"])
    with pytest.raises(ArtefactError):
        main()


def test_a_path_that_cannot_be_written_is_a_sentence(call, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("LLMREC_DEBUG", raising=False)
    arguments = (
        "scale",
        "cost",
        "--encoder",
        "sasrec",
        "--depth",
        "1",
        "--width",
        "8",
        "--items",
        "9",
        "--tokens",
        "99",
    )
    assert call(*arguments, "--json", str(tmp_path)) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"{tmp_path} cannot be read or written: Is a directory. Give a path that can." in said
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("LLMREC_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["llmrec", *arguments, "--json", str(tmp_path)])
    with pytest.raises(IsADirectoryError):
        main()


def test_other_errors_are_not_swallowed(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llmrec", "stages"])
    monkeypatch.setitem(sys.modules, "llmrec.cli.stages", None)
    with pytest.raises(ImportError):
        main()


def test_misuse_exits_with_2(call, capsys) -> None:
    assert call("recommend") == 2
    assert call("serve", "x", "--port", "70000") == 2
    assert call("nonsense") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_quickstart_passes_every_option_on(call, monkeypatch) -> None:
    seen = _record(monkeypatch, "quickstart")
    assert call("quickstart") == 0
    assert seen == {
        "interactions": None,
        "items": None,
        "out": Path("runs/quickstart"),
        "user_column": None,
        "item_column": None,
        "timestamp_column": None,
        "position_column": None,
        "title_column": None,
        "timestamp_unit": "auto",
        "invalid_rows": "error",
        "split": "leave-one-out",
        "seed": 0,
        "epochs": None,
        "embedding_model": None,
        "port": 0,
        "keep_serving": False,
    }
    flags = {
        **{"interactions": "a.csv", "items": "b.jsonl", "out": "o", "user-column": "u", "item-column": "i"},
        **{"timestamp-column": "t", "position-column": "p", "title-column": "n", "seed": "3", "epochs": "2.5"},
        **{"embedding-model": "m", "port": "81", "split": "by-sample"},
        **{"timestamp-unit": "ms", "invalid-rows": "drop"},
    }
    assert (
        call("quickstart", *(part for key, value in flags.items() for part in (f"--{key}", value)), "--keep-serving")
        == 0
    )
    assert {key.replace("_", "-"): str(value) for key, value in seen.items()} == flags | {"keep-serving": "True"}


def test_serve_passes_every_option_on_and_what_follows_the_dashes_to_vllm(call, monkeypatch) -> None:
    seen = _record(monkeypatch, "serve")
    plain = {
        "artefact": "me/rec",
        "host": "127.0.0.1",
        "port": 8000,
        "dtype": "auto",
        "max_num_seqs": None,
        "max_model_len": None,
        "kv_cache_gib": None,
        "max_beams": None,
        "revision": None,
        "vllm_args": [],
        "backend": "vllm",
        "retrieval": "exact",
        "max_rows": None,
        "max_body_bytes": None,
        "deadline_ms": None,
        "limit": [],
        "drain_seconds": 30.0,
        "catalog": [],
        "adapter": [],
        "history_store": None,
        "index_folder": None,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "supervise": False,
        "quiet": False,
        "log_file": None,
    }
    assert call("serve", "me/rec") == 0
    assert seen == plain
    given: dict[str, object] = {
        **{"host": "h", "port": 1, "dtype": "float32", "max_num_seqs": 2, "max_model_len": 3, "kv_cache_gib": 0.5},
        **{"max_beams": 4, "revision": "v", "backend": "transformers", "max_rows": 5, "max_body_bytes": 6},
        "retrieval": "faiss-ivf",
        **{"deadline_ms": 7, "drain_seconds": 8.0, "history_store": "memory:", "index_folder": Path("i")},
        **{"tensor_parallel_size": 9, "data_parallel_size": 10, "log_file": Path("l")},
    }
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    lists = {"catalog": ["a=b", "c=d"], "adapter": ["e=f"], "limit": ["max_k=3"]}
    options += [part for name, values in lists.items() for value in values for part in (f"--{name}", value)]
    after = ["--seed", "7", "--port", "9"]
    assert call("serve", "a", *options, "--supervise", "--quiet", "--", *after) == 0
    assert seen == plain | given | lists | {"artefact": "a", "supervise": True, "quiet": True, "vllm_args": after}


class _Recommendation:
    def __init__(self, item_id: str, rank: int, log_probability: float, title: str | None) -> None:
        self.item_id, self.rank, self.log_probability, self.title = item_id, rank, log_probability, title


def test_recommend_asks_the_recommender_and_prints_what_it_says(call, capsys, monkeypatch) -> None:
    asked: list[object] = []

    class Recommender:
        @classmethod
        def from_pretrained(cls, path, revision=None):
            asked.append((path, revision))
            return cls()

        def recommend(self, history, k, exclude_seen):
            asked.append((history, k, exclude_seen))
            return [_Recommendation("x1", 1, -0.25, "A [red] hat"), _Recommendation("x2", 2, -2.0, None)]

    module = types.ModuleType("llmrec.recommender")
    module.Recommender = Recommender
    monkeypatch.setitem(sys.modules, "llmrec.recommender", module)
    assert call("recommend", "art", "--history", "a, b,,c", "--item", "d,e", "-k", "2", "--json") == 0
    assert asked == [("art", None), (["a", "b", "c", "d,e"], 2, True)]
    assert json.loads(capsys.readouterr().out) == [
        {"item_id": "x1", "rank": 1, "log_probability": -0.25, "title": "A [red] hat"},
        {"item_id": "x2", "rank": 2, "log_probability": -2.0, "title": None},
    ]
    assert call("recommend", "art", "--history", "a", "--include-seen", "--revision", "v") == 0
    assert asked[2:] == [("art", "v"), (["a"], 10, False)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["1", "x1", "-0.250", "A", "[red]", "hat"]
    assert lines[2].split() == ["2", "x2", "-2.000"]


def test_push_prints_the_commit_s_address(call, capsys, monkeypatch, tmp_path) -> None:
    import llmrec.cli.push as push

    asked: list[object] = []

    def push_to_hub(folder, repo_id, **options):
        asked.append((folder, repo_id, options))
        return "https://hub/me/rec/commit/1"

    monkeypatch.setattr(push, "push_to_hub", push_to_hub)
    assert call("push", str(tmp_path), "me/rec", "--private", "-m", "first") == 0
    assert call("push", str(tmp_path), "me/rec", "--public", "--revision", "v2") == 0
    assert call("push", str(tmp_path), "me/rec") == 0
    assert capsys.readouterr().out == "https://hub/me/rec/commit/1\n" * 3
    assert asked == [
        (tmp_path, "me/rec", {"private": True, "revision": None, "commit_message": "first"}),
        (tmp_path, "me/rec", {"private": False, "revision": "v2", "commit_message": None}),
        (tmp_path, "me/rec", {"private": None, "revision": None, "commit_message": None}),
    ]


def test_stages_lists_files_and_prints_one_path_alone(call, capsys) -> None:
    from llmrec.stages import stage_files, stage_path

    assert call("stages") == 0
    shown = capsys.readouterr().out
    assert [name for name in stage_files() if name not in shown] == []
    assert call("stages", "train/sft.py") == 0
    assert capsys.readouterr().out == f"{stage_path('train/sft.py')}\n"
    assert call("stages", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)) == stage_files()
    assert call("stages", "train/nope.py") == 2


def test_run_becomes_the_stage_s_process(call, capsys, monkeypatch, tmp_path) -> None:
    import llmrec.cli.run as run
    from llmrec.stages import stage_path

    commands: list[list[str]] = []
    monkeypatch.setattr(run.os, "execv", lambda path, command: commands.append(command))
    script = str(stage_path("train/sft.py"))
    assert call("run", "train/sft.py", "--config", "x.yaml", "--help") == 0
    assert commands[-1][1:] == ["-m", "accelerate.commands.launch", script, "--config", "x.yaml", "--help"]
    assert call("run", "--launcher", "python", "train/sft.py", "--launcher", "z", "--", "-k") == 0
    assert commands[-1] == [sys.executable, script, "--launcher", "z", "--", "-k"]
    config = tmp_path / "ddp.yaml"
    assert call("run", "--launch-config", str(config), "train/sft.py") == 2
    assert "no launch config" in capsys.readouterr().err
    config.touch()
    assert call("run", "--launch-config", str(config), "train/sft.py", "--a") == 0
    assert commands[-1][3:] == ["--config_file", str(config), script, "--a"]


def test_run_hands_on_the_script_s_output_and_exit_code(tmp_path) -> None:
    script = tmp_path / "llmrec" / "train" / "three.py"
    script.parent.mkdir(parents=True)
    script.write_text("import sys; print('ran', *sys.argv[1:]); raise SystemExit(3)")
    code = f"""
import sys, llmrec.stages
llmrec.stages.__file__ = {str(tmp_path / "llmrec" / "stages.py")!r}
sys.argv = ["llmrec", "run", "train/three.py", "--x", "1"]
from llmrec.cli.main import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (3, "ran --x 1\n"), result.stderr
