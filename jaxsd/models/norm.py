"""Batch and layer normalisation with PyTorch's semantics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
FEW = 64  # values of a channel


@jax.custom_vjp
def normalise(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, Array, Array]:
    """x [..., C] to mean 0 and variance 1 per channel, times scale plus bias; also the mean and biased variance [C].

    Statistics and arithmetic are float32, the result has x's dtype. The variance is E[x^2] - E[x]^2: it reads x once,
    with no centred copy of it, and loses digits only where a mean is hundreds of deviations. Of a FEW values, where
    that is easily so and a copy costs nothing, it is the mean of the squared deviations. The closed-form gradient
    keeps x alone and needs two passes over it; no gradient flows through the returned statistics.
    """
    return _normalise(x, scale, bias, epsilon)[0]


def _means(*arrays: Array) -> list[Array]:
    return [a.mean(tuple(range(a.ndim - 1))) for a in arrays]


@jax.jit  # layers of one shape are traced once
def _normalise(x, scale, bias, epsilon):
    wide = x.astype(jnp.float32)
    if x.size <= FEW * x.shape[-1]:
        (mean,) = _means(wide)
        (var,) = _means(jnp.square(wide - mean))
    else:
        mean, square = _means(wide, wide * wide)
        var = jnp.maximum(square - mean * mean, 0)
    inverse = lax.rsqrt(var + epsilon)
    y = wide * (inverse * scale) + (bias - mean * inverse * scale)
    return (y.astype(x.dtype), mean, var), (x, scale, mean, inverse)


@jax.jit
def _gradients(saved, cotangents):
    x, scale, mean, inverse = saved
    wide, dy = x.astype(jnp.float32), cotangents[0].astype(jnp.float32)
    # correlation: mean of dy times the normalised x
    # dx = scale * inverse * (dy - mean(dy) - normalised x * correlation), for many values written as a dy + b x + c
    n, a = x.size // x.shape[-1], scale * inverse
    if n <= FEW:
        normal = (wide - mean) * inverse
        dy_mean, correlation = _means(dy, dy * normal)
        dx = a * (dy - dy_mean - normal * correlation)
    else:
        dy_mean, product = _means(dy, dy * wide)
        correlation = (product - mean * dy_mean) * inverse
        b = -a * inverse * correlation
        dx = a * dy + b * wide - (a * dy_mean + b * mean)
    return dx.astype(x.dtype), n * correlation, n * dy_mean, None


normalise.defvjp(_normalise, _gradients)


@jax.jit
def _rescale(x, scale, bias, mean, var, epsilon):
    """What inference does: the running mean and variance in the place of the batch's."""
    factor = lax.rsqrt(var + epsilon) * scale
    return (x.astype(jnp.float32) * factor + (bias - mean * factor)).astype(x.dtype)


class BatchNorm(nn.Module):
    """Normalises each channel over the batch and space (Ioffe & Szegedy 2015), in float32, returned in x's dtype.

    Training uses the batch's mean and biased variance and moves the running ones (collection "batch_stats": "mean",
    "var") by 1 - `momentum` towards the batch's mean and UNBIASED variance, as PyTorch does; otherwise the running
    ones are used. Parameters "scale" and "bias" [C] with `affine`.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """x [..., C] to the same shape."""
        channels = x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", nn.initializers.ones_init(), (channels,)) if self.affine else jnp.ones(channels)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,)) if self.affine else jnp.zeros(channels)
        if not train:
            return _rescale(x, scale, bias, mean.value, var.value, self.epsilon)
        y, batch_mean, batch_var = normalise(x, scale, bias, self.epsilon)
        if not self.is_initializing():
            n = x.size // channels
            unbiased = batch_var * n / max(n - 1, 1)
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            var.value = self.momentum * var.value + (1 - self.momentum) * unbiased
        return y


class LayerNorm(nn.Module):
    """Normalises the channels of each position (Ba et al. 2016), in float32, returned in x's dtype.

    Parameters "scale" and "bias" [C]. PyTorch's own epsilon is 1e-5, most transformers' is 1e-6.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., C] to the same shape."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        inverse = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (centred * inverse * scale + bias).astype(x.dtype)
