"""The names and layouts of timm and torchvision for networks of jaxsd.models, and of Keras' VGG-16."""

import math
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax import traverse_util

from jaxsd.errors import UserError
from jaxsd.models.blocks import Backbone
from jaxsd.models.forward import STANDARDISE

Tree = Any
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# Modules that one library calls so and another so; a file may have either.
SYNONYMS = (
    ("pre_logits.fc1", "classifier.0"),  # VGG: timm, torchvision
    ("pre_logits.fc2", "classifier.3"),
    ("head.fc", "classifier.6"),
)
KERAS = {"fc1": "pre_logits.fc1", "fc2": "pre_logits.fc2", "predictions": "head.fc"}


def published_name(model: Backbone, path: tuple[str, ...]) -> str:
    """The name that timm (torchvision) gives to the tensor at a path ("params" | "batch_stats", module, .., leaf)."""
    *module, leaf = path[1:]
    if leaf in LEAVES:
        return f"{model.published('/'.join(module))}.{LEAVES[leaf]}"
    return model.published("/".join(path[1:]))


def published_shape(model: Backbone, path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the same tensor there: kernels are [O, I, h, w] or [O, I]."""
    if path[-1] == "kernel":
        shape = (shape[-1], shape[-2], *shape[:-2])
    return tuple(model.published_shape("/".join(path[1:]), shape))


def to_timm(model: Backbone, params: Tree, collections: Tree) -> dict[str, np.ndarray]:
    """All tensors of a network under their published names, in PyTorch's layout: kernels [O, I, h, w] or [O, I].

    Raises UserError for networks that are published nowhere.
    """
    check(model)
    flat = traverse_util.flatten_dict({"params": params, **kept(collections)})
    return {published_name(model, path): turned(model, path, np.asarray(leaf)) for path, leaf in flat.items()}


def check(model: Any) -> Backbone:
    """The network itself; raises UserError for one that is published nowhere."""
    try:
        model.published("head")
        return model
    except (NotImplementedError, AttributeError) as error:
        raise UserError(f"{type(model).__name__} has no published counterpart, so no published weights fit") from error


def save(path: str | Path, model: Backbone, params: Tree, collections: Tree) -> None:
    """Writes a network as a safetensors file that timm (AlexNet: torchvision) loads with strict=True.

    The images' standardisation does not belong to it: whoever loads the file has to know it. Raises UserError for a
    path of another kind of file.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors")
    tensors = {name: np.ascontiguousarray(value) for name, value in to_timm(model, params, collections).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def kept(collections: Mapping[str, Tree]) -> dict[str, Tree]:
    """The collections that belong to the network: its statistics and constants, not the images' standardisation."""
    return {name: tree for name, tree in collections.items() if name not in (STANDARDISE, "perturbations")}


def turned(model: Backbone, path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    """A tensor of ours in PyTorch's layout."""
    wanted = published_shape(model, path, value.shape)
    if path[-1] == "kernel":
        value = np.moveaxis(value, (-1, -2), (0, 1))
    return value.reshape(wanted)


def turned_back(path: tuple[str, ...], value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor in PyTorch's layout in ours, of a shape."""
    if path[-1] != "kernel":
        return value.reshape(shape)
    value = value.reshape(shape[-1], shape[-2], *shape[:-2])
    return np.ascontiguousarray(np.moveaxis(value, (0, 1), (-1, -2)))


def renamed(tensors: Mapping[str, np.ndarray], wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors of another library under the names `wanted`, where it is known what it calls them."""
    found = _from_keras(tensors, wanted) if "block1_conv1.weight" in tensors else dict(tensors)
    for pair in SYNONYMS:
        for here, there in (pair, pair[::-1]):
            for leaf in ("weight", "bias"):
                if f"{here}.{leaf}" in wanted and f"{here}.{leaf}" not in found and f"{there}.{leaf}" in found:
                    found[f"{here}.{leaf}"] = found.pop(f"{there}.{leaf}")
    return found


def _from_keras(tensors: Mapping[str, np.ndarray], wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Keras' VGG-16: the convolutions in their order, the dense layers by name.

    Keras flattens the last map position by position, PyTorch channel by channel, and the first dense layer follows.
    """
    ours = sorted((n for n in wanted if re.fullmatch(r"features\.\d+\.weight", n)), key=lambda n: int(n.split(".")[1]))
    theirs = sorted(n for n in tensors if re.fullmatch(r"block\d_conv\d\.weight", n))
    modules = {**KERAS, **{n[:-7]: o[:-7] for n, o in zip(theirs, ours, strict=False)}}
    found = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if name == "fc1.weight":
            channels = len(tensors[theirs[-1]])
            side = math.isqrt(value.shape[1] // channels)
            value = value.reshape(-1, side, side, channels).transpose(0, 3, 1, 2)
        found[f"{modules.get(module, module)}.{leaf}"] = value
    return found
