"""VGG-16 (Simonyan & Zisserman 2015), without and with batch norm, as torchvision's and timm's."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsd.errors import UserError
from jaxsd.models.blocks import ConvNorm, Linear, Sequential, Start, he_fan_out, normal, numbered, uniform
from jaxsd.models.convnet import ConvRelu, MapLinear
from jaxsd.models.pool import adaptive_average_pool, max_pool

Init = Literal["torchvision", "keras"]
ZEROS = nn.initializers.zeros_init()


def glorot_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Kernels [.., C, features] uniform in +- sqrt(6 / (positions * (C + features))): Keras's default."""
    return uniform((6 / (math.prod(shape[:-2]) * sum(shape[-2:]))) ** 0.5)(key, shape, dtype)


# kernels of the convolutions, of the dense layers; biases start at zero
STARTS: dict[str, tuple[Start, Start]] = {
    "torchvision": (he_fan_out, normal(0.01)),
    "keras": (glorot_uniform, glorot_uniform),
}


class Block(nn.Module):
    """`depth` 3x3 convolutions with bias and ReLU, "layer1" onwards; with `norm` a batch norm before each ReLU."""

    depth: int
    width: int
    norm: bool
    kernel_init: Start

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to [B, H, W, width]."""
        for i in range(self.depth):
            name = f"layer{i + 1}"
            if self.norm:
                layer = ConvNorm(self.width, 3, 1, 1, use_bias=True, kernel_init=self.kernel_init, name=name)
                x = layer(x, train)
            else:
                x = ConvRelu(self.width, 3, 1, 1, self.kernel_init, ZEROS, name=name)(x)
        return x


class VGG(Sequential):
    """One block per entry of `depths` (3x3 convolutions) and `widths` (channels), dense layers of `hidden`, head.

    A 2x2 max pool follows each block. Features are the blocks' last ReLUs, BEFORE the pool: block5 is the map
    (block5_conv3, 14x14 for images of 224 pixels) that class activation maps of VGG are drawn from, four times finer
    than the pooled one. "pooled" is what the head reads: the last dense layer's output, or with `hidden=()` the mean of
    the last pooled map.

    The first dense layer reads a map of `pool` x `pool`, which an adaptive average pool makes of any image (at 224
    pixels 7x7 is the map itself); `pool=1` is the global average. `head_dropout` is the rate in front of every dense
    layer but the first, the head included. Raises UserError on images that vanish on the way.
    """

    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    norm: bool = False
    hidden: tuple[int, ...] = (4096, 4096)
    pool: int = 7
    start: Init = "torchvision"

    @property
    def blocks(self) -> tuple[str, ...]:
        """("block1", ..): the convolutions between two pools."""
        return numbered("block", len(self.depths))

    @property
    def behind(self) -> tuple[str, ...]:
        """("fc1", ..): the dense layers in front of the head."""
        return numbered("fc", len(self.hidden))

    def published(self, name: str) -> str:
        """As timm names it: "features.2" for "block1/layer2/conv", "features.3" for "block1", the ReLU after it."""
        part, *inner = name.split("/")
        if part == "head":
            return "head.fc"
        if part in self.behind:
            return f"pre_logits.{part}"
        modules = 3 if self.norm else 2  # convolution, norm, ReLU
        i = self.blocks.index(part)
        first = sum(modules * depth + 1 for depth in self.depths[:i])
        if not inner:
            return f"features.{first + modules * self.depths[i] - 1}"
        layer = int(inner[0].removeprefix("layer")) - 1
        return f"features.{first + modules * layer + ('conv', 'norm').index(inner[1])}"

    def run(self, name: str, x: jax.Array, train: bool, features: dict[str, jax.Array]) -> jax.Array:
        """One block with the pool behind it (the last: both pools), or one dense layer."""
        conv_start, dense_start = STARTS[self.start]
        if name in self.behind:
            i = self.behind.index(name)
            if i:
                x = nn.Dropout(self.head_dropout, deterministic=not train, name=f"{name}_dropout")(x)
            return nn.relu(MapLinear(self.hidden[i], kernel_init=dense_start, bias_init=ZEROS, name=name)(x))
        i, least = self.blocks.index(name), 2 ** len(self.depths)
        if not i and min(x.shape[1:3]) < least:
            raise UserError(f"VGG with {len(self.depths)} pools needs images of {least} pixels or more: {x.shape[1:3]}")
        block = self.unit(Block)(self.depths[i], self.widths[i], self.norm, conv_start, name=name)
        x = max_pool(self.shown(features, name, block(x, train)), 2, 2)
        return adaptive_average_pool(x, self.pool) if name == self.blocks[-1] and self.hidden else x

    def head_layer(self) -> Linear:
        """The layer behind the pooled features, started as the dense ones."""
        return Linear(self.outputs, kernel_init=STARTS[self.start][1], bias_init=ZEROS, name="head")


def vgg16(
    norm: bool,
    *,
    hidden: Sequence[int] = (4096, 4096),
    pool: int = 7,
    dropout: float = 0.5,
    init: Init = "torchvision",
    **common,
) -> VGG:
    """Thirteen convolutions and the dense layers of `hidden`, for images of 32 pixels or more.

    `pool` is the side of the map that the first dense layer reads. init: "torchvision" (He's normal draw by fan out,
    dense layers normal of deviation 0.01) or "keras" (Glorot's uniform draw); biases start at zero in both.
    """
    if init not in STARTS:
        raise UserError(f"unknown init {init!r} for vgg16: choose from {', '.join(STARTS)}")
    if pool < 1:
        raise UserError(f"vgg16 pools to a map with a side of 1 or more, not {pool}: set pool=")
    return VGG(norm=norm, hidden=tuple(hidden), pool=pool, head_dropout=dropout, start=init, **common)


VARIANTS = {
    "vgg16": (functools.partial(vgg16, False), 224),
    "vgg16_bn": (functools.partial(vgg16, True), 224),
}
