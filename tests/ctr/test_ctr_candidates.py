import numpy as np
import pytest
import torch
from ctr_factories import ENCODERS, some_events, tiny_ctr
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.ctr.candidates import CandidateScorer
from llmrec.ctr.dataset import case_tensors
from llmrec.ctr.histories import Events
from llmrec.exceptions import RequestError

INCREMENTAL = ["hstu", "hstu-length", "sasrec"]


def one_by_one(model, history, candidates, time):
    """The definition: a forward pass for each candidate alone."""
    history = history.last(model.config.max_history)
    rows = [
        model(**case_tensors([history], [candidate], [time], model.config.asked))[0].detach()
        for candidate in candidates
    ]
    return torch.stack(rows).double().numpy()


@pytest.mark.parametrize("layout", ["target", "interleaved"])
@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name != "bert4rec"])
@pytest.mark.parametrize("microbatch", [1, 3, 100])
def test_many_candidates_are_each_alone(encoder, layout, microbatch):
    model = tiny_ctr(encoder, layout, labels=("click", "buy"))
    scorer = CandidateScorer(model, microbatch)
    assert scorer.incremental or encoder not in INCREMENTAL
    candidates = [3, 0, 11, 3, 7, 5, 1]
    for count in (0, 1, 6, 9):  # none, one, as many as are read, more
        history = some_events(count, num_actions=5, seed=count)
        for time in (2 * 10**9, None):
            wanted = one_by_one(model, history, candidates, UNKNOWN_TIME if time is None else time)
            np.testing.assert_allclose(scorer.logits(history, candidates, time), wanted, atol=1e-5, rtol=1e-5)


def test_an_encoder_of_both_sides_is_scored_one_by_one():
    model = tiny_ctr("bert4rec")
    scorer, history = CandidateScorer(model, 2), some_events(4)
    assert not scorer.incremental
    wanted = one_by_one(model, history, [1, 2, 3], 10**9)
    np.testing.assert_allclose(scorer.logits(history, [1, 2, 3], 10**9, key="user"), wanted, atol=1e-5)
    assert scorer.logits(history, []).shape == (0, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.booleans(), st.booleans()), min_size=1, max_size=12),
    st.sampled_from(["target", "interleaved"]),
    st.sampled_from([0, 5, 12, 1000]),
)
def test_what_was_read_before_changes_no_score(requests, layout, limit):
    # Requests of three users, whose histories grow, shrink, change in the middle, or get too long.
    model = tiny_ctr("hstu", layout)
    scorer = CandidateScorer(model, 2, max_cached_events=limit)
    for user, count, altered, timed in requests:
        history = some_events(9, seed=user)
        history = Events(*(column[:count].copy() for column in history))
        if altered and count:
            history.actions[count // 2] = (history.actions[count // 2] + 1) % 3
        time = 2 * 10**9 if timed else None
        wanted = one_by_one(model, history, [2, 9, 4], UNKNOWN_TIME if time is None else time)
        found = scorer.logits(history, [2, 9, 4], time, key=str(user))
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
        held = sum(len(read.events.items) for read in scorer._users.values())
        assert held == scorer._held <= limit


def test_a_history_that_grew_costs_its_new_events_alone():
    model = tiny_ctr("hstu", "interleaved")
    scorer, history = CandidateScorer(model), some_events(5)
    scorer.logits(Events(*(column[:3] for column in history)), [1], key="a")
    assert (scorer.read, scorer.reused) == (3, 0)
    scorer.logits(history, [1, 2], key="a")
    assert (scorer.read, scorer.reused) == (5, 3)
    scorer.logits(history, [1, 2], key="a")
    assert (scorer.read, scorer.reused) == (5, 8)
    scorer.logits(history, [1, 2], key="b")
    assert (scorer.read, scorer.reused) == (10, 8)
    scorer.forget("a")
    scorer.logits(history, [1, 2], key="a")
    assert (scorer.read, scorer.reused) == (15, 8)
    scorer.forget()
    assert scorer._held == 0


def test_the_history_that_is_kept_is_not_the_callers():
    model = tiny_ctr("hstu")
    scorer, history = CandidateScorer(model), some_events(4)
    scorer.logits(history, [1], key="a")
    history.items[0] = (history.items[0] + 1) % 12
    np.testing.assert_allclose(
        scorer.logits(history, [1], key="a"), one_by_one(model, history, [1], UNKNOWN_TIME), atol=1e-5
    )


def test_the_least_recently_used_goes_first():
    scorer = CandidateScorer(tiny_ctr("hstu"), max_cached_events=8)
    for user in ("a", "b", "a", "c"):
        scorer.logits(some_events(4), [1], key=user)
    assert list(scorer._users) == ["a", "c"]


def test_probabilities_are_sigmoids_without_overflow():
    model = tiny_ctr("hstu", scorer="dot")
    with torch.no_grad():
        model.scorer.bias.fill_(-800.0)
    scorer = CandidateScorer(model)
    found = scorer.probabilities(some_events(2), [1, 2])
    assert ((found >= 0) & (found < 1e-300)).all()


@pytest.mark.parametrize(
    ("history", "candidates"),
    [
        (some_events(2), [12]),
        (some_events(2), [-1]),
        (some_events(2)._replace(items=np.array([0, 99])), [1]),
        (some_events(2)._replace(actions=np.array([0, 3])), [1]),
        (some_events(2)._replace(timestamps=np.zeros(1, np.int64)), [1]),
    ],
    ids=["candidate", "negative", "item", "action", "shape"],
)
def test_rows_that_are_not_there_are_refused(history, candidates):
    with pytest.raises(RequestError):
        CandidateScorer(tiny_ctr("hstu")).logits(history, candidates)


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(RequestError, match="at once"):
        CandidateScorer(tiny_ctr("hstu"), microbatch=0)
