"""Data quality: counts by hand, entropies of what a training sees, nested shares, and the published logs."""

import json
import math

import numpy as np
import pytest

from llmrec.data.split import Split
from llmrec.data.subset import learnt_events, learnt_split
from llmrec.exceptions import DataError
from llmrec.scaling.entropy import approximate_entropy, dictionary_entropy, entropies, real_entropy
from llmrec.scaling.quality import PUBLISHED, data_quality


def split_of(sequences: list[list[int]], held_out: int = 2) -> Split:
    lengths = np.array([len(sequence) for sequence in sequences])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Split(
        all_users=[f"u{user}" for user in range(len(sequences))],
        item_ids=[f"i{item}" for item in range(50)],
        rows=np.array([item for sequence in sequences for item in sequence], dtype=np.int32),
        offsets=offsets,
        train_ends=offsets[1:] - np.minimum(held_out, lengths),
        positions={"valid": offsets[1:] - 2, "test": offsets[1:] - 1},
        protocol={"split": "leave-one-out"},
    )


def random_split(users: int = 40) -> Split:
    generator = np.random.default_rng(0)
    return split_of([generator.integers(0, 12, generator.integers(4, 15)).tolist() for _ in range(users)])


def test_counts_are_of_the_training_sequences_that_teach_something() -> None:
    # Training: 1 2 1, then 3 alone, which has nothing that follows, then 4 4 2 6 4: 2 is repeated by nobody.
    found = data_quality(split_of([[1, 2, 1, 9, 9], [3, 9, 9], [4, 4, 2, 6, 4, 8, 8]]))
    assert (found["users"], found["items"], found["tokens"]) == (2, 4, 8)
    assert (found["median_length"], found["mean_length"]) == (4, 4)
    assert found["repeat_rate"] == pytest.approx(3 / 8)
    assert found["looked_at"] == {"users": 2, "tokens": 8}
    tokens = np.array([1, 2, 1, 4, 4, 2, 6, 4])
    assert found["real"] == real_entropy(tokens)
    assert found["quality"] == pytest.approx(1 / real_entropy(tokens))
    assert found["effective_data"] == pytest.approx(8 / real_entropy(tokens))
    assert found["dictionary_effective_data"] == pytest.approx(8 / dictionary_entropy(tokens))
    assert found["approximate_m1"] == approximate_entropy(tokens, 1)
    assert found["approximate_users"]["users"] == 2


def test_the_longest_sequence_is_the_latest_of_a_user() -> None:
    found = data_quality(split_of([[1, 2, 1, 9, 9], [4, 4, 5, 6, 4, 8, 8]]), longest=2)
    assert (found["longest"], found["tokens"], found["items"], found["repeat_rate"]) == (2, 4, 4, 0)
    assert found["real"] == real_entropy(np.array([2, 1, 6, 4]))


def test_shares_are_those_of_a_training_and_nested() -> None:
    split = random_split()
    found = data_quality(split, (0.5, 0.25, 0.1), seed=3, longest=6)
    assert [part["share"] for part in found["shares"]] == [0.1, 0.25, 0.5, 1.0]
    for part in found["shares"]:
        learnt = learnt_split(split, part["share"], 3)
        seen = learnt_events(learnt, 6)
        assert part["tokens"] == seen.sum()
        assert part["users"] == len(np.unique(learnt.owner[seen]))
        assert part["quality"] == pytest.approx(1 / real_entropy(split.rows[seen]))
        assert part["effective_data"] == pytest.approx(seen.sum() * part["quality"])
    assert [part["users"] for part in found["shares"]] == [4, 10, 20, 40]
    whole = {"share": 1.0, **{name: found[name] for name in found["shares"][-1] if name != "share"}}
    assert whole == found["shares"][-1]
    assert data_quality(split, (0.5,), seed=4)["shares"][0] != data_quality(split, (0.5,), seed=3)["shares"][0]
    assert [part["share"] for part in data_quality(split)["shares"]] == [0.25, 0.5, 1.0]
    assert [part["share"] for part in data_quality(split, ())["shares"]] == [1.0]


def test_the_figures_are_all_those_of_a_log() -> None:
    split = random_split()
    found = data_quality(split, (), seed=1)
    expected = entropies(split.rows, split.offsets[:-1], split.train_ends)
    for name in expected.keys() - {"users", "tokens", "tokens_in_all"}:
        assert found[name] == expected[name]
    json.dumps(found, allow_nan=False)
    assert found["content_hash"] == split.content_hash
    assert found["protocol"] == {"split": "leave-one-out"}


def test_too_many_tokens_are_drawn_and_said_to_be() -> None:
    split = random_split()
    found = data_quality(split, (0.5,), max_tokens=60)
    assert found["looked_at"]["tokens"] <= 60 < found["tokens"]
    assert found["looked_at"]["users"] < found["users"] == 40
    assert found["effective_data"] == pytest.approx(found["tokens"] * found["quality"])
    looked = found["looked_at"]
    expected = (
        f"Entropies are of {looked['users']} users drawn at random, with {looked['tokens']} of {found['tokens']}"
    )
    assert any(note.startswith(expected) for note in found["notes"])
    assert not any("drawn at random" in note for note in data_quality(split)["notes"])


def test_users_who_never_repeat_are_said_to_say_nothing() -> None:
    generator = np.random.default_rng(0)
    distinct = split_of([generator.permutation(30)[:9].tolist() for _ in range(20)])
    assert any("only says how long they are" in note for note in data_quality(distinct)["notes"])
    repeating = split_of([[1, 2] * 6 for _ in range(20)])
    assert not any("only says how long they are" in note for note in data_quality(repeating)["notes"])


def test_published_logs_are_those_of_the_table() -> None:
    """D' as the reference gives it, to three figures, and the logs that ours is nearest to."""
    effective = {(log.name, log.longest): log.effective_data for log in PUBLISHED}
    assert len(effective) == len(PUBLISHED) == 10
    assert effective["ML-1M", 200] == pytest.approx(1.96e5, rel=3e-3)
    assert effective["KR-Pure", 50] == pytest.approx(1.80e5, rel=3e-3)
    assert effective["AMZ-Books", 50] == pytest.approx(9.1e5, rel=3e-3)
    assert effective["Industrial", 50] == pytest.approx(1.94e8, rel=3e-3)
    found = data_quality(random_split())
    assert [log["effective_data"] for log in found["published"]] == [log.effective_data for log in PUBLISHED]
    ratios = {key: found["effective_data"] / value for key, value in effective.items()}
    nearest = min(ratios, key=lambda key: abs(math.log(ratios[key])))
    assert found["nearest"] == {"name": nearest[0], "longest": nearest[1], "ratio": ratios[nearest]}
    assert nearest == ("ML-1M", 100)  # the smallest
    assert "dictionary variant" in found["notes"][-1]


def test_progress_goes_from_nothing_towards_all() -> None:
    said: list[tuple[str, float | None]] = []

    def announce(name: str, done: float | None) -> None:
        said.append((name, done))

    found = data_quality(random_split(), (0.5,), announce=announce)
    half = found["shares"][0]["tokens"]
    expected = (
        ("real entropy, 50% of the users", 0.0),
        ("real entropy, 100% of the users", half / (half + found["tokens"])),
    )
    assert (said[0], said[4]) == expected
    assert len(said) == 8


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"shares": (0.0,)}, "A share is 0.0"),
        ({"shares": (1.5,)}, "A share is 1.5"),
        ({"longest": 1}, "The longest sequence is 1, in which nothing follows on anything. Give 2"),
        ({"seed": -1}, "a seed is not negative"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, object], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        data_quality(random_split(), **changed)  # type: ignore[arg-type]


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(DataError, match="100% of the users have no training sequence of two interactions"):
        data_quality(split_of([[1, 2, 3], [4, 5, 6]]), ())
    with pytest.raises(DataError, match="Give larger shares, or more interactions"):
        data_quality(split_of([[1, 2, 3]] * 50 + [[1, 2, 3, 4, 5]]), (0.02,), seed=0)
