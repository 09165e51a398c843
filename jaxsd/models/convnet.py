"""Plain convolutional networks: RotNet's Network in Network and its AlexNet (Gidaris et al. 2018 and its public code).

Both start every kernel and bias as PyTorch does by default, uniform in +- 1 / sqrt(fan in): RotNet's code has a He
initialiser, but nothing calls it.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from jaxsd.errors import UserError
from jaxsd.models.blocks import Backbone, ConvNorm, Linear, uniform, uniform_fan_in
from jaxsd.models.norm import BatchNorm
from jaxsd.models.pool import adaptive_max_pool, average_pool, max_pool

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


class NIN(Backbone):
    """Network in Network of `depth` blocks, global average, head; features are the blocks' outputs, after the pool.

    Blocks 1 and 2 halve the map (max and average pool); block 3 does so with `pool_block3`.
    """

    depth: int = 4
    pool_block3: bool = False

    @property
    def blocks(self) -> tuple[str, ...]:
        """("block1", .., up to the depth)."""
        return tuple(f"block{i + 1}" for i in range(self.depth))

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """images [B, H, W, C] to (outputs, features), see Backbone."""
        features: dict[str, jax.Array] = {}
        rest = ((192, 192, 192), 3, None)
        third = ((192, 192, 192), 3, average_pool if self.pool_block3 else None)
        plan = (((192, 160, 96), 5, max_pool), ((192, 192, 192), 5, average_pool), third, rest, rest)
        x = images.astype(self.dtype)
        for name, (widths, size, pool) in zip(self.blocks, plan, strict=False):
            x = self.shown(features, name, NinBlock(widths, size, pool, name=name)(x, self.trains(name, train)))
        return self.ending(features, x)


class DenseNorm(nn.Module):
    """A dense layer without bias, batch norm, ReLU; submodules "dense" and "norm"."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, D] to [B, features]."""
        return nn.relu(BatchNorm(name="norm")(Linear(self.features, use_bias=False, name="dense")(x), train))


class AlexNetRotNet(Backbone):
    """AlexNet in one tower with batch norm after every layer, convolutions with bias, without dropout.

    Features are taken after the ReLU and before the pool; "pooled" is what the head reads, the output of "fc2".
    The first dense layer has the shape of the last map: 6x6 for images of 224 pixels, 2x2 for 112. With
    `adaptive_pool` the last pool always gives 6x6 (at 224 pixels exactly what the plain one gives), so that all
    parameters fit images of any size. Raises UserError on images that vanish on the way.
    """

    adaptive_pool: bool = False

    @property
    def blocks(self) -> tuple[str, ...]:
        """("block1", .., "block5"): the convolutions."""
        return tuple(f"block{i + 1}" for i in range(5))

    @property
    def parts(self) -> tuple[str, ...]:
        """("block1", .., "block5", "fc1", "fc2", "head")."""
        return (*self.blocks, "fc1", "fc2", *super().parts[5:])

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """images [B, H, W, C] to (outputs, features), see Backbone."""
        least = 31 if self.adaptive_pool else 63
        if min(images.shape[1:3]) < least:
            raise UserError(f"alexnet_rotnet needs images of {least} pixels or more, got {images.shape[1:3]}")
        features: dict[str, jax.Array] = {}
        plan = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
        x = images.astype(self.dtype)
        for name, (width, size, stride, padding) in zip(self.blocks, plan, strict=True):
            bias = uniform((size * size * x.shape[-1]) ** -0.5)
            layer = ConvNorm(
                width, size, stride, padding, use_bias=True, kernel_init=uniform_fan_in, bias_init=bias, name=name
            )
            x = self.shown(features, name, layer(x, self.trains(name, train)))
            if name in ("block1", "block2"):
                x = max_pool(x, 3, 2)
        x = adaptive_max_pool(x, 6) if self.adaptive_pool else max_pool(x, 3, 2)
        x = x.reshape(x.shape[0], -1)
        for name in ("fc1", "fc2"):
            x = DenseNorm(4096, name=name)(x, self.trains(name, train))
        return self.ending(features, x)


def nin(*, blocks: int = 4, pool_block3: bool = False, **common) -> NIN:
    """Network in Network of 3, 4 or 5 blocks.

    `pool_block3` halves the map once more after block 3, for 4 or 5 blocks: the default of RotNet's code, which the
    four-block network of its paper turns off.
    """
    if blocks not in (3, 4, 5):
        raise UserError(f"nin has 3, 4 or 5 blocks, not {blocks}: set blocks=")
    if pool_block3 and blocks == 3:
        raise UserError("pool_block3 needs a block after the third: set blocks=4 or blocks=5")
    return NIN(depth=blocks, pool_block3=pool_block3, **common)


def alexnet_rotnet(*, adaptive_pool: bool = False, **common) -> AlexNetRotNet:
    """RotNet's AlexNet, for images of 224 pixels, or 63 and more (31 with `adaptive_pool`)."""
    return AlexNetRotNet(adaptive_pool=adaptive_pool, **common)
