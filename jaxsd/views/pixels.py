"""What can be done to pixels: resize, gray, quarter turns, Harris corners. Arrays in, arrays out.

Images are [..., H, W, C], uint8 or float in any range; what comes back is in the same units.
"""

from typing import Any

import numpy as np
from einops import rearrange

from jaxsd.errors import UserError

RULES = ("legacy", "half_pixel", "antialias")
GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in OpenCV and Pillow


def resize(images: np.ndarray, height: int, width: int, *, rule: str = "legacy") -> np.ndarray:
    """Bilinear resize of images [..., H, W, C] to float32 [..., height, width, C].

    Target pixel i of n samples a side of N pixels (pixel j lies at j) at
        legacy      i N/n: the first TensorFlow's rule. At half size it keeps the pixels at even places, which is what
                    ScaleNet describes (section 3.1.1), and it does not commute with turning the image.
        half_pixel  (i + 1/2) N/n - 1/2: OpenCV and torch.
        antialias   the same place, under a triangle that widens with N/n when shrinking: Pillow, torch's antialias.
    Beyond the border the border pixel counts (antialias: the weights inside are scaled up to sum to 1).
    """
    check_rule(rule)
    if height < 1 or width < 1:
        raise UserError(f"images must be resized to at least 1 x 1 pixel: got {height} x {width}")
    return _resized_axis(_resized_axis(images, -3, height, rule), -2, width, rule)


def gray(images: np.ndarray) -> np.ndarray:
    """Luminance float32 [..., H, W] of RGB images [..., H, W, 3]; of one-channel images the channel itself."""
    channels = images.shape[-1]
    if channels == 1:
        return images[..., 0].astype(np.float32)
    if channels != 3:
        raise UserError(f"gray needs images with 1 or 3 channels: got {channels}")
    red, green, blue = (np.float32(weight) * images[..., c].astype(np.float32) for c, weight in enumerate(GRAY_WEIGHTS))
    return red + green + blue


def quarter_turns(images: Any, k: int) -> Any:
    """Images [..., H, W, C] turned k quarter turns counter-clockwise: [..., W, H, C] for odd k.

    Flips and transposes only, so pixels move and never change (ScaleNet section 2.2). numpy and JAX arrays alike.
    """
    k %= 4
    if k == 0:
        return images
    if k == 1:
        return images.swapaxes(-3, -2)[..., ::-1, :, :]
    if k == 2:
        return images[..., ::-1, ::-1, :]
    return images[..., ::-1, :, :].swapaxes(-3, -2)


def turned(images: Any, turns: tuple[int, ...] = (0, 1, 2, 3)) -> Any:
    """Every one of the quarter turns of images [B, H, W, C], image-major: [turns * B, H, W, C].

    Position len(turns) * i + k holds image i turned turns[k] times counter-clockwise, as in RotNet's loader. numpy and
    JAX arrays alike.
    """
    if images.shape[1] != images.shape[2] and any(k % 2 for k in turns):
        size = f"{images.shape[1]} x {images.shape[2]}"
        raise UserError(f"quarter turns need square images, got {size}: give them a square size, or turns=(0, 2)")
    return rearrange([quarter_turns(images, k) for k in turns], "turns b h w c -> (b turns) h w c")


def harris_response(gray: np.ndarray, *, block: int = 2, sobel: int = 3, k: float = 0.04) -> np.ndarray:
    """Harris corner response float32 [N, H, W] of gray images [N, H, W], equal to OpenCV's cornerHarris on float input.

    With Sobel gradients gx, gy (scaled by 1 / (2^(sobel - 1) block)) and A, B, C the sums of gx^2, gx gy, gy^2 over
    block x block pixels, the response is AC - B^2 - k (A + C)^2. Borders reflect without repeating the edge pixel. An
    even block reaches one pixel further to the upper left, so its response does not turn with the image. It grows with
    the fourth power of the pixel range.

    block: at least 2. sobel: kernel size, odd, 3 to 31. k: in [0, 0.25); from 0.25 on no response is positive.
    Source: Harris & Stephens, Alvey Vision Conference 1988.
    """
    check_harris(block, sobel, k)
    smooth, slope = _binomial(sobel - 1), np.convolve(_binomial(sobel - 3), [-1, 0, 1])
    gray = gray.astype(np.float32) / np.float32(2 ** (sobel - 1) * block)
    gx, gy = _correlate(gray, smooth, slope), _correlate(gray, slope, smooth)
    window = np.ones(block)
    a, b, c = (_correlate(product, window, window) for product in (gx * gx, gx * gy, gy * gy))
    return a * c - b * b - np.float32(k) * (a + c) ** 2


def mark_corners(
    images: np.ndarray,
    *,
    value: int = 255,
    block: int = 2,
    sobel: int = 3,
    k: float = 0.04,
    threshold: float = 0.01,
) -> np.ndarray:
    """A copy of uint8 images [N, H, W, C] with `value` in every channel of their Harris corners.

    A pixel is a corner where its response is above threshold times the image's largest response; an image without
    contrast has none. Corners are found on the gray image rounded to uint8 (as OpenCV makes it), so marking corners
    and turning gray may come in either order. No dilation.
    Source: ScaleNet section 3.1.2, which leaves the detector's settings open; the defaults are OpenCV's tutorial's.
    """
    response = harris_response(np.rint(gray(images)), block=block, sobel=sobel, k=k)
    corners = response > np.float32(threshold) * response.max(axis=(1, 2), keepdims=True)
    return np.where(corners[..., None], np.uint8(value), images)


def _resized_axis(images: np.ndarray, axis: int, target: int, rule: str) -> np.ndarray:
    """Images [..., H, W, C] resized along one negative axis only: float32."""
    size = images.shape[axis]
    if target == size:
        return images.astype(np.float32)
    positions, weights = _taps(size, target, rule)
    column = (-1,) + (1,) * (-1 - axis)  # weights lie along the axis
    total = np.zeros((), np.float32)
    for position, weight in zip(positions.T, weights.T, strict=True):
        if weight.any():
            total = total + np.take(images, position, axis).astype(np.float32, copy=False) * weight.reshape(column)
    return total


def _taps(size: int, target: int, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each target pixel reads from: positions [target, taps] and weights float32 that sum to 1.

    Every rule is a triangle around a centre; weights outside the image are dropped and the rest scaled up, which for
    a triangle one pixel wide is the same as repeating the border pixel.
    """
    places = np.arange(target)
    # whole numbers up to the last division, so that a centre on a pixel hits it exactly
    centre = places * size / target if rule == "legacy" else ((2 * places + 1) * size - target) / (2 * target)
    reach = max(size / target, 1.0) if rule == "antialias" else 1.0
    first = np.floor(centre - reach).astype(int) + 1
    positions = first[:, None] + np.arange(int(np.ceil(2 * reach)))
    weights = np.maximum(0, 1 - np.abs(positions - centre[:, None]) / reach)
    weights[(positions < 0) | (positions >= size)] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    return positions.clip(0, size - 1), weights.astype(np.float32)


def check_rule(rule: str) -> None:
    """Raises UserError for an unknown resize rule."""
    if rule not in RULES:
        raise UserError(f"unknown resize rule {rule!r}: choose one of {', '.join(RULES)}")


def check_harris(block: int, sobel: int, k: float) -> None:
    """Raises UserError for settings under which the Harris detector means nothing."""
    if block < 2:
        raise UserError(f"harris block must be at least 2 pixels, one pixel has no corner: got {block}")
    if sobel % 2 == 0 or not 3 <= sobel <= 31:
        raise UserError(f"harris sobel must be an odd kernel size from 3 to 31: got {sobel}")
    if not 0 <= k < 0.25:
        raise UserError(f"harris k must be in [0, 0.25), where corners have a positive response: got {k}")


def _binomial(order: int) -> np.ndarray:
    """Row `order` of Pascal's triangle: the smoothing half of a Sobel kernel."""
    row = np.ones(1)
    for _ in range(order):
        row = np.convolve(row, [1, 1])
    return row


def _correlate(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Images [N, H, W] under the kernel rows x columns, anchored at half its size, borders reflected."""
    for axis, kernel in ((1, rows), (2, columns)):
        size, before = images.shape[axis], len(kernel) // 2
        border = [(0, 0)] * 3
        border[axis] = (before, len(kernel) - 1 - before)
        padded = np.pad(images, border, mode="reflect")
        ahead = (slice(None),) * axis
        shifted = [np.float32(weight) * padded[*ahead, i : i + size] for i, weight in enumerate(kernel) if weight]
        images = sum(shifted[1:], shifted[0])
    return images
