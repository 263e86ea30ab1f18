"""Tiny tokenizers of every family that a backbone may have, with tokens that item texts try to spell."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmrec.vocabulary import train_tokenizer

TEXTS = [
    "a customer bought a title and a brand",
    "system user assistant </s> <0x0A> [INST]",
    "The quick brown fox 123",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FAMILIES = (
    "gpt2",
    "llama3",
    "qwen",
    "llama2",
    "gemma",
    "mistral",
    "t5",
    "xlnet",
    "unigram_bytes",
    "no_unknown",
    "bert",
    "flags",
)


@cache
def hostile_tokenizer(family: str) -> PreTrainedTokenizerBase:
    """A tokenizer as this family has it; the same object every time, which no test may change."""
    made = {
        "gpt2": lambda: _byte_level(eos_token="<|endoftext|>", unk_token="<|endoftext|>"),
        "llama3": lambda: _byte_level(
            bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", extra=["<|start_header_id|>"], ignore_merges=True
        ),
        "qwen": lambda: _byte_level(
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            extra=["<|im_start|>"],
            plain=["<think>"],
            normalizer=normalizers.NFC(),
        ),
        "llama2": lambda: _pieces_bpe(
            ["<unk>", "<s>", "</s>"],
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
            bos_token="<s>",
            eos_token="</s>",
        ),
        "gemma": lambda: _pieces_bpe(
            ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "  "],
            normalizers.Replace(" ", "▁"),
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<pad>",
        ),
        "mistral": lambda: _pieces_bpe(
            ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], None, bos_token="<s>", eos_token="</s>"
        ),
        "t5": lambda: _unigram(
            ["<pad>", "</s>", "<unk>", "<extra_id_0>"], normalizers.NFKC(), eos_token="</s>", pad_token="<pad>"
        ),
        "xlnet": lambda: _unigram(
            ["<unk>", "<s>", "</s>", "<sep>"],
            normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("\u200b", "")]),
            bos_token="<s>",
            eos_token="</s>",
        ),
        "unigram_bytes": lambda: _unigram(
            ["<pad>", "</s>", "<unk>", *BYTES], normalizers.NFKC(), True, eos_token="</s>", pad_token="<pad>"
        ),
        "no_unknown": lambda: _unigram(
            ["<pad>", "</s>"], normalizers.Replace("x", "</s>"), unknown=None, eos_token="</s>", pad_token="<pad>"
        ),
        "bert": _word_pieces,
        "flags": _flags,
    }
    return made[family]()


def _byte_level(
    extra: list[str] | None = None,
    plain: list[str] | None = None,
    normalizer: normalizers.Normalizer | None = None,
    ignore_merges: bool = False,
    **roles: str,
) -> PreTrainedTokenizerBase:
    backend = train_tokenizer(TEXTS, 320).backend_tokenizer
    backend = Tokenizer.from_str(
        backend.to_str().replace('"ignore_merges":false', f'"ignore_merges":{str(ignore_merges).lower()}')
    )
    backend.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    tokenizer.add_tokens([AddedToken(string, special=True, normalized=False) for string in extra or []])
    tokenizer.add_tokens(list(plain or []))
    return tokenizer


def _pieces_bpe(
    specials: list[str], normalizer: normalizers.Normalizer | None, **roles: str
) -> PreTrainedTokenizerBase:
    """BPE over characters as SentencePiece trains it, unknown characters spelt by their bytes."""
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    learnt = Tokenizer(models.BPE(unk_token="<unk>"))
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt.train_from_iterator(TEXTS, trainer)
    tokens = [*specials, *BYTES, *(token for token in sorted(learnt.get_vocab()) if token not in specials)]
    characters = [chr(code) for code in range(33, 127)]
    vocab = {token: id for id, token in enumerate(dict.fromkeys([*tokens, *characters, "▁"]))}
    merges = [tuple(pair) for pair in _merges(learnt)]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is None:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:
        backend.normalizer = normalizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in specials if token.strip()]
    )
    backend.add_tokens([token for token in specials if not token.strip()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **roles)


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    import json

    return json.loads(tokenizer.to_str())["model"]["merges"]


def _unigram(
    specials: list[str],
    normalizer: normalizers.Normalizer,
    byte_fallback: bool = False,
    unknown: str | None = "<unk>",
    **roles: str,
) -> PreTrainedTokenizerBase:
    """A lattice over pieces in which the control tokens are pieces too, and the cheapest."""
    words = ["▁a", "▁customer", "er", "ti", "tle"]
    characters = ["▁", *(chr(code) for code in range(33, 127))]
    vocab = [(token, 0.0) for token in specials] + [(piece, -2.0 - len(piece)) for piece in [*words, *characters]]
    backend = Tokenizer(
        models.Unigram(vocab, None if unknown is None else specials.index(unknown), byte_fallback=byte_fallback)
    )
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    if unknown is not None:
        roles["unk_token"] = unknown
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=[s for s in specials if s.startswith("<extra")], **roles
    )


def _word_pieces() -> PreTrainedTokenizerBase:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    vocab = {token: id for id, token in enumerate([*specials, *characters, *(f"##{c}" for c in characters)])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _flags() -> PreTrainedTokenizerBase:
    """Added tokens of every flag, matched after a normaliser that lowers, decomposes and drops characters."""
    tokenizer = _byte_level(
        eos_token="<|eos|>",
        normalizer=normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("\u200b", "")]
        ),
    )
    tokenizer.add_tokens(
        [
            AddedToken("<left>", lstrip=True, normalized=True),
            AddedToken("<right>", rstrip=True, normalized=True),
            AddedToken("<word>", single_word=True, normalized=True),
            AddedToken("<both>", lstrip=True, rstrip=True, special=True, normalized=True),
            AddedToken("...", normalized=True, special=True),  # which one character normalises to
        ]
    )
    return tokenizer
