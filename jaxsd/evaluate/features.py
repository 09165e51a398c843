"""What a trained network says of images: its outputs, and the features of every block."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxsd.data.batches import cut_on_host, fitting, ordered_batches
from jaxsd.data.source import Grid
from jaxsd.models.forward import forward
from jaxsd.models.pool import adaptive_average_pool
from jaxsd.tuning import compiler_options

Tree = Any
WIDTH = 2048  # most features per block: a map is averaged to the largest square grid that fits


@functools.lru_cache(maxsize=64)
def _compiled(model: nn.Module) -> Callable[..., Any]:
    """Outputs and features at once: compiling a second program would take longer than pooling what is not asked for."""

    def apply(params: Tree, collections: Tree, images: jax.Array):
        result = forward(model, params, collections, images, train=False)
        return result.outputs, {k: _flat(v) for k, v in result.features.items()}

    return jax.jit(apply, compiler_options=compiler_options())


def _flat(feature: jax.Array) -> jax.Array:
    """A feature map [B, h, w, D] as [B, s * s * D], averaged to an s x s grid; [B, D] stays."""
    if feature.ndim == 2:
        return feature
    batch, height, width, channels = feature.shape
    size = max(1, min(height, width, math.isqrt(WIDTH // channels)))
    return adaptive_average_pool(feature, size).reshape(batch, -1)


def _over(
    model: nn.Module,
    params: Tree,
    collections: Tree,
    images: np.ndarray,
    batch_size: int,
    part: int,
    grid: Grid | None = None,
) -> Any:
    function = _compiled(model)
    count = len(images) * (grid.count(*images.shape[1:3]) if grid is not None else 1)
    batch_size = fitting(batch_size, (grid.size, grid.size) if grid is not None else images.shape[1:])
    index, masks = ordered_batches(count, batch_size)
    shown = (images[rows] if grid is None else cut_on_host(images, rows, grid) for rows in index)
    parts = [function(params, collections, batch)[part] for batch in shown]
    kept = [
        jax.tree.map(lambda x, mask=mask: np.asarray(x)[mask > 0], one) for one, mask in zip(parts, masks, strict=True)
    ]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *kept)


def predict(
    model: nn.Module,
    params: Tree,
    collections: Tree,
    images: np.ndarray,
    *,
    grid: Grid | None = None,
    batch_size: int = 256,
) -> Any:
    """The module's outputs for uint8 images [N, H, W, C], as numpy; a dict of them where it returns a dict.

    With a grid, for all their patches, image by image.
    """
    return _over(model, params, collections, images, batch_size, 0, grid)


def block_features(
    model: nn.Module,
    params: Tree,
    collections: Tree,
    images: np.ndarray,
    *,
    grid: Grid | None = None,
    batch_size: int = 256,
) -> dict[str, np.ndarray]:
    """Features {block: float32 [N, D]} of uint8 images, in inference mode, every block in one pass.

    Maps are averaged over the largest square grid that leaves at most 2,048 numbers per image; vectors stay whole.
    With a grid of patches, the means over each image's patches.
    """
    found = _over(model, params, collections, images, batch_size, 1, grid)
    if grid is None:
        return found
    return {name: values.reshape(len(images), -1, values.shape[-1]).mean(1) for name, values in found.items()}
