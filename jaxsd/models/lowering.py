"""Convolutions as matrix products, for processors on which XLA's own convolution is slow.

A rule writes one as `collect(spread(x) @ arrange(w))`: two linear maps of the images and one of the kernel around
matrix products. The gradients are the same products between the adjoints of these maps, so a rule is three short
functions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
ROWS, COLUMNS = 1, 2  # axes of [B, H, W, C]


class Geometry(NamedTuple):
    """The sizes of one convolution: everything that is known while tracing, the batch apart."""

    size: tuple[int, int]  # rows and columns of the images
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int
    depth: int  # channels of a group
    features: int

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.groups * self.depth

    @property
    def reach(self) -> tuple[int, int]:
        """Rows and columns from a kernel's first tap to its last."""
        return self.dilation[0] * (self.kernel[0] - 1), self.dilation[1] * (self.kernel[1] - 1)

    @property
    def out(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        sizes = zip(self.size, self.padding, self.reach, self.stride, strict=True)
        rows, columns = ((n + sum(p) - r - 1) // s + 1 for n, p, r, s in sizes)
        return rows, columns

    @property
    def depthwise(self) -> bool:
        """Whether every channel is filtered on its own."""
        return self.groups == self.channels == self.features


class Rule(NamedTuple):
    """A convolution as linear maps around n matrix products."""

    spread: Callable[[Array], Array]  # [b, H, W, C] to [n, m, K]
    arrange: Callable[[Array], Array]  # [kh, kw, C / groups, O] to [n, K, L]
    collect: Callable[[Array], Array]  # [n, m, L] to [b, h, w, O]


WIDE = 256  # columns from which on a single matrix is faster transposed before its product than within


def _axes(x: Array) -> frozenset[str]:
    """The axes of a `shard_map` over which x varies."""
    kind: Any = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma  # before JAX 0.10


def varying(x: Array, like: Array) -> Array:
    """x, typed as varying over the devices of a `shard_map` where `like` is: what a loop starts from has to be."""
    for axis in sorted(_axes(like) - _axes(x)):
        x = x + (0 * lax.axis_index(axis)).astype(x.dtype)
    return x


def crossed(a: Array, b: Array) -> Array:
    """n products a^T b: [n, m, K] and [n, m, L] to [n, K, L].

    A CPU is faster with the narrower matrix on the left, often twice as fast.
    """
    if a.shape[2] > b.shape[2]:
        return lax.optimization_barrier(crossed(b, a)).transpose(0, 2, 1)
    if a.shape[2] < WIDE or a.shape[0] > 1:
        return lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,))))
    return lax.dot_general(lax.optimization_barrier(a.transpose(0, 2, 1)), b, (((2,), (1,)), ((0,), (0,))))


def _taps(x: Array, axis: int, first: int, size: int, step: int = 1) -> Array:
    """Entries first, first + step, ... (`size` of them) of an axis, with zeros outside."""
    before = min(size, max(0, -(first // step)))
    within = max(before, min(size, (x.shape[axis] - 1 - first) // step + 1))
    start, end = (first + step * before, first + step * (within - 1) + 1) if before < within else (0, 0)
    middle = lax.slice_in_dim(x, start, end, step, axis)
    ends = [(0, 0, 0)] * x.ndim
    ends[axis] = (before, size - within, 0)
    return lax.pad(middle, jnp.zeros((), x.dtype), ends) if before or within < size else middle


def _windows(x: Array, i: int, g: Geometry) -> Array:
    """The kernel's positions along rows (i = 0) or columns (1) of x [..., H, W, C] side by side: [..., kernel * C]."""
    axis = x.ndim - 3 + i
    first, step, size = -g.padding[i][0], g.dilation[i], g.out[i]
    taps = [_taps(x, axis, first + step * tap, size, g.stride[i]) for tap in range(g.kernel[i])]
    return lax.concatenate(taps, x.ndim - 1)


def _fold_rows(z: Array, g: Geometry, axis: int) -> Array:
    """Adds the products [..., H, w, kh, O] of each kernel row where they belong: [..., h, w, O]."""
    kh, first, step, size = g.kernel[0], -g.padding[0][0], g.dilation[0], g.out[0]
    parts = [lax.squeeze(part, (z.ndim - 2,)) for part in lax.split(z, [1] * kh, z.ndim - 2)]
    parts = [_taps(part, axis, first + step * tap, size, g.stride[0]) for tap, part in enumerate(parts)]
    return functools.reduce(lax.add, parts)


def _patches(g: Geometry, batch: int) -> Rule:
    """One group: all kh * kw pixels under the kernel side by side, then one product (for 1 x 1, of x itself)."""
    (h, w), (kh, kw) = g.out, g.kernel

    def spread(x):
        x = _windows(_windows(x, 0, g), 1, g)  # [b, h, w, kw kh C]
        return x.reshape(1, -1, kh * kw * g.channels)

    def arrange(k):
        return k.transpose(1, 0, 2, 3).reshape(1, -1, g.features)

    return Rule(spread, arrange, lambda z: z.reshape(batch, h, w, g.features))


LEAST_WIDTH = 8  # channels: products of fewer are slow


def _columns(g: Geometry, batch: int) -> Rule:
    """Only the kernel's columns side by side, its rows added up after the product: kw + kh, not kw * kh.

    A product for every few groups, whose kernels stand on the diagonal of a matrix.
    """
    (h, w), (kh, kw), rows = g.out, g.kernel, g.size[0]
    divisors = [n for n in range(1, g.groups + 1) if g.groups % n == 0]
    groups = next((n for n in divisors if n * g.depth >= LEAST_WIDTH), g.groups)  # of one product
    n, depth = g.groups // groups, groups * g.depth
    features = g.features // n

    def spread(x):
        x = lax.optimization_barrier(x)  # else what comes before is computed again for every window
        x = x.reshape(*x.shape[:3], n, depth).transpose(3, 0, 1, 2, 4)
        return _windows(x, 1, g).reshape(n, -1, kw * depth)

    def arrange(k):
        k = k.reshape(kh, kw, g.depth, n, groups, features // groups)
        k = jnp.einsum("ijcngo,gG->njgciGo", k, jnp.eye(groups, dtype=k.dtype))
        return k.reshape(n, kw * depth, kh * features)

    def collect(z):
        y = _fold_rows(z.reshape(n, batch, rows, w, kh, features), g, 1 + ROWS)
        return lax.optimization_barrier(y.transpose(1, 2, 3, 0, 4).reshape(batch, h, w, g.features))

    return Rule(spread, arrange, collect)


# Winograd's minimal filtering F(4, 3) (Lavin & Gray, CVPR 2016): y = OUTPUT @ ((KERNEL @ w) * (INPUT @ x)) gives 4
# results of a 3-tap filter from 6 inputs with 6 multiplications, not 12.
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def _combine(matrix: Sequence[Sequence[float]], parts: Sequence[Array]) -> list[Array]:
    """matrix @ parts, written out: XLA fuses the sums, and most entries are 0 or 1.

    By lax and not by operators: these are most of what a network's tracing has to do.
    """
    return [
        functools.reduce(
            lax.add,
            [p if a == 1 else lax.mul(p, float(a)) for a, p in zip(row, parts, strict=True) if a],
        )
        for row in matrix
    ]


def _stacked(parts: Sequence[Array], axis: int) -> Array:
    return lax.concatenate([lax.expand_dims(part, (axis,)) for part in parts], axis)


def _winograd(g: Geometry, batch: int) -> Rule:
    """One group, 3 x 3, stride 1: `_columns` with Winograd's filter along the columns, half the multiplications."""
    (h, w), (_, (left, _)), rows = g.out, g.padding, g.size[0]
    tiles = -(-w // 4)

    def spread(x):
        x = lax.optimization_barrier(_taps(x, COLUMNS, -left, 4 * tiles + 4))
        x = x.reshape(batch, rows, tiles + 1, 4, g.channels)
        sixes = [(0, i) for i in range(4)] + [(1, i) for i in range(2)]  # they overlap by two
        parts = [lax.slice(x, (0, 0, t, i, 0), (batch, rows, t + tiles, i + 1, g.channels)) for t, i in sixes]
        return _stacked(_combine(_INPUT, parts), 0).reshape(6, -1, g.channels)

    def arrange(k):
        columns = [lax.squeeze(part, (1,)) for part in lax.split(k, [1] * 3, 1)]  # [kh, C, O]
        k = _stacked(_combine(_KERNEL, columns), 0)
        return k.transpose(0, 2, 1, 3).reshape(6, g.channels, 3 * g.features)

    def collect(z):
        z = lax.optimization_barrier(_fold_rows(z.reshape(6, batch, rows, tiles, 3, g.features), g, 1 + ROWS))
        y = _stacked(
            _combine(_OUTPUT, [lax.squeeze(part, (0,)) for part in lax.split(z, [1] * 6, 0)]),
            3,
        )
        return y.reshape(batch, h, 4 * tiles, g.features)[:, :, :w]

    return Rule(spread, arrange, collect)


def pick(g: Geometry, batch: int) -> Rule:
    """The fastest rule of those measured (forward and both gradients, 16 to 512 channels, maps of 4 to 32 pixels)."""
    if g.groups == 1 and (g.stride != (1, 1) or g.kernel == (1, 1) or g.channels <= 4 or max(g.out) <= 2):
        return _patches(g, batch)
    winograd = g.kernel == (3, 3) and g.stride == g.dilation == (1, 1) and g.groups == 1
    return (_winograd if winograd else _columns)(g, batch)
