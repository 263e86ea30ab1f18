import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llmrec.cli.main import app, main
from llmrec.evaluation.evaluation import Evaluation
from llmrec.evaluation.ranks import Ranks
from llmrec.exceptions import DataError


def save_run(folder: Path, system: str, depth: int, split: str = "ab" * 32) -> None:
    better = np.where(np.arange(120) % depth == 0, 0, -1).astype(np.int64)
    evaluation = Evaluation(
        system,
        [f"u{user}" for user in range(120)],
        ["i0"] * 120,
        Ranks(better, np.zeros(120, dtype=np.int64)),
        np.ones(120, dtype=bool),
        {"later_day": np.arange(120) < 40},
        (5, 10),
        {"split": split, "protocol": {"split": "leave-one-out"}, "part": "test", "items": 3, "invalid_rate": 0.0},
    )
    evaluation.save(folder, evaluation.document(resamples=10))


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    save_run(tmp_path / "base", "item-cf", 4)
    save_run(tmp_path / "ours", "[red]ours", 2)
    return [str(tmp_path / "base"), str(tmp_path / "ours")]


def test_the_card_is_printed_and_written(folders: list[str], tmp_path: Path) -> None:
    out = tmp_path / "card"
    result = CliRunner().invoke(app, ["compare", *folders, "--out", str(out), "--resamples", "200"])
    assert result.exit_code == 0, result.output
    assert "[red]ours" in result.output  # a name is no markup
    assert "later_day" in result.output
    assert "0.5000 [" in result.output
    assert "▲" in result.output
    assert sorted(path.name for path in out.iterdir()) == ["card.html", "card.json", "card.md"]
    card = json.loads((out / "card.json").read_text())
    assert [system["metrics"]["HR@10"]["mean"] for system in card["systems"]] == [0.5, 0.25]
    assert (card["resamples"], card["seed"], card["reference"]) == (200, 0, "item-cf")


def test_options_reach_the_comparison_and_nothing_is_written_without_out(folders: list[str], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    args = ["--metrics", "MRR@10, HR@5", "--reference", "[red]ours", "--seed", "5", "--resamples", "50"]
    result = CliRunner().invoke(app, ["compare", *folders, *args])
    assert result.exit_code == 0, result.output
    assert "MRR@10" in result.output
    assert "NDCG" not in result.output
    assert "[red]ours (reference)" in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_of_different_splits_end_with_code_2_and_both_hashes(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "other", "ours", 2, split="cd" * 32)
    arguments = ["llmrec", "compare", folders[0], str(tmp_path / "other"), "--out", str(tmp_path / "card")]
    monkeypatch.delenv("LLMREC_DEBUG", raising=False)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert "abababababab" in error
    assert "cdcdcdcdcdcd" in error
    assert not (tmp_path / "card").exists()
    monkeypatch.setenv("LLMREC_DEBUG", "1")
    with pytest.raises(DataError):
        main()


def test_a_comparison_needs_no_deep_learning(folders: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
sys.argv = ["llmrec", "compare", *{folders!r}, "--out", {str(tmp_path / "card")!r}, "--resamples", "20"]
from llmrec.cli.main import main
try:
    main()
finally:
    print("HEAVY", sorted({{"torch", "transformers", "vllm", "datasets", "sklearn", "faiss"}} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.strip().endswith("HEAVY []"), result.stdout + result.stderr
    assert (tmp_path / "card" / "card.html").is_file()
