"""The report of a training after SFT: its words fit the outcome, and its page shows every number there is."""

import math
import re

import numpy as np
import pytest

from llmrec.evaluation.evaluation import Evaluation
from llmrec.evaluation.outcome import outcome
from llmrec.evaluation.ranks import Ranks
from llmrec.reinforcement.report import closing_words, course, rl_page

RNG = np.random.default_rng(0)
BEFORE = RNG.integers(-1, 60, 200)
BETTER = np.where(RNG.random(200) < 0.7, BEFORE // 4, BEFORE)
LINES = [
    {"step": 1, "epoch": 0.1, "loss": 0.5, "kl": 0.0, "entropy": 2.0, "reward": 0.1, "rewards/exact/mean": 0.1},
    {"step": 2, "epoch": 0.2, "groups_without_signal": 0.25, "rewards/exact/std": 0.3, "kl": None, "entropy": 1.5},
    {"step": 2, "epoch": 0.2, "reward": 0.2, "rewards/exact/mean": 0.2},
    {"step": 2, "epoch": 0.2, "train_runtime": 3.0, "loss": 9.0},
]


def evaluation(places, system):
    users = [f"u{place}" for place in range(len(places))]
    nothing = np.zeros(len(places), dtype=int)
    everyone = np.ones(len(places), dtype=bool)
    facts = {"split": "abc", "part": "test"}
    return Evaluation(system, users, users, Ranks(places, nothing), everyone, {}, (1, 5, 10, 20, 50), facts)


def found(before, after):
    return outcome(evaluation(before, "sft"), evaluation(after, "rl"))


def guard(best=2, stopped=None):
    def figures(policy):
        names = ("HR@50", "HR@10", "NDCG@10", "NDCG@1")
        interval = {"difference": policy - 0.5, "difference interval95": [policy - 0.6, policy - 0.4]}
        return {name: {"sft": 0.5, "policy": policy} | interval for name in names}

    entries = [(0, 0.5, True, None), (2, 0.6, best is not None, stopped)]
    return {
        "cases": 200,
        "depth": 50,
        "evaluations": [
            {"step": step, "metrics": figures(policy), "better": better, "why": why}
            for step, policy, better, why in entries
        ],
        "best_step": best,
        "stopped": stopped,
        "returned_to_start": best is None,
        "sentence": "The training ended <here>.",
    }


@pytest.mark.parametrize(
    ("document", "result", "said"),
    [
        (guard(), found(BEFORE, BETTER), "GRPO helped: NDCG@10 +"),
        (guard(), found(BETTER, BEFORE), "GRPO did harm: NDCG@10 -"),
        (guard(), found(BEFORE, BEFORE), "cannot be told from no difference"),
        (guard(None), found(BEFORE, BEFORE), "The artefact holds the SFT weights"),
        (guard(), None, "Whether GRPO helped is not known"),
    ],
    ids=["helped", "hurt", "same", "returned", "unknown"],
)
def test_words_fit_the_outcome(document, result, said):
    words = closing_words("GRPO", document, result)
    assert said in words
    if result is not None and not document["returned_to_start"]:
        change = result["metrics"]["NDCG@10"]
        low, high = change["difference interval95"]
        assert f"NDCG@10 {change['difference']:+.4f} [{low:+.4f}, {high:+.4f}]" in words
    page = rl_page("GRPO", LINES, document, result).render()
    assert said in page
    assert ("Before and after" in page) == (result is not None)


def test_the_course_is_one_row_a_step_of_what_was_finite():
    assert course(LINES) == [
        {"step": 1, "loss": 0.5, "kl": 0.0, "entropy": 2.0, "reward": 0.1, "rewards/exact/mean": 0.1},
        {"step": 2, "groups_without_signal": 0.25, "rewards/exact/std": 0.3, "entropy": 1.5, "reward": 0.2}
        | {"rewards/exact/mean": 0.2},
    ]
    assert not any(math.isnan(value) for row in course(LINES) for value in row.values())


def test_the_page_shows_rewards_entropy_signal_and_the_trade_off():
    page = rl_page("GRPO", LINES, guard(stopped="too much"), found(BEFORE, BETTER)).render()
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        *("Before and after", "Rewards", "Loss", "Entropy and KL", "Groups without signal"),
        "Recall against the first place, on the validation slice",
    ]
    assert "exact 0.1000 to 0.2000" in page
    assert "reward 0.1000 to 0.2000" in page
    assert "HR@50 0.5000 to 0.6000, NDCG@10 0.5000 to 0.6000, NDCG@1 0.5000 to 0.6000" in page
    assert "0.6000 [+0.0000, +0.2000]" in page
    assert "too much" in page
    assert "&lt;here&gt;" in page
    # A log that holds nothing is no error: the trade-off is known all the same.
    assert "<h2>Rewards</h2>" not in rl_page("GRPO", [], guard()).render()
