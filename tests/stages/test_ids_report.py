"""semantic_ids/report.py as a user runs it: on a build, on a catalog, on a JSON file, with and without a log."""

import csv
import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from markupsafe import escape
from safetensors.numpy import load_file

from llmrec.artefact import write_manifest
from llmrec.catalog import Catalog
from llmrec.data import ColumnNames, Interactions, Items, leave_one_out
from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.embedding import EmbeddingStore, Fusion, cooccurrence_embeddings
from llmrec.exceptions import DataError
from llmrec.item_tokenizer import copy_tokenizer
from llmrec.quantization import ResidualKMeans

ROOT = Path(__file__).parents[2]
STAGE = ROOT / "semantic_ids"
COLUMNS = ColumnArguments(item_column="sku", title_column="name")
FLAGS = ("--item-column", "sku", "--title-column", "name")


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(STAGE / script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def loaded(script: str) -> ModuleType:
    """A stage's module, to call its main in this process, which is several seconds quicker."""
    spec = importlib.util.spec_from_file_location(f"stage_{script}", STAGE / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def build(**arguments: object) -> None:
    stage = loaded("build")
    given = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
    stage.main(stage.BuildArguments(**given), COLUMNS, SplitArguments())


def report(out: Path, splits: SplitArguments | None = None, **arguments: object) -> dict[str, Any]:
    stage = loaded("report")
    given = {name: str(value) for name, value in arguments.items()}
    stage.main(stage.ReportArguments(json=str(out), **given), COLUMNS, splits or SplitArguments())
    return dict(json.loads(out.read_text()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 items of 6 kinds, users who take items of one kind, embeddings, and IDs with and without the log."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    things = ["bolt", "screw", "glove", "tape", "lamp", "rope"]
    with open(folder / "items.jsonl", "w") as file:
        for i in range(60):
            file.write(json.dumps({"sku": f"i{i}", "name": f"{things[i % 6]} no {i // 12}, <b>{i}</b>"}) + "\n")
    with open(folder / "log.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "sku", "position"])
        for user in range(60):
            history = 6 * generator.choice(10, 6, replace=False) + user % 6
            writer.writerows([f"u{user}", f"i{item}", place] for place, item in enumerate(history.tolist()))
    vectors = generator.normal(size=(6, 12))[np.arange(60) % 6] + 0.2 * generator.normal(size=(60, 12))
    EmbeddingStore([f"i{i}" for i in range(60)], vectors).save(folder / "embeddings")
    settings = {"embeddings": folder / "embeddings", "codebook_size": 8, "num_levels": 2, "seed": 3}
    inputs = {"items": folder / "items.jsonl", "interactions": folder / "log.csv"}
    build(**settings, **inputs, out=folder / "ids", collaborative_dim=5, window=3)
    build(**settings, out=folder / "text", collisions="append")
    return folder


@pytest.fixture(scope="module")
def examined(data: Path) -> tuple[dict[str, Any], str, str]:
    """The report on the build with all that is known, its page, and what was printed."""
    with gzip.open(data / "tokens.json.gz", "wt") as file:
        json.dump({f"i{i}": [f"<a_{i % 3}>", f"<b_{i % 2}>"] for i in range(50)}, file)
    given = ("--ids", data / "ids", "--interactions", data / "log.csv", "--embeddings", data / "embeddings")
    others = ("--against", data / "text", data / "tokens.json.gz")
    files = ("--json", data / "out" / "report.json", "--html", data / "out" / "report.html")
    finished = run("report.py", *given, *others, *files, *FLAGS)
    assert finished.returncode == 0, finished.stderr
    printed = " ".join(finished.stderr.split())
    page = (data / "out" / "report.html").read_text()
    return json.loads((data / "out" / "report.json").read_text()), page, printed


def test_what_was_quantised_is_restored(data: Path, examined: tuple[dict[str, Any], str, str]) -> None:
    found = examined[0]
    assert found["skipped"] == {}
    items = Items.read(data / "ids" / "items.jsonl")
    log = Interactions.read(data / "log.csv", ColumnNames(item="sku", title="name"))
    split = leave_one_out(log, items)
    collaborative = cooccurrence_embeddings(split.train, len(items), 5, 3, 3)
    texts = EmbeddingStore.load(data / "embeddings").rows(items.ids)
    vectors = Fusion.from_pretrained(data / "ids" / "fusion").transform(texts, collaborative).astype(np.float64)
    quantizer = ResidualKMeans.from_pretrained(data / "ids" / "codebooks")
    codes = load_file(data / "ids" / "codes.safetensors")["codes"]
    errors = ((vectors - quantizer.decode(codes[:, :2])) ** 2).sum(axis=1)
    spread = ((vectors - vectors.mean(axis=0)) ** 2).sum(axis=1)
    assert found["reconstruction"]["relative"] == pytest.approx(errors.mean() / spread.mean(), rel=1e-6)


def test_the_report_is_printed_and_written(examined: tuple[dict[str, Any], str, str]) -> None:
    found, page, printed = examined
    assert (found["items"], found["source"]["quantizer"], found["seed"]) == (60, "rkmeans", 0)
    assert found["neighbour_kind"] == "co_sold"
    assert found["neighbours"]["texts"][0]["pairs"] == 600
    assert found["ceiling"]["cases"] == 60
    assert [other["shared_items"] for other in found["others"]] == [60, 50]
    assert "report.json" in printed
    assert "60 items, " in printed
    assert found["verdict"]
    for finding in found["verdict"]:
        assert f"{finding['level']} {finding['sentence']}" in printed
        assert str(escape(finding["sentence"])) in page
    assert "tokens.json.gz" in printed
    assert "<h2>Beside other tokenizers</h2>" in page
    assert "<b>1" not in page


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ("split", "These codes were built on the split"),
        ("log", "These codes were made from text and co-occurrence"),
        ("embeddings", "are not those that these codes were made from"),
    ],
)
def test_what_cannot_be_restored_is_said(
    data: Path, capsys: pytest.CaptureFixture[str], changed: str, reason: str
) -> None:
    embeddings = data / "embeddings"
    if changed == "embeddings":
        store = EmbeddingStore.load(embeddings)
        embeddings = data / "others"
        EmbeddingStore(store.item_ids, 2 * np.asarray(store.embeddings)).save(embeddings)
    splits = SplitArguments(split="cold-users") if changed == "split" else None
    log = {} if changed == "log" else {"interactions": data / "log.csv"}
    found = report(data / f"{changed}.json", splits, ids=data / "ids", embeddings=embeddings, **log)
    assert found["reconstruction"] is None
    assert reason in found["skipped"]["reconstruction"]
    assert reason in " ".join(capsys.readouterr().err.split())
    assert found["neighbours"]["texts"] is not None


def test_text_alone_needs_no_log(data: Path) -> None:
    found = report(data / "text.out.json", ids=data / "text", embeddings=data / "embeddings")
    assert found["skipped"] == {}
    assert 0 < found["reconstruction"]["relative"] < 1
    assert (found["levels"], found["quantised_levels"], found["quantised"]["levels"]) == (3, 2, 2)
    assert found["quantised"]["sharing_rate"] > 0


def test_whitened_texts_are_restored_and_other_signals_are_not_made_up(data: Path) -> None:
    inputs = {"embeddings": data / "embeddings", "interactions": data / "log.csv", "items": data / "items.jsonl"}
    folder = data / "whitened"
    build(**inputs, out=folder, codebook_size=8, num_levels=2, pca_dim=6, whitening=0.5, collaborative_dim=5)
    given = {"ids": folder, "interactions": data / "log.csv", "embeddings": data / "embeddings"}
    found = report(data / "whitened.json", **given)
    record = json.loads((folder / "semantic_ids.json").read_text())
    measured = record["collisions"]["distortion_before"] + record["collisions"]["added_distortion"]
    assert found["reconstruction"]["mse"] == pytest.approx(measured, rel=1e-5)
    # As the record says; of one from before it did, as the arguments say, unless they are gone.
    told = ({"collaborative": "sasrec"}, {"collaborative": "own"})
    before = ({"collaborative": "sasrec"}, {"collaborative_embeddings": "own"})
    plain = {name: value for name, value in record.items() if name != "collaborative"}
    changes = [record | one for one in told]
    changes += [plain | {"arguments": record["arguments"] | one} for one in before]
    for changed in changes:
        (folder / "semantic_ids.json").write_text(json.dumps(changed))
        for log in ({}, {"interactions": data / "log.csv"}):
            found = report(data / "whitened.json", ids=folder, embeddings=data / "embeddings", **log)
            assert found["reconstruction"] is None
            assert "did not come from its co-occurrence" in found["skipped"]["reconstruction"]
    for changed in (record | {"collaborative": "cooccurrence"}, plain):
        (folder / "semantic_ids.json").write_text(json.dumps(changed))
        assert report(data / "whitened.json", **given)["reconstruction"] is not None


@pytest.mark.parametrize("signal", [None, "letter"])
def test_codes_from_the_text_alone_are_restored_without_a_log(data: Path, tmp_path: Path, signal: str | None) -> None:
    """LETTER's too: the log draws its codes together, and is not what they encode."""
    build(embeddings=data / "embeddings", out=tmp_path / "ids", codebook_size=8, num_levels=2, pca_dim=6)
    record = json.loads((tmp_path / "ids" / "semantic_ids.json").read_text())
    changed = record | {"collaborative": signal, "arguments": {"fusion": "letter" if signal else "concat"}}
    (tmp_path / "ids" / "semantic_ids.json").write_text(json.dumps(changed))
    found = report(tmp_path / "report.json", ids=tmp_path / "ids", embeddings=data / "embeddings")
    assert found["skipped"] == {}
    measured = record["collisions"]["distortion_before"] + record["collisions"]["added_distortion"]
    assert found["reconstruction"]["mse"] == pytest.approx(measured, rel=1e-5)


def test_an_artefact_of_own_signals_says_so_though_its_arguments_lost_the_path(data: Path, tmp_path: Path) -> None:
    """As `copy_tokenizer` leaves it: the path is stripped, the plain fact stays."""
    store = EmbeddingStore.load(data / "embeddings")
    EmbeddingStore(store.item_ids, np.random.default_rng(1).normal(size=(60, 5))).save(tmp_path / "own")
    inputs = {"embeddings": data / "embeddings", "interactions": data / "log.csv", "items": data / "items.jsonl"}
    build(**inputs, out=tmp_path / "ids", codebook_size=8, num_levels=2, collaborative_embeddings=tmp_path / "own")
    record = json.loads((tmp_path / "ids" / "semantic_ids.json").read_text())
    (tmp_path / "ids" / "semantic_ids.json").write_text(json.dumps(record | {"collaborative": "own"}))
    copy_tokenizer(tmp_path / "ids", tmp_path / "artefact" / "item_tokenizer")
    Catalog.from_build(tmp_path / "ids").save(tmp_path / "artefact" / "catalog")
    settings = {"split": record["split"], "training": {}}
    (tmp_path / "artefact" / "llmrec.json").write_text(json.dumps(settings))
    write_manifest(tmp_path / "artefact")
    given = {"embeddings": data / "embeddings", "interactions": data / "log.csv"}
    found = report(tmp_path / "report.json", ids=tmp_path / "artefact", **given)
    assert found["reconstruction"] is None
    assert "did not come from its co-occurrence" in found["skipped"]["reconstruction"]


@pytest.mark.parametrize("flag", ["json", "html"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, flag: str) -> None:
    stage = loaded("report")
    (tmp_path / "file").write_text("kept")
    places = {
        str(tmp_path): "is a folder",
        str(tmp_path / "file" / "report"): r"cannot be written \(",
        "/proc/none/report": r"cannot be written \(",
        str(tmp_path / ("x" * 300) / "report"): r"cannot be written \(",
    }
    for place, message in places.items():
        arguments = stage.ReportArguments(ids="not read at all", **{flag: place})
        with pytest.raises(DataError, match=f"--{flag} .* {message}.*\\. Give .*\\.$"):
            stage.main(arguments, COLUMNS, SplitArguments())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    stage.check_writable("--json", str(tmp_path / "new" / "folder" / "report.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    stage.check_writable("--json", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "kept"


def test_a_catalog_and_titles_of_a_table(data: Path) -> None:
    Catalog.from_build(data / "ids").save(data / "catalog")
    found = report(data / "catalog.json", ids=data / "catalog")
    assert (found["items"], found["source"]["kind"], found["quantised"]) == (60, "catalog", None)
    (data / "same.json").write_text(json.dumps({"i1": ["<a_1>"], "i2": ["<a_1>"], "i3": ["<a_0>"]}))
    found = report(data / "same.out.json", ids=data / "same.json", items=data / "items.jsonl")
    (group,) = found["collisions"]["groups"]
    assert [item["title"] for item in group["items"]] == ["screw no 0, <b>1</b>", "glove no 0, <b>2</b>"]
    assert found["codebook_sizes_known"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ids", "absent"), "error: There is no folder 'absent'"),
        (("--ids", "absent", "--level", "3"), "--level"),
    ],
)
def test_mistakes_end_with_a_message(arguments: tuple[str, ...], message: str) -> None:
    finished = run("report.py", *arguments)
    assert finished.returncode != 0
    assert message in finished.stderr


def test_a_negative_seed_is_refused(data: Path) -> None:
    stage = loaded("report")
    with pytest.raises(DataError, match="--seed is -1"):
        stage.main(stage.ReportArguments(ids=str(data / "text"), seed=-1), COLUMNS, SplitArguments())


def test_help_has_examples_and_imports_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", str(STAGE / "report.py"), "--help"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0
    assert "python semantic_ids/report.py --ids" in finished.stdout
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert not imported & {"torch", "sentence_transformers", "faiss", "sklearn", "matplotlib"}
