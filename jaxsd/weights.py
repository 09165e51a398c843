"""Weights under the names of timm and torchvision, and back: networks of jaxsd.models as those libraries keep them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from jaxsd.models.blocks import Backbone

Tree = Any
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def published_name(model: Backbone, path: tuple[str, ...]) -> str:
    """The name that timm (torchvision) gives to the tensor at a path ("params" | "batch_stats", module, .., leaf)."""
    *module, leaf = path[1:]
    if leaf in LEAVES:
        return f"{model.published('/'.join(module))}.{LEAVES[leaf]}"
    return model.published("/".join(path[1:]))


def to_timm(model: Backbone, params: Tree, collections: Tree) -> dict[str, np.ndarray]:
    """All tensors of a network under their published names, in PyTorch's layout: kernels [O, I, h, w] or [O, I]."""
    flat = traverse_util.flatten_dict({"params": params, **_kept(collections)})
    return {published_name(model, path): _turned(path, np.asarray(leaf)) for path, leaf in flat.items()}


def _kept(collections: Mapping[str, Tree]) -> dict[str, Tree]:
    """The collections that belong to the network: its statistics and constants, not the images' standardisation."""
    return {name: tree for name, tree in collections.items() if name not in ("standardise", "perturbations")}


def _turned(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    """A tensor in PyTorch's layout."""
    if path[-1] != "kernel":
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
