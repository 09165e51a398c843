"""Published weights into a network: every tensor accounted for, and what they expect of the images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxsd.errors import UserError
from jaxsd.models.blocks import Backbone
from jaxsd.models.forward import STANDARDISE
from jaxsd.models.vit import POSITIONS, resize_positions
from jaxsd.weights.files import find, read, sha256
from jaxsd.weights.names import check, kept, published_name, published_shape, renamed, turned_back

Tree = Any
STANDARDS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "caffe": (tuple(level / 255 for level in (123.68, 116.779, 103.939)), (1 / 255,) * 3),
    "data": None,
}
KERAS = (".h5", ".hdf5")
# What no network has but behind its blocks; a file may have it where the network has no head or another one.
HEADS = ("fc.", "head.", "head_dist.", "classifier.", "pre_logits.", "fc1.", "fc2.", "predictions.")


class Published(NamedTuple):
    """A file of published weights, and how its network was shown its images."""

    name: str  # what messages call it
    path: Path
    sha256: str
    standardise: str  # one of STANDARDS

    @property
    def blue_first(self) -> bool:
        """Whether its first kernel reads blue, green, red: Keras' do, and "unit" is for those who feed it red first."""
        return self.path.suffix.lower() in KERAS and self.standardise != "unit"

    def identity(self) -> dict[str, str]:
        """What of it decides a network's weights: not where the file lies."""
        return {"sha256": self.sha256, "standardise": self.standardise}

    def standard(self, data: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation float32 [C] of images in [0, 1]; `data` are those of the images at hand.

        For one channel the means over red, green and blue; for others than three these three over and over.
        """
        numbers, channels = STANDARDS[self.standardise], len(data[0])
        if numbers is None:
            return data
        if channels == 1:
            numbers = [[float(np.mean(part))] for part in numbers]
        mean, std = (np.resize(np.asarray(part, np.float32), channels) for part in numbers)
        return mean, std


def published(weights: str, standardise: str = "auto") -> Published:
    """Published weights by path or "hf:owner/name[/file]".

    standardise: what their network expects of images in [0, 1]: "imagenet" (minus ImageNet's mean, over its
    deviation), "half" (minus and over 0.5), "unit" (as they are), "caffe" (Keras' VGG: blue first, 0 to 255, minus the
    mean), or "data" for the mean and deviation of the images at hand; "auto" is "caffe" for .h5 files, else "imagenet".
    Raises UserError where there is no such file or choice.
    """
    if standardise not in ("auto", *STANDARDS):
        raise UserError(f"standardise={standardise!r} is unknown: choose from auto, {', '.join(STANDARDS)}")
    path = find(weights)
    if standardise == "auto":
        standardise = "caffe" if path.suffix.lower() in KERAS else "imagenet"
    return Published(str(weights), path, sha256(path), standardise)


def load(
    source: str | Path | Published,
    model: nn.Module,
    params: Tree,
    collections: Tree,
    *,
    fresh: Sequence[str] = (),
) -> tuple[Tree, Tree, list[dict[str, Any]]]:
    """A network's trees with the tensors of a file of published weights in place of their own.

    source: a path, "hf:owner/name[/file]", or what `published` gave. params, collections: those of `model`, whose
    values are kept where the file's do not serve. fresh: parts that keep them ("head"); a head whose number of outputs
    is another keeps them too. Names are timm's, torchvision's (of ResNets, VGGs and AlexNet) or Keras' (VGG-16).
    Adapted to the network are: the first convolution to another number of channels (one: the sum over red, green and
    blue; else these over and over, times 3 / channels), position tables to another grid, and for "caffe" blue first to
    red first. Floats become float32. A standardisation in `collections` becomes that of the file's network (but for
    "data"), so that `forward` takes images in [0, 1].

    Returns:
      (params, collections, [{"tensor", "action": copied | adapted | fresh | dropped, "shape", "from", "note"}, ..]), a
      line for every tensor of the network and for every other one of the file; "from" is the file's name for it.

    Raises:
      UserError where the file is not there, is damaged or does not fit, naming the tensors that are missing, surplus
      or of another shape.
    """
    model = check(model)
    source = source if isinstance(source, Published) else published(str(source))
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict({"params": params, **kept(collections)})
    names = {path: published_name(model, path) for path in flat}
    shapes = {names[path]: published_shape(model, path, leaf.shape) for path, leaf in flat.items()}
    tensors = renamed(read(source.path, source.name), shapes)
    _check_fresh(model, fresh, flat, tensors)
    found = {
        path: _fitted(path, tensors.get(name), shapes[name], blue_first=source.blue_first)
        for path, name in names.items()
    }
    no_head = any(path[1] == "head" and fitted is None for path, fitted in found.items())  # then all of it is fresh
    anew = tuple(f"{name}/" for name in (*fresh, *(["head"] if no_head else [])))
    result, lines = {}, []
    for path, leaf in flat.items():
        result[path], line = _placed(path, leaf, names[path], found[path], anew)
        lines.append(line)
    _check_all_found(source, model, lines, tensors, shapes, fresh)
    used = {line.get("from") for line in lines}
    for name in [name for name in tensors if name not in used]:
        lines.append({"tensor": name, "action": "dropped", "shape": list(tensors[name].shape)})
    tree = traverse_util.unflatten_dict(result)
    if STANDARDISE in collections and source.standardise != "data":
        own = collections[STANDARDISE]
        mean, std = source.standard((own["mean"], own["std"]))
        tree[STANDARDISE] = {"mean": jnp.asarray(mean), "std": jnp.asarray(std)}
    return tree.pop("params"), {**collections, **tree}, lines


def _placed(
    path: tuple[str, ...], leaf: Any, name: str, fitted: "_Fitted | None", anew: tuple[str, ...]
) -> tuple[Any, dict[str, Any]]:
    """The value that a tensor of the network begins with, and its line; "missing" where the file's does not serve."""
    line = {"tensor": "/".join(path), "shape": list(leaf.shape)}
    if "/".join((*path[1:], "")).startswith(anew):
        return leaf, {**line, "action": "fresh"}
    if fitted is None:
        return leaf, {**line, "action": "missing", "name": name}
    told = {"note": "; ".join(fitted.notes)} if fitted.notes else {}
    action = "adapted" if fitted.adapted else "copied"
    return turned_back(path, fitted.value, leaf.shape), {**line, "action": action, "from": name, **told}


def _check_all_found(
    source: Published,
    model: Backbone,
    lines: list[dict[str, Any]],
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    fresh: Sequence[str],
) -> None:
    """Raises UserError naming the network's tensors that are missing, and the file's that have no place."""
    wrong = []
    for name in (line["name"] for line in lines if line["action"] == "missing"):
        given = f"{list(tensors[name].shape)}, wanted {list(shapes[name])}" if name in tensors else "missing"
        wrong.append(f"{name} is {given}")
    allowed = _droppable(model, fresh)
    surplus = [
        name
        for name in tensors
        if name not in shapes and not name.startswith(allowed) and not name.endswith(".num_batches_tracked")
    ]
    wrong += [f"{name} has no place" for name in surplus]
    if wrong:
        shown = "; ".join(wrong[:6]) + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else "")
        if further := _further_blocks(model, surplus):
            names = ", ".join(map(repr, further))
            shown += f"; the network has fewer blocks than the file: to leave them out, name {names} in `fresh`"
        if getattr(model, "stem_kind", None) == "cifar" and any(text.startswith("conv1.weight is [") for text in wrong):
            shown += "; with stem='imagenet' (--config.model.stem=imagenet) the network has the stem of published ones"
        raise UserError(f"the weights {source.name} do not fit this {type(model).__name__}: {shown}")


def _further_blocks(model: Backbone, names: Sequence[str]) -> list[str]:
    """The blocks that the network would have behind its last, and that tensors of these published names belong to."""
    found, number = [], len(model.blocks) + 1
    while True:
        try:
            begins = f"{model.published(f'block{number}')}."
        except (KeyError, IndexError, ValueError):  # its family ends here
            return found
        if not any(name.startswith(begins) for name in names):
            return found
        found.append(f"block{number}")
        number += 1


def _check_fresh(model: Backbone, fresh: Sequence[str], flat: Mapping[tuple[str, ...], Any], tensors: Any) -> None:
    """Raises UserError for a name that neither the network nor the file has; "head" may be missing."""
    here = ["/".join((*path[1:], "")) for path in flat]
    there = _droppable(model, fresh)[len(HEADS) :]
    for name in fresh:
        known = any(path.startswith(f"{name}/") for path in here) or name == "head"
        if not known and not any(tensor.startswith(there) for tensor in tensors if there):
            raise UserError(
                f"{name!r} in `fresh` is no part of this {type(model).__name__}: it has {list(model.parts)}"
            )


class _Fitted(NamedTuple):
    value: np.ndarray  # float32, in PyTorch's layout
    adapted: bool  # whether more than its layout and dtype was changed
    notes: list[str]


def _fitted(
    path: tuple[str, ...], value: np.ndarray | None, shape: tuple[int, ...], *, blue_first: bool
) -> _Fitted | None:
    """A published tensor in the shape that the network wants; None where it cannot be brought into it."""
    if value is None:
        return None
    notes, adapted = [], []
    if value.dtype != np.float32:
        notes.append(f"from {value.dtype}")
        value = value.astype(np.float32)
    reads_colours = value.ndim == 4 and value.shape[1] == 3  # only a convolution on images has three inputs
    if blue_first and reads_colours:
        adapted.append("blue first to red first")
        value = value[:, ::-1]
    if value.shape == shape:
        pass
    elif reads_colours and len(shape) == 4 and value.shape[2:] == shape[2:]:
        adapted.append(f"3 channels to {shape[1]}")
        value = _of_channels(value, shape[1])
    elif path[-1] == POSITIONS and value.ndim == len(shape) == 3 and value.shape[2] == shape[2]:
        adapted.append(f"{value.shape[1]} positions to {shape[1]}")
        side = math.isqrt(shape[1] - 1)
        if math.isqrt(value.shape[1] - 1) ** 2 != value.shape[1] - 1:  # with other tokens than one in front
            return None
        value = np.asarray(resize_positions(jnp.asarray(value), (side, side)))
    elif {value.ndim, len(shape)} == {2, 4} and value.size == math.prod(shape):
        value = value.reshape(shape)  # a dense layer on a map flattened channel by channel, and the same convolution
    if value.shape != shape:
        return None
    return _Fitted(value, bool(adapted), adapted + notes)


def _of_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A kernel [O, 3, h, w] for images of another number of channels, as timm does it."""
    if channels == 1:
        return kernel.sum(1, keepdims=True)
    return np.take(kernel, np.arange(channels) % 3, 1) * np.float32(3 / channels)


def _droppable(model: Backbone, fresh: Sequence[str]) -> tuple[str, ...]:
    """How the names of tensors begin that a file may have and the network not: heads and what starts anew."""
    found: list[str] = list(HEADS)
    for name in fresh:
        try:
            found.append(f"{model.published(name)}.")
        except (KeyError, IndexError, ValueError):  # a part that this network does not have
            continue
    return tuple(found)
