"""Which images form which batch: index batches as pure functions."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.data.source import Grid
from jaxsd.errors import UserError

PIXELS = 1 << 20


def epoch_batches(
    key: jax.Array, n: int, batch_size: int, *, repeat: int = 1, drop_last: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Batches of one epoch over `n` images in random order: index int32 [steps, B] and mask float32 [steps, B].

    A pure function of the key. repeat: the epoch shows every image so many times, in that many independent orders
    one after the other. B = batch_size, or n * repeat where that is less. The last batch is filled up with images
    from the beginning of the order, with mask 0: whatever computes batch statistics sees only real images.
    drop_last: leave an incomplete last batch out instead.
    """
    _check(n, batch_size)
    if repeat < 1:
        raise UserError(f"repeat must be at least 1: got {repeat}")
    orders = [jax.random.permutation(part, n) for part in jax.random.split(key, repeat)]
    order = np.concatenate([np.asarray(part, np.int32) for part in orders])
    return _cut(order, min(batch_size, len(order)), drop_last)


def ordered_batches(n: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches over `n` images in order, each once: index int32 [steps, B] and mask float32 [steps, B].

    B is always batch_size, so that one compiled step serves every set; the filling has mask 0.
    """
    _check(n, batch_size)
    return _cut(np.arange(n, dtype=np.int32), batch_size, drop_last=False)


def cut(images: jax.Array, rows: jax.Array, grid: Grid) -> jax.Array:
    """Patches [B, size, size, C] of images [N, H, W, C]: row r is patch r % P of image r // P, P patches per image.

    Only the pixels asked for are read, so images may stay where they are, on the device, however many patches they
    make. Works under jit.
    """
    count, across = _counts(images.shape, grid)
    channels, size = images.shape[-1], grid.size

    def one(row):
        image, place = row // count, row % count
        at = (image, place // across * grid.stride, place % across * grid.stride, jnp.zeros_like(row))
        return jax.lax.dynamic_slice(images, at, (1, size, size, channels))[0]

    return jax.vmap(one)(rows)


def cut_on_host(images: np.ndarray, rows: np.ndarray, grid: Grid) -> np.ndarray:
    """The same in numpy."""
    count, across = _counts(images.shape, grid)
    patches = np.empty((len(rows), grid.size, grid.size, images.shape[-1]), images.dtype)
    for patch, row in zip(patches, rows, strict=True):
        top, left = (int(place) * grid.stride for place in divmod(row % count, across))
        patch[...] = images[row // count, top : top + grid.size, left : left + grid.size]
    return patches


def _counts(shape: tuple[int, ...], grid: Grid) -> tuple[int, int]:
    """Patches of one image, and how many of them stand beside each other."""
    down, across = grid.sides(*shape[1:3])
    return down * across, across


def fitting(batch_size: int, shape: tuple[int, ...]) -> int:
    """A batch size for inference on samples of a shape (H, W, ...): at most so many, and fewer of large ones.

    At most about a million pixels at a time, so that what is larger than training ever holds cannot run out of memory.
    """
    return max(1, min(batch_size, PIXELS // (shape[0] * shape[1])))


def _check(n: int, batch_size: int) -> None:
    if n < 1 or batch_size < 1:
        raise UserError(f"batches need at least one image and a size of at least 1: got {n} images, size {batch_size}")


def _cut(order: np.ndarray, size: int, drop_last: bool) -> tuple[np.ndarray, np.ndarray]:
    """Cuts an order [n] into rows of `size`; the last row is dropped or filled from the beginning of the order."""
    steps = len(order) // size if drop_last else -(-len(order) // size)
    index = np.resize(order, (steps, size))
    mask = np.arange(steps * size).reshape(steps, size) < len(order)
    return index, mask.astype(np.float32)
