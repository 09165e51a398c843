"""Vision transformers (Dosovitskiy et al. 2021) in the sizes and with the starts of DeiT (Touvron et al. 2021).

Parameter for parameter timm's deit_*_patch16_224, without the distillation token. Dense kernels, class token and
positions are drawn from N(0, 0.02): DeiT truncates at +-2, a hundred deviations out, which is never reached.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from jax import lax

from jaxsd.errors import UserError
from jaxsd.models.blocks import DropPath, Linear, Sequential, gelu, growing, normal, numbered, uniform, uniform_fan_in
from jaxsd.models.conv import Conv
from jaxsd.models.norm import LayerNorm

Array = jax.Array
POSITIONS = "positions"  # the name that every position table has
START = normal(0.02)
ZEROS = nn.initializers.zeros_init()


class Tokens(struct.PyTreeNode):
    """A class token and the h * w tokens of a map behind it, row by row."""

    values: Array  # [B, 1 + h w, D]
    grid: tuple[int, int] = struct.field(pytree_node=False)  # (h, w)


def _cubic(size: int, wanted: int) -> np.ndarray:
    """The weights [wanted, size] by which cubic convolution (Keys 1981, a = -3/4) resizes a line of `size` values.

    Ends of the lines, not the centres of their last values, fall together; beyond them the last values go on.
    """
    a = -0.75
    centre = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    first = np.floor(centre).astype(int) - 1
    weights = np.zeros((wanted, size))
    for tap in range(4):
        distance = np.abs(centre - (first + tap))
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        np.add.at(
            weights,
            (np.arange(wanted), np.clip(first + tap, 0, size - 1)),
            np.where(distance <= 1, near, far),
        )
    return weights.astype(np.float32)


def resize_positions(table: Array, grid: tuple[int, int], *, prefix: int = 1) -> Array:
    """A position table [1, prefix + g g, D] for maps of `grid` = (h, w): float32 [1, prefix + h w, D].

    The first `prefix` rows stay; the others are resized as a map by PyTorch's bicubic rule without antialiasing, as in
    DeiT's fine-tuning at other resolutions. Raises UserError where the table is not that of a square.
    """
    table = jnp.asarray(table, jnp.float32)
    count = table.shape[1] - prefix
    side = math.isqrt(max(count, 0))
    if side * side != count or not side:
        raise UserError(f"a position table of {prefix} + {count} rows is that of no square: check prefix=")
    if grid == (side, side):
        return table
    kept, cells = table[:, :prefix], table[:, prefix:].reshape(side, side, -1)
    rows, columns = (_cubic(side, wanted) for wanted in grid)
    cells = jnp.einsum("yi,xj,ijd->yxd", rows, columns, cells, precision=lax.Precision.HIGHEST)
    return jnp.concatenate([kept, cells.reshape(1, -1, table.shape[2])], 1)


def resized(source: Any, shapes: Any, *, under: str = "") -> Any:
    """`source` with its position tables resized where those of a network for other images have another length.

    source, shapes: {"params": tree, ..} of arrays and of arrays or shapes, of two networks; under: the submodule of the
    second ("trunk") that stands for the first. All other tensors stay as they are, fitting or not. Both networks'
    tables are taken to be those of square images.
    """
    prefix = tuple(under.split("/")) if under else ()
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(source)
    wanted: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(shapes)
    for path, table in flat.items():
        like = wanted.get((path[0], *prefix, *path[1:]))
        if path[-1] != POSITIONS or like is None or table.shape == like.shape or table.shape[2] != like.shape[2]:
            continue
        side = math.isqrt(like.shape[1] - 1)
        flat[path] = resize_positions(table, (side, side))
    return traverse_util.unflatten_dict(flat)


def sequence(x: Array, class_token: Array, positions: Array) -> Tokens:
    """A map x [B, h, w, D] as tokens: the class token [1, 1, D] in front, positions [1, 1 + g g, D] added."""
    batch, height, width, channels = x.shape
    first = jnp.broadcast_to(class_token.astype(x.dtype), (batch, 1, channels))
    values = jnp.concatenate([first, x.reshape(batch, height * width, channels)], 1)
    return Tokens(values + resize_positions(positions, (height, width)).astype(x.dtype), (height, width))


class Embedding(nn.Module):
    """Patches of `patch` pixels, each by one convolution a token; "class_token" and "positions".

    The position table is that of square images of `side` pixels.
    """

    width: int
    patch: int
    side: int

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Tokens:
        """images [B, H, W, C], H and W of `patch` pixels or more; what is left over at the far ends is not read."""
        if min(images.shape[1:3]) < self.patch:
            height, width = images.shape[1:3]
            raise UserError(f"patches of {self.patch} need images of {self.patch} pixels or more, got {height}x{width}")
        bias = uniform((self.patch * self.patch * images.shape[-1]) ** -0.5)
        patches = Conv(
            self.width, self.patch, self.patch, use_bias=True, kernel_init=uniform_fan_in, bias_init=bias, name="patch"
        )
        count = (self.side // self.patch) ** 2
        class_token = self.param("class_token", START, (1, 1, self.width))
        positions = self.param(POSITIONS, START, (1, 1 + count, self.width))
        return sequence(patches(images), class_token, positions)


def attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    """softmax(scale q k^T) v for q, k, v [B, heads, N, d]; the softmax is float32, the result [B, N, heads * d]."""
    batch, heads, count, width = q.shape
    pairs = ((0, 1), (0, 1))
    scores = lax.dot_general(q * scale, k, (((3,), (3,)), pairs), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    mixed = lax.dot_general(weights, v, (((3,), (2,)), pairs))
    return mixed.transpose(0, 2, 1, 3).reshape(batch, count, heads * width)


class Attention(nn.Module):
    """Multi-head self-attention; submodules "qkv" (q, k, v in one layer, each cut into the heads) and "proj"."""

    heads: int
    qkv_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, N, D] to the same shape."""
        batch, count, width = x.shape
        size = width // self.heads
        qkv = Linear(3 * width, self.qkv_bias, kernel_init=START, bias_init=ZEROS, name="qkv")(x)
        parts = (part.reshape(batch, count, self.heads, size) for part in jnp.split(qkv, 3, -1))
        q, k, v = (part.transpose(0, 2, 1, 3) for part in parts)
        return Linear(width, kernel_init=START, bias_init=ZEROS, name="proj")(attend(q, k, v, size**-0.5))


class Mlp(nn.Module):
    """Two dense layers, "fc1" of `hidden` features and "fc2" back to x's width, with a GELU (erf) between them."""

    hidden: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [.., D] to the same shape."""
        y = gelu(Linear(self.hidden, kernel_init=START, bias_init=ZEROS, name="fc1")(x))
        return Linear(x.shape[-1], kernel_init=START, bias_init=ZEROS, name="fc2")(y)


class Block(nn.Module):
    """One pre-norm layer: attention, then an MLP, each behind a layer norm and added to its input by `DropPath`."""

    heads: int
    mlp_ratio: int = 4
    qkv_bias: bool = True
    epsilon: float = 1e-6
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """x [B, N, D] to the same shape."""
        drop = DropPath(self.drop_path)
        y = Attention(self.heads, self.qkv_bias, name="attn")(LayerNorm(self.epsilon, name="norm1")(x))
        x = lax.optimization_barrier(x + drop(y, train))  # else a CPU adds it up again in everything that reads it
        y = Mlp(self.mlp_ratio * x.shape[-1], name="mlp")(LayerNorm(self.epsilon, name="norm2")(x))
        return lax.optimization_barrier(x + drop(y, train))


class TokenBackbone(Sequential):
    """An embedding that makes tokens of images of any size, `depth` layers of `heads` heads, norm, head.

    A block is one layer. Its feature is the map of its tokens, without the class token; "pooled" is the class token
    after the norm. Of the last block nothing but the class token is read on, so the gradient of its feature is zero.
    Stochastic depth grows linearly over the blocks, from 0 to `drop_path`. `side` is that of the square images, in
    pixels, which the position table is made for; it is resized for all others.
    """

    before: ClassVar[tuple[str, ...]] = ("embed",)

    width: int = 192
    depth: int = 12
    heads: int = 3
    side: int = 224
    mlp_ratio: int = 4
    qkv_bias: bool = True
    epsilon: float = 1e-6
    drop_path: float = 0.0

    @property
    def blocks(self) -> tuple[str, ...]:
        """("block1", ..): the layers."""
        return numbered("block", self.depth)

    @property
    def behind(self) -> tuple[str, ...]:
        """("norm",): that of the class token."""
        return ("norm",)

    def published(self, name: str) -> str:
        """As timm names it: "blocks.0.attn.qkv" for "block1/attn/qkv"."""
        part, *inner = name.split("/")
        if part in self.blocks:
            return ".".join(["blocks", str(self.blocks.index(part)), *inner])
        return {"embed/class_token": "cls_token", "embed/positions": "pos_embed"}.get(name, name)

    def embedding(self) -> nn.Module:
        """The part "embed": (images [B, H, W, C], train) to Tokens, with "class_token" and "positions"."""
        raise NotImplementedError

    def run(self, name: str, x: Any, train: bool, features: dict[str, Array]) -> Any:
        """The embedding (of images), one block (Tokens to Tokens), or the norm (to the class token [B, D])."""
        if name == "embed":
            return self.embedding()(x, train)
        if name == "norm":
            return LayerNorm(self.epsilon, name=name)(x.values[:, 0].astype(jnp.float32))
        rate = growing(self.drop_path, (self.depth,))[0][self.blocks.index(name)]
        layer = self.unit(Block)(self.heads, self.mlp_ratio, self.qkv_bias, self.epsilon, rate, name=name)
        values = layer(x.values, train)
        batch, count, width = values.shape
        cells = self.shown(features, name, values[:, 1:].reshape(batch, *x.grid, width))
        return x.replace(values=jnp.concatenate([values[:, :1], cells.reshape(batch, count - 1, width)], 1))

    def head_layer(self) -> Linear:
        """Started as the other dense layers."""
        return Linear(self.outputs, kernel_init=START, bias_init=ZEROS, name="head")


class VisionTransformer(TokenBackbone):
    """A TokenBackbone on patches of `patch` pixels. Raises UserError on images smaller than one."""

    patch: int = 16

    def published(self, name: str) -> str:
        """As timm names it: "patch_embed.proj" for "embed/patch"."""
        own = {"embed": "patch_embed", "embed/patch": "patch_embed.proj"}
        return own[name] if name in own else super().published(name)

    def embedding(self) -> Embedding:
        """The patches, one convolution each."""
        return Embedding(self.width, self.patch, self.side, name="embed")


SIZES: Mapping[str, Mapping[str, int]] = {
    "deit_tiny": {"width": 192, "heads": 3},
    "deit_small": {"width": 384, "heads": 6},
    "deit_base": {"width": 768, "heads": 12},
}


def deit(
    variant: str,
    *,
    resolution: int | None = None,
    patch: int = 16,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    **common,
) -> VisionTransformer:
    """DeiT of a size in SIZES, for images of any size; the position table is that of `resolution` (None: 224) pixels.

    patch: side of the patches in pixels, less than 16 for small images. drop_path: see TokenBackbone. dropout: share
    of the class token that is dropped in front of the head while training.
    """
    side = 224 if resolution is None else resolution
    if not isinstance(patch, int) or not 1 <= patch <= side:
        raise UserError(f"{variant} for images of {side} pixels cannot have patches of {patch!r}: set patch=")
    return VisionTransformer(
        **SIZES[variant], patch=patch, side=side, drop_path=drop_path, head_dropout=dropout, **common
    )


VARIANTS = {name: (functools.partial(deit, name), 224) for name in SIZES}
