"""Runs that are killed and started again end bit for bit as one that is not.

As a program (`python tests/test_resume.py FOLDER APART`) this trains a small experiment in FOLDER, about 900 changes of
files, killing itself before a random change of the next APART and starting again, until it is done; APART 0: no kills.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxsd import objectives
from jaxsd.aggregate import aggregate
from jaxsd.check import compare
from jaxsd.data.embedded import digits
from jaxsd.measure import measure
from jaxsd.recipe import Experiment, Recipe
from jaxsd.stage import Stage
from jaxsd.train import optimiser, schedule
from jaxsd.views.augment import flip_horizontal
from jaxsd.workdir import write_json

ROOT = Path(__file__).parents[1]
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


def train_all(folder):
    """Two pretext stages, a task with a frozen part and validation, each state saved; the summary at the end."""
    from small import Small  # it starts a backend of jax

    def stage_of(name, model, objective, **options):
        tx, rates = optimiser.with_rate(optimiser.adam()), schedule.cosine(0.01)
        augment = flip_horizontal()
        return Stage(name, model, objective, tx, rates, 2, 32, augment=augment, spec={"is": name}, **options)

    pretext, model = Small(outputs=4), Small(outputs=10, frozen=("block1",))
    rotation, task = objectives.rotation(pretext), objectives.supervised(model)
    stages = (
        stage_of("one", pretext, rotation),
        stage_of("two", pretext, rotation),
        stage_of("task", model, task, on="labelled", fresh=("head",), freeze=("block1",)),
    )
    recipe = Recipe(
        name="killed",
        arms={"pretrained": stages},
        evaluations=("finetune",),
        baseline="pretrained",
        seeds=(0,),
        subsets={"unlabelled": {"total": 40}},
        labels={"few": {"per_class": 5}},
    )
    experiment = Experiment(recipe, digits(validation=0.1), folder, save_seconds=0)
    cells = list(experiment.cells())
    experiment.check(cells)
    rows = [row for cell in cells for row in measure(experiment, cell)]
    write_json(folder / "summary.json", {"rows": aggregate(rows, baseline="pretrained")})


def kill_at(moment, folder):
    """Ends this process, as by SIGKILL, before its `moment`-th change of a file below the folder."""
    count = itertools.count(1)

    def watch(event, arguments):
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in WRITES) and str(arguments[0]).startswith(str(folder)) and next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def main(folder, apart):
    """Prints how often it was killed."""
    moments, kills = random.Random(apart), 0
    while True:
        moment = moments.randint(1, max(apart, 1))
        child = os.fork()  # no backend of jax is up yet in this process
        if child == 0:
            if apart:
                kill_at(moment, folder)
            train_all(folder)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            print(kills)
            return status
        kills += 1


def killed_along(folder, apart):
    """Runs this file as a program; returns how often it was killed."""
    from conftest import CACHE  # not where this runs as the program

    command = [sys.executable, __file__, str(folder), str(apart)]
    cache = {  # what is compiled once is there when it starts again
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "resume"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    path = {**os.environ, "PYTHONPATH": str(ROOT), **cache}
    done = subprocess.run(command, env=path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "straight"
    assert killed_along(folder, 0) == 0
    return folder


@pytest.mark.parametrize(
    ("apart", "least"),
    [(300, 3), pytest.param(60, 20, marks=pytest.mark.slow), pytest.param(50, 20, marks=pytest.mark.slow)],
)
def test_killed_before_any_write(straight, tmp_path, apart, least):
    """Between done.json and evaluations, in Orbax's renames, in the journal: wherever a file is about to change."""
    assert killed_along(tmp_path / "killed", apart) >= least
    assert compare(straight, tmp_path / "killed") == []


# the command line


def started(arm, workdir):
    from conftest import CACHE

    flags = [f"--only={arm}", "--config.seeds=(0,)", "--config.save_seconds=0.3", "--config.attention=False"]
    flags += ["--config.evaluations=('finetune',)", "--config.stages.finetune.epochs=8"]
    config = f"--config={ROOT / 'configs/scalenet.py'}:tiny"
    return subprocess.Popen(
        [sys.executable, "-m", "jaxsd.main", config, f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(CACHE)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def epochs_in(workdir):
    folders = os.walk(workdir / "stages")  # unlike glob it bears folders that vanish meanwhile
    journals = [Path(folder, name) for folder, _, names in folders for name in names if name == "metrics.jsonl"]
    return sum(path.read_text().count("\n") for path in journals)


def wait_for(what, process):
    while not what() and process.poll() is None:
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("arm", "total", "kills"), [("scratch", 8, 0), pytest.param("scalenet", 11, 25, marks=pytest.mark.slow)]
)
def test_the_command_killed_stopped_and_finished(tmp_path, arm, total, kills):
    """SIGKILL, if any, a random while after the data are read; SIGTERM or SIGINT: saved, one line; then on."""
    process = started(arm, tmp_path / "straight")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    killed, random_ = tmp_path / "killed", random.Random(0)
    lines = killed / "log.txt"
    for _ in range(kills):
        before = lines.read_text() if lines.exists() else ""
        process = started(arm, killed)
        wait_for(lambda before=before: lines.exists() and lines.read_text() != before, process)  # it has its data
        end = time.monotonic() + random_.uniform(0, 5)
        wait_for(lambda end=end: time.monotonic() > end or epochs_in(killed) >= total - 4, process)
        process.kill()
        process.communicate()
    process = started(arm, killed)
    wait_for(lambda: epochs_in(killed) >= total - 2, process)
    asked = signal.SIGINT if kills else signal.SIGTERM
    process.send_signal(asked)
    _, errors = process.communicate()
    assert process.returncode == 128 + asked, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("jaxsd: stopped at ") and last.endswith("saved; the same command goes on from there")
    assert "Traceback" not in errors
    process = started(arm, killed)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "continues at step" in errors
    assert compare(tmp_path / "straight", killed) == []


if __name__ == "__main__":
    import conftest  # noqa: F401  compiled programs are kept where the tests keep theirs
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
