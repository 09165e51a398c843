"""Plain convolutional networks: Network in Network and AlexNet as RotNet has them, and torchvision's AlexNet.

RotNet's are those of Gidaris et al. 2018 and its public code. All start every kernel and bias as PyTorch does by
default, uniform in +- 1 / sqrt(fan in): RotNet's code has a He initialiser, but nothing calls it.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax

from jaxsd.errors import UserError
from jaxsd.models.blocks import ConvNorm, Linear, Sequential, Start, grown, numbered, uniform, uniform_fan_in
from jaxsd.models.conv import Conv
from jaxsd.models.norm import BatchNorm
from jaxsd.models.pool import adaptive_average_pool, adaptive_max_pool, average_pool, max_pool

Pool = Callable[[jax.Array, int, int, int], jax.Array]


class NinBlock(nn.Module):
    """A convolution of `kernel_size`, two of 1x1, all with norm and ReLU, and a 3x3 pool of stride 2 if given."""

    widths: tuple[int, int, int]
    kernel_size: int
    pool: Pool | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to [B, h, w, widths[-1]]."""
        for i, width in enumerate(self.widths):
            size = 1 if i else self.kernel_size
            layer = ConvNorm(width, size, 1, size // 2, kernel_init=uniform_fan_in, name=f"layer{i + 1}")
            x = layer(x, train)
        return self.pool(x, 3, 2, 1) if self.pool else x


class NIN(Sequential):
    """Network in Network of `depth` blocks, global average, head; features are the blocks' outputs, after the pool.

    Blocks 1 and 2 halve the map (max and average pool); block 3 does so with `pool_block3`.
    """

    depth: int = 4
    pool_block3: bool = False

    @property
    def blocks(self) -> tuple[str, ...]:
        """("block1", .., up to the depth)."""
        return numbered("block", self.depth)

    def run(self, name: str, x: jax.Array, train: bool, features: dict[str, jax.Array]) -> jax.Array:
        """One block."""
        third = average_pool if self.pool_block3 else None
        widths, size, pool = {
            "block1": ((192, 160, 96), 5, max_pool),
            "block2": ((192, 192, 192), 5, average_pool),
            "block3": ((192, 192, 192), 3, third),
        }.get(name, ((192, 192, 192), 3, None))
        return self.shown(features, name, NinBlock(widths, size, pool, name=name)(x, train))


class DenseNorm(nn.Module):
    """A dense layer without bias, batch norm, ReLU; submodules "dense" and "norm"."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, D] to [B, features]."""
        return nn.relu(BatchNorm(name="norm")(Linear(self.features, use_bias=False, name="dense")(x), train))


class ConvRelu(nn.Module):
    """Convolution with bias, ReLU; submodule "conv"."""

    features: int
    kernel_size: int
    stride: int
    padding: int
    kernel_init: Start
    bias_init: Start

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] to [B, h, w, features]."""
        conv = Conv(
            self.features, self.kernel_size, self.stride, self.padding, use_bias=True,
            kernel_init=self.kernel_init, bias_init=self.bias_init, name="conv",
        )  # fmt: skip
        return nn.relu(conv(x))


class MapLinear(Linear):
    """A dense layer on all of a map, kept as the convolution that it equals: kernel [h, w, C, features].

    Libraries flatten a map in different orders of its axes, or convolve: the tensors of all of them fit this one. The
    start is the dense layer's.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] to [B, 1, 1, features]."""
        inputs = math.prod(x.shape[1:])

        def start(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return self.kernel_init(key, (inputs, self.features)).reshape(shape)

        kernel = self.param("kernel", start, (*x.shape[1:], self.features))
        y = x.reshape(-1, inputs) @ kernel.reshape(inputs, -1).astype(x.dtype)
        if self.use_bias:
            y = y + self.param("bias", self.bias_init or uniform(inputs**-0.5), (self.features,)).astype(x.dtype)
        return y[:, None, None]


class Tower(Sequential):
    """What every AlexNet here has: five convolutions, 3x3 max pools of stride 2 after three, two dense layers, head.

    Features are taken after the ReLU and before the pool; "pooled" is what the head reads, the output of "fc2".
    """

    @property
    def blocks(self) -> tuple[str, ...]:
        """("block1", .., "block5"): the convolutions."""
        return numbered("block", 5)

    @property
    def behind(self) -> tuple[str, ...]:
        """("fc1", "fc2"): the dense layers in front of the head."""
        return numbered("fc", 2)

    def plan(self, name: str) -> tuple[int, int, int, int]:
        """Width, kernel size, stride and padding of a block's convolution."""
        plan = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
        return plan[self.blocks.index(name)]


class AlexNet(Tower):
    """AlexNet in one tower (Krizhevsky 2014), as torchvision's: an adaptive average pool gives 6x6 from any image.

    `dropout` is the rate in front of "fc1" and "fc2"; the head has none. The features are those that `Tower` tells.
    Raises UserError on images that vanish on the way.
    """

    dropout: float = 0.5

    def published(self, name: str) -> str:
        """As torchvision names it: "features.3" for "block2/conv", "features.4" for the ReLU after it, "block2"."""
        part, *inner = name.split("/")
        if part not in self.blocks:
            return {"fc1": "classifier.1", "fc2": "classifier.4", "head": "classifier.6"}[part]
        return f"features.{(0, 3, 6, 8, 10)[self.blocks.index(part)] + (not inner)}"

    def published_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The dense layers' kernels are flat in torchvision, channels first: [O, C, h, w] as [O, C * h * w]."""
        return (shape[0], math.prod(shape[1:])) if name in ("fc1/kernel", "fc2/kernel") else shape

    def run(self, name: str, x: jax.Array, train: bool, features: dict[str, jax.Array]) -> jax.Array:
        """One convolution with the pool behind it, or one dense layer with the dropout in front of it."""
        if name in ("fc1", "fc2"):
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"{name}_dropout")(x)
            return nn.relu(MapLinear(4096, name=name)(x))
        if name == "block1" and min(x.shape[1:3]) < 63:
            raise UserError(f"alexnet needs images of 63 pixels or more, got {x.shape[1:3]}")
        width, size, stride, padding = self.plan(name)
        bias = uniform((size * size * x.shape[-1]) ** -0.5)
        layer = ConvRelu(width, size, stride, padding, uniform_fan_in, bias, name=name)
        x = self.shown(features, name, layer(x))
        if name in ("block1", "block2", "block5"):
            x = max_pool(x, 3, 2)
        return adaptive_average_pool(x, 6) if name == "block5" else x


class AlexNetRotNet(Tower):
    """AlexNet in one tower with batch norm after every layer, convolutions with bias, without dropout.

    The first dense layer has the shape of the last map: 6x6 for images of 224 pixels, 2x2 for 112. With
    `adaptive_pool` the last pool always gives 6x6 (at 224 pixels exactly what the plain one gives), so that all
    parameters fit images of any size. Raises UserError on images that vanish on the way.
    """

    adaptive_pool: bool = False

    def run(self, name: str, x: jax.Array, train: bool, features: dict[str, jax.Array]) -> jax.Array:
        """One convolution with the pool behind it (block 5: flattened), or one dense layer."""
        if name in ("fc1", "fc2"):
            return DenseNorm(4096, name=name)(x, train)
        least = 31 if self.adaptive_pool else 63
        if name == "block1" and min(x.shape[1:3]) < least:
            raise UserError(f"alexnet_rotnet needs images of {least} pixels or more, got {x.shape[1:3]}")
        width, size, stride, padding = self.plan(name)
        bias = uniform((size * size * x.shape[-1]) ** -0.5)
        layer = ConvNorm(
            width, size, stride, padding, use_bias=True, kernel_init=uniform_fan_in, bias_init=bias, name=name
        )
        x = self.shown(features, name, layer(x, train))
        if name in ("block1", "block2"):
            return max_pool(x, 3, 2)
        if name == "block5":
            x = adaptive_max_pool(x, 6) if self.adaptive_pool else max_pool(x, 3, 2)
            return x.reshape(x.shape[0], -1)
        return x


def nin(*, blocks: int = 4, pool_block3: bool = False, grow: int | None = None, **common) -> NIN:
    """Network in Network of 3, 4 or 5 blocks, or the first `grow` of them.

    `pool_block3` halves the map once more after block 3, for 4 or 5 blocks: the default of RotNet's code, which the
    four-block network of its paper turns off.
    """
    if blocks not in (3, 4, 5):
        raise UserError(f"nin has 3, 4 or 5 blocks, not {blocks}: set blocks=")
    if pool_block3 and blocks == 3:
        raise UserError("pool_block3 needs a block after the third: set blocks=4 or blocks=5")
    return NIN(depth=grown("nin", blocks, grow), pool_block3=pool_block3, **common)


def alexnet_rotnet(*, adaptive_pool: bool = False, **common) -> AlexNetRotNet:
    """RotNet's AlexNet, for images of 224 pixels, or 63 and more (31 with `adaptive_pool`)."""
    return AlexNetRotNet(adaptive_pool=adaptive_pool, **common)


def alexnet(*, dropout: float = 0.5, **common) -> AlexNet:
    """torchvision's AlexNet, for images of 224 pixels, or 63 and more."""
    return AlexNet(dropout=dropout, **common)


VARIANTS = {"nin": (nin, 32), "alexnet_rotnet": (alexnet_rotnet, 224), "alexnet": (alexnet, 224)}
