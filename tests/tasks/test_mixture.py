"""Mixtures: what they say, how many rows they make, and that nothing but the seed decides them."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs_with_events import answer_of, data_of, question_of

from llmrec.exceptions import DataError
from llmrec.prompt import Prompt
from llmrec.tasks.mixture import TASKS, Entry, Mixture, Plan
from llmrec.tasks.task import shuffled

WORDINGS = {"item_to_id": {name: Prompt(f"{name} {{{{ title }}}}") for name in "abc"}}
DATA = data_of(templates=WORDINGS)
CASES = len(DATA.catalog)
ROW_OF = {tuple(tokens): row for row, tokens in enumerate(DATA.catalog.item_tokens.tolist())}


def asked(entry, seed=0, data=DATA):
    """(item, wording) of every row."""
    rows = Plan(Mixture.parse([entry]), data, seed).rows()
    return [(ROW_OF[tuple(answer_of(row))], data.tokenizer.decode(question_of(row)[1:2])) for row in rows]


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("next_item", Entry("next_item")),
        (" search=0.5 ", Entry("search", passes=0.5)),
        ("search:7", Entry("search", cap=7)),
        ("yes_no/titles=2:9", Entry("yes_no", "titles", 2.0, 9)),
    ],
)
def test_entries_are_read_and_written(text, entry):
    assert Entry.parse(text) == entry
    assert Entry.parse(str(entry)) == entry


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("next_itm", "There is no task 'next_itm'. Name one of: sequence, next_item, item_to_id"),
        ("", "There is no task ''"),
        ("search=many", "a number that is none"),
        ("search:1.5", "a number that is none"),
        ("search=", "a number that is none"),
        ("search=0", "asks for nothing"),
        ("search=-1", "asks for nothing"),
        ("search=inf", "asks for nothing"),
        ("search=nan", "asks for nothing"),
        ("search:0", "asks for nothing"),
        ("search=1=2", "is no entry of a mixture"),
        ("search:1=2", "is no entry of a mixture"),
    ],
)
def test_entries_that_cannot_be_read(text, message):
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        Mixture.parse(["next_item", text])


def test_mixtures_that_say_too_little_or_too_much():
    with pytest.raises(DataError, match="is empty"):
        Mixture.parse([])
    with pytest.raises(DataError, match="'search' twice"):
        Mixture.parse(["search", "next_item", "search=2"])
    assert len(Mixture.parse(["search", "search/query"]).entries) == 2


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 5), st.one_of(st.none(), st.integers(1, 40)), st.integers(0, 50))
def test_passes_and_caps_are_counted(passes, cap, seed):
    found = asked(str(Entry("item_to_id", None, passes, cap)), seed)
    wanted = max(1, math.floor(passes * CASES + 0.5))
    assert len(found) == (wanted if cap is None else min(wanted, cap))
    often = Counter(item for item, _ in found)
    # No case comes once more before all others have come as often.
    assert set(often.values()) <= {len(found) // CASES, -(-len(found) // CASES)}
    # A case that comes again is worded otherwise, until all wordings were used.
    for item in often:
        wordings = [wording for one, wording in found if one == item]
        assert len(set(wordings)) == min(3, len(wordings))


def test_a_cap_moves_no_wording_and_a_smaller_one_takes_a_part():
    whole = dict(asked("item_to_id"))
    parts = [set(asked(f"item_to_id:{cap}")) for cap in (3, 6, 9)]
    for part in parts:
        assert part <= set(whole.items())
    assert parts[0] < parts[1] < parts[2]
    assert set(asked("item_to_id=0.5")) == parts[1]


def test_wordings_and_items_are_drawn_evenly():
    wordings = Counter(wording for seed in range(200) for _, wording in asked("item_to_id", seed))
    expected = 200 * CASES / 3
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in wordings.values())
    items = Counter(item for seed in range(200) for item, _ in asked("item_to_id:3", seed))
    assert all(abs(items[item] - 50) < 5 * math.sqrt(50) for item in range(CASES))


def test_the_order_is_a_permutation_that_the_seed_decides():
    first, again, other = (asked("item_to_id", seed) for seed in (0, 0, 1))
    assert first == again
    assert [item for item, _ in first] != [item for item, _ in other]
    assert [item for item, _ in first] != sorted(item for item, _ in first)


def test_tasks_are_mixed_and_their_rows_are_those_they_have_alone():
    data = replace(DATA, templates=data_of().templates)
    entries = ["next_item", "item_to_id=2", "id_to_item:5", "titles_to_id=0.5"]
    mixed = list(Plan(Mixture.parse(entries), data, 3).rows())
    alone = [row for entry in entries for row in Plan(Mixture.parse([entry]), data, 3).rows()]
    key = repr
    assert sorted(map(key, mixed)) == sorted(map(key, alone))
    tasks = [row["task"] for row in mixed]
    assert tasks != sorted(tasks, key=tasks.index)


def test_rows_are_made_by_number():
    plan = Plan(Mixture.parse(["item_to_id=2"]), DATA, 0)
    every = list(plan.rows())
    assert len(plan) == len(every) == 2 * CASES
    assert [plan[place] for place in (5, 0, 23)] == [every[place] for place in (5, 0, 23)]
    assert list(plan.rows(4, 9)) == every[4:9]


def test_no_hash_seed_decides_a_row(run_python, checkout):
    program = f"""
import hashlib, json, sys
sys.path[:0] = [{str(checkout / "tests")!r}, {str(checkout / "tests" / "tasks")!r}]
from logs_with_events import data_of
from llmrec.tasks.dataset import cache_key
from llmrec.tasks.mixture import TASKS, Mixture, Plan
data = data_of()
mixture = Mixture.parse([task for task in TASKS if task != "preference"])
rows = list(Plan(mixture, data, 7).rows())
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest(), cache_key(mixture, data, 7), len(rows))
"""
    outputs = set()
    for number in ("0", "1", "12345"):
        done = run_python(program, PYTHONHASHSEED=number)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_every_permutation_has_its_number():
    found = {tuple(shuffled("abcd", number)) for number in range(24)}
    assert len(found) == 24
    assert shuffled("abcd", 24 * 10**20) == list("abcd")


def test_all_tasks_are_named_as_their_folders(checkout):
    folders = {path.name for path in (checkout / "prompts" / "tasks").iterdir()}
    assert folders == set(TASKS) - {"sequence"}
    assert np.all([TASKS[name].name == name for name in TASKS])
