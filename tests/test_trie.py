import json
import time
import warnings

import numpy as np
import pytest
import torch
from factories import random_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import llmrec.trie
from llmrec.beam import TrieTensors
from llmrec.exceptions import ArtefactError, CatalogError
from llmrec.trie import CatalogTrie

# Codes at the edges of the types that store and sort them.
EDGES = [0, 1, 254, 255, 256, 65_534, 65_535, 65_536, 2**31 - 3, 2**31 - 2]


@st.composite
def catalogs(draw):
    """(N, L) unique codes in any order, of any integer type that holds them, in any layout of memory."""
    levels = draw(st.integers(1, 5))
    small = st.integers(1, 6).map(lambda size: list(range(size)))
    alphabets = [draw(st.one_of(small, st.just(EDGES))) for _ in range(levels)]
    rows = draw(st.lists(st.tuples(*map(st.sampled_from, alphabets)), min_size=1, max_size=40, unique=True))
    greatest = max(map(max, rows))
    types = [kind for kind in ("u1", "i2", "u2", "i4", "u4", "i8", "u8") if greatest <= np.iinfo(kind).max]
    codes = np.array(rows, dtype=draw(st.sampled_from(types)))
    layout = draw(st.sampled_from(["C", "F", "strided", "reversed"]))
    if layout == "strided":
        return np.repeat(np.repeat(codes, 3, axis=0), 2, axis=1)[::3, ::2]
    return codes[::-1].copy()[::-1] if layout == "reversed" else np.asarray(codes, order=layout)


def tensors_of(trie, device="cpu"):
    """The trie's tensors, with one token for all codes: a codebook of 2^31 entries needs no memory so."""
    return TrieTensors(trie, [np.broadcast_to(np.int64(7), (size,)) for size in trie.sizes], device)


def brute_force(codes, prefix):
    """The codes after a prefix, by looking at every item."""
    depth = len(prefix)
    return sorted({row[depth] for row in codes.tolist() if depth < len(row) and row[:depth] == list(prefix)})


def distinct(codes, depth):
    """The prefixes of `depth` codes that items have, in order: the nodes of that level."""
    return sorted({tuple(row[:depth]) for row in codes.tolist()})


def prefixes_of(codes, depth, rng):
    """Prefixes of items, the same with one code changed, and some of codes that are none."""
    there = codes[:, :depth].astype(np.int64)
    changed = there.copy()
    if depth:
        changed[np.arange(len(codes)), rng.integers(0, depth, len(codes))] += rng.integers(-2, 3, len(codes))
    strange = rng.choice([-(2**63), -1, 2**31 - 1, 2**31, 2**63 - 1, 0], size=(4, depth))
    return rng.permutation(np.concatenate([there, changed, strange]))


@settings(max_examples=100, deadline=None)
@given(catalogs(), st.sampled_from([1, 3, 2**18]))
def test_arrays_are_those_of_the_sorted_table(codes, chunk):
    before = codes.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llmrec.trie, "_CHUNK", chunk)
        trie = CatalogTrie(codes)
    assert (codes == before).all()
    assert (trie.num_items, trie.num_levels) == codes.shape
    assert codes[trie.item_of_leaf].tolist() == sorted(codes.tolist())
    assert (trie.leaf_of_item[trie.item_of_leaf] == np.arange(len(codes))).all()
    rows = sorted(codes.tolist())
    for level in range(codes.shape[1]):
        nodes, parents = distinct(codes, level + 1), distinct(codes, level)
        assert trie.code[level].tolist() == [node[-1] for node in nodes]
        begins = [sum(node[:-1] < parent for node in nodes) for parent in parents]
        assert trie.start[level].tolist() == [*begins, len(nodes)]
        begins = [sum(tuple(row[: level + 1]) < node for row in rows) for node in nodes]
        assert trie.first_leaf[level].tolist() == [*begins, len(rows)]
        assert trie.sizes[level] == int(codes[:, level].max()) + 1
        assert trie.fan_out[level] == max(len(brute_force(codes, parent)) for parent in parents)


@settings(max_examples=100, deadline=None)
@given(catalogs(), st.integers(0, 2**32 - 1))
def test_lookups_are_brute_force(codes, seed):
    rng = np.random.default_rng(seed)
    trie = CatalogTrie(codes)
    tensors = tensors_of(trie)
    for depth in range(codes.shape[1] + 1):
        prefixes = prefixes_of(codes, depth, rng)
        place = {prefix: node for node, prefix in enumerate(distinct(codes, depth))}
        expected = [place.get(tuple(prefix), -1) for prefix in prefixes.tolist()]
        assert trie.nodes(prefixes).tolist() == expected
        assert tensors.nodes(torch.from_numpy(prefixes)).tolist() == expected
        children = [brute_force(codes, prefix) for prefix in prefixes.tolist()]
        offsets, found = trie.allowed(prefixes)
        assert (offsets[0], offsets[-1]) == (0, len(found))
        assert [part.tolist() for part in np.split(found, offsets[1:-1])] == children
        assert trie.children(prefixes[0].tolist()) == children[0]
        if depth < codes.shape[1]:
            padded, legal = tensors.allowed(torch.from_numpy(prefixes))
            assert padded.shape == legal.shape == (len(prefixes), trie.fan_out[depth])
            assert [row[kept].tolist() for row, kept in zip(padded, legal, strict=True)] == children
            assert (legal.long().diff(dim=1) <= 0).all()
            assert all(row[~kept].unique().numel() <= 1 for row, kept in zip(padded, legal, strict=True))


@pytest.mark.parametrize(
    "sizes", [(2**15, 2**15, 2**15), (2**15, 2**15, 2**16), (2**31 - 1, 2**31 - 1, 2**31 - 1), (3, 2**20, 7)]
)
def test_many_items_are_sorted_as_lexsort_does(sizes):
    """More rows than one chunk; with 19 bits for the row, 64 bits and 65, more than two passes, and less than one.

    The first levels have few codes, the greatest among them, so that the last levels decide.
    """
    rng = np.random.default_rng(len(sizes))
    last = np.unique(rng.integers(0, sizes[-2] * sizes[-1], 300_000))
    first = [rng.choice([0, 1, size // 2, size - 1], len(last)) for size in sizes[:-2]]
    codes = rng.permutation(np.stack([*first, last // sizes[-1], last % sizes[-1]], axis=1))
    assert len(codes) > 2**18
    trie = CatalogTrie(codes)
    assert (trie.item_of_leaf == np.lexsort(codes.T[::-1])).all()
    for leaf in (trie.nodes(codes), tensors_of(trie).nodes(torch.from_numpy(codes)).numpy()):
        assert (trie.item_of_leaf[leaf] == np.arange(len(codes))).all()
    near = codes[:20_000].copy()
    near[:, -1] += rng.integers(-1, 2, len(near))
    known = set(map(tuple, codes.tolist()))
    assert (trie.nodes(near) >= 0).tolist() == [tuple(row) in known for row in near.tolist()]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_a_million_items_a_second(dtype):
    codes = random_codes(0, 300_000, (256, 64, 256)).astype(dtype)
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        CatalogTrie(codes)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.3


@settings(max_examples=60, deadline=None)
@given(catalogs())
def test_memory_is_three_times_the_codes_at_most(codes):
    trie = CatalogTrie(codes)
    held = [*trie.code, *trie.start, trie.item_of_leaf, trie.leaf_of_item]
    assert trie.nbytes == sum(array.nbytes for array in held)
    assert trie.nbytes <= 3 * 4 * codes.size + 4 * codes.shape[1] + 4


def test_memory_of_the_worst_catalog_and_of_a_common_one():
    # Every code of every level is another one: as many nodes as there can be, and the widest type.
    worst = np.repeat(np.arange(70_000)[:, None], 4, axis=1)
    assert 2.2 < CatalogTrie(worst).nbytes / (4 * worst.size) < 2.3
    common = random_codes(0, 100_000, (256, 256, 256))
    assert CatalogTrie(common).nbytes < 4 * common.size * 1.5


def test_a_full_level_takes_no_search():
    full = CatalogTrie(np.stack(np.unravel_index(np.arange(4096), (16, 16, 16)), axis=1))
    assert full.probes == [0, 0, 0]
    half = CatalogTrie(np.stack(np.unravel_index(np.arange(0, 4096, 2), (16, 16, 16)), axis=1))
    assert half.probes == [0, 0, 3]


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_no_prefixes_have_no_children(depth):
    trie = CatalogTrie(random_codes(0, 30, (4, 5, 6)))
    nothing = np.zeros((0, depth), dtype=np.int32)
    assert trie.nodes(nothing).shape == (0,)
    offsets, found = trie.allowed(nothing)
    assert (offsets.tolist(), found.tolist()) == ([0], [])
    assert tensors_of(trie).nodes(torch.from_numpy(nothing)).shape == (0,)


def test_prefixes_that_are_none():
    trie = CatalogTrie(random_codes(0, 30, (4, 5, 6)))
    for prefixes in (np.zeros((2, 4), dtype=int), np.zeros(2, dtype=int), np.zeros((2, 2))):
        with pytest.raises(CatalogError, match=r"Prefixes are .* Give integers"):
            trie.nodes(prefixes)
        with pytest.raises(CatalogError, match=r"Prefixes are .* Give integers"):
            tensors_of(trie).nodes(torch.from_numpy(prefixes))
    with pytest.raises(CatalogError, match="nothing follows"):
        tensors_of(trie).allowed(torch.zeros((2, 3), dtype=torch.long))


def test_tensors_are_never_looked_at():
    """On the meta device tensors have no values: an operation that needed one, as a synchronisation does, fails."""
    trie = CatalogTrie(random_codes(0, 5_000, (40, 300, 70)))
    tensors = tensors_of(trie, "meta")
    for depth in range(3):
        padded, legal = tensors.allowed(torch.zeros((9, depth), dtype=torch.long, device="meta"))
        assert padded.shape == legal.shape == (9, trie.fan_out[depth])
    with pytest.raises((RuntimeError, NotImplementedError)):
        int(tensors.nodes(torch.zeros((9, 2), dtype=torch.long, device="meta")).max())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_lookups_on_a_gpu_do_not_synchronise():
    codes = random_codes(0, 5_000, (40, 300, 70))
    trie = CatalogTrie(codes)
    tensors = tensors_of(trie, "cuda")
    for depth in range(3):
        prefixes = prefixes_of(codes, depth, np.random.default_rng(depth))
        there = torch.from_numpy(prefixes).cuda()
        tensors.allowed(there)  # the codes are copied at the first call
        torch.cuda.set_sync_debug_mode("error")
        try:
            padded, legal = tensors.allowed(there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        offsets, found = trie.allowed(prefixes)
        assert (padded[legal].cpu().numpy() == found).all()
        assert (legal.sum(1).cpu().numpy() == np.diff(offsets)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 40), st.sampled_from([(3, 4, 5), (64,), (2, 3, 2, 5)]))
def test_dead_nodes_are_those_with_no_item_left(seed, excluded_count, sizes):
    rng = np.random.default_rng(seed)
    codes = random_codes(seed, 40, sizes)
    trie = CatalogTrie(codes)
    # Repeats, an empty request in the middle, and a request that excludes everything.
    excluded = [rng.integers(0, 40, excluded_count), np.array([], dtype=np.int64), np.arange(40)]
    dead = trie.dead_nodes(excluded)
    assert len(dead) == len(sizes)
    for level in range(len(sizes)):
        keys = set(dead[level].tolist())
        assert sorted(keys) == dead[level].tolist()
        for request, gone in enumerate(excluded):
            for node in range(len(trie.code[level])):
                leaves = trie.item_of_leaf[trie.first_leaf[level][node] : trie.first_leaf[level][node + 1]]
                expected = set(leaves.tolist()) <= set(gone.tolist())
                assert (request * len(trie.code[level]) + node in keys) == expected
    assert [keys.tolist() for keys in trie.dead_nodes([np.array([], dtype=np.int64)] * 2)] == [[]] * len(sizes)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((0, 3)), "at least one item"),
        (np.zeros((3, 0), dtype=int), "at least one item"),
        (np.zeros(3, dtype=int), "at least one item"),
        (np.array([[1, 2], [1, 2]]), "share the code"),
        (np.array([[-1, 2]]), "negative"),
        (np.array([[1.0, 2.0]]), "float64, not integers"),
        (np.array([[1, 2**31 - 1]]), r"A code is 2147483647\. "),
        (np.array([[1, 2**64 - 1]], dtype=np.uint64), r"A code is 18446744073709551615\. "),
        (np.broadcast_to(np.zeros((1, 1), dtype=np.int8), (2**31, 1)), "at most 2147483647 items"),
    ],
)
def test_codes_that_are_no_catalog(codes, message):
    with pytest.raises(CatalogError, match=message):
        CatalogTrie(codes)


@settings(max_examples=60, deadline=None)
@given(catalogs(), st.data())
def test_items_that_share_a_code_are_named(codes, data):
    """The first code in order that occurs twice, and its first two rows."""
    again = data.draw(st.lists(st.integers(0, len(codes) - 1), min_size=1, max_size=5))
    codes = np.concatenate([codes, codes[again]])
    codes = codes[data.draw(st.permutations(range(len(codes))))]
    shared = min(row for row in codes.tolist() if codes.tolist().count(row) > 1)
    first, second = [place for place, row in enumerate(codes.tolist()) if row == shared][:2]
    with pytest.raises(CatalogError) as raised:
        CatalogTrie(codes)
    assert str(raised.value).startswith(f"Items of rows {first} and {second} share the code {shared}. ")


@settings(max_examples=40, deadline=None)
@given(codes=catalogs())
def test_a_mapped_trie_is_the_one_that_was_saved(tmp_path_factory, codes):
    path = tmp_path_factory.mktemp("trie") / "trie.safetensors"
    trie = CatalogTrie(codes)
    trie.save(path, version="abc")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    mapped = CatalogTrie.load(path, version="abc")
    for name in ("sizes", "fan_out", "probes", "nbytes", "num_items", "num_levels"):
        assert getattr(mapped, name) == getattr(trie, name)
    for mine, its in zip(
        [*mapped.code, *mapped.start, mapped.item_of_leaf, mapped.leaf_of_item, *mapped.first_leaf],
        [*trie.code, *trie.start, trie.item_of_leaf, trie.leaf_of_item, *trie.first_leaf],
        strict=True,
    ):
        assert mine.dtype == its.dtype
        assert mine.tolist() == its.tolist()
    for depth in range(codes.shape[1] + 1):
        prefixes = prefixes_of(codes, depth, np.random.default_rng(0))
        assert mapped.nodes(prefixes).tolist() == trie.nodes(prefixes).tolist()


def test_a_mapped_trie_is_neither_read_nor_written(tmp_path):
    path = tmp_path / "trie.safetensors"
    CatalogTrie(random_codes(0, 2_000, (20, 30, 40))).save(path)
    content = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that it may not write to
        mapped = CatalogTrie.load(path)
        tensors = tensors_of(mapped)
    base = mapped.item_of_leaf
    while not isinstance(base, np.memmap):
        base = base.base
    assert base.filename == str(path) or base.filename == path
    assert tensors.start[1].data_ptr() == mapped.start[1].ctypes.data
    mapped.item_of_leaf[:] = 0
    tensors.start[1][:] = 0
    assert path.read_bytes() == content
    assert CatalogTrie.load(path).item_of_leaf.any()


def test_a_mapped_trie_outlives_its_replacement(tmp_path):
    path = tmp_path / "trie.safetensors"
    old, new = (CatalogTrie(random_codes(seed, 2_000, (20, 30, 40))) for seed in (0, 1))
    old.save(path)
    mapped = CatalogTrie.load(path)
    new.save(path)
    assert (mapped.item_of_leaf == old.item_of_leaf).all()
    assert (CatalogTrie.load(path).item_of_leaf == new.item_of_leaf).all()


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "trie.safetensors"
    trie = CatalogTrie(random_codes(0, 30, (4, 5, 6)))
    trie.save(path)

    def half(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(llmrec.trie, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        CatalogTrie(random_codes(1, 30, (4, 5, 6))).save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert (CatalogTrie.load(path).item_of_leaf == trie.item_of_leaf).all()


def refused(path, version=None):
    """The error of loading a file: one that llmrec raises on purpose, in two sentences."""
    with pytest.raises(ArtefactError) as raised:
        CatalogTrie.load(path, version)
    assert str(raised.value).startswith(f"{path} ")
    assert str(raised.value).endswith(". Build it again from the catalog.")
    return str(raised.value)


def test_torn_files_are_refused(tmp_path):
    path = tmp_path / "trie.safetensors"
    CatalogTrie(random_codes(0, 30, (4, 5, 6))).save(path)
    content = path.read_bytes()
    for length in {*range(0, len(content), 9), *range(16), *range(len(content) - 16, len(content))}:
        path.write_bytes(content[:length])
        refused(path)
    path.write_bytes(content + b"\0")
    refused(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "trie.safetensors"
    refused(path)
    refused(tmp_path)
    for content in (b"", b"\xff" * 100, b"{}", (2).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(content)
        refused(path)
    save_file({"codes": random_codes(0, 30, (4, 5, 6))}, path)
    assert "is no trie" in refused(path)
    save_file({"codes": random_codes(0, 30, (4, 5, 6))}, path, metadata={"format": "llmrec.trie.0"})
    assert "'llmrec.trie.0'" in refused(path)
    CatalogTrie(random_codes(0, 30, (4, 5, 6))).save(path, version="abc")
    assert "version 'abc', not of 'abd'" in refused(path, "abd")
    assert CatalogTrie.load(path, "abc").num_items == CatalogTrie.load(path).num_items == 30


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("code.0", lambda array: array[:-1]),
        ("code.1", lambda array: np.append(array, array[:1])),
        ("code.2", lambda array: array.astype(np.uint16)),
        ("code.2", lambda array: array.astype(np.float32)),
        ("code.2", lambda array: array.reshape(-1, 1)),
        ("start.0", lambda array: np.array([1, array[-1]], dtype=np.int32)),
        ("start.1", lambda array: array + 1),
        ("start.2", lambda array: array[:-1]),
        ("start.2", lambda array: array.astype(np.int64)),
        ("item_of_leaf", lambda array: array[:-1]),
        ("leaf_of_item", lambda array: array.astype(np.uint16)),
        ("leaf_of_item", None),
        ("code.1", None),
        ("code.3", lambda array: np.zeros(3, dtype=np.uint8)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, name, change):
    path = tmp_path / "trie.safetensors"
    trie = CatalogTrie(random_codes(0, 30, (4, 5, 6)))
    trie.save(path)
    arrays = load_file(path)
    measures = json.dumps({"sizes": trie.sizes, "fan_out": trie.fan_out, "probes": trie.probes})
    described = {"format": llmrec.trie.FORMAT, "measures": measures}
    save_file(arrays, path, metadata=described)
    CatalogTrie.load(path)
    array = arrays.pop(name, None)
    if change is not None:
        arrays[name] = change(array)
    save_file(arrays, path, metadata=described)
    assert "holds no whole trie" in refused(path)


@pytest.mark.parametrize(
    "measures",
    [
        "",
        "[]",
        "{}",
        '{"sizes": [], "fan_out": [], "probes": []}',
        '{"sizes": [4, 5, 6], "fan_out": [4, 5], "probes": [1, 1, 1]}',
        '{"sizes": [4, 5], "fan_out": [4, 5], "probes": [1, 1]}',
        '{"sizes": [4, 5, 600], "fan_out": [4, 5, 6], "probes": [1, 1, 1]}',
        '{"sizes": null, "fan_out": [4, 5, 6], "probes": [1, 1, 1]}',
        '{"sizes": [4, 5, "x"], "fan_out": [4, 5, 6], "probes": [1, 1, 1]}',
    ],
)
def test_measures_that_do_not_fit_are_refused(tmp_path, measures):
    path = tmp_path / "trie.safetensors"
    CatalogTrie(random_codes(0, 30, (4, 5, 6))).save(path)
    save_file(load_file(path), path, metadata={"format": llmrec.trie.FORMAT, "measures": measures})
    refused(path)


@settings(max_examples=60, deadline=None)
@given(catalogs(), st.data())
def test_a_trie_without_some_rows_is_that_of_the_others(codes, data):
    live = np.array(data.draw(st.lists(st.booleans(), min_size=len(codes), max_size=len(codes))))
    if not live.any():
        with pytest.raises(CatalogError, match="at least one item"):
            CatalogTrie(codes, live)
        return
    rows = np.flatnonzero(live)
    trie, alone = CatalogTrie(codes, live), CatalogTrie(codes[rows])
    for level in range(codes.shape[1]):
        assert trie.code[level].tolist() == alone.code[level].tolist()
        assert trie.start[level].tolist() == alone.start[level].tolist()
    assert trie.item_of_leaf.tolist() == rows[alone.item_of_leaf].tolist()
    assert trie.num_items == len(rows)
    assert [trie.leaf_of_item[row] for row in trie.item_of_leaf] == list(range(len(rows)))
    assert (trie.leaf_of_item[~live] == -1).all()
    # Rows without a leaf exclude nothing; the others exclude what they do in the trie of their own.
    excluded = data.draw(st.lists(st.integers(0, len(codes) - 1), max_size=60))
    kept = [int(np.searchsorted(rows, row)) for row in excluded if live[row]]
    dead = [keys.tolist() for keys in trie.dead_nodes([np.array(excluded, dtype=int), rows])]
    assert dead == [keys.tolist() for keys in alone.dead_nodes([np.array(kept, dtype=int), np.arange(len(rows))])]


def test_a_trie_without_some_rows_is_saved_as_it_is(tmp_path):
    codes = random_codes(3, 40, (3, 4, 5))
    trie = CatalogTrie(codes, np.arange(40) % 3 > 0)
    trie.save(tmp_path / "trie.safetensors")
    again = CatalogTrie.load(tmp_path / "trie.safetensors")
    assert again.item_of_leaf.tolist() == trie.item_of_leaf.tolist()
    assert again.leaf_of_item.tolist() == trie.leaf_of_item.tolist()
    for marks in ([True, False, True], [True, True, True]):
        with pytest.raises(CatalogError, match="3 marks of live items do not fit 40 codes"):
            CatalogTrie(codes, np.array(marks))
