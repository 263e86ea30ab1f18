"""`llmrec recommend` with conditions on the items, variety and explanations."""

import json

import pytest
import typer
from factories import random_recommender
from typer.testing import CliRunner

from llmrec import Recommender
from llmrec.catalog import Catalog
from llmrec.cli.recommend import command, read_filters, recommend
from llmrec.exceptions import FilterError, RequestError

KINDS = {"brand": "text", "price": "number", "new": "flag", "tags": "list"}


@pytest.fixture
def made(monkeypatch):
    """A recommender with priced items, which every path loads."""
    made = random_recommender(5, hidden_size=32)
    items = [{**item, "price": row} for row, item in enumerate(made.catalog.items)]
    catalog = Catalog(items, made.catalog.codes, made.catalog.codebook_sizes, made.catalog.token_ids)
    made = Recommender(made.model, made.tokenizer, catalog, made.prompt, made.settings)
    monkeypatch.setattr(Recommender, "from_pretrained", lambda *_, **__: made)
    return made


def ask(*words):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, ["art", *words])


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--history", "item-1"], {}),
        (["--item", "item-1", "--filter", "price<=20", "--filter", "brand=Brand 0"],
         {"filters": {"price": {"max": 20}, "brand": {"any_of": ["Brand 0"]}}}),
        (["--item", "item-1", "--filter", "price >= 5", "--filter", "price!=7"],
         {"filters": {"price": {"min": 5, "none_of": [7]}}}),
        (["--item", "item-1", "--allow", "item-3", "--allow", "item-4"], {"allow": ["item-3", "item-4"]}),
        (["--item", "item-1", "--deny", "item-3", "--include-seen"], {"deny": ["item-3"], "exclude_seen": False}),
        (["--item", "item-1", "--normalize", "legal"], {"normalize": "legal"}),
        (["--item", "item-1", "--prefix-cap", "1:1", "--num-beams", "40"],
         {"prefix_cap": {"levels": 1, "most": 1}, "num_beams": 40}),
        (["--item", "item-1", "--temperature", "2", "--seed", "3"], {"sampling": {"temperature": 2, "seed": 3}}),
        (["--text", "a customer bought"], {"text": "a customer bought", "history": None}),
    ],
)  # fmt: skip
def test_the_command_s_options_are_those_of_the_recommender(made, words, options):
    done = ask(*words, "-k", "7", "--json", "--explain")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    wanted = made.recommend(options.pop("history", ["item-1"]), 7, **options)
    assert [row["item_id"] for row in found] == [item.item_id for item in wanted]
    for row, item in zip(found, wanted, strict=True):
        assert row["semantic_id"] == list(item.semantic_id)
        assert row["level_log_probabilities"] == pytest.approx(list(item.level_log_probabilities))


def test_an_explanation_is_a_column(made):
    lines = ask("--item", "item-1", "-k", "2", "--explain").output.splitlines()
    best = made.recommend(["item-1"], 2)[0]
    path = " ".join(
        f"{code} ({part:.2f})" for code, part in zip(best.semantic_id, best.level_log_probabilities, strict=True)
    )
    assert path in lines[1]
    assert path not in ask("--item", "item-1", "-k", "2").output
    assert "semantic_id" not in ask("--item", "item-1", "--json").output


def test_filters_are_read_by_the_kinds_of_attributes():
    said = ["brand=a=b", "brand=c", "price<=2", "price>=1", "price!=1.5", "new=TRUE", "tags!=x"]
    assert read_filters(said, KINDS) == {
        "brand": {"any_of": ["a=b", "c"]},
        "price": {"max": 2.0, "min": 1.0, "none_of": [1.5]},
        "new": {"any_of": [True]},
        "tags": {"none_of": ["x"]},
    }
    assert read_filters(["lost=1"], KINDS) == {"lost": {"any_of": ["1"]}}  # the recommender says what there is
    for text, message in [
        ("price", "cannot be read"),
        ("=3", "cannot be read"),
        ("price=cheap", "compares with 'cheap'. Give a number there"),
        ("brand<=x", "Give a number there"),
        ("new=1", "Give true or false there"),
        ("price<=3", "a second max"),
    ]:
        with pytest.raises(FilterError, match=message):
            read_filters(["price<=2", text], KINDS)


@pytest.mark.parametrize("text", ["1", "a:b", "1:2:3", ""])
def test_a_cap_that_cannot_be_read_is_refused_before_the_artefact_is_read(text):
    with pytest.raises(RequestError, match="Write LEVELS:MOST, such as 1:3"):
        recommend("no/where", ["item-1"], prefix_cap=text)
