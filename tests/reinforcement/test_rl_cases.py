"""RolloutCases: prompts as serving has them, and nothing of validation or test."""

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rl_logs import data_of, items_of, log_of

from llmrec.artefact_parts import PromptEncoder, Settings
from llmrec.exceptions import DataError, PromptError
from llmrec.prompt import Prompt
from llmrec.reinforcement.cases import RolloutCases
from llmrec.tasks.tables import Preferences

HELD = data_of(log_of(2, users=10))
WITH_TEXT = Prompt(
    "A customer{% for item in history %} took {{ item.semantic_id }} {{ item.title }}, {{ item.action }} "
    "{{ item.gap }};{% endfor %} next:"
)


@pytest.mark.parametrize("protocol", ["leave-one-out", "global-temporal"])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_of_validation_or_test_gets_in(protocol, seed):
    held = data_of(log_of(seed, users=12), protocol=protocol)
    split = held.split
    cases = RolloutCases.of(held, later_items=4, min_history=0)
    trained = {(user, place) for user, rows in enumerate(split.train) for place in range(len(rows))}
    asked = set()
    for case in range(len(cases)):
        user, history, later = int(cases.users[case]), cases.histories[case], cases.later[case]
        train = split.train[user].tolist()
        place = len(history)
        assert train[:place] == history.tolist()
        assert train[place] == cases.targets[case]
        assert later.tolist() == train[place : place + 4]  # and so ends where training does
        assert cases.places[case] == split.offsets[user] + place < split.train_ends[user]
        assert cases.times[case] == split.timestamps[cases.places[case]]
        asked.add((user, place))
    assert asked == trained
    assert len(cases) == len(trained)
    held_out = np.concatenate([split.positions["valid"], split.positions["test"]])
    assert len(held_out)
    assert not set(cases.places.tolist()) & set(held_out.tolist())


def test_changing_what_is_held_out_changes_nothing():
    """The cases of a log are those of a log that ends where training does."""
    log = log_of(5, users=10)
    held = data_of(log, prompt=WITH_TEXT)
    moved = log.with_columns(row=pl.int_range(pl.len()).over("user_id"), size=pl.len().over("user_id")).with_columns(
        item_id=pl.when(pl.col("row") >= pl.col("size") - 2).then(pl.lit("i11")).otherwise("item_id"),
        action=pl.when(pl.col("row") >= pl.col("size") - 2).then(pl.lit("other")).otherwise("action"),
    )
    assert not moved["item_id"].equals(log["item_id"])
    other = data_of(moved.drop("row", "size"), prompt=WITH_TEXT)
    long = log.group_by("user_id").len().filter(pl.col("len") < 3)["user_id"].to_list()
    first, second = (RolloutCases.of(one, later_items=3) for one in (held, other))
    # Users of fewer than three interactions are all training.
    kept = [case for case in range(len(first)) if held.split.all_users[first.users[case]] not in long]
    assert len(kept) > 5
    for case in kept:
        assert first.prompts[case] == second.prompts[case]
        assert first.later[case].tolist() == second.later[case].tolist()


@pytest.mark.parametrize("prompt", ["bare", "text", "preference"])
def test_prompts_are_those_that_serving_makes(prompt):
    source = {
        "bare": data_of().prompt,
        "text": WITH_TEXT,
        "preference": Prompt("{{ preference }}:{% for item in history %}{{ item.semantic_id }}{% endfor %}"),
    }[prompt]
    words = {"u0": "likes " + "very " * 60 + "old books", "u1": "a\nb", "u2": "tea"}
    said = Preferences(False, {user: [(-math.inf, text)] for user, text in words.items()})
    held = data_of(log_of(1), prompt=source, preferences=said if prompt == "preference" else None)
    encoder = PromptEncoder(
        held.tokenizer, held.catalog, held.prompt, Settings(max_history=held.max_history, max_text_tokens=40)
    )
    cases = RolloutCases.of(held)
    assert len(cases) > 5
    for case in range(len(cases)):
        begin, place = held.split.offsets[cases.users[case]], cases.places[case]
        user = held.split.all_users[cases.users[case]]
        variables = {"preference": words[user]} if prompt == "preference" else {}
        rows, events = cases.histories[case].tolist(), held.logged.between(int(begin), int(place))
        assert cases.prompts[case] == encoder.encode(rows, events, encoder.prompt_with(variables), **variables)
    if prompt == "preference":  # the others' users said nothing, and cannot be asked for
        assert {held.split.all_users[user] for user in cases.users} <= set(words)


def test_item_text_is_no_control_token():
    items = items_of().with_columns(title=pl.lit("<s0_1> </s> good"))
    held = data_of(items=items, prompt=Prompt("{% for item in history %}{{ item.title }}{% endfor %} next:"))
    codes = set(np.concatenate(held.catalog.require_tokens()).tolist())
    for prompt in RolloutCases.of(held).prompts:
        assert prompt[0] == held.start
        assert not codes & set(prompt[1:])
        assert held.end not in prompt[1:]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(0, 12), st.integers(0, 5), st.booleans())
def test_draws(per_user, max_cases, seed, repeats):
    cases = RolloutCases.of(HELD, per_user, max_cases, seed, repeats=repeats)
    everything = RolloutCases.of(HELD, repeats=repeats)
    assert set(cases.places.tolist()) <= set(everything.places.tolist())
    assert (np.diff(cases.places) > 0).all()
    most = np.bincount(everything.users)
    expected = int(np.minimum(most, per_user or most.max()).sum())
    assert len(cases) == min(expected, max_cases or expected)
    assert np.bincount(cases.users).max() <= (per_user or most.max())
    again = RolloutCases.of(HELD, per_user, max_cases, seed, repeats=repeats)
    assert again.places.tolist() == cases.places.tolist()
    more = RolloutCases.of(HELD, per_user, max_cases + 3 if max_cases else 0, seed, repeats=repeats)
    assert set(cases.places.tolist()) <= set(more.places.tolist())
    if not repeats:
        assert all(target not in history for target, history in zip(cases.targets, cases.histories, strict=True))


def test_seeds_draw_other_cases_and_every_case_is_drawn_by_some():
    everything = set(RolloutCases.of(HELD).places.tolist())
    drawn = [frozenset(RolloutCases.of(HELD, 1, 0, seed).places.tolist()) for seed in range(60)]
    assert len(set(drawn)) > 20
    assert set().union(*drawn) == everything


def test_what_cannot_be_asked_is_left_out():
    held = data_of(log_of(3), prompt=Prompt("after {{ history[-1].semantic_id }}"))
    assert min(len(one) for one in RolloutCases.of(held, min_history=0).histories) == 1
    bare = data_of(log_of(3))
    assert min(len(one) for one in RolloutCases.of(bare, min_history=0).histories) == 0
    assert min(len(one) for one in RolloutCases.of(bare).histories) == 1
    assert min(len(one) for one in RolloutCases.of(bare, min_history=2).histories) == 2
    retired = data_of(log_of(3))
    target = int(RolloutCases.of(retired).targets[0])
    object.__setattr__(retired, "catalog", retired.catalog.with_retired([target], True))
    assert target in RolloutCases.of(bare).targets
    assert target not in RolloutCases.of(retired).targets


def test_a_part_of_the_cases():
    cases = RolloutCases.of(HELD, later_items=2)
    part = cases.select([3, 0])
    assert len(part) == 2
    assert part.prompts == [cases.prompts[3], cases.prompts[0]]
    assert part.targets.tolist() == cases.targets[[3, 0]].tolist()
    assert part.places.tolist() == cases.places[[3, 0]].tolist()
    assert part.later[1].tolist() == cases.later[0].tolist()
    assert part.times.tolist() == cases.times[[3, 0]].tolist()
    assert part.users.tolist() == cases.users[[3, 0]].tolist()
    assert part.histories[0].tolist() == cases.histories[3].tolist()


def test_a_log_without_times_has_none():
    assert RolloutCases.of(data_of(log_of(events=False))).times is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"per_user": -1}, "per_user is -1"),
        ({"max_cases": -2}, "max_cases is -2"),
        ({"later_items": 0}, "later_items is 0"),
        ({"min_history": -1}, "min_history is -1"),
        ({"min_history": 99}, "99 or more"),
    ],
)
def test_numbers_out_of_range(options, said):
    with pytest.raises(DataError, match=said):
        RolloutCases.of(HELD, **options)


def test_prompts_that_no_case_can_fill():
    with pytest.raises(PromptError, match="uses query"):
        RolloutCases.of(data_of(prompt=Prompt("find {{ query }}")))
    with pytest.raises(PromptError, match="gap"):
        RolloutCases.of(data_of(log_of(events=False), prompt=WITH_TEXT))
    with pytest.raises(DataError, match="No training interaction"):
        RolloutCases.of(data_of(prompt=Prompt("{{ preference }}")))


def test_the_content_hash_is_of_prompts_histories_and_targets():
    cases = RolloutCases.of(HELD)
    first = cases.content_hash
    assert RolloutCases.of(HELD).content_hash == first
    assert cases.select(range(len(cases) - 1)).content_hash != first
    for changed in (
        replace(cases, targets=cases.targets[::-1].copy()),
        replace(cases, prompts=[[*cases.prompts[0], 3], *cases.prompts[1:]]),
        replace(cases, histories=[np.append(cases.histories[0], 1), *cases.histories[1:]]),
        # Where one list ends and the next begins counts, too.
        replace(cases, prompts=[cases.prompts[0][:-1], [cases.prompts[0][-1], *cases.prompts[1]], *cases.prompts[2:]]),
    ):
        assert changed.content_hash != first
    assert replace(cases, users=cases.users + 1).content_hash == first
