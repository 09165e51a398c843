"""The backbones by name, how to build one, and what each costs."""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsd.errors import UserError
from jaxsd.models import convnet, efficientnet, patchnet, pvt, resnest, resnet, t2t, vgg, vit
from jaxsd.models.blocks import Backbone, Linear, check_rates
from jaxsd.models.conv import Conv, plain_convolutions

FAMILIES = (resnet, resnest, convnet, vgg, patchnet, vit, t2t, efficientnet, pvt)
BACKBONES: dict[str, Callable[..., Backbone]] = {}
RESOLUTIONS: dict[str, int] = {}  # side of the images that each is made for
for _family in FAMILIES:
    for _name, (_build, _side) in _family.VARIANTS.items():
        BACKBONES[_name], RESOLUTIONS[_name] = _build, _side
DTYPES = ("float32", "bfloat16")


def options(name: str) -> dict[str, Any]:
    """The options of one backbone beyond those that all have, with defaults. Raises UserError on an unknown name."""
    if name not in BACKBONES:
        nearest = ", ".join(difflib.get_close_matches(name, BACKBONES, 5, 0))
        raise UserError(f"unknown model {name!r}: choose from {nearest}, ...; python -m jaxsd.models lists all")
    parameters = inspect.signature(BACKBONES[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def explained(name: str) -> str:
    """The options of one backbone with their defaults, and what its family says of them. Raises UserError as above."""
    lines = [f"{name}: options of its own, beside outputs, resolution, frozen, dtype and remat", ""]
    lines += [f"  {option}={default!r}" for option, default in options(name).items() if option != "resolution"]
    made = BACKBONES[name]
    said = [
        inspect.getdoc(getattr(made, "func", made)),
        inspect.getdoc(type(build(name, resolution=RESOLUTIONS[name]))),
    ]
    return "\n\n".join(["\n".join(lines), *filter(None, said)])


def build(
    name: str,
    *,
    outputs: int = 1000,
    resolution: int | None = None,
    stem: str | None = None,
    frozen: Sequence[str] = (),
    dtype: Any = "float32",
    remat: bool = False,
    **family: Any,
) -> Backbone:
    """A backbone by name: a linen module, called as `model(images, train)` -> (outputs, features).

    outputs: number of outputs, 0 for no head. resolution: side in pixels of the full-size images, for families whose
    form depends on it: ResNets beyond resnet8 need it, or stem: "cifar" (chosen up to 64 pixels) or "imagenet".
    frozen: top-level parts that run in inference mode. dtype: of the computation, float32 or bfloat16. remat: runs the
    blocks' units again for their gradients, for less memory. family: the family's own options (`options` lists them).
    Raises UserError on an unknown name (with the nearest known), option or value.
    """
    valid = options(name)
    if stem is not None:
        family["stem"] = stem
    for option in family:
        if option not in valid:
            named = dict.fromkeys(("outputs", "resolution", "frozen", "dtype", "remat", *valid))
            raise UserError(f"model {name!r} has no option {option!r}: choose from {', '.join(named)}")
    check_rates(name, **{option: family[option] for option in ("dropout", "drop_path") if option in family})
    if "resolution" in valid:
        family["resolution"] = resolution
    return BACKBONES[name](outputs=outputs, frozen=tuple(frozen), dtype=_dtype(name, dtype), remat=remat, **family)


def _dtype(name: str, dtype: Any) -> Any:
    """A dtype or its name as a dtype, if networks compute in it."""
    for known in DTYPES:
        if dtype == known or dtype == jnp.dtype(known):
            return jnp.dtype(known)
    raise UserError(f"model {name!r} cannot compute in {dtype!r}: choose from {', '.join(DTYPES)}")


def shapes(model: nn.Module, resolution: int, channels: int = 3) -> dict[str, Any]:
    """The variables of a module for square images as shapes and dtypes: collection -> tree. Nothing is computed."""
    return _traced(model, resolution, channels)[0]


@functools.lru_cache(maxsize=256)
def _traced(model: nn.Module, resolution: int, channels: int) -> tuple[dict[str, Any], int]:
    """The variables' shapes and the floating-point operations of one image.

    Layers with equal fields and inputs of equal shapes are traced once: networks are made of few different ones.
    """
    flops, known = 0, {}

    def count(layer, args, kwargs, context):
        nonlocal flops
        module = context.module
        if context.method_name != "__call__" or not module.path:
            return layer(*args, **kwargs)
        inputs, form = jax.tree.flatten((args, kwargs))
        sizes = (jax.typeof(x) if hasattr(x, "shape") else x for x in inputs)
        key = (module.clone(parent=None, name=None), form, *sizes)
        trace = module.scope.trace_level  # units with remat have their own, beyond which nothing traced may be used
        if key not in known or known[key][0] != trace:
            before, y = flops, layer(*args, **kwargs)
            if isinstance(module, Conv | Linear):
                flops += 2 * y.size // y.shape[-1] * module.get_variable("params", "kernel").size
            known[key] = trace, y, module.variables, flops - before
            return y
        _, y, variables, cost = known[key]
        for collection, tree in variables.items():
            for name, value in tree.items():
                module.put_variable(collection, name, value)
        flops += cost
        return y

    images = jax.ShapeDtypeStruct((1, resolution, resolution, channels), jnp.float32)
    with nn.intercept_methods(count), plain_convolutions():
        variables = jax.eval_shape(lambda images: model.init(jax.random.key(0), images, False), images)
    return {name: tree for name, tree in variables.items() if name != "perturbations"}, flops


def size(tree: Any) -> int:
    """The number of numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def costs(model: nn.Module, resolution: int, channels: int = 3) -> tuple[int, int]:
    """(trainable parameters, floating-point operations of one forward pass of one square image).

    The latter counts a multiplication and an addition per weight and position in convolutions and dense layers,
    padding included, and nothing else: twice the "multiply-adds" that many tables give. A property of the
    architecture, not of how a device computes it.
    """
    variables, flops = _traced(model, resolution, channels)
    return size(variables["params"]), flops


def catalogue() -> list[dict[str, Any]]:
    """Every backbone for 3 channels and 1,000 outputs: {name, parameters, flops, resolution, blocks}."""
    rows = []
    for name, resolution in RESOLUTIONS.items():
        model = build(name, resolution=resolution)
        parameters, flops = costs(model, resolution)
        row = {"name": name, "parameters": parameters, "flops": flops, "resolution": resolution}
        rows.append({**row, "blocks": list(model.blocks)})
    return rows
