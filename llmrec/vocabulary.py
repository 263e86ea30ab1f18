"""A tokenizer's vocabulary with a catalog in it: trained on item texts, or extended by semantic ID tokens."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from llmrec.catalog import Catalog
from llmrec.exceptions import CatalogError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> "PreTrainedTokenizerBase":
    """A byte-level BPE tokenizer for a model trained from scratch: every string has tokens, none is unknown.

    Args:
        texts: what to learn merges from.
        vocab_size: of the text part, the 256 bytes and three control tokens included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def add_catalog_tokens(tokenizer: "PreTrainedTokenizerBase", catalog: Catalog) -> Catalog:
    """Extends `tokenizer` in place by the catalog's tokens and returns the catalog with their ids.

    Raises:
        CatalogError: if the tokenizer maps two codes to one id, or one of them to "unknown".
    """
    from transformers import AddedToken

    levels = catalog.token_strings()
    tokenizer.add_tokens([AddedToken(string, normalized=False, special=False) for level in levels for string in level])
    token_ids = [np.array(tokenizer.convert_tokens_to_ids(level), dtype=np.int64) for level in levels]
    flat = np.concatenate(token_ids)
    if len(np.unique(flat)) != len(flat) or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in flat):
        raise CatalogError(
            f"The tokenizer {type(tokenizer).__name__} does not give {len(flat)} catalog tokens ids of their own. "
            "Use a tokenizer that accepts added tokens."
        )
    return catalog.with_tokens(token_ids)


def start_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that opens every prompt: beginning of sequence, or end of sequence where a tokenizer has no other."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise CatalogError(
        f"The tokenizer {type(tokenizer).__name__} has neither a BOS, an EOS nor a padding token. Set its bos_token."
    )


class PlainText:
    """Encodes untrusted text so that none of it becomes a control token or a semantic ID.

    Tokenizers turn the string of an added token into that token wherever it stands, also inside an item's title. Here
    such strings are broken up first, and the ids are checked afterwards. Added tokens of white space, or of a single
    character, are text and stay.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
        control = {string: id for string, id in added.items() if len(string.strip()) > 1}
        self._control_ids = frozenset(control.values())
        longest_first = sorted(control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without control tokens; raises CatalogError if one survives all the same."""
        # Breaking one token's string can make another's, one longer: repeated, it ends at the longest at the latest.
        while self._pattern is not None and self._pattern.search(text):
            text = self._pattern.sub(_broken, text)
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if not self._control_ids.isdisjoint(ids):
            raise CatalogError(f"The text {text[:80]!r} turns into control tokens. Remove them from the item's text.")
        return [int(id) for id in ids]


def _broken(match: re.Match[str]) -> str:
    """The token's string with a space behind its first visible character: what comes out never holds it again."""
    string = match.group()
    place = len(string) - len(string.lstrip()) + 1
    return f"{string[:place]} {string[place:]}"
