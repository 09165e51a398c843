"""Numbers from predicted and true scores."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from jaxsd.errors import RunError, UserError

LEAST = 3  # images for a correlation: through any two goes a line
CONSTANT = 1e-6  # a deviation below this share of the mean is float32 rounding, not variation
SLOPES = (0.5, 2.0, 8.0)  # starts of the logistic fit, in deviations of the predictions


def regression(predictions: np.ndarray, scores: np.ndarray) -> dict[str, float | None]:
    """How predictions [N] follow scores [N]; None where a number is not defined (`undefined` says why).

    Returns {"pearson", "spearman", "kendall" (tau-b), "mae", "rmse", "pearson_logistic5", "mae_logistic5",
    "rmse_logistic5"}. Errors are in the unit of the scores. Ties have mean ranks. Those on _logistic5 are taken after
    `logistic5` has put the predictions on the scale of these very scores, as is the custom for image quality: not to be
    compared with those before; None too where the fit fails. Spearman and Kendall do not change by it and have none.
    Raises UserError for empty or mismatched arrays and RunError for predictions that are not finite.
    """
    from scipy import stats  # here: it takes a second, and only scored images need it

    predictions, scores = _checked(predictions, scores)
    result: dict[str, float | None] = {"pearson": None, "spearman": None, "kendall": None}
    errors = predictions - scores
    result |= {"mae": float(np.abs(errors).mean()), "rmse": float(np.sqrt(np.square(errors).mean()))}
    result |= {"pearson_logistic5": None, "mae_logistic5": None, "rmse_logistic5": None}
    if undefined(predictions, scores):
        return result
    result["pearson"] = _pearson(predictions, scores)
    result["spearman"] = float(stats.spearmanr(predictions, scores)[0])
    result["kendall"] = float(stats.kendalltau(predictions, scores)[0])
    fitted = logistic5(predictions, scores)
    if fitted is not None:
        errors = fitted - scores
        result["pearson_logistic5"] = None if _constant(fitted) else _pearson(fitted, scores)
        result["mae_logistic5"] = float(np.abs(errors).mean())
        result["rmse_logistic5"] = float(np.sqrt(np.square(errors).mean()))
    return result


def undefined(predictions: np.ndarray, scores: np.ndarray) -> str | None:
    """Why predictions [N] have no correlation with scores [N], in words; None where they have one."""
    if len(scores) < LEAST:
        return f"fewer than {LEAST} images"
    if _constant(np.asarray(predictions, np.float64)):
        return "constant predictions"
    return "constant scores" if _constant(np.asarray(scores, np.float64)) else None


def per_kind(predictions: np.ndarray, scores: np.ndarray, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """The same within the images of each kind, in the order of the kinds' names.

    kinds: one per image, [N]. Returns [{"kind", "n": its images, "pearson", "spearman", "mae"}], None where undefined.
    Raises as `regression`.
    """
    from scipy import stats

    predictions, scores = _checked(predictions, scores)
    if len(kinds) != len(scores):
        raise UserError(f"kinds must be one per image: got {len(kinds)} for {len(scores)} images")
    names, rows = np.asarray(kinds), []
    for kind in sorted(set(kinds)):
        x, y = predictions[names == kind], scores[names == kind]
        known = undefined(x, y) is None
        pearson = _pearson(x, y) if known else None
        spearman = float(stats.spearmanr(x, y)[0]) if known else None
        mae = float(np.abs(x - y).mean())
        rows.append({"kind": str(kind), "n": len(x), "pearson": pearson, "spearman": spearman, "mae": mae})
    return rows


def logistic5(predictions: np.ndarray, scores: np.ndarray) -> np.ndarray | None:
    """b1 (1/2 - 1 / (1 + exp(b2 (x - b3)))) + b4 x + b5 of the predictions x [N], fitted to the scores: float64 [N].

    Least squares from several starts, the straight line among them, so it never fits worse than that. None where
    nothing can be fitted: no more images than parameters, constant values, or no start that converges. Source: the
    video quality experts group's mapping in the form of Sheikh, Sabir and Bovik (IEEE TIP, 2006).
    """
    from scipy.optimize import OptimizeWarning, curve_fit

    predictions, scores = _checked(predictions, scores)
    if len(scores) <= 5 or undefined(predictions, scores):
        return None
    x = (predictions - predictions.mean()) / predictions.std()  # so that one set of starts serves every scale
    y = (scores - scores.mean()) / scores.std()
    slope = float((x * y).mean())
    height = float(np.ptp(y)) * (1 if slope >= 0 else -1)
    starts = [(0.0, 1.0, 0.0, slope, 0.0), *((height, steep, float(np.median(x)), 0.0, 0.0) for steep in SLOPES)]
    fits = []
    for start in starts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # of the parameters' covariance, which nobody asks for
            try:
                fits.append(_curve(x, *curve_fit(_curve, x, y, start, maxfev=2000)[0]))
            except RuntimeError:  # no convergence
                continue
    errors = [float(np.square(fit - y).sum()) for fit in fits]
    if not np.isfinite(errors).any():
        return None
    return fits[int(np.nanargmin(errors))] * scores.std() + scores.mean()


def _curve(x: np.ndarray, b1: float, b2: float, b3: float, b4: float, b5: float) -> np.ndarray:
    return b1 * (expit(b2 * (x - b3)) - 0.5) + b4 * x + b5  # expit(z) = 1 - 1 / (1 + exp(z)), without overflow


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    from scipy import stats

    return float(stats.pearsonr(x, y)[0])


def _constant(values: np.ndarray) -> bool:
    return float(values.std()) <= CONSTANT * abs(float(values.mean()))


def _checked(predictions: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [N], once they fit together."""
    predictions, scores = np.asarray(predictions, np.float64), np.asarray(scores, np.float64)
    if scores.ndim != 1 or not scores.size:
        raise UserError(f"scores must be numbers [N], at least one, got {list(scores.shape)}")
    if predictions.shape != scores.shape:
        raise UserError(f"predictions must be {list(scores.shape)} to match scores, got {list(predictions.shape)}")
    if not np.isfinite(scores).all():
        raise UserError(f"the score of image {int(np.flatnonzero(~np.isfinite(scores))[0])} is not finite: mend it")
    bad = int((~np.isfinite(predictions)).sum())
    if bad:
        raise RunError(
            f"predictions for {bad} of {len(scores)} images are not finite: training diverged, lower its rate"
        )
    return predictions, scores
