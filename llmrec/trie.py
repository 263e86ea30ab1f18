"""CatalogTrie: the allowed continuations of a code prefix, as flat arrays.

The trie knows codes, not tokens and not items' names. Its rows are the catalog's codes in lexicographic order, so a
node of level `l` is a run of rows, its children are a run of the next level's nodes, and a node of the last level *is*
a row: no pointers, no hashing, and the item behind a leaf costs one lookup (STATIC, arXiv 2602.22647, uses a padded
form of the same idea, with dense tables for the first levels).

Codes are stored in the narrowest of uint8, uint16 and int32, everything else in int32: at most 8 bytes per node of
every level but the last, 4 per leaf for its code and 8 for the two permutations. That is at most three times the bytes
of the N x L int32 codes, whatever they are (and 4 bytes per level); with four levels of 256, it is less than once.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from llmrec.exceptions import CatalogError
from llmrec.storage import atomic_path
from llmrec.trie_file import DTYPES, mapped_arrays

Codes = npt.NDArray[np.integer[Any]]
IntArray = npt.NDArray[np.int64]
Places = npt.NDArray[np.int32]

FORMAT = "llmrec.trie.1"
_MEASURES = ("sizes", "fan_out", "probes")
_LIMIT = 2**31 - 1  # items, and codes of one level: both counts are int32
_CHUNK = 1 << 18  # rows packed at a time, so that what is between two steps stays in the cache


class CatalogTrie:
    """Level-wise CSR trie over unique codes.

    Attributes, the first five per level `l` of `L`, with `n_l` nodes (n_{L-1} = N):
        code[l]: (n_l,) uint8, uint16 or int32: the code on the edge into each node.
        start[l]: (n_{l-1} + 1,) int32: the children of node `p` of the level above are nodes
            start[l][p] : start[l][p + 1]; level 0 hangs from one root, so start[0] = [0, n_0].
        sizes[l]: the greatest code of the level, and one.
        fan_out[l]: the greatest number of children that a node has in this level.
        probes[l]: how often a search for one child has to halve its range, see `child_of`.
        item_of_leaf: (M,) int32, the catalog row of each of the M leaves; M = N unless rows were left out.
        leaf_of_item: (N,) int32, its inverse; -1 for a row that was left out.
        shared: whether the last level is one more than the codes have, and tells items of one code apart.

    >>> trie = CatalogTrie(np.array([[1, 0], [0, 2], [1, 3]]))
    >>> trie.num_levels, [level.tolist() for level in trie.code], trie.item_of_leaf.tolist()
    (2, [[0, 1], [2, 0, 3]], [1, 0, 2])
    >>> trie.children([1])
    [0, 3]
    """

    def __init__(self, codes: Codes, live: npt.NDArray[np.bool_] | None = None, shared: bool = False) -> None:
        """Builds the trie of `codes` (N, L), integers of any kind, which are read in place: they may be mapped.

        Args:
            codes: a row per item of the catalog.
            live: (N,) which rows have a leaf; default all. Others cannot be found, and leaves still name catalog rows.
            shared: whether rows may be equal. The trie then has a level L + 1 below the codes, whether rows are equal
                or not: items of one code are its nodes there, 0, 1, ... in the order of their rows.

        Raises:
            CatalogError: if there is no item, a code is not an integer from 0 to 2^31 - 2, or two rows are equal and
                may not be.
        """
        codes = np.asarray(codes)
        rows: Places | None = None
        if live is not None and len(live) != len(codes):
            raise CatalogError(f"{len(live)} marks of live items do not fit {len(codes)} codes. Give one per item.")
        if live is not None and not np.all(live):
            whole, rows = len(codes), np.flatnonzero(live).astype(np.int32)
            codes = codes[rows]
        if codes.ndim != 2 or codes.shape[0] == 0 or codes.shape[1] == 0:
            raise CatalogError(
                f"A trie needs codes of shape (items, levels), not {codes.shape}. Give at least one item."
            )
        if codes.dtype.kind not in "iu":
            raise CatalogError(f"Codes are {codes.dtype}, not integers. Give what a quantizer's encode returns.")
        num_items = len(codes)
        if num_items > _LIMIT:
            raise CatalogError(f"A trie holds at most {_LIMIT} items, not {num_items}. Split the catalog.")
        if (least := codes.min()) < 0:
            raise CatalogError(f"A code is negative ({least}). Codes count from 0.")
        self.sizes = [int(greatest) + 1 for greatest in codes.max(axis=0)]
        if max(self.sizes) > _LIMIT:
            raise CatalogError(f"A code is {max(self.sizes) - 1}. Codes are places in a codebook, below {_LIMIT}.")
        order = _lexicographic(codes, [(size - 1).bit_length() for size in self.sizes])
        above = np.zeros(num_items, dtype=bool)  # whether a row begins a new node of the level above
        above[0] = True
        self.code: list[Codes] = []
        self.start: list[Places] = []
        for level, size in enumerate(self.sizes):
            column = codes[:, level][order].astype(_narrowest(size), copy=False)
            new = above.copy()
            new[1:] |= column[1:] != column[:-1]
            self.code.append(column[new])
            self.start.append(np.append(np.flatnonzero(above[new]), len(self.code[-1])).astype(np.int32))
            above = new
        self.item_of_leaf: Places = order if rows is None else rows[order]
        self.shared = shared
        if shared:
            first = np.flatnonzero(above)
            alike = np.diff(np.append(first, num_items))
            self.sizes.append(int(alike.max()))
            place = np.arange(num_items) - np.repeat(first, alike)
            self.code.append(place.astype(_narrowest(self.sizes[-1])))
            self.start.append(np.append(first, num_items).astype(np.int32))
        elif len(self.code[-1]) != num_items:
            twin = int(above.argmin())
            one, other = self.item_of_leaf[twin - 1 : twin + 1]
            raise CatalogError(
                f"Items of rows {one} and {other} share the code {codes[order[twin]].tolist()}. "
                "Resolve collisions first: a leaf of the trie is one item."
            )
        self.leaf_of_item: Places = np.full(num_items if rows is None else whole, -1, dtype=np.int32)
        self.leaf_of_item[self.item_of_leaf] = np.arange(num_items, dtype=np.int32)
        self.fan_out: list[int] = []
        self.probes: list[int] = []
        for size, begins in zip(self.sizes, self.start, strict=True):
            width = np.diff(begins)
            self.fan_out.append(int(width.max()))
            self.probes.append((int(np.minimum(width, size - width + 1).max()) - 1).bit_length())

    @property
    def num_levels(self) -> int:
        return len(self.code)

    @property
    def num_items(self) -> int:
        return len(self.item_of_leaf)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; `first_leaf` comes on top for those who ask for it."""
        return sum(array.nbytes for array in self._arrays().values())

    @cached_property
    def first_leaf(self) -> list[Places]:
        """Per level (n_l + 1,): the rows below node `i` are first_leaf[l][i] : first_leaf[l][i + 1]; made when asked.

        >>> [level.tolist() for level in CatalogTrie(np.array([[1, 0], [0, 2], [1, 3]])).first_leaf]
        [[0, 1, 3], [0, 1, 2, 3]]
        """
        found = [np.arange(self.num_items + 1, dtype=np.int32)]
        for level in range(self.num_levels - 1, 0, -1):
            found.append(found[-1][self.start[level]])
        return found[::-1]

    def nodes(self, prefixes: Codes) -> IntArray:
        """The nodes that prefixes (B, l) of one length lead to, in level l - 1; -1 where no item begins so.

        Work grows with B, l and the logarithm of the codebook's size, not with N. All are the root, 0, if l = 0.

        Raises:
            CatalogError: if prefixes are not a matrix of integers with at most L columns.

        >>> CatalogTrie(np.array([[1, 0], [0, 2], [1, 3]])).nodes(np.array([[1, 3], [0, 2], [0, 3]]))
        array([ 2,  0, -1])
        """
        prefixes = self._matrix(prefixes)
        node = np.zeros(len(prefixes), dtype=np.int64)
        found = np.ones(len(prefixes), dtype=bool)
        for level in range(prefixes.shape[1]):
            node, here = child_of(self, level, self.code[level], self.start[level], node, prefixes[:, level])
            found &= here
        return np.where(found, node, -1)

    def allowed(self, prefixes: Codes) -> tuple[IntArray, Codes]:
        """The codes that may follow each of B prefixes (B, l) of one length.

        Returns:
            offsets (B + 1,) and codes: those after prefix `i` are codes[offsets[i] : offsets[i + 1]], ascending; none
            if no item begins so, or if prefixes are whole codes. Errors are those of `nodes`.

        >>> CatalogTrie(np.array([[1, 0], [0, 2], [1, 3]])).allowed(np.array([[1], [2], [0]]))
        (array([0, 2, 2, 3]), array([0, 3, 2], dtype=uint8))
        """
        node = self.nodes(prefixes)
        level = np.shape(prefixes)[1]
        offsets = np.zeros(len(node) + 1, dtype=np.int64)
        if level == self.num_levels:
            return offsets, self.code[-1][:0]
        begin = self.start[level][node].astype(np.int64)  # -1 is a place too; its count is 0
        count = np.where(node >= 0, self.start[level][node + 1] - begin, 0)
        np.cumsum(count, out=offsets[1:])
        return offsets, self.code[level][np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], count)]

    def children(self, prefix: Sequence[int]) -> list[int]:
        """The codes that may follow `prefix`, ascending; empty if no item begins so (or `prefix` is a whole code)."""
        return [int(code) for code in self.allowed(np.array([prefix], dtype=np.int64))[1]]

    def dead_nodes(self, excluded: Sequence[npt.NDArray[np.integer]]) -> list[IntArray]:
        """The nodes below which every item is excluded, so that a search never walks into an empty subtree.

        Args:
            excluded: for each of B requests, the catalog rows it may not return (any order, repeats allowed; rows
                without a leaf change nothing).

        Returns:
            Per level, the ascending keys `request · n_l + node` of the dead nodes. The last level's keys are the
            excluded items themselves.
        """
        counts = [len(rows) for rows in excluded]
        request = np.repeat(np.arange(len(excluded), dtype=np.int64), counts)
        rows = np.concatenate([np.asarray(rows, dtype=np.int64) for rows in excluded]) if request.size else request
        leaves = self.leaf_of_item[rows]
        dead = [np.unique((request * self.num_items + leaves)[leaves >= 0])]
        for level in range(self.num_levels - 1, 0, -1):  # a node is dead if all its children are
            request, node = np.divmod(dead[-1], len(self.code[level]))
            begins = self.start[level]
            # In the array's own type, because searchsorted would copy all of it into the other's.
            parent = np.searchsorted(begins, node.astype(begins.dtype), side="right") - 1
            keys, gone = np.unique(request * len(self.code[level - 1]) + parent, return_counts=True)
            parent = keys % len(self.code[level - 1])
            dead.append(keys[gone == begins[parent + 1] - begins[parent]])
        return dead[::-1]

    def save(self, path: str | Path, version: str = "") -> None:
        """Writes one safetensors file, whole or not at all.

        `version` says whose codes these are (`Catalog.version`), for `load` to compare.
        """
        measures = {name: getattr(self, name) for name in _MEASURES} | ({"shared": True} if self.shared else {})
        described = {"format": FORMAT, "version": version, "measures": json.dumps(measures)}
        with atomic_path(path) as temporary:
            save_file(self._arrays(), temporary, metadata=described)

    @classmethod
    def load(cls, path: str | Path, version: str | None = None) -> Self:
        """Maps what `save` wrote into memory: no array is read before it is used, and processes share the pages.

        The file must not be written in place while it is mapped (`save` replaces it). `version` is what `save` must
        have been given; None takes any.

        Raises:
            ArtefactError: if the file is missing, torn, not a trie's, or of another version. Shapes, types and the
                ends of the arrays are checked, their inside is not.
        """
        with mapped_arrays(path, FORMAT, version) as (arrays, measures):
            return cls._from_arrays(arrays, measures)

    @classmethod
    def _from_arrays(cls, arrays: dict[str, Any], measures: dict[str, Any]) -> Self:
        """The trie of arrays by name; raises ValueError or KeyError if they cannot be one."""
        trie = cls.__new__(cls)
        trie.sizes, trie.fan_out, trie.probes = ([int(n) for n in measures[name]] for name in _MEASURES)
        trie.shared = bool(measures.get("shared", False))
        trie.code = [arrays[f"code.{level}"] for level in range(len(trie.sizes))]
        trie.start = [arrays[f"start.{level}"] for level in range(len(trie.sizes))]
        trie.item_of_leaf, trie.leaf_of_item = arrays["item_of_leaf"], arrays["leaf_of_item"]
        nodes = [1, *(array.size for array in trie.code)]
        if trie.leaf_of_item.ndim != 1 or len(trie.leaf_of_item) < nodes[-1]:
            raise ValueError("it has more leaves than items")
        rows = {"item_of_leaf": nodes[-1], "leaf_of_item": len(trie.leaf_of_item)}
        expected = {name: (DTYPES["I32"], (size,)) for name, size in rows.items()}
        for level, size in enumerate(trie.sizes):
            expected[f"code.{level}"] = (_narrowest(size), (nodes[level + 1],))
            expected[f"start.{level}"] = (DTYPES["I32"], (nodes[level] + 1,))
        described = len(trie.sizes) == len(trie.fan_out) == len(trie.probes) > 0
        if not described or {name: (array.dtype, array.shape) for name, array in arrays.items()} != expected:
            raise ValueError("its arrays do not fit together")
        if any(begins[0] != 0 or begins[-1] != nodes[level + 1] for level, begins in enumerate(trie.start)):
            raise ValueError("nodes of a level are not their parents' children")
        return trie

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        named: dict[str, npt.NDArray[Any]] = {f"code.{level}": array for level, array in enumerate(self.code)}
        named |= {f"start.{level}": array for level, array in enumerate(self.start)}
        return {**named, "item_of_leaf": self.item_of_leaf, "leaf_of_item": self.leaf_of_item}

    def _matrix(self, prefixes: Codes) -> IntArray:
        prefixes = np.asarray(prefixes)
        strange = prefixes.size and prefixes.dtype.kind not in "iu"
        if prefixes.ndim != 2 or prefixes.shape[1] > self.num_levels or strange:
            raise CatalogError(
                f"Prefixes are {prefixes.dtype} of shape {prefixes.shape}. "
                f"Give integers (batch, levels) with at most {self.num_levels} levels."
            )
        return prefixes.astype(np.int64, copy=False)


class Measured(Protocol):
    """A trie, as far as `child_of` knows it."""

    sizes: list[int]

    @property
    def probes(self) -> list[int]: ...


def child_of(trie: Measured, level: int, code: Any, start: Any, node: Any, wanted: Any) -> tuple[Any, Any]:
    """The child of each node whose edge bears the wanted code, for numpy arrays and torch tensors alike.

    A node's w children bear different codes below K, ascending. So the child of code c lies at place c at most (that
    many codes are lower), and at place c - (K - w) at least (no more codes can be missing below c): the range has
    min(w, K - w + 1) places, one if the node has all children. It is halved `trie.probes[level]` times, which is
    enough for the widest range of the level: the number of operations depends on no value.

    Args:
        trie: for the level's numbers alone.
        level: of the children.
        code, start: the trie's code[level] and start[level], or tensors of them.
        node: (B,) int64 nodes of the level above.
        wanted: (B,) int64 codes, any numbers.

    Returns:
        (B,) int64 nodes of this level and (B,) bool: whether it is the wanted child. If not, the node is some other.
    """
    size = trie.sizes[level]
    capped = wanted.clip(0, size - 1)
    begin = start[node]
    width = start[node + 1] - begin
    low = (capped - (size - width)).clip(min=0)
    span = capped.clip(max=width - 1) - low + 1
    child = begin + low
    for _ in range(trie.probes[level]):
        half = span >> 1
        child = child + half * (code[child + half] <= capped)
        span = span - half
    return child, code[child] == wanted


def _narrowest(size: int) -> np.dtype[Any]:
    """The type of codes below `size`."""
    return DTYPES["U8" if size <= 2**8 else "U16" if size <= 2**16 else "I32"]


def _lexicographic(codes: Codes, bits: Sequence[int]) -> Places:
    """The rows of codes (N, L) in lexicographic order, equal ones by row; bits[l] suffice for a code of level l.

    Rows are sorted by their last levels first, as a radix sort would: as many levels as fit are packed with the row's
    present place into 64 bits, so that sorting plain integers (several times faster than sorting places by a key)
    keeps the order of equal rows and carries the permutation along. Four levels of 256 and 20 million rows are one
    such pass.
    """
    num_items = len(codes)
    place_bits = (num_items - 1).bit_length()
    order: Places | None = None
    end = len(bits)
    while end:
        begin = end - 1
        while begin and sum(bits[begin - 1 : end]) + place_bits <= 64:
            begin -= 1
        keys = np.zeros(num_items, dtype=np.uint64)
        for first in range(0, num_items, _CHUNK):
            chunk = keys[first : first + _CHUNK]
            rows = slice(first, first + _CHUNK) if order is None else order[first : first + _CHUNK]
            for level in range(begin, end):
                chunk <<= np.uint64(bits[level])
                chunk |= codes[:, level][rows].astype(np.uint64)
            chunk <<= np.uint64(place_bits)
            chunk |= np.arange(first, first + len(chunk), dtype=np.uint64)
        keys.sort()
        keys &= np.uint64((1 << place_bits) - 1)
        place = keys.astype(np.int32)
        order = place if order is None else order[place]
        end = begin
    assert order is not None
    return order
