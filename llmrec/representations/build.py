"""build_representation: from a description of JSON values, as a model's config holds it, to the module."""

from collections.abc import Mapping
from typing import Any

from llmrec.exceptions import BackboneError
from llmrec.representations.representation import ItemRepresentation

KINDS = ("ids", "text", "ids+text", "semantic_ids", "hashed")


def build_representation(config: Mapping[str, Any], num_items: int, hidden_size: int) -> ItemRepresentation:
    """A new representation of `num_items` items, of width `hidden_size`.

    Args:
        config: "kind" and the arguments of its class, where they differ from the defaults:
            "ids": `IdTable` (sparse, initializer_range);
            "text": `TextVectors` (width, adapter, adapter_size, tuned);
            "ids+text": `IdsAndText` (the same);
            "semantic_ids": `SemanticIdSums` (codebook_sizes, pieces, table_size);
            "hashed": `HashedIds` (table_size, num_hashes, seed).
        num_items: N.
        hidden_size: D.

    Returns:
        Untrained, and, but for "ids", without what it is made of: `set_items` gives that before training, a state
        dict after it.

    Raises:
        BackboneError: if the kind or an argument is unknown, missing, or makes no sense.

    >>> build_representation({"kind": "ids"}, num_items=5, hidden_size=4).table().shape
    torch.Size([5, 4])
    """
    from llmrec.representations.hashed import HashedIds
    from llmrec.representations.id_table import IdTable
    from llmrec.representations.ids_and_text import IdsAndText
    from llmrec.representations.semantic_ids import SemanticIdSums
    from llmrec.representations.text import TextVectors

    arguments = {name: value for name, value in config.items() if name != "kind"}
    if num_items < 1 or hidden_size < 1:
        raise BackboneError(f"{num_items} items of width {hidden_size} have no table. Give at least one of each.")
    try:
        match config.get("kind"):
            case "ids":
                return IdTable(num_items, hidden_size, **arguments)
            case "text":
                return TextVectors(num_items, hidden_size, **arguments)
            case "ids+text":
                return IdsAndText(num_items, hidden_size, **arguments)
            case "semantic_ids":
                return SemanticIdSums(num_items, hidden_size, **arguments)
            case "hashed":
                return HashedIds(num_items, hidden_size, **arguments)
    except TypeError as error:
        raise BackboneError(
            f"The representation {dict(config)} cannot be built ({error}). Give the arguments of its class."
        ) from error
    raise BackboneError(f"{config.get('kind')!r} is no kind of representation. Use one of {', '.join(KINDS)}.")
