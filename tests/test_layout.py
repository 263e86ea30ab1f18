"""The house's own rules: who may import whom, and what lies where."""

import subprocess
import sys

import pytest

from llmrec.stages import FOLDERS

TOP_LEVEL = {
    ".ci", ".gitignore", "CHANGELOG.md", "Makefile", "PAPERS.md", "README.md", "benchmarks", "docs", "llmrec",
    "prompts", "pyproject.toml", "semantic_ids", "serve", "tests", "train",
}  # fmt: skip


@pytest.mark.parametrize("file", ["llmrec/catalog.py", "llmrec/engine/http.py", "train/sft.py", "serve/server.py"])
@pytest.mark.parametrize("statement", ["import train", "from serve import server", "import semantic_ids.build"])
def test_ruff_refuses_imports_of_stages(checkout, file, statement):
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", file, "-"]
    done = subprocess.run(command, input=statement + "\n", capture_output=True, text=True, cwd=checkout, check=False)
    assert done.returncode == 1
    assert "pass a folder" in done.stdout


def test_stages_are_no_packages_and_the_library_repeats_none_of_their_names(checkout):
    for folder in FOLDERS:
        assert not list((checkout / folder).rglob("__init__.py"))
        assert not (checkout / "llmrec" / folder).exists()
        assert not (checkout / "llmrec" / f"{folder}.py").exists()


def test_the_top_level_is_the_agreed_one(checkout):
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=checkout, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    assert {name.partition("/")[0] for name in tracked.stdout.splitlines()} <= TOP_LEVEL


@pytest.mark.parametrize("package", ["vllm", "flash_attn", "bitsandbytes", "datasets"])
def test_training_imports_without(run_python, package):
    program = f"""
import sys
sys.modules[{package!r}] = None
import llmrec.backbones.causal_lm, llmrec.decoding, llmrec.examples, llmrec.recommender, llmrec.training.ranking
import importlib.util
spec = importlib.util.spec_from_file_location("sft", "train/sft.py")
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
