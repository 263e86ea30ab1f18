"""What is compiled works where there is a place to keep it and where there is none."""

from collections.abc import Callable
from pathlib import Path

import numba
import pytest

from llmrec.scaling.compilation import compiled
from llmrec.scaling.suffix_automaton import earlier_matches


def test_without_a_place_to_keep_it_code_is_compiled_all_the_same() -> None:
    space: dict[str, Callable[[int], int]] = {}
    exec("def double(value):\n    return 2 * value", space)
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(cache=True)(space["double"])
    assert compiled(space["double"])(21) == 42


def test_it_is_kept_for_the_next_process(run_python, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "loops.py").write_text(
        "from llmrec.scaling.compilation import compiled\n\n\n@compiled\ndef double(value):\n    return 2 * value\n"
    )
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from loops import double
assert double(21) == 42
print(sum(double.stats.cache_hits.values()), sum(double.stats.cache_misses.values()))
"""
    variables = {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    assert run_python(code, **variables).stdout.split() == ["0", "1"]
    assert run_python(code, **variables).stdout.split() == ["1", "0"]


def test_what_imports_entropy_does_not_import_numba(run_python) -> None:  # type: ignore[no-untyped-def]
    done = run_python("import sys, llmrec.data.report, llmrec.scaling.quality; print('numba' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
    assert earlier_matches.__module__ == "llmrec.scaling.suffix_automaton"
