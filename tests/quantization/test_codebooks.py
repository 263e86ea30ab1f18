"""What quantizers share: checks, samples, means and files."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization.codebooks import (
    check_codes,
    check_positive,
    fitting_size,
    load_quantizer,
    means_of,
    require_fitted,
    sampled_rows,
    save_quantizer,
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_means_of_those_that_chose(data: st.DataObject) -> None:
    items, size = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    chosen = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=items, max_size=items)))
    generator = np.random.default_rng(items)
    vectors, codebook = generator.normal(size=(items, 3)), generator.normal(size=(size, 3)).astype(np.float32)
    before = codebook.copy()
    means = means_of(vectors, chosen, codebook)
    for code in range(size):
        members = vectors[chosen == code]
        np.testing.assert_allclose(means[code], members.mean(axis=0) if len(members) else codebook[code])
    np.testing.assert_array_equal(codebook, before)


def test_codes_are_checked() -> None:
    codes = check_codes(np.array([[0, 2], [1, 0]], dtype=np.uint8), [2, 3])
    assert (codes.dtype, codes.tolist()) == (np.dtype(np.int32), [[0, 2], [1, 0]])
    assert check_codes(np.empty((0, 2), dtype=np.int64), [3, 3]).shape == (0, 2)
    with pytest.raises(TokenizerError, match=r"2 row\(s\) .* \[2, 3\] entries, such as row 1 \(\[0, 3\]\)"):
        check_codes(np.array([[0, 0], [0, 3], [-1, 0]]), [2, 3])
    with pytest.raises(TokenizerError, match=r"2 row\(s\)"):
        check_codes(np.array([[2**40, 0], [0, -(2**40)]]), [2, 3])
    for codes, message in ((np.zeros((2, 3), int), "2 levels"), (np.zeros(2, int), "2 levels"), (np.eye(2), "whole")):
        with pytest.raises(TokenizerError, match=message):
            check_codes(codes, [2, 3])


def test_samples_are_ascending_and_seeded() -> None:
    np.testing.assert_array_equal(sampled_rows(10, 10, 0), np.arange(10))
    rows = sampled_rows(1000, 10, 0)
    assert (len(np.unique(rows)), rows.tolist()) == (10, sorted(rows.tolist()))
    assert rows.tolist() == sampled_rows(1000, 10, 0).tolist() != sampled_rows(1000, 10, 1).tolist()


def test_sizes_fit_the_catalog(caplog: pytest.LogCaptureFixture) -> None:
    assert (fitting_size(5, 5), fitting_size(5, 6)) == (5, 5)
    assert not caplog.text
    assert fitting_size(5, 4) == 4
    assert "4 items: codebooks have 4 codes, not 5" in caplog.text


def test_settings_and_state() -> None:
    check_positive(one=1, two=2)
    with pytest.raises(TokenizerError, match="two is 0"):
        check_positive(one=1, two=0)
    with pytest.raises(TokenizerError, match="no codebooks yet"):
        require_fitted(())


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float64).reshape(2, 3)
    save_quantizer(tmp_path / "new" / "folder", {"quantizer": "kind", "seed": 3}, {"turned": matrix.T})
    settings, tensors = load_quantizer(tmp_path / "new" / "folder", "kind")
    assert settings == {"seed": 3}
    np.testing.assert_array_equal(tensors["turned"], matrix.T)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"quantizer": 1}', "\udcff"])
def test_foreign_manifests_are_refused(tmp_path: Path, content: str) -> None:
    save_quantizer(tmp_path, {"quantizer": "kind"}, {"mean": np.zeros(2)})
    (tmp_path / "quantizer.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtefactError, match="holds no kind quantizer"):
        load_quantizer(tmp_path, "kind")


def test_a_failed_save_leaves_the_old_files(tmp_path: Path) -> None:
    save_quantizer(tmp_path, {"quantizer": "kind"}, {"mean": np.zeros(2)})
    with pytest.raises(ValueError, match="JSON"):
        save_quantizer(tmp_path, {"quantizer": "kind", "share": float("nan")}, {"mean": np.zeros(2)})
    assert load_quantizer(tmp_path, "kind")[0] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codebooks.safetensors", "quantizer.json"]
    assert json.loads((tmp_path / "quantizer.json").read_text())["quantizer"] == "kind"
