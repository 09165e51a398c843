"""One training step of a backbone on random inputs: forward, cross-entropy, backward, SGD with momentum."""

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxsd.bench.turns import ALLOCATORS, Line, Turns, as_flags, in_turn, versions
from jaxsd.errors import UserError

PEER = Path(__file__).parent / "peer" / "step.py"
PEERS = {  # where timm's name is another; own: is a twin of ours
    "dsk_resnext50_32x4d": "own:dsk_resnext50_32x4d",
    **{f"t2t_vit_{size}": f"own:t2t_vit_{size}" for size in ("7", "10", "12", "14", "19", "24", "t_14")},
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "alexnet": "tv:alexnet",
}


class Row(NamedTuple):
    """A line of the table: the side of the images in pixels, and images in a batch."""

    model: str
    resolution: int
    batch: int
    stem: str | None = None


TABLE = (
    Row("resnet50", 64, 32, "imagenet"),
    Row("resnet50", 32, 64, "cifar"),
    Row("resnet18", 32, 128, "cifar"),
    Row("resnext50_32x4d", 64, 32, "imagenet"),
    Row("skresnext50_32x4d", 64, 32, "imagenet"),
    Row("dsk_resnext50_32x4d", 64, 32, "imagenet"),
    Row("resnest50d", 64, 32),
    Row("efficientnet_b0", 64, 32),
    Row("deit_tiny", 112, 32),
    Row("t2t_vit_7", 112, 32),
    Row("pvt_v2_b0", 112, 32),
    Row("vgg16", 64, 32),
    Row("alexnet", 96, 64),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The options of `bench step`."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="one network of python -m jaxsd.models")
    which.add_argument("--all", action="store_true", help="every network of the table, with --against")
    parser.add_argument("--resolution", type=int, default=224, help="side of the images in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images a step (%(default)s)")
    parser.add_argument("--classes", type=int, default=10, help="outputs (%(default)s)")
    parser.add_argument("--stem", choices=("cifar", "imagenet"), help="for networks that have the choice")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=10, help="timed, one by one (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those (%(default)s)")
    parser.add_argument("--cached", action="store_true", help="take compiled programs from the cache")


def network(name: str, classes: int, resolution: int, stem: str | None, dtype: str = "float32"):
    """A backbone without dropout and stochastic depth, where they are a choice."""
    from jaxsd import models
    from jaxsd.models.catalogue import options

    still: dict[str, Any] = {option: 0.0 for option in ("dropout", "drop_path") if option in options(name)}
    return models.build(name, outputs=classes, resolution=resolution, stem=stem, dtype=dtype, **still)


def line(given: argparse.Namespace) -> Line:
    """The step timed here, one by one; `flop_per_s` counts three forward passes' convolutions and dense layers."""
    if given.all:
        raise UserError("--all compares: give --against=PYTHON, an interpreter that has torch")
    import jax
    import numpy as np
    import optax

    from jaxsd import objectives, train, tuning
    from jaxsd.models.catalogue import costs

    tuning.tune_allocator()
    if given.cached:
        tuning.cache_compilation()
    model = network(given.model, given.classes, given.resolution, given.stem, given.dtype)
    random, side = np.random.default_rng(0), given.resolution
    image = random.normal(size=(given.batch, side, side, 3)).astype(np.float32)
    batch = jax.device_put({"image": image, "label": random.integers(given.classes, size=given.batch, dtype=np.int32)})
    objective, optimiser = objectives.supervised(model), optax.sgd(0.01, momentum=0.9)
    state = train.init(jax.random.key(0), objective, optimiser, batch)
    step = jax.jit(
        train.make_train_step(objective, optimiser), donate_argnums=0, compiler_options=tuning.compiler_options()
    )
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
        "dtype": given.dtype,
        "images_per_s": round(given.batch / median, 2),
        "images_per_s_range": [round(given.batch / max(seconds), 2), round(given.batch / min(seconds), 2)],
        "step_ms": round(1e3 * median, 2),
        "compile_s": round(compile_s, 2),
        "flop_per_s": round(3 * costs(model, side)[1] * given.batch / median),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        **versions(),
    }


def compared(given: argparse.Namespace) -> Iterator[Line]:
    """The step here and in PyTorch, in turn: of one network, or a line for each of the table and their mean."""
    if not given.all:
        yield from _one(given)
        return
    ratios = []
    for row in TABLE:
        *_, verdict = _one(argparse.Namespace(**{**vars(given), **row._asdict()}))
        ratios.append(verdict["ratio"])
        yield {**row._asdict(), **verdict}
    yield {"geometric_mean": round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 3)}


def _one(given: argparse.Namespace) -> Iterator[Line]:
    shared = as_flags(given, ("resolution", "batch", "classes", "steps", "warmup", "threads"))
    ours = ["--model", given.model, *(["--stem", given.stem] if given.stem else []), "--cached"]
    theirs = ["--model", PEERS.get(given.model, given.model), *(["--cifar-stem"] if given.stem == "cifar" else [])]
    ratios = {"ratio": ("step_ms", ("cold", "warm"))}
    words = ([*ours, *shared], [*theirs, *shared])
    yield from in_turn(given, Turns("step", *words, ratios, tuple(ALLOCATORS), cold_runs=False))
