"""Images and labels in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jaxsd.errors import UserError

CHUNK = 4096  # images converted at a time, so that wider copies stay small


@dataclass(frozen=True, eq=False, repr=False)
class Source:
    """Images in memory, with their labels where there are any.

    images: uint8 [N, H, W, C], N >= 1.
    labels: whole numbers [N] in 0..len(classes)-1, kept as int32; None where nothing is labelled.
    classes: the name of every label. Left out: "0", "1", ... up to the largest label.
    names: where each image came from ("train/cat/3.png"), [N] or empty.
    Raises UserError where these do not fit together.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __post_init__(self):
        _check_images(self.images)
        if self.labels is not None:
            labels = _checked_labels(self.labels, len(self))
            classes = tuple(self.classes) or tuple(str(label) for label in range(int(labels.max()) + 1))
            if labels.max() >= len(classes):
                raise UserError(f"label {labels.max()} has no name: there are only {len(classes)} classes, from 0")
            object.__setattr__(self, "labels", labels)
            object.__setattr__(self, "classes", classes)
        if len(self.names) not in (0, len(self)):
            raise UserError(f"names must be one per image: got {len(self.names)} for {len(self)} images")

    def __repr__(self) -> str:
        return f"Source(images={list(self.images.shape)}, classes={len(self.classes)})"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def take(self, indices: np.ndarray | Sequence[int]) -> "Source":
        """The images at whole-number positions [M], in that order; classes stay as they are."""
        indices = np.asarray(indices)
        if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
            raise UserError(f"take needs whole-number positions [M]: got {indices.dtype} {list(indices.shape)}")
        labels = None if self.labels is None else self.labels[indices]
        names = tuple(self.names[index] for index in indices) if self.names else ()
        return replace(self, images=self.images[indices], labels=labels, names=names)

    def with_images(self, images: np.ndarray) -> "Source":
        """The same labels, classes and names under other images uint8 [N, H', W', C']."""
        if len(images) != len(self):
            raise UserError(f"with_images must keep the number of images: got {len(images)} for {len(self)}")
        return replace(self, images=images)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of pixels, shape, labels, classes and names: equal for equal data, wherever it was read."""
        digest = hashlib.sha256(repr((self.images.shape, self.classes, self.names)).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels, "<i4").data)
        return digest.hexdigest()


class Splits(NamedTuple):
    """A data set: training, validation and test images with the same shape and the same class list."""

    name: str
    train: Source
    validation: Source | None
    test: Source | None
    skipped: tuple[str, ...] = ()  # images that could not be read and were left out, each with the reason


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
            lines.append(f"  {name}: {len(source)} images, {_classes_text(source)}")
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


def _classes_text(source: Source) -> str:
    """How many images each class has, in a few words."""
    if source.labels is None:
        return "no labels"
    counts = np.bincount(source.labels, minlength=len(source.classes))
    if len(counts) <= 12:
        return ", ".join(f"{name} {count}" for name, count in zip(source.classes, counts, strict=True))
    low, high = counts.min(), counts.max()
    return f"{len(counts)} classes with {low if low == high else f'{low} to {high}'} images each"
