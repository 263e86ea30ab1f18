"""TrieTensors: what is mapped searches as what was built, whatever kind of trie it is."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import random_catalog, random_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import llmrec.trie_tensors
from llmrec.beam import beam_search
from llmrec.exceptions import ArtefactError, CatalogError
from llmrec.selection import Draw
from llmrec.trie import CatalogTrie
from llmrec.trie_tensors import FORMAT, TrieTensors

SIZES = (3, 4, 300)
TOKENS = [np.arange(size) + begin for size, begin in zip(SIZES, (0, 3, 7), strict=True)]
VOCABULARY = 320


def make(kind, seed=0, num_items=50):
    """A trie of one of the kinds there are."""
    codes = random_codes(seed, num_items, SIZES)
    rng = np.random.default_rng(seed)
    live = rng.random(num_items) < 0.8
    live[0] = True
    rows, vocabulary = None, None
    tokens = TOKENS
    if kind == "shared":
        codes = codes[rng.integers(0, num_items, num_items)]
    if kind == "several":
        rows = rng.integers(0, 20, num_items)
    if kind == "ragged":
        tokens = [TOKENS[0], np.append(TOKENS[1][:-1], -1), np.append(TOKENS[2][:-1], -1)]
        codes[codes[:, 1] == 3, 2] = 299
        codes = np.unique(codes, axis=0)
        live = None
    if kind == "narrow":
        vocabulary = np.arange(310)
    trie = CatalogTrie(codes, live, shared=kind == "shared")
    whole = TrieTensors(trie, tokens, vocabulary=vocabulary, rows=rows)
    if kind == "part":
        return whole.subset(range(0, num_items, 2))
    return whole.subset([]) if kind == "empty" else whole


KINDS = ["plain", "ragged", "shared", "several", "narrow", "part", "empty"]


def searched(trie, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn((2, VOCABULARY), generator=generator)
    later = torch.randn((4, VOCABULARY, VOCABULARY), generator=generator)
    calls = []

    def step(tokens, parents):
        calls.append(tokens)
        return later[len(calls)][tokens]

    return beam_search(first, step, trie, 12, [[], list(range(15))], **options)


def assert_same(mapped, trie):
    for name in ("start", "token", "code"):
        for mine, its in zip(getattr(mapped, name), getattr(trie, name), strict=True):
            assert mine.dtype == its.dtype
            assert mine.equal(its)
    assert mapped.item_of_leaf.equal(trie.item_of_leaf)
    for name in ("ragged", "shared", "several", "sizes", "fan_out", "probes", "num_rows", "num_levels"):
        assert getattr(mapped, name) == getattr(trie, name), name
    assert (mapped.num_leaves, mapped.num_items) == (trie.num_leaves, trie.num_items)
    assert (mapped.vocabulary is None) == (trie.vocabulary is None)
    assert trie.vocabulary is None or mapped.vocabulary.equal(trie.vocabulary)
    for options in ({}, {"renormalize": True}, {"draws": [Draw(seed=1), Draw(seed=2)]}):
        one, other = searched(mapped, **options), searched(trie, **options)
        assert one.items.equal(other.items)
        assert one.scores.equal(other.scores)
        assert one.levels.equal(other.levels)
    for rows in ([], [0, 3, 3, 8], range(200), [-1, 2**40]):
        for mine, its in zip(mapped.leaves_of(rows), trie.leaves_of(rows), strict=True):
            assert mine.equal(its)
        assert mapped.candidates(rows) == trie.candidates(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_mapped_trie_is_the_one_that_was_saved(tmp_path, kind, seed):
    trie = make(kind, seed)
    trie.save(tmp_path / "index.safetensors", version="abc")
    assert [file.name for file in tmp_path.iterdir()] == ["index.safetensors"]
    mapped = TrieTensors.map(tmp_path / "index.safetensors", version="abc")
    assert_same(mapped, trie)
    # Parts of it are parts of the other, and may be saved and mapped themselves.
    mapped.subset(range(9)).save(tmp_path / "part.safetensors")
    assert_same(TrieTensors.map(tmp_path / "part.safetensors"), trie.subset(range(9)))


def test_a_mapped_trie_is_neither_read_nor_written(tmp_path):
    path = tmp_path / "index.safetensors"
    make("plain").save(path)
    content = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that it may not write to
        mapped = TrieTensors.map(path)
    places = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    ranges = [tuple(int(end, 16) for end in place.split("-")) for place in places]
    for tensor in (*mapped.start, *mapped.token, *mapped.code, mapped.item_of_leaf, mapped.leaf_of_item):
        assert any(begin <= tensor.data_ptr() < end for begin, end in ranges)
    mapped.item_of_leaf[:] = 0
    assert path.read_bytes() == content
    assert TrieTensors.map(path).item_of_leaf.any()


def test_a_mapped_trie_outlives_its_replacement(tmp_path):
    path = tmp_path / "index.safetensors"
    old, new = make("plain", 0), make("plain", 1)
    old.save(path)
    mapped = TrieTensors.map(path)
    new.save(path)
    assert_same(mapped, old)
    assert_same(TrieTensors.map(path), new)


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "index.safetensors"
    make("plain").save(path)

    def half(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(llmrec.trie_tensors, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        make("plain", 1).save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert_same(TrieTensors.map(path), make("plain"))


def refused(path, version=None):
    """The error of mapping a file: one that llmrec raises on purpose, in two sentences."""
    with pytest.raises(ArtefactError) as raised:
        TrieTensors.map(path, version=version)
    assert str(raised.value).startswith(f"{path} ")
    assert str(raised.value).endswith(". Build it again from the catalog.")
    return str(raised.value)


def test_torn_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "index.safetensors"
    refused(path)
    make("plain").save(path, version="abc")
    assert "version 'abc', not of 'abd'" in refused(path, "abd")
    content = path.read_bytes()
    for length in {*range(0, len(content), 61), *range(16), *range(len(content) - 16, len(content))}:
        path.write_bytes(content[:length])
        refused(path)
    path.write_bytes(content + b"\0")
    refused(path)
    CatalogTrie(random_codes(0, 30, SIZES)).save(path)
    assert "is no trie (format 'llmrec.trie.1')" in refused(path)
    save_file({"token.0": np.zeros(3, dtype=np.int32)}, path)
    assert "is no trie (format None)" in refused(path)


@pytest.mark.parametrize("kind", ["narrow", "part"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, None) for name in ("token.0", "token.2", "start.1", "code.2", "item_of_leaf", "leaf_of", "token.1")),
        ("token.0", lambda array: array[:-1]),
        ("token.1", lambda array: array.astype(np.int64)),
        ("code.0", lambda array: array.astype(np.uint16)),
        ("code.1", lambda array: np.append(array, array[:1])),
        ("start.0", lambda array: np.array([1, array[-1]], dtype=np.int32)),
        ("start.1", lambda array: array + 1),
        ("start.2", lambda array: array[:-1]),
        ("item_of_leaf", lambda array: array[:-1]),
        ("leaf_of", lambda array: array[:-1]),
        ("leaf_of", lambda array: array.astype(np.int64)),
        ("token.3", lambda array: np.zeros(3, dtype=np.int32)),
        ("vocabulary", lambda array: np.zeros((3, 1), dtype=np.int64)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, kind, name, change):
    path = tmp_path / "index.safetensors"
    trie = make(kind)
    trie.save(path)
    described = {"format": FORMAT, "version": "", "measures": json.dumps(measures_of(trie))}
    arrays = load_file(path)
    save_file(arrays, path, metadata=described)
    TrieTensors.map(path)
    if name == "leaf_of":
        name = "leaf_of_item" if kind == "narrow" else "leaf_of_row"
    array = arrays.pop(name, None)
    if change is not None:
        arrays[name] = change(array)
    save_file(arrays, path, metadata=described)
    assert "holds no whole trie" in refused(path)


def measures_of(trie):
    names = ("sizes", "fan_out", "probes", "num_rows", "ragged", "shared", "several")
    return {name: getattr(trie, name) for name in names}


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": []},
        {"sizes": [3, 4]},
        {"fan_out": [3, 4, -1]},
        {"probes": [1, 1, "x"]},
        {"probes": None},
        {"num_rows": 49},
        {"num_rows": True},
        {"ragged": 0},
        {"several": None},
        {"more": 1},
    ],
)
def test_measures_that_do_not_fit_are_refused(tmp_path, change):
    path = tmp_path / "index.safetensors"
    trie = make("plain")
    trie.save(path)
    described = {"format": FORMAT, "measures": json.dumps(measures_of(trie) | change)}
    save_file(load_file(path), path, metadata=described)
    refused(path)
    for measures in ("", "[]", "{}", "3"):
        save_file(load_file(path), path, metadata={"format": FORMAT, "measures": measures})
        refused(path)
    save_file(load_file(path), path, metadata={"format": FORMAT})
    refused(path)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(["plain", "shared", "several", "part", "empty"]),
    seed=st.integers(0, 100),
    excluded=st.lists(st.lists(st.integers(-9, 60), max_size=60), max_size=4),
)
def test_dead_nodes_are_those_without_a_live_leaf(kind, seed, excluded):
    trie = make(kind, seed)
    tokens, items = trie.tokens_of_leaves().tolist(), trie.item_of_leaf.tolist()
    if trie.shared:  # the tokens of twins do not tell them apart
        tokens = [[*own[:-1], leaf] for leaf, own in enumerate(tokens)]
    for level, keys in enumerate(trie.dead_keys(excluded)):
        prefixes = list(dict.fromkeys(tuple(own[: level + 1]) for own in tokens))
        dead = []
        for request, rows in enumerate(excluded):
            live = {tuple(own[: level + 1]) for own, item in zip(tokens, items, strict=True) if item not in rows}
            dead += [request * len(prefixes) + node for node, one in enumerate(prefixes) if one not in live]
        assert keys.tolist() == dead
    for rows in excluded:
        left = {item for item in items if item not in rows}
        assert trie.candidates(rows) == trie.candidates(np.array(rows, dtype=np.int64)) == len(left)
        place, leaf = trie.leaves_of(rows)
        assert list(zip(place.tolist(), leaf.tolist(), strict=True)) == [
            (place, leaf) for place, row in enumerate(rows) for leaf, item in enumerate(items) if item == row
        ]


def test_dead_keys_are_the_tries_own():
    codes = random_codes(2, 200, (4, 8, 16))
    trie = CatalogTrie(codes)
    tensors = TrieTensors(trie, [np.arange(16)] * 3)
    excluded = [np.flatnonzero(codes[:, 0] == 1), np.arange(3), np.flatnonzero(codes[:, 1] == 2)]
    for mine, its in zip(tensors.dead_keys(excluded), trie.dead_nodes(excluded), strict=True):
        assert mine.tolist() == its.tolist()


def test_codes_of_parts_and_of_tries_mapped_lead_to_their_nodes(tmp_path):
    whole = make("plain")
    whole.save(tmp_path / "index.safetensors")
    mapped = TrieTensors.map(tmp_path / "index.safetensors")
    codes = random_codes(0, 50, SIZES)
    for depth in range(4):
        prefixes = torch.from_numpy(codes[:, :depth].astype(np.int64))
        assert mapped.nodes(prefixes).equal(whole.nodes(prefixes))
        if depth < 3:
            for mine, its in zip(mapped.allowed(prefixes), whole.allowed(prefixes), strict=True):
                assert mine.equal(its)
    rows = [row for row in range(50) if whole.leaf_of_item[row] >= 0][:20]
    part, alone = whole.subset(rows), CatalogTrie(codes, np.isin(np.arange(50), rows))
    for depth in range(4):
        found = part.nodes(torch.from_numpy(codes[:, :depth].astype(np.int64)))
        assert found.tolist() == alone.nodes(codes[:, :depth]).tolist()
    with pytest.raises(CatalogError, match="No item is in this part"):
        whole.subset([]).nodes(torch.zeros((1, 0), dtype=torch.long))


def test_the_trie_of_a_catalog():
    catalog = random_catalog(0)
    catalog.token_ids = tuple(np.arange(size, dtype=np.int64) for size in catalog.codebook_sizes)
    trie = TrieTensors.of(catalog)
    assert (trie.num_levels, trie.token_levels, trie.shared) == (3, 3, False)
    assert trie.leaf_of_item.tolist() == catalog.trie.leaf_of_item.tolist()
    shared = TrieTensors.of(catalog, shared=True)
    assert (shared.num_levels, shared.token_levels, shared.shared) == (4, 3, True)
    assert shared.item_of_leaf.equal(trie.item_of_leaf)
    retired = catalog.with_retired([3], True)
    retired.token_ids = catalog.token_ids
    assert TrieTensors.of(retired, shared=True).candidates([3, 4]) == 38


def test_parts_that_do_not_fit_are_refused():
    trie = CatalogTrie(random_codes(0, 30, SIZES))
    with pytest.raises(CatalogError, match="do not fit 30 codes"):
        TrieTensors(trie, TOKENS, rows=np.zeros(29, dtype=int))
    with pytest.raises(CatalogError, match="do not fit 30 codes"):
        TrieTensors(trie, TOKENS, rows=np.full(30, -1))
    for tokens in (TOKENS[:2], [*TOKENS, TOKENS[0]]):
        with pytest.raises(CatalogError, match=f"Token ids of {len(tokens)} levels"):
            TrieTensors(trie, tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_trie_on_a_gpu_is_the_one_beside_it(tmp_path, kind):
    trie = make(kind)
    trie.save(tmp_path / "index.safetensors")
    mapped = TrieTensors.map(tmp_path / "index.safetensors", "cuda")
    part, other = mapped.subset(range(0, 40, 3)), trie.subset(range(0, 40, 3))
    for mine, its in ((mapped, trie), (part, other)):
        for name in ("start", "token", "code"):
            for one, two in zip(getattr(mine, name), getattr(its, name), strict=True):
                assert one.device.type == "cuda"
                assert one.cpu().equal(two)
        for one, two in zip(mine.dead_keys([[3, 4], range(20)]), its.dead_keys([[3, 4], range(20)]), strict=True):
            assert one.cpu().equal(two)
        assert mine.candidates(range(20)) == its.candidates(range(20))
