"""Convolution: NHWC images, HWIO kernels, zero padding, stride, dilation and groups as in PyTorch.

On a CPU, XLA's own convolution is slow, its weight gradient very slow. There it is done by matrix products (see
`lowering`), or tap by tap (see `fused`).
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxsd.models.fused import fused, fuses, image_gradient, kernel_gradient
from jaxsd.models.lowering import Geometry, crossed, pick, varying

IntOrPair = int | tuple[int, int]
Padding = IntOrPair | tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right)) where they differ
Array = jax.Array


_plain = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_convolutions() -> Iterator[None]:
    """What is traced within has XLA's own convolutions: for shapes and starts, where nothing is convolved."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def pair(value: IntOrPair | Sequence[int]) -> tuple[int, int]:
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
    if _plain.get() or jax.default_backend() != "cpu":
        return library_conv(x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)
    # CPUs multiply in float32 whatever is asked for, and the transforms of `_winograd` need its digits.
    wide: Any = jnp.promote_types(x.dtype, jnp.float32)
    (_, *size, _), (kh, kw, depth, features) = x.shape, w.shape
    g = Geometry(pair(size), (kh, kw), pair(stride), sides(padding), pair(dilation), groups, depth, features)
    x_wide, w_wide = x.astype(wide), w.astype(wide)
    result: Any = _conv(varying(x_wide, w_wide), varying(w_wide, x_wide), g)
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


CHUNK_BYTES = 1 << 20  # images worked on at once: what `spread` makes of them stays in the cache


def _chunks(x: Array, w: Array, g: Geometry) -> int:
    """How many equal parts the batch is worked on in: a part is as large as the kernel, which every part reads."""
    strided = g.groups > 1 and g.stride != (1, 1)
    if not x.size or strided or g.kernel == (1, 1):  # parts of those are not faster, 1 x 1 spreads nothing
        return 1
    batch, images = x.shape[0], max(CHUNK_BYTES, w.nbytes) * x.shape[0] // x.nbytes
    return next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= max(1, images))


def _over_chunks(
    function: Callable,
    n: int,
    total: Array | None,
    shape: tuple[int, ...],
    *arrays: Array,
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

    results = varying(lax.full((shape[0] // n, n, *shape[1:]), 0, arrays[0].dtype), arrays[0])
    total = None if total is None else varying(total, arrays[0])
    total, results = lax.fori_loop(0, n, body, (total, results))
    return total, results.reshape(shape)


def _products(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """n matrix products: the leading axes go together, `axes` are summed over."""
    return lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((0,), (0,))))


def _adjoint(function: Callable, like: Any) -> Callable[[Array], Array]:
    transposed = jax.linear_transpose(function, like)
    return lambda y: transposed(y)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=2)  # layers of one shape are traced once
def _conv(x: Array, w: Array, g: Geometry) -> Array:
    if fuses(g):
        return fused(x, w, g)
    n = _chunks(x, w, g)
    rule = pick(g, x.shape[0] // n)
    kernel = rule.arrange(w)

    def part(x):
        return None, rule.collect(_products(rule.spread(x), kernel, (2, 1)))

    return _over_chunks(part, n, None, (x.shape[0], *g.out, g.features), x)[1]


def _forward(x: Array, w: Array, g: Geometry):
    return _conv(x, w, g), (x, w)


@functools.partial(jax.jit, static_argnums=0)
def _backward(g: Geometry, saved: tuple[Array, Array], dy: Array):
    x, w = saved
    if g.depthwise:
        small = max(g.out) <= 4  # pixels: the products are as fast, and compile several times faster
        return image_gradient(dy, w, g), _gradients(x, w, dy, g)[1] if small else kernel_gradient(x, dy, g)
    return _gradients(x, w, dy, g)


def _gradients(x: Array, w: Array, dy: Array, g: Geometry) -> tuple[Array, Array]:
    """The gradients with respect to x and w by products."""
    n = _chunks(x, w, g)
    rule = pick(g, x.shape[0] // n)
    kernel = rule.arrange(w)

    def part(x, dy):
        spread = rule.spread(x)
        products = jax.eval_shape(lambda: _products(spread, kernel, (2, 1)))
        dz = lax.optimization_barrier(_adjoint(rule.collect, products)(dy))
        dx = _adjoint(rule.spread, x)(_products(dz, kernel, (2, 2)))
        return crossed(spread, dz), dx

    dkernel, dx = _over_chunks(part, n, jnp.zeros_like(kernel), x.shape, x, dy)
    return dx, _adjoint(rule.arrange, w)(dkernel)


_conv.defvjp(_forward, _backward)


def dense(x: Array, w: Array) -> Array:
    """x [.., D] @ w [D, features]."""
    return _dense(x, w) if jax.default_backend() == "cpu" else x @ w


@jax.custom_vjp
def _dense(x: Array, w: Array) -> Array:
    return (x.reshape(-1, w.shape[0]) @ w).reshape(*x.shape[:-1], w.shape[1])


def _dense_gradients(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """As two matrices: of maps XLA would make a transposed copy for the product."""
    x, w = saved
    rows, flat = x.reshape(1, -1, w.shape[0]), dy.reshape(1, -1, w.shape[1])
    return (flat[0] @ w.T).reshape(x.shape), crossed(rows, flat)[0]


_dense.defvjp(lambda x, w: (_dense(x, w), (x, w)), _dense_gradients)


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
        y = conv(
            x,
            kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,)).astype(y.dtype)
        return y
