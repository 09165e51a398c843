"""Which way up is it? The four-way rotation task of RotNet, which ScaleNet asks at growing image scales."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsd.errors import UserError
from jaxsd.objectives.objective import Batch, Objective, Tree
from jaxsd.objectives.supervised import supervised
from jaxsd.views.pixels import turned

TURNS = (0, 1, 2, 3)


def turned_batch(batch: Batch, turns: tuple[int, ...] = TURNS) -> Batch:
    """Every image of a batch turned by each of `turns` quarter turns, image-major, labelled by its place in `turns`.

    Only flips and transposes are used, so nothing but the content tells the angle. Source: ScaleNet section 2.2.
    """
    count = len(turns)
    repeated: Batch = {name: jnp.repeat(batch[name], count) for name in ("index", "mask") if name in batch}
    label = jnp.tile(jnp.arange(count, dtype=jnp.int32), len(batch["image"]))
    return {**batch, **repeated, "image": turned(batch["image"], turns), "label": label}


def rotation(model: nn.Module, *, turns: tuple[int, ...] = TURNS, label_smoothing: float = 0.0) -> Objective:
    """Predicts by how many quarter turns an image was turned; the mean over all turns of all images (eqs. 2 and 3).

    The images are turned after every augmentation, so the copies of an image show the same content. `turns` other than
    all four gives RotNet's two-angle variants. A module with a field
    `outputs` is given len(turns) of them; any other must have them.
    """
    if len(set(turns)) != len(turns) or not set(turns) <= set(TURNS) or len(turns) < 2:
        raise UserError(f"turns must be at least two different ones of 0, 1, 2, 3 (quarter turns), got {turns}")
    if getattr(model, "outputs", len(turns)) != len(turns):
        model = model.clone(outputs=len(turns))  # type: ignore[call-arg]
    classify = supervised(model, label_smoothing=label_smoothing)

    def loss(params: Tree, extra: Tree, batch: Batch, key: jax.Array, train: bool = True):
        return classify.loss(params, extra, turned_batch(batch, turns), key, train)

    return Objective(classify.init, loss, views=len(turns))
