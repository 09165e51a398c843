"""Views: deterministic changes of a data set, chosen per stage. Source in, Source out.

A view is a value: views made with equal arguments are equal and hash alike, and print as they were written. Images stay
uint8 (rounded, halves to even); labels, classes and names are kept.

Views that do not turn with the image (legacy resizing, Harris corners) must come before it is turned, or they print
the answer of the rotation task into the picture; as a stage's view they do. Source: ScaleNet (Huang & Roozbahani,
GCPR 2021), sections 3.1.1 and 3.1.2.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np

from jaxsd.data.source import Grid, Source
from jaxsd.errors import UserError
from jaxsd.views import pixels

View = Callable[[Source], Source]

CHUNK = 1 << 20  # values converted to float at a time: copies of a few MB stay in the cache


@dataclass(frozen=True)
class scale:
    """Bilinear resize of both sides by alpha in (0, 1]; alpha 1 gives the same source back.

    Sides of alpha times the size are rounded to whole pixels, halves to even. rule: see `pixels.resize`.
    Raises UserError for alpha outside (0, 1], and when a side would be shorter than one pixel.
    Source: ScaleNet sections 2.1 and 3.1.1.
    """

    alpha: float
    _: KW_ONLY
    rule: str = "legacy"

    def __post_init__(self):
        if not 0 < self.alpha <= 1:
            raise UserError(f"scale needs alpha in (0, 1], a share of the side length: got {self.alpha}")
        pixels.check_rule(self.rule)
        object.__setattr__(self, "alpha", float(self.alpha))  # scale(1) and scale(1.0) also print alike

    def __call__(self, source: Source) -> Source:
        """The source with resized images."""
        return _resized(source, self.alpha, self.alpha, self.rule)


@dataclass(frozen=True)
class stretch:
    """Bilinear resize by different factors: height times alpha_y, width times alpha_x, each above 0.

    Sides are rounded to whole pixels, halves to even. rule: see `pixels.resize`.
    Raises UserError when a side would be shorter than one pixel.
    """

    alpha_y: float
    alpha_x: float
    _: KW_ONLY
    rule: str = "legacy"

    def __post_init__(self):
        if not (0 < self.alpha_y < float("inf") and 0 < self.alpha_x < float("inf")):
            raise UserError(f"stretch needs factors above 0: got alpha_y {self.alpha_y}, alpha_x {self.alpha_x}")
        pixels.check_rule(self.rule)
        object.__setattr__(self, "alpha_y", float(self.alpha_y))
        object.__setattr__(self, "alpha_x", float(self.alpha_x))

    def __call__(self, source: Source) -> Source:
        """The source with stretched images."""
        return _resized(source, self.alpha_y, self.alpha_x, self.rule)


@dataclass(frozen=True)
class gray:
    """Every channel replaced by the luminance 0.299 R + 0.587 G + 0.114 B; one-channel images stay as they are.

    Source: the pseudo-gray images of ScaleNet section 3.1.2.
    """

    def __call__(self, source: Source) -> Source:
        """The source in gray."""
        if source.shape[-1] == 1:
            return source
        return source.with_images(_in_chunks(_gray_in_all_channels, source.images, source.shape))


@dataclass(frozen=True)
class harris:
    """Corners overwritten with `value` (0..255) in every channel. Settings: see `pixels.mark_corners`.

    threshold: in [0, 1), as a share of each image's largest response. Source: ScaleNet section 3.1.2.
    """

    _: KW_ONLY
    value: int = 255
    block: int = 2
    sobel: int = 3
    k: float = 0.04
    threshold: float = 0.01

    def __post_init__(self):
        pixels.check_harris(self.block, self.sobel, self.k)
        if self.value not in range(256):
            raise UserError(f"harris value must be a whole number from 0 to 255: got {self.value}")
        if not 0 <= self.threshold < 1:
            raise UserError(
                f"harris threshold must be in [0, 1), a share of the largest response: got {self.threshold}"
            )

    def __call__(self, source: Source) -> Source:
        """The source with its corners overwritten."""

        def mark(images: np.ndarray) -> np.ndarray:
            return pixels.mark_corners(
                images, value=self.value, block=self.block, sobel=self.sobel, k=self.k, threshold=self.threshold
            )

        return source.with_images(_in_chunks(mark, source.images, source.shape))


@dataclass(frozen=True)
class hybrid:
    """A mix: each image is replaced by what `view` makes of it with probability `share` in [0, 1].

    The draw is a function of seed and the image's position alone, so it does not depend on how many images follow, and
    is the same in every epoch. The view must keep the image size. Source: the hybrid images of ScaleNet section 3.1.2,
    which leaves the share open.
    """

    view: View
    _: KW_ONLY
    share: float = 0.5
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise UserError(f"hybrid share must be in [0, 1], the probability of the view: got {self.share}")

    def __call__(self, source: Source) -> Source:
        """The mixed source."""
        drawn = np.flatnonzero(np.random.default_rng(self.seed).random(len(source)) < self.share)
        if not len(drawn):
            return source
        viewed = self.view(source.take(drawn))
        if viewed.shape != source.shape:
            raise UserError(
                f"hybrid needs a view that keeps the image size: {self.view} made {viewed.shape} from {source.shape}"
            )
        images = source.images.copy()
        images[drawn] = viewed.images
        return source.with_images(images)


@dataclass(frozen=True)
class patches:
    """Every image cut into square patches of `size` pixels, one every `stride` pixels (default: side by side).

    Must be the last view. The patches are cut when they are needed: nothing is copied. Raises UserError where they do
    not reach the last row and column. Source: patch self-pretraining (growing patches), algorithm 1.
    """

    size: int
    stride: int | None = None

    def __post_init__(self):
        self._grid()  # for its errors

    def _grid(self) -> Grid:
        return Grid(self.size, self.size if self.stride is None else self.stride)

    def __call__(self, source: Source) -> Source:
        """The source with a grid."""
        if source.grid is not None:
            raise UserError("patches of patches: give one view 'patches' and make it the last one")
        return replace(source, grid=self._grid())


@dataclass(frozen=True, init=False, repr=False)
class compose:
    """Views one after the other, the first one first; without views the identity."""

    views: tuple[View, ...]

    def __init__(self, *views: View):
        object.__setattr__(self, "views", views)

    def __repr__(self) -> str:
        return f"compose({', '.join(map(repr, self.views))})"

    def __call__(self, source: Source) -> Source:
        """The source after every view."""
        for view in self.views:
            source = view(source)
        return source


def _resized(source: Source, alpha_y: float, alpha_x: float, rule: str) -> Source:
    """A source whose sides are alpha_y and alpha_x times as long, rounded to whole pixels."""
    height, width, channels = source.shape
    rows, columns = round(height * alpha_y), round(width * alpha_x)
    if (rows, columns) == (height, width):
        return source
    if rows < 1 or columns < 1:
        raise UserError(
            f"images of {height} x {width} pixels are too small for alpha {min(alpha_y, alpha_x)}: "
            f"nothing is left; use a larger alpha"
        )
    if rule == "legacy" and height % rows == 0 and width % columns == 0:  # single pixels survive: no arithmetic
        return source.with_images(np.ascontiguousarray(source.images[:, :: height // rows, :: width // columns]))

    def shrink(images: np.ndarray) -> np.ndarray:
        return _rounded(pixels.resize(images, rows, columns, rule=rule))

    return source.with_images(_in_chunks(shrink, source.images, (rows, columns, channels)))


def _gray_in_all_channels(images: np.ndarray) -> np.ndarray:
    """Luminance uint8 [N, H, W, 1], to be repeated over the channels."""
    return _rounded(pixels.gray(images))[..., None]


def _rounded(values: np.ndarray) -> np.ndarray:
    """Floats as uint8: rounded, halves to even, and kept inside 0..255."""
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _in_chunks(function: Callable, images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """function(images) uint8 [N, *shape], applied to a few images at a time to keep its float copies small."""
    result = np.empty((len(images), *shape), np.uint8)
    step = max(1, CHUNK // max(images[0].size, int(np.prod(shape))))
    for start in range(0, len(images), step):
        result[start : start + step] = function(images[start : start + step])
    return result
