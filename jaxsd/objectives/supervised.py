"""Classification by labels: cross-entropy, with label smoothing in its two conventions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxsd.errors import UserError
from jaxsd.objectives.objective import Batch, Objective, judged

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

    For modules with several outputs see `judged`. Raises UserError for a smoothing outside [0, 1) or an unknown
    convention.
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if convention not in CONVENTIONS:
        raise UserError(f"unknown label smoothing convention {convention!r}: one of {', '.join(CONVENTIONS)}")

    def judge(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        labels = batch["label"]
        right = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
        return smoothed_cross_entropy(logits, labels, label_smoothing, convention), {"accuracy": right}

    return judged(model, judge)
