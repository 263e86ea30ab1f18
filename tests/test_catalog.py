import json

import numpy as np
import pytest
from factories import random_catalog

from llmrec.catalog import Catalog
from llmrec.exceptions import CatalogError, UnknownItemError
from llmrec.vocabulary import add_catalog_tokens, train_tokenizer


def extended(catalog):
    return add_catalog_tokens(train_tokenizer(["some text"], 300), catalog)


def test_save_and_load_keep_everything(tmp_path):
    catalog = extended(random_catalog(1))
    catalog.save(tmp_path / "catalog")
    again = Catalog.load(tmp_path / "catalog")
    assert again.items == catalog.items
    assert (again.codes == catalog.codes).all()
    assert again.codebook_sizes == catalog.codebook_sizes
    assert again.version == catalog.version
    assert (again.item_tokens == catalog.item_tokens).all()


def test_eleven_levels_keep_their_order(tmp_path):
    # Sorted as strings, "token_ids.10" would come before "token_ids.2".
    sizes = (2,) * 11
    catalog = extended(Catalog([{"item_id": "a", "title": "A"}], np.ones((1, 11)), sizes))
    catalog.save(tmp_path)
    assert (Catalog.load(tmp_path).item_tokens == catalog.item_tokens).all()


def test_version_depends_on_ids_and_codes_alone():
    catalog = random_catalog(1)
    renamed = [dict(item, title="other") for item in catalog.items]
    assert Catalog(renamed, catalog.codes, catalog.codebook_sizes).version == catalog.version
    swapped = [dict(item, item_id=f"x{row}") for row, item in enumerate(catalog.items)]
    assert Catalog(swapped, catalog.codes, catalog.codebook_sizes).version != catalog.version
    assert Catalog(catalog.items, catalog.codes[::-1], catalog.codebook_sizes).version != catalog.version


def test_rows_of_ids():
    catalog = random_catalog()
    assert catalog.rows(["item-3", "item-1", "item-3"]) == [3, 1, 3]
    assert catalog.rows(["item-3", "gone"], ignore_unknown=True) == [3]
    with pytest.raises(UnknownItemError, match=r"2 item\(s\).*'gone', 'lost'"):
        catalog.rows(["gone", "item-1", "lost"])


def test_item_tokens_are_the_tokenizers_ids():
    catalog = random_catalog(4)
    tokenizer = train_tokenizer(["some text"], 300)
    with_tokens = add_catalog_tokens(tokenizer, catalog)
    for row in range(len(catalog)):
        strings = [f"<s{level}_{code}>" for level, code in enumerate(catalog.codes[row])]
        assert tokenizer.convert_tokens_to_ids(strings) == with_tokens.item_tokens[row].tolist()
        assert tokenizer.encode("".join(strings), add_special_tokens=False) == with_tokens.item_tokens[row].tolist()


def test_no_tokens_yet():
    with pytest.raises(CatalogError, match="no token ids yet"):
        _ = random_catalog().item_tokens


@pytest.mark.parametrize(
    ("items", "codes", "sizes", "message"),
    [
        ([{"item_id": "a"}], [[1, 2]], (3,), "need codes of that shape"),
        ([{"item_id": "a"}], [[1, 3]], (3, 3), "codebooks have"),
        ([{"item_id": "a"}, {"item_id": "a"}], [[1, 2], [0, 0]], (3, 3), "repeat"),
    ],
)
def test_parts_that_do_not_fit(items, codes, sizes, message):
    with pytest.raises(CatalogError, match=message):
        Catalog(items, np.array(codes), sizes)


def test_files_of_two_catalogs_are_noticed(tmp_path):
    random_catalog(1).save(tmp_path / "one")
    random_catalog(2).save(tmp_path / "two")
    (tmp_path / "one" / "codes.safetensors").write_bytes((tmp_path / "two" / "codes.safetensors").read_bytes())
    with pytest.raises(CatalogError, match="different catalogs"):
        Catalog.load(tmp_path / "one")
    (tmp_path / "one" / "items.jsonl").unlink()
    with pytest.raises(CatalogError, match=r"lacks items\.jsonl"):
        Catalog.load(tmp_path / "one")


def test_from_build_says_what_is_missing(tmp_path):
    with pytest.raises(CatalogError, match=r"semantic_ids\.json"):
        Catalog.from_build(tmp_path)


def test_items_file_is_plain_json_lines(tmp_path):
    random_catalog().save(tmp_path)
    lines = (tmp_path / "items.jsonl").read_text().splitlines()
    assert json.loads(lines[5])["item_id"] == "item-5"
