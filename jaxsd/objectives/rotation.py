"""Which way up is it? The four-way rotation task of RotNet, which ScaleNet asks at growing image scales."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsd.errors import UserError
from jaxsd.objectives.objective import Batch, Objective, Tree
from jaxsd.objectives.supervised import supervised
from jaxsd.views.pixels import quarter_turns

TURNS = (0, 1, 2, 3)


def turned(batch: Batch, turns: tuple[int, ...] = TURNS) -> Batch:
    """Every image of a batch turned by each of `turns` quarter turns counter-clockwise, image-major.

    Position len(turns) * i + k holds image i turned turns[k] times, labelled k. Only flips and transposes are used, so
    nothing but the content tells the angle. Images must be square. Source: ScaleNet section 2.2.
    """
    images = batch["image"]
    if images.shape[1] != images.shape[2]:
        raise UserError(f"rotation needs square images, got {images.shape[1]} x {images.shape[2]}: set data.canvas")
    count = len(turns)
    views = jnp.stack([quarter_turns(images, k) for k in turns], axis=1)  # [B, turns, H, W, C]
    repeated = {name: jnp.repeat(batch[name], count) for name in ("index", "mask") if name in batch}
    return {
        **batch,
        **repeated,
        "image": views.reshape(-1, *images.shape[1:]),
        "label": jnp.tile(jnp.arange(count, dtype=jnp.int32), len(images)),
    }


def rotation(model: nn.Module, *, turns: tuple[int, ...] = TURNS, label_smoothing: float = 0.0) -> Objective:
    """Predicts by how many quarter turns an image was turned; the mean over all turns of all images (eqs. 2 and 3).

    The images are turned after every augmentation, so the copies of an image show the same content. `turns` other than
    all four gives RotNet's two-angle variants; the module needs len(turns) outputs.
    """
    if len(set(turns)) != len(turns) or not set(turns) <= set(TURNS) or len(turns) < 2:
        raise UserError(f"turns must be at least two different ones of 0, 1, 2, 3 (quarter turns), got {turns}")
    classify = supervised(model, label_smoothing=label_smoothing)

    def loss(params: Tree, extra: Tree, batch: Batch, key: jax.Array, train: bool = True):
        return classify.loss(params, extra, turned(batch, turns), key, train)

    return Objective(classify.init, loss, views=len(turns))
