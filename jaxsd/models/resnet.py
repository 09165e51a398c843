"""Residual networks (He et al. 2016), version 1.5: the stride of a bottleneck sits in its 3x3 convolution.

As torchvision's, parameter for parameter, with a choice of stem; resnet8 is the 78,042-parameter network for tiny
images (one basic block per stage, widths 16, 32, 64).
"""

from typing import Any, Literal

import flax.linen as nn
import jax

from jaxsd.errors import UserError
from jaxsd.models.blocks import ConvNorm, Sequential, grown
from jaxsd.models.pool import max_pool

Stem = Literal["cifar", "imagenet"]
CIFAR_STEM_UP_TO = 64


class Unit(nn.Module):
    """One residual unit: two 3x3 convolutions, or 1x1, 3x3 and 1x1 (four times `width`) with `bottleneck`."""

    width: int
    stride: int = 1
    bottleneck: bool = False
    zero_init_residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), width or 4 * width]."""
        width, zero = 4 * self.width if self.bottleneck else self.width, self.zero_init_residual
        if self.bottleneck:
            y = ConvNorm(self.width, 1, name="layer1")(x, train)
            y = ConvNorm(self.width, 3, self.stride, 1, name="layer2")(y, train)
            y = ConvNorm(width, 1, activation=None, zero_scale=zero, name="layer3")(y, train)
        else:
            y = ConvNorm(width, 3, self.stride, 1, name="layer1")(x, train)
            y = ConvNorm(width, 3, 1, 1, activation=None, zero_scale=zero, name="layer2")(y, train)
        if self.stride != 1 or x.shape[-1] != width:
            x = ConvNorm(width, 1, self.stride, activation=None, name="shortcut")(x, train)
        return nn.relu(x + y)


class Stage(nn.Module):
    """`depth` residual units, "unit1" onwards; the first has the stride."""

    depth: int
    width: int
    stride: int
    bottleneck: bool
    zero_init_residual: bool
    unit: type[nn.Module] = Unit

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to the last unit's output."""
        for i in range(self.depth):
            stride = 1 if i else self.stride
            x = self.unit(self.width, stride, self.bottleneck, self.zero_init_residual, name=f"unit{i + 1}")(x, train)
        return x


class ResNet(Sequential):
    """Stem, one block per entry of `depths` (residual units) and `widths` (channels), global average, head.

    The "cifar" stem is a 3x3 convolution of stride 1, the "imagenet" stem a 7x7 of stride 2 and a 3x3 max pool of
    stride 2. `zero_init_residual` starts the last norm of each unit at scale zero (Goyal et al. 2017; SimCLR's code).
    """

    depths: tuple[int, ...] = (1, 1, 1)
    widths: tuple[int, ...] = (16, 32, 64)
    bottleneck: bool = False
    stem_kind: Stem = "cifar"
    zero_init_residual: bool = False

    @property
    def blocks(self) -> tuple[str, ...]:
        """("block1", ..): the stages, without the stem."""
        return tuple(f"block{i + 1}" for i in range(len(self.depths)))

    @property
    def parts(self) -> tuple[str, ...]:
        """("stem", "block1", .., "head")."""
        return ("stem", *super().parts)

    def published(self, name: str) -> str:
        """As timm and torchvision name it: "layer1.0.conv2" for "block1/unit1/layer2/conv"."""
        part, *inner = name.split("/")
        kind = {"conv": "conv", "norm": "bn"}
        if part == "head":
            return "fc"
        if part == "stem":
            return kind[inner[0]] + "1"
        stage = part.replace("block", "layer")
        if not inner:
            return stage
        unit = f"{stage}.{int(inner[0].removeprefix('unit')) - 1}"
        if inner[1] == "shortcut":
            return f"{unit}.downsample.{('conv', 'norm').index(inner[2])}"
        return f"{unit}.{kind[inner[2]]}{inner[1].removeprefix('layer')}"

    def run(self, name: str, x: jax.Array, train: bool, features: dict[str, jax.Array]) -> jax.Array:
        """The stem with its pool, or one stage."""
        if name == "stem":
            kernel, stride, padding = (3, 1, 1) if self.stem_kind == "cifar" else (7, 2, 3)
            x = ConvNorm(self.widths[0], kernel, stride, padding, name=name)(x, train)
            return max_pool(x, 3, 2, 1) if self.stem_kind == "imagenet" else x
        i = self.blocks.index(name)
        stride = 2 if i else 1
        stage = Stage(
            self.depths[i], self.widths[i], stride, self.bottleneck, self.zero_init_residual, self.unit(Unit), name=name
        )
        return self.shown(features, name, stage(x, train))


def resnet8(*, grow: int | None = None, zero_init_residual: bool = False, **common) -> ResNet:
    """Three basic blocks of 16, 32 and 64 channels, always with the CIFAR stem: for images up to about 64 pixels.

    `grow`, in all of the family: only the stem and the first so many blocks, of the same names and shapes.
    """
    return ResNet(**_ladder("resnet8", (1, 1, 1), (16, 32, 64), grow), zero_init_residual=zero_init_residual, **common)


def resnet18(
    *,
    resolution: int | None = None,
    stem: Stem | None = None,
    grow: int | None = None,
    zero_init_residual: bool = False,
    **common,
) -> ResNet:
    """Eight basic blocks, 64 to 512 channels. The stem is chosen by `resolution` where it is not given."""
    ladder = _ladder("resnet18", (2, 2, 2, 2), (64, 128, 256, 512), grow)
    kind = _stem("resnet18", resolution, stem)
    return ResNet(**ladder, stem_kind=kind, zero_init_residual=zero_init_residual, **common)


def resnet50(
    *,
    resolution: int | None = None,
    stem: Stem | None = None,
    grow: int | None = None,
    zero_init_residual: bool = False,
    **common,
) -> ResNet:
    """Sixteen bottlenecks, 256 to 2048 channels. The stem is chosen by `resolution` where it is not given."""
    ladder = _ladder("resnet50", (3, 4, 6, 3), (64, 128, 256, 512), grow)
    kind = _stem("resnet50", resolution, stem)
    return ResNet(**ladder, bottleneck=True, stem_kind=kind, zero_init_residual=zero_init_residual, **common)


def _ladder(name: str, depths: tuple[int, ...], widths: tuple[int, ...], grow: int | None) -> dict[str, Any]:
    """The first `grow` of a network's stages."""
    count = grown(name, len(depths), grow)
    return {"depths": depths[:count], "widths": widths[:count]}


def _stem(name: str, resolution: int | None, stem: str | None) -> Stem:
    """The stem asked for, else "cifar" up to 64 pixels and "imagenet" above.

    SimCLR's code draws the line at 32 pixels; at 64 the ImageNet stem would still end in maps of 2x2. The line is
    drawn at the full size of the images, never at a scaled view's: a network keeps its stem while the images grow.
    """
    if stem in ("cifar", "imagenet"):
        return stem
    if stem is not None:
        raise UserError(f"unknown stem {stem!r} for {name}: choose 'cifar' (up to 64 pixels) or 'imagenet'")
    if resolution is None:
        raise UserError(f"{name} cannot choose its stem: give resolution= (side of the full-size images) or stem=")
    return "cifar" if resolution <= CIFAR_STEM_UP_TO else "imagenet"


VARIANTS = {"resnet8": (resnet8, 32), "resnet18": (resnet18, 224), "resnet50": (resnet50, 224)}
