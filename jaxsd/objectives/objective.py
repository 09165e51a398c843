"""What is asked of a network: two pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsd.models.forward import forward, has_trunk, initialise, trunk

Tree = Any
Batch = dict[str, jax.Array]
Judge = Callable[[jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]


class Objective(NamedTuple):
    """A question put to a network, as two pure functions and the number of inputs per image.

    init(key, batch) -> (params, extra): draws the parameters; `extra` is everything that the loss reads and rewrites
        without a gradient. `extra["model"]` holds the module's other collections (batch statistics, standardisation).
    loss(params, extra, batch, key, train=True) -> (loss, (metrics, extra)): a scalar, a dict of scalars, the new
        extra. Loss and metrics are means over the images whose mask is 1. With train=False the module runs in
        inference mode and extra comes back as it was.
    views: network inputs made of one image (4 for rotation): a training budget counts them.
    trunk(params, extra, images) -> tree of arrays [B, ...]: what of the loss is the same in every step, as frozen parts
        come first and nothing random before them. Computed once for each image, the loss finds it as batch["trunk"].
        None where there is nothing of the kind. Not for images that are augmented.
    scale: what the network's outputs are multiplied by to give answers in the units of the scores.

    A batch is a dict: image float32 [B, H, W, C] in [0, 1] (or uint8), label int32 [B] or score float32 [B], index
    int32 [B], mask float32 [B], and the step number.
    """

    init: Callable[..., tuple[Tree, Tree]]
    loss: Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]]
    views: int = 1
    trunk: Callable[[Tree, Tree, jax.Array], Tree] | None = None
    scale: float = 1.0


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of values [B] over the entries whose mask [B] is 1; 0 where none is."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def judged(model: nn.Module, judge: Judge) -> Objective:
    """The objective of a network whose outputs are held against the batch, image by image.

    judge(outputs [B, ...], batch) -> (loss of each image [B], {metric: value of each image [B]}). A module that
    returns a dict of outputs (the linear probes on every block) is trained on the sum of their losses: they share no
    trained parameter, so each learns as if it were alone; metrics are then named METRIC_<block>.
    """

    def init(key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        params, collections = initialise(model, key, batch["image"])
        return params, {"model": collections}

    def loss(params: Tree, extra: Tree, batch: Batch, key: jax.Array, train: bool = True):
        known = batch.get("trunk")
        result = forward(model, params, extra["model"], batch["image"], train=train, key=key, trunk=known)
        heads = result.outputs if isinstance(result.outputs, dict) else {"": result.outputs}
        total, metrics = jnp.zeros(()), {}
        for name, outputs in heads.items():
            losses, measured = judge(outputs, batch)
            total += masked_mean(losses, batch["mask"])
            for metric, values in measured.items():
                metrics[metric + (f"_{name}" if name else "")] = masked_mean(values, batch["mask"])
        return total, (metrics, {**extra, "model": result.collections})

    def same_in_every_step(params: Tree, extra: Tree, images: jax.Array) -> Tree:
        return trunk(model, params, extra["model"], images)

    return Objective(init, loss, trunk=same_in_every_step if has_trunk(model) else None)
