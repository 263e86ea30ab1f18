"""The training loop: what a batch sees, the log, revival, resuming after a kill."""

import signal

import numpy as np
import pytest
import torch

from llmrec.exceptions import TokenizerError
from llmrec.quantization.rqvae import RQVAE, training
from llmrec.quantization.rqvae.checkpoint import FILE, Checkpoint
from llmrec.quantization.rqvae.model import Network

SMALL = {"codebook_size": 8, "latent_dim": 4, "hidden": (12,), "batch_size": 32, "epochs": 12, "num_levels": 2}


def embeddings(rows: int = 100, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width))


def same(left: RQVAE, right: RQVAE) -> bool:
    names = left._weights.keys()
    return names == right._weights.keys() and all(
        left._weights[name].tobytes() == right._weights[name].tobytes() for name in names
    )


def run(network: Network, read, rows: int, **changes) -> list[dict]:
    settings = {"epochs": 4, "warmup_epochs": 1, "batch_size": 8, "learning_rate": 1e-2, "commitment": 0.25}
    settings |= {"placing_rows": 64, "revive_below": 0.05, "seed": 0, **changes}
    return training.train(network, read, rows, **settings)


def test_every_epoch_reads_every_row_once_in_an_order_of_its_own() -> None:
    data = torch.from_numpy(embeddings(21)).float()
    seen: list[np.ndarray] = []

    def read(rows: np.ndarray) -> torch.Tensor:
        seen.append(rows)
        return data[rows]

    run(Network(6, (5,), 3, 1, 4), read, 21, epochs=2, warmup_epochs=0, revive_below=0)
    batches = seen[-6:]  # before them, k-means asked for rows
    assert [len(rows) for rows in batches] == [7] * 6
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(21))
    assert first.tolist() != second.tolist()


def test_the_log_has_an_entry_an_epoch_and_no_codes_while_the_autoencoder_is_plain() -> None:
    log = RQVAE(**SMALL, seed=1).fit(embeddings()).log
    assert [entry["epoch"] for entry in log] == list(range(1, 13))
    assert log[0]["used_share"] == log[0]["perplexity"] == log[0]["revived"] == []
    assert log[0]["loss"] == log[0]["reconstruction"]
    for entry in log[1:]:
        assert len(entry["used_share"]) == len(entry["perplexity"]) == len(entry["revived"]) == 2
        assert all(1 <= perplexity <= 8.001 for perplexity in entry["perplexity"])
        assert entry["loss"] == pytest.approx(entry["reconstruction"] + 0.25 * entry["commitment"], rel=1e-5)
    assert log[-1]["revived"] == [0, 0]
    assert log[-1]["reconstruction"] < log[1]["reconstruction"] < 1.5


def test_usage_by_hand() -> None:
    usage = training._usage([torch.tensor([6.0, 2.0, 0.0, 0.0]), torch.tensor([1.0, 1.0])], [2, 0])
    assert usage["used_share"] == [0.5, 1.0]
    assert usage["revived"] == [2, 0]
    np.testing.assert_allclose(usage["perplexity"], [0.75**-0.75 * 0.25**-0.25, 2.0])


def test_dead_codes_move_to_residuals_of_random_rows() -> None:
    torch.manual_seed(0)
    network = Network(3, (), 3, num_levels=2, size=4)
    before = [level.codes.copy_(torch.randn(4, 3)).clone() for level in network.quantizer.levels]
    data = torch.randn(40, 3)
    # An even share is 10 rows; below 2 is dead: codes 1 and 3 of level 0, code 0 of level 1.
    uses = [torch.tensor([20.0, 0.0, 19.0, 1.0]), torch.tensor([1.9, 2.0, 30.0, 6.1])]
    residuals = network.quantizer(network.encoder(data)).residuals.detach()
    assert training._revive(network, lambda rows: data[rows], 40, uses, 0.2, 0, 5) == [2, 1]
    origins = []
    for level, (dead, old) in enumerate(zip([[1, 3], [0]], before, strict=True)):
        codes = network.quantizer.levels[level].codes
        for code in range(4):
            if code in dead:
                distances = (residuals[level] - codes[code]).abs().amax(dim=1)
                assert float(distances.min()) < 1e-6
                origins.append(int(distances.argmin()))
            else:
                assert torch.equal(codes[code], old[code])
    assert len(set(origins)) == 3  # a row revives one code only
    assert training._revive(network, lambda rows: data[rows], 40, uses, 0.0, 0, 5) == [0, 0]


def test_revival_keeps_a_collapsed_start_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    # k-means is replaced by the worst start, all codes but one far away from everything.
    def far_away(codebook, residuals, rows_per_batch, seed) -> None:
        codebook.codes.fill_(1e3)
        codebook.codes[0] = 0
        codebook.counts.fill_(1.0)
        codebook.sums.copy_(codebook.codes)

    monkeypatch.setattr("llmrec.quantization.rqvae.codebook.Codebook.place", far_away)
    vectors = embeddings(200)
    collapsed = RQVAE(**SMALL, revive_below=0).fit(vectors).encode(vectors)
    revived = RQVAE(**SMALL).fit(vectors).encode(vectors)
    assert [len(np.unique(level)) for level in collapsed.T] == [1, 1]
    assert [len(np.unique(level)) for level in revived.T] == [8, 8]


@pytest.mark.parametrize(
    "changes", [{}, {"estimator": "rotation"}, {"update": "gradient"}, {"mixed_precision": "no", "revive_below": 0.5}]
)
def test_two_fits_are_bit_identical_and_the_seed_matters(changes: dict) -> None:
    vectors = embeddings()
    first, again, other = (RQVAE(**{**SMALL, **changes, "seed": seed}).fit(vectors) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    assert first.log == again.log
    np.testing.assert_array_equal(first.encode(vectors), again.encode(vectors))


def test_the_surroundings_random_numbers_do_not_matter_and_are_not_touched() -> None:
    torch.manual_seed(1)
    first = RQVAE(**SMALL).fit(embeddings())
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(first, RQVAE(**SMALL).fit(embeddings()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("killed_after", [1, 2, 7, 12])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_resumed_fit_ends_with_the_same_weights(tmp_path, monkeypatch, killed_after: int, update: str) -> None:
    vectors, settings = embeddings(), {**SMALL, "update": update, "revive_below": 0.3}
    whole = RQVAE(**settings).fit(vectors)
    save = Checkpoint.save

    def save_and_die(self, network, optimizer, progress) -> None:
        save(self, network, optimizer, progress)
        if len(progress["log"]) == killed_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        RQVAE(**settings).fit(vectors, checkpoints=tmp_path, checkpoint_epochs=1)
    monkeypatch.setattr(Checkpoint, "save", save)
    epochs: list[int] = []
    order = np.random.default_rng
    monkeypatch.setattr(
        training.np.random, "default_rng", lambda seed: (epochs.append(seed[2]) if seed[1] == 0 else 0, order(seed))[1]
    )
    resumed = RQVAE(**settings).fit(vectors, checkpoints=tmp_path)
    assert epochs == list(range(killed_after, 12))
    assert same(whole, resumed)
    assert whole.log == resumed.log


def test_a_killed_process_is_resumed(tmp_path, run_python) -> None:
    program = f"""
import os, signal
import numpy as np
from llmrec.quantization.rqvae import RQVAE, checkpoint
write = checkpoint.save_file
def torn(tensors, path, metadata):
    write(tensors, path, metadata)
    if '"epoch": 6' in metadata["progress"]:
        with open(path, "r+b") as file:
            file.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = torn
vectors = np.random.default_rng(0).normal(size=(100, 6))
RQVAE(**{SMALL!r}).fit(vectors, checkpoints={str(tmp_path)!r}, checkpoint_epochs=2)
"""
    done = run_python(program)
    assert done.returncode == -signal.SIGKILL, done.stderr
    settings = RQVAE(**SMALL)
    checkpoint = Checkpoint(tmp_path, settings._run(embeddings()))
    network = Network(6, (12,), 4, 2, 8, settings.estimator)
    progress = checkpoint.load(network, torch.optim.Adam(network.parameters()))
    assert [entry["epoch"] for entry in progress["log"]] == [1, 2, 3, 4]
    assert same(settings.fit(embeddings(), checkpoints=tmp_path), RQVAE(**SMALL).fit(embeddings()))


def test_checkpoints_of_other_runs_and_torn_ones_are_passed_over(tmp_path, caplog) -> None:
    whole = RQVAE(**SMALL).fit(embeddings(), checkpoints=tmp_path)
    for other, vectors in ((RQVAE(**SMALL, seed=1), embeddings()), (RQVAE(**SMALL), embeddings(seed=9))):
        fresh = RQVAE(**other.settings).fit(vectors)
        assert same(other.fit(vectors, checkpoints=tmp_path), fresh)
        assert "is of other settings or embeddings" in caplog.text
        caplog.clear()
    content = (tmp_path / FILE).read_bytes()
    for torn in (content[: len(content) // 2], b"", b"PK" * 500):
        (tmp_path / FILE).write_bytes(torn)
        assert same(RQVAE(**SMALL).fit(embeddings(), checkpoints=tmp_path), whole)
        assert "cannot be resumed from" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_loss_that_is_no_number_is_an_error_that_says_what_to_do(update: str) -> None:
    with pytest.raises(TokenizerError, match=r"loss is (nan|inf) in epoch \d+\. Fit with a smaller learning rate"):
        RQVAE(**SMALL, learning_rate=1e30, update=update).fit(embeddings())


def test_half_precision_is_refused_where_accelerate_refuses_it(run_python) -> None:
    if torch.cuda.is_available():
        pytest.skip("fp16 runs on a GPU")
    program = f"""
import numpy as np
from llmrec.quantization.rqvae import RQVAE
vectors = np.random.default_rng(0).normal(size=(100, 6))
quantizer = RQVAE(**{SMALL!r}, learning_rate=0.02, mixed_precision="bf16").fit(vectors)
assert quantizer._weights["encoder.0.weight"].dtype == np.float32
error = ((vectors - quantizer.decode(quantizer.encode(vectors))) ** 2).mean()
assert error < 0.8, error
try:
    RQVAE(**{SMALL!r}, mixed_precision="fp16").fit(vectors)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("TokenizerError accelerate cannot run with mixed_precision 'fp16' here")
