import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmrec.storage import atomic_folder, atomic_path, digest_of, digest_of_arrays, sha256_of, write_json


class BoomError(Exception):
    pass


def _write_and_fail(file: Path) -> None:
    file.write_text("torn")
    raise BoomError


def test_atomic_path_replaces_only_on_a_clean_exit(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    assert path.read_text() == "old"
    with pytest.raises(BoomError), atomic_path(path) as temporary:
        _write_and_fail(temporary)
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_atomic_folder_replaces_the_whole_folder_only_on_a_clean_exit(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        assert not path.exists()
    with pytest.raises(BoomError), atomic_folder(path) as temporary:
        _write_and_fail(temporary / "b")
    assert [file.relative_to(path).as_posix() for file in sorted(path.rglob("*"))] == ["sub", "sub/a"]
    with atomic_folder(path) as temporary:
        (temporary / "c").write_text("2")
    assert [file.name for file in path.iterdir()] == ["c"]
    assert [file.name for file in path.parent.iterdir()] == ["folder"]


def test_atomic_folder_clears_what_an_earlier_crash_left(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "x") as temporary:
        name = temporary.name
    (tmp_path / name).mkdir()
    (tmp_path / name / "leftover").touch()
    with atomic_folder(tmp_path / "x") as temporary:
        (temporary / "new").touch()
    assert [file.name for file in (tmp_path / "x").iterdir()] == ["new"]


def test_write_json_keeps_the_old_file_when_a_value_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"title": "Füße", "n": 1})
    assert "Füße" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == {"title": "Füße", "n": 1}
    for bad in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
    assert json.loads(path.read_text(encoding="utf-8"))["n"] == 1


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_of_reads_every_byte(tmp_path: Path, size: int) -> None:
    content = bytes(i * 31 % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "x").write_bytes(content[:size])
    assert sha256_of(tmp_path / "x") == hashlib.sha256(content[:size]).hexdigest()


def test_what_killed_processes_left_is_put_right(tmp_path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    half = tmp_path / f".folder.{gone.pid}.tmp"
    half.mkdir()
    (half / "torn").write_text("x")
    # Killed between its two renames: the old folder stands aside, and nothing under its name.
    aside = tmp_path / f".folder.{gone.pid}.old"
    aside.mkdir()
    (aside / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "folder"):
        1 / 0  # noqa: B018
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_digests_are_of_contents_and_of_names_inside(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "below").mkdir(parents=True)
        (folder / "below" / "a.bin").write_bytes(b"a")
    assert digest_of(one) == digest_of(str(two))
    (two / "below" / "a.bin").write_bytes(b"b")
    assert digest_of(one) != digest_of(two)
    (one / "below" / "a.bin").rename(one / "below" / "c.bin")
    (two / "below" / "a.bin").write_bytes(b"a")
    assert digest_of(one) != digest_of(two)
    assert digest_of(two / "below" / "a.bin") == sha256_of(one / "below" / "c.bin")
    assert digest_of("item-cf") != digest_of("other")


def test_digests_of_arrays_know_order_type_and_shape() -> None:
    numbers = np.arange(6)
    given = [
        [numbers, None],
        [None, numbers],
        [numbers],
        [numbers.reshape(2, 3), None],
        [numbers.astype(np.int32), None],
        [numbers[::-1], None],
    ]
    assert len({digest_of_arrays(arrays) for arrays in given}) == len(given)
    assert digest_of_arrays(given[0]) == digest_of_arrays([numbers.copy(), None])
