"""Which tokens of two models mean the same: those of one code on one level of the catalog that both speak."""

import numpy as np
import numpy.typing as npt

from llmrec.catalog import Catalog
from llmrec.exceptions import CatalogError

Numbers = npt.NDArray[np.int64]


def shared_tokens(teacher: Catalog, student: Catalog) -> tuple[Numbers, Numbers]:
    """The token ids (C,) of all codes in the teacher's vocabulary, and those (C,) of the same codes in the student's.

    In the order of levels and codes: what stands at one place of both means the same, whatever the numbers.

    Raises:
        CatalogError: if the two catalogs differ in items or codes, an item is spelt by its title, or there are no
            token ids.
    """
    for catalog in (teacher, student):
        if catalog.is_text:
            raise CatalogError(
                "The catalog spells items by their titles, so there is no range of semantic-ID tokens. Distil over "
                "the whole vocabulary (--softmax_range vocabulary), or from a model of semantic IDs."
            )
    same = (
        teacher.ids == student.ids
        and tuple(teacher.codebook_sizes) == tuple(student.codebook_sizes)
        and np.array_equal(teacher.codes, student.codes)
    )
    if not same:
        raise CatalogError(
            f"The teacher's catalog has {len(teacher)} items and the student's {len(student)}, or their codes differ, "
            "so their tokens do not mean the same. Build the student on the teacher's own catalog."
        )
    found = [
        np.concatenate([np.asarray(level, dtype=np.int64) for level in catalog.require_tokens()])
        for catalog in (teacher, student)
    ]
    return found[0], found[1]


def translation(teacher: Numbers, student: Numbers, size: int) -> Numbers:
    """(size,) by the student's token id the teacher's of the same code; -1 for what is no code's.

    Args:
        teacher, student: of `shared_tokens`.
        size: of the student's vocabulary.

    >>> translation(np.array([9, 7]), np.array([1, 3]), 5).tolist()
    [-1, 9, -1, 7, -1]
    """
    found = np.full(size, -1, dtype=np.int64)
    found[student] = teacher
    return found
