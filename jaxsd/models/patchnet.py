"""Networks for patches of growing size: one block more for every doubling, always ending in a map of 4x4.

The submission which proposes pretraining on growing patches (ICLR 2021) says "convolutional blocks" and "several fully
connected layers" and no more. Everything else here is our choice: the 4x4 rule, the widths, the starts. Kernels are
drawn by He's normal rule (variance 2 / fan out), dense layers by Glorot's.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from jaxsd.errors import UserError
from jaxsd.models.blocks import ConvNorm, Linear, Sequential, glorot, grown, numbered
from jaxsd.models.pool import adaptive_max_pool, max_pool

SIDE = 4  # of the last map
FIRST = (32, 64, 128)  # channels of the first block's convolutions; further ones repeat the last
ZEROS = nn.initializers.zeros_init()


class PatchBlock(nn.Module):
    """3x3 convolutions with norm and ReLU, "unit1" onwards; a max pool of 2 after each, or after the last alone."""

    widths: tuple[int, ...]
    pool_each: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to [B, h, w, widths[-1]]."""
        for i, width in enumerate(self.widths):
            x = ConvNorm(width, 3, 1, 1, name=f"unit{i + 1}")(x, train)
            if self.pool_each or i + 1 == len(self.widths):
                x = max_pool(x, 2, 2)
        return x


class Hidden(nn.Module):
    """A dense layer ("dense"), ReLU, and dropout while training."""

    features: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, D] to [B, features]."""
        x = nn.relu(Linear(self.features, kernel_init=glorot, bias_init=ZEROS, name="dense")(x))
        return nn.Dropout(self.dropout, deterministic=not train)(x)


class PatchNet(Sequential):
    """The ladder: a first block of `first` convolutions, each with a pool, then one block of two for each of `widths`.

    Every block halves the map that the last one left, so with so many blocks the images must be of one size, 4 pixels
    times 2 for each pool. With `adaptive_pool` the last map is pooled to 4x4 whatever the size. It is flattened; dense
    layers "fc1" onwards (`hidden`, with `dropout`) and the head follow. Features are the blocks' maps after their pool;
    "pooled" is what the head reads. Raises UserError on images that do not fit.
    """

    first: tuple[int, ...] = FIRST
    widths: tuple[int, ...] = ()
    hidden: tuple[int, ...] = (512, 256)
    dropout: float = 0.5
    adaptive_pool: bool = False

    @property
    def blocks(self) -> tuple[str, ...]:
        """("block1", ..): the first block and one for each width."""
        return numbered("block", 1 + len(self.widths))

    @property
    def behind(self) -> tuple[str, ...]:
        """("fc1", ..): the dense layers in front of the head."""
        return numbered("fc", len(self.hidden))

    def run(self, name: str, x: jax.Array, train: bool, features: dict[str, jax.Array]) -> jax.Array:
        """One block (the last one: flattened), or one dense layer."""
        if name not in self.blocks:
            return Hidden(self.hidden[int(name.removeprefix("fc")) - 1], self.dropout, name=name)(x, train)
        i = self.blocks.index(name)
        if i == 0:
            self._check(x.shape[1], x.shape[2])
        widths = (self.widths[i - 1],) * 2 if i else self.first
        x = self.shown(features, name, PatchBlock(widths, pool_each=not i, name=name)(x, train))
        if name != self.blocks[-1]:
            return x
        if self.adaptive_pool:
            x = adaptive_max_pool(x, SIDE)
        return x.reshape(x.shape[0], -1)

    def head_layer(self) -> Linear:
        """Started as the other dense layers."""
        return Linear(self.outputs, kernel_init=glorot, bias_init=ZEROS, name="head")

    def _check(self, height: int, width: int) -> None:
        least = 2 ** (len(self.first) + len(self.widths))
        count = f"patchnet of {len(self.blocks)} block{'s' * bool(self.widths)}"
        if self.adaptive_pool and min(height, width) < least:
            raise UserError(f"{count} needs images of {least} pixels or more, got {height} x {width}")
        if not self.adaptive_pool and not height == width == SIDE * least:
            raise UserError(
                f"{count} takes images of {SIDE * least} x {SIDE * least}, got {height} x {width}: cut patches of "
                f"{SIDE * least} or set adaptive_pool=True"
            )


def patchnet(
    *,
    patch: int = 32,
    first: Sequence[int] | None = None,
    widths: Sequence[int] = (128, 256, 256, 512),
    grow: int | None = None,
    hidden: Sequence[int] = (512, 256),
    dropout: float = 0.5,
    adaptive_pool: bool = False,
    **common,
) -> PatchNet:
    """The first `grow` blocks (None: all) of a ladder that begins with patches of `patch` pixels: 8, 16, 32, 64, ..

    Block k is for images of patch * 2^(k-1) pixels. `first`: channels of the first block's log2(patch / 4)
    convolutions, by default 32, 64, 128, 128, ..; `widths`: channels of block 2 onwards. The heads of two steps differ;
    blocks keep their names and shapes.
    """
    units = patch.bit_length() - 3
    if units < 1 or patch != SIDE << units:
        raise UserError(f"patchnet begins with patches of 8, 16, 32, 64, .. pixels, not {patch}: set patch=")
    if first is None:
        first = [FIRST[min(i, len(FIRST) - 1)] for i in range(units)]
    if len(first) != units:
        raise UserError(f"patchnet for patches of {patch} needs {units} numbers of channels in first=, got {first}")
    count = grown("patchnet", 1 + len(widths), grow)
    return PatchNet(
        first=tuple(first), widths=tuple(widths)[: count - 1], hidden=tuple(hidden), dropout=dropout,
        adaptive_pool=adaptive_pool, **common,
    )  # fmt: skip


VARIANTS = {"patchnet": (patchnet, 512)}
