"""Index files: made once, made again when torn, equal to what is made in memory."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import random_catalog

from llmrec.catalog import Catalog
from llmrec.exceptions import ArtefactError, CatalogError
from llmrec.service.index_files import IndexFiles
from llmrec.trie_tensors import TrieTensors


def spelt(seed=0, first=300):
    """A catalog with token ids, as a tokenizer would have given them."""
    catalog = random_catalog(seed)
    ends = np.cumsum([first, *catalog.codebook_sizes])
    return catalog.with_tokens([np.arange(begin, end) for begin, end in itertools.pairwise(ends)])


def same(one: TrieTensors, other: TrieTensors) -> bool:
    pairs = [*zip(one.start, other.start, strict=True), *zip(one.token, other.token, strict=True)]
    pairs += [(one.item_of_leaf, other.item_of_leaf)]
    vocabularies = [one.vocabulary, other.vocabulary]
    return all(torch.equal(a, b) for a, b in pairs) and (
        vocabularies == [None, None] or torch.equal(one.vocabulary, other.vocabulary)
    )


@pytest.mark.parametrize("softmax", ["vocabulary", "semantic_ids"])
def test_an_index_is_made_once_and_is_the_catalog_s_trie(tmp_path, softmax):
    catalog = spelt().with_retired([3, 5], True)
    files = IndexFiles(tmp_path / "index")
    assert (tmp_path / "index").stat().st_mode & 0o777 == 0o700
    name = files.index_of(catalog, softmax)
    assert name.startswith(catalog.version + "-")
    assert files.path(name) == tmp_path / "index" / name
    assert files.names() == [name]
    assert files.size(name) == files.path(name).stat().st_size > 0
    before = files.path(name).stat()
    assert IndexFiles(tmp_path / "index").index_of(catalog, softmax) == name
    after = files.path(name).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert same(files.load(name), TrieTensors.of(catalog, softmax))


def test_names_tell_what_files_depend_on(tmp_path):
    files = IndexFiles(tmp_path)
    named = spelt()
    named.version = "0123456789abcdef"
    catalogs = [spelt(), spelt().with_retired([1], True), spelt(1), spelt(first=301), named]
    names = [files.index_of(catalog) for catalog in catalogs] + [files.index_of(catalogs[0], "semantic_ids")]
    assert len(set(names)) == 6
    assert files.index_of(spelt()) == names[0]
    renamed = Catalog([{**item, "title": "x"} for item in spelt().items], spelt().codes, spelt().codebook_sizes)
    with pytest.raises(CatalogError, match="no token ids yet"):
        files.index_of(renamed)
    assert len(files.names()) == 6


@pytest.mark.parametrize("damage", ["torn", "empty", "noise", "other"])
def test_a_torn_file_is_made_again(tmp_path, damage):
    catalog, files = spelt(), IndexFiles(tmp_path)
    name = files.index_of(catalog)
    path, whole = files.path(name), files.path(name).read_bytes()
    other = files.path(files.index_of(catalog, "semantic_ids"))
    path.write_bytes(
        {"torn": whole[:-9], "empty": b"", "noise": b"\x07" * len(whole), "other": other.read_bytes()}[damage]
    )
    with pytest.raises(ArtefactError):
        files.load(name)
    assert files.index_of(catalog) == name
    assert same(files.load(name), TrieTensors.of(catalog))
    part = files.subset_of(name, np.array([1, 2]))
    whole = files.path(part).read_bytes()
    files.path(part).write_bytes(whole[: len(whole) // 2])
    assert files.subset_of(name, np.array([2, 1])) == part
    assert same(files.load(part), TrieTensors.of(catalog).subset([1, 2]))


def test_a_subset_is_the_part_of_these_rows(tmp_path):
    catalog, files = spelt().with_retired([4], True), IndexFiles(tmp_path)
    index = files.index_of(catalog, "semantic_ids")
    whole = TrieTensors.of(catalog, "semantic_ids")
    names = []
    for rows in ([7, 3, 4, 3], [], range(40)):
        rows = np.array(list(rows), dtype=np.int64)
        name = files.subset_of(index, rows)
        assert files.subset_of(index, np.random.default_rng(0).permutation(rows)) == name
        found = files.load(name)
        assert found.num_leaves == len(set(rows.tolist()) - {4})
        assert sorted(found.item_of_leaf.tolist()) == sorted(set(rows.tolist()) - {4})
        assert same(found, whole.subset(rows))
        names.append(name)
    assert len(set(names)) == 3
    other = files.subset_of(files.index_of(catalog), np.array([7, 3, 4]))
    assert other not in names
    files.release(index)
    assert files.size(index) == 0
    with pytest.raises(ArtefactError):
        files.subset_of(index, np.array([1]))


def test_a_file_stays_until_the_last_holder_releases_it(tmp_path):
    files = IndexFiles(tmp_path)
    index = files.index_of(spelt())
    parts = [files.subset_of(index, np.arange(4)) for _ in range(3)]
    for left in (2, 1):
        files.release(parts.pop())
        assert len(parts) == left
        assert set(files.names()) == {index, parts[0]}
    files.release(parts[0])
    assert files.names() == [index]
    files.release(index, keep=True)
    assert files.names() == [index]
    assert files.index_of(spelt()) == index
    files.release(index)
    assert files.names() == []
    with pytest.raises(ArtefactError):
        files.subset_of(index, np.array([1]))
    files.path(parts[0]).touch()  # a build that failed holds nothing
    files.index_of(spelt())
    assert files.subset_of(index, np.arange(4)) == parts[0]
    files.release(parts[0])
    assert files.names() == [index]


@pytest.mark.parametrize("name", ["../x.trie.safetensors", "a/b.trie.safetensors", ".x.trie.safetensors", "x", ""])
def test_what_is_no_name_opens_nothing(tmp_path, name):
    with pytest.raises(CatalogError, match="is no name of an index file"):
        IndexFiles(tmp_path).load(name)


def test_many_threads_make_one_file(tmp_path):
    catalog, files, found = spelt(), IndexFiles(tmp_path), []
    barrier = threading.Barrier(8)

    def make():
        barrier.wait()
        index = files.index_of(catalog)
        found.append((index, files.subset_of(index, np.arange(9))))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert sorted(files.names()) == sorted(found[0])
    assert same(files.load(found[0][0]), TrieTensors.of(catalog))


def test_a_file_that_goes_while_it_is_asked_for_has_no_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # it was there a moment ago
    assert IndexFiles(tmp_path).size("gone.trie.safetensors") == 0
