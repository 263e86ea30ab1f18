import numpy as np
import pytest
from factories import random_catalog
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.examples import IGNORED, answered, check_bare, check_lengths, next_item_rows, sequence_row, windows
from llmrec.exceptions import PromptError
from llmrec.prompt import Event, Prompt
from llmrec.vocabulary import PlainText, add_catalog_tokens, train_tokenizer

TOKENIZER = train_tokenizer(["text"], 300)
CATALOG = add_catalog_tokens(TOKENIZER, random_catalog(3))
ROW_OF = {tuple(tokens): row for row, tokens in enumerate(CATALOG.item_tokens.tolist())}
START = 1


def items_of(tokens):
    return [ROW_OF[tuple(tokens[place : place + 3])] for place in range(0, len(tokens), 3)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 39), max_size=40), st.integers(1, 9))
def test_every_item_is_a_target_once_with_the_context_before_it(history, max_history):
    targets = []
    for begin, done, end in windows(len(history), max_history):
        row = sequence_row(CATALOG, history[begin:end], done - begin, START)
        assert row["input_ids"][0] == START
        assert row["labels"][0] == IGNORED
        items = items_of(row["input_ids"][1:])
        assert len(items) <= max_history + 1
        for place, item in enumerate(items):
            labels = row["labels"][1 + 3 * place : 4 + 3 * place]
            if labels != [IGNORED] * 3:
                assert labels == CATALOG.item_tokens[item].tolist()
                now = len(targets)
                targets.append(item)
                assert history[now - place : now] == items[:place]
                # Nothing of the context is missing, unless the window is full or half of it at least is there.
                assert place == now or place >= max_history // 2
    assert targets == history


def test_next_item_rows_have_the_target_as_their_only_label():
    prompt = Prompt("{% for item in history %}{{ item.semantic_id }} {% endfor %}then")
    text = PlainText(TOKENIZER)
    (row,) = next_item_rows(prompt, CATALOG, [np.array([5, 6, 7])], [8], text, START, max_history=2)
    target = CATALOG.item_tokens[8].tolist()
    assert row["input_ids"] == prompt.encode(CATALOG, [6, 7], text, START) + target
    assert row["labels"] == [IGNORED] * (len(row["input_ids"]) - 3) + target


def test_a_sequence_has_the_targets_of_its_prefixes():
    text = PlainText(TOKENIZER)
    bare = Prompt("{% for item in history %}{{ item.semantic_id }}{% endfor %}")
    sequence = np.array([3, 1, 4, 1, 5])
    whole = sequence_row(CATALOG, sequence.tolist(), 0, START)
    histories = [sequence[:end] for end in range(1, 5)]
    single = list(next_item_rows(bare, CATALOG, histories, sequence[1:].tolist(), text, START, 10))
    assert items_of([id for id in whole["labels"] if id != IGNORED]) == [3, 1, 4, 1, 5]
    assert [items_of([id for id in row["labels"] if id != IGNORED])[0] for row in single] == [1, 4, 1, 5]
    assert single[-1]["input_ids"] == whole["input_ids"]
    assert whole["task"] == "sequence"
    assert {row["task"] for row in single} == {"next_item"}


def test_a_sequence_needs_a_bare_prompt():
    check_bare(Prompt("{% for item in history %}{{ item.semantic_id }}{% endfor %}"))
    with pytest.raises(PromptError, match="--tasks next_item"):
        check_bare(Prompt("Bought {% for item in history %}{{ item.semantic_id }}{% endfor %}"))


def test_next_item_rows_show_the_events_and_variables_of_their_history():
    prompt = Prompt("{{ preference }}{% for item in history %}{{ item.gap }}{{ item.semantic_id }}{% endfor %}")
    text = PlainText(TOKENIZER)
    events = [[Event(timestamp=0.0), Event(timestamp=60.0), Event(timestamp=180.0)], [Event(timestamp=0.0)]]
    histories, said = [np.array([5, 6, 7]), np.array([1])], [{"preference": "a"}, {"preference": "b"}]
    first, second = next_item_rows(prompt, CATALOG, histories, [8, 9], text, START, 2, events, said)
    tokens = CATALOG.item_tokens
    question = [START, *text.encode("a"), *tokens[6], *text.encode("2 minutes later"), *tokens[7]]
    assert first["input_ids"] == [*question, *tokens[8]]
    assert second["input_ids"] == [START, *text.encode("b"), *tokens[1], *tokens[9]]


def test_rows_longer_than_the_model_reads_are_an_error():
    rows = [{"input_ids": [1] * n, "labels": [1] * n, "task": f"t{n}"} for n in (3, 9, 7, 9, 5)]
    assert check_lengths(iter(rows), 9) == 9
    assert check_lengths([], 9) == 0
    message = (
        r"^3 row\(s\) are longer than the 6 tokens that the model reads; the longest has 9, of the task 't9'.*Lower"
    )
    with pytest.raises(PromptError, match=message):
        check_lengths(iter(rows), 6)


def test_a_prompt_leaves_room_for_the_longest_item():
    """A search may go through the catalog's longest item, whatever was taken next."""
    rows = [answered([0] * 7, [1, 2], "next_item"), answered([0] * 3, [1] * 5, "next_item")]
    assert check_lengths(rows, 9) == check_lengths(rows, 9, 2) == 9
    assert check_lengths(rows, 13, 6) == 13
    with pytest.raises(PromptError, match=r"1 row\(s\) are longer than the 12 tokens.*the longest has 13"):
        check_lengths(rows, 12, 6)
