"""Grad-CAM: which places of an image speak for a class (Selvaraju et al., ICCV 2017)."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.errors import UserError
from jaxsd.models.forward import STANDARDISE, standardised

Tree = Any
Blocks = tuple[str, ...]


def grad_cam(
    model: nn.Module, params: Tree, collections: Tree, images: Any, *, blocks: Sequence[str], target: Any
) -> dict[str, np.ndarray]:
    """Maps {block: float32 [B, H, W] in [0, 1]} of the places that raise outputs[b, target[b]]; 1 is the highest.

    relu(sum over channels of weight x feature), divided by each image's maximum (a map of zeros stays zero), then
    bilinearly upsampled (half-pixel centres) to the images' size. The module runs in inference mode. Maps of different
    images, blocks or models share no scale.

    images: uint8 or float32 in [0, 1], [B, H, W, C]. blocks: names among the module's features that are maps.
    target: int [B], an output for each image. Raises UserError where these do not fit.
    Source: ScaleNet section 3.2.1, which shows the first three of ResNet50's four blocks.
    """
    features, weights = channel_weights(model, params, collections, images, blocks=blocks, target=target)
    size = jnp.shape(images)[1:3]
    return {block: np.asarray(_shown(features[block], weights[block], size)) for block in blocks}


def channel_weights(
    model: nn.Module, params: Tree, collections: Tree, images: Any, *, blocks: Sequence[str], target: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Feature maps {block: [B, h, w, D]} and their channels' weights {block: [B, D]}, both float32.

    A weight is the mean over all places of the derivative of outputs[b, target[b]] by that channel. Arguments as in
    `grad_cam`.
    """
    images, target = jnp.asarray(images), jnp.asarray(target)
    if target.shape != images.shape[:1] or not jnp.issubdtype(target.dtype, jnp.integer):
        raise UserError(f"target must be whole numbers [{len(images)}], an output for each image: got {target.dtype} "
                        f"{list(target.shape)}")  # fmt: skip
    outputs, features, perturbations = _shapes(model, params, collections, images)
    for block in blocks:
        if f"{block}_map" not in perturbations or features[block].ndim != 4:
            maps = [name for name in features if f"{name}_map" in perturbations and features[name].ndim == 4]
            raise UserError(f"{block!r} has no feature map in {type(model).__name__}: choose from {', '.join(maps)}")
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < outputs.shape[-1]:
        raise UserError(f"target must be in 0..{outputs.shape[-1] - 1}, got {int(target.min())} to {int(target.max())}")
    return _weights(model, tuple(blocks), params, collections, images, target)


def _variables(params: Tree, collections: Tree) -> Tree:
    """The variables a module is applied to."""
    return {"params": params, **{name: tree for name, tree in collections.items() if name != STANDARDISE}}


def _shapes(model: nn.Module, params: Tree, collections: Tree, images: jax.Array) -> tuple[Any, Any, Tree]:
    """Outputs, features and perturbations of one application as shapes; nothing is computed."""

    def apply(images: jax.Array):
        inputs = standardised(images, collections)
        return model.apply(_variables(params, collections), inputs, False, mutable=["perturbations"])

    (outputs, features), made = jax.eval_shape(apply, images)
    return outputs, features, made.get("perturbations", {})


@functools.partial(jax.jit, static_argnums=(0, 1))
def _weights(
    model: nn.Module, blocks: Blocks, params: Tree, collections: Tree, images: jax.Array, target: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """`channel_weights` for arguments that fit."""
    perturbations = _shapes(model, params, collections, images)[2]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), perturbations)

    def score(maps: Tree):
        variables = {**_variables(params, collections), "perturbations": {**zeros, **maps}}
        outputs, features = model.apply(variables, standardised(images, collections), False)
        return jnp.take_along_axis(outputs, target[:, None], axis=1).sum(), features  # images do not mix: a sum will do

    gradients, features = jax.grad(score, has_aux=True)({f"{block}_map": zeros[f"{block}_map"] for block in blocks})
    chosen = {block: features[block].astype(jnp.float32) for block in blocks}
    return chosen, {block: gradients[f"{block}_map"].astype(jnp.float32).mean((1, 2)) for block in blocks}


@functools.partial(jax.jit, static_argnums=2)
def _shown(features: jax.Array, weights: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Features [B, h, w, D] under weights [B, D] as maps [B, *size] in [0, 1]."""
    maps = nn.relu(jnp.einsum("bhwd,bd->bhw", features, weights))
    top = maps.max((1, 2), keepdims=True)
    maps = maps / jnp.where(top > 0, top, 1)
    return jax.image.resize(maps, (len(maps), *size), "linear", antialias=False).clip(0, 1)
