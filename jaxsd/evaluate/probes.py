"""Predictions without training: what frozen features know, in closed form.

All take features of images that the network may have been trained on, their labels or scores, and features of unseen
images; what is true of these is no argument, so nothing can be chosen on it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import linalg

from jaxsd.errors import RunError, UserError
from jaxsd.evaluate.metrics import checked_labels, class_names

ROWS = 1024  # images handled at once, so that intermediate arrays stay small beside the features
CONSTANT = 1e-6  # a feature whose deviation is below this share of its mean is float32 rounding, not information


class Ridge(NamedTuple):
    """What `ridge` gives."""

    scores: np.ndarray  # float64 [m, K], the class with the highest is predicted
    penalty: float  # the one of least leave-one-out error


def ridge(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    *,
    classes: int | Sequence[str],
    penalties: Sequence[float] | None = None,
) -> Ridge:
    """One-vs-rest ridge regression on standardised features: scores [m, K] of the test features [m, D].

    Targets are +1 and -1; |y - b - X w|^2 + penalty |w|^2 is minimised for each class, with the mean and deviation of
    the training features [n, D], without its constant features and with a free intercept b. The penalty, one for all
    classes, is that of least squared leave-one-out error on the training images, in closed form (Allen, 1974).
    penalties: candidates above 0; by default 15 from 1e-5 to 1e2 times max(n, D), the mean non-zero eigenvalue of X'X.
    Raises UserError for empty or mismatched arrays and RunError for features that are not finite.
    """
    train, labels, test = _checked(train_features, train_labels, test_features, classes)
    targets = np.where(labels[:, None] == np.arange(len(class_names(classes))), 1.0, -1.0)
    return _ridge(train, targets, test, penalties)


def ridge_regression(
    train_features: np.ndarray,
    train_scores: np.ndarray,
    test_features: np.ndarray,
    *,
    penalties: Sequence[float] | None = None,
) -> np.ndarray:
    """Ridge regression on standardised features: predicted scores float64 [m] of the test features [m, D].

    All as in `ridge`, with the scores [n] as the only target; collapsed features give their mean.
    Raises UserError for empty or mismatched arrays or scores that are not finite, RunError for such features.
    """
    train, test = _checked_features(train_features, test_features)
    scores = np.asarray(train_scores, np.float64)
    if scores.shape != (len(train),):
        raise UserError(f"train scores must match the train features, got {list(scores.shape)} for {len(train)}")
    if not np.isfinite(scores).all():
        raise UserError(f"the score of image {int(np.flatnonzero(~np.isfinite(scores))[0])} is not finite: mend it")
    return _ridge(train, scores[:, None], test, penalties).scores[:, 0]


def _ridge(train: np.ndarray, targets: np.ndarray, test: np.ndarray, penalties: Sequence[float] | None) -> Ridge:
    """Ridge regression of targets [n, K] on the standardised features that are not constant."""
    if penalties is None:
        penalties = list(np.logspace(-5, 2, 15) * max(train.shape))
    candidates = np.asarray(penalties, np.float64)
    if candidates.ndim != 1 or not candidates.size or not (np.isfinite(candidates) & (candidates > 0)).all():
        raise UserError(f"ridge penalties must be a list of finite numbers above 0, got {penalties}")
    intercept = targets.mean(axis=0)
    mean, deviation = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    kept = deviation > CONSTANT * np.abs(mean)
    if not kept.any():  # collapsed features: the mean of the targets is all that is left to go by
        return Ridge(np.tile(intercept, (len(test), 1)), float(candidates.max()))
    mean, deviation = mean[kept], deviation[kept]
    weights, penalty = _solve((train[:, kept] - mean) / deviation, targets - intercept, candidates)
    return Ridge((test[:, kept] - mean) / deviation @ weights + intercept, penalty)


def _solve(x: np.ndarray, y: np.ndarray, penalties: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights [D, K] for centred features [n, D] and centred targets [n, K], and the penalty chosen.

    One eigendecomposition of the smaller of X'X and XX' serves every penalty. With rows p_i of P = X V (V the
    eigenvectors of X'X, s its eigenvalues) the fit is P diag(1 / (s + penalty)) P'y and the leverage of an image, the
    intercept's 1/n included, is 1/n + sum_j p_ij^2 / (s_j + penalty). Nothing is divided by an eigenvalue.
    """
    n, d = x.shape
    gram = x.T @ x if d <= n else x @ x.T
    values, vectors = linalg.eigh(gram, overwrite_a=True, check_finite=False, driver="evd")
    del gram
    values = values.clip(min=0)
    if d <= n:
        projected = vectors.T @ (x.T @ y)  # P'y
    else:
        projected = np.sqrt(values)[:, None] * (vectors.T @ y)
    inverses = 1 / (values + penalties[:, None])  # [penalties, min(n, D)]
    errors = np.zeros(len(penalties))
    for start in range(0, n, ROWS):
        part = slice(start, start + ROWS)
        rows = x[part] @ vectors if d <= n else vectors[part] * np.sqrt(values)
        leverage = 1 / n + rows**2 @ inverses.T
        for k, inverse in enumerate(inverses):
            residual = y[part] - rows @ (inverse[:, None] * projected)
            # A leverage of 1 is reached by rounding alone: an image that the fit without it says nothing about.
            errors[k] += np.square(residual / np.maximum(1 - leverage[:, k : k + 1], 1e-12)).sum()
    best = int(errors.argmin())
    if d <= n:
        return vectors @ (inverses[best][:, None] * projected), float(penalties[best])
    return x.T @ (vectors @ (inverses[best][:, None] * (vectors.T @ y))), float(penalties[best])


def knn(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    *,
    classes: int | Sequence[str],
    neighbours: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Votes of the nearest training features by cosine: float64 [m, K], each row summing to 1.

    Each of the `neighbours` nearest (all, if there are fewer) votes for its class with weight
    exp(cosine / temperature) as in Wu et al. (CVPR 2018, section 3.4); rows are then divided by their sum.
    `temperature=math.inf` is the plain count. A feature vector of zeros has cosine 0 to all others.
    Raises UserError for empty or mismatched arrays and RunError for features that are not finite.
    """
    train, labels, test = _checked(train_features, train_labels, test_features, classes)
    if neighbours < 1 or not temperature > 0:
        raise UserError(f"knn needs neighbours >= 1 and temperature > 0, got {neighbours} and {temperature}")
    train, test = _unit(train), _unit(test)
    votes = np.eye(len(class_names(classes)))[labels]  # [n, K]
    count = min(neighbours, len(train))
    scores = np.empty((len(test), votes.shape[1]))
    for start in range(0, len(test), ROWS):
        cosines = test[start : start + ROWS] @ train.T
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        cosines = np.take_along_axis(cosines, nearest, axis=1).astype(np.float64)
        weights = np.exp((cosines - cosines.max(axis=1, keepdims=True)) / temperature)  # the largest is 1: no overflow
        weights /= weights.sum(axis=1, keepdims=True)
        scores[start : start + ROWS] = np.einsum("mk,mkc->mc", weights, votes[nearest])
    return scores


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; rows of zeros stay."""
    features = features.astype(np.float32)
    features = features / np.maximum(np.abs(features).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _checked(
    train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, classes: int | Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three arrays, once they fit together."""
    labels = checked_labels(train_labels, classes, "train labels")
    train, test = _checked_features(train_features, test_features)
    if len(labels) != len(train):
        raise UserError(f"train labels must match the train features, got {len(labels)} and {len(train)}")
    return train, labels, test


def _checked_features(train_features: np.ndarray, test_features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays, once they fit together."""
    train, test = np.asarray(train_features), np.asarray(test_features)
    for name, features in (("train", train), ("test", test)):
        if features.ndim != 2 or not features.size:
            raise UserError(f"{name} features must be [images, features] and not empty, got {list(features.shape)}")
        if not np.isfinite(features).all():
            raise RunError(f"{name} features are not finite: training diverged, lower its rate")
    if train.shape[1] != test.shape[1]:
        raise UserError(f"train and test features must be of equal width, got {train.shape[1]} and {test.shape[1]}")
    return train, test
