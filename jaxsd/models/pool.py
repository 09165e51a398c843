"""Pooling over space: NHWC, PyTorch's conventions."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxsd.models.conv import IntOrPair, pair


def _taps(x: jax.Array, window: IntOrPair, stride: IntOrPair, padding: IntOrPair, fill: float) -> list[jax.Array]:
    """The window's positions as shifted slices [B, h, w, C] of the padded input, kh * kw of them."""
    (kh, kw), (sh, sw), (ph, pw) = pair(window), pair(stride), pair(padding)
    b, h, w, c = x.shape
    rows, columns = (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1
    x = lax.pad(x, jnp.array(fill, x.dtype), ((0, 0, 0), (ph, ph, 0), (pw, pw, 0), (0, 0, 0)))
    return [
        lax.slice(x, (0, i, j, 0), (b, i + sh * (rows - 1) + 1, j + sw * (columns - 1) + 1, c), (1, sh, sw, 1))
        for i in range(kh)
        for j in range(kw)
    ]


def max_pool(x: jax.Array, window: IntOrPair, stride: IntOrPair, padding: IntOrPair = 0) -> jax.Array:
    """The maximum of each window of x [B, H, W, C]; padding never wins (minus infinity).

    The gradient goes to the first pixel, row by row, that has the maximum.
    """
    if jax.default_backend() == "cpu":
        return _max_pool(x, window, stride, padding)
    edges: Any = [(p, p) for p in pair(padding)]  # flax types them as text
    return nn.max_pool(x, pair(window), pair(stride), edges)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: jax.Array, window: IntOrPair, stride: IntOrPair, padding: IntOrPair) -> jax.Array:
    return functools.reduce(jnp.maximum, _taps(x, window, stride, padding, -jnp.inf))


def _max_pool_gradient(window, stride, padding, x, dy):
    # Not where a tap equals the maximum found before: x may come here computed again, rounded otherwise.
    taps = _taps(x, window, stride, padding, -jnp.inf)
    best, winner = taps[0], jnp.zeros(dy.shape, jnp.int32)
    for i, tap in enumerate(taps[1:], 1):
        better = tap > best
        best, winner = jnp.where(better, tap, best), jnp.where(better, i, winner)
    # dy and the winners a stride apart: every pixel then finds the windows that it is in by slices
    (kh, kw), (b, h, w, c) = pair(window), x.shape
    sizes = zip((kh, kw), pair(stride), pair(padding), (h, w), dy.shape[1:3], strict=True)
    spaces = [(k - 1 - p, n - 1 + p - s * (m - 1), s - 1) for k, s, p, n, m in sizes]
    edges = ((0, 0, 0), *spaces, (0, 0, 0))
    dy, winner = lax.pad(dy, jnp.zeros((), dy.dtype), edges), lax.pad(winner, -1, edges)
    dy, winner = lax.optimization_barrier((dy, winner))
    parts = []
    for i in range(len(taps)):
        start = (0, kh - 1 - i // kw, kw - 1 - i % kw, 0)
        end = (b, start[1] + h, start[2] + w, c)
        parts.append(jnp.where(lax.slice(winner, start, end) == i, lax.slice(dy, start, end), 0))
    return (functools.reduce(lax.add, parts),)


_max_pool.defvjp(lambda x, *window: (_max_pool(x, *window), x), _max_pool_gradient)


def average_pool(x: jax.Array, window: IntOrPair, stride: IntOrPair, padding: IntOrPair = 0) -> jax.Array:
    """The mean of each window of x [B, H, W, C]; padded zeros count, as in PyTorch."""
    taps = _taps(x, window, stride, padding, 0.0)
    return sum(taps[1:], taps[0]) / len(taps)


def _bins(x: jax.Array, size: IntOrPair, reduce) -> jax.Array:
    """Reduces rows, then columns, of x [B, H, W, C] over bins floor(i n / o) .. ceil((i + 1) n / o)."""
    for axis, out in zip((1, 2), pair(size), strict=True):
        n = x.shape[axis]
        bins = [(i * n // out, -(-(i + 1) * n // out)) for i in range(out)]
        x = jnp.stack([reduce(lax.slice_in_dim(x, low, high, axis=axis), axis) for low, high in bins], axis)
    return x


def adaptive_max_pool(x: jax.Array, size: IntOrPair) -> jax.Array:
    """x [B, H, W, C] to [B, *size, C]: the maximum over bins floor(i n / o) .. ceil((i + 1) n / o)."""
    return _bins(x, size, lambda part, axis: part.max(axis))


def adaptive_average_pool(x: jax.Array, size: IntOrPair) -> jax.Array:
    """x [B, H, W, C] to [B, *size, C]: the mean over bins floor(i n / o) .. ceil((i + 1) n / o)."""
    return _bins(x, size, lambda part, axis: part.mean(axis))


def global_average_pool(x: jax.Array) -> jax.Array:
    """x [B, H, W, C] to [B, C]: the mean over space."""
    return x.mean((1, 2))


def global_dual_pool(x: jax.Array) -> jax.Array:
    """x [B, H, W, C] to [B, C]: halfway between the mean and the maximum over space."""
    return (x.mean((1, 2)) + x.max((1, 2))) / 2


def global_concat_pool(x: jax.Array) -> jax.Array:
    """x [B, H, W, C] to [B, 2 C]: the mean over space, then the maximum."""
    return jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1)


def blur_pool(x: jax.Array, stride: int = 2) -> jax.Array:
    """x [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), C]: smoothed, then every `stride`-th position.

    The filter is the outer product of (1, 2, 1) / 4 with itself; borders are reflected without repeating the edge
    (Zhang 2019, "Making convolutional networks shift-invariant again"). A side of 1 is left as it is.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        inside = min(1, n - 1)
        first, last = (lax.slice_in_dim(x, i, i + 1, axis=axis) for i in (inside, n - 1 - inside))
        x = lax.concatenate([first, x, last], axis)
        span = (n - 1) // stride * stride + 1
        before, here, after = (lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(3))
        x = (before + 2 * here + after) / 4
    return x
