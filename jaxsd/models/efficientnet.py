"""EfficientNets (Tan & Le 2019): one small network of inverted bottlenecks, scaled in width, depth and resolution.

As timm's, tensor for tensor, in two forms. The native one pads as PyTorch does, equally on both sides. The TensorFlow
one (`tf`) is that of the published weights: its 'SAME' padding is unequal where the stride is 2 and the side even, and
its batch norms add 1e-3, not 1e-5, to the variance. Both have the same parameters.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax

from jaxsd.models.blocks import ConvNorm, DropPath, Linear, Staged, growing, he_fan_out, normal, uniform
from jaxsd.models.conv import Conv, Padding


class Plan(NamedTuple):
    """One stage of the unscaled network (Table 1 of the paper)."""

    kernel_size: int
    stride: int
    expansion: int
    channels: int
    repeats: int


FIRST_WIDTH, LAST_WIDTH = 32, 1280  # channels of the stem and of the last convolution, unscaled
STAGES = (
    Plan(3, 1, 1, 16, 1),
    Plan(3, 2, 6, 24, 2),
    Plan(5, 2, 6, 40, 2),
    Plan(3, 2, 6, 80, 3),
    Plan(5, 1, 6, 112, 3),
    Plan(5, 2, 6, 192, 4),
    Plan(3, 1, 6, 320, 1),
)


def scaled(channels: int, factor: float) -> int:
    """channels * factor as a multiple of 8: the nearest, or the next above where that lost more than a tenth."""
    wanted = channels * factor
    nearest = max(8, int(wanted + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * wanted else nearest + 8


def padding(x: jax.Array, kernel_size: int, stride: int, tf: bool) -> Padding:
    """What makes images [B, H, W, C] come out at ceil(side / stride): PyTorch's way, or TensorFlow's with `tf`."""
    if not tf:
        return kernel_size // 2
    last = ((math.ceil(side / stride) - 1) * stride for side in x.shape[1:3])  # where the last windows begin
    missing = (max(first + kernel_size - side, 0) for first, side in zip(last, x.shape[1:3], strict=True))
    rows, columns = ((total // 2, total - total // 2) for total in missing)
    return rows, columns


def conv_norm(tf: bool) -> functools.partial[ConvNorm]:
    """The family's convolution, norm and swish."""
    return functools.partial(ConvNorm, activation=nn.swish, epsilon=1e-3 if tf else 1e-5)


class SqueezeExcite(nn.Module):
    """Weights each channel by a number in (0, 1) that depends on all channels' means (Hu et al. 2018)."""

    squeezed: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] to the same shape."""
        y = x.mean((1, 2), keepdims=True)
        y = nn.swish(Conv(self.squeezed, 1, use_bias=True, kernel_init=he_fan_out, name="reduce")(y))
        return x * nn.sigmoid(Conv(x.shape[-1], 1, use_bias=True, kernel_init=he_fan_out, name="expand")(y))


class MBConv(nn.Module):
    """Widens the channels `expansion` times, a depthwise convolution, squeeze-and-excitation, projects to `features`.

    The excitation is squeezed to a quarter of the channels that come in. Where the shape stays, the input is added,
    with stochastic depth of rate `drop_path`.
    """

    features: int
    kernel_size: int
    stride: int
    expansion: int
    drop_path: float
    tf: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
        size, channels, layer = self.kernel_size, x.shape[-1], conv_norm(self.tf)
        wide = self.expansion * channels
        y = layer(wide, 1, name="expand")(x, train) if self.expansion > 1 else x
        sides = padding(y, size, self.stride, self.tf)
        start = normal(2**0.5 / size)  # of the variance 2 / fan out, which is size * size for one channel
        y = layer(wide, size, self.stride, sides, groups=wide, kernel_init=start, name="depthwise")(y, train)
        y = SqueezeExcite(max(1, channels // 4), name="se")(y)
        y = layer(self.features, 1, activation=None, name="project")(y, train)
        if self.stride > 1 or channels != self.features:
            return y
        return jax.lax.optimization_barrier(x + DropPath(self.drop_path)(y, train))


class Stage(nn.Module):
    """One unit, "unit1" onwards, for each of `rates`, the drop path's; the first has the plan's stride."""

    plan: Plan
    features: int
    rates: tuple[float, ...]
    tf: bool
    unit: type[nn.Module] = MBConv

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to the last unit's output."""
        for i, rate in enumerate(self.rates):
            stride = 1 if i else self.plan.stride
            sizes = (self.features, self.plan.kernel_size, stride, self.plan.expansion)
            x = self.unit(*sizes, rate, self.tf, name=f"unit{i + 1}")(x, train)
        return x


class EfficientNet(Staged):
    """A 3x3 stem of stride 2, seven stages, a 1x1 convolution ("top"), global average, head.

    `width` multiplies all channels, which are rounded to multiples of 8, `depth` the stages' numbers of units, which
    are rounded up. Unit k of n (from 0) drops its path at rate k / n * `drop_path`. Any resolution from one pixel.
    """

    width: float = 1.0
    depth: float = 1.0
    drop_path: float = 0.2
    tf: bool = False

    @property
    def depths(self) -> tuple[int, ...]:
        """The number of units of each of the seven stages."""
        return tuple(math.ceil(plan.repeats * self.depth) for plan in STAGES)

    @property
    def behind(self) -> tuple[str, ...]:
        """("top",)."""
        return ("top",)

    def published(self, name: str) -> str:
        """As timm names it: "blocks.1.0.conv_dw" for "block2/unit1/depthwise/conv"."""
        part, *inner = name.split("/")
        if part == "head":
            return "classifier"
        if part in ("stem", "top"):
            names = {"stem": ("conv_stem", "bn1"), "top": ("conv_head", "bn2")}[part]
            return names[("conv", "norm").index(inner[0])]
        stage = f"blocks.{int(part.removeprefix('block')) - 1}"
        if not inner:
            return stage
        unit, layer, kind = inner
        unit = f"{stage}.{int(unit.removeprefix('unit')) - 1}"
        if layer == "se":
            return f"{unit}.se.conv_{kind}"
        layers = {"depthwise": "conv_dw", "project": "conv_pw"}
        if part != "block1":  # which widens nothing, so that its one 1x1 convolution has the first name
            layers = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
        return f"{unit}.{layers[layer]}" if kind == "conv" else f"{unit}.bn{list(layers).index(layer) + 1}"

    def run(self, name: str, x: jax.Array, train: bool, features: dict[str, jax.Array]) -> jax.Array:
        """The stem, one stage, or the last convolution."""
        layer = conv_norm(self.tf)
        if name == "stem":
            return layer(scaled(FIRST_WIDTH, self.width), 3, 2, padding(x, 3, 2, self.tf), name=name)(x, train)
        if name == "top":
            return layer(scaled(LAST_WIDTH, self.width), 1, name=name)(x, train)
        i = self.blocks.index(name)
        rates = growing(self.drop_path, self.depths, steps=sum(self.depths))[i]
        channels = scaled(STAGES[i].channels, self.width)
        stage = Stage(STAGES[i], channels, rates, self.tf, self.unit(MBConv), name=name)
        return self.shown(features, name, stage(x, train))

    def head_layer(self) -> Linear:
        """Started uniform in +- 1 / sqrt(outputs), with biases of zero."""
        start = uniform(self.outputs**-0.5)
        return Linear(self.outputs, kernel_init=start, bias_init=nn.initializers.zeros_init(), name="head")


SIZES: Mapping[str, tuple[float, float, float, int]] = {  # width, depth, dropout in front of the head, resolution
    "efficientnet_b0": (1.0, 1.0, 0.2, 224),
    "efficientnet_b1": (1.0, 1.1, 0.2, 240),
    "efficientnet_b2": (1.1, 1.2, 0.3, 260),
    "efficientnet_b3": (1.2, 1.4, 0.3, 300),
    "efficientnet_b4": (1.4, 1.8, 0.4, 380),
    "efficientnet_b5": (1.6, 2.2, 0.4, 456),
    "efficientnet_b6": (1.8, 2.6, 0.5, 528),
    "efficientnet_b7": (2.0, 3.1, 0.5, 600),
}


def efficientnet(
    variant: str, *, tf: bool = False, drop_path: float = 0.2, dropout: float | None = None, **common
) -> EfficientNet:
    """EfficientNet of a size in SIZES. tf: TensorFlow's padding and epsilon. drop_path: see EfficientNet.

    dropout: share of the pooled features that is dropped in front of the head, None for the published one.
    """
    width, depth, published, _ = SIZES[variant]
    dropout = published if dropout is None else dropout
    return EfficientNet(width=width, depth=depth, drop_path=drop_path, tf=tf, head_dropout=dropout, **common)


VARIANTS = {name: (functools.partial(efficientnet, name), sizes[-1]) for name, sizes in SIZES.items()}
