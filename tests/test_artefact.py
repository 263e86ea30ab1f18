import json
import os
from pathlib import Path

import pytest

from llmrec.artefact import (
    MANIFEST,
    listed_files,
    push_to_hub,
    resolve,
    verify_manifest,
    weights_hash,
    write_manifest,
)
from llmrec.exceptions import ArtefactError
from llmrec.storage import sha256_of


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    folder = tmp_path / "artefact"
    (folder / "catalog").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 9)
    (folder / "catalog" / "codes.safetensors").write_bytes(b"codes")
    (folder / "catalog" / "items [1].jsonl").write_text('{"item_id": "a"}\n')
    (folder / "README.md").write_text("# a card")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.json").write_text("{}")
    write_manifest(folder)
    return folder


def _edit(folder: Path, **changes: object) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | changes))


def test_manifest_lists_every_file_but_itself_hidden_ones_and_the_card(artefact: Path) -> None:
    files = json.loads((artefact / MANIFEST).read_text())["files"]
    assert list(files) == ["catalog/codes.safetensors", "catalog/items [1].jsonl", "config.json", "model.safetensors"]
    # From another implementation: printf codes | sha256sum
    digest = "64a7994c6feb92d40f0c88d34e120cf1a01b6e36af329ab2f2444a8c0e4a2043"
    assert files["catalog/codes.safetensors"] == {"sha256": digest, "bytes": 5}
    assert [entry["bytes"] for entry in files.values()] == [5, 17, 23, 2304]
    verify_manifest(artefact)


def test_manifest_is_the_same_when_written_again(artefact: Path) -> None:
    before = (artefact / MANIFEST).read_bytes()
    write_manifest(artefact)
    assert (artefact / MANIFEST).read_bytes() == before


def test_manifest_needs_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match="holds no files"):
        write_manifest(tmp_path / "empty")
    with pytest.raises(ArtefactError, match="is no folder"):
        write_manifest(tmp_path / "absent")


def test_missing_file_is_named(artefact: Path) -> None:
    (artefact / "catalog" / "codes.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"catalog/codes\.safetensors is missing.*again"):
        verify_manifest(artefact)


@pytest.mark.parametrize("deep", [True, False])
def test_truncated_file_is_named_with_its_sizes(artefact: Path, deep: bool) -> None:
    os.truncate(artefact / "model.safetensors", 2303)
    with pytest.raises(ArtefactError, match=r"model\.safetensors is truncated: it has 2303 bytes, and .* says 2304"):
        verify_manifest(artefact, deep=deep)


def test_longer_file_is_altered(artefact: Path) -> None:
    with (artefact / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ArtefactError, match=r"config\.json was altered: it has 24 bytes"):
        verify_manifest(artefact, deep=False)


def test_one_flipped_bit_is_found_when_deep(artefact: Path) -> None:
    content = bytearray((artefact / "model.safetensors").read_bytes())
    content[1000] ^= 1
    (artefact / "model.safetensors").write_bytes(content)
    verify_manifest(artefact, deep=False)
    with pytest.raises(ArtefactError, match=r"model\.safetensors was altered: its sha256"):
        verify_manifest(artefact)


@pytest.mark.parametrize("name", ["notes.txt", "metrics.json", "checkpoint-5/model.safetensors", ".cache/x.py"])
def test_unlisted_file_that_no_loader_reads_is_ignored(artefact: Path, name: str) -> None:
    (artefact / name).parent.mkdir(exist_ok=True)
    (artefact / name).write_text("x")
    verify_manifest(artefact)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "pytorch_model.bin", "modeling_x.py", "catalog/more.safetensors", "llmrec.json"]
)
def test_unlisted_file_that_a_loader_reads_is_refused(artefact: Path, name: str) -> None:
    (artefact / name).write_text("x")
    with pytest.raises(ArtefactError, match=rf"{name} is not in {MANIFEST}"):
        verify_manifest(artefact)


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "", ".", "a//b", "a/", "./a", "a\\..\\b", "C:/x", "a\0b", MANIFEST],
)
def test_manifest_with_a_name_outside_is_refused_before_any_file_is_read(artefact: Path, name: str) -> None:
    (artefact.parent / "x").write_text("x")
    _edit(artefact, files={name: {"sha256": sha256_of(artefact.parent / "x"), "bytes": 1}})
    with pytest.raises(ArtefactError, match="outside the artefact's folder"):
        verify_manifest(artefact)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no manifest"),
        ("[]", "is no manifest"),
        ('{"version": 1}', "is no manifest"),
        ('{"version": 1, "files": ["a"]}', "is no manifest"),
        ('{"version": 1, "files": {"a": 3}}', "is no manifest"),
        ('{"version": 2, "files": {"a": {"sha256": "", "bytes": 1}}}', "version 2"),
        ('{"version": 1, "files": {}}', "lists no files"),
        ('{"version": 1, "files": {"a": {"sha256": "00", "bytes": 1}}}', "no valid sha256"),
        ('{"version": 1, "files": {"a": {"sha256": "%s", "bytes": -1}}}' % ("0" * 64), "no valid sha256"),
        ('{"version": 1, "files": {"a": {"sha256": "%s", "bytes": true}}}' % ("0" * 64), "no valid sha256"),
    ],
)
def test_broken_manifest_is_named(artefact: Path, content: str, message: str) -> None:
    (artefact / MANIFEST).write_text(content)
    with pytest.raises(ArtefactError, match=message):
        verify_manifest(artefact)


def test_missing_manifest_means_unfinished(artefact: Path) -> None:
    (artefact / MANIFEST).unlink()
    with pytest.raises(ArtefactError, match="unfinished"):
        verify_manifest(artefact)


def test_resolve_takes_a_local_folder(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(artefact) == artefact
    monkeypatch.chdir(artefact.parent)
    assert resolve("artefact") == Path("artefact")
    with pytest.raises(ArtefactError, match="has no revision 'v1'"):
        resolve(artefact, revision="v1")
    with pytest.raises(ArtefactError, match="is a file"):
        resolve(artefact / "config.json")
    (artefact / "config.json").unlink()
    with pytest.raises(ArtefactError, match=r"config\.json is missing"):
        resolve(artefact)


@pytest.mark.parametrize("name", ["/no/such/folder", "./absent", "a/b/c", "a b", "runs/quickstart/artefact"])
def test_resolve_says_that_a_path_is_neither_folder_nor_repository(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # a checkout in which the quickstart ran has the last of them
    with pytest.raises(ArtefactError, match="cannot be a Hub repository's id"):
        resolve(name)


RESOLVE = "from llmrec.artefact import resolve; print(resolve({!r}, revision={!r}))"
PUSH = "from llmrec.artefact import push_to_hub; print(push_to_hub({!r}, {!r}, private={!r}, revision={!r}))"


def test_resolve_downloads_from_the_hub_and_then_works_offline(artefact, fake_hub, run_python, tmp_path) -> None:
    fake_hub.put("me/rec", artefact)
    variables = fake_hub.variables(tmp_path / "home")
    result = run_python(RESOLVE.format("me/rec", None), **variables)
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home")
    for name in ("config.json", "model.safetensors", "catalog/items [1].jsonl", MANIFEST):
        assert (folder / name).read_bytes() == (artefact / name).read_bytes()

    asked = len(fake_hub.requests)
    offline = run_python(RESOLVE.format("me/rec", None), **variables | {"HF_HUB_OFFLINE": "1"})
    assert offline.stdout == result.stdout
    assert len(fake_hub.requests) == asked


def test_resolve_takes_the_revision_that_was_asked_for(artefact, fake_hub, run_python, tmp_path) -> None:
    fake_hub.put("me/rec", artefact)
    (artefact / "config.json").write_text('{"model_type": "gpt2"}')
    write_manifest(artefact)
    fake_hub.put("me/rec", artefact, branch="v2")
    result = run_python(RESOLVE.format("me/rec", "v2"), **fake_hub.variables(tmp_path / "home"))
    assert "gpt2" in (Path(result.stdout.strip()) / "config.json").read_text()


def test_resolve_verifies_what_came_from_the_hub(artefact, fake_hub, run_python, tmp_path) -> None:
    fake_hub.put("me/rec", artefact)
    fake_hub.repos["me/rec"]["main"]["model.safetensors"] = b"other"
    result = run_python(RESOLVE.format("me/rec", None), **fake_hub.variables(tmp_path / "home"))
    assert result.returncode == 1
    assert "ArtefactError" in result.stderr
    assert "model.safetensors is truncated" in result.stderr


@pytest.mark.parametrize(
    ("repo_id", "revision", "offline", "message"),
    [
        ("me/absent", None, "0", "no such repository"),
        ("me/rec", "v9", "0", "has no revision 'v9'"),
        ("me/rec", None, "1", "cache does not hold that repository"),
    ],
)
def test_resolve_says_what_the_hub_lacks(
    artefact, fake_hub, run_python, tmp_path, repo_id, revision, offline, message
) -> None:
    fake_hub.put("me/rec", artefact)
    variables = fake_hub.variables(tmp_path / "home") | {"HF_HUB_OFFLINE": offline}
    result = run_python(RESOLVE.format(repo_id, revision), **variables)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("llmrec.exceptions.ArtefactError")
    assert message in last


def test_resolve_says_that_the_hub_is_out_of_reach(fake_hub, run_python, tmp_path) -> None:
    variables = fake_hub.variables(tmp_path / "home") | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    last = run_python(RESOLVE.format("me/rec", None), **variables).stderr.strip().splitlines()[-1]
    assert last.startswith("llmrec.exceptions.ArtefactError")
    assert "out of reach" in last


def test_push_uploads_the_artefact_and_resolve_brings_it_back(artefact, fake_hub, run_python, tmp_path) -> None:
    (artefact / "notes.log").write_text("not listed, so it stays here")
    variables = fake_hub.variables(tmp_path / "home")
    pushed = run_python(PUSH.format(str(artefact), "me/rec", True, None), **variables)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith(f"{fake_hub.endpoint}/me/rec/commit/")
    assert fake_hub.private["me/rec"] is True
    assert fake_hub.commits == ["Upload the artefact artefact"]
    listed = set(json.loads((artefact / MANIFEST).read_text())["files"])
    assert set(fake_hub.repos["me/rec"]["main"]) == listed | {MANIFEST, "README.md"}

    back = run_python(RESOLVE.format("me/rec", None), **variables)
    assert (Path(back.stdout.strip()) / "model.safetensors").read_bytes() == bytes(range(256)) * 9


def test_push_removes_the_earlier_version_s_model_files_but_no_others(
    artefact, fake_hub, run_python, tmp_path
) -> None:
    earlier = {"model-00001-of-00002.safetensors": b"1", "catalog/old.jsonl": b"2", "plot.png": b"3"}
    fake_hub.repos["me/rec"] = {"main": dict(earlier)}
    pushed = run_python(PUSH.format(str(artefact), "me/rec", None, None), **fake_hub.variables(tmp_path / "home"))
    assert pushed.returncode == 0, pushed.stderr
    left = set(fake_hub.repos["me/rec"]["main"])
    assert left & set(earlier) == {"plot.png"}
    assert "model.safetensors" in left


def test_push_to_a_new_branch_leaves_main(artefact, fake_hub, run_python, tmp_path) -> None:
    pushed = run_python(PUSH.format(str(artefact), "me/rec", None, "v2"), **fake_hub.variables(tmp_path / "home"))
    assert pushed.returncode == 0, pushed.stderr
    assert "model.safetensors" in fake_hub.repos["me/rec"]["v2"]
    assert fake_hub.repos["me/rec"]["main"] == {}


def test_push_says_when_the_hub_refuses(artefact, fake_hub, run_python, tmp_path) -> None:
    variables = fake_hub.variables(tmp_path / "home")
    for changes, repo_id, message in (
        ({}, "forbidden/rec", "refused the upload"),
        ({"HF_TOKEN": "hf_wrong"}, "me/rec", "refused the upload"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "me/rec", "could not be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "me/rec", "could not be reached"),
    ):
        result = run_python(PUSH.format(str(artefact), repo_id, None, None), **variables | changes)
        errors = [line for line in result.stderr.splitlines() if line.startswith("llmrec.exceptions.ArtefactError")]
        assert errors, result.stderr
        assert message in errors[-1]
    assert fake_hub.repos == {}


def test_push_refuses_a_broken_artefact_before_it_asks_the_hub(artefact: Path) -> None:
    (artefact / "config.json").unlink()
    with pytest.raises(ArtefactError, match=r"config\.json is missing"):
        push_to_hub(artefact, "me/rec")


def test_resolve_says_that_a_repository_is_gated(artefact, fake_hub, run_python, tmp_path) -> None:
    """As the Hub does it: what there is may be listed by anyone, and read by those with access."""
    fake_hub.put("me/rec", artefact)
    find = fake_hub.find

    def gated(repo_id: str, revision: str):
        return "GatedRepo" if "/resolve/" in fake_hub.requests[-1] else find(repo_id, revision)

    fake_hub.find = gated
    result = run_python(RESOLVE.format("me/rec", None), **fake_hub.variables(tmp_path / "home"))
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("llmrec.exceptions.ArtefactError")
    assert "is gated" in last
    assert f"Ask for access at {fake_hub.endpoint}/me/rec and log in" in last


def test_revisions_stay_pinned_offline(artefact, fake_hub, run_python, tmp_path) -> None:
    fake_hub.put("me/rec", artefact)
    first = fake_hub.sha(fake_hub.repos["me/rec"]["main"])
    variables = fake_hub.variables(tmp_path / "home")
    code = "from llmrec.artefact import resolve\nfor revision in {!r}: print(resolve('me/rec', revision=revision))"
    assert run_python(code.format([None]), **variables).returncode == 0
    (artefact / "config.json").write_text('{"model_type": "gpt2"}')
    write_manifest(artefact)
    fake_hub.put("me/rec", artefact)
    fake_hub.put("me/rec", artefact, branch="v2")
    assert run_python(code.format([None, "v2"]), **variables).returncode == 0
    asked = len(fake_hub.requests)
    offline = run_python(code.format([first, None, "v2"]), **variables | {"HF_HUB_OFFLINE": "1"})
    kinds = [json.loads((Path(line) / "config.json").read_text())["model_type"] for line in offline.stdout.split()]
    assert kinds == ["llama", "gpt2", "gpt2"]
    absent = run_python(code.format(["v9"]), **variables | {"HF_HUB_OFFLINE": "1"}).stderr.strip().splitlines()[-1]
    assert "cache does not hold that repository at revision 'v9', which HF_HUB_OFFLINE forbids to download" in absent
    assert len(fake_hub.requests) == asked


def test_a_card_given_replaces_the_folder_s_own_in_the_upload(artefact, fake_hub, run_python, tmp_path) -> None:
    code = f"from llmrec.artefact import push_to_hub; push_to_hub({str(artefact)!r}, 'me/rec', card='# given')"
    pushed = run_python(code, **fake_hub.variables(tmp_path / "home"))
    assert pushed.returncode == 0, pushed.stderr
    files = fake_hub.repos["me/rec"]["main"]
    assert files["README.md"] == b"# given"
    assert files["catalog/items [1].jsonl"] == (artefact / "catalog" / "items [1].jsonl").read_bytes()
    assert (artefact / "README.md").read_text() == "# a card"


def test_weights_have_a_hash_that_follows_them_alone(artefact: Path) -> None:
    assert listed_files(artefact)["model.safetensors"] == 2304
    before = weights_hash(artefact)
    (artefact / "config.json").write_text("{}")
    (artefact / "catalog" / "codes.safetensors").write_bytes(b"other")
    write_manifest(artefact)
    assert weights_hash(artefact) == before
    (artefact / "model.safetensors").write_bytes(b"other")
    write_manifest(artefact)
    assert weights_hash(artefact) != before
    (artefact / "model.safetensors").unlink()
    write_manifest(artefact)
    with pytest.raises(ArtefactError, match="lists no weights and no tokenizer"):
        weights_hash(artefact)


def test_a_template_of_a_task_that_the_manifest_does_not_know_is_refused(tmp_path):
    (tmp_path / "prompts" / "search").mkdir(parents=True)
    (tmp_path / "prompts" / "search" / "plain.jinja").write_text("{{ query }}\n")
    write_manifest(tmp_path)
    verify_manifest(tmp_path)
    (tmp_path / "prompts" / "preference").mkdir()
    (tmp_path / "prompts" / "preference" / "mine.jinja").write_text("{{ preference }}\n")
    with pytest.raises(ArtefactError, match=r"mine\.jinja is not in"):
        verify_manifest(tmp_path)
