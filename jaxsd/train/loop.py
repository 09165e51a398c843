"""The one training loop: data stay on the device, the host only counts, logs and saves."""

import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tqdm import tqdm

from jaxsd import processes
from jaxsd.data.batches import cut, epoch_batches, fitting, ordered_batches
from jaxsd.data.source import Grid
from jaxsd.errors import Diverged, Stopped
from jaxsd.objectives.objective import Objective
from jaxsd.train.checkpoint import Checkpoints
from jaxsd.train.optimiser import set_rate
from jaxsd.train.state import State
from jaxsd.train.step import Augment, make_train_step
from jaxsd.tuning import compiler_options
from jaxsd.workdir import Journal, log

Tree = Any
AHEAD = 4  # steps that the host may queue before it waits for one; also how late a bad loss is seen


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a stage trains and in which order it sees its images."""

    images: int  # in the set
    batch_size: int
    epochs: int
    rates: np.ndarray  # float32 [epochs * steps_per_epoch]
    order: jax.Array  # key: the order of epoch e comes from fold_in(order, e)
    repeat: int = 1  # times that an epoch shows each image
    drop_last: bool = False

    @property
    def shown(self) -> int:
        """Images that the whole run shows, a repeated one each time."""
        images = self.images * self.repeat
        if self.drop_last:
            images -= images % min(self.batch_size, images)
        return images * self.epochs

    def batches(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(index, mask), both [steps_per_epoch, batch]: a pure function of the epoch."""
        key = jax.random.fold_in(self.order, epoch)
        return epoch_batches(key, self.images, self.batch_size, repeat=self.repeat, drop_last=self.drop_last)


@dataclasses.dataclass
class Stop:
    """Set by a signal handler; the loop looks at it between steps."""

    signal: int | None = None

    def look(self, where: str) -> None:
        """Raises Stopped after a signal, where nothing is lost by it."""
        if self.signal is not None:
            raise Stopped(f"stopped at {where}, before a step; the same command goes on from there", self.signal)


@dataclasses.dataclass
class Watch:
    """Where a run is written and how it is watched; every part may be absent."""

    where: str = "training"
    checkpoints: Checkpoints | None = None
    journal: Journal | None = None
    save_seconds: float = 60.0
    stop: Stop = dataclasses.field(default_factory=Stop)
    on_epoch: Callable[[dict[str, Any]], None] = lambda entry: None
    checks: dict[str, Callable[[State], dict[str, float]]] = dataclasses.field(default_factory=dict)  # after each epoch
    best: str | None = None  # the check that says which epoch is the best one, whose checkpoint is kept as well
    spent: float = 0.0  # seconds of work before the first step


def data_mesh(batch_size: int) -> Mesh | None:
    """A mesh with the one axis `data` over as many local devices as divide the batch; None for a single device."""
    devices = jax.local_devices()
    count = next(n for n in range(len(devices), 0, -1) if batch_size % n == 0)
    return Mesh(np.array(devices[:count]), ("data",)) if count > 1 else None


def spread(tree: Tree, mesh: Mesh | None) -> Tree:
    """Puts arrays on every device of the mesh, or on the one device: for good, as arrays from a checkpoint are.

    Arrays that could be moved make another program, which a resumed run would have to compile anew.
    """
    if mesh is None:
        return jax.device_put(tree, SingleDeviceSharding(jax.local_devices()[0]))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return (jax.device_put if everywhere.is_fully_addressable else processes.put)(tree, everywhere)


def gather(
    data: dict[str, Tree],
    rows: jax.Array,
    mask: jax.Array,
    mesh: Mesh | None,
    grid: Grid | None = None,
    fed: Tree = None,
) -> dict[str, Tree]:
    """The batch of the given rows, split over the mesh's devices.

    With a grid rows count patches; what belongs to an image goes to each of its patches. data["trunk"] has an entry
    for every row; `fed` takes its place where it comes from the host.
    """
    images = rows if grid is None else rows // grid.count(*data["image"].shape[1:3])
    batch: dict[str, Tree] = {name: values[images] for name, values in data.items() if name not in ("image", "trunk")}
    batch["image"] = data["image"][rows] if grid is None else cut(data["image"], rows, grid)
    if "trunk" in data or fed is not None:
        batch["trunk"] = jax.tree.map(lambda x: x[rows], data["trunk"]) if fed is None else fed
    batch |= {"index": rows, "mask": mask}
    if mesh is None:
        return batch
    split = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda values: jax.lax.with_sharding_constraint(values, split), batch)


@functools.lru_cache(maxsize=64)
def compiled(
    objective: Objective,
    optimiser: optax.GradientTransformation,
    augment: Augment | None,
    mesh: Mesh | None,
    grid: Grid | None = None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(step, advance): the plain step, and the loop's own: gather rows, set the rate, step, add to the sums.

    Cached by identity, so stages and seeds that ask the same of the same network share one compilation.
    """
    step = jax.jit(make_train_step(objective, optimiser, augment))

    def advance(state: State, sums: Tree, data: Tree, fed: Tree, index: jax.Array, mask: jax.Array, rates: jax.Array):
        i = sums["steps"]
        batch = gather(data, index[i], mask[i], mesh, grid, fed)
        state, metrics = step(state.replace(opt_state=set_rate(state.opt_state, rates[i])), batch)
        weight = jnp.sum(mask[i])
        totals = {name: sums["totals"][name] + weight * value for name, value in metrics.items()}
        sums = {"steps": i + 1, "weight": sums["weight"] + weight, "totals": totals}
        return state, sums, metrics["loss"]

    return step, jax.jit(advance, donate_argnums=(0, 1), compiler_options=compiler_options())


def run(
    state: State,
    data: dict[str, np.ndarray],
    plan: Plan,
    objective: Objective,
    optimiser: optax.GradientTransformation,
    augment: Augment | None = None,
    *,
    grid: Grid | None = None,
    feed: Callable[[np.ndarray], Tree] | None = None,
    watch: Watch | None = None,
) -> State:
    """Trains until the plan's end, from the newest checkpoint if there is one; returns the last state.

    state: given away (its buffers are reused). data: {"image": uint8 [N, H, W, C], "label": int32 [N], ...}, put on the
    device once. The batch is split over the local devices, over as many as divide it.
    grid: train on the patches of the images. data["trunk"]: what the objective's trunk makes of every image or patch;
    feed(rows) gives it batch by batch where it does not fit on the device.
    Raises Diverged (a RunError) at a non-finite loss or weight and Stopped after a signal, both with everything saved
    that is worth it.
    """
    watch = watch or Watch()
    index, _ = plan.batches(0)
    steps, batch_size = index.shape
    mesh = _mesh_for(batch_size, watch.where)
    own = None if processes.several() else mesh  # checkpoints are read by one process, for all
    step, advance = compiled(objective, optimiser, augment, mesh, grid)
    state, placed = spread(state, own), spread(data, mesh)
    fed = feed(index[0]) if feed is not None else None
    sums = spread(no_sums(step, functools.partial(gather, mesh=None, grid=grid), state, placed, fed, batch_size), own)
    done, seconds = 0, watch.spent
    if watch.checkpoints is not None and (saved := watch.checkpoints.resume(state, sums)) is not None:
        done, state, sums, seconds = saved
        log.info("%s: continues at step %d of %d", watch.where, done, plan.epochs * steps)
    state, sums, numbers = processes.share((state, sums, np.array([done, seconds])))
    (done, seconds), (state, sums) = (int(numbers[0]), float(numbers[1])), spread((state, sums), mesh)
    if watch.journal is not None:
        watch.journal.rewind(done)
    loop = _Loop(watch, plan, steps, seconds, feed)
    loop.stop_if_asked(done, None, None)
    shown = {"desc": watch.where, "unit": "step", "leave": False, "disable": None if processes.leads() else True}
    with tqdm(total=plan.epochs * steps, initial=done, **shown) as bar:
        for epoch in range(done // steps, plan.epochs):
            state, sums = loop.epoch(epoch, state, sums, placed, advance, mesh, bar)
    if done < plan.epochs * steps:
        loop.save(plan.epochs * steps, state, sums)
    return processes.local(state)


def _mesh_for(batch_size: int, where: str) -> Mesh | None:
    several = processes.several()
    mesh = processes.mesh(batch_size) if several else data_mesh(batch_size)
    count = len(jax.devices() if several else jax.local_devices())
    used = mesh.size if mesh else 1
    if used < count:
        log.warning(
            "%s: batches of %d use %d of %d devices: take a multiple of %d", where, batch_size, used, count, count
        )
    return mesh


class _Loop:
    """The host's side of one run: clocks, the window of losses that are still being computed, saving."""

    def __init__(self, watch: Watch, plan: Plan, steps: int, seconds: float, feed: Callable[[np.ndarray], Tree] | None):
        self.watch, self.plan, self.steps, self.feed = watch, plan, steps, feed
        self.seconds = seconds  # of training before the time `since`; what is between epochs does not count
        self.since: float | None = None
        self.saved = time.monotonic()
        self.score: float | None = None  # of the epoch that has just ended, by the check that chooses the best
        self.window: deque[tuple[int, jax.Array, jax.Array | None]] = deque()
        # A signal that any process has got, and from which step on all know of it.
        self.agreed = (int(processes.greatest(watch.stop.signal or 0)), 0) if processes.several() else (0, 0)

    def epoch(self, epoch, state, sums, data, advance, mesh, bar):
        start = self.since = time.monotonic()
        index, mask = self.plan.batches(epoch)
        rates = self.plan.rates[epoch * self.steps : (epoch + 1) * self.steps]
        order = spread([np.asarray(part) for part in (index, mask, rates)], mesh)
        done = first = int(sums["steps"])
        self.score = None
        for done in range(first + 1, self.steps + 1):
            fed = self.feed(index[done - 1]) if self.feed is not None else None
            state, sums, loss = advance(state, sums, data, fed, *order)
            step = epoch * self.steps + done
            self._look(step, loss, AHEAD)
            bar.update()
            if done < self.steps:
                self._save_if_due(step, state, sums)
        self._look(0, None, 0)
        self.seconds, self.since = self._elapsed(), None
        self._report(epoch, (done - first) / max(time.monotonic() - start, 1e-9), state, sums)
        sums = jax.tree.map(jnp.zeros_like, sums)
        self._save_if_due((epoch + 1) * self.steps, state, sums)
        return state, sums

    def _elapsed(self) -> float:
        return self.seconds + (time.monotonic() - self.since if self.since is not None else 0.0)

    def _report(self, epoch: int, steps_per_second: float, state: State, sums: Tree) -> None:
        totals = jax.device_get(sums)
        means = {name: float(value / totals["weight"]) for name, value in totals["totals"].items()}
        step = (epoch + 1) * self.steps
        entry = {"step": step, "epoch": epoch + 1, "split": "train", **means}
        entry["rate"] = float(self.plan.rates[step - 1])
        entry["images/s"] = round(steps_per_second * float(totals["weight"]) / self.steps, 1)
        entry["seconds"] = round(self.seconds, 3)
        entries = [entry]
        for split, check in self.watch.checks.items():
            found = check(processes.local(state))
            entries.append({"step": step, "epoch": epoch + 1, "split": split, **found})
            if split == self.watch.best:
                self.score = found["accuracy"] if "accuracy" in found else -found["mae"]
        for entry in entries:
            if self.watch.journal is not None:
                self.watch.journal.write(entry)
            self.watch.on_epoch(entry)
            text = ", ".join(f"{k} {v:.4g}" for k, v in entry.items() if k not in ("step", "epoch", "split"))
            log.debug("%s: epoch %d, %s: %s", self.watch.where, epoch + 1, entry["split"], text)

    def _look(self, step: int, loss: jax.Array | None, ahead: int) -> None:
        """Waits for losses that are `ahead` steps old; the device always has work queued behind them."""
        if loss is not None:
            ask = processes.several() and step % AHEAD == 0
            self.window.append((step, loss, processes.greatest(self.watch.stop.signal or 0) if ask else None))
        while len(self.window) > ahead:
            at, loss, asked = self.window.popleft()
            if not math.isfinite(float(loss)):
                self._fail(at, f"the loss became {float(loss)}")
            if asked is not None and not self.agreed[0]:
                self.agreed = (int(asked), at + AHEAD)

    def _fail(self, step: int, what: str) -> None:
        # Without a wait for one that is being written: should that fail, it would be all that is heard of.
        kept = self.watch.checkpoints.latest(wait=False) if self.watch.checkpoints is not None else None
        raise Diverged(
            f"{what} at {self.watch.where}, step {step} (epoch {(step - 1) // self.steps + 1}), "
            f"rate {self.plan.rates[step - 1]:g}: lower the rate, warm it up or clip the gradients"
            + (f"; the checkpoint of step {kept} stays" if kept is not None else ""),
            step,
            what,
        )

    def _save_if_due(self, step: int, state: State, sums: Tree) -> None:
        self.stop_if_asked(step, state, sums)
        if self.watch.checkpoints is None or step == self.plan.epochs * self.steps:
            return
        if time.monotonic() - self.saved >= self.watch.save_seconds or self._is_best():
            # The next step gives these buffers away while Orbax still writes them: save copies.
            kept = (state, sums) if processes.several() else jax.tree.map(jnp.copy, (state, sums))
            self.save(step, *kept, wait=False)
            self.saved = time.monotonic()

    def _is_best(self) -> bool:
        if self.score is None or self.watch.checkpoints is None:
            return False
        best = self.watch.checkpoints.best()
        return best is None or self.score > best[1]

    def save(self, step: int, state: State, sums: Tree, *, wait: bool = True) -> None:
        """Writes a checkpoint, after a look at the losses until now and at the weights."""
        self._look(0, None, 0)
        floats = [x for x in jax.tree.leaves((state.params, state.extra)) if jnp.issubdtype(x.dtype, jnp.floating)]
        if not all(np.isfinite(np.asarray(x)).all() for x in floats):
            self._fail(step, "a weight became infinite or NaN")
        if self.watch.checkpoints is not None:
            self.watch.checkpoints.save(step, state, sums, seconds=self._elapsed(), score=self.score)
            if wait:
                self.watch.checkpoints.wait()

    def stop_if_asked(self, step: int, state: State | None, sums: Tree) -> None:
        """Raises Stopped where a signal has come, with the state saved if there is one that is not yet."""
        if (signal := self._asked(step)) is None:
            return
        if state is not None and (self.watch.checkpoints is None or self.watch.checkpoints.latest() != step):
            self.save(step, state, sums)
        kept = "saved" if self.watch.checkpoints is not None else "not saved: there is no workdir"
        raise Stopped(
            f"stopped at {self.watch.where}, step {step} of {self.plan.epochs * self.steps}; {kept}; "
            "the same command goes on from there",
            signal,
        )

    def _asked(self, step: int) -> int | None:
        """The signal to stop at this step; of several processes all give the same answer."""
        if not processes.several():
            return self.watch.stop.signal
        signal, since = self.agreed
        return signal if signal and (step >= since or step % self.steps == 0) else None


def no_sums(
    step: Callable[..., Any], gathered: Callable[..., Any], state: State, data: Tree, fed: Tree, batch_size: int
) -> Tree:
    """Zeroed sums, one per metric of the step; tracing it here is reused when the loop's step is compiled."""
    rows = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    mask = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
    batch = jax.eval_shape(lambda data, rows, mask, fed: gathered(data, rows, mask, fed=fed), data, rows, mask, fed)
    _, metrics = jax.eval_shape(step, state, batch)
    totals = {name: np.zeros((), np.float32) for name in metrics}
    return {"steps": np.zeros((), np.int32), "weight": np.zeros((), np.float32), "totals": totals}


@functools.lru_cache(maxsize=64)
def _evaluation(objective: Objective, mesh: Mesh | None, grid: Grid | None) -> Callable[..., Any]:
    def evaluate(params: Tree, extra: Tree, data: Tree, rows: jax.Array, mask: jax.Array):
        batch = {**gather(data, rows, mask, mesh, grid), "step": jnp.zeros((), jnp.int32)}
        loss, (metrics, _) = objective.loss(params, extra, batch, jax.random.key(0), train=False)
        return {"loss": loss, **metrics}

    return jax.jit(evaluate, compiler_options=compiler_options())


def evaluate(
    objective: Objective,
    params: Tree,
    extra: Tree,
    data: dict[str, np.ndarray],
    *,
    grid: Grid | None = None,
    batch_size: int = 256,
) -> dict[str, float]:
    """Loss and metrics of an objective in inference mode, exact means over all images (or patches) of `data`."""
    batch_size = fitting(batch_size, (grid.size, grid.size) if grid is not None else data["image"].shape[1:])
    mesh = data_mesh(batch_size)
    patches = grid.count(*data["image"].shape[1:3]) if grid is not None else 1
    index, masks = ordered_batches(len(data["image"]) * patches, batch_size)
    function = _evaluation(objective, mesh, grid)
    params, extra, placed = spread((params, extra, data), mesh)
    parts = [function(params, extra, placed, rows, mask) for rows, mask in zip(index, masks, strict=True)]
    weights = masks.sum(1)
    means = {name: np.array([float(part[name]) for part in parts]) for name in parts[0]}
    return {name: float(values @ weights / weights.sum()) for name, values in means.items()}
