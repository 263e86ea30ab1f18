"""CaseLists: which prompt each held-out case is asked by, and that lists come back in the order of the cases."""

from types import SimpleNamespace

import numpy as np
import pytest

from llmrec.tasks.case_lists import CaseLists

SAID = ["cheap", None, "quiet", None, "red"]


def held(variables=("history", "preference"), attributes=()):
    """Five cases, of which two said nothing; case c has the history c, 10 + c and events of its number."""
    split = SimpleNamespace(histories=lambda part: [np.array([case, 10 + case]) for case in range(5)])
    return SimpleNamespace(
        split=split,
        prompt=SimpleNamespace(variables=set(variables), attributes=set(attributes)),
        case_variables=lambda part, cases: ({} if SAID[c] is None else {"preference": SAID[c]} for c in cases),
        case_events=lambda part, cases: [{"action": [str(case)]} for case in cases],
    )


class Asked:
    """A recommender that recommends what it was asked."""

    def __init__(self):
        self.calls = []

    def recommend_rows(self, histories, k, num_beams, progress, events, **variables):
        self.calls.append((len(histories), k, num_beams, sorted(variables)))
        said = variables.get("preference", ["nothing"] * len(histories))
        events = events or [None] * len(histories)
        return [[*one, word, event] for one, word, event in zip(histories, said, events, strict=True)], []


def test_who_said_nothing_is_asked_without_it_and_the_order_stays():
    asked = Asked()
    lists = CaseLists(held(attributes=["action"]), None, "valid", [4, 1, 0, 3], 20)
    found = lists.of(asked, [3, 0, 2, 1], 5)
    assert found == [
        [3, 13, "nothing", {"action": ["3"]}],
        [4, 14, "red", {"action": ["4"]}],
        [0, 10, "cheap", {"action": ["0"]}],
        [1, 11, "nothing", {"action": ["1"]}],
    ]
    assert sorted(asked.calls) == [(2, 5, 20, []), (2, 5, 20, ["preference"])]


@pytest.mark.parametrize(("k", "beams"), [(5, 20), (50, 50)])
def test_a_prompt_of_the_history_alone_asks_all_at_once(k, beams):
    asked = Asked()
    found = CaseLists(held(variables=["history"]), None, "valid", range(5), 20).of(asked, range(5), k)
    assert found == [[case, 10 + case, "nothing", None] for case in range(5)]
    assert asked.calls == [(5, k, beams, [])]
    assert CaseLists(held(), None, "valid", [], 20).of(asked, [], 5) == []
