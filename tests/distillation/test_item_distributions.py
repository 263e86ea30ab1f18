"""A language model's distributions over items: against the whole catalog by brute force, and kept on disk."""

import math

import numpy as np
import pytest
import torch
from small_teachers import language_recommender, split_of

from llmrec.decoding import score_catalog
from llmrec.distillation import item_distributions
from llmrec.distillation.item_distributions import ItemDistributions, teacher_distributions, training_places
from llmrec.exceptions import DataError
from llmrec.prompt import Prompt


@pytest.fixture(scope="module")
def split():
    return split_of()


@pytest.fixture(scope="module")
def teacher():
    return language_recommender(layers=2)


def test_training_places_are_targets_with_a_history(split):
    places = training_places(split)
    begins, ends = split.offsets[:-1], split.train_ends
    expected = [place for begin, end in zip(begins, ends, strict=True) for place in range(begin + 1, end)]
    assert places.tolist() == expected
    some = training_places(split, 20, seed=3)
    assert some.tolist() == sorted(set(some.tolist()))
    assert len(some) == 20
    assert set(some.tolist()) <= set(expected)
    assert training_places(split, 20, seed=4).tolist() != some.tolist()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rest", ["uniform", "none"])
def test_they_are_what_the_whole_catalog_scores(split, teacher, tmp_path, rest, temperature):
    places = training_places(split, 8)
    found = teacher_distributions(teacher, split, places, 10, tmp_path, "weights", rest)
    teaching, there = found.at(torch.from_numpy(places))
    assert bool(there.all())
    got = teaching.log_probabilities(0, 8, temperature, torch.float64)
    for row, place in enumerate(places.tolist()):
        begin = max(int(split.offsets[split.owner[place]]), place - 6)
        prompt = teacher.encoder.encode(split.rows[begin:place].tolist())
        scores = score_catalog(teacher.model, prompt, teacher._trie).numpy()
        # With ten beams on forty items the search need not find the best ten: its own ten are looked at.
        chosen = found.rows[row]
        np.testing.assert_allclose(found.scores[row], scores[chosen], atol=1e-5)
        p = np.zeros(40)
        if rest == "uniform":
            p[:] = (1 - np.exp(scores[chosen]).sum()) / 30
        p[chosen] = np.exp(scores[chosen])
        p = p ** (1 / temperature)
        np.testing.assert_allclose(got[row].exp().numpy(), p / p.sum(), rtol=2e-5, atol=1e-9)


def test_all_items_found_leave_no_rest(split, teacher, tmp_path):
    places = training_places(split, 3)
    found = teacher_distributions(teacher, split, places, 60, tmp_path, "weights")
    assert (found.rows >= 0).sum(axis=1).tolist() == [40] * 3
    got = found.at(torch.from_numpy(places))[0].log_probabilities(0, 3, 1.0, torch.float64)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.exp().sum(1), torch.ones(3, dtype=torch.float64))


def test_items_that_may_not_be_recommended_have_none():
    live = np.array([True, True, False, True])
    table = ItemDistributions(np.array([7]), np.array([[1, -1]]), np.log(np.array([[0.4, 1e-30]])), live)
    got = table.at(torch.tensor([7]))[0].log_probabilities(0, 1, 1.0, torch.float64).exp()
    np.testing.assert_allclose(got[0].numpy(), [0.3, 0.4, 0.0, 0.3], atol=1e-6)


def test_interactions_without_one_are_told():
    table = ItemDistributions(np.array([3, 9]), np.array([[0], [1]]), np.zeros((2, 1), np.float32), np.ones(2, bool))
    _, there = table.at(torch.tensor([9, 4, 3, 12, 0]))
    assert there.tolist() == [True, False, True, False, False]
    found = table.at(torch.tensor([9, 4, 3]))[0].log_probabilities(0, 2, 1.0, torch.float64)
    assert found.argmax(1).tolist() == [1, 0]


def test_a_run_that_was_stopped_goes_on_and_a_torn_file_is_made_again(split, teacher, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(item_distributions, "_SHARD", 3)
    places = training_places(split, 8)
    searched = []
    original = item_distributions._searched

    def counted(teacher, split, spans, width, events):
        searched.append(len(spans))
        if len(searched) == 3:
            raise KeyboardInterrupt
        return original(teacher, split, spans, width, events)

    monkeypatch.setattr(item_distributions, "_searched", counted)
    with pytest.raises(KeyboardInterrupt):
        teacher_distributions(teacher, split, places, 5, tmp_path, "weights")
    first = teacher_distributions(teacher, split, places, 5, tmp_path, "weights")
    assert searched == [3, 3, 2, 2]  # the last is done again, the others are not
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    files[0].write_bytes(b"torn")
    second = teacher_distributions(teacher, split, places, 5, tmp_path, "weights")
    assert searched == [3, 3, 2, 2, 3]
    assert "is made again" in caplog.text
    np.testing.assert_array_equal(first.rows, second.rows)
    np.testing.assert_array_equal(first.scores, second.scores)
    # Of other weights, widths or places nothing is taken.
    teacher_distributions(teacher, split, places, 5, tmp_path, "other weights")
    teacher_distributions(teacher, split, places, 4, tmp_path, "weights")
    assert searched[5:] == [3, 3, 2, 3, 3, 2]


def test_what_does_not_fit_is_refused(split, teacher, tmp_path):
    places = training_places(split, 3)
    with pytest.raises(DataError, match="one item or more"):
        teacher_distributions(teacher, split, places, 0, tmp_path, "w")
    with pytest.raises(DataError, match="Split the interactions over the teacher's own items"):
        teacher_distributions(teacher, split_of(39), places, 5, tmp_path, "w")
    shows = language_recommender(layers=1)
    shows.prompt = Prompt("{{ preference }} {% for item in history %}{{ item.id }}{% endfor %}")
    with pytest.raises(DataError, match="shows preference beside the history"):
        teacher_distributions(shows, split, places, 5, tmp_path, "w")
    with pytest.raises(DataError, match="'popular'"):
        ItemDistributions(places, np.zeros((3, 1), int), np.zeros((3, 1)), np.ones(2, bool), "popular")
    with pytest.raises(DataError, match="ascending"):
        ItemDistributions(np.array([2, 1]), np.zeros((2, 1), int), np.zeros((2, 1)), np.ones(2, bool))


def test_a_uniform_rest_is_a_distribution_by_hand():
    table = ItemDistributions(
        np.array([0]), np.array([[2, 0]]), np.log(np.array([[0.5, 0.25]], dtype=np.float32)), np.ones(6, bool)
    )
    got = table.at(torch.tensor([0]))[0].log_probabilities(0, 1, 1.0, torch.float64)[0]
    expected = [0.25, 0.0625, 0.5, 0.0625, 0.0625, 0.0625]
    assert [round(math.exp(value), 6) for value in got.tolist()] == expected


@pytest.mark.parametrize("rest", ["uniform", "none"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_short_lists_and_retired_items_at_any_temperature_are_the_definition(rest, temperature):
    rng = np.random.default_rng(0)
    live = np.array([True] * 6 + [False])
    rows, scores = np.full((5, 6), -1), np.full((5, 6), -np.inf, np.float32)
    p = np.zeros((5, 7))
    for place, length in enumerate([1, 2, 3, 5, 6]):
        rows[place, :length] = rng.permutation(6)[:length]
        given = rng.dirichlet(np.ones(length)) * 0.9
        scores[place, :length] = np.log(given)
        if rest == "uniform":
            p[place, :6] = 0.1 / max(1, 6 - length)
        p[place, rows[place, :length]] = given
    table = ItemDistributions(np.arange(5), rows, scores, live, rest)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        got = table.at(torch.arange(5))[0].log_probabilities(0, 5, temperature, dtype)
        assert got.dtype == dtype
        expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(got.exp().numpy(), expected, atol=tolerance)
