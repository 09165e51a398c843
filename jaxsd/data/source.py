"""Images and labels in memory."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jaxsd.errors import UserError

CHUNK = 4096  # images converted at a time, so that wider copies stay small


@dataclass(frozen=True)
class Grid:
    """Square patches of `size` pixels every `stride` pixels, row by row; the last row and column end at the border.

    Raises UserError for a size or stride below 1.
    """

    size: int
    stride: int

    def __post_init__(self):
        if self.size < 1 or self.stride < 1:
            raise UserError(f"patches need a size and a stride of 1 or more: got {self.size} and {self.stride}")

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """How many patches stand below and beside each other: (side - size) / stride + 1.

        Raises UserError where that is no whole number, so that nothing of an image is lost, naming what would fit.
        """
        for side in (height, width):
            room = side - self.size
            if room < 0:
                raise UserError(f"patches of {self.size} pixels are larger than images with a side of {side}")
            if room % self.stride:
                near = [self.size + self.stride * n for n in (room // self.stride, room // self.stride + 1)]
                strides = [n for n in range(1, self.size + 1) if room % n == 0]
                raise UserError(
                    f"patches of {self.size} pixels every {self.stride} do not reach the border of a side of {side}: "
                    f"sides that do: {near[0]}, {near[1]}; or strides: {', '.join(map(str, strides[-6:]))}"
                )
        return (height - self.size) // self.stride + 1, (width - self.size) // self.stride + 1

    def count(self, height: int, width: int) -> int:
        """How many patches an image has."""
        return math.prod(self.sides(height, width))


@dataclass(frozen=True, eq=False, repr=False)
class Source:
    """Images in memory, with their labels or scores where there are any.

    images: uint8 [N, H, W, C], N >= 1.
    labels: whole numbers [N] in 0..len(classes)-1, kept as int32; None where nothing is labelled.
    classes: the name of every label. Left out: "0", "1", ... up to the largest label.
    names: where each image came from ("train/cat/3.png"), [N] or empty.
    scores: finite numbers [N] to be predicted, kept as float32; None where there are none.
    groups: the scene that each image shows, [N] or empty: images of one scene belong on one side of a split.
    kinds: what was done to each image ("jpeg"), [N] or empty: results are also given for each kind.
    grid: patches in place of whole images. Then `len` counts patches and `shape` is a patch's, while images, labels
        and all else stay those of the images: sample i is patch i % P of image i // P, P = `patches`.
    Raises UserError where these do not fit together.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    scores: np.ndarray | None = None
    groups: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    grid: Grid | None = None

    def __post_init__(self):
        _check_images(self.images)
        count = len(self.images)
        if self.labels is not None:
            labels = _checked_labels(self.labels, count)
            classes = tuple(self.classes) or tuple(str(label) for label in range(int(labels.max()) + 1))
            if labels.max() >= len(classes):
                raise UserError(f"label {labels.max()} has no name: there are only {len(classes)} classes, from 0")
            object.__setattr__(self, "labels", labels)
            object.__setattr__(self, "classes", classes)
        if self.scores is not None:
            object.__setattr__(self, "scores", _checked_scores(self.scores, count))
        for what in ("names", "groups", "kinds"):
            if len(getattr(self, what)) not in (0, count):
                raise UserError(f"{what} must be one per image: got {len(getattr(self, what))} for {count} images")
        if self.grid is not None:
            self.grid.sides(*self.images.shape[1:3])

    def __repr__(self) -> str:
        return f"Source(images={list(self.images.shape)}, classes={len(self.classes)})"

    def __len__(self) -> int:
        return len(self.images) * self.patches

    @property
    def patches(self) -> int:
        """Samples made of one image: 1 without a grid."""
        return self.grid.count(*self.images.shape[1:3]) if self.grid else 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every sample: of a patch where there is a grid, else of an image."""
        height, width, channels = self.images.shape[1:]
        return (self.grid.size, self.grid.size, channels) if self.grid else (height, width, channels)

    def take(self, indices: np.ndarray | Sequence[int]) -> "Source":
        """The images at whole-number positions [M], in that order, each with all its patches; classes stay."""
        indices = np.asarray(indices)
        if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
            raise UserError(f"take needs whole-number positions [M]: got {indices.dtype} {list(indices.shape)}")

        def part(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[index] for index in indices) if values else ()

        labels = None if self.labels is None else self.labels[indices]
        scores = None if self.scores is None else self.scores[indices]
        named = {"names": part(self.names), "groups": part(self.groups), "kinds": part(self.kinds)}
        return replace(self, images=self.images[indices], labels=labels, scores=scores, **named)

    def with_images(self, images: np.ndarray) -> "Source":
        """The same labels, scores and names under other images uint8 [N, H', W', C']; whole ones, without a grid."""
        if self.grid is not None:
            raise UserError("patches must be the last view: other views change whole images")
        if len(images) != len(self):
            raise UserError(f"with_images must keep the number of images: got {len(images)} for {len(self)}")
        return replace(self, images=images)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of pixels, shape and all that goes with them: equal for equal data, wherever it was read."""
        beside = (self.groups, self.kinds, self.grid) if self.groups or self.kinds or self.grid else ()
        digest = hashlib.sha256(repr((self.images.shape, self.classes, self.names, *beside)).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels, "<i4").data)
        if self.scores is not None:
            digest.update(np.ascontiguousarray(self.scores, "<f4").data)
        return digest.hexdigest()


class Splits(NamedTuple):
    """A data set: training, validation and test images with the same shape and the same class list.

    score: what the scores are ("mean opinion score, 0 to 100, higher is better"), for the table.
    """

    name: str
    train: Source
    validation: Source | None
    test: Source | None
    skipped: tuple[str, ...] = ()  # images that could not be read and were left out, each with the reason
    score: str = ""


def standardisation(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel mean and standard deviation float32 [C] of images / 255, over all images and places.

    Sums are exact whole numbers, so the order of the images does not matter. A channel that never changes gets
    deviation 1.
    """
    channels = source.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(source), CHUNK):
        pixels = source.images[start : start + CHUNK].reshape(-1, channels)
        for channel in range(channels):
            counts[channel] += np.bincount(pixels[:, channel], minlength=256)
    levels = np.arange(256) / 255
    total = counts.sum(axis=1)
    mean = counts @ levels / total
    variance = (counts * (levels - mean[:, None]) ** 2).sum(axis=1) / total
    std = np.where(variance > 0, np.sqrt(variance), 1)
    return mean.astype(np.float32), std.astype(np.float32)


def describe(splits: Splits) -> str:
    """A few lines for the log: image size, images per split, and images per class (the range where it varies)."""
    height, width, channels = splits.train.shape
    lines = [f"{splits.name}: images {height}x{width}x{channels}"]
    for name, source in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if source is not None:
            lines.append(f"  {name}: {len(source.images)} images, {_classes_text(source)}")
    if splits.skipped:
        lines.append(f"  left out: {len(splits.skipped)} unreadable images")
    return "\n".join(lines)


def _check_images(images: np.ndarray) -> None:
    """Raises UserError unless images are uint8 [N, H, W, C] with nothing empty."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        kind = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise UserError(f"images must be a uint8 array [N, H, W, C]: got {kind}")
    if 0 in images.shape:
        raise UserError(f"images must not be empty: got shape {list(images.shape)}")


def _checked_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """Labels as int32 [count]."""
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"labels must be whole numbers [{count}]: got {labels.dtype} {list(labels.shape)}")
    if labels.min() < 0:
        raise UserError(f"labels must not be negative: got {labels.min()}; leave unlabelled images out")
    return labels.astype(np.int32)


def _checked_scores(scores: np.ndarray, count: int) -> np.ndarray:
    """Scores as float32 [count]."""
    scores = np.asarray(scores)
    if scores.shape != (count,) or scores.dtype.kind not in "fiu":
        raise UserError(f"scores must be numbers [{count}]: got {scores.dtype} {list(scores.shape)}")
    if not np.isfinite(scores).all():
        raise UserError(f"the score of image {int(np.flatnonzero(~np.isfinite(scores))[0])} is not finite: mend it")
    return scores.astype(np.float32)


def _classes_text(source: Source) -> str:
    """How many images each class has, in a few words; how many scenes there are, where they are known."""
    scenes = f", {len(set(source.groups))} scenes such as '{source.groups[0]}'" if source.groups else ""
    if source.scores is not None:
        return f"scores from {source.scores.min():g} to {source.scores.max():g}{scenes}"
    if source.labels is None:
        return f"no labels{scenes}"
    counts = np.bincount(source.labels, minlength=len(source.classes))
    if len(counts) <= 12:
        return ", ".join(f"{name} {count}" for name, count in zip(source.classes, counts, strict=True)) + scenes
    low, high = counts.min(), counts.max()
    return f"{len(counts)} classes with {low if low == high else f'{low} to {high}'} images each{scenes}"
