"""From a config to a recipe: the only file that sees a config, and the only one with tables of names."""

import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxsd import data, models, weights
from jaxsd.data.source import Source, Splits
from jaxsd.data.split import check_amount, check_way, split, subset
from jaxsd.errors import UserError
from jaxsd.evaluate import answers
from jaxsd.models.catalogue import options
from jaxsd.models.probe import LinearProbe
from jaxsd.named import arguments, call, check, check_call, check_keys, check_known, pick
from jaxsd.objectives.regression import regression
from jaxsd.objectives.rotation import TURNS, rotation
from jaxsd.objectives.supervised import supervised
from jaxsd.recipe import EVALUATIONS, Recipe
from jaxsd.stage import Stage
from jaxsd.train import optimiser, schedule, trunk
from jaxsd.views import augment, view

DATA = {
    "mnist5k": data.mnist5k,
    "digits": data.digits,
    "photos": data.photos,
    "photos_quality": data.photos_quality,
    "folder": data.folder,
    "arrays": data.arrays,
    "tfds": data.tfds,
    "table": data.table,
    "live": data.live,
    "live_itw": data.live_itw,
    "koniq": data.koniq,
    "kadid": data.kadid,
    "tid2013": data.tid2013,
    "indoor67": data.indoor67,
}
VIEWS = {
    "scale": view.scale,
    "stretch": view.stretch,
    "gray": view.gray,
    "harris": view.harris,
    "patches": view.patches,
}
AUGMENTS = {
    "pad_crop": augment.pad_crop,
    "flip_horizontal": augment.flip_horizontal,
    "flip_vertical": augment.flip_vertical,
}
# name: (objective, how many outputs it needs of a network for data with so many classes)
OBJECTIVES = {
    "rotation": (rotation, lambda classes, turns=TURNS, **_: len(turns)),
    "supervised": (supervised, lambda classes, **_: classes),
    "regression": (regression, lambda classes, **_: 1),
}
OPTIMISERS = {"sgd": optimiser.sgd, "adam": optimiser.adam, "adamw": optimiser.adamw, "lars": optimiser.lars}
SCHEDULES = {"constant": schedule.constant, "steps": schedule.steps, "cosine": schedule.cosine}
AROUND = {"optimiser": ("clip_norm", "accumulate"), "schedule": ("warmup",)}  # arguments whatever the name

ANY_SIDE = 1 << 16  # pixels: where the images are not known yet, networks are made for some larger than any
STAGE_KEYS = (
    "objective", "optimiser", "schedule", "epochs", "batch_size", "on", "view", "augment", "epoch_images", "drop_last",
    "match", "fresh", "freeze", "model", "trunk", "average", "best_test", "start",
)  # fmt: skip
BESIDE = ("trunk", "average", "best_test")
STARTS = ("weights", "random")  # of a stage with none before it: config.init's weights where there are any, or a draw
CONFIG_KEYS = (
    "name", "preset", "data", "pretext_data", "inputs", "splits", "subsets", "labels", "model", "stages", "arms",
    "probe", "evaluations", "seeds", "baseline", "attention", "save_seconds", "init",
)  # fmt: skip

Config = Mapping[str, Any]


def load(config: Config) -> Splits:
    """Reads the data that a config names."""
    return call(DATA, config["data"], "data")


def load_pretext(config: Config, splits: Splits) -> Source | None:
    """The images of the pretext stages where the config names a set of their own; all are used, none held out."""
    spec = config["pretext_data"]
    if not _has_pretext(spec):
        return None
    source = call(DATA, {**spec, "test": 0.0} if spec["name"] in ("folder", "tfds") else spec, "pretext_data").train
    if source.shape != splits.train.shape:
        raise UserError(
            f"pretext_data: images of {source.shape}, but data has {splits.train.shape}: give both one size"
        )
    return source


def _has_pretext(spec: Config | None) -> bool:
    return spec is not None and (spec["name"] != "folder" or spec.get("path") is not None)


def recipe(
    config: Config,
    shape: tuple[int, int, int] | None = None,
    classes: int = 10,
    *,
    scored: bool | None = None,
) -> Recipe:
    """The recipe that a config (as a plain dict) describes, for images of a shape [H, W, C] and so many classes.

    shape: None where it is not known yet: then no network is refused for the size of the images. scored: whether the
    images have scores; None where that is not known yet.

    Raises UserError at anything that the functions named in it would not take; no data are read.
    """
    try:
        return _recipe(config, shape, classes, scored)
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # a value of the wrong kind, somewhere inside
        raise UserError(f"the config has a value that does not fit ({type(error).__name__}: {error})") from error


def takes(config: Config, path: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments that the name at a place of the config takes; path: ("stages", "finetune", "optimiser")."""
    spec = functools.reduce(lambda part, key: part[key], path, config)
    if path[-1] == "model":
        return (*options(spec["name"]), "dtype", "remat")
    tables = {"data": DATA, "pretext_data": DATA, "optimiser": OPTIMISERS, "schedule": SCHEDULES}
    function = tables.get(path[-1], {}).get(spec["name"])
    if function is None:
        return tuple(spec)
    known = tuple(inspect.signature(function).parameters)
    return (*known, *AROUND.get(path[-1], ()), *(["shares"] if "milestones" in known else []))


def _recipe(config: Config, shape: tuple[int, int, int] | None, classes: int, scored: bool | None) -> Recipe:
    _check_config(config, classes)
    config = {**config, "stages": {name: _like(config["stages"], name) for name in config["stages"]}}
    build = _Builder(config, max(shape[:2]) if shape is not None else ANY_SIDE, classes)
    stages = {name: build.stage(name, part) for name, part in config["stages"].items()}
    arms = _arms(config, stages, answered=bool(classes or scored))
    _check_stages(config, stages, arms, classes, scored)
    baseline = pick({name: name for name in config["arms"]}, config["baseline"], "baseline: arm")
    return Recipe(
        name=config["name"],
        arms=arms,
        evaluations=tuple(config["evaluations"]),
        baseline=baseline if baseline in arms else next(iter(arms)),
        seeds=tuple(config["seeds"]),
        splits=splits(config),
        inputs={name: view.compose(*(_view(part) for part in parts)) for name, parts in config["inputs"].items()},
        subsets=_amounts(config, "subsets"),
        labels=_amounts(config, "labels"),
        probes=build.probes(arms) if config["probe"] is not None and classes else {},
    )


def _check_config(config: Config, classes: int) -> None:
    """Raises UserError for what is wrong whatever the stages are."""
    check_keys(config, CONFIG_KEYS, "config")
    if not 0 <= config["save_seconds"] < math.inf:
        raise UserError(f"save_seconds must be a number of seconds from 0, got {config['save_seconds']}")
    check_call(DATA, config["data"], "data")
    if config["pretext_data"] is not None:
        spec = config["pretext_data"]
        function = pick(DATA, spec["name"], "pretext_data")
        (check if _has_pretext(spec) else check_known)(function, arguments(spec), f"pretext_data {spec['name']!r}")
    if _has_pretext(config["pretext_data"]) and (config["probe"] or {}).get("on") == "pretext":
        raise UserError("probe.on='pretext' needs labels for the pretext images: leave pretext_data out")
    if classes == 1:
        raise UserError("the training images have one class only: there is nothing to tell apart")
    if any(part["name"] == "patches" for parts in config["inputs"].values() for part in parts):
        raise UserError("inputs: patches are a stage's view, not an input of all stages: give them to the stages")
    if not config["evaluations"]:
        raise UserError(f"evaluations must be one or more of {', '.join(EVALUATIONS)}: got ()")
    for name in config["evaluations"]:
        pick(dict.fromkeys(EVALUATIONS), name, "evaluations")


def _arms(config: Config, stages: Mapping[str, Stage], *, answered: bool) -> dict[str, tuple[Stage, ...]]:
    """The arms' stages; where nothing is labelled or scored (not `answered`), their pretext parts."""
    for name, arm in config["arms"].items():
        for stage in arm:
            pick(stages, stage, f"arm {name!r}: stage")
    arms = {name: tuple(stages[stage] for stage in arm) for name, arm in config["arms"].items()}
    if answered:
        return arms
    cut = {name: tuple(stage for stage in arm if not stage.downstream) for name, arm in arms.items()}
    if not any(cut.values()):
        raise UserError("nothing is labelled or scored, and no arm has a pretext stage: use class folders or scores")
    return {name: arm for name, arm in cut.items() if arm}


def _check_stages(
    config: Config,
    stages: Mapping[str, Stage],
    arms: Mapping[str, tuple[Stage, ...]],
    classes: int,
    scored: bool | None,
) -> None:
    """Raises UserError where stages name what there is not, or ask for what the images or weights do not have."""
    used = {stage.name: stage for arm in arms.values() for stage in arm}
    for first in (arm[0] for arm in arms.values() if arm and arm[0].init is not None):
        try:
            weights.check(first.model)
        except UserError as error:
            raise UserError(f"--config.init.weights: stage {first.name!r}: {error}") from error
    for name, stage in used.items():
        _check_answers(name, config["stages"][name]["objective"]["name"], stage, classes, scored)
    for stage in stages.values():
        pick({"labelled": None, **config["subsets"]}, stage.on, f"stage {stage.name!r}: on")
        for name in stage.match if stage.name in used else ():
            pick(stages, name, f"stage {stage.name!r}: match")
            if name not in used:
                raise UserError(f"stage {stage.name!r}: match: {name!r} is in no arm and shows no pixels: leave it out")


def _check_answers(name: str, objective: str, stage: Stage, classes: int, scored: bool | None) -> None:
    """Raises UserError where a stage asks for what the images do not have."""
    if objective == "supervised" and not classes:
        raise UserError(
            f"stage {name!r} learns classes, but the images have none: give labels, or learn scores "
            "(a preset such as configs/patches.py:scores)"
        )
    if objective == "regression" and scored is False:
        raise UserError(
            f"stage {name!r} learns scores, but the images have none: give scores, or learn classes "
            "(a preset such as configs/patches.py:folder)"
        )
    if stage.best_test and not stage.downstream:
        raise UserError(f"stage {name!r}: best_test is for stages on 'labelled' images")


def splits(config: Config) -> Config:
    """Arguments of data.split.split by name; 0 takes a number away, and with all its numbers the split itself."""
    found = {}
    for name, part in (config.get("splits") or {}).items():
        check(split, part, f"splits {name!r}", given=("source", "seed"))
        numbers = [part[key] for key in ("test", "folds") if key in part]
        if not numbers or any(numbers):
            found[name] = {key: value for key, value in part.items() if value}
            _within(f"splits {name!r}", check_way, found[name])
    return found


def _like(stages: Config, name: str) -> Config:
    """A stage's part of the config, with what it leaves out taken from the stage that it is `like`."""
    part = stages[name]
    if "like" not in part:
        return part
    other = pick(stages, part["like"], f"stage {name!r}: like")
    if "like" in other:
        raise UserError(f"stage {name!r}: like {part['like']!r}, which is like another itself: name that one")
    return {**other, **{key: value for key, value in part.items() if key != "like"}}


def _amounts(config: Config, kind: str) -> dict[str, Config]:
    """Arguments of data.split.subset by name; 0 stands for not given: so the command line can take a number away."""
    found = {}
    for name, part in config[kind].items():
        check(subset, part, f"{kind} {name!r}", given=("source", "seed"))
        found[name] = {key: value for key, value in part.items() if value}
        _within(f"{kind} {name!r}", check_amount, found[name])
    return found


def _within(where: str, checked: Callable, given: Config) -> None:
    """Calls a check; its error says where."""
    try:
        checked(**given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


class _Builder:
    """Makes stages; equal parts become the same object, so that stages which ask the same share a compilation."""

    def __init__(self, config: Config, side: int, classes: int):
        self.config, self.model, self.side, self.classes = config, dict(config["model"]), side, classes
        self.init = _init(config.get("init") or {})
        self._made: dict[str, Any] = {}

    def once(self, what: Any, make: Callable[[], Any]) -> Any:
        key = json.dumps(what, sort_keys=True)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def stage(self, name: str, part: Config) -> Stage:
        check_keys(part, STAGE_KEYS, f"stage {name!r}")
        function, count = self._objective(part)
        network = {**self.model, **part.get("model", {}), "outputs": count, "resolution": self.side}
        network["frozen"] = tuple(part.get("freeze", ()))
        model = self.once(["model", network], lambda: models.build(**network))
        return self._finish(name, part, model, network, function)

    def probes(self, arms: Mapping[str, tuple[Stage, ...]]) -> dict[str, Stage]:
        """For each arm with a pretext part the probes on its end."""
        ends = {name: [stage for stage in arm if not stage.downstream][-1:] for name, arm in arms.items()}
        return {
            name: self.probe(self.config["probe"], stage, self.config["stages"][stage.name])
            for name, end in ends.items()
            for stage in end
        }

    def probe(self, part: Config, pretext: Stage, pretext_part: Config) -> Stage:
        check_keys(part, STAGE_KEYS, "probe")
        _, count = self._objective(pretext_part)
        trunk = {**self.model, **pretext_part.get("model", {}), "outputs": count, "resolution": self.side}
        network = {"trunk": trunk, "outputs": self.classes}
        on = pretext.on if part.get("on") == "pretext" else "labelled"
        part = {"objective": {"name": "supervised"}, **part, "on": on, "freeze": ("trunk",)}
        model = self.once(["probe", network], lambda: LinearProbe(models.build(**trunk), outputs=self.classes))
        return self._finish("probe", part, model, network, supervised, under="trunk")

    def _objective(self, part: Config) -> tuple[Callable, int]:
        function, outputs = pick(OBJECTIVES, part["objective"]["name"], "objective")
        return function, outputs(self.classes, **arguments(part["objective"]))

    def _finish(self, name: str, part: Config, model: Any, network: Any, function: Callable, under: str = "") -> Stage:
        where = f"stage {name!r}"
        asked = arguments(part["objective"])
        check(function, asked, f"{where}: objective {part['objective']['name']!r}", given=("model",))
        objective = self.once(["objective", network, part["objective"]], lambda: function(model, **asked))
        augments = [call(AUGMENTS, one, f"{where}: augment") for one in part.get("augment", ())]
        for key in ("epochs", "batch_size"):
            if not isinstance(part.get(key, 1), int) or part.get(key, 1) < 1:
                raise UserError(f"{where}: {key} must be a whole number of 1 or more, got {part[key]!r}")
        names = ("on", "batch_size", "epoch_images", "drop_last", "match", "fresh", "freeze", *BESIDE)
        pick(dict.fromkeys(trunk.PLACES), part.get("trunk", "auto"), f"{where}: trunk")
        pick(dict.fromkeys(answers.AVERAGES), part.get("average", "probability"), f"{where}: average")
        plain = {k: part[k] for k in names if k in part}
        plain["fresh"] = tuple(
            one for name in part.get("fresh", ()) for one in (_top(model) if name == "top" else [name])
        )
        pick(dict.fromkeys(STARTS), part.get("start", "weights"), f"{where}: start")
        spec = {k: v for k, v in part.items() if k not in ("epochs", "match", "on", "trunk", "average", "start")}
        return Stage(
            name=name,
            model=model,
            objective=objective,
            optimiser=self.once(["optimiser", part["optimiser"]], lambda: _optimiser(part["optimiser"], where)),
            schedule=_schedule(part["schedule"], part["epochs"], where),
            epochs=part["epochs"],
            view=view.compose(*(_view(one) for one in part.get("view", ()))),
            augment=augment.chain(*augments) if augments else None,
            under=under,
            init=self.init if part.get("start") != "random" else None,
            spec=json.loads(json.dumps({"network": network, **spec})),
            **plain,
        )


def _init(part: Config) -> weights.Published | None:
    """The published weights that the first stage of every arm begins with, if the config names any."""
    check_known(weights.published, part, "init")
    if not part.get("weights"):
        if part.get("standardise", "auto") != "auto":
            raise UserError("--config.init.standardise says how published weights saw images: give init.weights too")
        return None
    try:
        found = weights.published(**part)
        return found._replace(name=f"{found.name} (--config.init.weights)")
    except UserError as error:
        raise UserError(f"--config.init.weights: {error}") from error


def _top(model: Any) -> list[str]:
    """What stands behind a network's blocks: its dense layers and head."""
    last = model.parts.index(model.blocks[-1])
    return list(model.parts[last + 1 :])


def _optimiser(spec: Config, where: str) -> Any:
    make = call(OPTIMISERS, {k: v for k, v in spec.items() if k not in AROUND["optimiser"]}, f"{where}: optimiser")
    if spec.get("clip_norm") is not None:
        make = optimiser.clip_norm(make, spec["clip_norm"])
    return optimiser.with_rate(optimiser.accumulate(make, spec.get("accumulate", 1)))


def _schedule(spec: Config, epochs: int, where: str) -> schedule.Schedule:
    """The schedule; `shares` of the epochs may stand for milestones, and follow when the epochs are overridden."""
    plain = {k: v for k, v in spec.items() if k not in ("warmup", "shares")}
    if "shares" in spec:
        if not all(0 < share < 1 for share in spec["shares"]):
            raise UserError(f"{where}: schedule shares {spec['shares']} must be parts of the epochs, between 0 and 1")
        plain["milestones"] = tuple(share * epochs for share in spec["shares"])
    made = call(SCHEDULES, plain, f"{where}: schedule")
    warm = spec.get("warmup")
    if warm is None:
        return made
    check(schedule.warmup, warm, f"{where}: schedule warmup", given=("schedule",))
    return schedule.warmup(made, **warm)


def _view(spec: Config) -> Callable:
    if not isinstance(spec, Mapping) or spec.get("name") != "hybrid":
        return call(VIEWS, spec, "view")
    given = arguments(spec)
    inner = _view(given.pop("view"))
    check(view.hybrid, given, "view 'hybrid'", given=("view",))
    return view.hybrid(inner, **given)
