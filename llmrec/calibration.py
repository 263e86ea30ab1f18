"""Calibration: turns the logit of a yes-or-no answer into a probability that comes true as often as it says.

Fitted on held-out answers whose truth is known. It knows no model: logits and labels in, numbers out, and the numbers
are JSON. I impressions.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError

Method = Literal["temperature", "platt", "isotonic"]
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibrator:
    """A rising map from logits to probabilities; equal for equal logits, so it never turns an order round.

    Attributes:
        method: "temperature": sigmoid(slope * logit) (Guo et al. 2017, arXiv 1706.04599, with slope = 1/T); "platt":
            sigmoid(slope * logit + intercept) (Platt 1999); "isotonic": steps joined by lines (Zadrozny and Elkan
            2002), flat outside of them.
        slope, intercept: of the first two; the slope is not below 0.
        logits, probabilities: the corners of the third, both rising.
    """

    method: Method
    slope: float = 1.0
    intercept: float = 0.0
    logits: tuple[float, ...] = ()
    probabilities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        corners = np.array([self.logits, self.probabilities], dtype=np.float64)
        rising = bool((np.diff(corners) >= 0).all()) and bool(((corners[1] >= 0) & (corners[1] <= 1)).all())
        finite = bool(np.isfinite(corners).all() and np.isfinite([self.slope, self.intercept]).all())
        enough = corners.shape[1] > 0 or self.method != "isotonic"
        if self.method not in get_args(Method) or self.slope < 0 or not (rising and finite and enough):
            raise DataError(
                f"A calibration by {self.method!r} with slope {self.slope}, intercept {self.intercept} and "
                f"{corners.shape[1]} corners is no rising map to probabilities. Fit it anew."
            )

    def __call__(self, logits: npt.ArrayLike) -> Vector:
        """The probabilities of logits of any shape.

        >>> Calibrator("temperature", slope=0.5)([0.0, 2.0]).round(4).tolist()
        [0.5, 0.7311]
        """
        given = np.asarray(logits, dtype=np.float64)
        if self.method == "isotonic":
            return np.interp(given, self.logits, self.probabilities).astype(np.float64)
        return sigmoid(self.slope * given + self.intercept)

    @classmethod
    def fit(cls, method: Method, logits: npt.ArrayLike, labels: npt.ArrayLike) -> Self:
        """The map of this kind under which the labels are likeliest.

        Temperature and Platt aim at (n1 + 1)/(n1 + 2) and 1/(n0 + 2) instead of 1 and 0, for n1 and n0 labels of 1 and
        of 0 (Platt 1999, section 2.2), so that labels that the logits divide without an error have a finite answer.
        Where a falling map would be likelier, the flat one is the best that rises.

        Args:
            method: which kind.
            logits: (I,) finite numbers.
            labels: (I,) 0 or 1, of both kinds.

        Raises:
            DataError: if shapes disagree, a logit is not finite, a label is neither 0 nor 1, or all are alike.
        """
        x, y = np.asarray(logits, dtype=np.float64), np.asarray(labels)
        if x.ndim != 1 or x.shape != y.shape or not np.isfinite(x).all() or not np.isin(y, (0, 1)).all():
            raise DataError(
                f"Logits of shape {x.shape} and labels of shape {y.shape} cannot be calibrated on. "
                "Give one finite logit and one label, 0 or 1, per answer."
            )
        ones = int(y.sum())
        if ones in (0, len(y)):
            raise DataError(
                f"All {len(y)} answers to calibrate on are {'Yes' if ones else 'No'}. "
                "Calibrate on both kinds: another threshold, or more cases."
            )
        if method == "isotonic":
            from sklearn.isotonic import IsotonicRegression

            rise = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(x, y.astype(np.float64))
            return cls(method, 1.0, 0.0, tuple(rise.X_thresholds_.tolist()), tuple(rise.y_thresholds_.tolist()))
        if method not in get_args(Method):
            raise DataError(f"There is no calibration {method!r}. Name one of {', '.join(get_args(Method))}.")
        from sklearn.linear_model import LogisticRegression

        aims = np.where(y == 1, (ones + 1) / (ones + 2), 1 / (len(y) - ones + 2))
        scale = float(np.abs(x).max()) or 1.0  # its solver wants numbers near 1
        regression = LogisticRegression(C=np.inf, fit_intercept=method == "platt", tol=1e-10, max_iter=10_000)
        regression.fit(
            np.concatenate([x, x])[:, None] / scale,
            np.repeat([1, 0], len(x)),
            sample_weight=np.concatenate([aims, 1 - aims]),
        )
        slope, intercept = float(regression.coef_[0, 0]) / scale, float(np.ravel(regression.intercept_)[0])
        if slope < 0:
            share = float(aims.mean())
            slope, intercept = 0.0, float(np.log(share / (1 - share))) if method == "platt" else 0.0
        return cls(method, slope, intercept)

    def document(self) -> dict[str, Any]:
        """As JSON; `from_document` reads it back, number for number."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Reads `document`; raises DataError if it is no calibration."""
        try:
            slope, intercept = float(document["slope"]), float(document["intercept"])
            corners = [tuple(float(value) for value in document[name]) for name in ("logits", "probabilities")]
            return cls(document["method"], slope, intercept, *corners)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"This is no calibration ({type(error).__name__}: {error}). Fit it anew.") from error


def sigmoid(logits: Vector) -> Vector:
    """1 / (1 + e^-x) without overflow."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small))
