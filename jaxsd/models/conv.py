"""Convolution: NHWC images, HWIO kernels, zero padding that is equal on both sides (as in PyTorch)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

IntOrPair = int | tuple[int, int]


def pair(value: IntOrPair) -> tuple[int, int]:
    """(value, value) of an int; a pair as it is."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def conv(x: jax.Array, w: jax.Array, *, stride: IntOrPair = 1, padding: IntOrPair = 0) -> jax.Array:
    """Cross-correlates x [B, H, W, C] with w [kh, kw, C, O]; returns [B, (H + 2 p - kh) // s + 1, ..., O]."""
    ph, pw = pair(padding)
    return lax.conv_general_dilated(
        x, w, pair(stride), ((ph, ph), (pw, pw)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Conv(nn.Module):
    """A convolution layer: parameters "kernel" [kh, kw, C, features] and, with `use_bias`, "bias" [features].

    `kernel_size`, `stride` and `padding` are ints or (height, width) pairs; the default start is He's normal draw
    (variance 2 / fan out), as in PyTorch's residual networks.
    """

    features: int
    kernel_size: IntOrPair = 3
    stride: IntOrPair = 1
    padding: IntOrPair = 0
    use_bias: bool = False
    kernel_init: Callable = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    bias_init: Callable = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] to [B, h, w, features], in x's dtype."""
        kernel = self.param("kernel", self.kernel_init, (*pair(self.kernel_size), x.shape[-1], self.features))
        y = conv(x, kernel.astype(x.dtype), stride=self.stride, padding=self.padding)
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,)).astype(y.dtype)
        return y
