"""One training run as a value: what is shown, what is asked, for how long, and what comes from the stage before."""

import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from clu.parameter_overview import get_parameter_overview

from jaxsd import processes, weights
from jaxsd.data.source import Source
from jaxsd.errors import Damaged, UserError
from jaxsd.models.forward import STANDARDISE
from jaxsd.objectives.objective import Objective
from jaxsd.train import loop, nonfinite, trunk
from jaxsd.train.checkpoint import Checkpoints, restore_model
from jaxsd.train.schedule import Schedule
from jaxsd.train.state import State, carry, create, flat, merge
from jaxsd.train.step import Augment
from jaxsd.views.view import compose
from jaxsd.workdir import Journal, differences, empty, fingerprint, locked, log, read_json, tensorboard, write_json

Tree = Any
Check = Callable[[State], dict[str, float]]
WEIGHTS_FORMAT = 4  # raised when the same stage would no longer give the same weights or the same files


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run.

    on: which subset of the training images it sees, by the recipe's names; "labelled" is the downstream task's.
    view: the deterministic change of the data set (Source -> Source), such as scale(0.5).
    epoch_images: how many images an epoch shows, by repeating a small set; None: each image once.
    match: names of stages whose pixels, summed, this stage is to show: `epochs` and the schedule are stretched.
    fresh: modules that start anew instead of coming from the stage before; under: the submodule which takes the
        stage before as a whole; freeze: modules without gradient (the model itself must run them in inference mode).
    trunk: where the frozen trunk's features are kept once computed, one of train.trunk.PLACES; "never": the trunk runs
        in every step. Nothing is kept where images are augmented: then there is nothing fixed to keep.
    average: how the answers for the patches of an image become one: "probability", "logits" or "vote".
    init: published weights that it begins with, all but the head and `fresh`, where no stage comes before it.
    best_test: also report the best epoch by the test images, as some papers do, and keep its checkpoint; marked.
    spec: the same as a JSON value, for the fingerprint: network, objective, optimiser, augmentations and whatever else
        decides the weights. Needed where a run is written to a workdir.
    """

    name: str
    model: nn.Module
    objective: Objective
    optimiser: optax.GradientTransformation  # made by train.optimiser.with_rate
    schedule: Schedule
    epochs: int
    batch_size: int = 128
    on: str = "unlabelled"
    view: Callable[[Source], Source] = compose()
    augment: Augment | None = None
    epoch_images: int | None = None
    drop_last: bool = False
    match: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    under: str = ""
    freeze: tuple[str, ...] = ()
    trunk: str = "auto"
    init: weights.Published | None = None
    average: str = "probability"
    best_test: bool = False
    spec: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise UserError(
                f"stage {self.name!r}: {self.epochs} epochs of batches of {self.batch_size}: give 1 or more"
            )

    @property
    def downstream(self) -> bool:
        """Whether it belongs to the task that is measured, not to the pretraining for it."""
        return self.on == "labelled" or bool(self.under)

    def repeat(self, images: int) -> int:
        """How many times an epoch shows each of so many images."""
        return max(1, round((self.epoch_images or images) / images))

    def pixels(self, images: int, side: tuple[int, int], epochs: float) -> float:
        """Pixels of network input that so many epochs over so many (viewed) images of a size show."""
        return epochs * self.repeat(images) * images * self.objective.views * side[0] * side[1]

    def stretched(self, epochs: int) -> "Stage":
        """The same stage over another number of epochs, its schedule stretched with it."""
        schedule = self.schedule.stretched(epochs / self.epochs)
        return dataclasses.replace(self, epochs=epochs, schedule=schedule, match=())


class Run(NamedTuple):
    """What identifies one run of a stage: where it stands in the tree, what it comes from, what it is given."""

    stage: Stage
    path: tuple[str, ...]  # names from the root
    seed: int
    data: str  # fingerprint of the images and labels that it is given, before its view
    parent: str | None  # fingerprint of the stage before
    standard: tuple[np.ndarray, np.ndarray]  # mean and deviation per channel of the images in [0, 1]

    def identity(self) -> dict[str, Any]:
        """Everything that decides the weights, as a JSON value."""
        # The schedule as it is run: stretched stages have other milestones than their spec.
        stage = {**self.stage.spec, "schedule": dataclasses.asdict(self.stage.schedule)}
        init = self.stage.init.identity() if self.stage.init is not None and self.parent is None else None
        return {
            "stage": json.loads(json.dumps(stage)),
            "epochs": self.stage.epochs,
            "path": "/".join(self.path),
            "seed": self.seed,
            "data": self.data,
            "parent": self.parent,
            **({"init": init} if init else {}),
            "standard": [[float(value) for value in part] for part in self.standard],
            "format": WEIGHTS_FORMAT,
        }

    def fingerprint(self) -> str:
        """Hash of the identity."""
        return fingerprint(self.identity())

    def folder(self, workdir: Path) -> Path:
        """Where the run's files are."""
        return Path(workdir, "stages", *self.path, f"seed{self.seed}")

    def key(self) -> jax.Array:
        """The key of the run: adding an arm or a stage elsewhere changes no other."""
        return jax.random.fold_in(jax.random.key(self.seed), zlib.crc32("/".join(self.path).encode()))


class Trained(NamedTuple):
    """The weights of a finished stage."""

    params: Tree
    extra: Tree


def data_of(source: Source) -> dict[str, np.ndarray]:
    """A source as the loop takes it; unlabelled images get label 0, which no pretext task reads."""
    count = len(source.images)
    data = {"image": source.images, "label": source.labels if source.labels is not None else np.zeros(count, np.int32)}
    return data if source.scores is None else {**data, "score": source.scores}


def sample_of(source: Source) -> np.ndarray:
    """One image, or one patch, uint8 [1, H, W, C]: the shape that a network is shown."""
    height, width, _ = source.shape
    return source.images[:1, :height, :width]


def start(
    stage: Stage, key: jax.Array, source: Source, standard: tuple[np.ndarray, np.ndarray], parent: Trained | None
) -> tuple[State, list[dict]]:
    """The state that a stage begins with, and where each of its tensors came from."""
    init_key, run_key = jax.random.split(key)
    params, extra = stage.objective.init(init_key, {"image": sample_of(source)})
    collections = {k: v for k, v in extra["model"].items() if k != STANDARDISE}
    if parent is not None:
        collections, lines = _handed_over(stage, parent, {"params": params, **collections})
        params = collections.pop("params")
    elif stage.init is not None:
        fresh = ("head", *stage.fresh)
        params, collections, lines = weights.load(stage.init, stage.model, params, collections, fresh=fresh)
    else:
        lines = [
            {"tensor": "/".join(str(part.key) for part in path), "action": "fresh", "shape": list(leaf.shape)}
            for path, leaf in jax.tree_util.tree_leaves_with_path({"params": params, **collections})
        ]
    mean, std = standard
    collections[STANDARDISE] = {"mean": jax.numpy.asarray(mean), "std": jax.numpy.asarray(std)}
    return create(run_key, params, {**extra, "model": collections}, stage.optimiser, freeze=stage.freeze), lines


def _handed_over(stage: Stage, parent: Trained, wanted: Tree) -> tuple[Tree, list[dict]]:
    """The stage before's weights in the place of `wanted`; transformers' position tables fitted to the images' size."""
    given = {"params": parent.params, **{k: v for k, v in parent.extra["model"].items() if k != STANDARDISE}}
    fitted = weights.resized(given, wanted, under=stage.under)
    result, lines = carry(fitted, wanted, fresh=stage.fresh, under=stage.under)
    paths = [path for path, leaf in flat(fitted).items() if leaf.shape != flat(given)[path].shape]
    resized = {"/".join((path[0], *([stage.under] if stage.under else []), *path[1:])) for path in paths}
    return result, [{**line, "action": "adapted"} if line["tensor"] in resized else line for line in lines]


def drawn(run: Run, source: Source) -> Trained:
    """The weights of a run before any training: as they are drawn, or published, with nothing from a stage before."""
    state, _ = start(run.stage, run.key(), run.stage.view(source.take([0])), run.standard, None)
    return Trained(merge(state.params, state.frozen), state.extra)


def plan_of(stage: Stage, key: jax.Array, images: int) -> loop.Plan:
    """The stage's epochs, batches and rates over a set of so many images."""
    repeat = stage.repeat(images)
    shown = images * repeat
    batch_size = min(stage.batch_size, shown)
    steps = shown // batch_size if stage.drop_last else -(-shown // batch_size)
    return loop.Plan(
        images=images,
        batch_size=batch_size,
        epochs=stage.epochs,
        rates=stage.schedule.rates(stage.epochs, steps),
        order=jax.random.fold_in(key, zlib.crc32(b"order")),
        repeat=repeat,
        drop_last=stage.drop_last,
    )


def check_folder(run: Run, workdir: Path, *, reuse: bool = False, stop: loop.Stop | None = None) -> list[str]:
    """What differs between the run and what lies in its folder; with `reuse` a folder of another run is emptied.

    Who works in that folder is waited for; `stop` ends the wait.
    """
    folder = run.folder(workdir)
    found = read_json(folder / "stage.json")
    if found is None or found == run.identity():
        return []
    if reuse:
        with locked(folder / ".lock", lambda owner: (stop or loop.Stop()).look(f"{folder}, which {owner} trains")):
            if read_json(folder / "stage.json") == found:  # else another process has begun it anew meanwhile
                log.info("%s seed %d: trained again, it was made differently", "/".join(run.path), run.seed)
                empty(folder, last="stage.json")
        return check_folder(run, workdir)
    return [f"{'/'.join(run.path)}/seed{run.seed}: {line}" for line in differences(found, run.identity())]


def done(run: Run, workdir: Path) -> dict[str, Any] | None:
    """The record of a finished run; None where it has not finished."""
    record = read_json(run.folder(workdir) / "done.json")
    return record if record is not None and record["fingerprint"] == run.fingerprint() else None


def run_stage(
    run: Run,
    source: Source,
    *,
    parent: Trained | None = None,
    workdir: Path | None = None,
    validation: Source | None = None,
    test: Check | None = None,
    stop: loop.Stop | None = None,
    save_seconds: float = 60.0,
) -> Trained:
    """Trains a stage on a source (before its view), or goes on where it was stopped; returns the weights.

    test: what is measured on the test images after each epoch, where the best epoch is asked for as well.
    With a workdir everything is written to the run's folder, done.json last.
    Raises UserError where a tensor of the parent has no place or is missing.
    """
    stop = stop or loop.Stop()
    if workdir is None:
        return train_run(run, source, parent, loop.Watch(stop=stop), (validation, test))
    if not run.stage.spec:
        raise UserError(f"stage {run.stage.name!r}: give a spec, by which its weights are known again in a workdir")
    folder = run.folder(workdir)
    with locked(folder / ".lock", lambda owner: stop.look(f"{folder}, which {owner} trains")):
        if (trained := restore(run, source, workdir)) is not None:  # another process has trained it meanwhile
            return trained
        if lines := check_folder(run, workdir):
            raise UserError(
                f"{folder} holds a stage that was made otherwise: {'; '.join(lines[:6])}; take another workdir"
            )
        write_json(folder / "stage.json", run.identity())
        checkpoints, journal = Checkpoints(folder / "checkpoints"), Journal(folder / "metrics.jsonl")
        watch = loop.Watch(checkpoints=checkpoints, journal=journal, save_seconds=save_seconds, stop=stop)
        watch.on_epoch = tensorboard(Path(workdir, "events", *run.path, f"seed{run.seed}"))
        try:
            return train_run(run, source, parent, watch, (validation, test), folder)
        finally:
            checkpoints.close()


def train_run(
    run: Run,
    source: Source,
    parent: Trained | None,
    watch: loop.Watch,
    checks: tuple[Source | None, Check | None] = (None, None),
    folder: Path | None = None,
) -> Trained:
    """`run_stage` without its care for the workdir: starts the network, computes the trunk, runs the loop.

    Several processes train it together, from the state of process 0.
    """
    stage, (validation, test) = run.stage, checks
    viewed = stage.view(source)
    if folder is not None:
        processes.say(f"train {run.fingerprint()}")
    state, lines = start(stage, run.key(), viewed, run.standard, parent)
    state = processes.share(state)
    # Not the run's own key: arms that are paired by seed see the same images in the same order.
    plan = plan_of(stage, jax.random.key(run.seed), len(viewed))
    watch.where = f"{'/'.join(run.path)} seed {run.seed}"
    _say_beginning(watch.where, stage, viewed, plan)
    log.debug("%s: trained parameters\n%s", watch.where, get_parameter_overview(state.params, include_stats=False))
    if validation is not None:
        watch.checks["validation"] = _validation(stage, validation)
    if test is not None:
        watch.checks["test"], watch.best = test, "test"
    if folder is not None:
        write_json(folder / "transfer.json", lines)
    data = data_of(viewed)
    known = _trunk(run, state, data, viewed, watch, folder)
    if known is not None and known.features is not None:
        data["trunk"] = known.features
    options = {"grid": viewed.grid, "feed": known.feed if known is not None else None, "watch": watch}
    again = {"begin": lambda: start(stage, run.key(), viewed, run.standard, parent)[0], "folder": folder}
    state = nonfinite.run(state, data, plan, stage.objective, stage.optimiser, stage.augment, **options, **again)
    if watch.journal is not None and (last := watch.journal.last()) is not None:
        log.info("%s: trained in %.0f s, loss %.4g", watch.where, last["seconds"], last["loss"])
    if folder is not None and watch.journal is not None:
        trunk.clear(folder / "trunk")  # first: a stage that is done is never looked at again
        write_json(folder / "done.json", _record(run, viewed, watch.journal, plan))
    return Trained(merge(state.params, state.frozen), state.extra)


def _trunk(
    run: Run, state: State, data: dict[str, np.ndarray], viewed: Source, watch: loop.Watch, folder: Path | None
) -> trunk.Trunk | None:
    """The features of the stage's frozen trunk, where it has one and nothing random comes before it."""
    stage = run.stage
    if stage.trunk == "never" or stage.augment is not None or stage.objective.trunk is None:
        return None
    prefix = set(getattr(stage.model, "prefix", ()))
    if not prefix or not prefix <= set(stage.freeze):
        return None
    alone = not processes.several()  # else nothing that one process could do without the others
    known = trunk.compute(
        stage.objective,
        merge(state.params, state.frozen),
        state.extra,
        data,
        grid=viewed.grid,
        place=stage.trunk,
        folder=folder / "trunk" if folder is not None and alone else None,
        stamp=run.fingerprint(),
        stop=watch.stop if alone else None,
        where=watch.where,
    )
    watch.spent = known.seconds
    return known


def restore(run: Run, source: Source, workdir: Path) -> Trained | None:
    """The weights of a finished run; None where it is unfinished, or counts as such since they are damaged.

    What does not fit, or cannot be read just now, is an error: nothing is thrown away for that.
    """
    if (record := done(run, workdir)) is None:
        return None
    like = jax.eval_shape(run.stage.objective.init, run.key(), {"image": sample_of(run.stage.view(source.take([0])))})
    try:
        like = {"params": like[0], "extra": like[1]}
        model = restore_model(run.folder(workdir) / "checkpoints", like, record["steps"])
    except Damaged as error:
        log.warning("%s; what it held of that stage is trained again", error)
        (run.folder(workdir) / "done.json").unlink(missing_ok=True)
        return None
    return Trained(model["params"], model["extra"])


def _validation(stage: Stage, source: Source) -> Check:
    viewed = stage.view(source)
    data, grid = data_of(viewed), viewed.grid
    return lambda state: loop.evaluate(stage.objective, merge(state.params, state.frozen), state.extra, data, grid=grid)


def _record(run: Run, viewed: Source, journal: Journal, plan: loop.Plan) -> dict[str, Any]:
    last = journal.last() or {}
    return {
        "fingerprint": run.fingerprint(),
        "images": plan.shown,
        "pixels": plan.shown * run.stage.objective.views * viewed.shape[0] * viewed.shape[1],
        "seconds": last.get("seconds", 0.0),
        "steps": len(plan.rates),
        "metrics": {k: v for k, v in last.items() if k not in ("step", "epoch", "split", "seconds", "images/s")},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _say_beginning(where: str, stage: Stage, viewed: Source, plan: loop.Plan) -> None:
    height, width, _ = viewed.shape
    what = f"images of {height}x{width}" if viewed.grid is None else f"patches of {height}x{width}"
    shown = f"{len(viewed)} {what}, batch {plan.batch_size}"
    log.info("%s: %d epoch%s of %s", where, stage.epochs, "" if stage.epochs == 1 else "s", shown)
    if plan.batch_size < stage.batch_size:
        log.warning("%s: fewer images than a batch: batch size %d, not %d", where, plan.batch_size, stage.batch_size)
    if missed := stage.schedule.unreached(stage.epochs):
        text = ", ".join(f"{milestone:g}" for milestone in missed)
        log.warning("%s: the rate never drops at epoch %s: the stage has %d", where, text, stage.epochs)
