"""Every command and every Python block of the documents, by what can be done with it in a test.

A command belongs to one class, and one that belongs to none fails the test:

- run: the README's `llmrec doctor|stages|recommend|push|data|baseline|compare|ids`, `cp` and `python semantic_ids/…`
  are executed in their order, in a folder with small files of the names that the README uses, untrained artefacts
  where training leaves its own, and a fake of the Hub on this machine. In the other documents they are parsed.
- parse: `llmrec quickstart|serve|run`, `accelerate launch`, `python train/…` and `python serve/…` run for minutes or
  for ever, so their options are parsed by the real parsers, with the recipe that they name; nothing is started.
- make: the target and the variables exist (`make --dry-run`), and what QUICKSTART_ARGS holds is parsed.
- curl: is run, by curl, against a server that runs here with transformers; it must succeed.
- shell: `source .venv/bin/activate`, where `make env` puts the environment.

Python blocks are executed, in the same folder; http://localhost:8000 is that server.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import typer
from factories import random_recommender

from llmrec.catalog import Catalog
from llmrec.cli.main import app
from llmrec.data import ITEM, make_sample
from llmrec.embedding import EmbeddingStore
from llmrec.engine.launch import running_server
from llmrec.recommender import Recommender
from llmrec.vocabulary import add_catalog_tokens

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("prompts", "semantic_ids", "train", "serve")
DOCUMENTS = (
    "README.md",
    *(f"docs/{name}.md" for name in ("own_data", "evaluation", "serving", "artefact", "living_catalog", "demo")),
    *(f"docs/{name}.md" for name in ("scaling", "sequence_models", "after_sft")),
)
READMES = ("prompts/README.md", "semantic_ids/README.md", "train/README.md", "serve/README.md")
SCALE_RUN_HERE = {"fit", "predict", "report"}  # a pilot that others have trained is in the workspace
RUN_HERE = {"doctor", "stages", "recommend", "push", "data", "baseline", "compare", "ids"}


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[str]:
    """The commands of a document's bash blocks, continued lines joined, comments left out."""
    lines = "\n".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def words(command: str) -> list[str]:
    """A command's words, without comments and the variables that it sets for itself."""
    split = shlex.split(command, comments=True)
    while split and re.match(r"[A-Z_]+=", split[0]):
        split.pop(0)
    return split


def is_run(command: str) -> bool:
    first, second, third, *_ = [*words(command), "", "", ""]
    if first == "llmrec" and second == "scale":
        return third in SCALE_RUN_HERE
    return first == "cp" or (first == "llmrec" and second in RUN_HERE) or second.startswith("semantic_ids/")


def parse_llmrec(arguments: list[str]) -> None:
    name, *rest = arguments
    command = typer.main.get_command(app).commands[name]
    if name in ("data", "ids", "scale"):
        command, rest = command.commands[rest[0]], rest[1:]
    context = command.make_context(name, rest)
    if name == "run":
        parse_script(context.params["stage"], list(context.params["args"] or []))


def parse_script(script: str, arguments: list[str]) -> None:
    """Parses a stage's arguments and its recipe, by the script's own parser."""
    spec = importlib.util.spec_from_file_location(f"readme_{Path(script).stem}", ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        # A recipe for a GPU asks for bfloat16, which a machine without one refuses.
        extra = ["--bf16", "False"] if script == "train/sft.py" else []
        module.make_parser().parse_args_and_config([*arguments, *extra], fail_with_unknown_args=True)
    finally:
        del sys.modules[spec.name]


def parse_accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    parsed = launch_command_parser().parse_args(arguments[1:])
    assert parsed.config_file is None or Path(parsed.config_file).is_file()
    parse_script(parsed.training_script, parsed.training_script_args)


def check_make(arguments: list[str]) -> None:
    known = set(re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name, _, value in (argument.partition("=") for argument in arguments if "=" in argument):
        assert name in known
        if name == "QUICKSTART_ARGS":
            parse_llmrec(["quickstart", *shlex.split(value)])
    done = subprocess.run(["make", "--dry-run", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_curl(arguments: list[str]) -> None:
    (url,) = [argument for argument in arguments if argument.startswith("localhost:8000/")]
    if "-d" in arguments:
        assert "Content-Type: application/json" in arguments
        json.loads(arguments[arguments.index("-d") + 1])
    assert url.partition("/")[2] in ("ready", "v1/recommend", "v1/score", "v1/catalog")


def check_source(arguments: list[str]) -> None:
    assert arguments == [".venv/bin/activate"]
    assert "venv=.venv\n" in (ROOT / ".ci" / "env.sh").read_text(encoding="utf-8")


def check_python(arguments: list[str]) -> None:
    parse_script(arguments[0], arguments[1:])


CHECKS = {
    "llmrec": parse_llmrec,
    "accelerate": parse_accelerate,
    "python": check_python,
    "make": check_make,
    "curl": check_curl,
    "source": check_source,
}


def test_the_first_screen_has_the_two_commands() -> None:
    assert commands("README.md")[:2] == ["make quickstart", "make test"]


@pytest.mark.parametrize(
    ("document", "command"),
    [(document, command) for document in (*DOCUMENTS, *READMES) for command in commands(document)],
)
def test_command_is_of_a_class_and_its_options_exist(
    document: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    first, *arguments = words(command)
    if first == "cp":  # run below
        assert document == "README.md"
        return
    assert first in CHECKS, f"{document}: no class for {command!r}"
    CHECKS[first](arguments)


def write_points(path: Path) -> None:
    """The table of a pilot of 18 trainings."""
    path.parent.mkdir(parents=True)
    grid = [(depth, width, tokens) for depth in (1, 2, 4) for width in (16, 32, 64) for tokens in (5e5, 1e6)]
    metrics = [0.3 - 0.1 / h - 1 / d + t / 1e8 + 0.001 * (place * 7 % 5) for place, (h, d, t) in enumerate(grid)]
    frame = pl.DataFrame(grid, schema=["depth", "width", "tokens"], orient="row")
    frame.with_columns(quality=0.19, metric=pl.Series(metrics), seed=0).write_csv(path)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder as a README's reader has it after a quickstart, with 100 items of the sample and no training."""
    for stage in STAGES:
        (tmp_path / stage).symlink_to(ROOT / stage)
    interactions, items = make_sample(seed=0)
    chosen = [*items[ITEM].to_list()[:99], "P00376"]
    items = items.filter(items[ITEM].is_in(chosen))
    interactions.filter(interactions[ITEM].is_in(chosen)).write_csv(tmp_path / "interactions.csv")
    items.write_csv(tmp_path / "items.csv")
    items.head(2).with_columns(item_id=pl.Series(["new-1", "new-2"])).write_csv(tmp_path / "new_items.csv")
    write_points(tmp_path / "runs" / "mine" / "pilot" / "points.csv")
    import torch

    base = random_recommender(num_items=len(items), sizes=(8, 8, 8), dtype=torch.float32)
    catalog = Catalog(items.to_dicts(), base.catalog.codes, base.catalog.codebook_sizes, base.catalog.token_ids)
    recommender = Recommender(base.model, base.tokenizer, catalog, base.prompt, base.settings)
    recommender.save_pretrained(tmp_path / "runs" / "quickstart" / "artefact")
    return tmp_path


@pytest.fixture
def served(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the workspace's artefact."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = tmp_path_factory.mktemp("served") / "server.log"
    with running_server(workspace / "runs/quickstart/artefact", port, log, backend="transformers") as server:
        server.wait_until_ready(timeout=300)
        yield server.url


def untrained(build: Path) -> Recommender:
    """A recommender of a build's items, where training would leave its artefact."""
    import torch

    base = random_recommender(num_items=10, sizes=(8, 8, 8), dtype=torch.float32)
    catalog = add_catalog_tokens(base.tokenizer, Catalog.from_build(build))
    base.model.resize_token_embeddings(len(base.tokenizer))
    return Recommender(base.model, base.tokenizer, catalog, base.prompt, base.settings, build)


@pytest.mark.slow
def test_commands_of_the_readme_run(workspace: Path, fake_hub, tmp_path_factory) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | fake_hub.variables(tmp_path_factory.mktemp("home")) | {"PATH": path}
    printed: dict[str, str] = {}
    for command in filter(is_run, commands("README.md")):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=workspace,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        # The doctor's code 1 says that this machine has a fault, not that the command has.
        allowed = {0, 1} if command.startswith("llmrec doctor") else {0}
        assert done.returncode in allowed, f"{command}\n{done.stdout}\n{done.stderr}"
        printed[command] = done.stdout
        if (workspace / "runs/mine/semantic_ids").is_dir() and not (workspace / "runs/mine/artefact").is_dir():
            untrained(workspace / "runs/mine/semantic_ids").save_pretrained(workspace / "runs/mine/artefact")
    assert json.loads((workspace / "runs/mine/ids.json").read_text())["collision_rate"] == 0
    grown, back = [
        text for command, text in printed.items() if command.startswith(("llmrec ids log", "llmrec ids rol"))
    ]
    assert "winter collection" in grown
    assert back.startswith("100 live items")
    assert len(EmbeddingStore.load(workspace / "runs/mine/embeddings").item_ids) == 100
    assert len(Catalog.from_build(workspace / "runs/mine/semantic_ids")) == 100
    assert (workspace / "my_prompt.jinja").read_text() == (ROOT / "prompts/next_item.jinja").read_text()
    assert fake_hub.private == {"user/my-recommender": True}
    card = (workspace / "runs/mine/card/card.md").read_text()
    assert all(name in card for name in ("item-cf", "ease"))
    assert (workspace / "runs/mine/report/report.html").is_file()
    assert json.loads((workspace / "runs/mine/pilot/fit.json").read_text())["n"] == 18
    assert (workspace / "runs/mine/pilot/report.html").is_file()
    local, from_hub = [text for command, text in printed.items() if command.startswith("llmrec recommend")]
    assert local == from_hub
    assert [line.split()[0] for line in local.splitlines()[1:]] == ["1", "2", "3", "4", "5"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_what_is_asked_by_curl_is_answered(served: str) -> None:
    asked = [command for document in DOCUMENTS for command in commands(document) if command.startswith("curl ")]
    assert len(asked) >= 5
    for command in asked:
        here = command.replace("localhost:8000", served).replace("curl ", "curl --fail-with-body --silent ", 1)
        done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        answer = json.loads(done.stdout)
        if "/v1/recommend" in command:
            assert len(answer["items"]) == json.loads(words(command)[-1])["k"]


def test_python_blocks_run(workspace: Path, served: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(workspace)
    for document in (*DOCUMENTS, *READMES):
        for block in blocks(document, "python"):
            exec(compile(block.replace("http://localhost:8000", served), document, "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:5]] == ["1", "2", "3", "4", "5"]
    assert "100 6" in printed
    (model,) = [line for line in printed if line.endswith(" llama")]
    assert "None" not in model


def test_the_tree_names_every_file() -> None:
    (tree,) = blocks("README.md", "text")
    listed, folders = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders[depth:] = [name]
        listed.add("".join(folders))
    assert [name for name in listed if not (ROOT / name).exists()] == []
    files = {file.relative_to(ROOT).as_posix() for file in (ROOT / "llmrec").rglob("*.py")}
    files |= {f.relative_to(ROOT).as_posix() for folder in ("docs", *STAGES) for f in (ROOT / folder).glob("*.*")}
    assert sorted(name for name in files if not name.endswith("__init__.py") and name not in listed) == []


@pytest.mark.parametrize("folder", ["semantic_ids/recipes", "train/recipes", "train/accelerate", "serve/recipes"])
def test_the_tree_names_every_recipe(folder: str) -> None:
    (tree,) = blocks("README.md", "text")
    stage, name = folder.split("/")
    inside = re.split(r"^(?=\S)", tree.split(f"\n{stage}/\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    (line,) = [line for line in inside.splitlines() if line.startswith(f"  {name}/")]
    assert [f.stem for f in (ROOT / folder).glob("*.yaml") if not re.search(rf"\b{f.stem}\b", line)] == []


def test_the_transcript_has_the_steps_of_quickstart() -> None:
    source = (ROOT / "llmrec/cli/quickstart.py").read_text(encoding="utf-8")
    steps = re.findall(r'run\.announce\("([^"]+)"\)', source)
    shown = re.findall(r"^\[(\d)/6\] (.+?)   \(", "\n".join(blocks("README.md", "console")), re.MULTILINE)
    assert shown == [(str(number), title) for number, title in enumerate(steps, start=1)]
