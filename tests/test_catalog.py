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


def test_retired_items_survive_saving_and_change_the_version(tmp_path):
    catalog = extended(random_catalog(1))
    retired = catalog.with_retired([2, 7], True)
    assert retired.version != catalog.version
    assert retired.with_retired([2, 7], False).version == catalog.version
    assert retired.with_retired([7], False).version not in (retired.version, catalog.version)
    retired.save(tmp_path)
    again = Catalog.load(tmp_path)
    assert np.flatnonzero(again.retired).tolist() == [2, 7]
    assert again.version == retired.version
    assert (again.item_tokens == catalog.item_tokens).all()
    assert again.with_tokens(again.token_ids).retired.tolist() == retired.retired.tolist()


def test_candidates_are_the_live_items_that_are_not_excluded():
    rng = np.random.default_rng(0)
    catalog = random_catalog(1)
    for _ in range(20):
        retired = rng.permutation(40)[: rng.integers(0, 39)]
        marked = catalog.with_retired(retired, True)
        excluded = rng.integers(0, 40, rng.integers(0, 50))
        wanted = set(range(40)) - set(retired.tolist()) - set(excluded.tolist())
        assert marked.candidates(excluded) == len(wanted)
        assert sorted(marked.trie.item_of_leaf.tolist()) == sorted(set(range(40)) - set(retired.tolist()))


def test_a_catalog_needs_a_live_item_and_fitting_marks():
    catalog = random_catalog()
    with pytest.raises(CatalogError, match="All 40 items would be retired"):
        catalog.with_retired(range(40), True)
    with pytest.raises(CatalogError, match="retirement marks of shape"):
        Catalog(catalog.items, catalog.codes, catalog.codebook_sizes, retired=np.zeros(3, dtype=bool))


@pytest.mark.parametrize(
    "text",
    ['{"item_id": "a"}\n{"item_id"', '{"item_id": "a"}, {"item_id": "b"}\n', '["item_id"]\n', '{"title": "a"}\n'],
)
def test_a_torn_table_of_items_is_named(tmp_path, text):
    random_catalog().save(tmp_path)
    (tmp_path / "items.jsonl").write_text(text)
    with pytest.raises(CatalogError, match=r"items\.jsonl is no table of items"):
        Catalog.load(tmp_path)


def test_line_separators_inside_a_title_do_not_end_an_item(tmp_path):
    items = [{"item_id": "a", "title": "one\u2028two\u0085three\x0bfour"}, {"item_id": "b", "title": "\r\n"}]
    catalog = Catalog(items, np.array([[0], [1]]), [2])
    catalog.save(tmp_path)
    assert Catalog.load(tmp_path).items == items


def test_tokens_of_rows_are_one_behind_the_other():
    catalog = extended(random_catalog(2))
    rows = np.random.default_rng(0).integers(0, 40, 17)
    assert catalog.tokens_of_rows(rows) == [token for row in rows for token in catalog.item_tokens[row].tolist()]
    assert catalog.tokens_of(7) == catalog.item_tokens[7].tolist()
    assert catalog.tokens_of_rows([]) == []


def test_the_softmax_range_is_all_tokens_of_all_levels():
    catalog = extended(random_catalog(2))
    assert catalog.softmax_tokens("vocabulary") is None
    assert catalog.softmax_tokens("semantic_ids").tolist() == sorted(
        token for level in catalog.token_ids for token in level.tolist()
    )
    with pytest.raises(CatalogError, match="no softmax range 'items' for items spelt as semantic IDs"):
        catalog.softmax_tokens("items")
    with pytest.raises(CatalogError, match="no token ids yet"):
        random_catalog().softmax_tokens("semantic_ids")


def test_a_catalog_saved_before_there_were_titles_is_read_as_it_was(tmp_path):
    catalog = extended(random_catalog(1))
    catalog.save(tmp_path)
    assert json.loads((tmp_path / "catalog.json").read_text()) == {
        "version": catalog.content_hash,
        "items": 40,
        "codebook_sizes": [5, 4, 6],
    }
    assert not Catalog.load(tmp_path).is_text
    (tmp_path / "catalog.json").write_text(json.dumps({"version": catalog.content_hash}))
    with pytest.raises(CatalogError, match="it has no codebook_sizes"):
        Catalog.load(tmp_path)
