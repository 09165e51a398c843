"""Image files to uint8 arrays of one size."""

import os
import stat
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from jaxsd.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
UNRESIZED = ("reflect", "zeros")  # canvases that keep every pixel as it is
CANVASES = ("crop", "pad", "squash", *UNRESIZED)
MAX_SIDE = 30_000  # pixels; beyond, a file is an accident or an attack. Pillow itself refuses 179 million pixels
RESAMPLING = Image.Resampling.BICUBIC  # in Pillow always antialiased
# How Pillow's warnings begin where a directory of TIFF tags, which EXIF data are too, is damaged.
DAMAGED_TAGS = ("Corrupt EXIF data", "Possibly corrupt EXIF data", "Tag ", "Truncated File Read")
EXIF_HEADERS = (b"", b"II*\0", b"MM\0*")
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a TIFF tag and one of its values
SCALED = {"1": 255, "L;2": 85, "L;4": 17}  # what Pillow multiplies a PNG's gray levels of few bits by


class Layout(NamedTuple):
    """What every image becomes: [height, width, channels]."""

    size: tuple[int, int] | None  # (height, width); None: every image as large as it is
    canvas: str  # one of CANVASES
    channels: int  # 1 (gray) or 3


class Decoded(NamedTuple):
    """Decoded files in order, without those that could not be read."""

    images: np.ndarray  # uint8 [N, H, W, C]
    bad: dict[int, str]  # position of each unreadable file -> the reason
    doubts: dict[int, str]  # position of each file that was read, but may not show what is meant -> the reason
    lasting: bool = True  # False where the system failed to give a file, which may go better next time


class Refused(ValueError):
    """A file that is understood, but not taken as an image; says why."""


class Header(NamedTuple):
    """What an image file says of itself before it is decoded."""

    format: str  # "JPEG"
    mode: str  # Pillow's: "RGB", "L" (gray), "P" (palette), "CMYK", ...
    width: int  # pixels, before it is turned upright
    height: int


class _Unreadable(NamedTuple):
    """Why a file gave no image."""

    reason: str
    lasting: bool = True


class _Read(NamedTuple):
    """The image of a file."""

    pixels: np.ndarray  # uint8 [H, W, C]
    doubt: str


class _Warned(threading.local):
    """What Pillow has warned of while this thread read its present file."""

    def __init__(self):
        self.texts: list[str] = []

    def of_damaged_tags(self) -> bool:
        return any(text.startswith(DAMAGED_TAGS) for text in self.texts)


_warned = _Warned()


def layout(size: int | tuple[int, int] | None, canvas: str, channels: int) -> Layout:
    """A checked Layout; a single number means a square."""
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and (len(sides) != 2 or not all(1 <= side <= MAX_SIDE for side in sides)):
        raise UserError(f"size must be a number of pixels or (height, width), 1 to {MAX_SIDE}: got {size}")
    if canvas not in CANVASES:
        raise UserError(f"canvas '{canvas}' is not known: use one of {', '.join(CANVASES)}")
    if channels not in (1, 3):
        raise UserError(f"channels must be 1 (gray) or 3 (colour): got {channels}")
    return Layout(None if sides is None else (sides[0], sides[1]), canvas, channels)


def decode_all(paths: Sequence[str], names: Sequence[str], target: Layout) -> Decoded:
    """Decodes files with one thread per core, with a progress bar where stderr is a terminal.

    Raises UserError where target.size is None and the images differ in size.
    """
    out: np.ndarray = np.empty((0, 0, 0, 0), np.uint8)
    first, count, lasting = "", 0, True
    bad: dict[int, str] = {}
    doubts: dict[int, str] = {}
    pool = ThreadPoolExecutor(cores())
    with warnings.catch_warnings(), tqdm(total=len(paths), desc="reading images", unit="", disable=None) as bar:
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: _warned.texts.append(str(message))
        try:
            for position, result in enumerate(pool.map(lambda path: _decode_or_reason(path, target), paths)):
                bar.update()
                if isinstance(result, _Unreadable):
                    bad[position], lasting = result.reason, lasting and result.lasting
                    continue
                pixels = result.pixels
                if not count:
                    first, out = names[position], np.empty((len(paths), *pixels.shape), np.uint8)
                if pixels.shape != out.shape[1:]:
                    one, other = (f"{width}x{height}" for height, width, _ in (out.shape[1:], pixels.shape))
                    raise UserError(f"images differ in size ({first} {one}, {names[position]} {other}): give size")
                out[count] = pixels
                count += 1
                if result.doubt:
                    doubts[position] = result.doubt
        finally:
            pool.shutdown(cancel_futures=True)
    return Decoded(out[:count], bad, doubts, lasting)


def headers(paths: Sequence[str]) -> list[Header]:
    """What image files say of themselves, in order, without those that no reader knows; no pixel is decoded."""

    def read(path: str) -> Header | None:
        try:
            with Image.open(path, formats=FORMATS) as image:
                return Header(image.format or "", image.mode, *image.size)
        except Exception:  # as in decoding: nearly any exception can come out of wrong bytes
            return None

    with warnings.catch_warnings(), ThreadPoolExecutor(cores()) as pool:
        warnings.simplefilter("ignore")
        return [header for header in pool.map(read, paths) if header is not None]


def fit(image: Image.Image, target: Layout) -> Image.Image:
    """An 8-bit image on the target's canvas; one that has the target's size already is returned as it is.

    crop: the largest centred part with the target's proportions, resized. pad: resized to fit inside, the rest filled
    with the mean colour of the outermost pixels. squash: resized without regard to proportions. Bicubic, antialiased.
    reflect, zeros: not resized, but cut around the centre where a side is longer, and continued on both sides where it
    is shorter (the odd pixel at the end), by mirroring without the edge itself ([a, b] becomes [b, a, b, a]) or black.
    """
    if target.size is None or image.size == target.size[::-1]:
        return image
    height, width = target.size
    if target.canvas in UNRESIZED:
        return _unresized(image, target.size, "reflect" if target.canvas == "reflect" else "constant")
    if target.canvas == "squash":
        return image.resize((width, height), RESAMPLING)
    if target.canvas == "crop":
        part_width = min(image.width, image.height * width / height)
        part_height = min(image.height, image.width * height / width)
        left, top = int(image.width - part_width) // 2, int(image.height - part_height) // 2
        return image.resize((width, height), RESAMPLING, box=(left, top, left + part_width, top + part_height))
    factor = min(width / image.width, height / image.height)
    inside = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    inner = image if inside == image.size else image.resize(inside, RESAMPLING)
    padded = Image.new(image.mode, (width, height), _edge_colour(inner))
    padded.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return padded


def eight_bit(image: Image.Image, channels: int) -> Image.Image:
    """Any loaded image as 8-bit gray (channels 1) or RGB (3).

    16-bit levels are scaled (65535 becomes 255). Whatever is transparent is laid on white.
    """
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise Refused("32-bit levels: save it with 8 or 16 bits")
        shown = np.where(levels == image.info.get("transparency"), 255, np.rint(levels / 257))
        image = Image.fromarray(shown.astype(np.uint8))
    if image.mode in ("F", "LAB"):
        kind = "floating-point levels" if image.mode == "F" else "CIELAB colours"
        raise Refused(f"{kind}: save it as gray or RGB with 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def _decode_or_reason(path: str, target: Layout) -> _Read | _Unreadable:
    """A decoded image, or why there is none."""
    try:
        return _decode(path, target)
    except UnidentifiedImageError:
        return _Unreadable("no image of a known format")
    except Image.DecompressionBombError:
        return _Unreadable("too large")
    except Refused as error:
        return _Unreadable(str(error))
    except (OSError, MemoryError) as error:
        if isinstance(error, MemoryError) or error.errno is not None:  # Pillow's own errors have no number
            return _Unreadable(getattr(error, "strerror", None) or "not enough memory", lasting=False)
        return _Unreadable(f"damaged: {_first_line(error)}")
    except Exception as error:  # Pillow's readers let nearly any exception out when bytes are wrong
        return _Unreadable(f"damaged: {_first_line(error)}")


def _decode(path: str, target: Layout) -> _Read:
    """Raises nearly anything where a file is no whole image."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its other end
        raise Refused("no regular file")
    if not status.st_size:
        raise Refused("empty file")
    _warned.texts = []
    with Image.open(path, formats=FORMATS) as image:
        if max(image.size) > MAX_SIDE:
            raise Refused(f"too large: {image.width}x{image.height} pixels")
        if image.format == "PNG":
            _check_sums(path)
        if target.size is not None and target.canvas not in UNRESIZED and image.format in ("JPEG", "MPO"):
            _draft(image, target.size)
        # The further frames of an MPO file are other views of a camera's picture.
        several = image.format != "MPO" and getattr(image, "is_animated", False)
        inverted = _white_is_zero(image)
        _scale_transparency(image)
        image.load()  # the first frame where there are several
        if image.format == "TIFF" and _warned.of_damaged_tags():
            raise Refused("damaged: its directory of tags is not whole")
        turned, turn_doubt = _upright(image)
        upright = eight_bit(turned, target.channels)
    pixels = np.asarray(fit(ImageOps.invert(upright) if inverted else upright, target))
    doubts = ["only the first of its frames or pages is read"] * several + [turn_doubt] * bool(turn_doubt)
    return _Read(pixels.reshape(*pixels.shape[:2], target.channels), "; ".join(doubts))


def _check_sums(path: str) -> None:
    """Raises where a checksum in a PNG file is wrong: when it loads pixels, Pillow does not look at theirs."""
    with Image.open(path, formats=("PNG",)) as image:
        image.verify()


def _upright(image: Image.Image) -> tuple[Image.Image, str]:
    """A loaded image turned as its EXIF data say, and why that may be wrong, in words."""
    doubt = "its EXIF data are damaged, so it may not be upright"
    header = image.info.get("exif", b"")[:10].removeprefix(b"Exif\0\0")[:4]
    try:
        turned = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # whatever the bytes lead to
        return image, doubt
    return turned, doubt if header not in EXIF_HEADERS or _warned.of_damaged_tags() else ""


def _white_is_zero(image: Image.Image) -> bool:
    """Whether this is a TIFF file whose 16-bit levels count from white to black: Pillow inverts 8-bit ones only."""
    tags: Any = getattr(image, "tag_v2", {})
    return image.mode.startswith("I") and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO


def _scale_transparency(image: Image.Image) -> None:
    """Scales the transparent colour of a PNG file as its pixels will be; Pillow leaves it as it is stored."""
    colour = image.info.get("transparency")
    tiles: Any = getattr(image, "tile", None)
    rawmode = tiles[0][3] if image.format == "PNG" and tiles else ""
    if rawmode in SCALED and isinstance(colour, int):
        image.info["transparency"] = colour * SCALED[rawmode]
    elif rawmode == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def _draft(image: Image.Image, size: tuple[int, int]) -> None:
    """Lets the JPEG decoder shrink a far larger image on the way, to no less than twice what is needed."""
    needed = max(size) / min(image.size)  # holds for every canvas and every turn
    if 2 * needed < 1:
        image.draft(None, (int(2 * needed * image.width), int(2 * needed * image.height)))


def _unresized(image: Image.Image, size: tuple[int, int], mode: Literal["reflect", "constant"]) -> Image.Image:
    """The centre of an image, continued where it is smaller than (height, width)."""
    pixels = np.asarray(image)
    top, left = (max(0, have - want) // 2 for have, want in zip(pixels.shape, size, strict=False))
    pixels = pixels[top : top + size[0], left : left + size[1]]
    missing = [want - have for have, want in zip(pixels.shape, size, strict=False)]
    around = [(lack // 2, lack - lack // 2) for lack in missing] + [(0, 0)] * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, around, mode=mode))


def _edge_colour(image: Image.Image) -> tuple[int, ...]:
    """Mean colour of the outermost pixels."""
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    edges = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return tuple(int(level) for level in np.rint(edges.mean(axis=0)))


def _first_line(error: Exception) -> str:
    """What an exception says, short."""
    text = str(error).strip().splitlines()
    return text[0][:100] if text else type(error).__name__


def cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
