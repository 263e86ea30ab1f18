"""Codes that two vocabularies spell by other numbers."""

import numpy as np
import pytest
from factories import random_catalog

from llmrec.distillation.catalog_tokens import shared_tokens, translation
from llmrec.exceptions import CatalogError
from llmrec.vocabulary import add_catalog_tokens, train_tokenizer


def spelt(text_words, catalog=None):
    tokenizer = train_tokenizer(["words of a title"], text_words)
    return tokenizer, add_catalog_tokens(tokenizer, catalog or random_catalog())


def test_tokens_of_one_code_stand_at_one_place():
    one, teacher = spelt(300)
    other, student = spelt(260)
    its, mine = shared_tokens(teacher, student)
    assert len(its) == len(mine) == 5 + 4 + 6
    assert one.convert_ids_to_tokens(its.tolist()) == other.convert_ids_to_tokens(mine.tolist())
    assert not np.array_equal(its, mine)
    table = translation(its, mine, len(other))
    for row in (0, 17):
        assert table[student.tokens_of(row)].tolist() == teacher.tokens_of(row)
    assert (table >= 0).sum() == len(mine)


def test_other_items_or_codes_are_refused():
    _, teacher = spelt(300)
    for other in (random_catalog(seed=1), random_catalog(num_items=39)):
        with pytest.raises(CatalogError, match="do not mean the same"):
            shared_tokens(teacher, spelt(260, other)[1])
    with pytest.raises(CatalogError, match="no token ids yet"):
        shared_tokens(teacher, random_catalog())
