"""A living catalog: every change a version, nothing lost, nothing changed that was there."""

import hashlib
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


def test_restoring_all_gives_the_same_catalog_under_another_name(versions):
    base = versions.base
    gone = versions.retire(["item-3"])
    back = versions.restore(["item-3"])
    assert len({base.version, gone, back}) == 3
    assert versions.load(back).content_hash == base.content_hash
    assert [(move["previous"], move["version"]) for move in versions.moves()] == [(base.version, gone), (gone, back)]


def test_rollback_undoes_the_last_change_however_the_catalog_came_about(versions):
    for change, item in (("retire", "item-1"), ("retire", "item-2"), ("restore", "item-1"), ("restore", "item-2")):
        getattr(versions, change)([item])
    before = versions.current
    versions.retire(["item-2"])
    assert versions.rollback() == before
    assert not versions.load().retired.any()


def test_an_item_that_was_corrected_is_the_corrected_one(versions):
    code = free_codes(versions.base, 1)
    versions.add([{"item_id": "new", "title": "WRONG"}], code)
    versions.rollback()
    versions.add([{"item_id": "new", "title": "RIGHT"}], code)
    assert versions.load().title(40) == CatalogVersions(versions.folder).load().title(40) == "RIGHT"


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
    with pytest.raises(CatalogError, match="There is no version 'abcdef0123456789'"):
        versions.rollback("abcdef0123456789")
    for name in ("../../catalog", "", "x" * 300, "\0", "ABCDEF0123456789"):
        with pytest.raises(CatalogError, match="is no version"):
            versions.rollback(name)
        assert versions.current == second


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
        (lambda v: v.add(new_items("a"), [[4, 3, 6]]), "New codes reach"),
        (lambda v: v.add(new_items("a"), free_codes(v.base, 1) + 2**32), "New codes reach"),
        (lambda v: v.add(new_items("a"), free_codes(v.base, 1) + 0.9), "codes of float64"),
        (lambda v: v.add(new_items("a", "b", "c"), free_codes(v.base, 3).T[:2]), r"in the shape \(2, 3\)"),
        (lambda v: v.add(new_items("a", "b"), free_codes(v.base, 3)), r"in the shape \(3, 3\)"),
        (lambda v: v.add([{"title": "nameless"}], free_codes(v.base, 1)), "has no item_id"),
        (lambda v: v.add([{"item_id": "a", "price": float("nan")}], free_codes(v.base, 1)), "cannot be written"),
        (lambda v: v.add([{"item_id": "a", "title": "half \ud83d"}], free_codes(v.base, 1)), "cannot be written"),
        (lambda v: v.add([], free_codes(v.base, 0)), "No item is to be added"),
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


def test_nothing_of_a_version_can_be_changed_unseen(versions):
    name = versions.add(new_items("a"), free_codes(versions.base, 1))
    folder = versions.folder / "versions" / name
    for file in ("items.jsonl", "codes.safetensors"):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ArtefactError, match=f"{file} is missing or not the file"):
            CatalogVersions(versions.folder).load()
        (folder / file).unlink()
        with pytest.raises(ArtefactError, match=f"{file} is missing or not the file"):
            CatalogVersions(versions.folder).load()
        (folder / file).write_bytes(content)
    described = (folder / "version.json").read_text()
    for text in (described.replace('"live": 41', '"live": 7'), described + " ", "{", "[]", '{"added": 1}'):
        (folder / "version.json").write_text(text)
        with pytest.raises(ArtefactError, match="was altered or is no version"):
            CatalogVersions(versions.folder).load()
    damaged = CatalogVersions(versions.folder).log()[1]
    assert (damaged["version"], damaged["current"]) == (name, True)
    assert "was altered" in damaged["damaged"]
    again = CatalogVersions(versions.folder)
    with pytest.raises(ArtefactError, match="was altered"):
        again.rollback()
    assert again.rollback(again.base.version) == again.base.version == again.load().version
    with pytest.raises(ArtefactError, match="was altered"):
        again.rollback(name)
    assert again.current == again.base.version


def test_a_well_made_description_of_another_catalog_is_refused(versions):
    name = versions.retire(["item-1"])
    described = json.loads((versions.folder / "versions" / name / "version.json").read_text())
    text = json.dumps(described | {"retired": ["item-2"]}).encode()
    forged = hashlib.sha256(text).hexdigest()[:16]
    (versions.folder / "versions" / forged).mkdir()
    (versions.folder / "versions" / forged / "version.json").write_bytes(text)
    with pytest.raises(CatalogError, match="make the catalog"):
        versions.rollback(forged)
    assert versions.current == name


def test_a_lost_or_torn_pointer_is_no_way_back_to_the_base(versions):
    name = versions.retire(["item-1"])
    pointer = versions.folder / "current.json"
    for text in ('{"version": 1}', "[]", "{"):
        pointer.write_text(text)
        with pytest.raises(CatalogError, match="does not say which version is current"):
            CatalogVersions(versions.folder).load()
    pointer.unlink()
    again = CatalogVersions(versions.folder)
    for ask in (again.load, again.log, lambda: again.retire(["item-2"]), again.rollback):
        with pytest.raises(CatalogError, match="nobody knows which is current"):
            ask()
    assert again.rollback(name) == again.current == name


def test_stray_folders_are_no_versions(versions):
    name = versions.retire(["item-1"])
    for stray in (f"{name}-copy", "copy", f".{name}.1.tmp"):
        shutil.copytree(versions.folder / "versions" / name, versions.folder / "versions" / stray)
    assert [row["version"] for row in versions.log()] == [versions.base.version, name]


@pytest.mark.parametrize("file", ["codes.safetensors", "items.jsonl", "catalog.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_torn_base_is_named(versions, file, content):
    (versions.folder / file).write_bytes(content)
    with pytest.raises(CatalogError, match=r"Restore|Build"):
        CatalogVersions(versions.folder).load()


def test_a_folder_that_cannot_be_written_stays_as_it_is(versions, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(catalog_versions, "atomic_folder", full)
    with pytest.raises(CatalogError, match=r"No space left on device.*It is as it was"):
        versions.retire(["item-1"])
    assert CatalogVersions(versions.folder).current == versions.base.version


def test_a_note_is_text_whatever_was_given(versions):
    versions.retire(["item-1"], "half \ud83d <b>\0\n")
    assert versions.log()[-1]["note"] == "half ? <b>\0\n"


def test_what_was_loaded_is_not_read_again(versions, monkeypatch):
    versions.retire(["item-1"])
    first = versions.load()
    assert versions.load() is first
    monkeypatch.setattr(catalog_versions, "read_items", None)
    assert versions.load(versions.add(new_items("a"), free_codes(first, 1))).ids[-1] == "a"


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


@pytest.mark.parametrize("moment", ["item_lines", "save", "write_json", "_point", "atomic_folder"])
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
