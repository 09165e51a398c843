"""The step at which a run became infinite or NaN: kept with all that it takes, and taken again to find out why.

A stage that stops so has a folder `nonfinite`: the state before the step and its batch as a checkpoint, and step.json,
written last. The state is computed again from the newest checkpoint, or from the start: training is the same bits
every time, and nothing has to be kept while all is well.
"""

import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from jaxsd import processes
from jaxsd.data.source import Grid
from jaxsd.errors import Diverged, RunError, Stopped, UserError
from jaxsd.objectives.objective import Objective
from jaxsd.train import loop
from jaxsd.train.checkpoint import Checkpoints
from jaxsd.train.optimiser import set_rate
from jaxsd.train.state import State
from jaxsd.train.step import Augment, make_train_step
from jaxsd.workdir import log, read_json, write_json

Tree = Any
FOLDER = "nonfinite"


class Kept(NamedTuple):
    """A step that went wrong, with all that it takes."""

    step: int  # counted from 1
    what: str  # that became infinite or NaN
    rate: float
    state: State  # before the step
    batch: dict[str, Tree]  # images before augmentation; the state has the key


class Taken(NamedTuple):
    """What a step does: largest magnitudes by name, NaN or infinite where one number is."""

    loss: float
    grad_norm: float
    before: dict[str, float]  # leaves of the state
    batch: dict[str, float]
    activations: dict[str, float]  # what each module gives, in the order in which they end
    gradients: dict[str, float]  # of each parameter, in the order of the backward pass
    after: dict[str, float]


def run(
    state: State,
    data: dict[str, np.ndarray],
    plan: loop.Plan,
    objective: Objective,
    optimiser: optax.GradientTransformation,
    augment: Augment | None = None,
    *,
    begin: Callable[[], State],
    folder: Path | None,
    watch: loop.Watch,
    **options: Any,
) -> State:
    """`loop.run`; a step that gives infinity or NaN is kept in `folder`, and the error says how to look at it.

    begin: makes the first state once more. options: grid and feed of the loop.
    """
    what = (data, plan, objective, optimiser, augment)
    try:
        return loop.run(state, *what, watch=watch, **options)
    except Diverged as error:
        traceback.clear_frames(error.__traceback__)  # they hold the data on the device, which come there again
        if folder is None or processes.several():  # of several processes none has the whole batch
            raise
        log.info("%s: computing the state before step %d once more, to keep it", watch.where, error.step)
        try:
            again = {"checkpoints": watch.checkpoints, "look": lambda: watch.stop.look(watch.where), **options}
            state, batch = before(error.step, begin(), *what, **again)
            keep(folder / FOLDER, Kept(error.step, error.what, float(plan.rates[error.step - 1]), state, batch))
        except Stopped:
            raise
        except Exception as other:  # a full disk, say: it must not hide why the run stopped
            log.warning("%s: the step could not be kept (%s: %s)", watch.where, type(other).__name__, other)
            raise error from other
        look = f"python -m jaxsd.check replay --workdir={folder}"
        raise RunError(f"{error}; the step is kept, to look at it: {look}") from error


def before(
    step: int,
    state: State,
    data: dict[str, np.ndarray],
    plan: loop.Plan,
    objective: Objective,
    optimiser: optax.GradientTransformation,
    augment: Augment | None = None,
    *,
    grid: Grid | None = None,
    feed: Callable[[np.ndarray], Tree] | None = None,
    checkpoints: Checkpoints | None = None,
    look: Callable[[], None] = lambda: None,
) -> tuple[State, dict[str, Tree]]:
    """The state before a step (counted from 1) of `loop.run` and the batch that it is given, by the same program.

    state: the first one, given away; training goes on from the newest checkpoint where there is one.
    look: called before every step that is taken; what it raises passes through.
    """
    index, mask = plan.batches(0)
    steps, batch_size = index.shape
    mesh = loop.data_mesh(batch_size)
    one, advance = loop.compiled(objective, optimiser, augment, mesh, grid)
    state, placed = loop.spread(state, mesh), loop.spread(data, mesh)

    def gathered(placed: Tree, rows: Any, mask: Any, fed: Tree = None) -> dict[str, Tree]:
        return loop.gather(placed, rows, mask, None, grid, fed)

    fed = feed(index[0]) if feed is not None else None
    sums = loop.spread(loop.no_sums(one, gathered, state, placed, fed, batch_size), mesh)
    done = 0
    if checkpoints is not None:
        checkpoints.wait()
        if (saved := checkpoints.resume(state, sums)) is not None:
            done, state, sums, _ = saved
    for number in range(done, step):
        look()
        epoch, i = divmod(number, steps)
        if i == 0 or number == done:
            index, mask = plan.batches(epoch)
            rates = plan.rates[epoch * steps : (epoch + 1) * steps]
            order = loop.spread([np.asarray(part) for part in (index, mask, rates)], mesh)
        fed = feed(index[i]) if feed is not None else None
        if number < step - 1:
            state, sums, _ = advance(state, sums, placed, fed, *order)
        if i == steps - 1:
            sums = jax.tree.map(jnp.zeros_like, sums)
    i = (step - 1) % steps
    return state, gathered(placed, jnp.asarray(index[i]), jnp.asarray(mask[i]), fed)


def keep(folder: Path, kept: Kept) -> None:
    """Writes a step to a folder, in the place of one that is there."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(kept.step - 1, kept.state, {"rate": jnp.float32(kept.rate), "batch": kept.batch})
    checkpoints.wait()
    checkpoints.close()
    leaves: dict[str, Any] = traverse_util.flatten_dict(kept.batch, sep="/")
    shapes = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}
    write_json(folder / "step.json", {"step": kept.step, "what": kept.what, "batch": shapes})


def load(folder: Path, like: State) -> Kept:
    """The step in a folder; `like` says shapes and types of the state.

    Raises UserError where there is none, RunError where it is damaged.
    """
    note = read_json(folder / "step.json")
    if note is None:
        raise UserError(
            f"no step is kept in {folder}: only a run that met a loss or weight of infinity or NaN keeps it"
        )
    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, (shape, dtype) in note["batch"].items()}
    sums = {"rate": jax.ShapeDtypeStruct((), jnp.float32), "batch": traverse_util.unflatten_dict(leaves, sep="/")}
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        saved = checkpoints.restore(note["step"] - 1, like, sums)
    finally:
        checkpoints.close()
    return Kept(note["step"], note["what"], float(saved.sums["rate"]), saved.state, saved.sums["batch"])


def take(
    kept: Kept, objective: Objective, optimiser: optax.GradientTransformation, augment: Augment | None = None
) -> Taken:
    """Takes a kept step again and measures everything on the way."""
    activations: dict[str, float] = {}
    state = kept.state.replace(opt_state=set_rate(kept.state.opt_state, kept.rate))

    def note(call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        if context.method_name == "__call__":
            name = "/".join(context.module.path) or "the network"
            activations.setdefault(name, 0.0)  # now, while tracing: callbacks come in any order
            largest = [_largest(leaf) for leaf in jax.tree.leaves(result) if _floating(leaf)]
            if largest:
                jax.debug.callback(lambda value: activations.update({name: float(value)}), jnp.stack(largest).max())
        return result

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        changes, _ = optimiser.update(updates, state, params)
        return changes, updates  # the gradients, in the place of the optimiser's state, where they can be looked at

    step = make_train_step(objective, optax.GradientTransformation(optimiser.init, update), augment)
    with nn.intercept_methods(note):
        after, metrics = jax.jit(step)(state, kept.batch)
    jax.effects_barrier()
    places = {name: place for place, name in enumerate(activations)}
    gradients = largest(after.opt_state)
    backward = sorted(gradients, key=lambda name: -places.get(name.rpartition("/")[0], -1))
    return Taken(
        loss=float(metrics["loss"]),
        grad_norm=float(metrics["grad_norm"]),
        before=largest({name: getattr(kept.state, name) for name in ("params", "frozen", "extra", "opt_state")}),
        batch=largest(kept.batch),
        activations=activations,
        gradients={name: gradients[name] for name in backward},
        after=largest({"params": after.params, "extra": after.extra}),
    )


def largest(tree: Tree) -> dict[str, float]:
    """The largest magnitude in each floating leaf, by its path; NaN where it has one."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {name: float(_largest(leaf)) for name, leaf in named.items() if _floating(leaf)}


def _largest(leaf: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(leaf.astype(jnp.float32)), initial=0.0)


def _floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
