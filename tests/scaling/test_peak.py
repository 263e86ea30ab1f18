import time

import pytest
import torch

from llmrec.exceptions import DataError
from llmrec.scaling.peak import matmul_peak


def test_the_rate_is_operations_over_seconds(monkeypatch):
    """With a clock that goes on by a hundredth of a second at every look."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(time, "perf_counter", lambda: 0.01 * next(ticks))
    assert matmul_peak("cpu", "float32", seconds=0.1, size=16) == pytest.approx(2 * 16**3 / 0.01)


def test_products_are_of_the_type_that_is_asked_for(monkeypatch):
    seen = []
    plain = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *given, **more: seen.append(given[0]) or plain(*given, **more))
    for dtype in ("float32", "bfloat16"):
        assert matmul_peak("cpu", dtype, seconds=0.0, size=24) > 0
    assert [(each.dtype, tuple(each.shape)) for each in seen] == [
        *[(torch.float32, (24, 24))] * 3,
        *[(torch.bfloat16, (24, 24))] * 3,
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [(("cpu", "int8"), "Nothing trains in 'int8'"), (("nowhere",), "no device 'nowhere'")],
)
def test_what_cannot_be_measured(given, message):
    with pytest.raises(DataError, match=message):
        matmul_peak(*given, size=8)


def test_a_matrix_of_nothing():
    with pytest.raises(DataError, match="A matrix of 0 rows"):
        matmul_peak(size=0)
