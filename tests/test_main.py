"""The command line: what it accepts, what it refuses, what it leaves behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CACHE

from jaxsd import build, command, main, report, tuning
from jaxsd.errors import UserError
from jaxsd.train import loop

ROOT = Path(__file__).parents[1]
TINY = "--config=configs/scalenet.py:tiny"


def run(*flags, module="jaxsd.main"):
    kept = {**os.environ, "XDG_CACHE_HOME": str(CACHE)}
    return subprocess.run([sys.executable, "-m", module, *flags], cwd=ROOT, env=kept, capture_output=True, text=True)


@pytest.mark.parametrize("module", ["jaxsd.main", "jaxsd.check", "jaxsd.bench"])
def test_help_is_fast(module):
    start = time.monotonic()
    done = run("--help", module=module)
    assert done.returncode == 0 and len(done.stdout) > 100
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config is missing"),
        ([TINY, "--config.sed=3"], "has no key 'sed'. Did you mean \"seeds\"?"),
        (["--config=configs/scalenet.py:folder", "--config.data.path=/nowhere"], "/nowhere does not exist"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(flags, message, tmp_path):
    done = run(*flags, f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def recipe_of(*argv):
    """From a command line to a recipe, in this process."""
    return build.recipe(main.parse(["main", *argv]))


@pytest.mark.parametrize(
    ("config", "flags", "options"),
    [
        ("scalenet.py:folder", ["--config.model.name=deit_tiny", "--config.model.drop_path=0.1"], {"drop_path": 0.1}),
        ("rotnet.py", ["--config.model.remat=True", "--config.model.dtype=bfloat16"], {"remat": True}),
        ("patches.py", ["--config.model.adaptive_pool=True"], {"adaptive_pool": True}),
    ],
)
def test_options_that_a_config_does_not_name(config, flags, options):
    """Those of the network reach it; what no network, set of data or config has is named."""
    argv = [f"--config={ROOT}/configs/{config}", *(["--config.data.path=x"] if ":folder" in config else [])]
    for arm in recipe_of(*argv, *flags).arms.values():
        for stage in arm:
            assert {name: getattr(stage.model, name) for name in options} == options
    for flag, message in (
        ("model.drop_paht=0.1", "has no option 'drop_paht': choose from outputs"),
        ("data.sise=3", "argument: 'sise' is unknown: choose from"),
        ("labells=3", "no key 'labells'. Did you mean \"labels\""),
    ):
        with pytest.raises(UserError, match=message):
            recipe_of(*argv, f"--config.{flag}")


def test_the_allocator_is_left_alone_where_that_is_asked(monkeypatch):
    called = []
    monkeypatch.setattr(tuning, "tune_allocator", lambda: called.append("tuned"))
    monkeypatch.setattr(command, "run", lambda *arguments, **options: called.append("run") or 0)
    monkeypatch.setattr(command, "stop_on_signals", lambda signals: None)
    monkeypatch.chdir(ROOT)
    assert main.main(["main", TINY, "--notune"]) == main.main(["main", TINY]) == 0
    assert called == ["run", "tuned", "run"]


def test_a_whole_run_and_what_follows(tmp_path, monkeypatch, capfd):
    """The first as a process of its own, what follows by the same function in this one, which has JAX loaded."""
    flags = [TINY, "--only=scratch,scalenet", "--config.seeds=(0,)", "--config.attention=True", f"--workdir={tmp_path}"]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert "scalenet" in done.stdout and "10 per class" in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["config"], summary["preset"], summary["baseline"]) == ("scalenet", "tiny", "scratch")
    assert summary["data"]["train"] == 1437 and summary["data"]["duplicates_train_test"] == 0
    rows = {(row["arm"], row["evaluation"], row["block"], row["metric"]): row for row in report.read(tmp_path)}
    assert ("scalenet", "pretext", None, "accuracy") in rows and ("scalenet", "probe", "block1", "accuracy") in rows
    row = rows["scalenet", "finetune", None, "accuracy"]
    # 128 images, two epochs at 4 pixels and one at 8, four turns; then 100 images in each of four epochs
    assert row["pixels"] == 128 * 4 * (2 * 16 + 64) + 4 * 100 * 64 and row["images"] == 3 * 128 + 4 * 100
    assert 0 <= row["values"][0] <= 1 and row["ci95"] is None and row["difference"]["to"] == "scratch"
    folder = tmp_path / "stages" / "original" / "half" / "full" / "few" / "finetune" / "seed0"
    transfer = json.loads((folder / "transfer.json").read_text())
    fresh = {line["tensor"] for line in transfer if line["action"] == "fresh"}
    assert fresh == {"params/head/kernel", "params/head/bias"}
    assert (tmp_path / "attention.png").stat().st_size > 10_000
    stages = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}

    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    monkeypatch.setattr(command, "stop_on_signals", lambda signals: loop.Stop())
    monkeypatch.chdir(ROOT)

    def here(*more):
        capfd.readouterr()
        status = main.main(["main", "--notune", *flags, *more])
        return status, *capfd.readouterr()

    status, shown, said = here()  # nothing is trained, the table is the same
    assert status == 0 and shown == done.stdout.replace("; 1 x cpu", "; 8 x cpu"), said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")} == stages

    status, _, said = here("--config.stages.finetune.schedule.rate=0.02")
    assert status == 2 and "rate: 0.05 -> 0.02" in said and "--reuse" in said

    status, _, said = here("--config.stages.finetune.schedule.rate=0.02", "--reuse")
    assert status == 0, said
    changed = {path for path in tmp_path.rglob("done.json") if path.stat().st_mtime_ns != stages[path]}
    assert {path.parent.parent.name for path in changed} == {"finetune"}
