"""Usage of codes, against counting one by one."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.diagnostics import code_counts, level_usage
from llmrec.exceptions import TokenizerError


def test_usage_by_hand() -> None:
    codes = np.array([[0, 1], [0, 1], [1, 1], [3, 1]])
    first, second = level_usage(codes, (4, 3))
    assert first == {
        "level": 1,
        "codebook_size": 4,
        "used": 3,
        "used_share": 0.75,
        "dead": 1,
        "perplexity": pytest.approx(2**1.5),
        "entropy_bits": pytest.approx(1.5),
        "largest_share": 0.5,
    }
    assert second == {
        "level": 2,
        "codebook_size": 3,
        "used": 1,
        "used_share": pytest.approx(1 / 3),
        "dead": 2,
        "perplexity": 1.0,
        "entropy_bits": 0.0,
        "largest_share": 1.0,
    }
    assert code_counts(codes, (4, 3)) == [[2, 1, 0, 1], [0, 4, 0]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_usage_is_the_definition(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    row = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    codes = np.array(data.draw(st.lists(row, min_size=1, max_size=40)), dtype=np.uint16)
    found = level_usage(codes, sizes)
    json.dumps(found, allow_nan=False)
    counts = code_counts(codes, sizes)
    for level, size in enumerate(sizes):
        times = Counter(codes[:, level].tolist())
        assert counts[level] == [times[code] for code in range(size)]
        entropy = -math.fsum(count / len(codes) * math.log(count / len(codes)) for count in times.values())
        assert found[level]["entropy_bits"] == pytest.approx(entropy / math.log(2), abs=1e-12)
        assert found[level]["perplexity"] == pytest.approx(math.exp(entropy))
        assert found[level]["largest_share"] == max(times.values()) / len(codes)
        assert (found[level]["used"], found[level]["dead"]) == (len(times), size - len(times))
        assert found[level]["used_share"] == len(times) / size


def test_even_use_has_the_codebooks_perplexity() -> None:
    (level,) = level_usage(np.arange(512)[:, None] % 256, [256])
    assert level["perplexity"] == 256
    assert level["dead"] == 0


@pytest.mark.parametrize(
    ("codes", "sizes", "message"),
    [
        (np.zeros((0, 2), np.int64), (3, 3), r"shape \(0, 2\) use nothing"),
        (np.zeros((3, 0), np.int64), (), r"shape \(3, 0\) use nothing"),
        (np.array([[0], [3]]), (3,), r"outside the codebooks of \[3\]"),
        (np.array([[0], [-1]]), (3,), r"row 1 \(\[-1\]\)"),
        (np.array([[0.0]]), (3,), "not whole numbers"),
        (np.array([[0, 1]]), (3,), "do not have 1 levels"),
    ],
)
def test_misuse_is_refused(codes: np.ndarray, sizes: tuple[int, ...], message: str) -> None:
    for function in (level_usage, code_counts):
        with pytest.raises(TokenizerError, match=message):
            function(codes, sizes)
