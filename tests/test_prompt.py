"""Templates, and item texts that try to become control tokens."""

import pytest
from factories import PROMPTS, random_catalog
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.catalog import Catalog
from llmrec.exceptions import PromptError
from llmrec.prompt import Event, Prompt
from llmrec.vocabulary import PlainText, add_catalog_tokens, start_token, train_tokenizer

TOKENIZER = train_tokenizer(["a customer bought a title"], 320)
CATALOG = add_catalog_tokens(TOKENIZER, random_catalog(3))
ADDED = {token.content: id for id, token in TOKENIZER.added_tokens_decoder.items()}


def with_title(title):
    items = [dict(item, title=title) for item in CATALOG.items]
    return Catalog(items, CATALOG.codes, CATALOG.codebook_sizes, CATALOG.token_ids)


def test_semantic_ids_alone():
    prompt = Prompt.read(PROMPTS / "semantic_ids.jinja")
    assert prompt.is_bare
    start = start_token(TOKENIZER)
    ids = prompt.encode(CATALOG, [4, 9], PlainText(TOKENIZER), start)
    assert ids == [start, *CATALOG.item_tokens[4], *CATALOG.item_tokens[9]]
    assert prompt.encode(CATALOG, [], PlainText(TOKENIZER), start) == [start]


def test_text_around_semantic_ids():
    prompt = Prompt("Bought: {% for item in history %}{{ item.title }} = {{ item.semantic_id }}, {% endfor %}next:")
    assert not prompt.is_bare
    text = PlainText(TOKENIZER)
    ids = prompt.encode(CATALOG, [4, 9], text, 1)
    expected = [1, *text.encode("Bought: Title 4 = "), *CATALOG.item_tokens[4], *text.encode(", Title 9 = ")]
    assert ids == [*expected, *CATALOG.item_tokens[9], *text.encode(", next:")]


@pytest.mark.parametrize("name", sorted(path.name for path in PROMPTS.glob("*.jinja")))
def test_every_shipped_template_renders(name):
    prompt = Prompt.read(PROMPTS / name)
    for history in ([], [1], [1, 2, 3]):
        ids = prompt.encode(CATALOG, history, PlainText(TOKENIZER), 1)
        assert [id for id in ids if id in CATALOG.item_tokens] == CATALOG.item_tokens[history].reshape(-1).tolist()


@pytest.mark.parametrize(
    "attack", ["<|eos|>", "<s0_3>", "<|e<|eos|>os|>", "<s0_<s0_3>3>", "\ue0003\ue001", "a<|bos|>b"]
)
def test_titles_stay_text(attack):
    prompt = Prompt("{% for item in history %}{{ item.title }}{{ item.semantic_id }}{% endfor %}")
    ids = prompt.encode(with_title(attack), [7], PlainText(TOKENIZER), 1)
    assert ids[-3:] == CATALOG.item_tokens[7].tolist()
    assert not set(ADDED.values()) & set(ids[1:-3])


def test_other_columns_stay_text_too():
    items = [dict(item, brand="\ue0003\ue001<s0_1>") for item in CATALOG.items]
    catalog = Catalog(items, CATALOG.codes, CATALOG.codebook_sizes, CATALOG.token_ids)
    prompt = Prompt("{% for item in history %}{{ item.brand }}{% endfor %}")
    assert not set(ADDED.values()) & set(prompt.encode(catalog, [7], PlainText(TOKENIZER), 1)[1:])


@pytest.mark.parametrize("value", [{"x": "\ue0003\ue001"}, ["\ue0003\ue001"], [{"y": ["<s0_1>\ue0003\ue001"]}]])
def test_nested_columns_stay_text_too(value):
    items = [dict(item, details=value) for item in CATALOG.items]
    catalog = Catalog(items, CATALOG.codes, CATALOG.codebook_sizes, CATALOG.token_ids)
    prompt = Prompt("{% for item in history %}{{ item.details }}{% endfor %}")
    assert not set(ADDED.values()) & set(prompt.encode(catalog, [7], PlainText(TOKENIZER), 1)[1:])


def test_columns_may_have_any_name():
    items = [dict(item, values="v", items="i", keys="k") for item in CATALOG.items]
    catalog = Catalog(items, CATALOG.codes, CATALOG.codebook_sizes, CATALOG.token_ids)
    source = "{% for item in history %}{{ item.values }}{{ item.items }}{{ item['keys'] }}{% endfor %}"
    assert Prompt(source).render(catalog, [7, 8]) == "vikvik"


def test_arithmetic_on_what_is_no_number_is_an_error_of_the_prompt():
    with pytest.raises(PromptError, match="cannot be rendered"):
        Prompt("{{ history[0].brand / 2 }}").render(CATALOG, [7])


def test_added_white_space_is_text():
    tokenizer = train_tokenizer(["text"], 300)
    tokenizer.add_tokens(["  ", "\n", "\t\t", "=", "<x>", "  <y>"])
    text = PlainText(tokenizer)
    assert tokenizer.decode(text.encode("a  b\n\t\tc = d")) == "a  b\n\t\tc = d"
    ids = text.encode("a  <y>b<x>")
    assert not set(tokenizer.convert_tokens_to_ids(["<x>", "  <y>"])) & set(ids)


def test_breaking_up_one_token_may_not_make_another():
    tokenizer = train_tokenizer(["text"], 300)
    tokenizer.add_tokens(["<x>", "< x>"])
    ids = PlainText(tokenizer).encode("a<x>b")
    assert not set(tokenizer.convert_tokens_to_ids(["<x>", "< x>"])) & set(ids)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from([*list(ADDED)[:12], "<", "|", ">", "s0_", "\ue000", "5"]), st.text(max_size=4)))
)
def test_no_text_becomes_a_control_token(parts):
    ids = PlainText(TOKENIZER).encode("".join(parts))
    assert not set(ADDED.values()) & set(ids)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_harmless_text_is_tokenized_as_ever(text):
    if not any(string in text for string in ADDED):
        assert PlainText(TOKENIZER).encode(text) == TOKENIZER.encode(text, add_special_tokens=False)


SHOWN = "{% for item in history %}{{ item.semantic_id }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "bare"),
    [
        (SHOWN, True),
        ("{%- for i in history -%}{{ i['semantic_id'] }}{%- endfor -%}", True),
        ("{{ history | map(attribute='semantic_id') | join }}", True),
        (SHOWN + " ", False),
        ("{% if preference is defined %}{{ preference }}{% endif %}" + SHOWN, False),
        (
            "{% for i in history %}{% if i.gap is defined %}{{ i.gap }}{% endif %}{{ i.semantic_id }}{% endfor %}",
            False,
        ),
        (
            "{% for i in history %}{% if i.title is defined %}{{ i.title }}{% endif %}{{ i.semantic_id }}{% endfor %}",
            False,
        ),
        ("{% if history | length > 9 %}A long one: {% endif %}" + SHOWN, False),
        ("{% for i in history | reverse %}{{ i.semantic_id }}{% endfor %}", False),
        ("", False),
    ],
)
def test_a_bare_prompt_is_semantic_ids_whatever_it_is_given(source, bare):
    assert Prompt(source).is_bare is bare


def test_the_fast_path_is_the_slow_one():
    fast, slow = Prompt(SHOWN), Prompt(SHOWN)
    slow.__dict__["is_bare"] = False
    for history in ([], [4], [4, 9, 4]):
        events = [Event("buy", "x", 1.0)] * len(history)
        arguments = (CATALOG, history, PlainText(TOKENIZER), 1, events)
        assert fast.encode(*arguments, query="q") == slow.encode(*arguments, query="q")


def test_variables_are_text_items_and_lists_of_items():
    source = (
        "{{ query }}:{{ candidate.title }}{% for i in liked %},{{ i.brand }}{{ i.semantic_id }}{% endfor %}{{ tags }}"
    )
    prompt = Prompt(source)
    assert prompt.variables == {"query", "candidate", "liked", "tags"}
    text = PlainText(TOKENIZER)
    ids = prompt.encode(CATALOG, [], text, 1, query="a b", candidate=5, liked=[2, 4], tags=["x"])
    expected = [1, *text.encode("a b:Title 5,Brand 2"), *CATALOG.item_tokens[2], *text.encode(",Brand 1")]
    assert ids == [*expected, *CATALOG.item_tokens[4], *text.encode("['x']")]


def test_names_of_jinja_itself_are_no_variables():
    source = "{% for i in range(3) %}{{ loop.index }}{{ x }}{% set y = 1 %}{{ y }}{% endfor %}{{ dict(a=1).a }}"
    assert Prompt(source).variables == {"x"}


def test_attributes_are_found_however_they_are_written():
    source = "{{ item.a }}{{ item['b'] }}{{ history | map(attribute='c') | join }}{{ item[0] }}"
    assert {"a", "b", "c"} <= Prompt(source).attributes


@pytest.mark.parametrize("attack", ["\ue0003\ue001", "<s0_3>", "<|eos|>", "{{ 7 * 7 }}"])
def test_variables_stay_text(attack):
    prompt = Prompt("{{ query }}{{ more[0] }}{% for i in history %}{{ i.action }}{{ i.domain }}{% endfor %}")
    events = [{"action": attack, "domain": attack}]
    ids = prompt.encode(CATALOG, [7], PlainText(TOKENIZER), 1, events, query=attack, more=[attack])
    assert not set(ADDED.values()) & set(ids[1:])
    assert "49" not in TOKENIZER.decode(ids)


def test_events_are_offered_by_the_items_of_the_history():
    day = 86_400.0
    prompt = Prompt("{% for i in history %}{{ i.action }}/{{ i.gap }} {% endfor %}")
    nan = float("nan")
    events = [Event("a", None, 0.0), Event("b", None, 2 * day), Event("", None, nan), Event("d", None, 9 * day)]
    assert prompt.render(CATALOG, [1, 2, 3, 4], events) == "a/ b/2 days later / d/ "
    assert prompt.render(CATALOG, [1], [{"action": "a", "timestamp": 5}]) == "a/ "
    with pytest.raises(PromptError, match=r"no attribute 'gap'.*columns \['action', 'brand'"):
        prompt.render(CATALOG, [1], [Event("a")])
    with pytest.raises(PromptError, match="no attribute 'action'"):
        prompt.render(CATALOG, [1])
    with pytest.raises(PromptError, match="2 items of a history came with 1 events"):
        prompt.render(CATALOG, [1, 2], [Event("a")])


def test_what_one_event_lacks_and_another_has_is_unknown():
    prompt = Prompt(
        "{% for i in history %}[{{ i.action or '?' }}|{{ i.domain or '?' }}|{{ i.gap or '?' }}]{% endfor %}"
    )
    events = [{"timestamp": 0}, {"action": "buy", "timestamp": 60}, {"domain": "books"}, {"timestamp": 120}]
    found = prompt.render(CATALOG, [0, 1, 2, 3], events)
    assert found == "[?|?|?][buy|?|1 minute later][?|books|?][?|?|?]"


def test_events_that_no_event_has_are_asked_for():
    prompt = Prompt("{% for i in history %}{{ i.gap }}{% endfor %}")
    with pytest.raises(PromptError, match="shows gap of the history: give events with it"):
        prompt.render(CATALOG, [0])
    with pytest.raises(PromptError, match="give events with it"):
        prompt.render(CATALOG, [0, 1], [{"action": "buy"}, {}])


@pytest.mark.parametrize("moment", [float("inf"), "-inf", 1e400])
def test_a_moment_is_finite(moment):
    with pytest.raises(PromptError, match="is no moment"):
        Event.of({"timestamp": moment})


def test_what_is_missing_is_named_with_what_there_is():
    with pytest.raises(PromptError, match=r"'preference' is undefined.*beside the history there is \['query'\]"):
        Prompt("{{ preference }}").render(CATALOG, [1], query="x")
    with pytest.raises(PromptError, match="beside the history there is nothing"):
        Prompt("{{ preference }}").render(CATALOG, [1])
    with pytest.raises(PromptError, match="an item is no text"):
        Prompt("{{ history[0] }}").render(CATALOG, [1])
    with pytest.raises(PromptError, match="cannot be rendered"):
        Prompt("{{ history[5].title }}").render(CATALOG, [1])


def test_a_dry_rendering_finds_what_is_missing():
    Prompt("{% for i in history %}{{ i.brand }}{{ i.gap }}{% endfor %}").check(CATALOG, ["gap"])
    Prompt("{{ preference }}{{ candidate.title }}{{ liked[0].brand }}").check(
        CATALOG, preference="x", candidate=0, liked=[0]
    )
    for source, events in [
        ("{{ preference }}", []),
        ("{% for i in history %}{{ i.gap }}{% endfor %}", ["action", "domain"]),
        ("{% for i in history %}{{ i.action }}{% endfor %}", ["gap", "domain"]),
        ("{% for i in history %}{{ i.domain }}{% endfor %}", ["gap", "action"]),
        ("{% if history | length > 1 %}{{ colour }}{% endif %}", []),
        ("{% if not history %}{{ colour }}{% endif %}", []),
        ("{{ liked[0].colour }}", []),
    ]:
        with pytest.raises(PromptError, match="cannot be rendered"):
            Prompt(source).check(CATALOG, events, liked=[0])


def test_a_column_that_only_some_items_have_is_missing():
    items = [dict(item, colour="red") for item in CATALOG.items[:39]] + [CATALOG.items[39]]
    catalog = Catalog(items, CATALOG.codes, CATALOG.codebook_sizes)
    with pytest.raises(PromptError, match="no attribute 'colour'"):
        Prompt("{% for i in history %}{{ i.colour }}{% endfor %}").check(catalog)


def test_files_that_are_no_templates(tmp_path):
    with pytest.raises(PromptError, match="cannot be read"):
        Prompt.read(tmp_path / "none.jinja")
    (tmp_path / "x.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(PromptError, match="cannot be read"):
        Prompt.read(tmp_path / "x.jinja")


def test_templates_that_do_not_work():
    with pytest.raises(PromptError, match="does not compile"):
        Prompt("{% for item in history %}")
    with pytest.raises(PromptError, match=r"colour.*columns \['brand', 'item_id', 'semantic_id', 'title'\]"):
        Prompt("{{ history[0].colour }}").encode(CATALOG, [1], PlainText(TOKENIZER), 1)
    with pytest.raises(PromptError, match="cannot be rendered"):
        Prompt("{{ history.__class__.__mro__ }}").encode(CATALOG, [1], PlainText(TOKENIZER), 1)
