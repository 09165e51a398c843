"""Numbers from scores and labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsd.errors import RunError, UserError


def class_names(classes: int | Sequence[str]) -> tuple[str, ...]:
    """The names of the classes, index = label; a bare number K stands for "0" .. "K-1"."""
    names = tuple(str(label) for label in (range(classes) if isinstance(classes, int) else classes))
    if not names:
        raise UserError("evaluation needs class names or their number, got none: give the labelled source's `classes`")
    return names


def checked_labels(labels: Any, classes: int | Sequence[str], what: str = "labels") -> np.ndarray:
    """Labels as int64 [N], after checking that there are some and that each is one of the classes."""
    labels = np.asarray(labels)
    known = len(class_names(classes))
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{what} must be whole numbers of shape [N], got {labels.dtype} {list(labels.shape)}")
    if not labels.size:
        raise UserError(f"{what} are empty, nothing can be measured: give at least one labelled image")
    if labels.min() < 0 or labels.max() >= known:
        raise UserError(f"{what} must lie in 0..{known - 1} for {known} classes, got {labels.min()}..{labels.max()}")
    return labels.astype(np.int64)


def classification(scores: np.ndarray, labels: np.ndarray, classes: int | Sequence[str]) -> dict[str, float]:
    """How often the highest score [N, K] is that of the label [N], as fractions in [0, 1].

    classes: names or number of the K classes. Of equal highest scores the first counts.
    Returns {"accuracy", "balanced_accuracy"}; the latter is the mean recall over the classes that occur in the labels.
    Raises UserError for empty or mismatched arrays and RunError for scores that are not finite.
    """
    scores, labels = np.asarray(scores), checked_labels(labels, classes)
    expected = (len(labels), len(class_names(classes)))
    if scores.shape != expected:
        raise UserError(f"scores must be [N, K] = {list(expected)} to fit labels and classes, got {list(scores.shape)}")
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores)).any(axis=1).sum())
        raise RunError(f"scores of {bad} of {len(scores)} images are not finite: training diverged, lower its rate")
    predictions = scores.argmax(axis=1)
    recalls = [row["accuracy"] for row in per_class(predictions, labels, classes) if row["n"]]
    return {"accuracy": float((predictions == labels).mean()), "balanced_accuracy": float(np.mean(recalls))}


def per_class(predictions: np.ndarray, labels: np.ndarray, classes: int | Sequence[str]) -> list[dict[str, Any]]:
    """The share of each class's images [N] that is predicted as that class, one dict per class in label order.

    Returns [{"class": name, "n": images of the class, "accuracy": fraction, or None where n is 0}].
    Raises UserError for empty or mismatched arrays.
    """
    labels, predictions = checked_labels(labels, classes), checked_labels(predictions, classes, "predictions")
    if len(predictions) != len(labels):
        raise UserError(f"predictions and labels must be of equal length, got {len(predictions)} and {len(labels)}")
    names = class_names(classes)
    counts = np.bincount(labels, minlength=len(names))
    hits = np.bincount(labels[predictions == labels], minlength=len(names))
    return [
        {"class": name, "n": int(n), "accuracy": float(hit / n) if n else None}
        for name, n, hit in zip(names, counts, hits, strict=True)
    ]
