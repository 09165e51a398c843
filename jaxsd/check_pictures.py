"""What stages of a recipe are shown, image by image, and the course of their learning rates."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.data.batches import cut_on_host
from jaxsd.data.source import Source, Splits
from jaxsd.figures_data import Picture
from jaxsd.recipe import Cell, Experiment, Recipe
from jaxsd.stage import Run, Stage, plan_of
from jaxsd.train.step import Augment

EXAMPLES = 2  # images drawn for each way of showing them
DRAWS = 5  # of an augmentation
PATCHES = 5  # of an image
NARROW = 3  # up to so many pictures of an example, all examples stand in one row

Row = tuple[str, list[Picture]]


def used(recipe: Recipe) -> dict[str, Stage]:
    """The stages of all arms and probes by name."""
    arms = [*recipe.arms.values(), *((probe,) for probe in recipe.probes.values())]
    return {stage.name: stage for arm in arms for stage in arm}


def shown(recipe: Recipe, train: Source, pretext: Source | None) -> list[Row]:
    """Rows for a picture: images as they are, under each input, as each stage sees them, and draws of augmentations.

    Stages that are shown the same share rows.
    """
    rows: dict[tuple, tuple[list[str], str, list[list[Picture]]]] = {}
    for name in recipe.inputs:
        for stage in used(recipe).values():
            own = pretext is not None and not stage.downstream
            source = pretext if own and pretext is not None else train
            chosen = np.linspace(0, len(source.images) - 1, EXAMPLES + 1).round().astype(int)[:EXAMPLES]
            examples = source.take(np.unique(chosen))
            given = recipe.inputs[name](examples)
            viewed = stage.view(given)
            key = (name, own, viewed.images.tobytes(), viewed.shape, viewed.grid, str(stage.augment))
            if key not in rows:
                height, width, _ = viewed.shape
                size = f"{'patches of ' if viewed.grid else ''}{height} x {width}"
                what = f"{size}, {'no augmentation' if stage.augment is None else stage.augment}"
                rows[key] = ([], what, list(_examples(examples, given, viewed, stage.augment)))
            rows[key][0].append(stage.name)
    found = []
    for (name, *_), (stages, what, lines) in rows.items():
        if len(lines[0]) <= NARROW:
            lines = [[picture for line in lines for picture in line]]
        of = f"input {name}: " if len(recipe.inputs) > 1 else ""
        found += [(f"{of}{', '.join(stages)} ({what})" if not at else "", line) for at, line in enumerate(lines)]
    return found


def _examples(examples: Source, given: Source, viewed: Source, augment: Augment | None) -> Iterator[list[Picture]]:
    """The row of each example: what does not differ from the picture before is left out."""
    for number, image in enumerate(examples.images):
        pictures = [Picture(image, "image")]
        if not np.array_equal(given.images, examples.images):
            pictures.append(Picture(given.images[number], "input"))
        samples = viewed.images[number][None]
        if viewed.grid is not None:
            places = np.unique(np.linspace(0, viewed.patches - 1, PATCHES).round().astype(int))
            samples = cut_on_host(viewed.images[number : number + 1], places, viewed.grid)
            words = [f"patch {place + 1} of {viewed.patches}" for place in places]
            pictures += [Picture(sample, text) for sample, text in zip(samples, words, strict=True)]
        elif not np.array_equal(viewed.images, given.images):
            pictures.append(Picture(samples[0], "view"))
        if augment is not None:
            batch = jnp.repeat(jnp.asarray(samples[:1], jnp.float32) / 255, DRAWS, axis=0)
            drawn = np.asarray(augment(jax.random.key(number), batch)).clip(0, 1)
            pictures += [Picture(one, f"augmented {draw + 1}") for draw, one in enumerate(drawn)]
        yield [Picture(_visible(image), words) for image, words in pictures]


def _visible(image: np.ndarray) -> np.ndarray:
    """An image with one or three of its channels."""
    return image[..., : 3 if image.shape[-1] >= 3 else 1]


def courses(recipe: Recipe, splits: Splits, pretext: Source | None) -> Mapping[str, tuple[np.ndarray, int]]:
    """{title: (the rate of every step, steps per epoch)} of every stage as the first seed and amount of labels run it.

    Stages of equal course share one.
    """
    with TemporaryDirectory() as folder:
        experiment = Experiment(recipe, splits, Path(folder), pretext=pretext)
        first = (next(iter(recipe.inputs)), next(iter(recipe.labels)), recipe.seeds[0])
        cells = [Cell(arm, *first, next(iter(recipe.splits), None)) for arm in recipe.arms]
        runs = {run.stage.name: run for cell in cells for run in _runs(experiment, cell)}
        found: dict[tuple, list[str]] = {}
        kept = {}
        for name, run in runs.items():
            source, _ = experiment.given(cells[0], run.stage.on)
            images = len(source) * len(run.stage.view(source.take([0])))
            plan = plan_of(run.stage, run.key(), images)
            steps = len(plan.rates) // run.stage.epochs
            title = f"{_counted(run.stage.epochs, 'epoch')} of {_counted(steps, 'step')}"
            key = (title, plan.rates.tobytes())
            found.setdefault(key, []).append(name)
            kept[key] = (plan.rates, steps)
    return {f"{', '.join(names)}\n{key[0]}": kept[key] for key, names in found.items()}


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _runs(experiment: Experiment, cell: Cell) -> list[Run]:
    """The runs of a cell, its probe included."""
    probe = experiment.runs(cell, probe=True)[-1:] if cell.arm in experiment.recipe.probes else []
    return [*experiment.runs(cell), *probe]
