"""The Triton kernels, where Triton is installed: run on a GPU, or interpreted, and compiled for one without it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def run_pytest(tmp_path, file, interpret):
    # The kernels are bound to the interpreter when they are defined: both ways need a process of their own.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables |= {"TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        str(HERE / file),
    ]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this environment has no Triton")
@pytest.mark.parametrize("interpret", [True, False])
@pytest.mark.parametrize(
    ("file", "run", "compiled"), [("in_triton.py", 26, 14), ("in_triton_hstu.py", 38, 19)], ids=["search", "hstu"]
)
def test_kernels_are_their_definitions(tmp_path, file, run, compiled, interpret):
    if interpret and torch.cuda.is_available():
        pytest.skip("there is a GPU to run them")
    result = run_pytest(tmp_path, file, interpret)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = int(result.stdout.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1].split("\n")[-1])
    assert passed >= (run if interpret else compiled)
