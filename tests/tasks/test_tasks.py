"""Every task's rows against what its definition says of tiny logs, spelt out anew."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs_with_events import BEGIN, DAY, answer_of, data_of, items_of, log_of, question_of

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import by_sample, global_temporal, leave_one_out
from llmrec.exceptions import DataError, PromptError
from llmrec.prompt import Event, Prompt, gap_in_words
from llmrec.tasks.mixture import TASKS, Mixture, Plan
from llmrec.tasks.ratings import rated_before
from llmrec.tasks.tables import Preferences, Queries

ONE = {"only": Prompt("{% for item in history %}{{ item.semantic_id }}, {% endfor %}->")}


def rows_of(data, *entries, seed=0):
    return list(Plan(Mixture.parse(entries or ("next_item",)), data, seed).rows())


def training_of(data):
    """Per user (place, item row) of the training part."""
    split = data.split
    for user in range(len(split.all_users)):
        yield user, [(place, int(split.rows[place])) for place in range(split.offsets[user], split.train_ends[user])]


def test_next_item_asks_for_every_training_item_but_the_first():
    data = data_of(templates={})
    expected = []
    for _, taken in training_of(data):
        items = [row for _, row in taken]
        expected += [(tuple(items[max(0, k - 3) : k]), items[k]) for k in range(1, len(items))]
    text, tokens = data.text, data.catalog.item_tokens
    found = rows_of(data)
    wanted = [
        data.prompt.encode(data.catalog, history, text, data.start) + tokens[target].tolist()
        for history, target in expected
    ]
    assert sorted(row["input_ids"] for row in found) == sorted(wanted)
    assert all(row["task"] == "next_item" and len(answer_of(row)) == 3 for row in found)
    assert all(row["labels"] == [-100] * (len(row["labels"]) - 3) + row["input_ids"][-3:] for row in found)


def test_sequences_make_every_training_item_a_target_once():
    data = data_of()
    found = rows_of(data, "sequence")
    targets = sorted(token for row in found for token in answer_of(row))
    wanted = [row for _, taken in training_of(data) for _, row in taken]
    assert targets == sorted(data.catalog.item_tokens[wanted].reshape(-1).tolist())
    assert {row["task"] for row in found} == {"sequence"}
    assert max(len(row["input_ids"]) for row in found) <= 1 + 3 * 4
    with pytest.raises(PromptError, match="semantic IDs alone"):
        rows_of(data_of(prompt=Prompt("Hello {{ history | length }}")), "sequence")


def test_titles_and_semantic_ids_answer_one_another():
    data = data_of(
        templates={
            "titles_to_id": {"only": Prompt("{% for i in history %}{{ i.title }};{% endfor %}")},
            "history_to_title": {"only": Prompt("{% for i in history %}{{ i.semantic_id }}{% endfor %} title:")},
        }
    )
    pairs = []
    for _, taken in training_of(data):
        items = [row for _, row in taken]
        pairs += [(items[max(0, k - 3) : k], items[k]) for k in range(1, len(items))]
    text, tokens = data.text, data.catalog.item_tokens
    wanted = [
        ([1, *text.encode("".join(f"Title number {k};" for k in history))], tokens[target].tolist())
        for history, target in pairs
    ]
    found = [(question_of(row), answer_of(row)) for row in rows_of(data, "titles_to_id")]
    assert sorted(found) == sorted(wanted)
    wanted = [
        (
            [1, *tokens[history].reshape(-1).tolist(), *text.encode(" title:")],
            [*text.encode(f" Title number {target}"), data.tokenizer.eos_token_id],
        )
        for history, target in pairs
    ]
    found = [(question_of(row), answer_of(row)) for row in rows_of(data, "history_to_title")]
    assert sorted(found) == sorted(wanted)


def test_items_are_found_by_what_they_have():
    templates = {
        "item_to_id": {
            "a": Prompt("A {{ attributes }}"),
            "d": Prompt("D {{ description }}"),
            "t": Prompt("T {{ title }}"),
        }
    }
    data = data_of(templates=templates)
    text, tokens = data.text, data.catalog.item_tokens

    def asked(entry):
        return sorted((answer_of(row), question_of(row)) for row in rows_of(data, entry))

    def wanted(sentence, rows):
        return sorted((tokens[row].tolist(), [1, *text.encode(sentence(row))]) for row in rows)

    every = range(12)
    assert asked("item_to_id/t") == wanted(lambda k: f"T Title number {k}", every)
    assert asked("item_to_id/d") == wanted(lambda k: f"D It is good for {k} things", [k for k in every if k % 3])
    expected = {k: f"A brand: Brand {'xyz'[k % 3]}; categories: Home, Tools{k % 2}, Very Long Words" for k in every}
    assert asked("item_to_id/a") != wanted(expected.get, [k for k in every if k % 4])  # cut to 40 tokens
    longer = replace(data, max_text_tokens=200)
    found = sorted((answer_of(row), question_of(row)) for row in rows_of(longer, "item_to_id/a"))
    assert found == wanted(expected.get, [k for k in every if k % 4])
    # Together: one row an item, by a template that has what it needs.
    rows = rows_of(longer, "item_to_id")
    assert sorted(answer_of(row) for row in rows) == sorted(tokens.tolist())
    begins = {text.decode(question_of(row)[1:2]) for text, row in ((data.tokenizer, row) for row in rows)}
    assert begins == {"A", "D", "T"}


def test_retired_items_are_no_answers_of_questions_about_items():
    data = data_of()
    data = replace(data, catalog=data.catalog.with_retired([2, 5], True))
    gone = {tuple(data.catalog.item_tokens[row].tolist()) for row in (2, 5)}
    for task in ("item_to_id", "search"):
        assert not gone & {tuple(answer_of(row)) for row in rows_of(data, task)}


def test_every_text_of_an_item_is_an_answer():
    data = data_of(templates={"id_to_item": {"only": Prompt("{{ column }} of {{ item.semantic_id }}:")}})
    text, tokens, table = data.text, data.catalog.item_tokens, items_of().to_dicts()
    wanted = []
    for row, item in enumerate(table):
        for column in ("title", "description", "brand", "categories"):
            if item[column] is not None:
                question = [1, *text.encode(f"{column} of "), *tokens[row].tolist(), *text.encode(":")]
                wanted.append((question, [*text.encode(f" {item[column]}"), data.tokenizer.eos_token_id]))
    found = [(question_of(row), answer_of(row)) for row in rows_of(data, "id_to_item")]
    assert sorted(found) == sorted(wanted)


def test_queries_of_a_table():
    data = data_of(templates={"search": {"only": Prompt("? {{ query }}")}})
    data = replace(data, queries=Queries([3, 3, 7], ["red thing", "blue  one", "x" * 300]))
    found = sorted((answer_of(row), question_of(row)) for row in rows_of(data, "search"))
    tokens = data.catalog.item_tokens
    short = [(tokens[3].tolist(), [1, *data.text.encode(f"? {words}")]) for words in ("red thing", "blue one")]
    assert [entry for entry in found if entry[0] == tokens[3].tolist()] == sorted(short)
    (long,) = (entry for entry in found if entry[0] == tokens[7].tolist())
    assert len(long[1]) <= 1 + 1 + 40


def test_queries_are_made_of_attributes():
    data = data_of(templates={"search": {"only": Prompt("{{ query }}")}})
    pieces = {row: {f"brand {'xyz'[row % 3]}", "home", f"tools{row % 2}", "very long words"} for row in range(12)}
    row_of = {tuple(tokens): row for row, tokens in enumerate(data.catalog.item_tokens.tolist())}
    seen = []
    for seed in range(10):
        rows = rows_of(data, "search=3", seed=seed)
        assert sorted(row_of[tuple(answer_of(row))] for row in rows) == sorted(3 * [k for k in range(12) if k % 4])
        for row in rows:
            item = row_of[tuple(answer_of(row))]
            query = data.tokenizer.decode(question_of(row)[1:])
            pairs = {f"{a} {b}" for a in pieces[item] for b in pieces[item] if a.startswith("b") != b.startswith("b")}
            assert query in pieces[item] | pairs
            seen.append(query in pieces[item])
    assert 0.3 < np.mean(seen) < 0.7
    bare = data_of(items=pl.DataFrame({"item_id": [f"i{k}" for k in range(12)]}))
    with pytest.raises(DataError, match="no table of queries, and no item has attributes"):
        rows_of(bare, "search")


def test_preferences_are_those_known_before():
    log = pl.DataFrame(
        {"user_id": ["a"] * 6 + ["b"] * 4, "item_id": [f"i{k}" for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)]}
    ).with_columns(timestamp=pl.Series([BEGIN + k * DAY for k in (0, 1, 2, 3, 4, 5, 0, 1, 2, 3)]))
    said = {"a": [(BEGIN + 1.5 * DAY, "early"), (BEGIN + 3.0 * DAY, "later"), (BEGIN + 4.5 * DAY, "held out")]}
    templates = {
        "preference": {"only": Prompt("{{ preference }}{% for i in history %}{{ i.semantic_id }}{% endfor %}")}
    }
    data = data_of(log, templates=templates, preferences=Preferences(True, said))
    # Training of a: i0 i1 i2 i3, of b: i6 i7. Known before i2 and, as "later" is said at its moment, before i3: early.
    tokens = data.catalog.item_tokens
    wanted = [
        ([1, *data.text.encode("early"), *tokens[[0, 1]].reshape(-1).tolist()], tokens[2].tolist()),
        ([1, *data.text.encode("early"), *tokens[[0, 1, 2]].reshape(-1).tolist()], tokens[3].tolist()),
    ]
    assert sorted((question_of(row), answer_of(row)) for row in rows_of(data, "preference")) == sorted(wanted)
    served = Prompt("{% if preference is defined %}{{ preference }}{% endif %}|")
    asking = replace(data, prompt=served, preferences=Preferences(True, said))
    assert list(asking.case_variables("valid")) == [{"preference": "later"}, {}]
    assert list(asking.case_variables("test")) == [{"preference": "held out"}, {}]
    timeless = replace(data, preferences=Preferences(False, {"b": [(-np.inf, "always")]}))
    assert len(rows_of(timeless, "preference")) == 1
    with pytest.raises(DataError, match="no table of preferences"):
        rows_of(replace(data, preferences=None), "preference")
    with pytest.raises(DataError, match="no clock"):
        rows_of(data_of(log_of(events=False), preferences=Preferences(True, said)), "preference")


def test_yes_and_no_come_from_ratings():
    templates = {
        "yes_no": {
            "only": Prompt(
                "{% for i in liked %}{{ i.semantic_id }}{% endfor %}|{% for i in disliked %}{{ i.semantic_id }}"
                "{% endfor %}|{{ candidate.semantic_id }}"
            )
        }
    }
    data = data_of(log_of(3, users=10), templates=templates, like_threshold=4.0)
    ratings, tokens, bar = data.split.ratings, data.catalog.item_tokens, data.text.encode("|")
    wanted = []
    for _, taken in training_of(data):
        rated = [(row, ratings[place]) for place, row in taken if not np.isnan(ratings[place])]
        for k, (row, rating) in enumerate(rated):
            shown = rated[max(0, k - 3) : k]
            liked = [token for one, mark in shown if mark >= 4 for token in tokens[one].tolist()]
            disliked = [token for one, mark in shown if mark < 4 for token in tokens[one].tolist()]
            answer = data.text.encode(" Yes" if rating >= 4 else " No")
            wanted.append(([1, *liked, *bar, *disliked, *bar, *tokens[row].tolist()], answer))
    found = [(question_of(row), answer_of(row)) for row in rows_of(data, "yes_no")]
    assert sorted(found) == sorted(wanted)
    assert {tuple(answer) for _, answer in found} == {tuple(data.text.encode(word)) for word in (" Yes", " No")}
    with pytest.raises(DataError, match="no training interaction has a rating"):
        rows_of(data_of(log_of(events=False)), "yes_no")


def test_what_was_rated_before_a_held_out_case_includes_validation():
    log = pl.DataFrame({"user_id": ["a"] * 5, "item_id": [f"i{k}" for k in range(5)], "rating": [5.0, 1, None, 4, 2]})
    split = leave_one_out(Interactions.from_frame(log), Items.from_frame(items_of()))
    assert rated_before(split, int(split.positions["test"][0]), 10, 4.0) == ([0, 3], [1])
    assert rated_before(split, int(split.positions["test"][0]), 2, 4.0) == ([3], [1])
    assert rated_before(split, int(split.positions["valid"][0]), 10, 5.5) == ([], [0, 1])


@pytest.mark.parametrize("protocol", [leave_one_out, global_temporal, by_sample])
def test_ratings_travel_with_their_interactions(protocol):
    log = log_of(5, users=20)
    split = protocol(Interactions.from_frame(log), Items.from_frame(items_of()))
    users = [split.all_users[user] for user in split.owner]
    found = sorted(
        (user, split.item_ids[row], time, -1.0 if np.isnan(rating) else rating)
        for user, row, time, rating in zip(users, split.rows, split.timestamps, split.ratings, strict=True)
    )
    wanted = log.select("user_id", "item_id", "timestamp", pl.col("rating").fill_null(-1.0)).rows()
    assert found == sorted(wanted)
    without = protocol(Interactions.from_frame(log.drop("rating")), Items.from_frame(items_of()))
    assert without.ratings is None


def test_events_of_the_history_are_shown():
    log = pl.DataFrame(
        {
            "user_id": ["a"] * 6,
            "item_id": [f"i{k}" for k in range(6)],
            "timestamp": [
                BEGIN,
                BEGIN + 3 * DAY,
                BEGIN + 3 * DAY,
                BEGIN + 33 * DAY,
                BEGIN + 34 * DAY,
                BEGIN + 35 * DAY,
            ],
            "action": ["view", None, "buy", "view", "view", "view"],
            "domain": ["x", "y", None, "x", "x", "x"],
        }
    )
    source = "{% for i in history %}[{{ i.action }}|{{ i.domain }}|{{ i.gap }}]{% endfor %}"
    data = data_of(log, templates={"next_item": {"all": Prompt(source)}})
    found = {data.tokenizer.decode(question_of(row)[1:]) for row in rows_of(data, "next_item/all")}
    assert found == {
        "[view|x|]",
        "[view|x|][|y|3 days later]",
        "[view|x|][|y|3 days later][buy||at the same time]",
    }
    # The history is cut before its gaps are told.
    short = replace(data, max_history=2)
    assert "[|y|][buy||at the same time]" in {
        data.tokenizer.decode(question_of(row)[1:]) for row in rows_of(short, "next_item/all")
    }


def test_templates_of_events_are_taken_where_the_log_has_them_or_by_name():
    shown = {"next_item": {"gaps": Prompt("{% for i in history %}{{ i.gap }}{% endfor %}g")} | ONE}
    with_events, without = data_of(templates=shown), data_of(log_of(events=False), templates=shown)
    assert len(rows_of(with_events, "next_item/gaps")) == len(rows_of(with_events, "next_item"))
    (task,) = Plan(Mixture.parse(["next_item"]), with_events, 0)._tasks
    assert set(task.templates) == {"gaps", "only", "served"}
    (task,) = Plan(Mixture.parse(["next_item"]), without, 0)._tasks
    assert set(task.templates) == {"only", "served"}
    with pytest.raises(PromptError, match="next_item/gaps shows gap of the history"):
        rows_of(without, "next_item/gaps")
    with pytest.raises(PromptError, match=r"no template 'gap'\. Name one of: gaps, only, served"):
        rows_of(without, "next_item/gap")


def test_numbers_of_an_order_are_no_gaps():
    log = log_of().with_columns(timestamp=pl.int_range(pl.len()))
    assert "gap" not in data_of(log).event_columns
    assert data_of(log_of()).event_columns == {"action", "domain", "gap"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ titel }}", "uses titel, which the task does not offer. It may use attributes, description, history"),
        ("{{ item.colour }}", "colour.*An item has the columns"),
        ("{{ title / 2 }}", "cannot be rendered"),
    ],
)
def test_what_a_template_misses_shows_before_the_first_row(source, message):
    with pytest.raises(PromptError, match=message):
        Plan(Mixture.parse(["item_to_id"]), data_of(templates={"item_to_id": {"x": Prompt(source)}}), 0)


def test_a_task_without_templates_says_so():
    with pytest.raises(PromptError, match="'search' has no template"):
        rows_of(data_of(templates={}), "search")


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_shipped_template_makes_rows_whose_answers_alone_are_learnt(task):
    said = {user: [(-np.inf, "I like it")] for user in [*(f"u{k}" for k in range(6)), "u-last"]}
    data = data_of(preferences=Preferences(False, said), max_text_tokens=200)
    (made,) = Plan(Mixture.parse([task]), data, 0)._tasks
    assert task == "sequence" or len(made.templates) >= 3
    assert task != "next_item" or {"actions", "domains", "gaps", "timeline"} <= set(made.templates)
    for name in made.templates:
        rows = rows_of(data, f"{task}/{name}")
        assert rows
        for row in rows:
            assert row["task"] == task
            answer = answer_of(row)
            assert answer
            assert row["labels"] == [-100] * (len(row["labels"]) - len(answer)) + answer
            assert row["input_ids"][-len(answer) :] == answer
            assert row["input_ids"][0] == data.start
            assert data.tokenizer.eos_token_id not in row["input_ids"][:-1]
            assert not data.tokenizer.decode(question_of(row)).endswith("\n")


ATTACKS = ["{{ 7 * 7 }}", "{% raw %}", "<|eos|>", "<s0_3>", "\ue0003\ue001"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_item_texts_stay_text_in_every_task(attack):
    items = items_of().with_columns(
        **{name: pl.lit(f"A {attack} b") for name in ("title", "description", "brand", "categories")}
    )
    said = Preferences(False, {"u-last": [(-np.inf, f"I {attack} it")]})
    data = data_of(items=items, preferences=said, max_text_tokens=200)
    queries = replace(data, queries=Queries([1, 2], [f"q {attack}", attack]))
    added = set(data.tokenizer.added_tokens_decoder) - {data.start}
    for task in sorted(TASKS):
        for row in rows_of(queries, task):
            items_shown = [id for id in question_of(row) if id in added]
            assert set(items_shown) <= set(data.catalog.item_tokens.reshape(-1).tolist())
            assert len(items_shown) % 3 == 0
            if task in ("item_to_id", "search", "titles_to_id"):
                assert not items_shown
            assert "49" not in data.tokenizer.decode(question_of(row))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_nothing_held_out_is_learnt(seed):
    """Held-out interactions are of items, actions, domains and ratings that training never sees."""
    rng = np.random.default_rng(seed)
    log, secrets = [], 0
    for user in range(4):
        length = int(rng.integers(1, 8))
        for k in range(length):
            held_out = length >= 3 and k >= length - 2
            item = f"i{6 + secrets % 6}" if held_out else f"i{rng.integers(6)}"
            secrets += held_out
            word = "secret" if held_out else "open"
            log.append(
                (f"u{user}", item, BEGIN + k * DAY * (400 if held_out else 1), word, word, 5.0 if held_out else 1.0)
            )
    log += [("v", f"i{k}", BEGIN + k, "open", "open", 1.0) for k in range(3)]
    log += [("v", f"i{k}", BEGIN + DAY * 900, "secret", "secret", 5.0) for k in (10, 11)]
    frame = pl.DataFrame(log, schema=["user_id", "item_id", "timestamp", "action", "domain", "rating"], orient="row")
    titles = items_of().with_columns(title=pl.Series([f"{'Hidden' if k >= 6 else 'Open'} {k}" for k in range(12)]))
    said = {f"u{k}": [(BEGIN - 1.0, "open words"), (BEGIN + DAY * 390.0, "secret words")] for k in range(4)}
    data = data_of(frame, titles, preferences=Preferences(True, said | {"v": [(BEGIN - 1.0, "open words")]}))
    hidden = {tuple(tokens) for tokens in data.catalog.item_tokens[6:].tolist()}
    entries = [task for task in TASKS if task not in ("item_to_id", "id_to_item", "search")]
    for row in rows_of(data, *entries, seed=seed):
        ids = row["input_ids"]
        assert not hidden & {tuple(ids[k : k + 3]) for k in range(len(ids))}
        shown = data.tokenizer.decode(ids)
        assert "Hidden" not in shown
        assert "secret" not in shown
        assert "year" not in shown
        assert row["task"] != "yes_no" or answer_of(row) == data.text.encode(" No")


def test_gaps_in_words():
    assert gap_in_words(float("nan")) == ""
    assert gap_in_words(-5) == "earlier"
    words = {59: "moments later", 60: "1 minute later", 3599: "59 minutes later", 7200: "2 hours later"}
    words |= {DAY: "1 day later", 14 * DAY - 1: "13 days later", 14 * DAY: "2 weeks later", 30 * DAY: "4 weeks later"}
    words |= {31 * DAY: "1 month later", 61 * DAY: "2 months later", 365 * DAY: "11 months later"}
    words |= {366 * DAY: "1 year later", 800 * DAY: "2 years later"}
    assert {seconds: gap_in_words(seconds) for seconds in words} == words


def test_events_are_read_from_requests():
    assert Event.of({"action": "buy", "timestamp": 3}) == Event("buy", None, 3.0)
    for bad in ({"time": 3}, {"timestamp": "noon"}, "buy", 3):
        with pytest.raises(PromptError, match="cannot be read"):
            Event.of(bad)
