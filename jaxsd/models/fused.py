"""Convolutions with few products for each result: multiplied and added tap by tap, in one pass over the result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsd.models.lowering import Geometry

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


CHUNK_BYTES = 1 << 20  # images worked on at once: all taps read them from the cache
MOST_ROWS = 32  # whose products are added up in one expression


def kernel_gradient(x: Array, dy: Array, g: Geometry) -> Array:
    """The gradient of a depthwise convolution with respect to its kernel: [kh, kw, 1, C].

    A few images at a time, cut into strips. The sums over a strip's rows are written out, since XLA's own are slow.
    """
    (h, w), (sh, sw), (dh, dw), (b, c) = g.out, g.stride, g.dilation, (x.shape[0], g.channels)
    strips = -(-h // MOST_ROWS)
    rows = -(-h // strips)
    n = next(n for n in range(1, b + 1) if b % n == 0 and (n == b or x.nbytes <= n * CHUNK_BYTES))
    needed = (sh * (strips * rows - 1) + g.reach[0] + 1, sw * (w - 1) + g.reach[1] + 1)
    edges = [(before, m - size - before, 0) for (before, _), m, size in zip(g.padding, needed, g.size, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    dy = lax.pad(dy, jnp.zeros((), x.dtype), ((0, 0, 0), (0, strips * rows - h, 0), (0, 0, 0), (0, 0, 0)))
    x = jnp.stack(
        [lax.slice_in_dim(x, sh * rows * k, sh * (rows * k + rows - 1) + g.reach[0] + 1, axis=1) for k in range(strips)]
    )
    dy = jnp.stack(lax.split(dy, [rows] * strips, 1))
    x, dy = (a.reshape(strips, b // n, n, *a.shape[2:]) for a in (x, dy))

    def body(chunk, totals):
        x_part, dy_part = (lax.dynamic_index_in_dim(a, chunk, 2, False) for a in (x, dy))  # [strips, b / n, rows, w, C]
        sums = []
        for total, (i, j) in zip(totals, np.ndindex(*g.kernel), strict=True):
            for row in range(rows):
                start = (0, 0, sh * row + i * dh, j * dw, 0)
                end = (strips, b // n, start[2] + 1, start[3] + sw * (w - 1) + 1, c)
                tap = lax.slice(x_part, start, end, (1, 1, 1, sw, 1))
                total = lax.add(total, lax.mul(tap, lax.slice_in_dim(dy_part, row, row + 1, axis=2)))
            sums.append(total)
        return sums

    totals = [jnp.zeros((strips, b // n, 1, w, c), x.dtype)] * (g.kernel[0] * g.kernel[1])
    totals = lax.fori_loop(0, n, body, totals)
    return jnp.stack([total.sum((0, 1, 2, 3)) for total in totals]).reshape(*g.kernel, 1, c)
