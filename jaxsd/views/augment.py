"""Augmentations: random changes of a batch inside the jitted step. augment(key, images) -> images of the same shape.

Images are [B, H, W, C] in [0, 1], not yet standardised (so zero is black). Image i's draw is a function of the key and
i alone: more images in the batch do not change those of the first ones. Augmentations are values: made with equal
arguments they are equal, hash alike, and print as they were written.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxsd.errors import UserError

Augment = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class pad_crop:
    """Pads `padding` black pixels on every side and crops the old size at a place of its own for each image.

    The (2 padding + 1)^2 places are equally likely. Source: RotNet's loader for CIFAR (padding 4), torchvision's
    RandomCrop.
    """

    padding: int

    def __post_init__(self):
        if self.padding < 0:
            raise UserError(f"pad_crop needs a padding of 0 or more pixels: got {self.padding}")

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Shifted images; what comes in at the border is black."""
        offsets = jax.random.randint(key, (len(images), 2), 0, 2 * self.padding + 1)
        border = (self.padding, self.padding)
        padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))

        def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

        return jax.vmap(crop)(padded, offsets)


@dataclass(frozen=True)
class flip_horizontal:
    """Mirrors left and right with probability one half, for each image on its own."""

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Images, about half of them mirrored."""
        return _flip_some(key, images, 2)


@dataclass(frozen=True)
class flip_vertical:
    """Swaps top and bottom with probability one half, for each image on its own."""

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Images, about half of them upside down."""
        return _flip_some(key, images, 1)


@dataclass(frozen=True, init=False, repr=False)
class chain:
    """Augmentations one after the other, the first one first, each with a key of its own; without any the identity."""

    augments: tuple[Augment, ...]

    def __init__(self, *augments: Augment):
        object.__setattr__(self, "augments", augments)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.augments))})"

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Images after every augmentation."""
        for position, augment in enumerate(self.augments):
            images = augment(jax.random.fold_in(key, position), images)
        return images


def _flip_some(key: jax.Array, images: jax.Array, axis: int) -> jax.Array:
    """Images [B, H, W, C], each reversed along an axis with probability one half."""
    drawn = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(drawn, jnp.flip(images, axis), images)
