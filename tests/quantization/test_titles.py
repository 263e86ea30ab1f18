"""Title codes against a loop over titles, and unique codes against counting."""

import json
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.catalog import Catalog
from llmrec.exceptions import ArtefactError, CatalogError, TokenizerError
from llmrec.quantization.titles import TitleCodes, unique


def is_word(character: str) -> bool:
    return character == "_" or character.isalnum()


def ngrams(title: str | None, unit: str, length: int) -> list[str]:
    """The n-grams of one title in its order, each once."""
    text = unicodedata.normalize("NFKC", title or "").lower()
    words = "".join(character if is_word(character) else " " for character in text).split()
    parts = words if unit == "word" else list(" ".join(words))
    joint = " " if unit == "word" else ""
    if parts and len(parts) < length:
        return [joint.join(parts)]
    runs = [joint.join(parts[begin : begin + length]) for begin in range(len(parts) - length + 1)]
    return list(dict.fromkeys(runs))


def brute_force(
    titles: list[str | None], levels: int, size: int, unit: str, length: int, keep: str
) -> list[list[int]]:
    counts = Counter(ngram for title in titles for ngram in ngrams(title, unit, length))
    ranked = sorted(counts, key=lambda ngram: (-counts[ngram], ngram.encode()))[: min(size, len(titles)) - 1]
    ids = {ngram: place + 1 for place, ngram in enumerate(ranked)}
    codes = []
    for title in titles:
        known = [(place, ngram) for place, ngram in enumerate(ngrams(title, unit, length)) if ngram in ids]
        if keep == "rarest":
            known = sorted(sorted(known, key=lambda entry: counts[entry[1]])[:levels])
        code = [ids[ngram] for _, ngram in known[:levels]]
        codes.append(code + [0] * (levels - len(code)))
    return codes


# Spaces, punctuation, repeated words, letters that NFKC or lower case change, an emoji.
TEXT = st.text(alphabet="abAB1_ -|.ﬁÄ😀", max_size=12)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_codes_are_those_of_a_loop_over_titles(data: st.DataObject) -> None:
    titles = data.draw(st.lists(st.none() | TEXT, min_size=1, max_size=12))
    levels, size, length = (data.draw(st.integers(1, top)) for top in (4, 12, 3))
    unit, keep = data.draw(st.sampled_from(["word", "character"])), data.draw(st.sampled_from(["rarest", "first"]))
    fitted = TitleCodes(levels, size, unit, length, keep).fit(titles)
    codes = fitted.encode(titles)
    assert (codes.dtype, codes.shape) == (np.dtype(np.int32), (len(titles), levels))
    assert codes.tolist() == brute_force(titles, levels, size, unit, length, keep)
    assert (codes < np.array(fitted.codebook_sizes)).all()
    assert max(fitted.codebook_sizes) <= min(size, len(titles))


def test_by_hand() -> None:
    titles = ["Red Shampoo, red bottle", "Blue shampoo", "blue BOTTLE", "Soap", "shampoo"]
    fitted = TitleCodes(2, 5).fit(titles)
    # By titles: shampoo 3, blue 2, bottle 2, red 1; soap 1 is one too many.
    assert fitted.vocabulary["ngram"].to_list() == ["shampoo", "blue", "bottle", "red"]
    assert fitted.encode(titles).tolist() == [[4, 3], [2, 1], [2, 3], [0, 0], [1, 0]]
    assert fitted.decode(fitted.encode(titles)) == ["red | bottle", "blue | shampoo", "blue | bottle", "", "shampoo"]
    assert TitleCodes(2, 5, keep="first").fit(titles).encode(titles)[0].tolist() == [4, 1]
    pairs = TitleCodes(2, 5, ngram=2).fit(titles)
    assert pairs.decode(pairs.encode(titles))[1:3] == ["blue shampoo", "blue bottle"]


def test_new_titles_take_the_known_vocabulary(caplog: pytest.LogCaptureFixture) -> None:
    fitted = TitleCodes(3, 100).fit([f"word{number} common" for number in range(100)])
    caplog.clear()
    codes = fitted.encode(["common unheard word7", "unheard", None, ""])
    assert fitted.decode(codes) == ["common | word7", "", "", ""]
    assert "3 title(s) have no n-gram of the vocabulary, such as row 1" in caplog.text


def test_unique_by_counting() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        codes = generator.integers(0, 3, size=(40, 2))
        seen: Counter[tuple[int, ...]] = Counter()
        expected = []
        for row in map(tuple, codes.tolist()):
            expected.append([*row, seen[row]])
            seen[row] += 1
        assert unique(codes).tolist() == expected
        # Items that come later leave the codes of those before as they are.
        np.testing.assert_array_equal(unique(codes)[:25], unique(codes[:25]))


def test_a_catalog_takes_them() -> None:
    titles = ["Red soap", "red soap!", "Blue soap", "😀", "", "a|b"]
    fitted = TitleCodes(2, 4096).fit(titles)
    codes = unique(fitted.encode(titles))
    items = [{"item_id": str(row), "title": title} for row, title in enumerate(titles)]
    catalog = Catalog(items, codes, (*fitted.codebook_sizes, int(codes[:, -1].max()) + 1))
    assert catalog.trie.children([]) == sorted(set(codes[:, 0].tolist()))
    with pytest.raises(CatalogError):
        _ = Catalog(items, codes[:, :-1], fitted.codebook_sizes).trie


@pytest.mark.parametrize("items", [1, 3])
def test_small_catalogs_have_as_many_codes_as_items(items: int, caplog: pytest.LogCaptureFixture) -> None:
    titles = ["a b c d e", "f g h i j", "k l m n o"][:items]
    fitted = TitleCodes(4, 4096).fit(titles)
    assert fitted.codebook_sizes == (items,) * 4
    assert f"{items} items: codebooks have at most {items} codes, not 4096" in caplog.text
    assert len(np.unique(unique(fitted.encode(titles)), axis=0)) == items


def test_saved_and_loaded(tmp_path: Path) -> None:
    titles = ["Red soap", "rote Seife <b>", "赤い 石鹸 😀", "red"] * 3
    fitted = TitleCodes(3, 9, "character", 2, "first").fit(titles)
    fitted.save(tmp_path)
    loaded = TitleCodes.from_pretrained(tmp_path)
    names = ("num_levels", "codebook_size", "unit", "ngram", "keep", "codebook_sizes")
    assert [getattr(loaded, name) for name in names] == [getattr(fitted, name) for name in names]
    np.testing.assert_array_equal(loaded.encode(titles), fitted.encode(titles))
    assert loaded.decode(loaded.encode(titles)) == fitted.decode(fitted.encode(titles))
    text = (tmp_path / "quantizer.json").read_text(encoding="utf-8")
    document = json.loads(text)
    changes = ({"quantizer": "scalar"}, {"vocabulary": [1]}, {"titles": []}, {"unit": "x"}, {"ngram": 0})
    changes += ({"vocabulary": ["a"] * len(document["vocabulary"])},)
    for content in [json.dumps({**document, **change}) for change in changes] + [text[: len(text) // 2], ""]:
        (tmp_path / "quantizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(ArtefactError, match="holds no title n-grams"):
            TitleCodes.from_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match="holds no title n-grams"):
        TitleCodes.from_pretrained(tmp_path / "nowhere")


def test_misuse_is_refused() -> None:
    for name in ("num_levels", "codebook_size", "ngram"):
        with pytest.raises(TokenizerError, match=f"{name} is 0"):
            TitleCodes(**{name: 0})
    with pytest.raises(TokenizerError, match="no unit 'byte'"):
        TitleCodes(unit="byte")
    with pytest.raises(TokenizerError, match="no keep 'last'"):
        TitleCodes(keep="last")
    for use in (lambda t: t.encode(["a"]), lambda t: t.decode(np.zeros((1, 4), int)), lambda t: t.codebook_sizes):
        with pytest.raises(TokenizerError, match="no vocabulary yet"):
            use(TitleCodes())
    with pytest.raises(TokenizerError, match="no titles"):
        TitleCodes().fit([])
    fitted = TitleCodes(2, 4).fit(["a", "b", "c", "d"])
    assert fitted.encode([]).shape == (0, 2)
    with pytest.raises(TokenizerError, match="outside the codebooks"):
        fitted.decode(np.array([[0, 4]]))
