"""Arms that share beginnings, run over seeds, measured the same way.

An arm is a path of stages; what two arms begin with in common is trained once. Inputs (changes of the whole data set)
and labelled subsets span a grid over the arms.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxsd.data.source import Source, Splits, standardisation
from jaxsd.data.split import subset
from jaxsd.errors import UserError
from jaxsd.stage import Run, Stage, Trained, check_folder, check_names, done, restore, run_stage, start
from jaxsd.train.loop import Stop
from jaxsd.workdir import log

Rows = list[dict[str, Any]]
EVALUATIONS = ("pretext", "ridge", "knn", "probe", "finetune")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is compared with what.

    arms: name -> stages from the root; the first stage that is on "labelled" images starts the downstream part.
    inputs: name -> view of all images, training and test alike; labels: name -> arguments of data.split.subset for
        the labelled images; unlabelled: the same for the images of the pretext stages. Drawn anew for every seed.
    probe: a frozen stage (linear probes on every block) run after each arm's pretext part, or None.
    evaluations: any of "pretext", "ridge", "knn", "probe", "finetune".
    """

    name: str
    arms: Mapping[str, tuple[Stage, ...]]
    evaluations: tuple[str, ...]
    baseline: str
    seeds: tuple[int, ...] = (0, 1, 2)
    inputs: Mapping[str, Callable[[Source], Source]] = dataclasses.field(default_factory=lambda: {"original": _same})
    labels: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {"all": {}})
    unlabelled: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    probe: Mapping[str, Stage] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name, stages in self.arms.items():
            check_names(stages, f"arm {name!r}")
            downstream = [stage.on == "labelled" for stage in stages]
            if downstream != sorted(downstream):
                raise UserError(f"arm {name!r}: stages on unlabelled images must come before those on labelled ones")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One arm under one input, one labelled subset and one seed."""

    arm: str
    input: str
    labels: str
    seed: int


def _same(source: Source) -> Source:
    return source


class Experiment:
    """A recipe on given data, in a workdir: which runs there are, what they come from, their weights when asked for."""

    def __init__(
        self, recipe: Recipe, splits: Splits, workdir: Path, *, stop: Stop | None = None, save_seconds: float = 60.0
    ):
        self.recipe, self.splits, self.workdir = recipe, splits, Path(workdir)
        self.stop, self.save_seconds = stop or Stop(), save_seconds
        self._viewed: dict[str, Splits] = {}
        self._standard: dict[str, Any] = {}
        self._subsets: dict[tuple, tuple[Source, str]] = {}
        self._trained: dict[str, Trained] = {}  # the last few, by fingerprint

    def cells(self, only: tuple[str, ...] = ()) -> Iterator[Cell]:
        """Every cell, seeds outermost: after each seed all arms can be compared."""
        for seed in self.recipe.seeds:
            for name in self.recipe.inputs:
                for labels in self.recipe.labels:
                    yield from (Cell(arm, name, labels, seed) for arm in self.recipe.arms if not only or arm in only)

    def viewed(self, name: str) -> Splits:
        """The splits under an input."""
        if name not in self._viewed:
            view, splits = self.recipe.inputs[name], self.splits
            rest = (view(part) if part is not None else None for part in (splits.validation, splits.test))
            self._viewed[name] = Splits(splits.name, view(splits.train), *rest, skipped=splits.skipped)
            self._standard[name] = standardisation(self._viewed[name].train)
        return self._viewed[name]

    def standard(self, name: str):
        """Mean and deviation of the input's training images, at full size: one pair for all stages."""
        self.viewed(name)
        return self._standard[name]

    def given(self, cell: Cell, on: str) -> tuple[Source, str]:
        """The images that a stage of the cell sees, and their fingerprint."""
        key = (cell.input, on == "labelled" and cell.labels, cell.seed)
        if key not in self._subsets:
            train = self.viewed(cell.input).train
            arguments = self.recipe.labels[cell.labels] if on == "labelled" else self.recipe.unlabelled
            if on == "labelled" and train.labels is None:
                raise UserError("the training images have no labels: this recipe's downstream stages need class folders")
            source = train.take(subset(train, **arguments, seed=cell.seed))
            self._subsets[key] = (source, source.fingerprint())
        return self._subsets[key]

    def runs(self, cell: Cell, *, probe: bool = False) -> list[Run]:
        """The cell's runs from the root; with `probe` those of the pretext part and the probe on it."""
        stages = list(self.recipe.arms[cell.arm])
        if probe:
            stages = [stage for stage in stages if stage.on != "labelled"] + [self.recipe.probe[cell.arm]]
        path = [cell.input] if len(self.recipe.inputs) > 1 else []
        runs: list[Run] = []
        for i, stage in enumerate(stages):
            if len(self.recipe.labels) > 1 and stage.on == "labelled" and (i == 0 or stages[i - 1].on != "labelled"):
                path.append(cell.labels)
            path.append(stage.name)
            parent = runs[-1].fingerprint() if runs else None
            stage = self._matched(stage, cell)
            runs.append(Run(stage, tuple(path), cell.seed, self.given(cell, stage.on)[1], parent))
        return runs

    def _matched(self, stage: Stage, cell: Cell) -> Stage:
        """The stage with as many epochs as show the pixels of the stages that it is to match."""
        if not stage.match:
            return stage
        known = {other.name: other for arm in self.recipe.arms.values() for other in arm}
        target = 0.0
        for name in stage.match:
            source, _ = self.given(cell, known[name].on)
            target += known[name].pixels(self._view_of(known[name], source), known[name].epochs)
        source, _ = self.given(cell, stage.on)
        one = stage.pixels(self._view_of(stage, source), 1)
        return stage.stretched(max(1, round(target / one)))

    @staticmethod
    def _view_of(stage: Stage, source: Source) -> Source:
        """A stand-in of the viewed source's size: shapes only."""
        return _Sized(len(source), stage.view(source.take([0])).shape)  # type: ignore[return-value]

    def trained(self, cell: Cell, runs: list[Run]) -> Trained:
        """The weights at the end of a path of runs: from memory, from disk, or trained now."""
        run = runs[-1]
        if (name := run.fingerprint()) not in self._trained:
            source, _ = self.given(cell, run.stage.on)
            if done(run, self.workdir):
                value = restore(run, source, self.workdir)
            else:
                parent = self.trained(cell, runs[:-1]) if len(runs) > 1 else None
                validation = self.viewed(cell.input).validation
                value = run_stage(
                    run,
                    source,
                    standard=self.standard(cell.input),
                    parent=parent,
                    workdir=self.workdir,
                    validation=validation,
                    stop=self.stop,
                    save_seconds=self.save_seconds,
                )
            while len(self._trained) >= 4:
                self._trained.pop(next(iter(self._trained)))
            self._trained[name] = value
        return self._trained[name]

    def untrained(self, cell: Cell, stage: Stage) -> Trained:
        """The network of a stage as it is drawn, before any training: what a pretext task starts from."""
        source, _ = self.given(cell, stage.on)
        run = Run(stage, ("untrained",), cell.seed, "", None)
        state, _ = start(stage, run.key(), source.take([0]), self.standard(cell.input), None)
        return Trained(state.params, state.extra)

    def check(self, cells: list[Cell], *, reuse: bool = False) -> None:
        """Raises UserError where the workdir holds stages that were made otherwise, naming what differs."""
        lines: list[str] = []
        for cell in cells:
            for run in self.runs(cell) + (self.runs(cell, probe=True) if cell.arm in self.recipe.probe else []):
                lines += [line for line in check_folder(run, self.workdir, reuse=reuse) if line not in lines]
        if lines:
            shown = "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")
            raise UserError(
                f"{self.workdir} holds stages that were made otherwise: {shown}; take another --workdir, or --reuse to "
                "keep the stages that match and train the others again"
            )

    def announce(self, cells: list[Cell]) -> None:
        """Says how much there is to train."""
        names = {run.fingerprint(): run for cell in cells for run in self.runs(cell)}
        ready = sum(done(run, self.workdir) is not None for run in names.values())
        log.info("%s: %d stages to train, %d of them done", self.recipe.name, len(names), ready)


@dataclasses.dataclass(frozen=True)
class _Sized:
    """Number and shape of images that need not exist."""

    count: int
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return self.count
