"""What is asked of a network: two pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any
Batch = dict[str, jax.Array]


class Objective(NamedTuple):
    """A question put to a network, as two pure functions and the number of inputs per image.

    init(key, batch) -> (params, extra): draws the parameters; `extra` is everything that the loss reads and rewrites
        without a gradient. `extra["model"]` holds the module's other collections (batch statistics, standardisation).
    loss(params, extra, batch, key, train=True) -> (loss, (metrics, extra)): a scalar, a dict of scalars, the new
        extra. Loss and metrics are means over the images whose mask is 1. With train=False the module runs in
        inference mode and extra comes back as it was.
    views: network inputs made of one image (4 for rotation): a training budget counts them.

    A batch is a dict: image float32 [B, H, W, C] in [0, 1] (or uint8), label int32 [B], index int32 [B], mask
    float32 [B], and the step number.
    """

    init: Callable[..., tuple[Tree, Tree]]
    loss: Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]]
    views: int = 1


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of values [B] over the entries whose mask [B] is 1; 0 where none is."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)
