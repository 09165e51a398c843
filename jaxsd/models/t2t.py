"""T2T-ViT: vision transformers whose tokens grow from overlapping windows (Yuan et al. 2021).

As the authors' code, tensor for tensor. The fixed tensors, position table and random features, are in the collection
"constants": saved and handed on with the network, but no parameters, so that no optimiser or average touches them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsd.errors import UserError
from jaxsd.models.blocks import Linear
from jaxsd.models.norm import LayerNorm
from jaxsd.models.vit import POSITIONS, START, ZEROS, Mlp, TokenBackbone, Tokens, attend, sequence

Array = jax.Array
EPSILON = 1e-5  # of all layer norms
WIDTH = 64  # of the tokens between the windows
FEATURES = 32  # random features of a performer
DROPOUT = 0.1  # of the performers' two branches, whatever a recipe says
WINDOWS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # size, stride, padding


def windowed(sides: tuple[int, ...], window: tuple[int, int, int]) -> tuple[int, int]:
    """How many windows (size, stride, padding) a map of sides (H, W) has: (h, w)."""
    size, stride, padding = window
    height, width = ((n + 2 * padding - size) // stride + 1 for n in sides)
    return height, width


def unfold(x: Array, window: tuple[int, int, int]) -> Array:
    """The windows (size, stride, padding) of x [B, H, W, C]: [B, h, w, C size size], by channel, then row, then column.

    Padded with zeros; the order is that of PyTorch's `unfold`.
    """
    size, stride, padding = window
    grid = windowed(x.shape[1:3], window)
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    for axis, count in zip((1, 2), grid, strict=True):
        last = stride * (count - 1) + 1
        x = jnp.stack([lax.slice_in_dim(x, i, i + last, stride, axis) for i in range(size)], axis + 2)
    return x.transpose(0, 1, 2, 5, 3, 4).reshape(x.shape[0], *grid, -1)


def sinusoid(count: int, width: int) -> np.ndarray:
    """Fixed positions [1, count, width]: sines and cosines in turn, of wavelengths 2 pi to 20,000 pi (Vaswani 2017)."""
    angles = np.arange(count)[:, None] / 10000 ** (2 * (np.arange(width) // 2) / width)
    return np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles))[None].astype(np.float32)


def random_features(u: Array, w: Array) -> Array:
    """exp(w u - |u|^2 / 2) / sqrt(m) for u [B, N, d] and w [m, d]: positive features [B, N, m] (Performer, 2021)."""
    exponents = jnp.dot(u, w.T, precision=lax.Precision.HIGHEST) - jnp.square(u).sum(-1, keepdims=True) / 2
    return jnp.exp(exponents) / w.shape[0] ** 0.5


def linear_attention(q: Array, k: Array, v: Array, w: Array) -> Array:
    """Attention whose weights are products of random features, linear in N: q, k, v [B, N, d] to [B, N, d]."""
    q, k = random_features(q, w), random_features(k, w)
    mixed = jnp.einsum("bnd,bnm->bmd", v, k)
    total = jnp.einsum("bnm,bm->bn", q, k.sum(1))
    return jnp.einsum("bnm,bmd->bnd", q, mixed) / (total[..., None] + 1e-8)


class Performer(nn.Module):
    """A token layer of linear attention; "kqv" holds keys, queries, values in this order, "w" the random features.

    The attention is added to the values, not to the input, whose width is another.
    """

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """x [B, N, C] to [B, N, 64], with dropout while training."""
        draw = nn.initializers.orthogonal(FEATURES**0.5)
        w = self.variable("constants", "w", lambda: draw(self.make_rng("params"), (FEATURES, WIDTH), jnp.float32))
        drop = nn.Dropout(DROPOUT, deterministic=not train)
        kqv = Linear(3 * WIDTH, kernel_init=START, bias_init=ZEROS, name="kqv")(LayerNorm(EPSILON, name="norm1")(x))
        k, q, v = jnp.split(kqv, 3, -1)
        y = Linear(WIDTH, kernel_init=START, bias_init=ZEROS, name="proj")(linear_attention(q, k, v, w.value))
        x = v + drop(y)
        return lax.optimization_barrier(x + drop(Mlp(WIDTH, name="mlp")(LayerNorm(EPSILON, name="norm2")(x))))


class TokenAttention(nn.Module):
    """Self-attention of one head to another width, added to the values; scaled by the input's width, as published."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, N, C] to [B, N, 64]."""
        qkv = Linear(3 * WIDTH, use_bias=False, kernel_init=START, name="qkv")(x)
        q, k, v = (part[:, None] for part in jnp.split(qkv, 3, -1))
        y = attend(q, k, v, x.shape[-1] ** -0.5)
        return v[:, 0] + Linear(WIDTH, kernel_init=START, bias_init=ZEROS, name="proj")(y)


class Transformer(nn.Module):
    """A token layer of ordinary attention, quadratic in the number of tokens."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """x [B, N, C] to [B, N, 64]."""
        x = TokenAttention(name="attn")(LayerNorm(EPSILON, name="norm1")(x))
        return x + Mlp(WIDTH, name="mlp")(LayerNorm(EPSILON, name="norm2")(x))


def token_grid(sides: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the tokens of images (H, W). Raises UserError on images that hold no window."""
    if min(sides) < WINDOWS[0][0] - 2 * WINDOWS[0][2]:
        raise UserError(f"T2T-ViT needs images of 3 pixels or more, got {sides[0]}x{sides[1]}")
    for window in WINDOWS:
        sides = windowed(sides, window)
    return sides[0], sides[1]


class TokensToToken(nn.Module):
    """Windows, token layer "attention1", windows of its map, "attention2", windows again, and a dense layer "project".

    It computes in float32 whatever the network does: the performers' exponentials would overflow. "class_token" is
    trained; "positions" are the sinusoids for square images of `side` pixels.
    """

    width: int
    side: int
    layer: type[nn.Module]

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Tokens:
        """images [B, H, W, C] to tokens of about 16 pixels each, in the images' dtype."""
        token_grid(images.shape[1:3])
        x = images.astype(jnp.float32)
        for i, window in enumerate(WINDOWS[:-1]):
            x = unfold(x, window)
            tokens = self.layer(name=f"attention{i + 1}")(x.reshape(x.shape[0], -1, x.shape[-1]), train)
            x = tokens.reshape(*x.shape[:3], WIDTH)
        x = Linear(self.width, kernel_init=START, bias_init=ZEROS, name="project")(unfold(x, WINDOWS[-1]))
        rows, columns = token_grid((self.side, self.side))
        class_token = self.param("class_token", START, (1, 1, self.width))
        table = self.variable("constants", POSITIONS, lambda: jnp.asarray(sinusoid(1 + rows * columns, self.width)))
        return sequence(x.astype(images.dtype), class_token, table.value)


class T2TViT(TokenBackbone):
    """A TokenBackbone on the tokens of TokensToToken, whose layers are Performers or Transformers (`token_layer`).

    Raises UserError on images of less than 3 pixels.
    """

    qkv_bias: bool = False
    epsilon: float = EPSILON
    token_layer: type[nn.Module] = Performer

    def published(self, name: str) -> str:
        """As in the authors' code: "tokens_to_token.attention1.kqv" for "embed/attention1/kqv"."""
        part, *inner = name.split("/")
        if part != "embed" or inner in (["class_token"], [POSITIONS]):
            return super().published(name)
        places = {"fc1": "0", "fc2": "2"} if self.token_layer is Performer else {}
        return ".".join(["tokens_to_token", *(places.get(word, word) for word in inner)])

    def embedding(self) -> TokensToToken:
        """The windows and their layers."""
        return TokensToToken(self.width, self.side, self.token_layer, name="embed")


SIZES: Mapping[str, Mapping[str, Any]] = {
    "t2t_vit_7": {"width": 256, "depth": 7, "heads": 4, "mlp_ratio": 2},
    "t2t_vit_10": {"width": 256, "depth": 10, "heads": 4, "mlp_ratio": 2},
    "t2t_vit_12": {"width": 256, "depth": 12, "heads": 4, "mlp_ratio": 2},
    "t2t_vit_14": {"width": 384, "depth": 14, "heads": 6, "mlp_ratio": 3},
    "t2t_vit_19": {"width": 448, "depth": 19, "heads": 7, "mlp_ratio": 3},
    "t2t_vit_24": {"width": 512, "depth": 24, "heads": 8, "mlp_ratio": 3},
    "t2t_vit_t_14": {"width": 384, "depth": 14, "heads": 6, "mlp_ratio": 3, "token_layer": Transformer},
}


def t2t_vit(
    variant: str, *, resolution: int | None = None, drop_path: float = 0.0, dropout: float = 0.0, **common
) -> T2TViT:
    """T2T-ViT of a size in SIZES, for images of any size; its positions are those of `resolution` (None: 224) pixels.

    drop_path: see TokenBackbone. dropout: share of the class token that is dropped in front of the head while
    training; the performers' own dropout of 0.1 is always there.
    """
    side = 224 if resolution is None else resolution
    token_grid((side, side))
    return T2TViT(**SIZES[variant], side=side, drop_path=drop_path, head_dropout=dropout, **common)


VARIANTS = {name: (functools.partial(t2t_vit, name), 224) for name in SIZES}
