"""A teacher's lists: against the whole catalog by brute force, searched by several processes, and kept on disk."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from small_teachers import language_recommender, split_of

from llmrec.decoding import score_catalog
from llmrec.distillation import teacher_lists
from llmrec.distillation.item_distributions import training_places
from llmrec.distillation.teacher_lists import TeacherLists
from llmrec.exceptions import DataError
from llmrec.prompt import Prompt


@pytest.fixture(scope="module")
def split():
    return split_of()


@pytest.fixture(scope="module")
def teacher():
    return language_recommender(layers=2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rest", ["uniform", "none"])
def test_they_are_what_the_whole_catalog_scores(split, teacher, tmp_path, rest, temperature):
    places = training_places(split, 8)
    found = TeacherLists(teacher, split, places, 10, tmp_path, "weights").distributions(rest)
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
    found = TeacherLists(teacher, split, places, 60, tmp_path, "weights").distributions()
    assert (found.rows >= 0).sum(axis=1).tolist() == [40] * 3
    got = found.at(torch.from_numpy(places))[0].log_probabilities(0, 3, 1.0, torch.float64)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.exp().sum(1), torch.ones(3, dtype=torch.float64))


def test_files_are_kept_of_these_weights_this_width_and_these_places_alone(split, teacher, tmp_path, monkeypatch):
    places = training_places(split, 8)
    searched = []
    original = teacher_lists._searched

    def counted(teacher, split, spans, width, events):
        searched.append([end for _, end in spans])
        return original(teacher, split, spans, width, events)

    monkeypatch.setattr(teacher_lists, "_searched", counted)

    def found(width=5, identity="weights", chosen=places):
        return TeacherLists(teacher, split, chosen, width, tmp_path, identity, size=3).distributions()

    first = found()
    whole = TeacherLists(teacher, split, places, 5, tmp_path / "whole", "weights").distributions()
    np.testing.assert_array_equal(first.rows, whole.rows)
    np.testing.assert_allclose(first.scores, whole.scores, atol=1e-6)
    shares = [places[:3].tolist(), places[3:6].tolist(), places[6:].tolist()]
    assert searched == [*shares, places.tolist()]
    np.testing.assert_array_equal(found().scores, first.scores)
    assert len(searched) == 4
    found(identity="other weights")
    found(width=4)
    found(chosen=places[:4])
    assert searched[4:] == [*shares, *shares, places[:3].tolist(), [int(places[3])]]


def test_what_does_not_fit_is_refused(split, teacher, tmp_path):
    places = training_places(split, 3)
    with pytest.raises(DataError, match="one item or more"):
        TeacherLists(teacher, split, places, 0, tmp_path, "w")
    with pytest.raises(DataError, match="Split the interactions over the teacher's own items"):
        TeacherLists(teacher, split_of(39), places, 5, tmp_path, "w")
    shows = language_recommender(layers=1)
    shows.prompt = Prompt("{{ preference }} {% for item in history %}{{ item.id }}{% endfor %}")
    with pytest.raises(DataError, match="shows preference beside the history"):
        TeacherLists(shows, split, places, 5, tmp_path, "w")


def test_no_places_have_no_lists(split, teacher, tmp_path):
    lists = TeacherLists(teacher, split, np.zeros(0, np.int64), 5, tmp_path, "weights")
    assert lists.kept.missing() == []
    assert len(lists.distributions()) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_the_prompt_shows_decides_the_folder(split, teacher, tmp_path):
    """Titles, actions and times are in no hash of catalog or split, and change what the teacher reads."""
    places = training_places(split, 3)

    def folder(prompt, split=split, dtype=torch.float64, **columns):
        shows = language_recommender(layers=1, dtype=dtype)
        shows.prompt = Prompt(prompt)
        shows.catalog.items[5] = {**shows.catalog.items[5], **columns}
        return TeacherLists(shows, split, places, 2, tmp_path, "weights").kept.folder

    titles = "{% for item in history %}{{ item.title }}{% endfor %}"
    codes = "{% for item in history %}{{ item.id }}{% endfor %}"
    assert folder(titles) == folder(titles) == folder(titles, brand="unseen")
    assert folder(titles) != folder(titles, title="another")
    assert folder(codes) == folder(codes, title="another") != folder(titles)
    assert folder(codes) != folder(codes, dtype=torch.float32)
    acted = "{% for item in history %}{{ item.action }}{{ item.id }}{% endfor %}"
    told = [replace(split, actions=pl.Series([word] * len(split.rows))) for word in ("buy", "view")]
    assert told[0].content_hash == told[1].content_hash
    assert folder(acted, told[0]) == folder(acted, told[0]) != folder(acted, told[1])
    assert folder(codes, told[0]) == folder(codes, told[1])
    later = replace(split, timestamps=split.timestamps + 1)
    assert folder(acted, split) != folder(acted, later)
