"""ResNeSt: residual networks with split attention (Zhang et al. 2020), of the paper's radix 2 and cardinality 1.

As timm's, parameter for parameter. Against ResNet: a stem of three 3x3 convolutions, split attention in place of the
bottleneck's 3x3 convolution, and average pools that do the halving, in the branch behind the split attention and in
the shortcut before its 1x1 convolution.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsd.models.blocks import ConvNorm, DropPath, Staged, growing, he_fan_out, joined, uniform
from jaxsd.models.conv import Conv
from jaxsd.models.pool import average_pool, max_pool

RADIX = 2
WIDTHS = (64, 128, 256, 512)


class SplitAttention(nn.Module):
    """Two 3x3 convolutions, each of one half of the channels, mixed channel by channel (section 3.1).

    Their shares add up to one (a softmax over the two) and depend on the mean over space of their sum.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to [B, H, W, width]."""
        x = ConvNorm(RADIX * self.width, 3, 1, 1, groups=RADIX, name="splits")(x, train)
        x = x.reshape(*x.shape[:3], RADIX, self.width)
        context = x.astype(jnp.float32).sum(3).mean((1, 2), keepdims=True).astype(x.dtype)
        inner = max(32, self.width * RADIX // 4)
        bias = uniform(self.width**-0.5)
        context = ConvNorm(inner, 1, use_bias=True, bias_init=bias, name="squeeze")(context, train)
        expand = Conv(
            RADIX * self.width, 1, use_bias=True, kernel_init=he_fan_out, bias_init=uniform(inner**-0.5), name="expand"
        )
        logits = expand(context).reshape(-1, 1, 1, RADIX, self.width)
        shares = nn.softmax(logits.astype(jnp.float32), axis=3).astype(x.dtype)
        return (shares * x).sum(3)


def halved(x: jax.Array) -> jax.Array:
    """The means of 2x2 pixels of x [B, H, W, C]; where a side is odd, its last mean is that of the pixels there are."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)), "edge")
    return average_pool(x, 2, 2)


class Unit(nn.Module):
    """One residual unit: 1x1, split attention, 1x1 (four times `width`), in place of a ResNet's bottleneck."""

    width: int
    stride: int = 1
    zero_init_residual: bool = True
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), 4 * width]."""
        width = 4 * self.width
        y = ConvNorm(self.width, 1, name="layer1")(x, train)
        y = SplitAttention(self.width, name="layer2")(y, train)
        if self.stride > 1:
            y = average_pool(y, 3, self.stride, 1)
        y = ConvNorm(width, 1, activation=None, zero_scale=self.zero_init_residual, name="layer3")(y, train)
        if self.stride > 1 or x.shape[-1] != width:
            x = halved(x) if self.stride > 1 else x
            x = ConvNorm(width, 1, activation=None, name="shortcut")(x, train)
        return joined(x, DropPath(self.drop_path)(y, train))


class Stem(nn.Module):
    """Three 3x3 convolutions of `width`, `width` and twice `width`, the first of stride 2, and a 3x3 max pool of 2."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to [B, ceil(H / 4), ceil(W / 4), 2 * width]."""
        x = ConvNorm(self.width, 3, 2, 1, name="layer1")(x, train)
        x = ConvNorm(self.width, 3, 1, 1, name="layer2")(x, train)
        x = ConvNorm(2 * self.width, 3, 1, 1, name="layer3")(x, train)
        return max_pool(x, 3, 2, 1)


class Stage(nn.Module):
    """One residual unit per entry of `drop_path`, its rate, "unit1" onwards; the first has the stride."""

    width: int
    stride: int
    zero_init_residual: bool
    drop_path: tuple[float, ...]
    unit: type[nn.Module] = Unit

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to the last unit's output."""
        for i, rate in enumerate(self.drop_path):
            stride = 1 if i else self.stride
            x = self.unit(self.width, stride, self.zero_init_residual, rate, name=f"unit{i + 1}")(x, train)
        return x


class ResNeSt(Staged):
    """Stem, one block per entry of `depths` (residual units) and `widths` (a quarter of the channels), average, head.

    `zero_init_residual` starts the last norm of each unit at scale zero, as timm does. `drop_path` is the rate of
    stochastic depth in the last unit; it grows linearly from 0 in the first.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = WIDTHS
    stem_width: int = 32
    zero_init_residual: bool = True
    drop_path: float = 0.0

    def published(self, name: str) -> str:
        """As timm names it: "layer1.0.conv2.fc1" for "block1/unit1/layer2/squeeze/conv"."""
        part, *inner = name.split("/")
        if part == "head":
            return "fc"
        if part == "stem":
            names = {
                "layer1": {"conv": "conv1.0", "norm": "conv1.1"},
                "layer2": {"conv": "conv1.3", "norm": "conv1.4"},
                "layer3": {"conv": "conv1.6", "norm": "bn1"},
            }
            return names[inner[0]][inner[1]]
        stage = part.replace("block", "layer")
        if not inner:
            return stage
        names = {
            "layer1/conv": "conv1",
            "layer1/norm": "bn1",
            "layer2/splits/conv": "conv2.conv",
            "layer2/splits/norm": "conv2.bn0",
            "layer2/squeeze/conv": "conv2.fc1",
            "layer2/squeeze/norm": "conv2.bn1",
            "layer2/expand": "conv2.fc2",
            "layer3/conv": "conv3",
            "layer3/norm": "bn3",
            "shortcut/conv": "downsample.1",
            "shortcut/norm": "downsample.2",
        }
        return f"{stage}.{int(inner[0].removeprefix('unit')) - 1}.{names['/'.join(inner[1:])]}"

    def run(self, name: str, x: jax.Array, train: bool, features: dict[str, jax.Array]) -> jax.Array:
        """The stem, or one stage."""
        if name == "stem":
            return Stem(self.stem_width, name=name)(x, train)
        i = self.blocks.index(name)
        stride, rates = 2 if i else 1, growing(self.drop_path, self.depths)[i]
        stage = Stage(self.widths[i], stride, self.zero_init_residual, rates, self.unit(Unit), name=name)
        return self.shown(features, name, stage(x, train))


def resnest(
    variant: str, *, dropout: float = 0.0, drop_path: float = 0.0, zero_init_residual: bool = True, **common
) -> ResNeSt:
    """A published size. The paper trains its largest networks with `dropout=0.2`."""
    depths, stem_width = SIZES[variant]
    return ResNeSt(
        depths=depths,
        stem_width=stem_width,
        head_dropout=dropout,
        drop_path=drop_path,
        zero_init_residual=zero_init_residual,
        **common,
    )


SIZES = {  # residual units of the four stages, channels of the stem's first convolutions
    "resnest14d": ((1, 1, 1, 1), 32),
    "resnest26d": ((2, 2, 2, 2), 32),
    "resnest50d": ((3, 4, 6, 3), 32),
    "resnest101e": ((3, 4, 23, 3), 64),
    "resnest200e": ((3, 24, 36, 3), 64),
    "resnest269e": ((3, 30, 48, 8), 64),
}
SIDES = {"resnest101e": 256, "resnest200e": 320, "resnest269e": 416}
VARIANTS = {name: (functools.partial(resnest, name), SIDES.get(name, 224)) for name in SIZES}
