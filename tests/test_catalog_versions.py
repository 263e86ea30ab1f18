"""A living catalog: every change a version, nothing lost, nothing changed that was there."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
from factories import random_catalog
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec import catalog_versions
from llmrec.catalog import Catalog
from llmrec.catalog_versions import CatalogVersions
from llmrec.exceptions import ArtefactError, CatalogError
from llmrec.vocabulary import add_catalog_tokens, train_tokenizer

SIZES = (5, 4, 6)


def free_codes(catalog, count, seed=0):
    every = np.stack(np.unravel_index(np.arange(np.prod(SIZES)), SIZES), axis=1)
    taken = {tuple(code) for code in catalog.codes.tolist()}
    free = [code for code in every.tolist() if tuple(code) not in taken]
    return np.array([free[place] for place in np.random.default_rng(seed).permutation(len(free))[:count]])


def new_items(*names):
    return [{"item_id": name, "title": f"Title of {name}"} for name in names]


@pytest.fixture
def versions(tmp_path):
    catalog = random_catalog(1)
    add_catalog_tokens(train_tokenizer(["some text"], 300), catalog).save(tmp_path / "catalog")
    return CatalogVersions(tmp_path / "catalog")


def test_a_folder_without_changes_is_its_base(versions):
    assert versions.current == versions.base.version == versions.load().version
    assert [(row["version"], row["parent"], row["current"]) for row in versions.log()] == [
        (versions.base.version, None, True)
    ]
    assert versions.moves() == []


def test_new_items_come_after_all_others_which_stay_as_they_are(versions):
    base = versions.base
    codes = free_codes(base, 3)
    name = versions.add(new_items("new-0", "new-1", "ünicode 🧦,\n"), codes)
    grown = CatalogVersions(versions.folder).load()
    assert grown.version == name == versions.current != base.version
    assert grown.ids == [*base.ids, "new-0", "new-1", "ünicode 🧦,\n"]
    assert (grown.codes == np.concatenate([base.codes, codes])).all()
    assert [ids.tolist() for ids in grown.token_ids] == [ids.tolist() for ids in base.token_ids]
    assert grown.title(len(base)) == "Title of new-0"
    assert versions.load(base.version).ids == base.ids
    assert (versions.load(base.version).codes == base.codes).all()


def test_retired_items_keep_rows_and_codes_and_leave_the_trie(versions):
    base = versions.base
    name = versions.retire(["item-3", "item-0", "item-3"], "sold out")
    left = CatalogVersions(versions.folder).load()
    assert left.version == name != base.version
    assert np.flatnonzero(left.retired).tolist() == [0, 3]
    assert left.ids == base.ids
    assert (left.codes == base.codes).all()
    assert sorted(left.trie.item_of_leaf.tolist()) == [row for row in range(len(base)) if row not in (0, 3)]
    assert left.num_live == left.candidates() == len(base) - 2
    assert left.candidates([0, 1, 1]) == len(base) - 3
    row = versions.log()[-1]
    assert (row["retired"], row["live"], row["note"]) == (["item-0", "item-3"], len(base) - 2, "sold out")


def test_a_retired_items_code_is_not_given_away(versions):
    versions.retire(["item-3"])
    with pytest.raises(CatalogError, match="share the code"):
        versions.add(new_items("thief"), versions.base.codes[[3]])


def test_restoring_all_gives_the_same_catalog_and_so_the_same_version(versions):
    base = versions.base.version
    versions.retire(["item-3"])
    assert versions.restore(["item-3"]) == base == versions.current
    assert len(versions.log()) == 2
    assert [move["version"] == base for move in versions.moves()] == [False, True]


def test_rollback_goes_to_the_parent_and_back_to_any(versions):
    base = versions.base.version
    first = versions.add(new_items("a"), free_codes(versions.base, 1))
    second = versions.retire(["a", "item-1"])
    assert versions.rollback() == first == versions.current
    assert versions.rollback() == base
    with pytest.raises(CatalogError, match="is the base and has no parent"):
        versions.rollback()
    assert versions.rollback(second) == second
    assert not versions.load().candidates(range(len(versions.load())))
    assert [row["version"] for row in versions.log()] == [base, first, second]
    assert [row["current"] for row in versions.log()] == [False, False, True]
    with pytest.raises(CatalogError, match="There is no version 'abc'"):
        versions.rollback("abc")
    with pytest.raises(CatalogError, match="is no version"):
        versions.rollback("../../catalog")


def test_a_branch_after_a_rollback_has_its_own_history(versions):
    codes = free_codes(versions.base, 2)
    first = versions.add(new_items("a"), codes[:1])
    versions.rollback()
    second = versions.add(new_items("b"), codes[:1])
    assert versions.load(first).ids[-1] == "a"
    assert versions.load(second).ids[-1] == "b"
    assert {row["parent"] for row in versions.log()[1:]} == {versions.base.version}


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_walk_equals_the_same_changes_made_by_hand(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    start = random_catalog(2, num_items=12)
    start.save(folder)
    state = (list(start.ids), [tuple(code) for code in start.codes.tolist()], set())
    seen = {start.version: state}
    parents = {start.version: None}
    for step in range(data.draw(st.integers(1, 7))):
        versions = CatalogVersions(folder)
        ids, codes, retired = state
        what = data.draw(st.sampled_from(["add", "retire", "restore", "rollback", "jump"]))
        live = [item for item in ids if item not in retired]
        before = versions.current
        if what == "add":
            count = data.draw(st.integers(1, 3))
            given = free_codes(versions.load(), count, seed=step)
            names = [f"new-{step}-{place}" for place in range(count)]
            name = versions.add(new_items(*names), given)
            state = ([*ids, *names], [*codes, *map(tuple, given.tolist())], retired)
        elif what == "retire" and len(live) > 1:
            chosen = data.draw(st.lists(st.sampled_from(live), min_size=1, max_size=len(live) - 1, unique=True))
            name = versions.retire(chosen)
            state = (ids, codes, retired | set(chosen))
        elif what == "restore" and retired:
            chosen = data.draw(st.lists(st.sampled_from(sorted(retired)), min_size=1, unique=True))
            name = versions.restore(chosen)
            state = (ids, codes, retired - set(chosen))
        elif what == "rollback" and parents[before] is not None:
            name = versions.rollback()
            assert name == parents[before]
            state = seen[name]
        else:
            name = versions.rollback(data.draw(st.sampled_from(sorted(seen))))
            state = seen[name]
        seen.setdefault(name, state)
        parents.setdefault(name, before)
        for version, (wanted_ids, wanted_codes, wanted_retired) in seen.items():
            found = CatalogVersions(folder).load(version)
            assert found.ids == wanted_ids
            assert [tuple(code) for code in found.codes.tolist()] == wanted_codes
            assert {found.ids[row] for row in np.flatnonzero(found.retired)} == wanted_retired
        assert CatalogVersions(folder).current == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.add(new_items("item-1"), free_codes(v.base, 1)), "in the catalog already, 'item-1' first"),
        (lambda v: v.add(new_items("a", "a"), free_codes(v.base, 2)), "repeat"),
        (lambda v: v.add(new_items("a", "b"), v.base.codes[[0, 1]]), "share the code"),
        (lambda v: v.add(new_items("a"), [[4, 3, 6]]), "Codes reach"),
        (lambda v: v.add(new_items("a"), free_codes(v.base, 1), parent="other"), "Assign codes again"),
        (lambda v: v.retire(["nobody"]), "'nobody' first"),
        (lambda v: v.retire(v.base.ids), "Keep at least one"),
        (lambda v: v.restore(["item-1"]), "are live already"),
        (lambda v: CatalogVersions(v.folder / "none").retire(["a"]), "There is no catalog folder"),
    ],
)
def test_a_change_that_cannot_be_made_changes_nothing(versions, change, message):
    with pytest.raises(CatalogError, match=message):
        change(versions)
    assert CatalogVersions(versions.folder).current == versions.base.version
    assert not (versions.folder / "versions").exists()


def test_altered_and_missing_files_are_named(versions):
    name = versions.add(new_items("a"), free_codes(versions.base, 1))
    folder = versions.folder / "versions" / name
    text = (folder / "items.jsonl").read_text()
    (folder / "items.jsonl").write_text(text.replace("Title", "Other"))
    with pytest.raises(ArtefactError, match=r"items\.jsonl is missing or not the file"):
        versions.load()
    (folder / "items.jsonl").unlink()
    with pytest.raises(ArtefactError, match=r"items\.jsonl is missing or not the file"):
        versions.load()
    (folder / "items.jsonl").write_text(text)
    described = json.loads((folder / "version.json").read_text())
    (folder / "version.json").write_text(json.dumps(described | {"retired": ["item-2"]}))
    with pytest.raises(CatalogError, match="make the catalog"):
        versions.load()
    (folder / "version.json").write_text("{")
    with pytest.raises(ArtefactError, match="is no version"):
        versions.load()
    assert versions.rollback(versions.base.version) == versions.base.version
    (versions.folder / "current.json").write_text('{"version": 1}')
    with pytest.raises(CatalogError, match="does not say which version is current"):
        versions.load()


def test_versions_that_name_each_other_as_parents_end(versions):
    first = versions.add(new_items("a"), free_codes(versions.base, 1))
    described = versions.folder / "versions" / first / "version.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"parent": first}))
    with pytest.raises(CatalogError, match="their own ancestors"):
        versions.load()


def _retire(folder, item):
    CatalogVersions(folder).retire([item])


def test_changes_of_many_processes_are_made_one_after_another(versions):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_retire, args=(versions.folder, f"item-{n}")) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert np.flatnonzero(CatalogVersions(versions.folder).load().retired).tolist() == list(range(8))
    assert len(versions.log()) == 9


@pytest.mark.parametrize("moment", ["write_items", "save_file", "write_json", "_point"])
def test_a_killed_change_leaves_the_old_version_in_use(versions, monkeypatch, moment):
    before = versions.current

    def killed():
        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        owner = CatalogVersions if moment == "_point" else catalog_versions
        monkeypatch.setattr(owner, moment, die)
        versions.add(new_items("a"), free_codes(versions.base, 1))

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    again = CatalogVersions(versions.folder)
    assert again.current == before
    assert again.load().ids == versions.base.ids
    grown = again.add(new_items("a"), free_codes(again.base, 1))
    assert again.load(grown).ids[-1] == "a"
    assert not list((versions.folder / "versions").glob(".*.tmp"))


def test_a_built_folder_is_a_base_too(tmp_path):
    catalog = random_catalog(3)
    catalog.save(tmp_path)
    (tmp_path / "catalog.json").rename(tmp_path / "semantic_ids.json")
    versions = CatalogVersions(tmp_path)
    name = versions.retire(["item-5"])
    assert Catalog.from_build(tmp_path).version == catalog.version
    assert versions.load().version == name


def test_a_copied_folder_goes_on_alone(versions, tmp_path):
    versions.retire(["item-1"])
    shutil.copytree(versions.folder, tmp_path / "copy")
    copied = CatalogVersions(tmp_path / "copy")
    copied.restore(["item-1"])
    assert versions.load().retired.any()
    assert not copied.load().retired.any()


def test_created_times_order_the_log(versions):
    made = []
    for n in range(3):
        made.append(versions.retire([f"item-{n}"]))
        time.sleep(0.001)
    assert [row["version"] for row in versions.log()][1:] == made
