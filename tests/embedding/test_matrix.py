"""Matrices in files: the bytes of safetensors itself, every type of float, and never more than a block in memory."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from llmrec.embedding import matrix
from llmrec.embedding.matrix import (
    first_bad_row,
    map_npy,
    map_safetensors,
    matrix_sha256,
    new_matrix,
    temporary_matrix,
    write_matrix,
)
from llmrec.exceptions import DataError


@pytest.fixture
def numbers() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)


@pytest.mark.parametrize("block", [1, 20, 1 << 24])
@pytest.mark.parametrize("name", ["embeddings", "x", 'quoted "ü"'])
def test_the_file_has_the_bytes_that_safetensors_writes(numbers, tmp_path, monkeypatch, block: int, name: str) -> None:
    monkeypatch.setattr(matrix, "BLOCK_NUMBERS", block)
    write_matrix(tmp_path / "ours.safetensors", name, numbers)
    save_file({name: numbers}, tmp_path / "theirs.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    mapped = map_safetensors(tmp_path / "ours.safetensors", name)
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, numbers)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_nothing_is_written_and_read_too(tmp_path, shape) -> None:
    write_matrix(tmp_path / "empty.safetensors", "x", np.zeros(shape))
    assert load_file(tmp_path / "empty.safetensors")["x"].shape == shape
    assert map_safetensors(tmp_path / "empty.safetensors").shape == shape
    assert temporary_matrix(shape).shape == shape


def test_a_failure_leaves_no_file(tmp_path) -> None:
    def interrupted() -> None:
        with new_matrix(tmp_path / "x.safetensors", "x", (3, 4)) as written:
            written[:] = 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_room_is_reserved_before_anything_is_filled_in(tmp_path) -> None:
    with new_matrix(tmp_path / "x.safetensors", "x", (1000, 1000)):
        file = next(tmp_path.iterdir())
        assert os.stat(file).st_blocks * 512 >= 4_000_000


@pytest.mark.parametrize("block", [3, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_of_safetensors_becomes_float32(numbers, tmp_path, monkeypatch, dtype, block: int) -> None:
    monkeypatch.setattr(matrix, "BLOCK_NUMBERS", block)
    tensor = torch.from_numpy(numbers * 100).to(dtype)
    save_torch({"other": torch.zeros(3), "mine": tensor}, tmp_path / "x.safetensors")
    found = map_safetensors(tmp_path / "x.safetensors", "mine")
    assert found.dtype == np.dtype("<f4")
    np.testing.assert_array_equal(found, tensor.float().numpy())


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", ">f4", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_float_of_numpy_becomes_float32(numbers, tmp_path, monkeypatch, dtype: str, order: str) -> None:
    monkeypatch.setattr(matrix, "BLOCK_NUMBERS", 30)
    stored = np.asarray(numbers.astype(dtype), order=order)
    np.save(tmp_path / "x.npy", stored)
    found = map_npy(tmp_path / "x.npy")
    assert isinstance(found, np.memmap)
    assert found.dtype == np.dtype("<f4")
    np.testing.assert_array_equal(found, stored.astype(np.float32))


def test_conversion_and_writing_hold_a_block_in_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(matrix, "BLOCK_NUMBERS", 1 << 14)
    np.save(tmp_path / "x.npy", np.ones((20_000, 100), dtype=np.float16))
    tracemalloc.start()
    converted = map_npy(tmp_path / "x.npy")
    write_matrix(tmp_path / "x.safetensors", "x", converted)
    assert first_bad_row(map_safetensors(tmp_path / "x.safetensors")) == (-1, 0)
    matrix_sha256(converted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # of 8,000,000


def test_bad_rows_are_counted_across_blocks(monkeypatch) -> None:
    monkeypatch.setattr(matrix, "BLOCK_NUMBERS", 4)
    numbers = np.ones((9, 2))
    numbers[3, 1], numbers[4, 0], numbers[8] = np.nan, -np.inf, np.inf
    assert first_bad_row(numbers) == (3, 3)


def test_the_hash_is_of_the_numbers_and_their_shape(numbers, monkeypatch) -> None:
    known = matrix_sha256(numbers)
    monkeypatch.setattr(matrix, "BLOCK_NUMBERS", 1)
    assert matrix_sha256(np.asfortranarray(numbers)) == known
    assert len({known, matrix_sha256(numbers.reshape(7, 50)), matrix_sha256(numbers[::-1])}) == 3


class Marked:
    """Touches a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_what_is_no_matrix_of_floats_is_refused_and_nothing_unpickled(numbers, tmp_path) -> None:
    file = tmp_path / "x.npy"
    np.save(file, np.array([[Marked(tmp_path / "unpickled")]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"cannot be read as \.npy"):
        map_npy(file)
    assert not (tmp_path / "unpickled").exists()
    for array in (np.ones(3), np.ones((2, 2, 2)), np.ones((2, 2), dtype=int), np.array([["a"]])):
        np.save(file, array)
        with pytest.raises(DataError, match=r"no \(N, D\) matrix of floats"):
            map_npy(file)
    np.savez(tmp_path / "x.npz", numbers)
    with pytest.raises(DataError, match="holds an archive"):
        map_npy(tmp_path / "x.npz")
    for content in (b"", b"\x93NUMPY", b"text"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be read as \.npy"):
            map_npy(file)
    other = tmp_path / "x.safetensors"
    save_file({"whole": np.ones((2, 2), dtype=np.int64), "flat": np.ones(2), "good": numbers}, other)
    for name in ("whole", "flat"):
        with pytest.raises(DataError, match=r"no \(N, D\) matrix of floats"):
            map_safetensors(other, name)
    with pytest.raises(DataError, match=r"3 tensor.* none was named"):
        map_safetensors(other)
    with pytest.raises(DataError, match=r"there is no 'absent'\. Name one of '"):
        map_safetensors(other, "absent")
    other.write_bytes(other.read_bytes()[:-4])
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        map_safetensors(other, "good")
