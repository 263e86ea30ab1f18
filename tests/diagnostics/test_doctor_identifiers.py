"""Semantic IDs from every place where they are kept, and what is wrong with a file said with its item."""

import gzip
import json
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import FakeHub, RunPython
from factories import random_catalog
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from llmrec.artefact import write_manifest
from llmrec.diagnostics.identifiers import SemanticIDs
from llmrec.exceptions import ArtefactError, CatalogError, DataError
from llmrec.quantization import HashedCodes, ProductQuantizer, ResidualKMeans, ResidualVQ, ScalarQuantizer
from llmrec.quantization.rqvae import RQVAE

TOKENS = {"x": ["<a_2>", "<b_0>"], "y": ["<a_0>", "<b_1>"], "z": ["<a_2>", "<b_0>"]}


def write_build(folder: Path, **record: object) -> Path:
    folder.mkdir()
    codes = np.array([[0, 1, 0], [0, 1, 1], [1, 0, 0]], dtype=np.int32)
    save_file({"codes": codes}, folder / "codes.safetensors")
    items = [{"item_id": f"i{row}", "title": f"Title {row}"} for row in range(2)] + [{"item_id": "i2", "title": None}]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "semantic_ids.json").write_text(json.dumps({"codebook_sizes": [2, 2, 4], **record}))
    return folder


def write_artefact(folder: Path, training: object) -> Path:
    random_catalog().save(folder / "catalog")
    (folder / "llmrec.json").write_text(json.dumps({"split": "abc", "training": training}))
    write_manifest(folder)
    return folder


@pytest.mark.parametrize(
    ("collisions", "levels"),
    [
        ({"policy": "append"}, 2),
        ({"policy": "reassign"}, 3),
        ({"policy": "none"}, 3),
        ({"policy": "sinkhorn", "second_step": "append"}, 2),
        ({"policy": "sinkhorn", "second_step": "reassign"}, 3),
    ],
)
def test_a_build_tells_its_quantised_levels(tmp_path: Path, collisions: dict[str, str], levels: int) -> None:
    folder = write_build(tmp_path / "ids", collisions=collisions, quantizer="rkmeans", split="abc", versions={})
    ids = SemanticIDs.read(folder)
    assert ids.item_ids == ["i0", "i1", "i2"]
    assert ids.titles == ["Title 0", "Title 1", "i2"]
    assert ids.codes.tolist() == [[0, 1, 0], [0, 1, 1], [1, 0, 0]]
    assert (ids.codebook_sizes, ids.codebook_sizes_known, ids.num_levels, len(ids)) == ((2, 2, 4), True, 3, 3)
    assert (ids.kind, ids.source, ids.folder, ids.quantised_levels) == ("build", str(folder), folder, levels)
    assert ids.origin == {"collisions": collisions, "quantizer": "rkmeans", "split": "abc"}
    assert ids.quantizer() is None


def test_a_catalog_and_an_artefact(tmp_path: Path) -> None:
    catalog = random_catalog()
    catalog.save(tmp_path / "catalog")
    ids = SemanticIDs.read(tmp_path / "catalog")
    assert (ids.kind, ids.quantised_levels, ids.folder) == ("catalog", 3, None)
    np.testing.assert_array_equal(ids.codes, catalog.codes)
    described = {"quantizer": "rkmeans", "collisions": "append", "arguments": {"num_levels": 2}}
    ids = SemanticIDs.read(write_artefact(tmp_path / "artefact", {"semantic_ids": described}))
    assert (ids.kind, ids.quantised_levels, ids.titles[3]) == ("artefact", 2, "Title 3")
    assert ids.origin == described | {"split": "abc"}
    for name, asked, levels in (("sinkhorn", 2, 2), ("sinkhorn", 3, 3), ("reassign", 2, 3), (None, 2, 3)):
        training = {"semantic_ids": {"collisions": name, "arguments": {"num_levels": asked}}}
        folder = write_artefact(tmp_path / f"{name}{asked}", training)
        assert SemanticIDs.read(folder).quantised_levels == levels
    assert SemanticIDs.read(write_artefact(tmp_path / "bare", {})).quantised_levels == 3


def test_an_artefact_comes_from_the_hub(fake_hub: FakeHub, run_python: RunPython, tmp_path: Path) -> None:
    fake_hub.put("someone/recommender", write_artefact(tmp_path / "artefact", {}))
    program = """
from llmrec.diagnostics.identifiers import SemanticIDs
ids = SemanticIDs.read("someone/recommender")
print(ids.kind, ids.source, len(ids))
"""
    done = run_python(program, **fake_hub.variables(tmp_path / "home"))
    assert done.stdout == "artefact someone/recommender 40\n", done.stderr


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    artefact = write_artefact(tmp_path / "artefact", {})
    (artefact / "catalog" / "items.jsonl").write_text("")
    with pytest.raises(ArtefactError, match=r"items\.jsonl is truncated"):
        SemanticIDs.read(artefact)
    for name in ("codes.safetensors", "items.jsonl", "semantic_ids.json"):
        folder = write_build(tmp_path / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises((ArtefactError, CatalogError), match=r"\. [A-Z]"):
            SemanticIDs.read(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match=r"empty holds neither semantic_ids\.json nor"):
        SemanticIDs.read(tmp_path / "empty")
    with pytest.raises(ArtefactError, match="There is no folder"):
        SemanticIDs.read(tmp_path / "absent")
    with pytest.raises(DataError, match=r"There is no file .*absent\.json\.gz"):
        SemanticIDs.read(tmp_path / "absent.json.gz")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_mapping_with_collisions(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "tokens.json"
    content = json.dumps(TOKENS).encode()
    file.write_bytes(gzip.compress(content) if zipped else content)
    ids = SemanticIDs.read(file)
    assert (ids.item_ids, ids.titles) == (["x", "y", "z"], ["x", "y", "z"])
    assert ids.codes.tolist() == [[2, 0], [0, 1], [2, 0]]
    assert (ids.codebook_sizes, ids.codebook_sizes_known, ids.kind) == ((3, 2), False, "mapping")
    assert ids.with_titles({"y": "Why", "other": "?"}).titles == ["x", "Why", "z"]
    assert ids.rows_of(["z", "none", "x"]).tolist() == [2, -1, 0]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match="is no whole JSON file"):
        SemanticIDs.read(file)


@pytest.mark.parametrize(
    ("tokens", "codes", "size"),
    [
        (["<a_10>", "<a_2>", "<a_10>"], [10, 2, 10], 11),
        ([7, 0, 3], [7, 0, 3], 8),
        ([-2, 1, 0], [0, 3, 2], 4),
        (["red", "blue", "red"], [0, 1, 0], 2),
        (["<a_1>", "<b_1>", "<a_1>"], [0, 1, 0], 2),  # different tokens of one number
        (["<a_1>", "none", "<a_1>"], [0, 1, 0], 2),
        (["s1_5", "s1_4", "s1_3"], [5, 4, 3], 6),  # the last number in it
        ([32_004, 32_000, 32_001], [4, 0, 1], 5),  # ids of a vocabulary
        ([10**9, 5, 10**12], [1, 0, 2], 3),  # no codebook is as large
        (["9" * 400, "8", "9" * 400], [0, 1, 0], 2),
    ],
)
def test_how_tokens_are_numbered(tokens: list[str | int], codes: list[int], size: int) -> None:
    ids = SemanticIDs.from_mapping({f"i{row}": [token] for row, token in enumerate(tokens)})
    assert (ids.codes[:, 0].tolist(), ids.codebook_sizes) == (codes, (size,))


TOKEN = st.one_of(st.integers(-3, 40), st.integers(0, 9).map("<a_{}>".format), st.sampled_from(["", "a", "b 1", "é"]))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3).flatmap(lambda n: st.lists(st.lists(TOKEN, min_size=n, max_size=n), min_size=1, max_size=12)))
def test_items_share_codes_exactly_if_they_share_tokens(sequences: list[list[str | int]]) -> None:
    ids = SemanticIDs.from_mapping({f"i{row}": sequence for row, sequence in enumerate(sequences)})
    for level in range(len(sequences[0])):
        for one, first in zip(sequences, ids.codes, strict=True):
            for other, second in zip(sequences, ids.codes, strict=True):
                same = one[level] == other[level]
                assert (first[level] == second[level]) == same
                if all(isinstance(sequence[level], int) for sequence in sequences):
                    assert (first[level] < second[level]) == (one[level] < other[level])
    assert (ids.codes >= 0).all()
    assert (ids.codes < ids.codebook_sizes).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**TOKENS, "w": ["<a_1>"]}, r"Item 'w' of .* has 1 token\(s\), item 'x' has 2\."),
        ({**TOKENS, "w": "<a_1><b_1>"}, r"Item 'w' of .* in place of a list"),
        ({**TOKENS, "w": []}, r"Item 'w' of .* in place of a list"),
        ({**TOKENS, "w": [1.5, 2]}, r"Item 'w' of .* has the token 1\.5\."),
        ({**TOKENS, "w": [True, 2]}, r"Item 'w' of .* has the token True\."),
        ({}, r"holds no items\."),
        ([["x", 1]], r"holds a list in place of an object\."),
        ("{'x': [1]}", "is no whole JSON file"),
        ('{"x": [1], "y": [2], "x": [3]}', r"Item 'x' stands there twice\."),
        ("[" * 100_000, "is no whole JSON file"),
        (b"\x1f\x8b\x08\x00torn", "is no whole JSON file"),
        (b"\xff\xfe{}", "is no whole JSON file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    file = tmp_path / "tokens.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        SemanticIDs.read(file)
    assert str(caught.value).endswith(".")


def test_the_signal_that_a_build_records_is_kept_even_if_it_is_none(tmp_path: Path) -> None:
    for place, signal in enumerate(("own", "letter", None)):
        ids = SemanticIDs.read(write_build(tmp_path / f"ids{place}", collaborative=signal, split=None))
        assert ids.origin == {"collaborative": signal}
    assert SemanticIDs.read(write_build(tmp_path / "before")).origin == {}
    artefact = write_artefact(tmp_path / "artefact", {})
    (artefact / "item_tokenizer").mkdir()
    (artefact / "item_tokenizer" / "semantic_ids.json").write_text('{"collaborative": "own", "arguments": {}}')
    write_manifest(artefact)
    assert SemanticIDs.read(artefact).origin["collaborative"] == "own"


@pytest.mark.parametrize("token", ["1" * 200_000 + " x", "1" * 200_000 + " x1", "x " * 100_000, "1 " * 100_000])
def test_a_huge_token_takes_linear_time(token: str) -> None:
    begun = time.process_time()
    ids = SemanticIDs.from_mapping({"x": [token], "y": ["2"]})
    assert time.process_time() - begun < 1
    assert ids.codes[0] != ids.codes[1]


def test_half_characters(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text('{"a\\ud83d": ["<a_1>"], "b": ["<a_0>"]}')
    with pytest.raises(DataError, match=r"The item id 'a\\ud83d' holds half of a character .*\. [A-Z].*\.$"):
        SemanticIDs.read(tmp_path / "tokens.json")
    (tmp_path / "tokens.json").write_text('{"a\\ud83d\\ude00": ["<a_1>"], "b": ["<a_0>"]}')
    ids = SemanticIDs.read(tmp_path / "tokens.json")
    assert ids.item_ids == ["a\N{GRINNING FACE}", "b"]
    assert ids.with_titles({"b": "half \ud83d of it"}).titles == ["a\N{GRINNING FACE}", "half ? of it"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_sizes": (2,)}, "do not belong to codes"),
        ({"codebook_sizes": (2, 2)}, "Codes reach from"),
        ({"titles": ["x"]}, "do not belong to 1 titles"),
        ({"item_ids": ["x", "x", "y"]}, "2 of them different"),
        ({"quantised_levels": 3}, "3 of 2 levels cannot be"),
        ({"codes": np.zeros((0, 2)), "item_ids": [], "titles": []}, r"0 item\(s\)"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[str, object], message: str) -> None:
    fields = {
        "item_ids": ["x", "y", "z"],
        "codes": np.array([[0, 0], [1, 2], [0, 1]]),
        "codebook_sizes": (2, 3),
        "titles": ["X", "Y", "Z"],
    }
    assert SemanticIDs(**fields).quantised_levels == 2
    with pytest.raises(DataError, match=message):
        SemanticIDs(**{**fields, **change})


@pytest.mark.parametrize(
    "made",
    [
        ResidualKMeans(2, 4, 3),
        ResidualVQ(2, 4, niter=2),
        ProductQuantizer(2, 4, niter=3),
        ScalarQuantizer(2, (3,), layout="components"),
        HashedCodes(2, 4),
        RQVAE(2, 4, epochs=1),
    ],
    ids=lambda made: type(made).__name__,
)
def test_every_quantizer_of_a_build_is_loaded(tmp_path: Path, made: object) -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 6))
    folder = write_build(tmp_path / "ids")
    made.fit(vectors).save(folder / "codebooks")
    loaded = SemanticIDs.read(folder).quantizer()
    assert type(loaded) is type(made)
    codes = made.encode(vectors)
    np.testing.assert_allclose(loaded.decode(codes), made.decode(codes))
    (folder / "codebooks" / "quantizer.json").write_text('{"quantizer": "titles"}')
    with pytest.raises(ArtefactError, match="of the kind 'titles', which encodes no vectors"):
        SemanticIDs.read(folder).quantizer()
    (folder / "codebooks" / "quantizer.json").write_text("[]")
    with pytest.raises(ArtefactError, match="does not say which quantizer"):
        SemanticIDs.read(folder).quantizer()


# As the data's own description counts them: the share of items beyond unique IDs.
PUBLISHED = {
    "amazon-beauty/rkmeans_native": 0.130,
    "amazon-beauty/rqvae_native": 0.050,
    "amazon-beauty/letter_native": 0.007,
    "amazon-beauty/quasid_native": 0.0031,
    "amazon-beauty/letter_repo": 0.0011,
    "amazon-scientific/rkmeans_native": 0.201,
    "amazon-scientific/rqvae_native": 0.128,
    "amazon-scientific/quasid_native": 0.028,
    "amazon-scientific/letter_native": 0.006,
}


def test_published_tables_load(shared_data: Path) -> None:
    for name, share in PUBLISHED.items():
        data, _, table = name.partition("/")
        ids = SemanticIDs.read(shared_data / data / "published_semantic_ids" / f"{table}.json.gz")
        assert ids.num_levels == 4
        assert max(ids.codebook_sizes) == 256
        assert 1 - len(np.unique(ids.codes, axis=0)) / len(ids) == pytest.approx(share, abs=0.0006)
