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
_ROUNDS = 4  # of breaking up what became a control token, before text is encoded in pieces


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
        CatalogError: if the tokenizer maps two codes to one id, or one of them to "unknown", or the catalog is one in
            text mode (`title_spelling.title_catalog`), which needs no tokens.
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
    """Encodes untrusted text so that none of it becomes a control token or a semantic ID, whatever the tokenizer.

    Tokenizers turn the string of an added token into that token wherever it stands, also inside an item's title. Here
    such strings are broken up by a space first. Some tokens appear only inside the tokenizer: its normaliser makes
    `<` of a full-width one or drops a zero-width space, its model has `</s>` among its pieces. So the ids are looked
    at afterwards, and the text is broken up again where they hold a control token; if that does not help, the text is
    encoded in pieces, down to characters, of which one that is a control token by itself is left out. Text without
    such strings gets the very ids that the tokenizer gives it.

    Added tokens of white space, or of a single character, are text and stay. So do "unknown" and byte tokens
    (`<0x0A>`) where they stand for a character, but not where the text spells their names.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
        control = {string: id for string, id in added.items() if len(string.strip()) > 1}
        unknown = tokenizer.unk_token_id
        roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        # Tokens that stand for characters too, by id: only their names are no text.
        self._named = {id: string for string, id in control.items() if id == unknown and id not in roles}
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        for string, id in zip(bytes_, tokenizer.convert_tokens_to_ids(bytes_), strict=True):
            if id is not None and id != unknown:
                self._named[id] = string
        self._control_ids = frozenset(control.values()) - self._named.keys()
        longest_first = sorted({*control, *self._named.values()}, key=lambda string: (-len(string), string))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without control tokens; any string has some, and lone surrogates count as U+FFFD."""
        if not text.isascii():  # tokenizers take no half of a surrogate pair
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self._pattern is not None:
            text = self._pattern.sub(_broken, text)
        for _ in range(_ROUNDS):
            ids = self._encoded(text)
            if ids is not None and self._is_plain(ids, text):
                return ids
            apart = self._broken_where_control(text)
            if apart == text:
                break
            text = apart
        return self._in_pieces(text)

    def _encoded(self, text: str) -> list[int] | None:
        """The tokenizer's ids; None where its model has no token for a character, and none for "unknown" either."""
        try:
            return [int(id) for id in self._tokenizer.encode(text, add_special_tokens=False)]
        except Exception as error:
            if type(error) is not Exception:  # the tokenizers library raises no narrower one for this
                raise
            return None

    def _is_plain(self, ids: list[int], text: str) -> bool:
        """Whether no id is a control token's, nor one that the text calls by its name."""
        if not self._control_ids.isdisjoint(ids):
            return False
        named = self._named.keys() & set(ids)
        return not named or not self._names(text, named)

    def _names(self, text: str, ids: Iterable[int]) -> bool:
        normalised = self._normalised(text)
        return any(self._named[id] in normalised for id in ids)

    def _normalised(self, text: str) -> str:
        """`text` as the tokenizer's model meets it, before it is cut into words."""
        normaliser = self._tokenizer.backend_tokenizer.normalizer if self._tokenizer.is_fast else None
        return text if normaliser is None else str(normaliser.normalize_str(text))

    def _broken_where_control(self, text: str) -> str:
        """`text` with a space inside every stretch that became a control token; the same if the place is not known."""
        if not self._tokenizer.is_fast:
            return text
        try:
            found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except Exception as error:
            if type(error) is not Exception:
                raise
            return text
        spans = [
            (begin, end)
            for id, (begin, end) in zip(found["input_ids"], found["offset_mapping"], strict=True)
            if id in self._control_ids or (id in self._named and self._names(text[begin:end], [id]))
        ]
        for begin, end in reversed(spans):
            text = text[:begin] + _apart(text[begin:end]) + text[end:]
        return text

    def _in_pieces(self, text: str) -> list[int]:
        """The ids of halves, or halves of halves, each encoded for itself, of which none has a control token."""
        ids = self._encoded(text)
        if ids is not None and self._is_plain(ids, text):
            return ids
        if len(text) > 1:
            return self._in_pieces(text[: len(text) // 2]) + self._in_pieces(text[len(text) // 2 :])
        spelt = self._normalised(text)
        if len(spelt) > 1:  # one character that stands for several
            return [id for character in spelt if character != text for id in self._in_pieces(character)]
        return []


def _broken(match: re.Match[str]) -> str:
    return _apart(match.group())


def _apart(string: str) -> str:
    """A token's string with a space behind its first visible character: what comes out never holds it again."""
    place = len(string) - len(string.lstrip()) + 1
    return f"{string[:place]} {string[place:]}"
