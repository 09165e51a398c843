"""What a patch ladder costs: its late stages with and without the trunk computed once, and memory by images."""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

Line = dict[str, Any]
TIMES = (1, 4, 16)  # as many images, for memory


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The options of `bench patches`; the network is that of LIVE's ladder (32 to 512 pixels) up to --side."""
    parser.add_argument("--side", type=int, default=512, help="of the whole images, in pixels")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--of", type=int, default=80, help="epochs that a whole stage has")
    parser.add_argument("--stages", type=int, default=2, help="how many, from the last one back")
    parser.add_argument("--memory", action="store_true", help="peak memory of the first stage instead of times")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # one measurement of memory, in a fresh process


def lines(given: argparse.Namespace) -> list[Line]:
    """The measurements asked for."""
    if given.peak is not None:
        return [_peak(given)]
    if given.memory:
        return [_in_a_process(given, given.images * times) for times in TIMES]
    sizes = _sizes(given.side)
    return [_stage(given, sizes, step) for step in range(max(1, len(sizes) - given.stages), len(sizes))]


def _sizes(side: int) -> list[int]:
    return [size for size in (32, 64, 128, 256, 512) if size <= side]


def _made(given: argparse.Namespace, sizes: list[int], step: int, images: int, place: str) -> tuple[Any, Any]:
    """A stage of the ladder and random images with scores."""
    import numpy as np

    from jaxsd import models, objectives
    from jaxsd.data.source import Source
    from jaxsd.stage import Stage
    from jaxsd.train import optimiser, schedule
    from jaxsd.views.view import patches

    frozen = tuple(f"block{i + 1}" for i in range(step))
    model = models.build("patchnet", outputs=1, grow=step + 1, frozen=frozen)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (images, given.side, given.side, 3), np.uint8)
    stage = Stage(
        f"patch{sizes[step]}",
        model,
        objectives.regression(model),
        optimiser.with_rate(optimiser.adam()),
        schedule.constant(1e-3),
        epochs=given.epochs + 1,
        batch_size=max(8, 128 >> step),
        on="labelled",
        view=patches(sizes[step]),
        freeze=frozen,
        trunk=place,
    )
    return stage, Source(pixels, scores=random.random(images) * 100)


def _trained(stage: Any, source: Any) -> tuple[float, float]:
    """Seconds before the first step, and the median of an epoch's, the first one apart."""
    import numpy as np

    from jaxsd.stage import Run, train_run
    from jaxsd.train import loop

    run = Run(stage, (stage.name,), 0, "", None, (np.zeros(3, np.float32), np.ones(3, np.float32)))
    clock: list[float] = []
    watch = loop.Watch(on_epoch=lambda entry: clock.append(time.perf_counter()))
    train_run(run, source, None, watch)
    return watch.spent, statistics.median(after - before for before, after in itertools.pairwise(clock))


def _stage(given: argparse.Namespace, sizes: list[int], step: int) -> Line:
    from jaxsd import tuning

    tuning.tune_allocator()
    _, every = _trained(*_made(given, sizes, step, given.images, "never"))
    once, epoch = _trained(*_made(given, sizes, step, given.images, "auto"))
    return {
        "stage": f"patch{sizes[step]}",
        "images": given.images,
        "patches": given.images * (given.side // sizes[step]) ** 2,
        "epoch_s": round(every, 3),
        "epoch_with_trunk_kept_s": round(epoch, 3),
        "trunk_s": round(once, 3),
        "ratio_of_stage": round(given.of * every / (once + given.of * epoch), 2),
        "epochs_of_stage": given.of,
        "threads": given.threads,
    }


def _peak(given: argparse.Namespace) -> Line:
    """Trains an epoch of the first stage; the most memory that this process ever had, and what the images have."""
    stage, source = _made(given, _sizes(given.side), 0, given.peak, "auto")
    _, epoch = _trained(stage, source)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "images": given.peak,
        "patches": len(stage.view(source)),
        "images_mb": round(source.images.nbytes / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1),
        "epoch_s": round(epoch, 3),
    }


def _in_a_process(given: argparse.Namespace, images: int) -> Line:
    command = [sys.executable, "-m", "jaxsd.bench", "patches", f"--side={given.side}", f"--peak={images}"]
    command += [f"--epochs={given.epochs}", f"--threads={given.threads}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
