"""A network's answers for whole images, from its answers for their patches where it is shown patches."""

from typing import Any

import flax.linen as nn
import numpy as np
from scipy.special import softmax

from jaxsd.data.source import Source
from jaxsd.errors import UserError
from jaxsd.evaluate.features import predict

Tree = Any
AVERAGES = ("probability", "logits", "vote")


def averaged(outputs: np.ndarray, patches: int, average: str = "probability") -> np.ndarray:
    """Outputs [N * patches, K] of all patches of N images as one answer [N, K] for each image.

    average: the mean of the classes' probabilities, of the "logits" (as BagNet: Brendel & Bethge, ICLR 2019), or the
    share of patches that "vote" for each class. One output (K = 1, a score) is always averaged plainly.
    Raises UserError for an unknown average.
    """
    if average not in AVERAGES:
        raise UserError(f"average: {average!r} is unknown: choose from {', '.join(AVERAGES)}")
    parts = outputs.reshape(-1, patches, outputs.shape[-1]).astype(np.float64)
    if outputs.shape[-1] > 1 and average == "probability":
        parts = softmax(parts, axis=-1)
    elif outputs.shape[-1] > 1 and average == "vote":
        parts = np.eye(outputs.shape[-1])[parts.argmax(-1)]
    return parts.mean(axis=1)


def patch_scores(model: nn.Module, params: Tree, collections: Tree, source: Source, scale: float) -> np.ndarray:
    """Scores [N, rows, columns] of every patch of a source with a grid (or [N, 1, 1]), from a network of one output."""
    outputs = predict(model, params, collections, source.images, grid=source.grid)
    sides = source.grid.sides(*source.images.shape[1:3]) if source.grid is not None else (1, 1)
    return scale * np.asarray(outputs, np.float64).reshape(-1, *sides)
