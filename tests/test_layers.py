"""Who may import what. A new file has to be entered here: where it stands is a decision."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The files of each folder, in order: a file imports only files before it.
FOLDERS = {
    "data": (
        "source",
        "split",
        "copies",
        "embedded",
        "files",
        "decode",
        "cache",
        "quality",
        "load",
        "prepared",
        "scored",
        "published",
        "batches",
    ),
    "views": ("pixels", "view", "augment"),
    "models": (
        "lowering",
        "fused",
        "conv",
        "norm",
        "pool",
        "forward",
        "blocks",
        "convnet",
        "vgg",
        "resnest",
        "residual",
        "resnet",
        "patchnet",
        "vit",
        "t2t",
        "efficientnet",
        "pvt",
        "probe",
        "catalogue",
        "__main__",
    ),
    "objectives": ("objective", "supervised", "regression", "rotation"),
    "train": ("schedule", "optimiser", "state", "step", "manifest", "checkpoint", "loop", "trunk", "nonfinite"),
    "weights": ("files", "names", "fit", "__main__"),
    "bench": ("peer", "turns", "step", "recipe", "patches", "__main__"),
    "evaluate": ("metrics", "regression", "features", "collapse", "answers", "probes", "statistics", "cam"),
}
# What a folder or file may import from the others, besides `errors`; only from rows above its own.
MAY_IMPORT = {
    "errors": (),
    "workdir": (),
    "tuning": (),
    "processes": (),
    "aggregate": (),
    "report": ("aggregate",),
    "figures": (),
    "figures_scores": ("figures",),
    "figures_data": ("figures",),
    "data": (),
    "views": ("data.source",),
    "models": ("tuning",),
    "objectives": ("views.augment", "views.pixels", "models.forward"),
    "train": (
        "objectives.objective",
        "models.forward",
        "data.source",
        "data.batches",
        "workdir",
        "tuning",
        "processes",
    ),
    "evaluate": ("data.source", "data.batches", "models.forward", "models.pool", "tuning"),
    "weights": ("workdir", "models", "train.checkpoint"),
    "named": (),
    "stage": ("workdir", "processes", "weights", "data", "views", "models.forward", "objectives.objective", "train"),
    "fits": ("weights", "data.source", "train.state", "stage"),
    "recipe": (
        "workdir",
        "processes",
        "data.source",
        "data.split",
        "views.view",
        "train",
        "evaluate",
        "stage",
        "fits",
    ),
    "measure": ("workdir", "figures", "data.source", "evaluate", "train.loop", "stage", "recipe"),
    "pictures": ("workdir", "figures", "figures_scores", "views.view", "evaluate", "stage", "recipe", "measure"),
    "build": ("data", "views", "models", "objectives", "train", "evaluate", "weights", "named", "stage", "recipe"),
    "command": (
        "workdir",
        "tuning",
        "processes",
        "aggregate",
        "report",
        "data",
        "train.loop",
        "recipe",
        "measure",
        "pictures",
        "build",
    ),
    "check_copies": ("figures_data", "data"),
    "check_pictures": ("figures_data", "data", "train", "stage", "recipe"),
    "check_data": ("figures", "figures_data", "data", "recipe", "build", "check_copies", "check_pictures"),
    "check_replay": ("data.source", "train", "stage", "recipe", "build"),
    "main": ("*",),
    "bench": ("*",),
    "check": ("*",),
}
COMMANDS = ("main", "bench.__main__", "check")
SLOW = {"jax", "flax", "optax", "orbax", "sklearn", "scipy", "matplotlib", "skimage", "mlxtend"}  # not before --help
FLAGS = {"absl", "ml_collections"}


def imports(module: str, source: str, known: set[str]) -> list[tuple[str, bool]]:
    """(imported module, whether at module level) of every import; names inside a package count as its modules."""
    tree, found = ast.parse(source), []
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            inner = [f"{base}.{alias.name}" for alias in node.names]
            found += [(name if name in known else base, id(node) in top) for name in inner]
    return found


def place(module: str) -> tuple[str, str]:
    """('train', 'step') of jaxsd.train.step; ('stage', '') of jaxsd.stage."""
    parts = [*module.split(".")[1:], "", ""]
    return parts[0], parts[1]


def listed(module: str) -> bool:
    room, file = place(module)
    if room in FOLDERS:
        return not file or file in FOLDERS[room]
    return not room or room in MAY_IMPORT


def allowed(module: str, target: str) -> bool:
    (room, file), (other, inner) = place(module), place(target)
    if room == other:
        order = FOLDERS.get(room, ())
        return not file or (inner in order and order.index(inner) < order.index(file))
    may = MAY_IMPORT.get(room, ())
    return other in ("", "errors") or "*" in may or other in may or f"{other}.{inner}" in may


def problems(sources: dict[str, str]) -> list[str]:
    """Everything that breaks the rules, one line each; sources: module name -> text."""
    known, wrong = {*sources, *(f"jaxsd.{room}" for room in MAY_IMPORT)}, []
    graph = {module: imports(module, source, known) for module, source in sources.items()}
    for module, found in graph.items():
        if not listed(module):
            wrong.append(f"{module} is new: enter it in tests/test_layers.py")
            continue
        room = place(module)[0]
        for target, top in found:
            package = target.split(".")[0]
            if package == "":
                wrong.append(f"{module} imports relatively: {target}")
            elif package == "jaxsd" and not allowed(module, target):
                wrong.append(f"{module} must not import {target}")
            elif package == "tensorflow_datasets" and (room != "data" or top):
                wrong.append(f"{module} must not import {package}, but in the loader that needs it")
            elif package == "tensorflow" or (package in FLAGS and room not in (*COMMANDS, "build")):
                wrong.append(f"{module} must not import {package}")
    for command in COMMANDS:
        reached, waiting = set(), [f"jaxsd.{command}"]
        while waiting:
            module = waiting.pop()
            if module in reached:
                continue
            reached.add(module)
            parts = module.split(".")
            waiting += [".".join(parts[:n]) for n in range(1, len(parts))]  # importing a.b imports a
            waiting += [target for target, top in graph.get(module, ()) if top]
        wrong += [f"{command} --help loads {package}" for package in sorted(reached & SLOW)]
    return wrong


def project() -> dict[str, str]:
    sources = {}
    for path in sorted((ROOT / "jaxsd").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        sources[name] = path.read_text()
    return sources


def test_imports_point_one_way():
    assert problems(project()) == []


def test_the_table_lists_what_there_is():
    there = {place(module) for module in project()}
    assert {(room, file) for room, files in FOLDERS.items() for file in files} - there == set()


def test_the_table_itself_points_up():
    rooms = list(MAY_IMPORT)
    for at, room in enumerate(rooms):
        for target in MAY_IMPORT[room]:
            other, _, file = target.partition(".")
            assert target == "*" or other in rooms[:at], f"{room} -> {target}"
            assert not file or file in FOLDERS[other], f"{room} -> {target}"


def test_configs_are_plain():
    for path in (ROOT / "configs").glob("*.py"):
        packages = {target.split(".")[0] for target, _ in imports(path.stem, path.read_text(), set())}
        assert not packages & (SLOW | {"tensorflow", "numpy"}), path


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("jaxsd.utils", "", "is new"),
        ("jaxsd.models.utils", "", "is new"),
        ("jaxsd.models.conv", "from jaxsd.data import source", "must not import jaxsd.data"),
        ("jaxsd.models.conv", "def f():\n    import jaxsd.models.resnet", "must not import jaxsd.models.resnet"),
        ("jaxsd.train.step", "from jaxsd.objectives import rotation", "must not import jaxsd.objectives"),
        ("jaxsd.train.step", "from jaxsd.train.loop import run", "must not import jaxsd.train.loop"),
        ("jaxsd.train.step", "from jaxsd.train import State", "must not import jaxsd.train"),
        ("jaxsd.train.step", "from .state import State", "relatively"),
        ("jaxsd.report", "from jaxsd.stage import Stage", "must not import jaxsd.stage"),
        ("jaxsd.data.source", "import tensorflow as tf", "must not import tensorflow"),
        ("jaxsd.data.source", "import tensorflow_datasets as tfds", "must not import tensorflow_datasets"),
        ("jaxsd.train.step", "from absl import flags", "must not import absl"),
        ("jaxsd.main", "import jax.numpy as jnp", "loads jax"),
        ("jaxsd.main", "from jaxsd.train.step import make_train_step", "loads jax"),
    ],
)
def test_the_check_sees_it(module, source, problem):
    files = {"jaxsd": "", "jaxsd.data": "", "jaxsd.train": "import jax", "jaxsd.train.step": "", "jaxsd.main": ""}
    assert problems(files) == []
    found = problems({**files, module: source})
    assert any(problem in line for line in found), found
