"""How much? One number per image, such as its quality."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxsd.errors import UserError
from jaxsd.objectives.objective import Batch, Objective, judged

LOSSES = ("l1", "l2", "huber")


def losses(predictions: jax.Array, targets: jax.Array, loss: str, delta: float) -> jax.Array:
    """The loss of each of predictions [B] against targets [B].

    |e|, e^2, or Huber's: e^2 / 2 up to |e| = delta and delta (|e| - delta / 2) from there on.
    """
    if loss == "l1":
        return jnp.abs(predictions - targets)
    if loss == "l2":
        return jnp.square(predictions - targets)
    return optax.huber_loss(predictions, targets, delta=delta)


def regression(model: nn.Module, *, loss: str = "l1", scale: float = 100.0, delta: float = 0.1) -> Objective:
    """The module's one output, times `scale`, is to be `batch["score"]`; the metric is mae, in units of the score.

    loss: "l1" (Kang et al., CVPR 2014), "l2" or "huber" of the outputs [B, 1] or [B] against score / scale, which is
    of the order of 1; `delta` is Huber's bend on that scale. Modules with several outputs of one number each: see
    `judged`. Raises UserError for an unknown loss, a scale or delta that is not above 0, a module whose field `outputs`
    is not 1, and for a batch without scores [B].
    """
    if loss not in LOSSES:
        raise UserError(f"unknown loss {loss!r} for regression: choose from {', '.join(LOSSES)}")
    if not scale > 0 or not delta > 0:
        raise UserError(f"regression needs scale and delta above 0, got {scale} and {delta}")
    if (count := getattr(model, "outputs", 1)) != 1:
        raise UserError(f"regression needs a network of one output, got {count}: set outputs=1")

    def judge(outputs: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        predictions = outputs[:, 0] if outputs.ndim == 2 and outputs.shape[1] == 1 else outputs
        targets = _scores(batch, len(outputs)) / scale
        if predictions.shape != targets.shape:
            raise UserError(f"regression needs one output per image, got outputs {list(outputs.shape)}")
        return losses(predictions, targets, loss, delta), {"mae": scale * jnp.abs(predictions - targets)}

    return judged(model, judge)._replace(scale=scale)


def _scores(batch: Batch, images: int) -> jax.Array:
    if "score" not in batch:
        raise UserError("regression needs images with scores, these have none: take scored data or another objective")
    if batch["score"].shape != (images,):
        raise UserError(f"scores must be [{images}], one per image, got {list(batch['score'].shape)}")
    return batch["score"]
