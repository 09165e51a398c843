"""Classification by labels: cross-entropy, with label smoothing in its two conventions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxsd.errors import UserError
from jaxsd.models.forward import forward, initialise
from jaxsd.objectives.objective import Batch, Objective, Tree, masked_mean

CONVENTIONS = ("uniform", "others")


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float, convention: str) -> jax.Array:
    """Cross-entropy per image [B] of logits [B, K] against int labels [B].

    `uniform` gives every class smoothing / K and the label the rest (Szegedy et al. 2016; PyTorch, TensorFlow);
    `others` gives the label 1 - smoothing and shares smoothing among the K - 1 other classes.
    """
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    classes = logits.shape[-1]
    target = jax.nn.one_hot(labels, classes)
    if convention == "uniform":
        target = (1 - smoothing) * target + smoothing / classes
    else:
        target = (1 - smoothing) * target + smoothing / (classes - 1) * (1 - target)
    return optax.softmax_cross_entropy(logits, target)


def supervised(model: nn.Module, *, label_smoothing: float = 0.0, convention: str = "uniform") -> Objective:
    """Cross-entropy of the module's outputs against `batch["label"]`; the metric is accuracy.

    A module that returns a dict of outputs (the linear probes on every block) is trained on the sum of their losses:
    they share no trained parameter, so each learns as if it were alone; metrics are then named accuracy_<block>.
    Raises UserError for a smoothing outside [0, 1) or an unknown convention.
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if convention not in CONVENTIONS:
        raise UserError(f"unknown label smoothing convention {convention!r}: one of {', '.join(CONVENTIONS)}")

    def init(key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        params, collections = initialise(model, key, batch["image"])
        return params, {"model": collections}

    def loss(params: Tree, extra: Tree, batch: Batch, key: jax.Array, train: bool = True):
        result = forward(model, params, extra["model"], batch["image"], train=train, key=key)
        labels, mask = batch["label"], batch["mask"]
        heads = result.outputs if isinstance(result.outputs, dict) else {"": result.outputs}
        total, metrics = jnp.zeros(()), {}
        for name, logits in heads.items():
            total += masked_mean(smoothed_cross_entropy(logits, labels, label_smoothing, convention), mask)
            right = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
            metrics["accuracy" + (f"_{name}" if name else "")] = masked_mean(right, mask)
        return total, (metrics, {**extra, "model": result.collections})

    return Objective(init, loss)
