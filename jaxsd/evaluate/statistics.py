"""Hand-made statistics of images, in which damage shows: what is known without a network.

Natural-scene statistics as in BRISQUE (Mittal, Moorthy and Bovik, IEEE TIP, 2012), and a few plain ones. Nothing is
trained and nothing is random.
"""

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.special import gammaln

from jaxsd.errors import UserError

CHUNK = 1 << 22  # pixels handled at once, so that float copies stay small
LEAST = 8  # pixels of the shorter side: two scales of four
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
WINDOW = {"sigma": 7 / 6, "radius": 3}  # of the local mean and contrast: 7 x 7 pixels
PERIOD = 8  # pixels of a JPEG block
SHAPES = np.arange(0.2, 10.0005, 0.001)  # of a generalised Gaussian: alpha, and below (mean |x|)^2 / mean x^2
MOMENTS = np.exp(2 * gammaln(2 / SHAPES) - gammaln(1 / SHAPES) - gammaln(3 / SHAPES))  # rises with alpha
SMALL = 1e-3  # beside the variances of normalised luminance, about 0.01 to 1, so that each has a logarithm
ROUNDING = 1e-12  # far below the moments of anything but a constant image
NEIGHBOURS = {"right": (0, 1), "below": (1, 0), "below_right": (1, 1), "below_left": (1, -1)}
SCALES = (1, 2)  # pixels that are averaged on each side

_SCALE_NAMES = (
    "contrast", "gradient_mean", "gradient_std", "alpha", "variance",
    *(f"{name}_{part}" for name in NEIGHBOURS for part in ("alpha", "mean", "low", "high")),
)  # fmt: skip
NAMES = ("luminance", "blockiness", "colourfulness", *(f"{name}_{scale}" for scale in SCALES for name in _SCALE_NAMES))


def image_statistics(images: np.ndarray) -> np.ndarray:
    """Statistics of images uint8 [N, H, W, C], C 1 or 3, H and W at least 8: finite float64 [N, D], named in `NAMES`.

    At each of two scales, the second of 2 x 2 means, of the luminance (0..255): its deviation; mean and deviation of
    the length of its gradient; and the 18 of BRISQUE, which are the shape alpha and the variance of the locally
    normalised luminance, and for its product with each of four neighbours the shape, mean, left and right variance.
    Deviations, lengths and variances as logarithms, since damage multiplies them.
    Then the mean luminance, the blockiness at 8 pixels (log of the steps at the worst phase against all others) and the
    colourfulness of Hasler and Suesstrunk (2003), 0 for gray.
    Raises UserError for other shapes.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not len(images):
        raise UserError(f"statistics need uint8 images [N, H, W, 1 or 3], got {images.dtype} {list(images.shape)}")
    _, height, width, _ = images.shape
    if min(height, width) < LEAST:
        raise UserError(f"statistics need images of at least {LEAST}x{LEAST} pixels, got {height}x{width}")
    count = max(1, CHUNK // (height * width))
    return np.concatenate([_statistics(images[at : at + count]) for at in range(0, len(images), count)])


def _statistics(images: np.ndarray) -> np.ndarray:
    """The statistics of a few images."""
    gray = images[..., 0].astype(np.float64) if images.shape[3] == 1 else images @ np.array(LUMINANCE)
    columns = [gray.mean(axis=(1, 2)), _blockiness(gray), _colourfulness(images)]
    for scale in SCALES:
        columns += _at_one_scale(gray if scale == 1 else _halved(gray))
    return np.stack(columns, axis=1)


def _at_one_scale(gray: np.ndarray) -> list[np.ndarray]:
    """Statistics [N] of luminance [N, H, W], in the order of `_SCALE_NAMES`."""
    falling, rising = gray[:, 1:, 1:] - gray[:, :-1, :-1], gray[:, 1:, :-1] - gray[:, :-1, 1:]
    slope = np.sqrt((falling**2 + rising**2) / 2)  # Roberts' cross: no pixel is left out, the same for mirrored images
    columns = [np.log1p(of) for of in (gray.std(axis=(1, 2)), slope.mean(axis=(1, 2)), slope.std(axis=(1, 2)))]
    values = normalised(gray)
    alpha, variance = generalised_gaussian(values.reshape(len(gray), -1))
    columns += [alpha, np.log(SMALL + variance)]
    height, width = gray.shape[1:]
    for dy, dx in NEIGHBOURS.values():
        here = values[:, : height - dy, max(0, -dx) : width - max(0, dx)]
        there = values[:, dy:, max(0, dx) : width + min(0, dx)]
        alpha, mean, left, right = asymmetric_gaussian((here * there).reshape(len(gray), -1))
        columns += [alpha, mean, np.log(SMALL + left), np.log(SMALL + right)]
    return columns


def normalised(gray: np.ndarray) -> np.ndarray:
    """Luminance [N, H, W] (0..255) less its local mean, divided by its local deviation + 1; mirrored at the border."""
    mean = _local_mean(gray)
    deviation = np.sqrt(np.maximum(_local_mean(gray**2) - mean**2, 0))
    return (gray - mean) / (deviation + 1)


def generalised_gaussian(values: np.ndarray) -> list[np.ndarray]:
    """Shape alpha and variance [N] of a generalised Gaussian with mean 0 fitted to each row [N, M], by its moments.

    The density goes with exp(-|x / b|^alpha): 1 is Laplace's, 2 is Gauss's. alpha lies in 0.2..10, 10 for all zeros.
    """
    variance = np.square(values).mean(axis=1)
    return [_shape(_ratio(np.abs(values).mean(axis=1) ** 2, variance)), variance]


def asymmetric_gaussian(values: np.ndarray) -> list[np.ndarray]:
    """Shape, mean, left and right variance [N] of an asymmetric one fitted to each row [N, M], by its moments.

    Source: Lasmar, Stitou and Berthoumieu (ICIP, 2009), as used in BRISQUE.
    """
    left, right = (_part_variance(values, values < 0), _part_variance(values, values > 0))
    squares = np.square(values).mean(axis=1)
    lean = _ratio(np.sqrt(left), np.sqrt(right))
    moments = _ratio(np.abs(values).mean(axis=1) ** 2, squares)
    alpha = _shape(moments * (lean**3 + 1) * (lean + 1) / (lean**2 + 1) ** 2)
    scale = np.exp(gammaln(2 / alpha) - (gammaln(1 / alpha) + gammaln(3 / alpha)) / 2)
    return [alpha, (np.sqrt(right) - np.sqrt(left)) * scale, left, right]


def _shape(moments: np.ndarray) -> np.ndarray:
    """The shape alpha that has these moments."""
    return np.interp(moments, MOMENTS, SHAPES)


def _part_variance(values: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Mean square of the values in a part of each row, 0 where it is empty."""
    return np.square(values * part).sum(axis=1) / np.maximum(part.sum(axis=1), 1)


def _ratio(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """one / other; 1 where both are 0 but for rounding, as for a constant image."""
    return (one + ROUNDING) / (other + ROUNDING)


def _local_mean(gray: np.ndarray) -> np.ndarray:
    rows = gaussian_filter1d(gray, WINDOW["sigma"], axis=1, radius=WINDOW["radius"])
    return gaussian_filter1d(rows, WINDOW["sigma"], axis=2, radius=WINDOW["radius"])


def _halved(gray: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels; an odd last row or column is left out."""
    count, height, width = gray.shape
    even = gray[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(count, height // 2, 2, width // 2, 2).mean(axis=(2, 4))


def _blockiness(gray: np.ndarray) -> np.ndarray:
    """log of (1 + mean step at the phase of 8 pixels with the largest) / (1 + mean step at all others), both ways.

    The phase is free, as crops move the blocks. 0 for images of less than two blocks.
    """
    if min(gray.shape[1:]) < 2 * PERIOD:
        return np.zeros(len(gray))
    ways = []
    for axis in (1, 2):
        steps = np.abs(np.diff(gray, axis=axis)).mean(axis=3 - axis)  # [N, side - 1]
        phases = np.stack([steps[:, phase::PERIOD].mean(axis=1) for phase in range(PERIOD)])
        worst = phases.max(axis=0)
        ways.append(np.log((1 + worst) / (1 + (phases.sum(axis=0) - worst) / (PERIOD - 1))))
    return np.mean(ways, axis=0)


def _colourfulness(images: np.ndarray) -> np.ndarray:
    """Deviation plus 0.3 times the mean length of the two opponent colours, 0 for gray."""
    if images.shape[3] == 1:
        return np.zeros(len(images))
    red, green, blue = np.moveaxis(images.astype(np.float64), 3, 0)
    first, second = red - green, (red + green) / 2 - blue
    spread, length = (
        np.sqrt(sum(of(opponent, axis=(1, 2)) ** 2 for opponent in (first, second))) for of in (np.std, np.mean)
    )
    return spread + 0.3 * length
