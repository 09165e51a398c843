"""Batch normalisation with PyTorch's semantics."""

import flax.linen as nn
import jax
import jax.numpy as jnp


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
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [..., C] to the same shape."""
        channels = x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", nn.initializers.ones_init(), (channels,)) if self.affine else jnp.ones(channels)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,)) if self.affine else jnp.zeros(channels)
        wide = x.astype(jnp.float32)
        if train:
            axes, n = tuple(range(x.ndim - 1)), x.size // channels
            batch_mean = wide.mean(axes)
            batch_var = jnp.square(wide - batch_mean).mean(axes)
            if not self.is_initializing():
                mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
                var.value = self.momentum * var.value + (1 - self.momentum) * batch_var * n / max(n - 1, 1)
        else:
            batch_mean, batch_var = mean.value, var.value
        factor = jax.lax.rsqrt(batch_var + self.epsilon) * scale
        return ((wide - batch_mean) * factor + bias).astype(x.dtype)
