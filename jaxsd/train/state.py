"""The state of a training run, its frozen part, and strict hand-over of weights between networks."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util

from jaxsd.errors import UserError
from jaxsd.objectives.objective import Objective

Tree = Any


class State(struct.PyTreeNode):
    """Everything that training changes, as one pytree of arrays."""

    step: jax.Array  # int32, steps done
    params: Tree  # trained
    frozen: Tree  # parameters without gradient or optimiser state; disjoint from params
    extra: Tree  # what the objective reads and rewrites: extra["model"] holds the module's collections
    opt_state: Tree  # of params alone
    key: jax.Array  # the stage's key; the key of a step is fold_in(key, step)


def flat(tree: Tree) -> dict[tuple[str, ...], Any]:
    """Nested dicts as one, by paths."""
    return traverse_util.flatten_dict(tree)


def _under(path: tuple[str, ...], names: Sequence[str]) -> bool:
    """Whether a flattened path lies at or below one of the names ('block1', 'trunk/block1')."""
    return any(path[: len(parts)] == parts for parts in (tuple(name.split("/")) for name in names))


def partition(params: Tree, freeze: Sequence[str]) -> tuple[Tree, Tree]:
    """Splits parameters into (trained, frozen) by module names or path prefixes; names that match nothing raise."""
    if not freeze:
        return params, {}
    paths = flat(params)
    for name in freeze:
        if not any(_under(path, [name]) for path in paths):
            raise UserError(f"cannot freeze {name!r}: the network has {', '.join(sorted(params))}")
    frozen = {path: leaf for path, leaf in paths.items() if _under(path, freeze)}
    trained = {path: leaf for path, leaf in paths.items() if path not in frozen}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def merge(params: Tree, frozen: Tree) -> Tree:
    """Puts the two parts of `partition` together again."""
    if not frozen:
        return params
    return traverse_util.unflatten_dict({**flat(params), **flat(frozen)})


def create(
    key: jax.Array, params: Tree, extra: Tree, optimiser: optax.GradientTransformation, *, freeze: Sequence[str] = ()
) -> State:
    """A state at step 0 around copies of given parameters and extra: a donating step never takes the caller's."""
    return _create(key, params, extra, optimiser, tuple(freeze))


@functools.partial(jax.jit, static_argnums=(3, 4))  # one program, not one for each shape of a leaf
def _create(key, params, extra, optimiser, freeze) -> State:
    key, params, extra = jax.tree.map(jnp.copy, (key, params, extra))
    trained, frozen = partition(params, freeze)
    return State(jnp.zeros((), jnp.int32), trained, frozen, extra, optimiser.init(trained), key)


def init(
    key: jax.Array,
    objective: Objective,
    optimiser: optax.GradientTransformation,
    batch: dict[str, Any],
    *,
    freeze: Sequence[str] = (),
) -> State:
    """A fresh state: parameters drawn by the objective, optimiser state for the trained part.

    batch: any batch of the shape that will be trained on. freeze: modules (or path prefixes) to leave as they are; a
    module that should also run in inference mode, its statistics untouched, must be told so (`frozen=` of the
    networks in jaxsd.models).
    """
    init_key, run_key = jax.random.split(key)
    params, extra = objective.init(init_key, batch)
    return create(run_key, params, extra, optimiser, freeze=freeze)


def carry(source: Tree, target: Tree, *, fresh: Sequence[str] = (), under: str = "") -> tuple[Tree, list[dict]]:
    """Hands the weights of one network to another, strictly; returns the new target and a line per tensor.

    Args:
      source, target: {"params": tree, "batch_stats": tree, ...}: collections of two networks.
      fresh: module names that keep the target's own values; the source's tensors of that name are dropped.
      under: name of the submodule of the target that takes the source's whole network ('trunk' of the probes).

    Returns:
      The target with copied leaves, and [{"tensor", "action": copied | fresh | dropped, "shape"}, ...].

    Raises:
      UserError naming every tensor that is missing, surplus or of another shape or dtype and not listed in `fresh`,
      and every name in `fresh` that neither network has.
    """
    prefix = tuple(under.split("/")) if under else ()
    given: dict[tuple[str, ...], Any] = {(path[0], *prefix, *path[1:]): leaf for path, leaf in flat(source).items()}
    wanted = flat(target)
    names = [*fresh, *(f"{under}/{name}" for name in fresh if under)]
    result, lines, paths = {}, [], [path[1:] for path in (*wanted, *given)]
    unknown = [name for name in fresh if not any(_under(path, [name, f"{under}/{name}"]) for path in paths)]
    wrong = [f"{name!r} in `fresh` is in neither network" for name in unknown]
    for path, leaf in wanted.items():
        name, shape = "/".join(path), list(leaf.shape)
        other = given.get(path)
        if _under(path[1:], names) or (prefix and path[1 : 1 + len(prefix)] != prefix):
            result[path] = leaf
            lines.append({"tensor": name, "action": "fresh", "shape": shape})
        elif other is None:
            wrong.append(f"{name} is missing")
        elif other.shape != leaf.shape or other.dtype != leaf.dtype:
            wrong.append(f"{name} is {other.dtype}{list(other.shape)}, wanted {leaf.dtype}{shape}")
        else:
            result[path] = other
            lines.append({"tensor": name, "action": "copied", "shape": shape})
    for path, leaf in given.items():
        if path not in wanted or _under(path[1:], names):
            lines.append({"tensor": "/".join(path), "action": "dropped", "shape": list(leaf.shape)})
            if not _under(path[1:], names):
                wrong.append(f"{'/'.join(path)} has no place")
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise UserError(f"weights do not fit: {shown}; name the modules to start anew in `fresh`")
    return traverse_util.unflatten_dict(result), lines
