"""Residual networks (He et al. 2016), version 1.5: the stride of a bottleneck sits in its 3x3 convolution.

One network with arguments: ResNet, ResNeXt (Xie et al. 2017), with selective kernels (SKNet, Li et al. 2019), with two
stochastic branches ("D-") or with both and blur pooling ("DSK-"): VIPF, "A visual inductive priors framework for
data-efficient image classification", 2020. ResNet, ResNeXt and SK-ResNeXt-50 are those of torchvision and timm,
parameter for parameter, with a choice of stem; resnet8 is the 78,042-parameter network for tiny images (one basic block
per stage, widths 16, 32, 64).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsd.errors import UserError
from jaxsd.models.blocks import Staged, grown
from jaxsd.models.pool import blur_pool, global_average_pool, global_concat_pool, global_dual_pool, max_pool
from jaxsd.models.residual import Branch, Lam, Stage, Unit, strided

Stem = Literal["cifar", "imagenet"]
Pool = Literal["average", "dual", "concat"]
CIFAR_STEM_UP_TO = 64
POOLS = {"average": global_average_pool, "dual": global_dual_pool, "concat": global_concat_pool}
SELECTIVE = {  # timm's names within a layer of its selective networks
    "conv": "conv",
    "norm": "bn",
    "path1/conv": "paths.0.conv",
    "path1/norm": "paths.0.bn",
    "path2/conv": "paths.1.conv",
    "path2/norm": "paths.1.bn",
    "reduce/conv": "attn.fc_reduce",
    "reduce/norm": "attn.bn",
    "select": "attn.fc_select",
}


class ResNet(Staged):
    """Stem, one block per entry of `depths` (residual units) and `widths` (channels), global `pool`, head.

    The "cifar" stem is a 3x3 convolution of stride 1, the "imagenet" stem a 7x7 of stride 2 and a 3x3 max pool of
    stride 2. `zero_init_residual` starts the last norm of each branch at scale zero (Goyal et al. 2017; SimCLR's code).
    `bottleneck`, `inner`, `groups`, `depthwise`, `selective` and `dilated` are the form of a `Branch`; for `branches`,
    `lam` and `lam_group` see `Unit`. `blur` puts a blur pool in the place of every stride of 2, the shortcuts' too (as
    Zhang's code does; timm leaves those), but that of the stem's convolution; `blur_stem` does so there. The pool is
    the "average", halfway between average and maximum ("dual"), or both side by side ("concat").
    """

    depths: tuple[int, ...] = (1, 1, 1)
    widths: tuple[int, ...] = (16, 32, 64)
    bottleneck: bool = False
    stem_kind: Stem = "cifar"
    zero_init_residual: bool = False
    inner: int = 1
    groups: int = 1
    depthwise: bool = False
    selective: bool = False
    dilated: bool = True
    branches: int = 1
    lam: Lam = "either"
    lam_group: int | None = 1
    blur: bool = False
    blur_stem: bool = False
    pool: Pool = "average"

    def __post_init__(self) -> None:
        _known("branches", self.branches, (1, 2))
        _known("lam", self.lam, ("either", "shake"))
        _known("pool", self.pool, tuple(POOLS))
        if self.lam_group is not None and self.lam_group < 1:
            raise UserError(f"lam_group={self.lam_group} is no number of images: give 1 or more, or None for the batch")
        if self.branches == 1 and (self.lam, self.lam_group) != ("either", 1):
            raise UserError("lam and lam_group mix two branches, and there is one: set branches=2")
        if not self.dilated and not self.selective:
            raise UserError("dilated=False makes a selective kernel's 5x5 a true one: set selective=True")
        if self.depthwise and not self.bottleneck:
            raise UserError("depthwise is for bottlenecks: choose resnet50 or larger, or a ResNeXt")
        super().__post_init__()

    def published(self, name: str) -> str:
        """As timm and torchvision name it: "layer1.0.conv2" for "block1/unit1/layer2/conv"."""
        if self.branches == 2:
            return super().published(name)
        part, *inner = name.split("/")
        kind = {"conv": "conv", "norm": "bn"}
        if part == "head":
            return "fc"
        if part == "stem":
            return kind[inner[0]] + "1"
        stage = part.replace("block", "layer")
        if not inner:
            return stage
        unit, layer = f"{stage}.{int(inner[0].removeprefix('unit')) - 1}", inner[1].removeprefix("layer")
        if layer == "shortcut":
            return f"{unit}.downsample.{('conv', 'norm').index(inner[2])}"
        if self.selective:
            return f"{unit}.conv{layer}.{SELECTIVE['/'.join(inner[2:])]}"
        return f"{unit}.{kind[inner[2]]}{layer}"

    def run(self, name: str, x: jax.Array, train: bool, features: dict[str, jax.Array]) -> jax.Array:
        """The stem with its pool, or one stage; behind the last one its pooled map [B, D], float32."""
        if name == "stem":
            return self.stem(x, train)
        i = self.blocks.index(name)
        x = Stage(self.depths[i], self.widths[i], 2 if i else 1, self.unit_form(), name=name)(x, train)
        x = self.shown(features, name, x)
        return POOLS[self.pool](x.astype(jnp.float32)) if name == self.blocks[-1] else x

    def stem(self, x: jax.Array, train: bool) -> jax.Array:
        """Images to what the first stage takes."""
        if self.stem_kind == "cifar":
            return strided(x, train, self.widths[0], 1, name="stem")
        x = strided(x, train, self.widths[0], 2, size=7, blur=self.blur_stem, name="stem")
        return blur_pool(max_pool(x, 3, 1, 1)) if self.blur else max_pool(x, 3, 2, 1)

    def unit_form(self) -> Callable[..., nn.Module]:
        """A residual unit, but for its width, stride and name."""
        branch = functools.partial(
            Branch, bottleneck=self.bottleneck, inner=self.inner, groups=self.groups, depthwise=self.depthwise,
            selective=self.selective, dilated=self.dilated, blur=self.blur, zero_init_residual=self.zero_init_residual,
        )  # fmt: skip
        return functools.partial(
            self.unit(Unit),
            branch=branch,
            branches=self.branches,
            lam=self.lam,
            lam_group=self.lam_group,
            blur=self.blur,
        )


def _known(option: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise UserError(f"unknown {option}={value!r}: choose from {', '.join(map(repr, choices))}")


class Size(NamedTuple):
    """What the number (and "32x4d") in a network's name stands for."""

    depths: tuple[int, ...]
    bottleneck: bool = True
    inner: int = 1
    groups: int = 1


def resnet8(
    *, grow: int | None = None, zero_init_residual: bool = False, pool: Pool = "average", dropout: float = 0.0, **common
) -> ResNet:
    """Three basic blocks of 16, 32 and 64 channels, always with the CIFAR stem: for images up to about 64 pixels.

    `grow`, in all of the family: only the stem and the first so many blocks, of the same names and shapes.
    """
    count = grown("resnet8", 3, grow)
    return ResNet(
        depths=(1, 1, 1)[:count], widths=(16, 32, 64)[:count], zero_init_residual=zero_init_residual, pool=pool,
        head_dropout=dropout, **common,
    )  # fmt: skip


def resnet(
    name: str,
    size: Size,
    *,
    resolution: int | None = None,
    stem: Stem | None = None,
    grow: int | None = None,
    zero_init_residual: bool = False,
    selective: bool = False,
    dilated: bool = True,
    depthwise: bool = False,
    branches: int = 1,
    lam: Lam = "either",
    lam_group: int | None = 1,
    blur: bool = False,
    blur_stem: bool = False,
    pool: Pool = "average",
    dropout: float = 0.0,
    **common,
) -> ResNet:
    """A network of four blocks, 64 to 512 channels (256 to 2048 with bottlenecks), see `ResNet` for the options.

    The stem is chosen by `resolution` where it is not given. `dropout` is in front of the head.
    """
    count = grown(name, len(size.depths), grow)
    return ResNet(
        depths=size.depths[:count], widths=(64, 128, 256, 512)[:count], bottleneck=size.bottleneck, inner=size.inner,
        groups=size.groups, stem_kind=_stem(name, resolution, stem), zero_init_residual=zero_init_residual,
        selective=selective, dilated=dilated, depthwise=depthwise, branches=branches, lam=lam, lam_group=lam_group,
        blur=blur, blur_stem=blur_stem, pool=pool, head_dropout=dropout, **common,
    )  # fmt: skip


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


RESNEXT50 = Size((3, 4, 6, 3), inner=2, groups=32)
RESNEXT101 = Size((3, 4, 23, 3), inner=2, groups=32)
NETWORKS: dict[str, tuple[Size, dict[str, Any]]] = {
    "resnet18": (Size((2, 2, 2, 2), bottleneck=False), {}),
    "resnet34": (Size((3, 4, 6, 3), bottleneck=False), {}),
    "resnet50": (Size((3, 4, 6, 3)), {}),
    "resnet101": (Size((3, 4, 23, 3)), {}),
    "resnext50_32x4d": (RESNEXT50, {}),
    "resnext101_32x4d": (RESNEXT101, {}),
    "skresnext50_32x4d": (RESNEXT50, {"selective": True}),
    "skresnext101_32x4d": (RESNEXT101, {"selective": True}),
    "d_resnext50_32x4d": (RESNEXT50, {"branches": 2}),
    "d_resnext101_32x4d": (RESNEXT101, {"branches": 2}),
    "dsk_resnext50_32x4d": (RESNEXT50, {"selective": True, "branches": 2, "blur": True}),
    "dsk_resnext101_32x4d": (RESNEXT101, {"selective": True, "branches": 2, "blur": True}),
}
VARIANTS = {
    "resnet8": (resnet8, 32),
    **{name: (functools.partial(resnet, name, size, **form), 224) for name, (size, form) in NETWORKS.items()},
}
