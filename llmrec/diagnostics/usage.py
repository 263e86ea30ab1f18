"""Usage: how evenly the codes of each level are used."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import TokenizerError
from llmrec.quantization.codebooks import check_codes


def level_usage(codes: npt.NDArray[np.integer], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Of each level, how many codes are used and how evenly.

    Args:
        codes: (N, L).
        sizes: K_l of every level.

    Returns:
        Per level: "level", from 1; "codebook_size", K_l; "used", codes that some item has; "used_share", used / K_l;
        "dead", the others; "entropy_bits", the entropy of the items' codes; "perplexity", 2 to its power: as many
        codes, used evenly, would be as uncertain (1 for a single code, K_l if all are equally common);
        "largest_share", the share of items on the commonest code.

    Raises:
        TokenizerError: if there are no items or levels, or the codes are not below the sizes.

    >>> (level,) = level_usage(np.array([[0], [0], [1], [3]]), [4])
    >>> level["used"], level["dead"], level["entropy_bits"], level["largest_share"]
    (3, 1, 1.5, 0.5)
    """
    rows: list[dict[str, Any]] = []
    for level, counts in enumerate(_counts(codes, sizes), start=1):
        items, used = counts.sum(), counts[counts > 0]
        entropy = float(used @ np.log2(items / used) / items)
        rows.append(
            {
                "level": level,
                "codebook_size": len(counts),
                "used": len(used),
                "used_share": len(used) / len(counts),
                "dead": len(counts) - len(used),
                "perplexity": 2**entropy,
                "entropy_bits": entropy,
                "largest_share": float(used.max() / items),
            }
        )
    return rows


def code_counts(codes: npt.NDArray[np.integer], sizes: Sequence[int]) -> list[list[int]]:
    """Per level, how many items have each of its K_l codes; raises TokenizerError as `level_usage` does.

    >>> code_counts(np.array([[0, 1], [2, 1]]), [3, 2])
    [[1, 0, 1], [0, 2]]
    """
    return [counts.tolist() for counts in _counts(codes, sizes)]


def _counts(codes: npt.NDArray[np.integer], sizes: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    checked = check_codes(codes, sizes)
    if 0 in checked.shape:
        raise TokenizerError(f"Codes of shape {checked.shape} use nothing. Give (N, L) with N, L >= 1.")
    return [np.bincount(level, minlength=size) for level, size in zip(checked.T, sizes, strict=True)]
