"""LETTER's losses against their formulas in float64, and what they do to codes."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import TokenizerError
from llmrec.quantization.rqvae import RQVAE
from llmrec.quantization.rqvae.alignment import (
    Alignment,
    Signals,
    alignment_loss,
    code_clusters,
    collaborative_signals,
    diversity_loss,
    draw_positives,
)
from llmrec.quantization.rqvae.model import Network
from llmrec.quantization.rqvae.training import schedule

SMALL = {"codebook_size": 8, "latent_dim": 4, "hidden": (12,), "batch_size": 32, "epochs": 12, "num_levels": 2}


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def contrast(point: np.ndarray, others: np.ndarray, own: int) -> float:
    """-log (exp <z, h_own> / Σ exp <z, h_j>) as it stands."""
    return float(-np.log(np.exp(point @ others[own]) / sum(np.exp(point @ other) for other in others)))


@pytest.mark.parametrize("seed", range(4))
def test_the_alignment_loss_by_its_formula(seed: int) -> None:
    points, signals, places = numbers(5, 3, seed=seed), numbers(7, 3, seed=seed + 9), np.array([6, 0, 3, 3, 1])
    expected = sum(contrast(point, signals, place) for point, place in zip(points, places, strict=True))
    found = alignment_loss(*(torch.from_numpy(array) for array in (points, signals, places)))
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_diversity_loss_by_its_formula(seed: int) -> None:
    codes = numbers(6, 3, seed=seed)
    chosen, positives = np.array([2, 0, 2, 5, 4]), np.array([1, 3, 4, -1, 0])
    expected = 0.0
    for c, p in zip(chosen, positives, strict=True):
        if p >= 0:
            below = sum(np.exp(codes[c] @ codes[j]) for j in range(6) if j != c)
            expected -= float(np.log(np.exp(codes[c] @ codes[p]) / below))
    leaf = torch.from_numpy(codes).requires_grad_()
    found = diversity_loss(leaf, torch.from_numpy(chosen), torch.from_numpy(positives))
    assert float(found.detach()) == pytest.approx(expected, rel=1e-12)
    found.backward()
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad.abs().sum(dim=1) > 0).all()  # the chosen, their positives and all others move


def test_a_single_code_has_no_diversity() -> None:
    loss = diversity_loss(torch.ones(1, 3), torch.tensor([0, 0]), torch.tensor([-1, -1]))
    assert float(loss) == 0
    assert code_clusters(np.ones((1, 3)), 10, 0).tolist() == [0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3), st.booleans())
def test_clusters_are_as_equal_as_can_be_and_have_no_code_alone(
    size: int, clusters: int, seed: int, equal: bool
) -> None:
    codes = np.ones((size, 3)) if equal else numbers(size, 3, seed=seed)
    labels = code_clusters(codes.astype(np.float32), clusters, seed)
    counts = np.bincount(labels)
    assert len(labels) == size
    assert len(counts) == max(1, min(clusters, size // 2))
    assert counts.max() - counts.min() <= 1
    assert size == 1 or counts.min() >= 2


def test_clusters_hold_codes_that_lie_together() -> None:
    centres = 20 * np.eye(4)
    codes = (centres[np.arange(24) % 4] + numbers(24, 4)).astype(np.float32)
    labels = code_clusters(codes, 4, 0)
    assert [len(set(labels[begin::4].tolist())) for begin in range(4)] == [1] * 4
    assert len(set(labels.tolist())) == 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_positives_are_the_cluster_s_other_codes_equally_often(members: list[int]) -> None:
    labels = np.unique(members, return_inverse=True)[1].reshape(-1)
    for code in range(len(labels)):
        others = [other for other in range(len(labels)) if labels[other] == labels[code] and other != code]
        number = max(1, 3 * len(others))
        drawn = draw_positives(np.full(number, code), labels, (np.arange(number) + 0.5) / number)
        assert sorted(drawn.tolist()) == (sorted(others * 3) if others else [-1])


@pytest.mark.parametrize("parts", [1, 2, 5, 9])
def test_the_batch_s_losses_are_the_sum_of_its_parts_and_those_of_the_formula(parts: int) -> None:
    present = np.array([True, False, True, True, False, True, True, False, True, False])
    rows = np.where(present[:, None], numbers(10, 3, seed=1), 0).astype(np.float32)
    alignment = Alignment(Signals(rows, present), 0.5, 0.25, clusters=2, seed=4)
    assert alignment.terms == {"alignment": 0.5, "diversity": 0.25}
    batch = np.array([7, 3, 0, 9, 8, 1, 2])
    points = torch.from_numpy(numbers(7, 3, seed=2)).float().requires_grad_()
    codes = torch.from_numpy(np.random.default_rng(3).integers(0, 6, (7, 2)))
    codebooks = [torch.from_numpy(numbers(6, 3, seed=level)).float() for level in range(2)]
    labels = alignment.clusters_of(codebooks, epoch=3)
    found = np.zeros(2)
    for places in np.array_split(np.arange(7), parts):
        losses = alignment.losses(points[places], codes[places], codebooks, labels, batch, places, (3, 5))
        sum(losses).backward()
        found += [float(loss.detach()) for loss in losses]
    taking = [place for place in range(7) if present[batch[place]]]
    others = rows[batch[taking]].astype(np.float64)
    exact = points.detach().double().numpy()
    aligned = np.mean([contrast(exact[place], others, own) for own, place in enumerate(taking)])
    assert found[0] == pytest.approx(aligned, rel=1e-5)
    # Without a signal an item takes no part: neither moved itself nor among those that others are held against.
    assert [bool(row.any()) for row in points.grad] == [place in taking for place in range(7)]
    draws = np.random.default_rng([4, 3, 3, 5]).random((7, 2))
    diverse = 0.0
    for level in range(2):
        chosen = codes[:, level].numpy()
        positives = draw_positives(chosen, labels[level], draws[:, level])
        diverse += float(diversity_loss(codebooks[level].double(), codes[:, level], torch.from_numpy(positives))) / 7
    assert found[1] == pytest.approx(diverse, rel=1e-5)


def test_a_batch_without_signals_has_no_alignment() -> None:
    alignment = Alignment(Signals(np.zeros((4, 2), np.float32), np.zeros(4, bool)), 1.0, 0.0, 10, 0)
    assert alignment.terms == {"alignment": 1.0}
    assert alignment.clusters_of([torch.ones(4, 2)], 0) == []
    batch = np.array([2, 1])
    losses = alignment.losses(torch.ones(2, 2), torch.zeros(2, 1).long(), [], [], batch, np.arange(2), (0, 0))
    assert [float(loss) for loss in losses] == [0.0]


@pytest.mark.parametrize("width", [2, 5, 8])
def test_signals_keep_the_inner_products_but_for_one_factor(width: int) -> None:
    collaborative = 1e3 * (7 + numbers(20, 5))
    collaborative[[3, 11]] = 0
    signals = collaborative_signals(collaborative, 20, width)
    assert signals.rows.shape == (20, width)
    assert signals.rows.dtype == np.float32
    assert np.flatnonzero(~signals.present).tolist() == [3, 11]
    assert not signals.rows[[3, 11]].any()
    taking = collaborative[signals.present]
    centred = taking - taking.mean(axis=0)
    centred /= np.sqrt((centred**2).mean())
    if width < 5:
        # The best approximation of the centred rows by fewer directions (Eckart and Young).
        left, values, _ = np.linalg.svd(centred)
        expected = (left[:, :width] * values[:width] ** 2) @ left[:, :width].T
    else:
        expected = centred @ centred.T
    found = signals.rows[signals.present].astype(np.float64)
    np.testing.assert_allclose(found @ found.T, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.ones((3, 2)), r"of shape \(3, 2\) do not belong to 4 items. Give one row per item"),
        (np.zeros((4, 2)), r"^0 item\(s\) have a collaborative signal.* Give"),
        (np.diag([1.0, 0, 0, 0]), r"^1 item\(s\) have a collaborative signal"),
        (np.full((4, 2), np.nan), "NaN"),
        (np.ones(4), "shape"),
    ],
)
def test_bad_collaborative_embeddings_are_refused(rows: np.ndarray, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        RQVAE(**SMALL, alignment=0.1).fit(numbers(4, 3), rows)


def test_alignment_and_embeddings_come_together() -> None:
    with pytest.raises(TokenizerError, match=r"alignment is 0\.1, and collaborative embeddings are not given\. Give"):
        RQVAE(**SMALL, alignment=0.1).fit(numbers(9, 3))
    with pytest.raises(TokenizerError, match=r"alignment is 0, and collaborative embeddings are given\. Give both"):
        RQVAE(**SMALL).fit(numbers(9, 3), numbers(9, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment": -0.1}, "alignment is -0.1"),
        ({"diversity": float("nan"), "update": "gradient"}, "diversity is nan"),
        ({"diversity_clusters": 0}, "diversity_clusters is 0"),
        ({"diversity": 0.1}, r"moves codes by gradients, but update is 'ema'\. Use update='gradient'"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        RQVAE(**changes)


def groups_and_codes(alignment: float) -> tuple[np.ndarray, np.ndarray, RQVAE]:
    """150 items of 6 groups that users take together, whose texts have nothing to do with it; 30 without signal."""
    groups = np.arange(180) % 6
    texts = numbers(180, 24, seed=5)
    collaborative = (4 * np.eye(6))[groups] + 0.3 * numbers(180, 6, seed=6)
    collaborative[150:] = 0
    settings = {"codebook_size": 12, "latent_dim": 8, "hidden": (64,), "batch_size": 60, "epochs": 40}
    quantizer = RQVAE(2, **settings, learning_rate=1e-2, alignment=alignment)
    quantizer.fit(texts, collaborative if alignment else None)
    return groups, quantizer.encode(texts), quantizer


def shared_first_codes(groups: np.ndarray, codes: np.ndarray) -> tuple[float, float]:
    """How many pairs of one group, and of two groups, have one first code."""
    equal = codes[:, None, 0] == codes[None, :, 0]
    together = groups[:, None] == groups[None]
    off = ~np.eye(len(groups), dtype=bool)
    return float(equal[together & off].mean()), float(equal[~together].mean())


def test_alignment_brings_items_that_are_taken_together_onto_one_code() -> None:
    groups, plain, _ = groups_and_codes(0.0)
    _, aligned, quantizer = groups_and_codes(1.0)
    inside, outside = shared_first_codes(groups[:150], plain[:150])
    assert inside < 1.3 * outside  # texts say nothing of the groups
    inside, outside = shared_first_codes(groups[:150], aligned[:150])
    assert inside > 4 * outside
    assert quantizer.log[4]["alignment"] > quantizer.log[-1]["alignment"] > 0
    # A new item needs its text alone, and an item's code does not depend on what else is encoded.
    np.testing.assert_array_equal(quantizer.encode(numbers(180, 24, seed=5)[7:8]), aligned[7:8])
    assert quantizer.encode(numbers(3, 24, seed=8)).shape == (3, 2)


def test_diversity_draws_the_codes_of_a_cluster_together() -> None:
    vectors = numbers(300, 6)
    settings = {**SMALL, "codebook_size": 16, "update": "gradient", "epochs": 20, "diversity_clusters": 4}
    distances = []
    for weight in (0.0, 0.3):
        quantizer = RQVAE(**settings, diversity=weight).fit(vectors)
        codes = quantizer.codebooks[0].astype(np.float64)
        labels = code_clusters(codes, 4, 0)
        far = ((codes[:, None] - codes[None]) ** 2).sum(axis=2)
        same = labels[:, None] == labels[None]
        distances.append(far[same & ~np.eye(16, dtype=bool)].mean() / far[~same].mean())
    assert distances[1] < 0.8 * distances[0]
    assert quantizer.log[1]["diversity"] == 0  # while the autoencoder is plain
    assert quantizer.log[-1]["diversity"] < quantizer.log[2]["diversity"]
    assert "alignment" not in quantizer.log[-1]


def test_without_the_losses_a_fit_is_the_plain_loop_to_the_last_bit() -> None:
    vectors = numbers(100, 6)
    for update in ("ema", "gradient"):
        quantizer = RQVAE(**SMALL, update=update, revive_below=0).fit(vectors)
        assert set(quantizer.log[-1]) == {
            *("epoch", "loss", "reconstruction", "commitment", "used_share", "perplexity", "revived"),
        }  # fmt: skip
        mean, scale = quantizer._weights["mean"], quantizer._weights["scale"]
        data = torch.from_numpy(((vectors - mean) / scale).astype(np.float32))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = Network(6, (12,), 4, 2, 8, update=update)
        levels = network.quantizer.levels
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        for epoch in range(12):
            if epoch == 1:
                with torch.no_grad():
                    residuals = torch.cat([network.encoder(data[rows]) for rows in np.array_split(np.arange(100), 4)])
                for level, codebook in enumerate(levels):
                    codebook.place(residuals, 32, level)
                    residuals = residuals - codebook(residuals)[1].detach()
            order = np.random.default_rng([0, 0, epoch]).permutation(100)
            for step, rows in enumerate(np.array_split(order, 4)):
                optimizer.param_groups[0]["lr"] = 2e-3 * schedule(4 * epoch + step, 48)
                loss, quantised = network(data[rows], epoch >= 1)
                if quantised is not None:
                    loss = loss + 0.25 * quantised.commitment + quantised.codebook
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if quantised is not None:
                    for level, codebook in enumerate(levels):
                        codebook.average(quantised.residuals[level], quantised.codes[:, level])
        for name, tensor in network.state_dict().items():
            if not name.endswith((".counts", ".sums")):
                assert quantizer._weights[name].tobytes() == tensor.numpy().tobytes(), name


def test_the_collaborative_rows_are_part_of_the_run(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    vectors, collaborative = numbers(60, 6), numbers(60, 4, seed=1)
    settings = {**SMALL, "alignment": 0.2, "epochs": 4}
    whole = RQVAE(**settings).fit(vectors, collaborative)
    RQVAE(**settings).fit(vectors, collaborative, checkpoints=tmp_path)
    again = RQVAE(**settings).fit(vectors, collaborative, checkpoints=tmp_path)
    assert "begins anew" not in caplog.text
    assert again.log == whole.log
    other = RQVAE(**settings).fit(vectors, numbers(60, 4, seed=2), checkpoints=tmp_path)
    assert "is of other settings or embeddings" in caplog.text
    assert other.log != whole.log
    np.testing.assert_array_equal(again.encode(vectors), whole.encode(vectors))


def test_folders_of_earlier_versions_are_read(tmp_path) -> None:
    settings = {**SMALL, "update": "gradient", "epochs": 3}
    quantizer = RQVAE(**settings, alignment=0.2, diversity=0.1, diversity_clusters=3)
    quantizer.fit(numbers(60, 6), numbers(60, 4)).save(tmp_path)
    assert RQVAE.from_pretrained(tmp_path).settings == quantizer.settings
    manifest = json.loads((tmp_path / "quantizer.json").read_text())
    for name in ("alignment", "diversity", "diversity_clusters"):
        del manifest[name]
    (tmp_path / "quantizer.json").write_text(json.dumps(manifest))
    old = RQVAE.from_pretrained(tmp_path)
    assert (old.alignment, old.diversity, old.diversity_clusters) == (0.0, 0.0, 10)
    np.testing.assert_array_equal(old.encode(numbers(9, 6)), quantizer.encode(numbers(9, 6)))
