"""The one door to linen: initialise a module and apply it to images.

Everything outside `models/` sees parameters, the other collections, and two functions.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxsd.models.conv import plain_convolutions
from jaxsd.tuning import compiler_options

Tree = Any  # a nested dict of arrays

FEW = 1 << 20  # numbers: to draw them slowly takes 0.2 s, to compile a fast program several seconds
STANDARDISE = "standardise"  # collection {"mean": [C], "std": [C]}: travels with the model, is never trained


class Forward(NamedTuple):
    """What one application of a model gives."""

    outputs: Any  # [B, outputs], or whatever the module returns
    features: dict[str, jax.Array]  # named block features [B, h, w, D] and "pooled" [B, D]
    collections: Tree  # the non-parameter collections after the call


def _init(model: nn.Module, shape: tuple[int, ...], key: jax.Array) -> Tree:
    with plain_convolutions():  # what the layers give is thrown away
        return model.init(key, jnp.zeros(shape, jnp.float32), False)


@functools.lru_cache(maxsize=64)
def _compiled_init(model: nn.Module, shape: tuple[int, ...], traced: bool) -> Callable[[jax.Array], Tree]:
    """Kept, since every seed and every stage draws anew."""
    init = functools.partial(_init, model, shape)
    if traced:  # the program around it has the options
        return jax.jit(init)
    drawn = jax.eval_shape(init, jax.random.key(0)).get("params", {})
    numbers = sum(leaf.size for leaf in jax.tree.leaves(drawn))
    return jax.jit(init, compiler_options=compiler_options(short=numbers < FEW))


def initialise(model: nn.Module, key: jax.Array, images: jax.Array) -> tuple[Tree, Tree]:
    """Draws a module's parameters; returns (params, collections).

    images: any batch [B, H, W, C] of the shape that will be trained on. The collections hold `batch_stats` where the
    module has them, and `standardise` with mean 0 and deviation 1, to be replaced by the training set's. Drawn within
    another program the numbers may differ in their last bits.
    """
    traced = isinstance(key, Tracer)
    init = _compiled_init(model, (1, *images.shape[1:]), traced)
    # Of a key that is known the numbers are too, even where another program is being traced.
    with contextlib.nullcontext() if traced else jax.ensure_compile_time_eval():
        variables = init(key)
    collections = {name: tree for name, tree in variables.items() if name not in ("params", "perturbations")}
    channels = images.shape[-1]
    collections[STANDARDISE] = {"mean": jnp.zeros(channels), "std": jnp.ones(channels)}
    return variables.get("params", {}), collections


def standardised(images: jax.Array, collections: Tree) -> jax.Array:
    """Images as the module sees them: uint8 becomes [0, 1], then (x - mean) / std per channel."""
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    if STANDARDISE in collections:
        images = (images - collections[STANDARDISE]["mean"]) / collections[STANDARDISE]["std"]
    return images


def _variables(params: Tree, collections: Tree) -> Tree:
    return {"params": params, **{k: v for k, v in collections.items() if k != STANDARDISE}}


def has_trunk(model: nn.Module) -> bool:
    """Whether a module begins with frozen parts that can be run alone: it has a `prefix` which is not empty."""
    return bool(getattr(model, "prefix", ()))


def trunk(model: nn.Module, params: Tree, collections: Tree, images: jax.Array) -> Tree:
    """What the leading frozen parts of a module make of images [B, H, W, C]: an array [B, ...] or a dict of them.

    For modules that `has_trunk`. It depends on nothing that training changes.
    """
    inputs = standardised(images, collections)
    value, _ = cast(Any, model.apply(_variables(params, collections), inputs, False, "trunk"))
    return value


def forward(
    model: nn.Module,
    params: Tree,
    collections: Tree,
    images: jax.Array,
    *,
    train: bool,
    key: jax.Array | None = None,
    trunk: Tree | None = None,
) -> Forward:
    """Applies a module to images [B, H, W, C], uint8 or float32 in [0, 1].

    With `train` the batch statistics are used and their running values updated in the returned collections; without,
    the collections come back unchanged. `key` feeds dropout and its like. Given `trunk`, what the function of that name
    gave for these images, only the rest of the module runs: the images are not read, and the features are those of the
    parts that ran.
    """
    variables = _variables(params, collections)
    inputs, part = (standardised(images, collections), ()) if trunk is None else (trunk, ("rest",))
    rngs = None if key is None else {"dropout": key}
    if not train:
        outputs, features = cast(Any, model.apply(variables, inputs, False, *part, rngs=rngs))
        return Forward(outputs, features, collections)
    mutable = [name for name in variables if name != "params"]
    (outputs, features), changed = cast(Any, model.apply(variables, inputs, True, *part, rngs=rngs, mutable=mutable))
    return Forward(outputs, features, {**collections, **changed})
