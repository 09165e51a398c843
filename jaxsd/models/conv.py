"""Convolution: NHWC images, HWIO kernels, zero padding that is equal on both sides (as in PyTorch).

On a CPU, XLA's own convolution is slow, its weight gradient very slow. There, a convolution is written as
`collect(spread(x) @ arrange(w))`: two linear maps of the images and one of the kernel around a matrix product. The
gradients are the same product between the adjoints of these maps, so a rule is three short functions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

IntOrPair = int | tuple[int, int]
Padding = IntOrPair | tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right)) where they differ
Array = jax.Array
ROWS, COLUMNS = 1, 2  # axes of [B, H, W, C]


def pair(value: IntOrPair) -> tuple[int, int]:
    """(value, value) of an int; a pair as it is."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def sides(padding: Padding) -> tuple[tuple[int, int], tuple[int, int]]:
    """((top, bottom), (left, right)) of a padding."""
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    return tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in (rows, columns))  # type: ignore


def conv(
    x: Array,
    w: Array,
    *,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Array:
    """Cross-correlates x [B, H, W, C] with w [kh, kw, C / groups, O]; returns [B, (H + 2 p - kh) // s + 1, ..., O].

    `dilation` spreads the kernel's taps; with `groups` the channels are cut into so many equal parts, each of which
    gives its share of the O features (`groups` = C = O: depthwise).

    The platform is chosen while tracing (`jax.default_backend()`): one branch is traced, not two, and a program that is
    then placed on another platform is only slower, never wrong.
    """
    if jax.default_backend() != "cpu":
        return library_conv(x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)
    (top, bottom), (left, right) = sides(padding)
    if groups > 1 or pair(dilation) != (1, 1) or top != bottom or left != right:
        return library_conv(x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)
    # CPUs multiply in float32 whatever is asked for, and the transforms of `_winograd` need its digits.
    wide: Any = jnp.promote_types(x.dtype, jnp.float32)
    x_wide, w_wide = x.astype(wide), w.astype(wide)
    result: Any = _conv(x_wide, w_wide, pair(stride), (top, left), _chunks(x_wide, w_wide))
    return result.astype(x.dtype)


def library_conv(
    x: Array,
    w: Array,
    *,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Array:
    """XLA's convolution, with the arguments of `conv`."""
    return lax.conv_general_dilated(
        x,
        w,
        pair(stride),
        sides(padding),
        rhs_dilation=pair(dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


class Geometry(NamedTuple):
    """The sizes of one convolution: everything that is known while tracing."""

    rows: int
    columns: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    channels: int
    features: int

    @property
    def out(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        sizes = zip((self.rows, self.columns), self.kernel, self.stride, self.padding, strict=True)
        rows, columns = ((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
        return rows, columns


class Rule(NamedTuple):
    """A convolution as linear maps around n matrix products."""

    spread: Callable[[Array], Array]  # [b, H, W, C] to [n, m, K]
    arrange: Callable[[Array], Array]  # [kh, kw, C, O] to [n, K, L]
    collect: Callable[[Array], Array]  # [n, m, L] to [b, h, w, O]


def _taps(x: Array, axis: int, first: int, size: int, step: int = 1) -> Array:
    """Entries first, first + step, ... (`size` of them) of an axis, with zeros outside."""
    before = max(0, -(first // step))
    within = max(before, min(size, (x.shape[axis] - 1 - first) // step + 1))
    start = first + step * before
    middle = lax.slice_in_dim(x, start, max(start, first + step * (within - 1) + 1), step, axis)
    ends = [(0, 0, 0)] * x.ndim
    ends[axis] = (before, size - within, 0)
    return lax.pad(middle, jnp.zeros((), x.dtype), ends) if before or within < size else middle


def _windows(x: Array, axis: int, kernel: int, padding: int, size: int, stride: int) -> Array:
    """The kernel's positions along one axis side by side, each with all channels: [..., kernel * C]."""
    return lax.concatenate([_taps(x, axis, i - padding, size, stride) for i in range(kernel)], 3)


def _fold_rows(z: Array, geometry: Geometry, axis: int) -> Array:
    """Adds the products [..., H, w, kh, O] of each kernel row where they belong: [..., h, w, O]."""
    kh, (ph, _) = geometry.kernel[0], geometry.padding
    parts = lax.split(z, [1] * kh, z.ndim - 2)
    parts = [_taps(lax.squeeze(part, (z.ndim - 2,)), axis, i - ph, geometry.out[0]) for i, part in enumerate(parts)]
    return functools.reduce(lax.add, parts)


def _patches(g: Geometry, batch: int) -> Rule:
    """Any convolution: all kh * kw pixels under the kernel side by side, then one product (for 1 x 1, of x itself)."""
    (h, w), (kh, kw), (sh, sw), (ph, pw) = g.out, g.kernel, g.stride, g.padding

    def spread(x):
        x = _windows(x, ROWS, kh, ph, h, sh)  # [b, h, W, kh C]
        x = _windows(x, COLUMNS, kw, pw, w, sw)  # [b, h, w, kw kh C]
        return x.reshape(1, -1, kh * kw * g.channels)

    def arrange(k):
        return k.transpose(1, 0, 2, 3).reshape(1, -1, g.features)

    return Rule(spread, arrange, lambda z: z.reshape(batch, h, w, g.features))


def _columns(g: Geometry, batch: int) -> Rule:
    """Stride 1: only the kernel's columns side by side, its rows added up after the product: kw + kh, not kw * kh."""
    (_, w), (kh, kw), (_, pw) = g.out, g.kernel, g.padding
    return Rule(
        lambda x: _windows(x, COLUMNS, kw, pw, w, 1).reshape(1, -1, kw * g.channels),
        lambda k: k.transpose(1, 2, 0, 3).reshape(1, kw * g.channels, kh * g.features),
        lambda z: _fold_rows(z.reshape(batch, g.rows, w, kh, g.features), g, ROWS),
    )


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
    np.array(((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24)), np.float32)
    / np.array((24, 24, 24, 24, 24, 24), np.float32)[:, None]
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def _combine(matrix: Sequence[Sequence[float]], parts: Sequence[Array]) -> list[Array]:
    """matrix @ parts, written out: XLA fuses the sums, and most entries are 0 or 1.

    By lax and not by operators: these are most of what a network's tracing has to do.
    """
    return [
        functools.reduce(lax.add, [p if a == 1 else lax.mul(p, float(a)) for a, p in zip(row, parts, strict=True) if a])
        for row in matrix
    ]


def _stacked(parts: Sequence[Array], axis: int) -> Array:
    return lax.concatenate([lax.expand_dims(part, (axis,)) for part in parts], axis)


def _winograd(g: Geometry, batch: int) -> Rule:
    """3 x 3, stride 1: as `_columns`, with Winograd's filter along the columns: half the multiplications."""
    (h, w), (_, pw) = g.out, g.padding
    tiles = -(-w // 4)

    def spread(x):
        x = lax.optimization_barrier(_taps(x, COLUMNS, -pw, 4 * tiles + 4))
        x = x.reshape(batch, g.rows, tiles + 1, 4, g.channels)
        sixes = [(0, i) for i in range(4)] + [(1, i) for i in range(2)]  # they overlap by two
        parts = [lax.slice(x, (0, 0, t, i, 0), (batch, g.rows, t + tiles, i + 1, g.channels)) for t, i in sixes]
        return _stacked(_combine(_INPUT, parts), 0).reshape(6, -1, g.channels)

    def arrange(k):
        return jnp.einsum("tj,ijco->tcio", _KERNEL.astype(k.dtype), k).reshape(6, g.channels, 3 * g.features)

    def collect(z):
        z = lax.optimization_barrier(_fold_rows(z.reshape(6, batch, g.rows, tiles, 3, g.features), g, 1 + ROWS))
        y = _stacked(_combine(_OUTPUT, [lax.squeeze(part, (0,)) for part in lax.split(z, [1] * 6, 0)]), 3)
        return y.reshape(batch, h, 4 * tiles, g.features)[:, :, :w]

    return Rule(spread, arrange, collect)


def _pick(g: Geometry, batch: int) -> Rule:
    """The fastest rule of those measured (forward and both gradients, 16 to 512 channels, maps of 4 to 32 pixels)."""
    if g.stride != (1, 1) or g.kernel == (1, 1) or g.channels <= 4:
        return _patches(g, batch)
    return (_winograd if g.kernel == (3, 3) else _columns)(g, batch)


CHUNK_BYTES = 1 << 20  # images worked on at once: what `spread` makes of them stays in the cache


def _chunks(x: Array, w: Array) -> int:
    """How many equal parts the batch is worked on in: a part is as large as the kernel, which every part reads."""
    batch = x.shape[0]
    images = max(1, max(CHUNK_BYTES, w.nbytes) * batch // x.nbytes) if x.size else batch
    return next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= images)


def _over_chunks(
    function: Callable, n: int, total: Array | None, shape: tuple[int, ...], *arrays: Array
) -> tuple[Any, Array]:
    """Applies `function(*chunk) -> (summand, result)` to n chunks of the batch; returns the sum and all results.

    shape: of all results [B, ...].

    Chunk i holds the images i, i + n, ...: every device of a sharded batch has an equal part of every chunk.
    """
    if n == 1:
        return function(*arrays)
    arrays = tuple(a.reshape(a.shape[0] // n, n, *a.shape[1:]) for a in arrays)

    def body(i, carry):
        total, results = carry
        summand, part = function(*(lax.dynamic_index_in_dim(a, i, 1, False) for a in arrays))
        total = None if total is None else lax.add(total, summand)
        return total, lax.dynamic_update_index_in_dim(results, part, i, 1)

    results = lax.full((shape[0] // n, n, *shape[1:]), 0, arrays[0].dtype)
    total, results = lax.fori_loop(0, n, body, (total, results))
    return total, results.reshape(shape)


def _geometry(x: Array, w: Array, stride: tuple[int, int], padding: tuple[int, int]) -> Geometry:
    return Geometry(x.shape[1], x.shape[2], (w.shape[0], w.shape[1]), stride, padding, w.shape[2], w.shape[3])


def _products(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """n matrix products: the leading axes go together, `axes` are summed over."""
    return lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((0,), (0,))))


def _adjoint(function: Callable, like: jax.ShapeDtypeStruct) -> Callable[[Array], Array]:
    transposed = jax.linear_transpose(function, like)
    return lambda y: transposed(y)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # layers of one shape are traced once
def _conv(x: Array, w: Array, stride: tuple[int, int], padding: tuple[int, int], n: int) -> Array:
    geometry = _geometry(x, w, stride, padding)
    if geometry.kernel[0] * geometry.kernel[1] * geometry.channels <= 32:
        return _fused(x, w, geometry)
    rule = _pick(geometry, x.shape[0] // n)
    kernel = rule.arrange(w)

    def part(x):
        return None, rule.collect(_products(rule.spread(x), kernel, (2, 1)))

    return _over_chunks(part, n, None, (x.shape[0], *geometry.out, geometry.features), x)[1]


def _fused(x: Array, w: Array, g: Geometry) -> Array:
    """A first layer (27 products for 3 x 3 x 3): multiply and add in one pass over the result, no patches in memory."""
    (h, w_out), (sh, sw), (ph, pw) = g.out, g.stride, g.padding
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (ph, ph, 0), (pw, pw, 0), (0, 0, 0)))
    full, kernel = (x.shape[0], h, w_out, g.features), w.reshape(-1, g.features)
    terms = []
    for row, (i, j, c) in enumerate(np.ndindex(*w.shape[:3])):
        end = (x.shape[0], i + sh * (h - 1) + 1, j + sw * (w_out - 1) + 1, c + 1)
        tap = lax.broadcast_in_dim(lax.slice(x, (0, i, j, c), end, (1, sh, sw, 1)), full, (0, 1, 2, 3))
        weight = lax.broadcast_in_dim(lax.slice(kernel, (row, 0), (row + 1, g.features)), full, (0, 3))
        terms.append(lax.mul(tap, weight))
    return lax.optimization_barrier(functools.reduce(lax.add, terms))


def _forward(x: Array, w: Array, stride: tuple[int, int], padding: tuple[int, int], n: int):
    return _conv(x, w, stride, padding, n), (x, w)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(stride: tuple[int, int], padding: tuple[int, int], n: int, saved: tuple[Array, Array], dy: Array):
    x, w = saved
    rule = _pick(_geometry(x, w, stride, padding), x.shape[0] // n)
    kernel = rule.arrange(w)

    def part(x, dy):
        images = jax.ShapeDtypeStruct(x.shape, x.dtype)
        spread = rule.spread(x)
        products = jax.ShapeDtypeStruct((*spread.shape[:2], kernel.shape[2]), x.dtype)
        dz = lax.optimization_barrier(_adjoint(rule.collect, products)(dy))
        dx = _adjoint(rule.spread, images)(_products(dz, kernel, (2, 2)))
        return _products(spread, dz, (1, 1)), dx

    dkernel, dx = _over_chunks(part, n, jnp.zeros_like(kernel), x.shape, x, dy)
    return dx, _adjoint(rule.arrange, jax.ShapeDtypeStruct(w.shape, w.dtype))(dkernel)


_conv.defvjp(_forward, _backward)


class Conv(nn.Module):
    """A convolution layer: parameters "kernel" [kh, kw, C / groups, features] and, with `use_bias`, "bias" [features].

    `kernel_size`, `stride` and `padding` are ints or (height, width) pairs, see `conv`; the default start is He's
    normal draw (variance 2 / fan out), as in PyTorch's residual networks.
    """

    features: int
    kernel_size: IntOrPair = 3
    stride: IntOrPair = 1
    padding: Padding = 0
    use_bias: bool = False
    dilation: IntOrPair = 1
    groups: int = 1
    kernel_init: Callable = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    bias_init: Callable = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, H, W, C] to [B, h, w, features], in x's dtype."""
        shape = (*pair(self.kernel_size), x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(x.dtype)
        y = conv(x, kernel, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,)).astype(y.dtype)
        return y
