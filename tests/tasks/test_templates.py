"""Templates as files: those shipped, a user's, and those of an artefact."""

import pytest

from llmrec.exceptions import PromptError
from llmrec.prompt import Prompt
from llmrec.tasks.templates import load_templates, save_templates, shipped_templates


def sources(templates):
    return {task: {name: prompt.source for name, prompt in named.items()} for task, named in templates.items()}


def test_saved_templates_are_loaded_alike(tmp_path):
    templates = {
        "search": {"b": Prompt("{{ query }}\n\nItem: "), "a": Prompt(" x")},
        "next_item": {"c": Prompt("é\n")},
    }
    save_templates(templates, tmp_path)
    loaded = load_templates(tmp_path)
    assert sources(loaded) == sources(templates)
    assert [list(named) for named in loaded.values()] == [["c"], ["a", "b"]]
    assert list(loaded) == ["next_item", "search"]


def test_shipped_templates_survive_a_round_trip(tmp_path):
    save_templates(shipped_templates(), tmp_path)
    assert sources(load_templates(tmp_path)) == sources(shipped_templates())
    assert list(shipped_templates(["search", "absent"])) == ["search"]


@pytest.mark.parametrize(("task", "name"), [("..", "x"), ("search", "../x"), ("search", ""), ("Search", "x")])
def test_names_are_no_paths(tmp_path, task, name):
    with pytest.raises(PromptError, match="cannot be saved under that name"):
        save_templates({task: {name: Prompt("x")}}, tmp_path / "deep" / "er")
    assert not list(tmp_path.rglob("*.jinja"))


def test_a_broken_template_is_named(tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "bad.jinja").write_text("{% for %}")
    with pytest.raises(PromptError, match=r"search/bad\.jinja: The prompt template does not compile"):
        load_templates(tmp_path)
    (tmp_path / "search" / "bad.jinja").write_bytes(b"\xff")
    with pytest.raises(PromptError, match=r"search/bad\.jinja.*cannot be read"):
        load_templates(tmp_path)
    assert load_templates(tmp_path / "none") == {}
