"""semantic_ids/embed.py and build.py as a user runs them: processes, folders, exit codes."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmrec.catalog import Catalog
from llmrec.data import Interactions, Items, leave_one_out
from llmrec.embedding import EmbeddingStore, Fusion, cooccurrence_embeddings
from llmrec.quantization import HashedCodes, ProductQuantizer, ResidualKMeans, ResidualVQ, ScalarQuantizer
from llmrec.quantization.rqvae import RQVAE

ROOT = Path(__file__).parents[2]
STAGE = ROOT / "semantic_ids"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(STAGE / script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 items, two of which have equal texts, and 30 users; one item occurs in the interactions alone."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    colours, things = ["red", "blue", "green", "black"], ["bolt", "screw", "glove", "tape", "lamp"]
    with open(folder / "items.jsonl", "w") as file:
        for i in range(40):
            title = f"{colours[i % 4]} {things[i % 5]}" + (f" number {i}" if i >= 2 else " twin")
            title = "the twin" if i < 2 else title
            file.write(
                json.dumps({"sku": f"i{i}", "name": title, "brand": f"brand{i % 3}" if i >= 2 else None}) + "\n"
            )
    with open(folder / "interactions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "sku", "position"])
        for user in range(30):
            history = [f"i{i}" for i in generator.choice(40, 6, replace=False)]
            history[1] = "only-here" if user < 5 else history[1]
            writer.writerows([f"u{user}", item, place] for place, item in enumerate(history))
    return folder


EMBED = ("--items", "absent.csv", "--out", "x")
COLUMNS = ("--item-column", "sku", "--title-column", "name")


@pytest.fixture(scope="module")
def embeddings(data: Path) -> Path:
    files = ("--items", data / "items.jsonl", "--interactions", data / "interactions.csv")
    done = run("embed.py", *files, "--out", data / "embeddings", "--model", "static", *COLUMNS)
    assert done.returncode == 0, done.stderr
    assert "static" in done.stderr
    return data / "embeddings"


@pytest.fixture(scope="module")
def built(data: Path, embeddings: Path) -> tuple[Path, str]:
    recipe = data / "recipe.yaml"
    recipe.write_text("num_levels: 3\ncodebook_size: 32\nniter: 5\nseed: 4\nitem_column: sku\ntitle_column: name\n")
    files = ("--items", data / "items.jsonl", "--interactions", data / "interactions.csv")
    inputs = ("--config", recipe, "--embeddings", embeddings, *files)
    done = run("build.py", *inputs, "--out", data / "ids", "--codebook-size", 4)
    assert done.returncode == 0, done.stderr
    return data / "ids", done.stderr


def test_embed_writes_all_items(embeddings: Path) -> None:
    store = EmbeddingStore.load(embeddings)
    assert store.item_ids == [*(f"i{i}" for i in range(40)), "only-here"]
    assert store.origin["model"] == "static"
    np.testing.assert_allclose(store.embeddings[0], store.embeddings[1], atol=1e-6)
    assert not (embeddings.parent / ".embeddings.work").exists()


def test_embed_again_finds_its_result_and_other_settings_do_not(data: Path, embeddings: Path) -> None:
    files = ("--items", data / "items.jsonl", "--interactions", data / "interactions.csv")
    before = (embeddings / "embedding.json").stat().st_mtime_ns
    done = run("embed.py", *files, "--out", embeddings, "--model", "static", *COLUMNS)
    assert (done.returncode, "already" in done.stderr) == (0, True)
    assert (embeddings / "embedding.json").stat().st_mtime_ns == before
    other = data / "other"
    for seed in (0, 1):
        done = run("embed.py", *files, "--out", other, "--model", "static", "--seed", seed, *COLUMNS)
        assert (done.returncode, "already" in done.stderr) == (0, False)


def test_vectors_of_ones_own_are_taken_by_row_or_by_id(data: Path, tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).normal(size=(41, 6)).astype(np.float16)
    file, ids = tmp_path / "v.safetensors", tmp_path / "ids.txt"
    save_file({"v": vectors}, file)
    save_file({"v": vectors[:40]}, tmp_path / "forty.safetensors")
    names = [*(f"i{i}" for i in range(40)), "only-here"]
    ids.write_text("\n".join(names[::-1]) + "\n")
    table, log = ("--items", data / "items.jsonl"), ("--interactions", data / "interactions.csv")
    cases = (
        ("rows", ("--vectors", tmp_path / "forty.safetensors"), vectors[:40]),
        ("ids", (*log, "--vectors", file, "--vector-ids", ids), vectors[::-1]),
    )
    for out, flags, expected in cases:
        done = run("embed.py", *table, *flags, "--out", tmp_path / out, *COLUMNS)
        assert done.returncode == 0, done.stderr
        store = EmbeddingStore.load(tmp_path / out)
        assert store.item_ids == names[: len(expected)]
        np.testing.assert_array_equal(store.embeddings, expected.astype(np.float32))
        again = run("embed.py", *table, *flags, "--out", tmp_path / out, *COLUMNS)
        assert "already" in again.stderr
    alone = run("embed.py", *table, "--vectors", file, "--out", tmp_path / "alone", *COLUMNS)
    assert alone.returncode == 1
    assert "has 41 rows for 40 items" in alone.stderr
    assert not (tmp_path / "alone").exists()


def test_vector_columns_are_joined_and_new_items_follow_the_old(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(5, 2, size=(12, 4))
    rows = [
        {"item_id": f"i{i}", "title": f"thing {i} {'red' if i % 2 else 'blue'}", "image": images[i].tolist()}
        for i in range(12)
    ]
    rows[3]["image"] = None
    items, new = tmp_path / "items.jsonl", tmp_path / "new.jsonl"
    items.write_text("\n".join(map(json.dumps, rows)))
    new.write_text("\n".join(json.dumps(row) for row in rows[2:4]))
    columns = ("--vector-columns", "image")
    for out, table, flags in [
        ("image", items, ()),
        ("both", items, ("--with-text", "--model", "static", "--vector-weights", 1, 3)),
        ("new", new, ("--like", tmp_path / "image")),
    ]:
        done = run("embed.py", "--items", table, *columns, *flags, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
        assert "1 of" in done.stderr
        assert "no vector in the column 'image', such as 'i3'" in done.stderr
        again = run("embed.py", "--items", table, *columns, *flags, "--out", tmp_path / out)
        assert "already" in again.stderr
    image, both, later = (EmbeddingStore.load(tmp_path / out).embeddings for out in ("image", "both", "new"))
    assert not image[3].any()
    present = np.delete(images, 3, axis=0).astype(np.float32).astype(np.float64)
    centred = present - present.mean(axis=0)
    expected = centred / np.linalg.norm(centred, axis=1).mean()
    np.testing.assert_allclose(np.delete(image, 3, axis=0), expected, atol=1e-5)
    np.testing.assert_allclose(both[:, :4], image / 2, atol=1e-6)  # a quarter of the squared distances
    assert np.linalg.norm(both[:, 4:], axis=1).mean() == pytest.approx(np.sqrt(0.75), abs=1e-4)
    np.testing.assert_allclose(later, image[2:4], atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [
        "blocks",
        "embedding.json",
        "embeddings.safetensors",
        "items.json",
    ]
    other = run("embed.py", "--items", items, *columns, "--vector-weights", 2, "--out", tmp_path / "image")
    assert "already" not in other.stderr
    built = run("build.py", "--embeddings", tmp_path / "both", "--out", tmp_path / "ids", "--codebook-size", 4)
    assert built.returncode == 0, built.stderr


def test_recipes_of_embed_name_only_flags_that_exist(data: Path) -> None:
    """A table that is not there is the only thing amiss."""
    recipes = sorted((STAGE / "recipes").glob("embed*.yaml"))
    assert len(recipes) >= 4
    for recipe in recipes:
        done = run("embed.py", "--config", recipe, "--items", data / "absent.csv", "--out", data / "x")
        assert done.returncode == 1
        assert done.stderr.startswith("error: There is no file"), done.stderr


def test_build_writes_a_catalog_of_unique_codes(built: tuple[Path, str]) -> None:
    folder, _ = built
    catalog = Catalog.from_build(folder)
    assert catalog.ids == [*(f"i{i}" for i in range(40)), "only-here"]
    assert catalog.title(0) == "the twin"
    assert catalog.items[3]["brand"] == "brand0"
    assert len(np.unique(catalog.codes, axis=0)) == 41
    assert load_file(folder / "codes.safetensors")["codes"].dtype == np.int32
    assert sorted(path.name for path in folder.iterdir()) == [
        "codebooks",
        "codes.safetensors",
        "fusion",
        "items.jsonl",
        "semantic_ids.json",
    ]


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(built: tuple[Path, str]) -> None:
    described = json.loads((built[0] / "semantic_ids.json").read_text())
    arguments = described["arguments"]
    assert (arguments["codebook_size"], arguments["niter"], arguments["collaborative_weight"]) == (4, 5, 0.5)
    assert described["codebook_sizes"][:3] == [4, 4, 4]


def test_the_report_says_what_happened(built: tuple[Path, str]) -> None:
    folder, printed = built
    report = json.loads((folder / "semantic_ids.json").read_text())["collisions"]
    assert report["items"] == 41
    assert report["policy"] in ("reassign", "append")  # 41 items on 64 codes
    assert report["sharing_items"] >= 2
    assert "Every item has a code of its own" in printed
    assert f"{report['sharing_items']} items" in " ".join(printed.split())


def test_codes_follow_from_the_training_part_alone(data: Path, embeddings: Path, built: tuple[Path, str]) -> None:
    from llmrec.data import ColumnNames

    folder, _ = built
    columns = ColumnNames(item="sku", title="name")
    interactions = Interactions.read(data / "interactions.csv", columns)
    items = Items.read(data / "items.jsonl", columns).with_missing(interactions)
    split = leave_one_out(interactions, items)
    assert json.loads((folder / "semantic_ids.json").read_text())["split"] == split.content_hash
    collaborative = cooccurrence_embeddings(split.train, len(items), seed=4)
    vectors = EmbeddingStore.load(embeddings).rows(items.ids)
    fused = Fusion.from_pretrained(folder / "fusion").transform(vectors, collaborative)
    codes = ResidualKMeans.from_pretrained(folder / "codebooks").encode(fused)
    report = json.loads((folder / "semantic_ids.json").read_text())["collisions"]
    written = load_file(folder / "codes.safetensors")["codes"][:, :3]
    assert int((codes != written).any(axis=1).sum()) == report["moved_items"]


def test_text_alone_needs_no_interactions(data: Path, embeddings: Path) -> None:
    done = run(
        "build.py", "--embeddings", embeddings, "--out", data / "text", "--codebook-size", 4, "--collisions", "append"
    )
    assert done.returncode == 0, done.stderr
    described = json.loads((data / "text" / "semantic_ids.json").read_text())
    assert (described["split"], described["collisions"]["policy"]) == (None, "append")
    codes = load_file(data / "text" / "codes.safetensors")["codes"]
    assert codes[0, :3].tolist() == codes[1, :3].tolist()  # the twins
    assert codes[0, 3] < codes[1, 3]
    assert len(described["codebook_sizes"]) == 4
    assert Catalog.from_build(data / "text").title(40) == "only-here"
    assert not (data / "text" / "fusion").exists()


QUANTIZERS = {
    "rkmeans": ResidualKMeans,
    "rvq": ResidualVQ,
    "pq": ProductQuantizer,
    "opq": ProductQuantizer,
    "fsq": ScalarQuantizer,
    "hash": HashedCodes,
    "rqvae": RQVAE,
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_ends_with_unique_codes_of_its_own(data: Path, embeddings: Path, name: str) -> None:
    out = data / name
    own = {"fsq": ("--fsq-levels", 4, 3), "rqvae": ("--codebook-size", 8, "--epochs", 3)}
    flags = ("--quantizer", name, "--num-levels", 2, *own.get(name, ("--codebook-size", 8)))
    done = run("build.py", "--embeddings", embeddings, "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    assert f"{name}, 2 × {'[4, 3]' if name == 'fsq' else 8}\n" in done.stderr
    described = json.loads((out / "semantic_ids.json").read_text())
    assert described["quantizer"] == described["arguments"]["quantizer"] == name
    codes = load_file(out / "codes.safetensors")["codes"]
    assert len(np.unique(codes, axis=0)) == 41
    assert (codes < described["codebook_sizes"]).all()
    quantizer = QUANTIZERS[name].from_pretrained(out / "codebooks")
    store = EmbeddingStore.load(embeddings)
    vectors = store.rows(store.item_ids)
    fresh = quantizer.encode_ids(store.item_ids) if name == "hash" else quantizer.encode(vectors)
    moved = (fresh != codes[:, : fresh.shape[1]]).any(axis=1)
    assert int(moved.sum()) == described["collisions"]["moved_items"]
    assert Catalog.from_build(out).ids == store.item_ids
    assert not out.with_name(f"{name}.checkpoints").exists()


def test_options_of_residual_kmeans_and_sinkhorn_are_taken(data: Path, embeddings: Path) -> None:
    flags = ("--balanced", "True", "--normalise-residuals", "True", "--collisions", "sinkhorn", "--codebook-size", 8)
    done = run("build.py", "--embeddings", embeddings, "--out", data / "options", *flags)
    assert done.returncode == 0, done.stderr
    quantizer = ResidualKMeans.from_pretrained(data / "options" / "codebooks")
    assert (quantizer.balanced, quantizer.normalise_residuals) == (True, True)
    assert len(np.unique(load_file(data / "options" / "codes.safetensors")["codes"], axis=0)) == 41


def test_recipes_name_only_flags_that_exist(data: Path, embeddings: Path) -> None:
    for recipe in sorted((STAGE / "recipes").glob("*.yaml")):
        lines = recipe.read_text().splitlines()
        script = "embed.py" if recipe.name.startswith("embed") else "build.py"
        assert lines[0].startswith(f"# python semantic_ids/{script} --config semantic_ids/recipes/{recipe.name} ")
    for name in ("rkmeans_text_3x256", "rqvae_3x256", "opq_4x256", "fsq_4"):
        recipe = STAGE / "recipes" / f"{name}.yaml"
        quick = ("--epochs", 2) if name.startswith("rqvae") else ()
        done = run("build.py", "--config", recipe, "--embeddings", embeddings, "--out", data / name, *quick)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("embed.py", ("--items", "absent.csv", "--out", "x"), "error: "),
        ("embed.py", (*EMBED, "--vectors", "v.npy", "--vector-columns", "v"), "error: --vectors and --vector-columns"),
        ("embed.py", (*EMBED, "--vector-ids", "ids.txt"), "error: --vector-ids names the rows of --vectors"),
        ("embed.py", (*EMBED, "--with-text"), "error: --with-text belongs to --vector-columns"),
        ("embed.py", (*EMBED, "--vector-weights", "1"), "error: --vector-weights belongs to --vector-columns"),
        ("embed.py", (*EMBED, "--like", "x"), "error: --like belongs to --vector-columns"),
        (
            "embed.py",
            (*EMBED, "--vector-columns", "v", "--like", "x", "--vector-weights", "1"),
            "error: --like takes the older result's weights",
        ),
        ("embed.py", (*EMBED, "--dtype", "int4"), "--dtype"),
        ("embed.py", (*EMBED, "--max-tokens", "-1"), "error: --max-tokens is -1. Give at least 1"),
        ("embed.py", (*EMBED, "--vector-columns", "a", "b", "a"), "error: --vector-columns names 'a' twice"),
        ("build.py", ("--embeddings", "absent", "--out", "x"), "error: absent lacks embeddings.safetensors"),
        ("build.py", ("--embeddings", "absent"), "required: --out"),
        ("build.py", ("--embeddings", "absent", "--out", "x", "--levels", "3"), "--levels"),
    ],
)
def test_mistakes_end_with_a_message(script: str, arguments: tuple[str, ...], message: str) -> None:
    done = run(script, *arguments)
    assert done.returncode != 0
    assert message in done.stderr


def test_items_without_an_embedding_are_named(data: Path, embeddings: Path) -> None:
    (data / "more.csv").write_text("item_id,title\ni0,a\nnew,b\n")
    done = run("build.py", "--embeddings", embeddings, "--items", data / "more.csv", "--out", data / "more")
    assert done.returncode == 1
    assert done.stderr.startswith("error: 1 item(s) have no embedding: 'new'.")
    assert not (data / "more").exists()


@pytest.mark.parametrize("script", ["embed.py", "build.py"])
def test_help_has_examples_and_imports_no_torch(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(STAGE / script), "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert f"python semantic_ids/{script} --" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "sentence_transformers", "faiss", "sklearn"}
