"""A whole ScaleNet run: rotation at growing scales, then fine-tuning on a few labels."""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from jaxsd.bench.turns import Line, Turns, as_flags, in_turn, versions
from jaxsd.errors import UserError

STEMS = {"resnet8": None, "resnet18": "cifar"}  # the networks of the recipe; resnet8 has one stem only


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The options of `bench recipe`."""
    parser.add_argument("--model", default="resnet8", choices=tuple(STEMS))
    parser.add_argument("--data", default="photos", help="an embedded set, or folder:PATH or arrays:PATH")
    parser.add_argument("--size", type=int, default=32, help="side in pixels of photos and folder")
    parser.add_argument("--images", type=int, help="training images; default all")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.05])
    parser.add_argument("--epochs", type=int, default=5, help="of each scale")
    parser.add_argument("--finetune-epochs", type=int, default=10)
    parser.add_argument("--finetune-rate", type=float, default=0.01)
    parser.add_argument("--labels-per-class", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)


def line(given: argparse.Namespace) -> Line:
    """Trains the run here; the seconds of a stage are [all but the first step, the first step]."""
    import jax

    from jaxsd import tuning
    from jaxsd.data.source import standardisation
    from jaxsd.data.split import subset
    from jaxsd.stage import data_of
    from jaxsd.train import loop

    tuning.tune_allocator()
    tuning.cache_compilation()
    train, test = _data(given)
    few = train.take(subset(train, per_class=given.labels_per_class, first=True))
    *pretext, downstream = stages(given, len(train.classes))
    seconds, standard = {}, standardisation(train)
    trained: Any = None
    for stage in pretext:
        trained, seconds[stage.name] = _timed(stage, train, standard, trained)
    turned = loop.evaluate(pretext[-1].objective, trained.params, trained.extra, data_of(test))
    trained, seconds[downstream.name] = _timed(downstream, few, standard, trained)
    named = loop.evaluate(downstream.objective, trained.params, trained.extra, data_of(test))
    return {
        "model": given.model,
        "seconds": {name: [round(part, 3) for part in parts] for name, parts in seconds.items()},
        "total": round(sum(rest for rest, _ in seconds.values()), 3),
        "total_with_first_steps": round(sum(sum(parts) for parts in seconds.values()), 3),
        "pretext_accuracy": round(turned["accuracy"], 4),
        "accuracy": round(named["accuracy"], 4),
        "threads": given.threads,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.params)),
        **versions(),
    }


def _data(given: argparse.Namespace) -> tuple[Any, Any]:
    """The training and test sources."""
    from jaxsd import build
    from jaxsd.data.split import subset

    name, _, path = given.data.partition(":")
    options = {"path": path} if path else {}
    if name in ("photos", "folder"):
        options["size"] = given.size
    splits = build.load({"data": {"name": name, **options}})
    if splits.test is None or splits.train.labels is None:
        raise UserError(f"--data={given.data}: it needs labels and test images")
    train = splits.train
    if given.images is not None:
        train = train.take(subset(train, total=given.images, balanced=True))
    return train, splits.test


def stages(given: argparse.Namespace, classes: int) -> list[Any]:
    """One rotation stage per scale, then fine-tuning with a new head: ScaleNet, sections 2.2 and 3.1.1."""
    from jaxsd import models, objectives
    from jaxsd.stage import Stage
    from jaxsd.train import optimiser
    from jaxsd.train.schedule import Schedule
    from jaxsd.views.view import scale

    if len(given.alphas) != len(given.rates) or min(given.epochs, given.finetune_epochs) < 2:
        raise UserError("recipe: give one rate for each of --alphas, and 2 epochs or more")
    sgd = optimiser.with_rate(optimiser.sgd(momentum=0.9, weight_decay=5e-4))

    def stage(name: str, model: Any, objective: Any, alpha: float, rate: float, epochs: int, **rest: Any) -> Stage:
        drops = tuple(float(round(epochs * share)) for share in (0.3, 0.6, 0.8))
        schedule = Schedule(rate, drops, 0.2)
        common = {"batch_size": given.batch, "drop_last": True, "view": scale(alpha)}
        return Stage(name, model, objective, sgd, schedule, epochs, **common, **rest)

    turning, naming = (models.build(given.model, outputs=outputs, stem=STEMS[given.model]) for outputs in (4, classes))
    rotation, supervised = objectives.rotation(turning), objectives.supervised(naming)
    pretext = [
        stage(f"alpha{alpha:g}", turning, rotation, alpha, rate, given.epochs)
        for alpha, rate in zip(given.alphas, given.rates, strict=True)
    ]
    finetune = (naming, supervised, 1.0, given.finetune_rate, given.finetune_epochs)
    return [*pretext, stage("finetune", *finetune, fresh=("head",))]


def _timed(stage: Any, source: Any, standard: Any, parent: Any) -> tuple[Any, tuple[float, float]]:
    """Trains a stage; the seconds of all but the first step, and of the first with all that precedes it.

    The loop reports epochs, so the first step is what the first epoch took beyond the rest of a usual one.
    """
    import jax

    from jaxsd.stage import Trained, data_of, plan_of, start
    from jaxsd.train import loop
    from jaxsd.train.state import merge

    clock = [time.perf_counter()]
    watch = loop.Watch(where=stage.name, on_epoch=lambda entry: clock.append(time.perf_counter()))
    viewed, key = stage.view(source), jax.random.key(0)
    state, _ = start(stage, key, viewed, standard, parent)
    plan = plan_of(stage, key, len(viewed))
    state = loop.run(state, data_of(viewed), plan, stage.objective, stage.optimiser, watch=watch)
    jax.block_until_ready(state)
    clock[-1] = time.perf_counter()
    first, *others = (later - earlier for earlier, later in itertools.pairwise(clock))
    beginning = first - statistics.median(others) * (1 - stage.epochs / len(plan.rates))
    return Trained(merge(state.params, state.frozen), state.extra), (first + sum(others) - beginning, beginning)


def compared(given: argparse.Namespace) -> Iterator[Line]:
    """The run here and in PyTorch, in turn."""
    import numpy as np

    train, test = _data(given)
    for images in (len(train), given.labels_per_class * len(train.classes)):
        if images == given.batch:
            raise UserError(
                f"--batch={given.batch}: the PyTorch script fails on exactly one batch: choose another size"
            )
    names = ("model", "alphas", "rates", "epochs", "finetune_epochs", "finetune_rate", "labels_per_class", "batch")
    shared = as_flags(given, (*names, "threads"))
    ratios = {
        "ratio": ("total", ("cold", "warm")),
        "ratio_with_first_steps": ("total_with_first_steps", ("cold",)),
        "ratio_warm_cache": ("total_with_first_steps", ("warm",)),
        "ratio_process": ("process_s", ("cold",)),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "images.npz")
        parts = {"train": train, "test": test}
        np.savez(file, **{f"{name}_images": part.images for name, part in parts.items()},
                 **{f"{name}_labels": part.labels for name, part in parts.items()})  # fmt: skip
        ours, theirs = ["--data", f"arrays:{file}", *shared], ["--images", file, *shared]
        yield from in_turn(given, Turns("recipe", ours, theirs, ratios))
