"""Pyramid Vision Transformers, version 2 (Wang et al. 2022): four stages of attention over ever smaller maps.

As timm's and the authors' code, tensor for tensor. There is no class token and no table of positions: the zero padding
of the convolutions between and inside the units tells where a token stands.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsd.errors import UserError
from jaxsd.models.blocks import DropPath, Linear, Staged, gelu, growing, he_fan_out, normal
from jaxsd.models.conv import Conv
from jaxsd.models.norm import LayerNorm
from jaxsd.models.pool import adaptive_average_pool

LEAST = 32  # pixels: the first stage's map is then 8 x 8, which it reduces to one key
POOLED = 7  # side of the map of keys in linear attention
dense = functools.partial(Linear, kernel_init=normal(0.02), bias_init=nn.initializers.zeros_init())
conv = functools.partial(Conv, use_bias=True, kernel_init=he_fan_out)


class PatchEmbedding(nn.Module):
    """Overlapping patches: a convolution with a window wider than its stride, layer norm."""

    features: int
    kernel_size: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
        x = conv(self.features, self.kernel_size, self.stride, self.kernel_size // 2, name="conv")(x)
        return LayerNorm(1e-5, name="norm")(x)


class Attention(nn.Module):
    """Attention of all positions to a smaller map (spatial reduction): fewer keys, as many queries.

    The map is reduced by a convolution of window and stride `reduction`, the rest at the edges is dropped, and layer
    norm; 1 leaves it as it is. With `linear` it is averaged to 7 x 7 whatever its size, and a 1x1 convolution, layer
    norm and GELU follow: the cost grows with the number of pixels, not with its square. Weights are float32.
    """

    heads: int
    reduction: int
    linear: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, D] to the same shape."""
        batch, dim = x.shape[0], x.shape[-1]
        part = dim // self.heads
        queries = dense(dim, name="query")(x).reshape(batch, -1, self.heads, part)
        both = dense(2 * dim, name="keyvalue")(self.reduced(x)).reshape(batch, -1, 2, self.heads, part)
        keys, values = both[:, :, 0], both[:, :, 1]
        logits = jnp.einsum("bnhd,bmhd->bhnm", queries, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * part**-0.5).astype(x.dtype)
        mixed = jnp.einsum("bhnm,bmhd->bnhd", weights, values)
        return dense(dim, name="project")(mixed.reshape(x.shape))

    def reduced(self, x: jax.Array) -> jax.Array:
        """The map [B, h, w, D] that keys and values are made of."""
        if self.linear:
            x = conv(x.shape[-1], 1, name="reduce")(adaptive_average_pool(x, POOLED))
            return gelu(LayerNorm(1e-5, name="norm")(x))
        if self.reduction == 1:
            return x
        return LayerNorm(1e-5, name="norm")(conv(x.shape[-1], self.reduction, self.reduction, name="reduce")(x))


class Mlp(nn.Module):
    """To `hidden` channels, ReLU with `linear`, a 3x3 depthwise convolution, exact GELU, and back."""

    hidden: int
    linear: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, D] to the same shape."""
        y = dense(self.hidden, name="expand")(x)
        y = nn.relu(y) if self.linear else y
        start = normal(2**0.5 / 3)  # of the variance 2 / fan out, which is 9 for one channel
        y = conv(self.hidden, 3, 1, 1, groups=self.hidden, kernel_init=start, name="depthwise")(y)
        return dense(x.shape[-1], name="project")(gelu(y))


class Unit(nn.Module):
    """Attention, then the MLP, each behind a layer norm and added to its input, with stochastic depth."""

    heads: int
    ratio: int
    reduction: int
    linear: bool
    drop_path: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, D] to the same shape."""
        attention = Attention(self.heads, self.reduction, self.linear, name="attention")
        x = x + DropPath(self.drop_path)(attention(LayerNorm(name="norm1")(x)), train)
        x = jax.lax.optimization_barrier(x)  # else a CPU adds it up again in everything that reads it
        mlp = Mlp(self.ratio * x.shape[-1], self.linear, name="mlp")
        return jax.lax.optimization_barrier(x + DropPath(self.drop_path)(mlp(LayerNorm(name="norm2")(x)), train))


class Stage(nn.Module):
    """One unit, "unit1" onwards, for each of `rates`, the drop path's; layer norm.

    With `halve` a patch embedding ("embedding") to `width` channels at half the side comes first.
    """

    width: int
    heads: int
    ratio: int
    reduction: int
    linear: bool
    rates: tuple[float, ...]
    halve: bool
    unit: type[nn.Module] = Unit

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to [B, h, w, width]."""
        if self.halve:
            x = PatchEmbedding(self.width, 3, 2, name="embedding")(x)
        for i, rate in enumerate(self.rates):
            x = self.unit(self.heads, self.ratio, self.reduction, self.linear, rate, name=f"unit{i + 1}")(x, train)
        return LayerNorm(name="norm")(x)


class PVT(Staged):
    """A stem (7x7 patches every 4 pixels), one block per entry of `depths` (units), global average, head.

    Each block but the first halves the map; `widths` are the channels, which `heads` divide, `ratios` the MLPs' factors
    of widening, `reductions` those of the maps that attention looks at (unused with `linear`). Features are the
    blocks' maps behind their norm. Unit k of n drops its paths at rate (k - 1) / (n - 1) * `drop_path`. For images of
    any shape from 32 pixels, with `linear` from one pixel; raises UserError below.
    """

    depths: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 320, 512)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    ratios: tuple[int, ...] = (8, 8, 4, 4)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    linear: bool = False
    drop_path: float = 0.0

    def published(self, name: str) -> str:
        """As timm names it: "stages.0.blocks.1.attn.kv" for "block1/unit2/attention/keyvalue"."""
        part, *inner = name.split("/")
        if part == "head":
            return part
        if part == "stem":
            return {"conv": "patch_embed.proj", "norm": "patch_embed.norm"}[inner[0]]
        words = {
            "embedding": "downsample", "conv": "proj", "attention": "attn", "query": "q", "keyvalue": "kv",
            "reduce": "sr", "project": "proj", "expand": "fc1", "depthwise": "dwconv",
        }  # fmt: skip
        if "mlp" in inner:
            words["project"] = "fc2"
        found = [f"stages.{int(part.removeprefix('block')) - 1}"]
        for word in inner:
            unit = word.startswith("unit")
            found.append(f"blocks.{int(word.removeprefix('unit')) - 1}" if unit else words.get(word, word))
        return ".".join(found)

    def run(self, name: str, x: jax.Array, train: bool, features: dict[str, jax.Array]) -> jax.Array:
        """The stem or one stage."""
        if name == "stem":
            if min(x.shape[1:3]) < LEAST and not self.linear:
                raise UserError(f"PVT needs images of {LEAST} pixels or more, got {x.shape[1]}x{x.shape[2]}")
            return PatchEmbedding(self.widths[0], 7, 4, name=name)(x)
        i = self.blocks.index(name)
        rates = growing(self.drop_path, self.depths)[i]
        sizes = (self.widths[i], self.heads[i], self.ratios[i], self.reductions[i], self.linear)
        stage = Stage(*sizes, rates, halve=i > 0, unit=self.unit(Unit), name=name)
        return self.shown(features, name, stage(x, train))

    def head_layer(self) -> Linear:
        """Started as the other dense layers."""
        return dense(self.outputs, name="head")


NARROW = {"widths": (32, 64, 160, 256)}
SIZES: Mapping[str, Mapping[str, Any]] = {  # b0_small, b0_small1 and b0_large: Cao et al. 2022, for 2,040 images
    "pvt_v2_b0_small1": {"widths": (8, 16, 40, 64)},
    "pvt_v2_b0_small": {"widths": (16, 32, 80, 128)},
    "pvt_v2_b0": NARROW,
    "pvt_v2_b0_large": {**NARROW, "depths": (3, 4, 6, 3)},
    "pvt_v2_b1": {},
    "pvt_v2_b2": {"depths": (3, 4, 6, 3)},
    "pvt_v2_b2_li": {"depths": (3, 4, 6, 3), "linear": True},
    "pvt_v2_b3": {"depths": (3, 4, 18, 3)},
    "pvt_v2_b4": {"depths": (3, 8, 27, 3)},
    "pvt_v2_b5": {"depths": (3, 6, 40, 3), "ratios": (4, 4, 4, 4)},
}


def pvt_v2(variant: str, *, drop_path: float = 0.0, dropout: float = 0.0, **common) -> PVT:
    """PVT version 2 of a size in SIZES. drop_path: see PVT, published 0.1, from b3 on 0.3; dropout: before the head."""
    return PVT(**SIZES[variant], drop_path=drop_path, head_dropout=dropout, **common)


VARIANTS = {name: (functools.partial(pvt_v2, name), 224) for name in SIZES}
