"""The worker's tries by name."""

import numpy as np
import pytest
import torch
from engine_models import make_trie

from llmrec.engine.indexes import Indexes
from llmrec.exceptions import ArtefactError, RequestError


def save(folder, name, seed):
    trie = make_trie(seed, 30)
    trie.save(folder / name)
    return trie


def test_files_are_mapped_once_and_by_name(tmp_path):
    made = {name: save(tmp_path, name, seed) for seed, name in enumerate(("start", "a.trie", "b"))}
    indexes = Indexes(tmp_path, "start")
    assert torch.equal(indexes.of("").item_of_leaf, made["start"].item_of_leaf)
    for name in ("a.trie", "b", "start"):
        found = indexes.of(name)
        assert torch.equal(found.item_of_leaf, made[name].item_of_leaf)
        assert all(torch.equal(one, other) for one, other in zip(found.token, made[name].token, strict=True))
        assert indexes.of(name) is found  # the same object: searches of one trie are run together
    assert Indexes(None, lambda: made["b"]).of("") is made["b"]


def test_the_least_recently_used_is_let_go(tmp_path, monkeypatch):
    for name in "abcd":
        save(tmp_path, name, 0)
    indexes = Indexes(tmp_path, "a", most=2)
    mapped = []
    monkeypatch.setattr(indexes, "_map", lambda name, whole=indexes._map: mapped.append(name) or whole(name))
    held = indexes.of("b")
    for name in "cbdbdcb":
        indexes.of(name)
    assert mapped == list("bcdcb")
    assert len(indexes._known) == 2
    assert held.num_leaves == 30  # who holds it searches on
    indexes.of("")
    assert mapped == list("bcdcb")


def test_a_removed_file_is_not_kept_mapped(tmp_path):
    for name in "abc":
        save(tmp_path, name, 0)
    indexes = Indexes(tmp_path, "a")
    held = indexes.of("b")
    (tmp_path / "b").unlink()
    assert indexes.of("b") is held  # until another is mapped: its requests may still be coming
    indexes.of("c")
    assert list(indexes._known) == ["c"]
    with pytest.raises(RequestError):
        indexes.of("b")
    assert held.num_leaves == 30


@pytest.mark.parametrize(
    "name",
    ["../a", "a/../a", "/etc/passwd", "sub/a", "..", ".", ".hidden", "a\0b", "a\nb", "c:\\a", "a" * 300, "é" * 200],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    folder = tmp_path / "indexes"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "a", folder / "a", folder / "sub" / "a", folder / ".hidden"):
        make_trie(0, 30).save(place)
    indexes = Indexes(folder, "a")
    with pytest.raises(RequestError, match="no name of a file in the index folder"):
        indexes.of(name)
    assert indexes.of("a").num_leaves == 30


def test_a_file_that_is_no_trie_is_refused_and_may_come_later(tmp_path):
    save(tmp_path, "start", 0)
    indexes = Indexes(tmp_path, "start")
    (tmp_path / "torn").write_bytes((tmp_path / "start").read_bytes()[:-9])
    for name in ("torn", "later"):
        with pytest.raises(RequestError):
            indexes.of(name)
    later = save(tmp_path, "later", 3)
    assert torch.equal(indexes.of("later").item_of_leaf, later.item_of_leaf)
    with pytest.raises(ArtefactError):
        Indexes(tmp_path, "nowhere")
    with pytest.raises(RequestError, match="index folder"):
        Indexes(None, lambda: later).of("later")


def test_a_file_stays_what_it_was_while_another_takes_its_name(tmp_path):
    first = save(tmp_path, "a", 0)
    indexes = Indexes(tmp_path, "a")
    found = indexes.of("a")
    save(tmp_path, "a", 1)
    assert np.array_equal(found.item_of_leaf.numpy(), first.item_of_leaf.numpy())
