"""Convolutions with few products for each result: multiplied and added tap by tap, in one pass over the result."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsd.models.lowering import Geometry, varying

Array = jax.Array


def fuses(g: Geometry) -> bool:
    """Whether it is faster than matrix products: depthwise, and in first layers (27 products for 3 x 3 x 3)."""
    return g.depthwise or (g.groups == 1 and g.kernel[0] * g.kernel[1] * g.channels <= 32)


def fused(x: Array, w: Array, g: Geometry) -> Array:
    """The convolution of x [B, H, W, C] and w [kh, kw, C / groups, O]: [B, h, w, O]. No patches in memory."""
    (h, columns), (sh, sw), (dh, dw) = g.out, g.stride, g.dilation
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in g.padding), (0, 0, 0)))
    full, kernel = (x.shape[0], h, columns, g.features), w.reshape(-1, g.features)
    terms = []
    for row, (i, j, c) in enumerate(np.ndindex(*w.shape[:3])):
        start = (0, i * dh, j * dw, c)
        channels = g.channels if g.depthwise else c + 1
        end = (x.shape[0], start[1] + sh * (h - 1) + 1, start[2] + sw * (columns - 1) + 1, channels)
        tap = lax.broadcast_in_dim(lax.slice(x, start, end, (1, sh, sw, 1)), full, (0, 1, 2, 3))
        weight = lax.broadcast_in_dim(lax.slice(kernel, (row, 0), (row + 1, g.features)), full, (0, 3))
        terms.append(lax.mul(tap, weight))
    return lax.optimization_barrier(functools.reduce(lax.add, terms))


def image_gradient(dy: Array, w: Array, g: Geometry) -> Array:
    """The gradient of a depthwise convolution with respect to its images.

    Again one: of dy, its pixels a stride apart, with the kernel turned by 180 degrees.
    """
    low = [reach - before for reach, (before, _) in zip(g.reach, g.padding, strict=True)]
    sizes = zip(g.reach, low, g.size, g.out, g.stride, strict=True)
    high = [reach - before + n - s * (m - 1) - 1 for reach, before, n, m, s in sizes]
    edges = [(a, b, s - 1) for a, b, s in zip(low, high, g.stride, strict=True)]
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    rows, columns = dy.shape[1:3]
    whole = g._replace(size=(rows, columns), stride=(1, 1), padding=((0, 0), (0, 0)))
    return fused(dy, w[::-1, ::-1], whole)


TILE_COLUMNS = 8  # whose products are added up in one expression
TILE_BYTES = 1 << 18  # of dy worked on at once: all taps read it, and their part of x, from the cache


def _cut(size: int, most: int) -> tuple[int, int]:
    """(number, size) of the fewest equal parts of at most `most` that hold `size`."""
    parts = -(-size // most)
    return parts, -(-size // parts)


def kernel_gradient(x: Array, dy: Array, g: Geometry) -> Array:
    """The gradient of a depthwise convolution with respect to its kernel: [kh, kw, 1, C].

    A tile of one image at a time (of one on every device of a sharded batch), copied to have its pixels side by side.
    The sums over a tile's columns are written out, since XLA's own are slow; those over its rows are left to the end.
    """
    (h, w), (kh, kw), (sh, sw), (dh, dw), (b, c) = g.out, g.kernel, g.stride, g.dilation, (x.shape[0], g.channels)
    if not b:
        return jnp.zeros((kh, kw, 1, c), x.dtype)
    parts = math.gcd(b, jax.device_count())
    across, columns = _cut(w, TILE_COLUMNS)
    down, rows = _cut(h, max(1, TILE_BYTES // (columns * c * dy.itemsize)))
    tall, wide = sh * (rows - 1) + g.reach[0] + 1, sw * (columns - 1) + g.reach[1] + 1  # of a tile of x
    needed = (sh * rows * (down - 1) + tall, sw * columns * (across - 1) + wide)
    edges = [(before, m - size - before, 0) for (before, _), m, size in zip(g.padding, needed, g.size, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    dy = lax.pad(
        dy, jnp.zeros((), x.dtype), ((0, 0, 0), (0, down * rows - h, 0), (0, across * columns - w, 0), (0, 0, 0))
    )

    x, dy = (a.reshape(parts, b // parts, *a.shape[1:]) for a in (x, dy))

    def body(tile, totals):
        image, down_by, across_by = tile // (down * across), tile // across % down * rows, tile % across * columns
        x_tile = lax.dynamic_slice(x, (0, image, sh * down_by, sw * across_by, 0), (parts, 1, tall, wide, c))
        dy_tile = lax.dynamic_slice(dy, (0, image, down_by, across_by, 0), (parts, 1, rows, columns, c))
        x_tile, dy_tile = lax.optimization_barrier((x_tile.squeeze(1), dy_tile.squeeze(1)))
        sums = []
        for total, (i, j) in zip(totals, np.ndindex(kh, kw), strict=True):
            for column in range(columns):
                start = (0, i * dh, j * dw + sw * column, 0)
                tap = lax.slice(x_tile, start, (parts, start[1] + sh * (rows - 1) + 1, start[2] + 1, c), (1, sh, 1, 1))
                total = lax.add(total, lax.mul(tap, lax.slice_in_dim(dy_tile, column, column + 1, axis=2)))
            sums.append(total)
        return sums

    totals = [varying(jnp.zeros((parts, rows, 1, c), x.dtype), x)] * (kh * kw)
    totals = lax.fori_loop(0, b // parts * down * across, body, totals)
    return jnp.stack([total.sum((0, 1, 2)) for total in totals]).reshape(kh, kw, 1, c)
