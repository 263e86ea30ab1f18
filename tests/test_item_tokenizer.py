"""The frozen way from an embedding to a code, as a build writes it and an artefact carries it."""

import json

import numpy as np
import pytest

from llmrec.catalog import Catalog
from llmrec.embedding import Fusion
from llmrec.embedding.whitening import Whitening
from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.item_tokenizer import ItemTokenizer, copy_tokenizer
from llmrec.quantization import HashedCodes, ProductQuantizer, ResidualKMeans, ResidualVQ, ScalarQuantizer
from llmrec.quantization.rqvae import RQVAE

RNG = np.random.default_rng(0)
TEXT = RNG.normal(size=(60, 12))
SIGNALS = RNG.normal(size=(60, 5)) * (np.arange(60) % 7 > 0)[:, None]


def quantizers():
    return [
        ResidualKMeans(2, 8, niter=4),
        ResidualVQ(2, 8, niter=4),
        ProductQuantizer(2, 8, rotate=True, niter=4),
        ScalarQuantizer(2, (4, 3)),
        HashedCodes(3, 16),
        RQVAE(2, 8, latent_dim=4, hidden=(8,), epochs=2),
    ]


def written(folder, quantizer, whitening=None, fusion=None, **record):
    quantizer.save(folder / "codebooks")
    if whitening:
        whitening.save(folder / "whitening")
    if fusion:
        fusion.save(folder / "fusion")
    (folder / "semantic_ids.json").write_text(json.dumps({"quantizer": "any", **record}))
    return folder


@pytest.mark.parametrize("quantizer", quantizers(), ids=lambda quantizer: type(quantizer).__name__)
def test_every_quantizer_comes_back_and_takes_new_items(tmp_path, quantizer):
    quantizer.fit(TEXT)
    tokenizer = ItemTokenizer.load(written(tmp_path, quantizer, seed=3))
    assert type(tokenizer.quantizer) is type(quantizer)
    assert tokenizer.record["seed"] == 3
    codes = quantizer.encode(TEXT[:20])
    _, first = np.unique(codes, axis=0, return_index=True)
    items = [{"item_id": f"i{row}", "title": "T"} for row in range(len(first))]
    catalog = Catalog(items, codes[first], quantizer.codebook_sizes)
    found = tokenizer.assign(["a", "b", "c"], TEXT[[40, 41, 41]], catalog)
    grown = catalog.with_items([{"item_id": name} for name in "abc"], found.codes)
    assert len(np.unique(grown.codes, axis=0)) == len(first) + 3
    assert grown.trie.num_items == len(first) + 3


def test_vectors_are_whitened_then_fused_and_new_items_have_no_signal(tmp_path):
    whitening = Whitening.fit(TEXT, 6, 1.0)
    white = whitening.transform(TEXT)
    fusion = Fusion.fit(white, SIGNALS, 0.5)
    fused = fusion.transform(white, SIGNALS)
    quantizer = ResidualKMeans(2, 8, niter=4).fit(fused)
    tokenizer = ItemTokenizer.load(written(tmp_path, quantizer, whitening, fusion))
    assert np.allclose(tokenizer.vectors(TEXT, SIGNALS), fused, atol=1e-6)
    assert np.allclose(tokenizer.vectors(TEXT), fusion.transform(white), atol=1e-6)
    assert not np.allclose(tokenizer.vectors(TEXT), fused, atol=0.1)
    bare = ItemTokenizer.load(written(tmp_path / "bare", ResidualKMeans(2, 8, niter=4).fit(TEXT)))
    assert bare.vectors(TEXT) is TEXT


def test_hashed_codes_come_from_ids_whatever_the_embedding():
    quantizer = HashedCodes(3, 16).fit(TEXT)
    catalog = Catalog([{"item_id": "old"}], np.array([[0, 0, 0]]), quantizer.codebook_sizes)
    tokenizer = ItemTokenizer(quantizer)
    one = tokenizer.assign(["a", "b"], TEXT[:2], catalog).codes
    assert (one == tokenizer.assign(["a", "b"], TEXT[5:7], catalog).codes).all()
    assert (one == quantizer.encode_ids(["a", "b"])).all()


def test_codes_of_retired_items_are_not_given_away():
    quantizer = ResidualKMeans(2, 8, niter=4).fit(TEXT)
    codes = quantizer.encode(TEXT[:1])
    catalog = Catalog([{"item_id": "old"}, {"item_id": "other"}], np.concatenate([codes, 7 - codes]), (8, 8))
    found = ItemTokenizer(quantizer).assign(["new"], TEXT[:1], catalog.with_retired([0], True))
    assert (found.codes != codes).any()
    with pytest.raises(TokenizerError, match="wide"):
        ItemTokenizer(quantizer).assign(["new"], TEXT[:1, :3], catalog)


def test_a_copy_tells_no_paths_and_takes_all_parts(tmp_path):
    places = {"out": "/somewhere/ids", "embeddings": "/somewhere/e", "items": "i", "interactions": "x", "seed": 4}
    whitening = Whitening.fit(TEXT, 6, 1.0)
    quantizer = ResidualKMeans(2, 8, niter=4).fit(whitening.transform(TEXT))
    (tmp_path / "home/secret/minilm").mkdir(parents=True)
    embedded = {"model": str(tmp_path / "home/secret/minilm"), "weights_sha256": "ab"}
    source = written(tmp_path / "source", quantizer, whitening, arguments=places, embeddings=embedded)
    (source / "other.txt").write_text("not the tokenizer's")
    copy_tokenizer(source, tmp_path / "copy")
    files = sorted(file.relative_to(tmp_path / "copy").as_posix() for file in (tmp_path / "copy").rglob("*.*"))
    assert files == [
        "codebooks/codebooks.safetensors",
        "codebooks/quantizer.json",
        "semantic_ids.json",
        "whitening/whitening.json",
        "whitening/whitening.safetensors",
    ]
    assert ItemTokenizer.load(tmp_path / "copy").record["arguments"] == {"seed": 4}
    assert ItemTokenizer.load(tmp_path / "copy").record["embeddings"] == {"model": "minilm", "weights_sha256": "ab"}
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "copy").rglob("*.json"))
    assert (ItemTokenizer.load(tmp_path / "copy").vectors(TEXT) == whitening.transform(TEXT)).all()


def test_folders_that_are_no_tokenizer_are_named(tmp_path):
    with pytest.raises(ArtefactError, match=r"holds no semantic_ids\.json"):
        ItemTokenizer.load(tmp_path)
    with pytest.raises(ArtefactError, match=r"holds no semantic_ids\.json"):
        copy_tokenizer(tmp_path, tmp_path / "copy")
    written(tmp_path, ResidualKMeans(2, 8, niter=4).fit(TEXT))
    manifest = tmp_path / "codebooks/quantizer.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"quantizer": "future"}))
    with pytest.raises(ArtefactError, match="of the kind 'future'"):
        ItemTokenizer.load(tmp_path)
    manifest.write_text("[]")
    with pytest.raises(ArtefactError, match="does not say which quantizer"):
        ItemTokenizer.load(tmp_path)
