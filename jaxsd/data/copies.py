"""Which images are copies of others: pixel for pixel, or nearly (resized, encoded anew, brightened, mirrored)."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxsd.data.source import Source
from jaxsd.errors import UserError

SIDE = 12  # of a thumbnail, in cells: what is left of an image after any change that a copy goes through
VALUES = 1 << 20  # pixels converted to float at a time
PRODUCTS = 1 << 24  # likenesses held at a time
# Set by eye, with the nearest pairs of six sets of photographs and digits laid side by side.
LEAST, MOST, SHARE = 0.87, 0.99, 0.4  # of the likeness that makes a copy, see `near`
SIGNS, CLEAR = 0.85, 0.2  # least share of equal signs among the differences above a fifth of their usual size
PIXELS = 0.92  # least correlation of the thumbnails themselves, colours included
FAINT = 0.25  # gray levels; weaker contrast is rounding


class Copies(NamedTuple):
    """Images that are copies, and of what; positions int64 [n], rows in increasing order and each once."""

    rows: np.ndarray
    of: np.ndarray
    mirrored: np.ndarray  # bool [n]: left and right are exchanged

    def without(self, other: "Copies") -> "Copies":
        """Those whose row is in no other one."""
        kept = ~np.isin(self.rows, other.rows)
        return Copies(*(part[kept] for part in self))


def duplicates(a: Source, b: Source) -> int:
    """How many images of `b` equal some image of `a` pixel for pixel (0 where the image sizes differ)."""
    return len(equal(b, of=a).rows)


def equal(source: Source, *, of: Source | None = None) -> Copies:
    """Images that equal the first such image of another source pixel for pixel, or an earlier one of their own source.

    of: the other source; None finds what equals an earlier image of the same one.
    """
    rows, places = [], []
    if of is None or of.shape == source.shape:
        known: dict[bytes, int] = {}
        for position, key in enumerate(_row_hashes(of) if of is not None else ()):
            known.setdefault(key, position)
        for position, key in enumerate(_row_hashes(source)):
            if key in known:
                rows.append(position)
                places.append(known[key])
            elif of is None:
                known[key] = position
    return Copies(np.array(rows, np.int64), np.array(places, np.int64), np.zeros(len(rows), bool))


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Means of 12 x 12 equal areas of images uint8 [N, H, W, C]: float32 [N, 12, 12, C], fewer where a side is less."""
    count, height, width, channels = images.shape
    down, across = _areas(height), _areas(width)
    small = np.empty((count, len(down), len(across), channels), np.float32)
    step = max(1, VALUES // images[0].size)
    for start in range(0, count, step):
        part = images[start : start + step].astype(np.float32)
        lines = down @ part.reshape(len(part), height, width * channels)
        cells = across @ lines.reshape(-1, width, channels)
        small[start : start + step] = cells.reshape(len(part), *small.shape[1:])
    return small


def near(small: np.ndarray, *, of: np.ndarray | None = None, scenes: Sequence[str] = ()) -> Copies:
    """Images that are nearly equal to one of another set, as it is or mirrored; equal ones are among them.

    small, of: thumbnails [N, h, w, C] and [M, h, w, C]; without `of`, what is nearly equal to an earlier one counts.
    scenes: without `of`, the scene of each image, if any are named: images of one scene are not compared.
    For every image the nearest other one is found by the likeness r: the correlation of the differences between
    neighbouring cells in gray, which brightness and contrast do not change. It is a copy where
        r is at least 1 - 0.4 (1 - m)^2 within [0.87, 0.99], m being the median of all images' r, so that images which
            are all alike, such as digits, have to be more alike;
        85 % of the differences that are not faint have the same sign (these signs are a difference hash), so that one
            strong edge does not decide alone;
        the thumbnails correlate to 0.92, colours included.
    Images without contrast are no copies. What is cropped, turned or recoloured is not found.
    """
    known = small if of is None else of
    if small.shape[1:] != known.shape[1:]:
        raise UserError(f"thumbnails differ in shape: {list(small.shape[1:])} and {list(known.shape[1:])}")
    slopes, limit, found = _slopes(small), MOST, []
    apart = np.unique(scenes, return_inverse=True)[1] if len(scenes) else np.arange(len(small))
    for mirrored in (False, True):
        others = known[:, :, ::-1] if mirrored else known
        other_slopes = _slopes(others)
        likeness, place = _nearest(slopes, other_slopes, apart=apart if of is None else None)
        if not mirrored:
            limit = float(np.clip(1 - SHARE * (1 - np.median(likeness)) ** 2, LEAST, MOST))
        rows = np.flatnonzero(likeness >= limit)
        rows = rows[_equal_signs(slopes[rows], other_slopes[place[rows]]) >= SIGNS]
        rows = rows[(_unit(small[rows]) * _unit(others[place[rows]])).sum(1) >= PIXELS]
        found.append((rows, place[rows], np.full(len(rows), mirrored), likeness[rows]))
    rows, places, mirrors, likeness = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if of is None:
        rows, places = np.maximum(rows, places), np.minimum(rows, places)
    order = np.lexsort((mirrors, -likeness, rows))
    rows, first = np.unique(rows[order], return_index=True)  # the first is the most alike
    return Copies(rows.astype(np.int64), places[order][first].astype(np.int64), mirrors[order][first])


def _areas(size: int) -> np.ndarray:
    """Weights float32 [n, size] of the pixels of a side in the means of n equal parts, n at most 12."""
    count = min(SIDE, size)
    edges, pixels = np.linspace(0, size, count + 1)[:, None], np.arange(size)
    inside = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return (inside.clip(0, 1) * count / size).astype(np.float32)


def _slopes(small: np.ndarray) -> np.ndarray:
    """Differences of neighbouring cells in gray, down and across, as vectors [N, D] of length 1 (less where faint)."""
    gray = small.mean(-1)
    down, across = np.diff(gray, axis=1), np.diff(gray, axis=2)
    return _of_length_one(np.concatenate([down.reshape(len(gray), -1), across.reshape(len(gray), -1)], axis=1))


def _equal_signs(slopes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of equal signs [N] among the elements of vectors [N, D] of length 1 that are not faint in both."""
    clear = np.maximum(abs(slopes), abs(others)) > CLEAR / max(1, slopes.shape[1]) ** 0.5
    return ((slopes * others > 0) & clear).sum(1) / np.maximum(clear.sum(1), 1)


def _unit(small: np.ndarray) -> np.ndarray:
    """Thumbnails as vectors [N, D] of mean 0 and length 1."""
    values = small.reshape(len(small), int(np.prod(small.shape[1:])))
    return _of_length_one(values - values.mean(1, keepdims=True))


def _of_length_one(values: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.maximum(length, FAINT * max(1, values.shape[1]) ** 0.5)


def _nearest(vectors: np.ndarray, others: np.ndarray, *, apart: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The largest product of each vector with another, and where; apart: numbers, not with one of the same number."""
    best, place = np.empty(len(vectors), np.float32), np.empty(len(vectors), np.int64)
    step = max(1, PRODUCTS // len(others))
    for start in range(0, len(vectors), step):
        products = vectors[start : start + step] @ others.T
        rows = np.arange(len(products))
        if apart is not None:
            products[apart[start : start + step, None] == apart] = -1
        place[start : start + step] = nearest = products.argmax(1)
        best[start : start + step] = products[rows, nearest]
    return best, place


def _row_hashes(source: Source) -> list[bytes]:
    """One 16-byte hash per image."""
    return [hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=16).digest() for row in source.images]
