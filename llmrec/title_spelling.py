"""Items spelt as their titles: the tokens of a title and an end token stand where a semantic ID would.

A catalog in text mode needs no codebook and no new tokens, so an item that comes later is spelt as well as the first.
BIGRec (arXiv 2308.08434) lets a language model write titles and looks for the nearest item afterwards; here the
catalog's trie grounds every step, and nothing else can be written.

Its codes are token ids and one, level by level, and 0, "nothing", behind the end of an item. So codes of text mode are
ragged rows in a rectangular matrix, and the table from codes to token ids is the same for every level.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import ArtefactError, CatalogError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrec.catalog import Catalog

NOTHING = -1  # the token id of a place behind an item's end
Codes = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TitleSpelling:
    """How a catalog's items are spelt in the tokens of one tokenizer.

    Attributes:
        vocabulary_size: ids of the tokenizer are below it.
        vocabulary: a hash of the tokenizer's strings and ids.
        end: the id of the token that closes every item, and that no title has.
        max_title_tokens: a title's tokens beyond these are left out; a number behind it and the end come on top.
    """

    vocabulary_size: int
    vocabulary: str
    end: int
    max_title_tokens: int

    def __post_init__(self) -> None:
        if self.max_title_tokens < 1:
            raise CatalogError(f"max_title_tokens is {self.max_title_tokens}. Keep at least one token of a title.")
        if not 0 <= self.end < self.vocabulary_size:
            raise CatalogError(
                f"The end token is {self.end}, and the vocabulary has {self.vocabulary_size} ids. "
                "Spell the titles again with the model's tokenizer."
            )

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", max_title_tokens: int) -> "TitleSpelling":
        """That of a tokenizer; raises CatalogError if it has no control token to end an item with."""
        size, vocabulary = _vocabulary(tokenizer)
        return cls(size, vocabulary, end_token(tokenizer), max_title_tokens)

    def require(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises ArtefactError if `tokenizer` is not the one that the items are spelt in."""
        if (self.vocabulary_size, self.vocabulary) != _vocabulary(tokenizer):
            raise ArtefactError(
                f"The catalog's titles are spelt in a vocabulary of {self.vocabulary_size} ids (hash "
                f"{self.vocabulary}), and this tokenizer has another. The files come from different artefacts: "
                "restore the folder."
            )

    @cached_property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """(vocabulary_size + 1,) the token id of each code: -1 for code 0, code - 1 for the others."""
        return np.arange(NOTHING, self.vocabulary_size, dtype=np.int64)

    def check(self, codes: Codes) -> None:
        """Raises CatalogError unless every row of codes (N, L) is a title, the end, and nothing after it."""
        if codes.size and not (codes.min() >= 0 and codes.max() <= self.vocabulary_size):
            raise CatalogError(
                f"Codes reach from {codes.min()} to {codes.max()}, and the vocabulary has {self.vocabulary_size} "
                "ids. Spell the titles with the catalog's tokenizer."
            )
        ends = codes == self.end + 1
        lengths = ends.argmax(axis=1) + 1 if codes.shape[1] else np.zeros(len(codes), dtype=np.int64)
        inside = np.arange(codes.shape[1]) < lengths[:, None]
        wrong = (ends.sum(axis=1) != 1) | ((codes != 0) != inside).any(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            raise CatalogError(
                f"The codes of row {row} are {codes[row].tolist()}, which is no title with one end token "
                f"({self.end + 1}) and nothing behind it. Spell the titles again."
            )


def title_catalog(
    items: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase", max_title_tokens: int = 32
) -> "Catalog":
    """The catalog of items spelt as their titles, ready to train on; the tokenizer stays as it is.

    An item's tokens are those of its title, white space made single, cut to `max_title_tokens`; then the end token. An
    item without a title is spelt by its id. Where an earlier row has the same tokens, a number is spelt behind the cut
    title, " (2)", " (3)" and so on, the first that is free: items that come later change none before them.

    Args:
        items: N mappings with at least "item_id", and "title" where there is one.
        tokenizer: with all the control tokens that the model will have.
        max_title_tokens: at least 1.

    Raises:
        CatalogError: if there is no item, ids repeat, or the tokenizer has no control token to end an item with.
    """
    from llmrec.catalog import Catalog
    from llmrec.vocabulary import PlainText

    if not len(items):
        raise CatalogError("There is no item to spell. Give at least one.")
    spelling = TitleSpelling.of(tokenizer, max_title_tokens)
    spelt = spell_titles(_titles(items), PlainText(tokenizer).encode, spelling)
    return Catalog(items, codes_of_tokens(spelt), spelling=spelling)


def spell_new_items(
    items: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase", catalog: "Catalog"
) -> Codes:
    """Codes (M, L') for items that a catalog in text mode does not have yet, for `Catalog.with_items`.

    No title that an item has, a retired one among them, is given again.

    Raises:
        CatalogError: if the catalog is one of semantic IDs.
        ArtefactError: if the tokenizer is not the catalog's.
    """
    from llmrec.vocabulary import PlainText

    if catalog.spelling is None:
        raise CatalogError("The catalog's items have semantic IDs. Assign codes with its item tokenizer.")
    catalog.spelling.require(tokenizer)
    taken = (tuple(row[row > 0] - 1) for row in catalog.codes)
    return codes_of_tokens(spell_titles(_titles(items), PlainText(tokenizer).encode, catalog.spelling, taken))


def spell_titles(
    titles: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    spelling: TitleSpelling,
    taken: Iterable[tuple[int, ...]] = (),
) -> list[list[int]]:
    """The tokens of each title, end included, all different and none of them in `taken`.

    >>> words = TitleSpelling(vocabulary_size=256, vocabulary="", end=0, max_title_tokens=2)
    >>> spelt = spell_titles(["ab", "abc", "a"], lambda text: list(text.encode()), words)
    >>> [bytes(tokens) for tokens in spelt]
    [b'ab\\x00', b'ab (2)\\x00', b'a\\x00']
    """
    known = set(taken)
    last: dict[tuple[int, ...], int] = {}  # the last number given to each cut title: numbers are tried once
    spelt = []
    for title in titles:
        cut = tuple(encode(title)[: spelling.max_title_tokens])
        if spelling.end in cut:
            raise CatalogError(
                f"The tokenizer spells the title {title[:80]!r} with the end token {spelling.end}. "
                "Use a tokenizer whose end of sequence is a control token."
            )
        tokens = (*cut, spelling.end)
        while tokens in known:
            last[cut] = last.get(cut, 1) + 1
            tokens = (*cut, *encode(f" ({last[cut]})"), spelling.end)
        known.add(tokens)
        spelt.append(list(tokens))
    return spelt


def end_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that ends an item: end of sequence, or another control token where a tokenizer has none."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise CatalogError(
        f"The tokenizer {type(tokenizer).__name__} has no control token that could end an item. Set its eos_token."
    )


def codes_of_tokens(spelt: Sequence[Sequence[int]]) -> Codes:
    """Tokens of N items as codes (N, longest): ids and one, 0 behind an item's end.

    >>> codes_of_tokens([[4, 0], [2, 5, 0]]).tolist()
    [[5, 1, 0], [3, 6, 1]]
    """
    lengths = np.array([len(tokens) for tokens in spelt], dtype=np.int32)
    flat = np.array([token for tokens in spelt for token in tokens], dtype=np.int32) + 1
    return unpacked(flat, lengths)


def packed(codes: Codes) -> tuple[Codes, Codes]:
    """Codes (N, L) without "nothing": the rest in the order of rows, and how many each row has (N,)."""
    return codes[codes > 0], (codes > 0).sum(axis=1, dtype=np.int32)


def unpacked(flat: Codes, lengths: Codes) -> Codes:
    """What `packed` was given, as narrow as its longest row; raises CatalogError if the two do not fit together."""
    if flat.ndim != 1 or lengths.ndim != 1 or (lengths < 0).any() or int(lengths.sum()) != len(flat):
        raise CatalogError(
            f"{len(flat)} codes do not fit rows of {int(lengths.sum())} codes in all. Restore the file, or build it "
            "again."
        )
    codes = np.zeros((len(lengths), int(lengths.max(initial=0))), dtype=np.int32)
    codes[np.arange(codes.shape[1]) < lengths[:, None]] = flat
    return codes


def stacked(parts: Sequence[npt.NDArray[np.integer]]) -> Codes:
    """Codes of several tables below one another, the narrower ones filled up with "nothing".

    >>> stacked([np.array([[3, 1]]), np.array([[4, 5, 1]])]).tolist()
    [[3, 1, 0], [4, 5, 1]]
    """
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part.astype(np.int32), ((0, 0), (0, width - part.shape[1]))) for part in parts])


def _titles(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each item is spelt by: its title in single spaces, else its id."""
    try:
        return [" ".join(str(item.get("title") or "").split()) or str(item["item_id"]) for item in items]
    except KeyError as error:
        raise CatalogError("An item has no item_id. Give every item one.") from error


def _vocabulary(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, str]:
    """How many ids there are, and a hash of all strings with their ids."""
    import hashlib
    import json

    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return pairs[-1][1] + 1, hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]
