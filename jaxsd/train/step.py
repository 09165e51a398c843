"""One training step as a pure function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsd.objectives.objective import Objective
from jaxsd.train.state import State, merge

Augment = Callable[[jax.Array, jax.Array], jax.Array]
Step = Callable[[State, dict[str, Any]], tuple[State, dict[str, jax.Array]]]


def make_train_step(
    objective: Objective,
    optimiser: optax.GradientTransformation,
    augment: Augment | None = None,
    *,
    axis_name: str | None = None,
) -> Step:
    """Builds step(state, batch) -> (state, metrics): augment, loss, gradient of the trained part, update.

    The step is pure: compile it with jit (donating the state), scan or vmap it, shard its batch over a mesh. The
    batch needs "image" (uint8, or float32 in [0, 1]); without a mask every image counts. Metrics hold loss, the
    objective's metrics and grad_norm. All randomness is fold_in(state.key, state.step).

    axis_name: for pmap or shard_map: gradients, metrics and extra are averaged over the axis, each device counting by
        its masked images, and every device draws its own augmentation and batch statistics. Under a mesh with jit it
        is not needed, and batch statistics are global.
    """

    def step(state: State, batch: dict[str, Any]) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        augment_key, loss_key = jax.random.split(key)
        image = batch["image"]
        if image.dtype == jnp.uint8:
            image = image.astype(jnp.float32) / 255
        if augment is not None:
            image = augment(augment_key, image)
        mask = batch.get("mask", jnp.ones(len(image), jnp.float32))
        batch = {**batch, "image": image, "mask": mask, "step": state.step}

        def loss_of(params: Any):
            return objective.loss(merge(params, state.frozen), state.extra, batch, loss_key)

        params = state.params if axis_name is None else _own(state.params, axis_name)
        (loss, (metrics, extra)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        metrics = {"loss": loss, **metrics}
        if axis_name is not None:
            grads, metrics, extra = _average(grads, metrics, extra, state.extra, jnp.sum(mask), axis_name)
        metrics["grad_norm"] = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, extra=extra, opt_state=opt_state), metrics

    return step


def _own(params: Any, axis_name: str) -> Any:
    """The parameters as each device's own: shard_map adds up the gradient of what devices share, before we see it."""
    nothing = 0 * jax.lax.axis_index(axis_name)
    return jax.tree.map(lambda p: p + nothing.astype(p.dtype), params)


def _average(grads: Any, metrics: Any, extra: Any, old: Any, images: jax.Array, axis_name: str) -> tuple[Any, Any, Any]:
    """Means over the devices, weighted by their images; what a step leaves alone in extra stays bit for bit."""
    share = images / jnp.maximum(jax.lax.pmean(images, axis_name), 1e-6)
    grads, metrics = jax.lax.pmean(jax.tree.map(lambda x: share.astype(x.dtype) * x, (grads, metrics)), axis_name)

    def merged(new: jax.Array, before: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(before.dtype, jnp.floating)
        return before + jax.lax.pmean(new - before, axis_name) if floating else new

    return grads, metrics, jax.tree.map(merged, extra, old)
