"""A fit that two processes share, against the same fit by one. torch.distributed.run starts this file twice."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrec.exceptions import TokenizerError
from llmrec.quantization.rqvae import RQVAE, processes, training
from llmrec.quantization.rqvae.codebook import Codebook
from llmrec.script import leave_processes

SETTINGS = {"codebook_size": 8, "latent_dim": 4, "hidden": [12], "batch_size": 25, "epochs": 10, "num_levels": 2}
FITS = {
    "ema": {"revive_below": 0.4},
    "letter": {"update": "gradient", "alignment": 0.2, "diversity": 0.05, "diversity_clusters": 3, "num_levels": 1},
    # Batches of one row leave one of the processes without any.
    "uneven": {"batch_size": 1, "epochs": 2, "num_levels": 1},
}
OTHER = {**SETTINGS, "seed": 1, "epochs": 2}


def vectors_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    generator, rows = np.random.default_rng(0), 5 if name == "uneven" else 99
    vectors, collaborative = generator.normal(size=(rows, 6)), generator.normal(size=(rows, 3))
    collaborative[::4] = 0
    return vectors, collaborative


def fit(name: str, **arguments: object) -> RQVAE:
    quantizer = RQVAE(**{**SETTINGS, **FITS[name]})
    vectors, collaborative = vectors_of(name)
    return quantizer.fit(vectors, collaborative if quantizer.alignment else None, **arguments)


def main(folder: Path) -> None:
    """What each of the processes does."""
    logging.basicConfig()
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    reads: list[int] = []
    prepare = training.Processes.part

    def part(self: training.Processes, rows: np.ndarray) -> np.ndarray:
        mine = prepare(self, rows)
        reads.append(len(mine))
        return mine

    training.Processes.part = part
    for name in FITS:
        quantizer = fit(name, progress=name == "ema")
        np.savez(folder / f"{name}-{rank}.npz", **quantizer._weights)
        (folder / f"{name}-{rank}.json").write_text(json.dumps([quantizer.log, reads]))
        reads.clear()
    # A fit that all processes leave in the eighth epoch goes on from the checkpoint after the sixth.
    usage, epochs = training._usage, []

    def leave(uses: list, revived: list[int]) -> dict:
        epochs.append(1)
        if len(epochs) == 8:
            raise KeyboardInterrupt
        return usage(uses, revived)

    training._usage = leave
    try:
        fit("ema", checkpoints=folder / "checkpoints", checkpoint_epochs=3)
    except KeyboardInterrupt:
        epochs.clear()
    quantizer = fit("ema", checkpoints=folder / "checkpoints", checkpoint_epochs=3)
    assert len(epochs) == 4, epochs
    np.savez(folder / f"resumed-{rank}.npz", **quantizer._weights)
    # The checkpoint is of other settings now, of which one process warns; then only one process sees it.
    RQVAE(**OTHER).fit(vectors_of("ema")[0], checkpoints=folder / "checkpoints")
    try:
        seen = folder / ("checkpoints" if rank == "0" else "nowhere")
        RQVAE(**OTHER).fit(vectors_of("ema")[0], checkpoints=seen)
    except TokenizerError as error:
        (folder / f"unseen-{rank}.txt").write_text(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(folder)]
    # Without GPUs: accelerate would take each for the only process here, and the fit sees to it that it does not.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stderr").write_text(done.stderr)
    return folder


def weights(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", FITS)
def test_two_processes_learn_what_one_learns(folder: Path, name: str) -> None:
    alone = fit(name)
    first, second = weights(folder, f"{name}-0"), weights(folder, f"{name}-1")
    assert first.keys() == second.keys() == alone._weights.keys()
    for key, expected in alone._weights.items():
        assert first[key].tobytes() == second[key].tobytes(), key
        np.testing.assert_allclose(first[key], expected, atol=2e-5, err_msg=key)
    (log, reads), (other, rest) = (
        json.loads((folder / f"{name}-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)
    )
    assert log == other
    assert len(log) == len(alone.log)
    for entry, expected in zip(log, alone.log, strict=True):
        assert entry.keys() == expected.keys()
        assert entry["revived"] == expected["revived"]
        assert entry["used_share"] == expected["used_share"]
        for key in entry.keys() - {"revived", "used_share"}:
            np.testing.assert_allclose(entry[key], expected[key], rtol=1e-4, err_msg=key)
    # Each reads its part: of 99 rows in 4 batches 13 + 12 and 3 times the like, of single rows all or nothing.
    rows = len(vectors_of(name)[0])
    assert sum(reads) + sum(rest) == rows * len(log)
    assert sum(rest) == {"uneven": 0}.get(name, 48 * len(log))


def test_revival_took_part(folder: Path) -> None:
    log = json.loads((folder / "ema-0.json").read_text(encoding="utf-8"))[0]
    assert sum(sum(entry["revived"]) for entry in log) > 0


def test_an_interrupted_fit_is_resumed_by_all(folder: Path) -> None:
    whole = weights(folder, "ema-0")
    for rank in (0, 1):
        resumed = weights(folder, f"resumed-{rank}")
        assert all(resumed[key].tobytes() == whole[key].tobytes() for key in whole)


def test_one_process_speaks(folder: Path) -> None:
    said = (folder / "stderr").read_text(encoding="utf-8")
    assert said.count("is of other settings or embeddings") == 1
    assert said.count("5 items: codebooks have 5 codes, not 8") == 1
    assert said.count("0/10 [00:00<?") == 1  # one bar began


def test_a_checkpoint_that_not_all_see_is_an_error_everywhere(folder: Path) -> None:
    for rank, found in ((0, 2), (1, 0)):
        message = (folder / f"unseen-{rank}.txt").read_text(encoding="utf-8")
        assert message.startswith(f"Process {rank} found a checkpoint of {found} epochs, process 0")
        assert "Keep the checkpoints in a folder that all processes read" in message


def test_processes_that_accelerate_does_not_see_are_refused(run_python) -> None:
    program = f"""
from accelerate import Accelerator
Accelerator()
import os
os.environ["WORLD_SIZE"] = "2"
import numpy as np
from llmrec.quantization.rqvae import RQVAE
try:
    RQVAE(**{SETTINGS!r}).fit(np.eye(9))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = run_python(program, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.startswith("TokenizerError 2 processes were started, and accelerate was set up for 1"), done
    assert "Set ACCELERATE_USE_CPU=true" in done.stdout


def test_averages_of_parts_that_are_added_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    residuals, chosen = torch.randn(20, 3, generator=generator), torch.arange(20) % 4
    whole, shared = (Codebook(5, 3, decay=0.5) for _ in range(2))
    for codebook in (whole, shared):
        codebook.codes.fill_(1.0)
        codebook.counts.fill_(1.0)
        codebook.sums.fill_(1.0)
    whole.average(residuals, chosen)
    rest = torch.nn.functional.one_hot(chosen[7:], 5).float()
    others = torch.column_stack([rest.sum(dim=0), rest.T @ residuals[7:]])
    shared.average(residuals[:7], chosen[:7], lambda tensor: tensor + others)
    for name in ("codes", "counts", "sums"):
        torch.testing.assert_close(getattr(shared, name), getattr(whole, name))


def test_one_process_is_left_alone() -> None:
    alone = processes.Processes("no")
    tensor = torch.ones(3)
    assert alone.sum(tensor) is tensor
    assert alone.part(np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    assert alone.agree(7)
    assert (alone.number, alone.index, alone.first) == (1, 0, True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_processes()
