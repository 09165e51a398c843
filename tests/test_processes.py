"""Processes that train as one, and processes that share a workdir."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import CACHE
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from small import same, state_of

from jaxsd import command, main, processes, report
from jaxsd.errors import RunError, Stopped, UserError
from jaxsd.train import loop

ROOT = Path(__file__).parents[1]
KEPT = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(CACHE), "JAX_NUM_CPU_DEVICES": "2"}
# Ten epochs of four steps, so that there is something to interrupt.
LONG = {"seeds": (0,), "evaluations": ("finetune",), "save_seconds": 0.1, "stages.finetune.epochs": 10}
OPTIONS = [f"--config.{name}={value}" for name, value in LONG.items()]
FLAGS = ("--config=configs/scalenet.py:tiny", "--only=scratch", *OPTIONS)
STAGE = "stages/original/few/finetune/seed0"
WITHIN = 60  # seconds in which a process notices that another is gone
NOTICED_SOON = "import sys; from jaxsd import main, processes; processes.SILENCE = 12; sys.exit(main.main(sys.argv))"


def config_of(**changes):
    """The tiny config with other values, by dotted keys, as the command line makes it."""
    spec = importlib.util.spec_from_file_location("scalenet", ROOT / "configs/scalenet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny")
    config.update_from_flattened_dict(changes)
    return main.plain(config)


def entries(workdir):
    """What has been logged of the fine-tuning, without times."""
    path = workdir / STAGE / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Pair:
    """Two processes of two devices each that train together; `program`: what they run, as Python is told it."""

    def __init__(self, workdir, program=("-m", "jaxsd.main")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = [*FLAGS, f"--workdir={workdir}", f"--coordinator={address}", "--processes=2"]
        self.children = [
            subprocess.Popen(
                [sys.executable, *program, *flags, f"--process={i}"],
                cwd=ROOT,
                env=KEPT,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )  # fmt: skip
            for i in range(2)
        ]
        self.workdir = workdir

    def signal_second(self, number):
        """Once they have trained two epochs the second gets a signal."""
        start = time.monotonic()
        while len(entries(self.workdir)) < 2:
            assert time.monotonic() - start < 5 * WITHIN
            assert all(child.poll() is None for child in self.children), self.ended()
            time.sleep(0.01)
        self.children[1].send_signal(number)

    def ended(self):
        """Statuses, and what each has said."""
        said = [child.communicate(timeout=WITHIN)[1] for child in self.children]
        return [child.returncode for child in self.children], said


def test_two_processes_train_as_one(tmp_path, devices, monkeypatch):
    """One is killed, both go on later: the losses of one process with as many devices. A signal to one stops both.

    How long it takes until a process is missed is used for the rest.
    """
    together, stopped, alone = tmp_path / "together", tmp_path / "stopped", tmp_path / "alone"
    first = Pair(together, ("-c", NOTICED_SOON))
    first.signal_second(signal.SIGKILL)

    second = Pair(stopped)
    second.signal_second(signal.SIGTERM)
    statuses, said = second.ended()
    assert statuses == [143, 143], said
    line = said[0].splitlines()[-1]
    assert line.startswith("jaxsd: stopped at original/few/finetune seed 0, step ") and "of 40; saved" in line
    assert (stopped / STAGE / "checkpoints" / line.split(" step ")[1].split()[0]).is_dir()
    assert said[1].splitlines()[-1].startswith("SIGTERM: ")  # the one that leads speaks for both

    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    devices(4)
    command.run(config_of(**LONG), alone, stop=loop.Stop(), only=("scratch",))

    statuses, said = first.ended()
    assert statuses == [1, -9], said
    assert said[0].splitlines()[-1].startswith("error: ") and processes.LOST in said[0].splitlines()[-1]
    launcher = [sys.executable, "launch/local.py", "2", *FLAGS, f"--workdir={together}"]
    done = subprocess.run(launcher, cwd=ROOT, env=KEPT, capture_output=True, text=True)
    assert done.returncode == 0 and "continues at step" in done.stderr, done.stderr
    assert done.stdout.count("Accuracy in per cent") == 1
    assert json.loads((together / "summary.json").read_text())["environment"]["devices"] == 4

    found, wanted = entries(together), entries(alone)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in wanted] == list(range(4, 41, 4))
    for name in ("loss", "accuracy", "grad_norm", "rate"):
        np.testing.assert_allclose([e[name] for e in found], [e[name] for e in wanted], rtol=1e-3, err_msg=name)
    rows = [row["values"] for row in report.read(together)]
    np.testing.assert_allclose(rows, [row["values"] for row in report.read(alone)], atol=0.01)


def test_arms_and_seeds_meet_in_a_workdir(tmp_path, monkeypatch, capsys):
    """Each run reports what all have finished; what a changed config would train otherwise is not among it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    short = {"evaluations": ("finetune",), "stages.finetune.epochs": 1}

    def run(arm, seed, **more):
        config = config_of(**short, seeds=(seed,), **more)
        command.run(config, tmp_path, only=(arm,), stop=loop.Stop())
        rows = [row for row in report.read(tmp_path) if row["metric"] == "accuracy"]
        return {row["arm"]: row["seeds"] for row in rows}, json.loads((tmp_path / "config.json").read_text())["seeds"]

    assert run("scratch", 0) == ({"scratch": [0]}, [0])
    assert run("scalenet", 1) == ({"scratch": [0], "scalenet": [1]}, [0, 1])
    assert run("scratch", 1) == ({"scratch": [0, 1], "scalenet": [1]}, [0, 1])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}
    found, seeds = run("scalenet", 0)
    assert (found, seeds) == ({"scratch": [0, 1], "scalenet": [0, 1]}, [0, 1])
    row = next(row for row in report.read(tmp_path) if row["arm"] == "scalenet")
    assert row["difference"]["to"] == "scratch" and row["difference"]["ci95"] is not None
    assert "seeds 0, 1" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    # Another rate: what is there counts as another experiment's.
    assert run("scratch", 2, **{"stages.finetune.schedule.rate": 0.02}) == ({"scratch": [2]}, [2])


def test_alone_nothing_is_shared(devices):
    devices(8)
    state = state_of()
    assert not processes.several() and processes.leads()
    assert processes.share(state) is state
    same(processes.local(state), state)
    processes.say("nobody listens")
    assert int(processes.greatest(3)) == 3


def test_arrays_of_all_processes():
    """What is put on every device is what it was, keys and bits included."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec())
    tree = {"key": jax.random.key(3), "zero": np.float32(-0.0), "images": np.arange(6, dtype=np.uint8).reshape(2, 3)}
    found = processes.put(tree, sharding)
    same(found, tree)
    assert all(leaf.sharding.is_fully_replicated and len(leaf.devices()) == 4 for leaf in jax.tree.leaves(found))
    assert processes.put(found, sharding)["images"] is found["images"]
    held = processes.host(found)
    assert isinstance(held["key"], np.ndarray) and held["images"].tobytes() == tree["images"].tobytes()


@pytest.mark.parametrize("flags", [["--distributed"], ["--processes=2", "--process=0"]])
def test_processes_that_find_no_others_say_so(flags, tmp_path):
    command = [sys.executable, "-m", "jaxsd.main", *FLAGS, f"--workdir={tmp_path}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=KEPT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "do not find each other" in done.stderr.splitlines()[-1] and "--coordinator=HOST" in done.stderr


def test_a_batch_that_cannot_be_split(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(
        UserError, match="batches of 8 cannot be split over 3 processes: set batch_size to a multiple of 3"
    ):
        processes.mesh(8)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("UNAVAILABLE: Socket closed", True),
        ("INTERNAL: Gloo all-reduce failed: Connection closed by peer", True),
        ("FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", False),
        ("INVALID_ARGUMENT: Executable expected 2 arguments", False),
        ("UNIMPLEMENTED: no such operation here", False),
        ("NOT_FOUND: no library for it", False),
        ("FAILED_PRECONDITION: DNN library initialization failed", False),
    ],
)
def test_errors_of_ones_own_are_not_taken_for_the_end_of_others(text, lost, monkeypatch):
    error = jax.errors.JaxRuntimeError(text)
    assert not processes.is_lost(error)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert processes.is_lost(error) == lost and not processes.is_lost(RuntimeError(text))


class Ended(BaseException):
    """In the place of os._exit, which nothing catches either."""


@pytest.mark.parametrize("leads", [True, False])
@pytest.mark.parametrize(
    ("outcome", "status"), [(RunError("broken"), 1), (UserError("wrong"), 2), (Stopped("stopped", 15), 143), (0, 0)]
)
def test_a_process_that_fails_tells_the_others_and_waits_for_none(outcome, status, leads, monkeypatch):
    """Process 0 says how it ended; after a failure it ends as soon as who listens has heard, past JAX's barrier."""
    done = []

    def run(config, given):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def end(number):
        raise Ended(number)

    monkeypatch.setattr(main, "run", run)
    monkeypatch.setattr(processes, "start", lambda *args: None)
    monkeypatch.setattr(processes, "leads", lambda: leads)
    monkeypatch.setattr(processes, "say", done.append)
    monkeypatch.setattr(main.time, "sleep", done.append)
    monkeypatch.setattr(os, "_exit", end)
    given = SimpleNamespace(coordinator=None, processes=2, process=0)
    if status == 0 or (leads and status == 143):
        assert main.together({}, given) == status and done == ([f"end {status}"] if leads else [])
        return
    with pytest.raises(Ended, match=str(status)):
        main.together({}, given)
    assert done == ([f"end {status}", processes.HEARD] if leads else []) and processes.HEARD * 1000 > processes.POLL
