"""semantic_ids/assign.py and `llmrec ids` as a user runs them."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from factories import random_recommender

from llmrec import Recommender
from llmrec.catalog_versions import CatalogVersions
from llmrec.cli.main import main
from llmrec.embedding import EmbeddingStore
from llmrec.item_tokenizer import copy_tokenizer
from llmrec.vocabulary import add_catalog_tokens, train_tokenizer

ROOT = Path(__file__).parents[2]


def run(*arguments: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode == 0) == ok, done.stderr[-3000:]
    return done


def ids(name: str, *arguments: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """`llmrec ids NAME`: a process of its own where the command becomes a stage, else in this one."""
    words = ["ids", name, *map(str, arguments)]
    if name == "assign":
        return run("-m", "llmrec.cli.main", *words, ok=ok)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["llmrec", *words])
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
    assert (code == 0) == ok, err.getvalue()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 items, of which 34 are in the catalog; the static embedding of all of them."""
    folder = tmp_path_factory.mktemp("assign")
    colours, things = ["red", "blue", "green", "black"], ["bolt", "screw", "glove", "tape", "lamp"]
    items = [
        {"item_id": f"i{n}", "title": f"{colours[n % 4]} {things[n % 5]}", "text": f"number {n // 3}", "price": n / 2}
        for n in range(40)
    ]
    items[35]["item_id"] = "🧦 <s0_1>,/../"
    items[36]["title"] = items[37]["title"] = "the same"
    items[36]["text"] = items[37]["text"] = "text"
    for name, rows in (("all", items), ("old", items[:34]), ("new", items[30:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run("semantic_ids/embed.py", "--items", folder / "all.jsonl", "--out", folder / "embeddings", "--model", "static")
    flags = ["--num_levels", 2, "--codebook_size", 16, "--niter", 5, "--collisions", "reassign"]
    inputs = ["--items", folder / "old.jsonl", "--embeddings", folder / "embeddings"]
    run("semantic_ids/build.py", *inputs, *flags, "--out", folder / "ids")
    return folder


def test_new_items_join_and_one_command_takes_them_out(data: Path, tmp_path: Path) -> None:
    before = CatalogVersions(data / "ids").load()
    flags = ["--items", data / "new.jsonl", "--embeddings", data / "embeddings"]
    dry = ids("assign", data / "ids", *flags, "--dry-run", "--json", tmp_path / "dry.json")
    assert "nothing was changed" in dry.stderr
    assert CatalogVersions(data / "ids").current == before.version
    done = ids("assign", data / "ids", *flags, "--note", "winter", "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert "4 items are in the catalog already" in done.stderr
    assert (result["parent"], result["known"], result["added"], result["items"]) == (before.version, 4, 6, 40)
    assert result["assignment"]["items"] == 6
    assert result["codes"] == json.loads((tmp_path / "dry.json").read_text())["codes"]
    after = CatalogVersions(data / "ids").load()
    assert after.version == result["version"]
    assert after.ids[:34] == before.ids
    assert (after.codes[:34] == before.codes).all()
    assert after.ids[34:] == ["i34", "🧦 <s0_1>,/../", "i36", "i37", "i38", "i39"]
    assert after.codes[34:].tolist() == [result["codes"][item] for item in after.ids[34:]]
    assert len(np.unique(after.codes, axis=0)) == 40
    assert after.items[36]["title"] == "the same"
    assert after.items[36]["price"] == 18.0
    again = ids("assign", data / "ids", *flags)
    assert "There is no new item" in again.stderr
    shown = json.loads(ids("log", data / "ids", "--json").stdout)
    assert [(row["added"], row["note"], row["current"]) for row in shown["versions"]] == [
        (0, "as built", False),
        (6, "winter", True),
    ]
    told = ids("rollback", data / "ids")
    assert before.version in told.stdout
    assert CatalogVersions(data / "ids").load().ids == before.ids


def test_an_artefact_carries_its_tokenizer_and_recommends_new_items(data: Path, tmp_path: Path) -> None:
    whole = random_recommender(1)
    base = CatalogVersions(data / "ids").base
    tokenizer = train_tokenizer(["some text"], 300)
    catalog = add_catalog_tokens(tokenizer, base)
    model = whole.model
    model.resize_token_embeddings(len(tokenizer))
    (tmp_path / "from").mkdir()
    copy_tokenizer(data / "ids", tmp_path / "from")
    recommender = Recommender(model, tokenizer, catalog, whole.prompt, whole.settings, tmp_path / "from")
    recommender.save_pretrained(tmp_path / "artefact")
    flags = ["--items", data / "new.jsonl", "--embeddings", data / "embeddings"]
    ids("assign", tmp_path / "artefact", *flags)
    (tmp_path / "gone.txt").write_text("i3\n\ni4\n")
    ids("retire", tmp_path / "artefact", "i5", "--file", tmp_path / "gone.txt")
    found = Recommender.from_pretrained(tmp_path / "artefact").recommend(["i1", "🧦 <s0_1>,/../"], k=100)
    kept = {f"i{n}" for n in range(40)} - {"i1", "i3", "i4", "i5", "i35"}
    assert {item.item_id for item in found} == kept
    ids("restore", tmp_path / "artefact", "i4")
    assert Recommender.from_pretrained(tmp_path / "artefact").catalog.candidates() == 38


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["assign", "{ids}", "--items", "{data}/new.jsonl"], "embedded with 'static', which cannot embed new ones"),
        (["assign", "{data}", "--items", "{data}/new.jsonl"], "does not carry the codebooks"),
        (["retire", "{ids}", "nobody"], "'nobody' first"),
        (["retire", "{ids}"], "No item is named"),
        (["retire", "{ids}", "--file", "{data}/absent.txt"], "cannot be read as a list of item ids"),
        (["log", "{data}/absent"], "holds no semantic_ids.json"),
        (["rollback", "{ids}", "--to", "abcdef0123456789"], "There is no version 'abcdef0123456789'"),
        (["rollback", "{ids}", "--to", ""], "'' is no version of a catalog"),
    ],
)
def test_what_cannot_be_done_is_said_in_two_sentences(data: Path, arguments: list[str], message: str) -> None:
    done = ids(*(part.format(ids=data / "ids", data=data) for part in arguments), ok=False)
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_embeddings_of_another_making_are_refused(data: Path, tmp_path: Path) -> None:
    new = ["--items", data / "new.jsonl"]
    run("semantic_ids/embed.py", *new, "--out", tmp_path / "other", "--model", "static")
    done = ids("assign", data / "ids", *new, "--embeddings", tmp_path / "other", ok=False)
    assert "The embeddings' text_sha256 is" in done.stderr  # a static embedding that was fitted on other texts
    shutil.copytree(data / "ids", tmp_path / "ids")
    record = json.loads((tmp_path / "ids/semantic_ids.json").read_text())
    record["catalog"] = "0123456789abcdef"
    (tmp_path / "ids/semantic_ids.json").write_text(json.dumps(record))
    done = ids("assign", tmp_path / "ids", *new, "--embeddings", data / "embeddings", ok=False)
    assert "The tokenizer's codes are of the catalog 0123456789abcdef" in done.stderr
    assert CatalogVersions(data / "ids").current == CatalogVersions(data / "ids").base.version


def test_dates_and_missing_numbers_are_taken_as_a_build_takes_them(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "ids", tmp_path / "ids")
    table = pl.read_ndjson(data / "new.jsonl").with_columns(
        released=pl.Series([date(2026, 1, 1)] * 10),
        price=pl.Series([float("nan")] * 10),
    )
    # An id is kept as it is, whatever separators it holds; its embedding is stored under it.
    odd = "x\u2028y\x85z"
    table = table.with_columns(item_id=pl.when(pl.col("item_id") == "i39").then(pl.lit(odd)).otherwise("item_id"))
    table.write_parquet(tmp_path / "new.parquet")
    store = EmbeddingStore.load(data / "embeddings")
    renamed = [odd if item == "i39" else item for item in store.item_ids]
    EmbeddingStore(renamed, store.embeddings, store.origin).save(tmp_path / "embeddings")
    ids("assign", tmp_path / "ids", "--items", tmp_path / "new.parquet", "--embeddings", tmp_path / "embeddings")
    item = CatalogVersions(tmp_path / "ids").load().items[-1]
    assert item["item_id"] == odd
    assert item["price"] is None
    assert str(item["released"]).startswith("2026-01-01")


def test_a_build_does_not_delete_versions(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "ids", tmp_path / "ids")
    ids("retire", tmp_path / "ids", "i1")
    inputs = ["--items", data / "old.jsonl", "--embeddings", data / "embeddings", "--out", tmp_path / "ids"]
    done = run("semantic_ids/build.py", *inputs, ok=False)
    assert "version(s) beside its base, which would be lost" in done.stderr
    assert CatalogVersions(tmp_path / "ids").load().retired.any()


def test_ids_of_a_file_are_read_line_by_line(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "ids", tmp_path / "ids")
    odd = "x\u2028y\x0bz"
    versions = CatalogVersions(tmp_path / "ids")
    taken = {tuple(code) for code in versions.base.codes.tolist()}
    free = next([[a, b]] for a in range(16) for b in range(16) if (a, b) not in taken)
    versions.add([{"item_id": odd, "title": "odd"}], np.array(free))
    (tmp_path / "list.txt").write_bytes(f"\ufeffi6\r\n{odd}\n".encode())
    ids("retire", tmp_path / "ids", "--file", tmp_path / "list.txt")
    found = CatalogVersions(tmp_path / "ids").load()
    assert [found.ids[row] for row in np.flatnonzero(found.retired)] == ["i6", odd]
