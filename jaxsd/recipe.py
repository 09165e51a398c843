"""Arms that share beginnings, over seeds, inputs and labelled subsets.

An arm is a path of stages; what two arms begin with in common is trained once.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsd import processes
from jaxsd.data.source import Source, Splits, standardisation
from jaxsd.data.split import split, subset
from jaxsd.errors import RunError, Stopped, UserError
from jaxsd.evaluate.answers import averaged
from jaxsd.evaluate.features import predict
from jaxsd.fits import check_fits, check_fresh, check_names
from jaxsd.stage import Run, Stage, Trained, check_folder, done, drawn, plan_of, restore, run_stage, train_run
from jaxsd.train.loop import Stop, Watch
from jaxsd.train.state import State, merge
from jaxsd.views.view import View, compose
from jaxsd.workdir import fingerprint, log, write_json

EVALUATIONS = ("pretext", "ridge", "knn", "probe", "finetune")
KEPT = 4  # trained networks kept in memory for the stages that follow


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is compared with what.

    arms: name -> stages from the root; the first stage on "labelled" images starts the downstream part. An arm without
        stages is what is reached without a network, from hand-made statistics of the images.
    inputs: name -> view of all images, training and test alike.
    subsets: name -> arguments of data.split.subset, for the stages that name it; labels: the same for the "labelled"
        images, each for a comparison of its own. Drawn anew for every seed.
    splits: name -> arguments of data.split.split, drawn anew for every seed from all images (with folds: another fold
        for every seed); none: the data's own.
    probes: arm -> frozen stage (linear probes on every block) run after the arm's pretext part.
    evaluations: any of EVALUATIONS.
    """

    name: str
    arms: Mapping[str, tuple[Stage, ...]]
    evaluations: tuple[str, ...]
    baseline: str
    seeds: tuple[int, ...] = (0, 1, 2)
    inputs: Mapping[str, View] = dataclasses.field(default_factory=lambda: {"original": compose()})
    subsets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {"unlabelled": {}})
    labels: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {"all": {}})
    splits: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    probes: Mapping[str, Stage] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.seeds or not all(type(seed) is int and 0 <= seed < 2**31 for seed in self.seeds):
            raise UserError(f"seeds must be whole numbers from 0, such as (0, 1, 2): got {self.seeds!r}")
        for key, values in (("seeds", self.seeds), ("evaluations", self.evaluations)):
            if len(set(values)) < len(values):
                raise UserError(f"{key} must be named once each: got {values!r}")
        for name, stages in self.arms.items():
            check_names(stages, f"arm {name!r}")
            downstream = [stage.downstream for stage in stages]
            if downstream != sorted(downstream):
                raise UserError(f"arm {name!r}: its pretext stages must come before those on labelled images")
        probed = [(*self.pretext(name), probe) for name, probe in self.probes.items()]
        check_fresh([*self.arms.values(), *probed])

    def pretext(self, arm: str) -> tuple[Stage, ...]:
        """The stages of an arm before its downstream part."""
        return tuple(stage for stage in self.arms[arm] if not stage.downstream)


class Cell(NamedTuple):
    """One arm under one input, one labelled subset, one seed and one way of splitting (None: the data's own)."""

    arm: str
    input: str
    labels: str
    seed: int
    split: str | None = None


class Viewed(NamedTuple):
    """The data under one input."""

    splits: Splits
    pretext: Source  # what the pretext stages draw from
    standard: tuple[np.ndarray, np.ndarray]  # of the training images at full size: one pair for all stages


class Experiment:
    """A recipe on given data, in a workdir: which runs there are, what they come from, their weights when asked for.

    pretext: images for the pretext stages in place of the training images; their labels are not read.
    """

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        workdir: Path,
        *,
        pretext: Source | None = None,
        stop: Stop | None = None,
        save_seconds: float = 60.0,
    ):
        self.recipe, self.splits, self.workdir, self.pretext = recipe, splits, Path(workdir), pretext
        self.stop, self.save_seconds = stop or Stop(), save_seconds
        self._pools: dict[str, Viewed] = {}
        self._viewed: dict[tuple, Viewed] = {}
        self._subsets: dict[tuple, tuple[Source, str]] = {}
        self._trained: dict[str, Trained] = {}  # by fingerprint, oldest first
        self._last: tuple[tuple, Any] | None = None
        self._said: set[tuple[str, int]] = set()  # stages and percent that were warned of
        self.reads = False  # whether only what has been measured already is asked for

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Nothing is measured meanwhile."""
        self.reads = True
        try:
            yield
        finally:
            self.reads = False

    def seeds(self) -> list[int]:
        """The recipe's seeds and those that other processes have begun in the workdir."""
        names = [path.stem for path in Path(self.workdir, "subsets").glob("*-seed*.json")]
        begun = {int(number) for name in names if (number := name.rpartition("-seed")[2]).isdigit()}
        return sorted({*self.recipe.seeds, *begun})

    def cells(self, only: tuple[str, ...] = (), *, seeds: Sequence[int] | None = None) -> Iterator[Cell]:
        """Every cell, seeds (the recipe's, or other ones) outermost: after each seed all arms can be compared."""
        ways: tuple[str | None, ...] = tuple(self.recipe.splits) or (None,)
        for seed in self.recipe.seeds if seeds is None else seeds:
            for name, way, labels in itertools.product(self.recipe.inputs, ways, self.recipe.labels):
                yield from (Cell(arm, name, labels, seed, way) for arm in self.recipe.arms if not only or arm in only)

    def viewed(self, cell: Cell) -> Viewed:
        """The data under an input, as the cell's seed and way of splitting part it."""
        if cell.split is None:
            return self._pool(cell.input)
        key = (cell.input, cell.split, cell.seed)
        if key not in self._viewed:
            pool, way = self._pool(cell.input), self.recipe.splits[cell.split]
            train, test = split(pool.splits.train, **way, seed=cell.seed)
            name = f"{cell.split}-seed{cell.seed}"
            self._note(f"splits-{name}.json", {"train": train.tolist(), "test": test.tolist()})
            images = pool.splits.train
            splits = pool.splits._replace(train=images.take(train), validation=None, test=images.take(test))
            pretext = pool.pretext if self.pretext is not None else splits.train
            self._viewed = {kept: value for kept, value in self._viewed.items() if kept[-1] == cell.seed}
            self._viewed[key] = Viewed(splits, pretext, standardisation(splits.train))
        return self._viewed[key]

    def _pool(self, name: str) -> Viewed:
        """All data under an input."""
        if name not in self._pools:
            view, splits = self.recipe.inputs[name], self.splits
            rest = (view(part) if part is not None else None for part in (splits.validation, splits.test))
            train, (validation, test) = view(splits.train), rest
            splits = splits._replace(train=train, validation=validation, test=test)
            pretext = view(self.pretext) if self.pretext is not None else splits.train
            self._pools[name] = Viewed(splits, pretext, standardisation(splits.train))
        return self._pools[name]

    def standard(self, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation [C] that all networks of the cell's arm take from the images in [0, 1].

        Those of the training images at full size, or of the published weights that the arm begins with.
        """
        ours, first = self.viewed(cell).standard, self.recipe.arms[cell.arm][0]
        return ours if first.init is None else first.init.standard(ours)

    def given(self, cell: Cell, on: str) -> tuple[Source, str]:
        """The images that a stage of the cell sees, and their fingerprint."""
        labelled = on == "labelled"
        key = (cell.input, cell.split, on, cell.labels if labelled else None, cell.seed)
        if key not in self._subsets:
            viewed = self.viewed(cell)
            pool = viewed.splits.train if labelled else viewed.pretext
            kind, name = ("labels", cell.labels) if labelled else ("subsets", on)
            try:
                rows = subset(pool, **(self.recipe.labels if labelled else self.recipe.subsets)[name], seed=cell.seed)
            except UserError as error:
                raise UserError(f"{kind} {name!r}: {error}; see --config.{kind}.{name}") from error
            source = pool if len(rows) == len(pool) else pool.take(rows)
            place = "-".join([*([cell.split] if cell.split else []), f"{kind}-{name}-seed{cell.seed}.json"])
            self._note(place, rows.tolist())
            self._subsets = {kept: value for kept, value in self._subsets.items() if kept[-1] == cell.seed}
            self._subsets[key] = (source, source.fingerprint())
        return self._subsets[key]

    def _note(self, name: str, rows: Any) -> None:
        """Writes down which images are in a part of the data."""
        if processes.leads():
            write_json(self.workdir / "subsets" / name, rows)

    def runs(self, cell: Cell, *, probe: bool = False) -> list[Run]:
        """The cell's runs from the root; with `probe` those of the pretext part and the probe on it."""
        stages = list(self.recipe.arms[cell.arm])
        if probe:
            stages = [*self.recipe.pretext(cell.arm), self.recipe.probes[cell.arm]]
        path, forked = [cell.input, *([cell.split] if cell.split else [])], False
        runs: list[Run] = []
        for stage in stages:
            if stage.on == "labelled" and not forked:
                path.append(cell.labels)
                forked = True
            path.append(stage.name)
            parent = runs[-1].fingerprint() if runs else None
            stage = self._matched(stage, cell)
            data, standard = self.given(cell, stage.on)[1], self.standard(cell)
            test = self.viewed(cell).splits.test
            if stage.best_test and test is not None:  # then the journal holds what was measured on them
                data = fingerprint([data, test.fingerprint(), stage.average])
            runs.append(Run(stage, tuple(path), cell.seed, data, parent, standard))
        return runs

    def _matched(self, stage: Stage, cell: Cell) -> Stage:
        """The stage with as many epochs as show the pixels of the stages that it is to match."""
        if not stage.match:
            return stage
        known = {other.name: other for arm in self.recipe.arms.values() for other in arm}
        matched = [self._matched(known[name], cell) for name in stage.match]
        target = sum(self._pixels(other, cell, other.epochs) for other in matched)
        one = self._pixels(stage, cell, 1)
        epochs = max(1, round(target / one))
        percent = round(100 * epochs * one / target)
        if abs(epochs * one / target - 1) > 0.02 and not self.reads and (stage.name, percent) not in self._said:
            self._said.add((stage.name, percent))
            log.warning("%s: whole epochs show %d %% of the pixels to match", stage.name, percent)
        return stage.stretched(epochs)

    def _pixels(self, stage: Stage, cell: Cell, epochs: int) -> float:
        source, _ = self.given(cell, stage.on)
        one = stage.view(source.take([0]))
        height, width, _ = one.shape
        return stage.pixels(len(source) * len(one), (height, width), epochs)

    def trained(self, cell: Cell, runs: list[Run]) -> Trained:
        """The weights at the end of a path of runs: from memory, from disk, or trained now."""
        run = runs[-1]
        name = run.fingerprint()
        self.look()
        if name not in self._trained:
            source, _ = self.given(cell, run.stage.on)
            value = restore(run, source, self.workdir)
            if value is None:
                value = run_stage(
                    run,
                    source,
                    parent=self.trained(cell, runs[:-1]) if len(runs) > 1 else None,
                    workdir=self.workdir,
                    validation=self.viewed(cell).splits.validation,
                    test=self._on_test(cell, run.stage) if run.stage.best_test else None,
                    stop=self.stop,
                    save_seconds=self.save_seconds,
                )
            while len(self._trained) >= KEPT:
                self._trained.pop(next(iter(self._trained)))
            self._trained[name] = value
        return self._trained[name]

    def _on_test(self, cell: Cell, stage: Stage) -> Callable[[State], dict[str, float]] | None:
        """Accuracy or mean absolute error on the test images, for papers that choose the best epoch by them."""
        test = self.viewed(cell).splits.test
        if test is None:
            return None
        viewed = stage.view(test)

        def check(state: State) -> dict[str, float]:
            params, collections = merge(state.params, state.frozen), state.extra["model"]
            outputs = predict(stage.model, params, collections, viewed.images, grid=viewed.grid)
            answers = averaged(outputs, viewed.patches, stage.average)
            if test.scores is not None:
                return {"mae": float(np.abs(answers[:, 0] * stage.objective.scale - test.scores).mean())}
            return {"accuracy": float((answers.argmax(-1) == test.labels).mean())}

        return check

    def look(self) -> None:
        """Raises Stopped after a signal; what is running looks for itself."""
        if self.stop.signal is not None:
            raise Stopped("stopped between two stages; the same command goes on from there", self.stop.signal)

    def train(self, cell: Cell) -> None:
        """Trains what the cell still lacks, probes included."""
        paths = [self.runs(cell)]
        if self._probes(cell):
            paths.append(self.runs(cell, probe=True))
        for runs in paths:
            if runs and done(runs[-1], self.workdir) is None:
                self.trained(cell, runs)

    def _probes(self, cell: Cell) -> bool:
        return "probe" in self.recipe.evaluations and cell.arm in self.recipe.probes

    def untrained(self, cell: Cell, stage: Stage) -> Trained:
        """The network of a stage as it begins, before any training: what learned features are compared with."""
        source, _ = self.given(cell, stage.on)
        run = Run(stage, ("untrained",), cell.seed, "", None, self.standard(cell))
        return drawn(run, source)

    def remembered(self, what: tuple, compute: Callable[[], Any]) -> Any:
        """The value computed last, if it was of the same thing."""
        if self._last is None or self._last[0] != what:
            self._last = (what, compute())
        return self._last[1]

    def all_runs(self, cells: list[Cell]) -> list[Run]:
        """Every run of the cells, probes included, once."""
        found: dict[str, Run] = {}
        for cell in cells:
            for run in self._runs_and_probe(cell):
                found.setdefault(run.fingerprint(), run)
        return list(found.values())

    def _runs_and_probe(self, cell: Cell) -> list[Run]:
        return self.runs(cell) + (self.runs(cell, probe=True) if self._probes(cell) else [])

    def follow(self, cells: list[Cell]) -> int:
        """What the other processes do: takes part in every run that process 0 trains; returns its exit status.

        Raises RunError where process 0 trains something that is not among the cells' runs.
        """
        known = {run.fingerprint(): (cell, run) for cell in cells for run in self._runs_and_probe(cell)}
        while (said := processes.hear().split())[0] == "train":
            if said[1] not in known:
                raise RunError("this process has other data or another config than process 0: give all the same")
            cell, run = known[said[1]]
            # The weights come from process 0, published ones too.
            run = run._replace(stage=dataclasses.replace(run.stage, init=None))
            with contextlib.suppress(RunError, Stopped, UserError):  # process 0 meets the same, and reports it
                train_run(run, self.given(cell, run.stage.on)[0], None, Watch(stop=self.stop))
        return int(said[1])

    def _check_fits(self, cells: list[Cell]) -> None:
        """Raises UserError where a network that is still to be trained does not take its images or its first weights.

        Before any is trained.
        """
        known: dict[tuple[str, ...], Trained] = {}
        for cell in cells:
            for runs in (self.runs(cell), self.runs(cell, probe=True) if self._probes(cell) else []):
                place, begun = (cell.input,), None
                for run in runs if any(done(run, self.workdir) is None for run in runs) else []:
                    place = (*place, run.stage.name)
                    if place not in known:
                        known[place] = check_fits(run.stage, self.given(cell, run.stage.on)[0], begun)
                    begun = known[place]

    def _check_shared(self, cells: list[Cell]) -> None:
        """Raises UserError where several processes cannot train together what is still to be trained."""
        for cell in cells if processes.several() else ():
            for run in self._runs_and_probe(cell):
                if done(run, self.workdir) is not None:
                    continue
                stage, source = run.stage, self.given(cell, run.stage.on)[0]
                if stage.trunk == "disk":
                    raise UserError(f"stage {stage.name!r}: trunk='disk' is for a single process: choose 'host'")
                images = len(source) * len(stage.view(source.take([0])))
                try:
                    processes.mesh(plan_of(stage, run.key(), images).batch_size)
                except UserError as error:
                    raise UserError(f"stage {stage.name!r}: {error}") from error

    def check(self, cells: list[Cell], *, reuse: bool = False) -> int:
        """How many stages are still to be trained.

        Raises UserError where the workdir holds stages that were made otherwise, naming what differs, where a network
        does not take its images or what it begins with, or where several processes cannot train together.
        """
        runs = self.all_runs(cells)
        self._check_fits(cells)
        self._check_shared(cells)
        lines = [line for run in runs for line in check_folder(run, self.workdir, reuse=reuse, stop=self.stop)]
        if lines:
            shown = "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")
            raise UserError(
                f"{self.workdir} holds stages that were made otherwise: {shown}; take another --workdir, or --reuse to "
                "keep the stages that match and train the others again"
            )
        missing = sum(done(run, self.workdir) is None for run in runs)
        log.info("%s: %d stages, %d to train", self.recipe.name, len(runs), missing)
        return missing
