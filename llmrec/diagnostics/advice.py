"""Advice: which flags of semantic_ids/build.py change what was found. No quantizer has them all."""

# The control, whose codes say nothing on purpose, and the titles' own n-grams: no vectors decide either.
CONTROL, TITLES = "hash", "titles"
# Finite scalar quantisation: codes are combinations of steps, their number is given by these and not learnt.
SCALAR = "fsq"
_BALANCED = "--quantizer rkmeans with --balanced, which uses codes evenly"


def has_centroids(quantizer: str | None) -> bool:
    """Whether each code stands for a point that was placed among the items, which takes several items per code.

    K-means and networks do so; what is not known (None) may.
    """
    return quantizer not in (CONTROL, TITLES, SCALAR)


def has_vectors(quantizer: str | None) -> bool:
    """Whether codes stand for vectors, and their use is the quantizer's doing, not that of chance or of words."""
    return quantizer not in (CONTROL, TITLES)


def smaller_codebook(quantizer: str | None, size: int | None = None) -> str:
    """How to get fewer codes per level, `size` if that is known to fit.

    >>> smaller_codebook("opq", 64), smaller_codebook("fsq", 64)
    ('--codebook-size 64', 'fewer steps with --fsq-levels')
    """
    if quantizer == SCALAR:
        return "fewer steps with --fsq-levels"
    return "a smaller --codebook-size" if size is None else f"--codebook-size {size}"


def larger_codebook(quantizer: str | None) -> str:
    """How to get more codes per level."""
    return "more steps with --fsq-levels" if quantizer == SCALAR else "a larger --codebook-size"


def against_dead_codes(quantizer: str | None, size: int) -> str:
    """What leaves fewer codes unused."""
    smaller = smaller_codebook(quantizer, size)
    if quantizer == SCALAR:
        return f"Try {smaller}, or fewer levels with --num-levels"
    if quantizer == "rkmeans":
        return f"Try {smaller}"
    first = "more --epochs, or " if quantizer == "rqvae" else ""
    return f"Try {first}--quantizer rkmeans, which leaves no code unused, or {smaller}"


def against_uneven_codes(quantizer: str | None) -> str:
    """What uses the codes of a level more evenly."""
    if quantizer == "rkmeans":
        return "Try --balanced or --normalise-residuals, which use codes evenly"
    if quantizer == SCALAR:
        return f"Try {smaller_codebook(quantizer)}, or fewer levels with --num-levels"
    first = "more --epochs, or " if quantizer == "rqvae" else ""
    return f"Try {first}{_BALANCED}"


def against_a_giant(quantizer: str | None) -> str:
    """What divides a first code that has too many items."""
    look = "Look for items without text or with one text for all"
    if quantizer in (CONTROL, TITLES):
        return look
    return f"{look}, and try {'--balanced' if quantizer == 'rkmeans' else _BALANCED}, or --collaborative-weight"


def against_shared_codes(quantizer: str | None) -> str:
    """What tells apart items that share an ID as built."""
    if quantizer == TITLES:
        return "Build them again with semantic_ids/build.py, which tells equal titles apart"
    return f"Build them with --collisions reassign or append, or with {larger_codebook(quantizer)}"


def against_alike_vectors(quantizer: str | None) -> str:
    """What tells apart items that share an ID as quantised."""
    more = f"Try {larger_codebook(quantizer)}"
    if quantizer in (CONTROL, TITLES):
        return f"{more}, or one level more with --num-levels"
    return f"{more}, one level more with --num-levels, or --interactions, whose co-occurrence tells like texts apart"


def against_hash_likeness(quantizer: str | None) -> str:
    """What to look at where codes follow nothing that is known of the items."""
    if quantizer == TITLES:
        return "Check that the titles belong to these items and say something, or embed them for another --quantizer"
    return "Check that the embeddings belong to these items and in this order, and that their texts say something"


def towards_the_sales(quantizer: str | None) -> str:
    """What makes codes follow what sells together."""
    first = "--quantizer rkmeans with " if quantizer == TITLES else ""
    return f"Try {first}--interactions with a --collaborative-weight of 0.5 or more"


def against_lost_beams(quantizer: str | None) -> str:
    """What makes first codes hold more of what users choose among."""
    smaller = smaller_codebook(quantizer)
    return smaller if quantizer in (CONTROL, TITLES) else f"{smaller}, another --collaborative-weight"


def against_equal_texts(quantizer: str | None, by_text: bool) -> str:
    """What tells apart items of equal texts, or of equal titles."""
    copies = "Remove copies from the table"
    if quantizer in (CONTROL, TITLES):
        return copies
    if by_text:
        return f"{copies}, add columns with --text-columns when embedding, or join co-occurrence with --interactions"
    return f"{copies}, or see that what differs is embedded (--text-columns), or join the sales by --interactions"
