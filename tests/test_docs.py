"""What the documents say against what the code has: paths, links, flags, fields, keys, files."""

import importlib.util
import re
from inspect import signature
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer
from factories import random_recommender

from llmrec.cli.main import app
from llmrec.data import Interactions, Items, leave_one_out
from llmrec.data.columns import _ALIASES, FLAGS
from llmrec.engine.launch import server_command
from llmrec.environment import DEFAULT_KV_CACHE_GIB
from llmrec.evaluation.evaluation import evaluate
from llmrec.service.schema import (
    CatalogState,
    Condition,
    ItemScore,
    PrefixCap,
    RecommendedItem,
    RecommendRequest,
    RecommendResponse,
    Sampling,
    ScoreRequest,
    SearchRequest,
    StoredEvent,
)
from llmrec.stages import stage_files

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    file.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "prompts/*.md", "semantic_ids/*.md", "train/*.md", "serve/*.md")
    for file in ROOT.glob(pattern)
)
# Flags of programs that the documents name beside llmrec's own: vLLM, accelerate, TRL's SFTConfig, curl.
FOREIGN = {
    "--gpu-memory-utilization",
    "--api-key",
    "--config_file",
    "--enable-lora",
    "--num_processes",
    "--tensor-parallel-size",
}
TRAINER = {
    *("--gradient_checkpointing", "--per_device_train_batch_size", "--gradient_accumulation_steps", "--output_dir"),
    *("--use_cpu", "--report_to", "--save_total_limit", "--max_steps", "--use_liger_kernel"),
    *("--num_train_epochs", "--ddp_timeout"),
}


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    named = re.findall(r"`((?:llmrec|prompts|semantic_ids|train|serve|docs|tests|\.ci)/[\w./]+)`", text_of(document))
    named += re.findall(r"`([A-Z]+\.md)`", text_of(document))
    assert [name for name in named if not (ROOT / name).exists()] == []
    links = re.findall(r"\]\(([^)#]+)", text_of(document))
    home = (ROOT / document).parent
    assert [link for link in links if "://" not in link and not (home / link).exists()] == []


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """All flags of the command line and, as their fields spell them, of the stages' scripts."""
    found = set(FOREIGN | TRAINER | {"--config", "--help"})
    commands = typer.main.get_command(app).commands
    groups = [command for name in ("data", "ids", "scale") for command in commands[name].commands.values()]
    for command in (*commands.values(), *groups):
        for parameter in command.params:
            found |= {*parameter.opts, *parameter.secondary_opts}
    sources = [ROOT / name for name in stage_files() if name.endswith(".py")]
    found |= {"--quick", "--json"}  # of every script in benchmarks/
    owners = [ROOT / f"llmrec/{name}.py" for name in ("backbones/causal_lm", "data/arguments")]
    owners += sorted((ROOT / "llmrec").glob("*/*arguments.py"))
    for source in [*sources, *owners]:
        for name in re.findall(r"^    (\w+): [^=\n]+ = field\(", source.read_text(encoding="utf-8"), re.MULTILINE):
            found |= {f"--{name}", f"--{name.replace('_', '-')}"}
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_exist(document: str, flags: set[str]) -> None:
    prose = re.sub(r"^```.*?^```$", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(re.findall(r"`([^`\n]+)`", prose))))
    assert sorted(named - flags) == []


def test_trainer_s_flags_are_the_trainer_s() -> None:
    from transformers import TrainingArguments

    assert [flag for flag in TRAINER if flag.removeprefix("--") not in TrainingArguments.__dataclass_fields__] == []


def test_the_http_fields_and_defaults_are_those_of_the_models() -> None:
    asked, _, answered = text_of("docs/serving.md").partition("The answer, best item first")
    row = re.compile(r"^\| `([\w\[\].]+)` \| ([^|]+) \|", re.MULTILINE)
    rows = dict(row.findall(asked))
    for name, field in RecommendRequest.model_fields.items():
        said = rows[name].strip()
        if name == "num_beams":
            assert said == "the artefact's"
        elif not field.get_default(call_default_factory=True) and field.default not in (False, 0):
            assert said == "none"
        else:
            assert said == str(field.default).lower()
    rows = dict(row.findall(answered))
    assert {f"items[].{name}" for name in RecommendedItem.model_fields} <= rows.keys()
    assert set(RecommendResponse.model_fields) - {"items"} <= rows.keys()


def test_every_field_of_the_http_api_is_explained() -> None:
    text = text_of("docs/serving.md")
    models = (SearchRequest, ScoreRequest, ItemScore, CatalogState, StoredEvent, PrefixCap, Sampling, Condition)
    names = {name for model in models for name in model.model_fields}
    assert [name for name in sorted(names) if not re.search(rf"[`\"]{name}[`\"]", text)] == []


def test_the_serve_flags_and_defaults_are_those_of_the_command() -> None:
    serving = text_of("docs/serving.md")
    command = typer.main.get_command(app).commands["serve"]
    documented = set(re.findall(r"`(--[\w-]+)`", serving.partition("## Flags")[2].partition("## ")[0]))
    options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    assert options - {"--help"} == documented
    defaults = {name: parameter.default for name, parameter in signature(server_command).parameters.items()}
    defaults["kv_cache_gib"] = f"`VLLM_CPU_KVCACHE_SPACE`, else {DEFAULT_KV_CACHE_GIB}"
    for flag in ("--max-num-seqs", "--kv-cache-gib", "--max-beams", "--dtype"):
        (said,) = re.findall(rf"^\| `{flag}` \| ([^|]+) \|", serving, re.MULTILINE)
        assert said.strip() == str(defaults[flag.removeprefix("--").replace("-", "_")])


def test_the_head_sizes_are_vllm_s() -> None:
    # Read rather than imported: vLLM changes the process that imports it.
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("this environment has no vLLM")
    source = (Path(spec.origin).parent / "v1/attention/backends/cpu_attn.py").read_text(encoding="utf-8")
    (listed,) = re.findall(r"def get_supported_head_sizes.*?return \[([\d, ]+)\]", source, re.DOTALL)
    assert f"must be one of {listed}." in text_of("docs/serving.md")


def test_the_aliases_of_columns_are_those_of_the_code() -> None:
    row = r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| ([^|]+) \| `([\w-]+)` \|"
    rows = re.findall(row, text_of("docs/own_data.md"), re.MULTILINE)
    documented = {}
    for name, aliases, flag in rows:
        plain = [alias.strip().lower().replace("_", "") for alias in aliases.split(";")[0].split(",")]
        documented[name] = (set(plain) | {name.replace("_", "")}, flag)
    expected = {name: (set(aliases) | {name.replace("_", "")}, FLAGS[name]) for name, aliases in _ALIASES.items()}
    assert documented == expected


def test_every_key_of_a_result_is_explained() -> None:
    frame = pl.DataFrame({"user_id": ["u"] * 4 + ["v"] * 3, "item_id": list("abcdabc"), "timestamp": range(7)})
    interactions = Interactions.from_frame(frame)
    split = leave_one_out(interactions, Items.from_interactions(interactions))
    document = evaluate("none", split, scores=lambda h: np.zeros((len(h), 4)), ks=(10,)).document()
    text = text_of("docs/own_data.md").partition("## `result.json`")[2] + text_of("docs/evaluation.md")
    source = (ROOT / "train/score.py").read_text(encoding="utf-8")
    added = re.findall(
        r'^        "(\w+)":', source.partition('= {\n        "split"')[2].partition("\n    }")[0], re.MULTILINE
    )
    assert len(added) >= 10
    names = {re.sub(r"@\d+", "@k", re.sub(r"^(HR|NDCG|MRR)@10 ", "… ", name)) for name in document}
    assert [name for name in sorted(names | {*added, "served", "id_level"}) if f"`{name}`" not in text] == []
    assert [name for name in document["slices"] if not name.startswith("history") and f"`{name}`" not in text] == []


def test_every_file_of_an_artefact_is_explained(tmp_path: Path) -> None:
    folder = tmp_path / "artefact"
    random_recommender().save_pretrained(folder)
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    document = text_of("docs/artefact.md")
    assert [name for name in files if f"`{name}`" not in document] == []
    assert len(files) > 8


def test_every_recipe_of_training_is_in_its_table() -> None:
    document = text_of("train/README.md")
    assert [f.name for f in (ROOT / "train/recipes").glob("*.yaml") if f"| `{f.name}` |" not in document] == []


def test_the_changelog_has_this_version() -> None:
    import llmrec

    heads = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert heads[0] == ("Unreleased", "")
    assert heads[1][0] == llmrec.__version__
    assert heads[1][1]
