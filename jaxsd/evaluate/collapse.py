"""Features that say the same of every image."""

from typing import NamedTuple

import numpy as np

IMAGES = 512  # looked at, evenly spread over all: enough to tell a rank of 2
FEWEST = 8  # images and dimensions, below which a low rank says nothing
# Directions: a deviation of 1 / sqrt(D) per dimension is that of directions spread evenly (Chen & He, CVPR 2021,
# section 4.1). At a hundredth of it the mean cosine between two images is about 0.9999. Untrained networks, to which
# all images look much alike, have 0.085 and more (seven families on photographs, every block).
DEVIATION = 0.01
# Dimensions: below 2 nearly all that tells images apart is one number. The singular values are not squared, so the tail
# of a healthy network alone gives more: untrained ones 17 and more, one trained for long to tell two turns apart 47.
RANK = 2.0


class Spread(NamedTuple):
    """How differently features see images."""

    deviation: float  # of directions, per dimension, times sqrt(D): 1 where they are spread evenly, 0 for one direction
    rank: float  # effective rank: 1 to min(N - 1, D), 0 for constant features


def spread(features: np.ndarray) -> Spread:
    """The spread of finite features [N, D]: mean deviation of the features at length 1, and effective rank.

    The effective rank is exp of the entropy of the singular values of the centred features, divided by their sum (Roy &
    Vetterli, EUSIPCO 2007, definition 1). Of more than 512 images 512 are looked at.
    """
    features = np.asarray(features, np.float64)
    features = features[np.linspace(0, len(features) - 1, min(len(features), IMAGES)).astype(int)]
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    directions = features / np.maximum(lengths, np.finfo(np.float32).tiny)
    deviation = float(directions.std(axis=0).mean() * features.shape[1] ** 0.5)
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    if values.sum() <= np.finfo(np.float32).eps * lengths.sum():  # what float32 features differ by in rounding
        return Spread(deviation, 0.0)
    shares = values[values > 0] / values.sum()
    return Spread(deviation, float(np.exp(-(shares * np.log(shares)).sum())))


def collapsed(features: np.ndarray) -> str | None:
    """In words why features [N, D] are called collapsed; None where they are not, are too few, or are not finite."""
    if min(np.shape(features)) < FEWEST or not np.isfinite(features).all():
        return None
    found = spread(features)
    if found.rank < RANK:
        return f"effective rank {found.rank:.2f} of {features.shape[1]} dimensions"
    if found.deviation < DEVIATION:
        return f"all of one direction, deviation {found.deviation:.1g} where 1 is an even spread"
    return None
