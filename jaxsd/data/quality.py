"""Degraded photographs with a computed quality score: no download, no human opinion."""

import importlib.metadata
import io
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, features

from jaxsd.data.cache import arrays_cached, chosen_folder
from jaxsd.data.decode import cores
from jaxsd.data.embedded import PHOTOS, photograph
from jaxsd.data.source import Source, Splits
from jaxsd.errors import RunError, UserError

SEED = 0  # scenes, noise and bit errors are the same in every run
SIZES = (32, 512)  # pixels: what bit errors leave readable, and what a few of the photographs have
STREAM = 36.0  # decibels of the JPEG 2000 stream that is sent over the fading channel
ATTEMPTS = 1000  # draws of bit errors before giving up on a stream that none of them leaves readable
PACKAGES = ("numpy", "scipy", "pillow", "scikit-image", "scikit-learn")  # what pixels and scores depend on
CODECS = ("jpg", "jpg_2000", "libjpeg_turbo")
SCORE = "100 (1 - SSIM) against the original, computed, no human opinion; higher is worse"


class Scene(NamedTuple):
    """A square part of a photograph."""

    name: str  # "astronaut/y0_x64"
    pixels: np.ndarray  # uint8 [size, size, 3]


def jp2k(image: np.ndarray, decibels: float, random: np.random.Generator) -> np.ndarray:
    """JPEG 2000 with just the bits for a peak signal-to-noise ratio."""
    return _decoded(_jpeg2000(image, decibels))


def jpeg(image: np.ndarray, quality: float, random: np.random.Generator) -> np.ndarray:
    """JPEG at a quality of 1 to 95, colour at half the resolution."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=round(quality), subsampling="4:2:0")
    return _decoded(file.getvalue())


def wn(image: np.ndarray, deviation: float, random: np.random.Generator) -> np.ndarray:
    """White Gaussian noise of a deviation in levels, drawn for each channel."""
    return np.rint(image + random.normal(0, deviation, image.shape)).clip(0, 255).astype(np.uint8)


def gblur(image: np.ndarray, deviation: float, random: np.random.Generator) -> np.ndarray:
    """A round Gaussian blur of a deviation in pixels; the image is mirrored at its border."""
    from scipy.ndimage import gaussian_filter

    return np.rint(gaussian_filter(image.astype(np.float64), (deviation, deviation, 0))).astype(np.uint8)


def fastfading(image: np.ndarray, errors: float, random: np.random.Generator) -> np.ndarray:
    """A JPEG 2000 stream in which so many bits have flipped; its headers are spared.

    The image is coded in four tiles, so that an error stays in one. Errors that leave nothing to decode are drawn
    again.
    """
    height, width, _ = image.shape
    stream = _jpeg2000(image, STREAM, tile_size=(-(-width // 2), -(-height // 2)))
    body = _body(stream)
    for _ in range(ATTEMPTS):
        damaged, bits = bytearray(stream), random.choice(8 * len(body), round(errors), replace=False)
        for place, bit in zip(body[bits // 8], bits % 8, strict=True):
            damaged[place] ^= 1 << bit
        try:
            return _decoded(damaged)
        except OSError:
            continue
    raise RunError(f"no damaged JPEG 2000 stream of {ATTEMPTS} could be decoded: use larger scenes")


Degrade = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
KINDS: dict[str, tuple[Degrade, float, float]] = {  # how, with the mildest and the strongest level
    "jp2k": (jp2k, 34, 20),
    "jpeg": (jpeg, 40, 4),
    "wn": (wn, 6, 100),
    "gblur": (gblur, 0.6, 6),
    "fastfading": (fastfading, 2, 60),
}


def photos_quality(
    *, size: int = 64, levels: int = 5, scenes_per_photo: int = 4, cache: str | Path | None = "auto"
) -> Splits:
    """Degraded scenes of ten colour photographs, uint8 [N, size, size, 3], with a score of the damage.

    Each photograph is cut into squares that do not overlap, and `scenes_per_photo` of them (or all, if it has fewer)
    are drawn from the half with the most detail. Each scene is degraded in the five ways of LIVE (Sheikh et al.,
    2006): JPEG 2000 and JPEG coding, white noise, Gaussian blur, and bit errors in a JPEG 2000 stream; at `levels`
    strengths (2 to 20) in equal ratios. The originals are not in the set.

    The score is computed, nobody was asked: 100 (1 - SSIM) of the luminance against the original, with the 11-pixel
    Gaussian window, the constants and the population covariance of Wang et al. (2004). 0 is no change; higher is worse.
    All images are in `train`; the group is the scene, so that a split by group never shows a scene on both sides.
    Equal in every run with the same versions of Pillow, its codecs and scikit-image. Source: the photographs in the
    scikit-image and scikit-learn wheels.
    size: 32 to 512 pixels; only four photographs have 512. cache: folder for the images, "auto" for the user's cache
    folder, None or "" for none.
    Raises UserError for a size, levels or scenes outside these ranges, and where Pillow lacks JPEG 2000.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"photos_quality has scenes of {SIZES[0]} to {SIZES[1]} pixels: got size {size}")
    if not 2 <= levels <= 20:
        raise UserError(f"photos_quality has 2 to 20 levels of each degradation: got {levels}")
    if scenes_per_photo < 1:
        raise UserError(f"photos_quality needs at least 1 scene per photograph: got {scenes_per_photo}")
    if not features.check("jpg_2000"):
        raise UserError("photos_quality needs JPEG 2000, which this Pillow was built without: install Pillow's wheel")
    asked = (size, levels, scenes_per_photo)
    amounts = [ends for _, *ends in KINDS.values()]
    key = (asked, amounts, SEED, STREAM, _versions())
    name = f"photos_quality-{size}-{levels}-{scenes_per_photo}"
    made = arrays_cached(name, key, chosen_folder(cache), lambda: _made(*asked))
    scenes = [str(scene) for scene in made["scenes"]]
    grid = [(scene, kind, level) for scene in scenes for kind in KINDS for level in range(1, levels + 1)]
    source = Source(
        made["images"],
        names=tuple(f"{scene}/{kind}{level}" for scene, kind, level in grid),
        scores=made["scores"],
        groups=tuple(scene for scene, _, _ in grid),
        kinds=tuple(kind for _, kind, _ in grid),
    )
    return Splits("photos_quality", source, None, None, score=SCORE)


def _made(size: int, levels: int, count: int) -> dict[str, np.ndarray]:
    """Names of the scenes, and images and scores: scene by scene, kind by kind, the mildest first."""
    scenes = [scene for name in PHOTOS for scene in _scenes(name, size, count)]
    with ThreadPoolExecutor(cores()) as pool:
        parts = list(pool.map(lambda scene: _degraded(scene, levels), scenes))
    images, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return {"scenes": np.array([scene.name for scene in scenes]), "images": images, "scores": scores}


def _scenes(name: str, size: int, count: int) -> list[Scene]:
    """Up to `count` squares of a grid from the upper left corner of a photograph, in reading order."""
    image = photograph(name)
    pixels, luminance = np.asarray(image), np.asarray(image.convert("L"), np.float32)
    tops, lefts = (range(0, side - size + 1, size) for side in (image.height, image.width))
    places = [(top, left) for top in tops for left in lefts]
    down, across = np.gradient(luminance)
    slopes = np.hypot(down, across)
    detail = np.array([slopes[top : top + size, left : left + size].mean() for top, left in places])
    best = np.argsort(-detail, kind="stable")[: max(count, len(places) // 2)]
    random = np.random.default_rng((SEED, list(PHOTOS).index(name)))
    chosen = sorted(places[position] for position in random.permutation(best)[:count])
    return [Scene(f"{name}/y{top}_x{left}", pixels[top : top + size, left : left + size]) for top, left in chosen]


def dissimilarity(image: np.ndarray, original: np.ndarray) -> float:
    """100 (1 - SSIM) between the luminances (ITU-R 601) of two images uint8 [H, W, 3], H and W >= 11."""
    from skimage.metrics import structural_similarity

    one, other = (np.asarray(Image.fromarray(pixels).convert("L")) for pixels in (image, original))
    similarity: Any = structural_similarity(
        one, other, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return 100 * (1 - float(similarity))


def _degraded(scene: Scene, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """All degraded versions of a scene, kind by kind and the mildest first, and their scores."""
    images, number = [], zlib.crc32(scene.name.encode())
    for which, (degrade, mildest, strongest) in enumerate(KINDS.values()):
        for level, amount in enumerate(np.geomspace(mildest, strongest, levels)):
            random = np.random.default_rng((SEED, number, which, level))
            images.append(degrade(scene.pixels, float(amount), random))
    return np.stack(images), np.array([dissimilarity(image, scene.pixels) for image in images], np.float32)


def _jpeg2000(image: np.ndarray, decibels: float, **options: Any) -> bytes:
    """A JPEG 2000 code stream of one layer, with the 9/7 wavelet."""
    file = io.BytesIO()
    layers = {"quality_mode": "dB", "quality_layers": [decibels]}
    Image.fromarray(image).save(file, "JPEG2000", no_jp2=True, irreversible=True, **layers, **options)
    return file.getvalue()


def _body(stream: bytes) -> np.ndarray:
    """The places of a JPEG 2000 stream that belong to no header and no marker, int64 (ISO/IEC 15444-1, annex A)."""
    places, at = [], stream.index(b"\xff\x90")  # the header of the first tile, after that of the image
    while stream[at : at + 2] == b"\xff\x90":
        end = at + int.from_bytes(stream[at + 6 : at + 10], "big")
        places.append(np.arange(stream.index(b"\xff\x93", at) + 2, end))  # behind "start of data"
        at = end
    return np.concatenate(places)


def _decoded(file: bytes | bytearray) -> np.ndarray:
    """The pixels of a coded image."""
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def _versions() -> tuple[str | None, ...]:
    """Versions of all that makes the pixels and scores."""
    packages = [importlib.metadata.version(package) for package in PACKAGES]
    return (*packages, *(features.version(codec) for codec in CODECS))
