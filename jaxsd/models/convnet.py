"""Plain convolutional networks: RotNet's Network in Network and its AlexNet (Gidaris et al. 2018 and its public code).

Both start every kernel and bias as PyTorch does by default, uniform in +- 1 / sqrt(fan in): RotNet's code has a He
initialiser, but nothing calls it.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from jaxsd.errors import UserError
from jaxsd.models.blocks import ConvNorm, Linear, Sequential, grown, uniform, uniform_fan_in
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


class NIN(Sequential):
    """Network in Network of `depth` blocks, global average, head; features are the blocks' outputs, after the pool.

    Blocks 1 and 2 halve the map (max and average pool); block 3 does so with `pool_block3`.
    """

    depth: int = 4
    pool_block3: bool = False

    @property
    def blocks(self) -> tuple[str, ...]:
        """("block1", .., up to the depth)."""
        return tuple(f"block{i + 1}" for i in range(self.depth))

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


class AlexNetRotNet(Sequential):
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

    def run(self, name: str, x: jax.Array, train: bool, features: dict[str, jax.Array]) -> jax.Array:
        """One convolution with the pool behind it (block 5: flattened), or one dense layer."""
        if name in ("fc1", "fc2"):
            return DenseNorm(4096, name=name)(x, train)
        least = 31 if self.adaptive_pool else 63
        if name == "block1" and min(x.shape[1:3]) < least:
            raise UserError(f"alexnet_rotnet needs images of {least} pixels or more, got {x.shape[1:3]}")
        plan = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
        width, size, stride, padding = plan[self.blocks.index(name)]
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


VARIANTS = {"nin": (nin, 32), "alexnet_rotnet": (alexnet_rotnet, 224)}
