"""Worlds whose law is known, written down as published, and trainings drawn from them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmrec.scaling.points import ScalingPoints

Table = npt.NDArray[np.float64]

QUALITY = 0.19
PEAK = {"depth": 6.0, "width": 50.0}


@dataclass(frozen=True)
class World:
    """A grid of trainings with the metric that each would have without noise, (n,)."""

    depth: Table
    width: Table
    tokens: Table
    seed: npt.NDArray[np.int64]
    metric: Table

    def draw(self, noise: float, rng: np.random.Generator) -> ScalingPoints:
        metric = np.clip(self.metric + noise * rng.normal(size=len(self.metric)), 0, 1)
        return ScalingPoints(self.depth, self.width, self.tokens, np.full(len(metric), QUALITY), metric, self.seed)


def peaked(depth: npt.ArrayLike, width: npt.ArrayLike, effective: npt.ArrayLike) -> Table:
    """The Performance Law with its best size at `PEAK`."""
    h, d, data = (np.asarray(given, dtype=np.float64) for given in (depth, width, effective))
    w3, w4, w5 = -np.log(2) / np.log(PEAK["depth"]), -np.log(2) / np.log(PEAK["width"]), 0.02
    sizes = -0.08 * (np.log(h**w3) + 0.5 / h**w3) - 0.25 * (np.log(d**w4) + 0.5 / d**w4)
    return np.asarray(sizes + np.log(data**w5) + 0.5 / data**w5 - 0.44)


def power(depth: npt.ArrayLike, width: npt.ArrayLike, effective: npt.ArrayLike) -> Table:
    """A power law: more is always better."""
    h, d, data = (np.asarray(given, dtype=np.float64) for given in (depth, width, effective))
    return np.asarray(0.25 - 0.08 / h**0.8 - 0.6 / d**0.7 - 1.2 / data**0.25)


def flat(depth: npt.ArrayLike, width: npt.ArrayLike, effective: npt.ArrayLike) -> Table:
    """Size and data do nothing."""
    return 0.1 + 0 * np.asarray(depth, dtype=np.float64)


def world(law, depths=(2, 4, 8, 16), widths=(16, 32, 64, 128), tokens=(2.5e5, 5e5, 1e6), seeds=2) -> World:  # type: ignore[no-untyped-def]
    rows = [(h, d, t, s) for h in depths for d in widths for t in tokens for s in range(seeds)]
    depth, width, data, seed = np.array(rows, dtype=np.float64).T
    return World(depth, width, data, seed.astype(np.int64), law(depth, width, data * QUALITY))
