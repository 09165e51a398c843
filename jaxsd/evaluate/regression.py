"""Numbers from predicted and true scores."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from jaxsd.errors import RunError, UserError

LEAST = 3  # images for a correlation: through any two goes a line
CONSTANT = 1e-6  # a deviation below this share of the mean is float32 rounding, not variation
SLOPES = (0.5, 2.0, 8.0)  # starts of the logistic fit, in deviations of the predictions
STEPS = 200  # of each fit


def regression(predictions: np.ndarray, scores: np.ndarray) -> dict[str, float | None]:
    """How predictions [N] follow scores [N]; None where a number is not defined (`undefined` says why).

    Returns {"pearson", "spearman", "kendall" (tau-b), "mae", "rmse", "pearson_logistic5", "mae_logistic5",
    "rmse_logistic5"}. Errors are in the unit of the scores. Ties have mean ranks. Those on _logistic5 are taken after
    `logistic5` has put the predictions on the scale of these very scores, as is the custom for image quality: not to be
    compared with those before. Spearman and Kendall are never fitted.
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
    result["pearson"] = _value(stats.pearsonr, predictions, scores)
    result["spearman"] = _value(stats.spearmanr, predictions, scores)
    result["kendall"] = _value(stats.kendalltau, predictions, scores)
    fitted = logistic5(predictions, scores)
    if fitted is not None:
        errors = fitted - scores
        result["pearson_logistic5"] = None if _constant(fitted) else _value(stats.pearsonr, fitted, scores)
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
        pearson = _value(stats.pearsonr, x, y) if known else None
        spearman = _value(stats.spearmanr, x, y) if known else None
        mae = float(np.abs(x - y).mean())
        rows.append({"kind": str(kind), "n": len(x), "pearson": pearson, "spearman": spearman, "mae": mae})
    return rows


def logistic5(predictions: np.ndarray, scores: np.ndarray) -> np.ndarray | None:
    """b1 (1/2 - 1 / (1 + exp(b2 (x - b3)))) + b4 x + b5 of the predictions x [N], fitted to the scores: float64 [N].

    Least squares from several starts, the straight line among them, so it never fits worse than that. None where
    nothing can be fitted: constant values, or no more images than parameters. Source: Sheikh, Sabir and Bovik (IEEE
    TIP, 2006). Raises as `regression`.
    """
    from scipy.optimize import least_squares

    def off(b: np.ndarray) -> np.ndarray:
        return _curve(x, b) - y

    def slopes(b: np.ndarray) -> np.ndarray:
        return _slopes(x, b)

    predictions, scores = _checked(predictions, scores)
    if len(scores) <= 5 or undefined(predictions, scores):
        return None
    x = (predictions - predictions.mean()) / predictions.std()  # so that one set of starts serves every scale
    y = (scores - scores.mean()) / scores.std()
    slope = float((x * y).mean())
    height = float(np.ptp(y)) * (1 if slope >= 0 else -1)
    starts = [(0.0, 1.0, 0.0, slope, 0.0), *((height, steep, float(np.median(x)), 0.0, 0.0) for steep in SLOPES)]
    # `curve_fit` is this too, but fails where its steps run out, in a flat valley between equally good curves.
    fits = [least_squares(off, start, slopes, method="lm", max_nfev=STEPS) for start in starts]  # type: ignore[arg-type]
    best = min(fits, key=lambda fit: fit.cost)
    return _curve(x, best.x) * scores.std() + scores.mean()


def _curve(x: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The logistic curve; expit(z) = 1 - 1 / (1 + exp(z)) does not overflow."""
    return b[0] * (expit(b[1] * (x - b[2])) - 0.5) + b[3] * x + b[4]


def _slopes(x: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Its derivatives by the five parameters, [N, 5]."""
    share = expit(b[1] * (x - b[2]))
    steep = b[0] * share * (1 - share)
    return np.stack([share - 0.5, steep * (x - b[2]), -steep * b[1], x, np.ones_like(x)], axis=1)


def _value(correlation: Callable[..., Any], x: np.ndarray, y: np.ndarray) -> float:
    return float(correlation(x, y).statistic)


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
