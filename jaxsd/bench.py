"""Speed, one JSON object per line: `python -m jaxsd.bench step|recipe|patches ...`.

step: one training step of a backbone on random inputs. recipe: a whole ScaleNet run (rotation at growing scales, then
fine-tuning on a few labels). patches: the late stages of a patch ladder, or its memory. With --against=PYTHON the first
two are also run in PyTorch, by the script --peer with that interpreter, in turn with ours and in fresh processes;
`ratio` is the peer's time over ours: above 1 is faster here.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxsd import bench_patches
from jaxsd.errors import RunError, UserError

Line = dict[str, Any]
PEER_NAMES = {"deit_tiny": "deit_tiny_patch16_224", "alexnet": "tv:alexnet"}  # where timm's name is another
STEMS = {"resnet8": None, "resnet18": "cifar"}  # the networks of the recipe; resnet8 has one stem only
LAYOUTS = {"contiguous": [], "channels_last": ["--channels-last"]}
POLICIES = {"default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}  # waiting threads spin, or sleep


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{self.prog}: {message}: see --help")


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(prog="python -m jaxsd.bench", description="Speed, one JSON object per line.")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="one training step of a backbone on random inputs")
    step.add_argument("--model", required=True)
    step.add_argument("--resolution", type=int, default=224)
    step.add_argument("--batch", type=int, default=32)
    step.add_argument("--classes", type=int, default=10)
    step.add_argument("--stem", choices=("cifar", "imagenet"), help="for networks that have the choice")
    step.add_argument("--steps", type=int, default=10)
    step.add_argument("--warmup", type=int, default=2)
    recipe = commands.add_parser("recipe", help="a whole ScaleNet run")
    recipe.add_argument("--model", default="resnet8", choices=tuple(STEMS))
    recipe.add_argument("--data", default="photos", help="an embedded set, or folder:PATH or arrays:PATH")
    recipe.add_argument("--size", type=int, default=32, help="side in pixels of photos and folder")
    recipe.add_argument("--images", type=int, help="training images; default all")
    recipe.add_argument("--alphas", type=float, nargs="+", default=[0.5, 1.0])
    recipe.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.05])
    recipe.add_argument("--epochs", type=int, default=5, help="of each scale")
    recipe.add_argument("--finetune-epochs", type=int, default=10)
    recipe.add_argument("--finetune-rate", type=float, default=0.01)
    recipe.add_argument("--labels-per-class", type=int, default=10)
    recipe.add_argument("--batch", type=int, default=128)
    bench_patches.add_flags(commands.add_parser("patches", help="what a patch ladder costs"))
    for command, peer in ((step, "torch_step.py"), (recipe, "torch_rotnet.py")):
        command.add_argument("--threads", type=int, default=2, help="processor cores that each side may use")
        command.add_argument("--against", metavar="PYTHON", help="interpreter that has torch")
        command.add_argument("--peer", type=Path, default=Path("peers", peer), help="the PyTorch script")
        command.add_argument("--repeats", type=int, default=3, help="runs with each PyTorch setting")
    return parser


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    try:
        given = flags().parse_args(argv)
        _bind(given.threads)
        if given.command == "patches":
            lines: Iterable[Line] = bench_patches.lines(given)
        elif given.against:
            lines = _compare_steps(given) if given.command == "step" else _compare_recipes(given)
        else:
            lines = [_step(given) if given.command == "step" else _recipe(given)]
        for line in lines:
            print(json.dumps(line), flush=True)
        return 0
    except (UserError, RunError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _bind(threads: int) -> None:
    """Keeps this process and its children on the first cores; XLA and torch then have equally many."""
    if threads < 1:
        raise UserError(f"--threads={threads}: give 1 or more")
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if threads > len(cores):
            raise UserError(f"--threads={threads}: this process may use {len(cores)} cores")
        os.sched_setaffinity(0, cores[:threads])


def _step(given: argparse.Namespace) -> Line:
    """Forward, cross-entropy, backward and SGD with momentum, float32, timed step by step."""
    import jax
    import numpy as np
    import optax

    from jaxsd import models, objectives, train, tuning

    tuning.tune_allocator()
    model = models.build(given.model, outputs=given.classes, resolution=given.resolution, stem=given.stem)
    random, side = np.random.default_rng(0), given.resolution
    image = random.normal(size=(given.batch, side, side, 3)).astype(np.float32)
    batch = jax.device_put({"image": image, "label": random.integers(given.classes, size=given.batch, dtype=np.int32)})
    objective, optimiser = objectives.supervised(model), optax.sgd(0.01, momentum=0.9)
    state = train.init(jax.random.key(0), objective, optimiser, batch)
    step = jax.jit(train.make_train_step(objective, optimiser), donate_argnums=0)
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    seconds = []
    for _ in range(given.warmup + given.steps):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        float(metrics["loss"])
        seconds.append(time.perf_counter() - start)
    seconds = seconds[given.warmup :]
    median = statistics.median(seconds)
    return {
        "model": given.model,
        "resolution": side,
        "batch": given.batch,
        "threads": given.threads,
        "steps": given.steps,
        "memory_format": "NHWC",
        "images_per_s": round(given.batch / median, 2),
        "images_per_s_range": [round(given.batch / max(seconds), 2), round(given.batch / min(seconds), 2)],
        "step_ms": round(1e3 * median, 2),
        "compile_s": round(compile_s, 2),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        **_versions(),
    }


def _versions() -> Line:
    import jax

    device = jax.local_devices()[0].device_kind
    return {"device": device, "jax": jax.__version__, "python": platform.python_version()}


def _recipe(given: argparse.Namespace) -> Line:
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
    *pretext, downstream = _stages(given, len(train.classes))
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
        **_versions(),
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


def _stages(given: argparse.Namespace, classes: int) -> list[Any]:
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


def _compare_steps(given: argparse.Namespace) -> Iterator[Line]:
    names = ("resolution", "batch", "classes", "steps", "warmup", "threads")
    shared = _as_flags(given, names)
    ours = ["--model", given.model, *(["--stem", given.stem] if given.stem else [])]
    theirs = ["--model", PEER_NAMES.get(given.model, given.model), *(["--cifar-stem"] if given.stem == "cifar" else [])]
    yield from _in_turn(given, [*ours, *shared], [*theirs, *shared], {"ratio": ("step_ms", ("cold", "warm"))})


def _compare_recipes(given: argparse.Namespace) -> Iterator[Line]:
    import numpy as np

    train, test = _data(given)
    for images in (len(train), given.labels_per_class * len(train.classes)):
        if images == given.batch:
            raise UserError(
                f"--batch={given.batch}: the PyTorch script fails on exactly one batch: choose another size"
            )
    names = ("model", "alphas", "rates", "epochs", "finetune_epochs", "finetune_rate", "labels_per_class", "batch")
    shared = _as_flags(given, (*names, "threads"))
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
        yield from _in_turn(given, ["--data", f"arrays:{file}", *shared], ["--images", file, *shared], ratios)


def _as_flags(given: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """The named options as a command line, which both sides read alike."""
    words = []
    for name in names:
        value = getattr(given, name)
        values = value if isinstance(value, list) else [value]
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


def _in_turn(
    given: argparse.Namespace, ours: list[str], theirs: list[str], ratios: dict[str, tuple[str, tuple[str, ...]]]
) -> Iterator[Line]:
    """Our run and the peer's one after the other, with every PyTorch setting; the last line compares.

    Ours begins with an empty compilation cache (cold) and with the one of the run before (warm), by turns. ratios:
    the quantity and the states of the cache that each ratio is made of.
    """
    if shutil.which(given.against) is None or not given.peer.is_file():
        raise UserError(f"--against={given.against} --peer={given.peer}: give an interpreter and the PyTorch script")
    load, lines = os.getloadavg()[0] if hasattr(os, "getloadavg") else None, []
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    with tempfile.TemporaryDirectory() as caches:
        for repeat in range(given.repeats):
            for at, (layout, policy) in enumerate(itertools.product(LAYOUTS, POLICIES)):
                cache = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": os.path.join(caches, f"{repeat}-{at // 2}")}
                command = [sys.executable, "-m", "jaxsd.bench", given.command, *ours]
                line = {"side": "jaxsd", "repeat": repeat, "cache": ("cold", "warm")[at % 2]}
                lines.append({**line, **_child(command, {**environment, **cache})})
                yield lines[-1]
                command = [given.against, str(given.peer), *theirs, *LAYOUTS[layout]]
                line = {"side": "torch", "repeat": repeat, "layout": layout, "policy": policy}
                lines.append({**line, **_child(command, {**environment, **POLICIES[policy]})})
                yield lines[-1]
    yield {**_verdict(lines, ratios), "hardware": {"cpu": _processor(), "cores": given.threads, "load_before": load}}


def _child(command: list[str], environment: dict[str, str]) -> Line:
    """The last JSON line that a process prints, with the seconds from its start to its end."""
    start = time.perf_counter()
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if result.returncode:
        said = result.stderr.strip().splitlines() or ["nothing on stderr"]
        raise RunError(f"{' '.join(command)} ended with status {result.returncode}: {said[-1]}")
    return {**json.loads(result.stdout.splitlines()[-1]), "process_s": round(seconds, 3)}


def _verdict(lines: list[Line], ratios: dict[str, tuple[str, tuple[str, ...]]]) -> Line:
    """Medians over the repeats: the fastest PyTorch setting over ours, for every ratio."""
    ours, theirs = ([line for line in lines if line["side"] == side] for side in ("jaxsd", "torch"))
    if ours[0]["parameters"] != theirs[0]["parameters"]:
        raise RunError(f"not the same network: {ours[0]['parameters']} parameters, peer {theirs[0]['parameters']}")
    verdict: Line = {"side": "both"}
    for name, (quantity, caches) in ratios.items():
        mine = statistics.median(line[quantity] for line in ours if line["cache"] in caches)
        settings: dict[str, list[float]] = {}
        for line in theirs:
            settings.setdefault(f"{line['layout']}, {line['policy']}", []).append(line[quantity])
        best = min(settings, key=lambda setting: statistics.median(settings[setting]))
        peer = statistics.median(settings[best])
        verdict[name] = round(peer / mine, 3)
        verdict[name.replace("ratio", "medians")] = {
            "jaxsd": round(mine, 3),
            "torch": round(peer, 3),
            "torch_setting": best,
        }
    return {**verdict, "repeats": len(theirs) // len(settings)}


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
