"""What a network is shown: pixel operations, deterministic views of a data set, random augmentations of a batch."""

from jaxsd.views.augment import Augment, chain, flip_horizontal, flip_vertical, pad_crop
from jaxsd.views.view import View, compose, gray, harris, hybrid, scale, stretch

__all__ = [
    "Augment",
    "View",
    "chain",
    "compose",
    "flip_horizontal",
    "flip_vertical",
    "gray",
    "harris",
    "hybrid",
    "pad_crop",
    "scale",
    "stretch",
]
