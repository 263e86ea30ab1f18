"""TrieTensors: a catalog's trie as torch tensors, all that a search walks; saved to one file and mapped from it."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from llmrec.exceptions import CatalogError, RequestError
from llmrec.storage import atomic_path
from llmrec.subtrie import ancestors, ascending, kept_nodes, parents_of
from llmrec.trie import CatalogTrie, child_of
from llmrec.trie_file import MEASURES, check_search_trie, mapped_arrays

if TYPE_CHECKING:
    from llmrec.catalog import Catalog, Softmax

FORMAT = "llmrec.search.1"
_LEVELS = ("start", "token", "code")
Rows = torch.Tensor | npt.NDArray[np.integer] | Sequence[int]


class TrieTensors:
    """A CatalogTrie and its token ids as torch tensors on one device; made once, used by every search.

    A leaf is one code of one item. Usually items and codes are one to one; items may share a code (`shared`), and an
    item may have several codes (`rows`).

    Attributes, per level, int32 as in the trie:
        start[l]: (n_{l-1} + 1,) the children of node `p` of the level above: start[l][p] to start[l][p + 1].
        token[l]: (n_l,) the token id on the edge into each node, -1 behind an item's end.
    Attribute of the leaves:
        item_of_leaf: (M,) int32 catalog rows.
    Attributes of the tokens:
        vocabulary: (n,) int64 ascending token ids that probabilities are normalised over; None for all.
        ragged: whether items may differ in length.
        shared: whether the last level bears no tokens, and tells items of one code apart.
    Attributes of the whole:
        sizes: per level the greatest code and one, or more.
        num_rows: N, the catalog's rows, with and without a leaf.
    """

    def __init__(
        self,
        trie: CatalogTrie,
        token_ids: Sequence[npt.NDArray[np.int64]],
        device: torch.device | str = "cpu",
        vocabulary: npt.NDArray[np.int64] | None = None,
        rows: npt.NDArray[np.integer] | None = None,
    ) -> None:
        """
        Args:
            trie: of the codes.
            token_ids: per level of the codes the token id of each code, -1 for "nothing".
            device: of the tensors.
            vocabulary: see the attribute.
            rows: (N',) the catalog row that each row of the trie's codes names, for items with several codes; default
                each its own. A search returns an item once, with the score of its best code.

        Raises:
            CatalogError: if a token of an item is not in `vocabulary`, so that it could have no probability, or if
                token ids or `rows` do not fit the trie.
        """
        self.device = torch.device(device)
        self.shared, self.sizes = trie.shared, trie.sizes
        self.start = [torch.from_numpy(level).to(self.device) for level in trie.start]
        if len(token_ids) != trie.num_levels - trie.shared:
            raise CatalogError(f"Token ids of {len(token_ids)} levels do not fit the trie. Give one array per level.")
        edges = list(zip(token_ids, trie.code, strict=not trie.shared))
        self.token = [torch.from_numpy(ids[codes].astype(np.int32)).to(self.device) for ids, codes in edges]
        # Asked of the host's arrays, so that nothing is read back from the device.
        self.ragged = any(bool((ids[codes] < 0).any()) for ids, codes in edges)
        if trie.shared:
            self.token.append(torch.full((trie.num_items,), -1, dtype=torch.int32, device=self.device))
        self.vocabulary: torch.Tensor | None = None
        if vocabulary is not None:
            used = np.unique(np.concatenate([ids[codes] for ids, codes in edges]))
            if strange := np.setdiff1d(used[used >= 0], vocabulary).tolist():
                raise CatalogError(
                    f"{len(strange)} token(s) of items are outside the softmax range, {strange[0]} first. "
                    "Give the range that the model was trained with."
                )
            self.vocabulary = torch.from_numpy(np.unique(vocabulary)).to(self.device)
        self._code: Callable[[], list[torch.Tensor]] = lambda: [torch.from_numpy(_wide(code)) for code in trie.code]
        self._leaf_of_item: torch.Tensor | None = None
        if rows is None:
            self.item_of_leaf = torch.from_numpy(trie.item_of_leaf).to(self.device)
            self._leaf_of_item = torch.from_numpy(trie.leaf_of_item).to(self.device)
            self.num_rows = len(trie.leaf_of_item)
        else:
            rows = np.asarray(rows)
            if rows.shape != trie.leaf_of_item.shape or rows.dtype.kind not in "iu" or rows.min() < 0:
                raise CatalogError(
                    f"Rows {rows.dtype} of shape {rows.shape} do not fit {len(trie.leaf_of_item)} codes. "
                    "Give the catalog row of every code."
                )
            self.item_of_leaf = torch.from_numpy(rows[trie.item_of_leaf].astype(np.int32)).to(self.device)
            self.num_rows = int(rows.max()) + 1
        self.several = rows is not None
        self.fan_out, self.probes = trie.fan_out, trie.probes

    @classmethod
    def of(
        cls,
        catalog: "Catalog",
        softmax: "Softmax" = "vocabulary",
        device: torch.device | str = "cpu",
        shared: bool = False,
    ) -> Self:
        """Those of a catalog with token ids, whose model was trained with this softmax range.

        `shared` says that items may have the same code, see `CatalogTrie`.

        Raises:
            CatalogError: if the catalog has no token ids yet, there is no such range for its items, or two items have
                one code and `shared` is not asked for.
        """
        trie = CatalogTrie(catalog.codes, ~catalog.retired, shared=True) if shared else catalog.trie
        return cls(trie, catalog.require_tokens(), device, catalog.softmax_tokens(softmax))

    @property
    def num_levels(self) -> int:
        """L, with the level that tells items of one code apart if there is one."""
        return len(self.start)

    @property
    def token_levels(self) -> int:
        """The levels that bear tokens: an item has at most so many, and a search as many model runs, the prompt's
        among them."""
        return self.num_levels - self.shared

    @property
    def num_leaves(self) -> int:
        """The live codes, which are the live items unless an item has several; 0 for a part without items."""
        return len(self.item_of_leaf)

    @cached_property
    def num_items(self) -> int:
        """The live items."""
        return len(self._by_row[0].unique_consecutive()) if self.several else self.num_leaves

    @property
    def leaf_of_item(self) -> torch.Tensor:
        """(N,) int32 the leaf of each catalog row, -1 for a row without one.

        Raises:
            CatalogError: if this is a part of a trie, or items have several codes; `leaves_of` answers for all.
        """
        if self._leaf_of_item is None:
            raise CatalogError("A part of a trie has no leaf for every row. Ask for those of some rows: leaves_of.")
        return self._leaf_of_item

    @cached_property
    def _by_row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The leaves' rows ascending, and the leaves in that order, (M,) each; in the place of `leaf_of_item`."""
        rows, leaves = self.item_of_leaf.sort(stable=True)
        return rows, leaves.int()

    @cached_property
    def code(self) -> list[torch.Tensor]:
        """Per level (n_l,) the codes on the edges, uint8 or int32; made when asked, for few searches need them."""
        return [code.to(self.device) for code in self._code()]

    @cached_property
    def fan_out(self) -> list[int]:
        """Per level the greatest number of children that a node has in it."""
        return [int(begins.diff().max()) if len(begins) > 1 else 0 for begins in self.start]

    @cached_property
    def probes(self) -> list[int]:
        """See `CatalogTrie`."""
        found = []
        for size, begins in zip(self.sizes, self.start, strict=True):
            width = begins.diff()
            span = torch.minimum(width, size - width + 1)
            found.append((int(span.max()) - 1).bit_length() if len(span) and self.num_leaves else 0)
        return found

    def nodes(self, prefixes: torch.Tensor) -> torch.Tensor:
        """`CatalogTrie.nodes` on this device: (B, l) codes -> (B,) int64 nodes, -1 where no item begins so.

        The operations depend on the trie and on l, not on values, and nothing is read back from the device.

        Raises:
            CatalogError: if prefixes are not a matrix of integers with at most L columns, or there is no item.
        """
        if prefixes.dim() != 2 or prefixes.shape[1] > self.num_levels or prefixes.is_floating_point():
            raise CatalogError(
                f"Prefixes are {prefixes.dtype} of shape {tuple(prefixes.shape)}. "
                f"Give integers (batch, levels) with at most {self.num_levels} levels."
            )
        if not self.num_leaves:
            raise CatalogError("No item is in this part of the trie. Ask the whole one for its codes.")
        node = torch.zeros(len(prefixes), dtype=torch.long, device=self.device)
        found = torch.ones(len(prefixes), dtype=torch.bool, device=self.device)
        for level in range(prefixes.shape[1]):
            wanted = prefixes[:, level].long()
            node, here = child_of(self, level, self.code[level], self.start[level], node, wanted)
            found &= here
        return torch.where(found, node, -1)

    def allowed(self, prefixes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes that may follow each of B prefixes (B, l) of one length l < L, without a look back as in `nodes`.

        Returns:
            codes (B, C), int64, and legal (B, C): codes[i][legal[i]] may follow prefix `i`, ascending, and stand to
            the left; the rest of the row repeats one code. C is the greatest number of children in level l.

        Raises:
            CatalogError: as in `nodes`, and if prefixes are whole codes, which nothing follows.
        """
        node = self.nodes(prefixes)
        level = prefixes.shape[1]
        if level == self.num_levels:
            raise CatalogError(f"Prefixes have all {level} levels, which nothing follows. Give shorter ones.")
        start = self.start[level]
        begin = start[node]
        width = start[node + 1] - begin  # -1 is a place too, the last: negative
        offset = torch.arange(self.fan_out[level], device=self.device)
        legal = offset < width.unsqueeze(1)
        child = begin.unsqueeze(1) + offset.where(legal, 0)
        # The place -1 is past the last node.
        return self.code[level][child.clamp(max=len(self.code[level]) - 1)].long(), legal

    def leaves_of(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The leaves of catalog rows; rows without one, or beyond the catalog, are passed over.

        Returns:
            Two int64 tensors of one length, on this device: places in `rows`, ascending, and a leaf of each; an item
            with several codes has several.
        """
        rows = torch.as_tensor(rows)
        if rows.numel() and (rows.is_floating_point() or rows.dtype == torch.bool or rows.dim() != 1):
            raise RequestError(f"Rows are {rows.dtype} of shape {tuple(rows.shape)}. Give a list of whole numbers.")
        rows = rows.to(self.device).long().flatten()
        if self._leaf_of_item is not None:
            there = (rows >= 0) & (rows < self.num_rows)
            leaf = torch.where(there, self._leaf_of_item[torch.where(there, rows, 0)], -1)
            place = (leaf >= 0).nonzero().squeeze(1)
            return place, leaf[place].long()
        known, leaves = self._by_row
        wanted = rows.clamp(-1, self.num_rows).int()  # int32 as the known ones, which searchsorted would else copy
        begin = torch.searchsorted(known, wanted)
        count = torch.searchsorted(known, wanted, right=True) - begin
        place = torch.arange(len(rows), device=self.device).repeat_interleave(count)
        within = torch.arange(len(place), device=self.device) - (count.cumsum(0) - count)[place]
        return place, leaves[begin[place] + within].long()

    def candidates(self, excluded: Rows) -> int:
        """How many items a search returns at most that may not return the rows `excluded`."""
        rows = torch.as_tensor(excluded).flatten()
        place, _ = self.leaves_of(rows)
        return self.num_items - len(rows.to(self.device)[place].unique())

    def subset(self, rows: Rows) -> "TrieTensors":
        """The trie of these items alone: a search of it is one in which all others are excluded, at its own cost.

        Built on this device from the rows' leaves upwards, in O(n L log N) for n rows. Its nodes are numbered anew,
        its leaves name the same catalog rows. Rows without a leaf are passed over, and none may be left.

        Args:
            rows: catalog rows in any order, repeats allowed.
        """
        nodes, start = kept_nodes(self.start, ascending(self.leaves_of(rows)[1], self.num_leaves))
        part = TrieTensors.__new__(TrieTensors)
        part.device, part.sizes, part.vocabulary = self.device, self.sizes, self.vocabulary
        part.ragged, part.shared, part.several = self.ragged, self.shared, self.several
        part.num_rows = self.num_rows
        part.start = start
        part.token = [token[kept] for token, kept in zip(self.token, nodes, strict=True)]
        part.item_of_leaf = self.item_of_leaf[nodes[-1]]
        part._leaf_of_item = None
        part._code = lambda: [code[kept] for code, kept in zip(self.code, nodes, strict=True)]
        return part

    def tokens_of_leaves(self) -> torch.Tensor:
        """(M, L) int64 the tokens of every leaf's code, -1 behind its end."""
        nodes = ancestors(self.start, torch.arange(self.num_leaves, device=self.device))
        return torch.stack([token[node].long() for token, node in zip(self.token, nodes, strict=True)], dim=1)

    def dead_keys(self, excluded: Sequence[Rows]) -> list[torch.Tensor]:
        """`CatalogTrie.dead_nodes` on this device: per level the ascending keys `request · n_l + node` of the nodes
        below which every item is excluded.

        Args:
            excluded: for each of B requests, the catalog rows that it may not return (any order, repeats allowed;
                rows without a leaf change nothing).
        """
        parents = self.dead_children(excluded)
        counts = [1, *map(len, self.token)]
        found = []
        for level, (keys, places) in enumerate(parents):
            request, parent = keys // max(counts[level], 1), keys % max(counts[level], 1)
            found.append(request * counts[level + 1] + self.start[level][parent] + places)
        return found

    def dead_children(self, excluded: Sequence[Rows]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The nodes of `dead_keys`, named as a search meets them: by their parent, and their place among its children.

        Returns:
            Per level two int64 tensors of one length: ascending keys `request · n_{l-1} + parent` (n_{-1} = 1, the
            root), and places from 0.
        """
        counts = torch.tensor([len(rows) for rows in excluded], dtype=torch.long)
        rows = torch.cat([torch.as_tensor(rows).long() for rows in excluded]) if len(excluded) else counts
        place, leaf = self.leaves_of(rows)
        request = torch.arange(len(excluded)).repeat_interleave(counts).to(self.device)[place]
        dead = (request * self.num_leaves + leaf).unique()
        found = []
        for level in range(self.num_levels - 1, -1, -1):
            size, begins = max(len(self.token[level]), 1), self.start[level]
            above = len(self.token[level - 1]) if level else 1
            request, node = dead // size, dead % size
            parent = parents_of(begins, node.int())
            keys = request * above + parent
            begin = begins[parent]
            found.append((keys, node - begin))
            # A node is dead if all its children are.
            first = torch.ones_like(keys, dtype=torch.bool)
            first[1:] = keys[1:] != keys[:-1]
            dead, gone = keys.unique_consecutive(return_counts=True)
            dead = dead[gone == begins[parent[first] + 1] - begin[first]]
        return found[::-1]

    def save(self, path: str | Path, version: str = "") -> None:
        """Writes one safetensors file, whole or not at all; a part of a trie needs the whole one no more.

        `version` says whose trie it is (`Catalog.version`, say, and a filter's name), for `map` to compare.
        """
        arrays = {f"{name}.{level}": tensor for name in _LEVELS for level, tensor in enumerate(getattr(self, name))}
        arrays["item_of_leaf"] = self.item_of_leaf
        if self._leaf_of_item is not None:
            arrays["leaf_of_item"] = self._leaf_of_item
        else:
            arrays["row"], arrays["leaf_of_row"] = self._by_row
        if self.vocabulary is not None:
            arrays["vocabulary"] = self.vocabulary
        measures = json.dumps({name: getattr(self, name) for name in MEASURES})
        described = {"format": FORMAT, "version": version, "measures": measures}
        with atomic_path(path) as temporary:
            save_file({name: tensor.cpu().numpy() for name, tensor in arrays.items()}, temporary, metadata=described)

    @classmethod
    def map(cls, path: str | Path, device: torch.device | str = "cpu", version: str | None = None) -> Self:
        """Maps what `save` wrote into memory: no array is read before it is used, and processes share the pages.

        On another device than the processor all but the codes are copied there. The file must not be written in place
        while it is mapped (`save` replaces it). `version` is what `save` must have been given; None takes any.

        Raises:
            ArtefactError: if the file is missing, torn, not a search's trie, or of another version. Shapes, types and
                the ends of the arrays are checked, their inside is not.
        """
        with mapped_arrays(path, FORMAT, version) as (arrays, measures):
            check_search_trie(arrays, measures)
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        trie = cls.__new__(cls)
        trie.device = torch.device(device)
        for name in MEASURES:
            setattr(trie, name, measures[name])
        levels = range(len(trie.sizes))
        trie.start, trie.token = ([tensors[f"{name}.{level}"].to(device) for level in levels] for name in _LEVELS[:2])
        trie._code = lambda: [tensors[f"code.{level}"] for level in levels]
        trie.item_of_leaf = tensors["item_of_leaf"].to(device)
        trie._leaf_of_item = None
        if "leaf_of_item" in tensors:
            trie._leaf_of_item = tensors["leaf_of_item"].to(device)
        else:
            trie._by_row = (tensors["row"].to(device), tensors["leaf_of_row"].to(device))
        trie.vocabulary = tensors["vocabulary"].to(device) if "vocabulary" in tensors else None
        return trie


def _wide(code: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.integer[Any]]:
    """uint8 or int32, which torch indexes."""
    return code if code.dtype == np.uint8 else code.astype(np.int32, copy=False)
