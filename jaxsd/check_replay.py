"""The step that stopped a stage, taken once more: where did infinity or NaN come from?"""

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsd import build
from jaxsd.data.source import Source
from jaxsd.errors import UserError
from jaxsd.recipe import Experiment
from jaxsd.stage import Run, check_folder, start
from jaxsd.train import nonfinite
from jaxsd.train.nonfinite import Kept, Taken

Config = dict[str, Any]


def replay(config: Config, root: Path, folder: Path) -> int:
    """Takes the step kept in a stage's folder again and prints what is found; `root` is the workdir around it.

    Returns 0 where infinity or NaN come again, 1 where they do not. Nothing in the workdir is changed.
    Raises UserError where there is no such step, or where the config's stage is another one.
    """
    run, source = find(config, root, folder)
    if lines := check_folder(run, root):
        raise UserError(f"the config is not that of the stage: {'; '.join(lines[:6])}; give the one it was run with")
    viewed, stage = run.stage.view(source), run.stage
    like = jax.eval_shape(
        lambda: start(dataclasses.replace(stage, init=None), run.key(), viewed, run.standard, None)[0]
    )
    kept = nonfinite.load(folder / nonfinite.FOLDER, like)
    taken = nonfinite.take(kept, stage.objective, stage.optimiser, stage.augment)
    print(f"{'/'.join(run.path)} seed {run.seed}")
    for line in [*findings(kept, taken), *pictured(kept, viewed)]:
        print(line)
    return 0 if _bad({"loss": taken.loss, **taken.after}) else 1


def find(config: Config, root: Path, folder: Path) -> tuple[Run, Source]:
    """The run whose files are in a folder of a workdir, and the images that it is given, before its view."""
    splits = build.load(config)
    pretext = build.load_pretext(config, splits)
    scored = splits.train.scores is not None
    recipe = build.recipe(config, splits.train.shape, len(splits.train.classes), scored=scored)
    with tempfile.TemporaryDirectory() as elsewhere:  # what an experiment notes on its way
        experiment = Experiment(recipe, splits, Path(elsewhere), pretext=pretext)
        for cell in experiment.cells(seeds=_seeds(folder)):
            for probe in (False, True) if cell.arm in recipe.probes else (False,):
                for run in experiment.runs(cell, probe=probe):
                    if run.folder(root).resolve() == folder.resolve():
                        return run, experiment.given(cell, run.stage.on)[0]
    raise UserError(f"{folder} is no stage of the config: give the one it was run with")


def _seeds(folder: Path) -> list[int]:
    """The seed in the name of a stage's folder: the config may be that of another job, with other seeds."""
    number = folder.resolve().name.removeprefix("seed")
    return [int(number)] if number.isdecimal() else []


def findings(kept: Kept, taken: Taken) -> list[str]:
    """What a step's numbers say, one finding a line."""
    lines = [
        f"step {kept.step}, rate {kept.rate:g}: {kept.what}",
        f"taken again: loss {taken.loss:g}, gradient norm {taken.grad_norm:g}",
        _first("state before the step", taken.before),
        _first("batch", taken.batch),
        _first("activations", taken.activations, "in the order of the forward pass "),
        _first("gradients", taken.gradients, "in the order of the backward pass "),
        _first("state after the step", taken.after),
    ]
    if not _bad({"loss": taken.loss, **taken.after}):
        lines.append("all is finite this time: the fault is not in the step (another device, a fault of the machine?)")
    elif not math.isfinite(taken.loss) and not _bad(taken.activations):
        lines.append("all that the network gives is finite: it is the loss itself")
    return lines


def _bad(largest: dict[str, float]) -> list[str]:
    return [name for name, value in largest.items() if not math.isfinite(value)]


def _first(what: str, largest: dict[str, float], order: str = "") -> str:
    """How many of some tensors are not finite, the first of them, and the largest that is."""
    bad = _bad(largest)
    finite = {name: value for name, value in largest.items() if name not in bad}
    most = max(finite, key=lambda name: finite[name], default=None)
    text = f"{what}: " + (f"{len(bad)} of {len(largest)} not finite, first {order}{bad[0]}" if bad else "finite")
    return text + (f"; largest {'of the others ' if bad else ''}{finite[most]:.3g} in {most}" if most else "")


def pictured(kept: Kept, viewed: Source) -> list[str]:
    """The name and label, or score, of each image of the batch; patches by their place in the image."""
    rows = np.asarray(kept.batch["index"])[np.asarray(kept.batch["mask"]) > 0]
    lines = [f"batch of {len(rows)}" + (":" if viewed.names else ", by their places among the stage's images:")]
    for row in rows:
        image, patch = divmod(int(row), viewed.patches)
        name = viewed.names[image] if viewed.names else f"image {image}"
        answer = "unlabelled"
        if viewed.scores is not None:
            answer = f"score {viewed.scores[image]:g}"
        elif viewed.labels is not None:
            answer = viewed.classes[viewed.labels[image]]
        lines.append(f"  {name}{f', patch {patch}' if viewed.patches > 1 else ''}: {answer}")
    return lines
