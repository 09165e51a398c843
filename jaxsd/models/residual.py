"""The residual unit and what can be varied in it: grouped or selective kernels, anti-aliasing, two stochastic branches.

A unit is relu(shortcut(x) + F(x)), or with two branches (VIPF: "A visual inductive priors framework for data-efficient
image classification", 2020, section 3.1 and Eq. 2) relu(shortcut(x) + lam * F1(x) + (1 - lam) * F2(x)).
"""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxsd.models.blocks import ConvNorm, he_fan_out, joined
from jaxsd.models.conv import Conv
from jaxsd.models.pool import blur_pool, global_average_pool

Lam = Literal["either", "shake"]


def strided(
    x: jax.Array,
    train: bool,
    features: int,
    stride: int,
    *,
    size: int = 3,
    dilation: int = 1,
    groups: int = 1,
    blur: bool = False,
    name: str,
) -> jax.Array:
    """Convolution of `stride`, norm, ReLU: x [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features].

    With `blur` the convolution has stride 1 and a blur pool of `stride` stands behind the ReLU (Zhang 2019).
    """
    blurred = blur and stride > 1
    layer = ConvNorm(
        features, size, 1 if blurred else stride, dilation * (size // 2), dilation=dilation, groups=groups, name=name
    )
    x = layer(x, train)
    return blur_pool(x, stride) if blurred else x


class SelectiveKernel(nn.Module):
    """Two convolutions of the same input, 3x3 and 5x5, mixed channel by channel (Li et al. 2019, "SKNet").

    The 5x5 is a 3x3 of dilation 2, or a true one without `dilated`. Submodules "path1", "path2", and of the attention
    "reduce" (to a sixteenth of the features, at least 32) and "select".
    """

    features: int
    stride: int = 1
    groups: int = 1
    dilated: bool = True
    blur: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
        layer = functools.partial(strided, x, train, self.features, self.stride, groups=self.groups, blur=self.blur)
        first = layer(name="path1")
        second = layer(dilation=2, name="path2") if self.dilated else layer(size=5, name="path2")

        seen = global_average_pool((first + second).astype(jnp.float32))[:, None, None, :]
        squeezed = ConvNorm(max(self.features // 16, 32), 1, name="reduce")(seen, train)
        scores = Conv(2 * self.features, 1, kernel_init=he_fan_out, name="select")(squeezed)
        for_first, for_second = jnp.split(scores, 2, axis=-1)
        share = nn.sigmoid(for_first - for_second).astype(x.dtype)  # the softmax over two paths
        return share * first + (1 - share) * second


class Branch(nn.Module):
    """F of a residual unit, up to the last norm: 3x3 and 3x3, or 1x1, 3x3 and 1x1 (to 4 * `width`) with `bottleneck`.

    The bottleneck's 3x3 has `inner` times `width` channels in `groups` (with `depthwise`: one channel each). A
    `selective` kernel takes the place of the layer that has the stride; `blur` follows that layer.
    """

    width: int
    stride: int = 1
    bottleneck: bool = False
    inner: int = 1
    groups: int = 1
    depthwise: bool = False
    selective: bool = False
    dilated: bool = True
    blur: bool = False
    zero_init_residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), width or 4 * width]."""
        zero = self.zero_init_residual
        if not self.bottleneck:
            x = self.spatial(x, train, self.width, "layer1")
            return ConvNorm(self.width, 3, 1, 1, activation=None, zero_scale=zero, name="layer2")(x, train)
        inner = self.inner * self.width
        x = ConvNorm(inner, 1, name="layer1")(x, train)
        x = self.spatial(x, train, inner, "layer2")
        return ConvNorm(4 * self.width, 1, activation=None, zero_scale=zero, name="layer3")(x, train)

    def spatial(self, x: jax.Array, train: bool, features: int, name: str) -> jax.Array:
        """The layer with the stride."""
        groups = features if self.depthwise else self.groups
        if self.selective:
            return SelectiveKernel(features, self.stride, groups, self.dilated, self.blur, name=name)(x, train)
        return strided(x, train, features, self.stride, groups=groups, blur=self.blur, name=name)


class Unit(nn.Module):
    """One residual unit of one `branch` (its layers are the unit's own), or of two, "branch1" and "branch2".

    Two are mixed while training by lam and 1 - lam, in inference evenly. lam is "either" 0 or 1 (VIPF), or with "shake"
    uniform in [0, 1] and another one for the gradients (Gastaldi 2017, "Shake-Shake"). VIPF does not say for how many
    images it is drawn: `lam_group` of them share one, None all of the batch. Both branches always run, so that the
    statistics of both stay fresh. The shortcut is a 1x1 convolution ("shortcut") where the shape changes; with `blur`
    its stride is a blur pool's.
    """

    width: int
    stride: int = 1
    branch: Callable[..., Branch] = Branch
    branches: int = 1
    lam: Lam = "either"
    lam_group: int | None = 1
    blur: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), the branch's width]."""
        if self.branches == 1:
            branch = self.branch(self.width, self.stride)
            nn.share_scope(self, branch)
            y = branch(x, train)
        else:
            first, second = (self.branch(self.width, self.stride, name=f"branch{i}")(x, train) for i in (1, 2))
            y = self.mixed(first, second) if train else (first + second) / 2
        if self.stride != 1 or x.shape[-1] != y.shape[-1]:
            stride = self.stride
            if self.blur and stride > 1:
                x, stride = blur_pool(x, stride), 1
            x = ConvNorm(y.shape[-1], 1, stride, activation=None, name="shortcut")(x, train)
        return joined(x, y)

    def mixed(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """lam * first + (1 - lam) * second, both [B, h, w, D], with a fresh lam."""

        def draw() -> jax.Array:
            batch, key = first.shape[0], self.make_rng("dropout")
            group = self.lam_group or batch
            count = -(-batch // group)
            lam = jax.random.uniform(key, (count,)) if self.lam == "shake" else jax.random.bernoulli(key, 0.5, (count,))
            return jnp.repeat(lam, group)[:batch, None, None, None].astype(first.dtype)

        lam = draw()
        y = lam * first + (1 - lam) * second
        if self.lam == "either":
            return y
        lam = draw()
        backward = lam * first + (1 - lam) * second
        return backward + lax.stop_gradient(y - backward)


class Stage(nn.Module):
    """`depth` residual units, "unit1" onwards; the first has the stride."""

    depth: int
    width: int
    stride: int
    unit: Callable[..., nn.Module] = Unit

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to the last unit's output."""
        for i in range(self.depth):
            x = self.unit(self.width, 1 if i else self.stride, name=f"unit{i + 1}")(x, train)
        return x
