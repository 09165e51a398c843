"""The backbones by name, how to build one, and what each costs."""

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxsd.errors import UserError
from jaxsd.models.blocks import Backbone
from jaxsd.models.resnet import resnet8, resnet18, resnet50

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet50": resnet50,
}
DTYPES = ("float32", "bfloat16")


def options(name: str) -> tuple[str, ...]:
    """The options of one backbone beyond those that all have. Raises UserError on an unknown name."""
    if name not in BACKBONES:
        nearest = difflib.get_close_matches(name, BACKBONES, len(BACKBONES), 0)
        raise UserError(f"unknown model {name!r}: choose from {', '.join(nearest)}")
    parameters = inspect.signature(BACKBONES[name]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def build(
    name: str,
    *,
    outputs: int = 1000,
    resolution: int | None = None,
    stem: str | None = None,
    frozen: Sequence[str] = (),
    dtype: str = "float32",
    **family: Any,
) -> Backbone:
    """A backbone by name: a linen module, called as `model(images, train)` -> (outputs, features).

    outputs: number of outputs, 0 for no head. resolution: side in pixels of the full-size images, for families whose
    form depends on it. stem: "cifar" or "imagenet", for families that have a choice. frozen: top-level parts that run
    in inference mode. dtype: of the computation, "float32" or "bfloat16". family: the family's own options. Raises
    UserError on an unknown name (listing the known, nearest first), option or value.
    """
    valid = options(name)
    if stem is not None:
        family["stem"] = stem
    for option in family:
        if option not in valid:
            named = ", ".join(o for o in ("outputs", "resolution", "frozen", "dtype", *valid))
            raise UserError(f"model {name!r} has no option {option!r}: choose from {named}")
    if "resolution" in valid:
        family["resolution"] = resolution
    if dtype not in DTYPES:
        raise UserError(f"model {name!r} cannot compute in {dtype!r}: choose from {', '.join(DTYPES)}")
    return BACKBONES[name](outputs=outputs, frozen=tuple(frozen), dtype=jnp.dtype(dtype), **family)
