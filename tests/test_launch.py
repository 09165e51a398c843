"""The start scripts: what can be checked of them without a cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CACHE

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


def source_of(cell):
    """A notebook cell as Python.

    `!python ARGS` runs this interpreter, with {NAME} filled in as IPython does; installing and moving there (`!git`,
    `!pip`, `%cd`) is left out, anything else of IPython's is an error.
    """
    lines = []
    for line in "".join(cell["source"]).splitlines():
        command = line.strip()
        if command.startswith("!python "):
            lines.append(f'run(f"{command.removeprefix("!python ")}")')
        elif not command.startswith(("!git ", "!pip ", "%cd ")):
            assert not command.startswith(("!", "%")), f"no rule for {command}"
            lines.append(line)
    return "\n".join(lines)


PREAMBLE = """
import shlex, subprocess, sys
def run(arguments):
    print(subprocess.run([sys.executable, *shlex.split(arguments)], check=True, capture_output=True, text=True).stdout)
"""


def test_the_notebook_runs(tmp_path):
    """Every cell in order, in a folder that holds what the clone would."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    cells = json.loads((LAUNCH / "colab.ipynb").read_text())["cells"]
    sources = [source_of(cell) for cell in cells if cell["cell_type"] == "code"]
    code = f"{PREAMBLE}\nfor source in {sources!r}:\n    exec(source)"
    kept = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(CACHE)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CpuDevice" in done.stdout and "Accuracy in per cent" in done.stdout
    assert "scalenet finetune  0." in done.stdout
    assert (tmp_path / "runs/colab/summary.json").is_file()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, ""),
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}, " --distributed ids=0,1,2,3"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, " --config.seeds=(3,)"),
        ({"SLURM_ARRAY_TASK_ID": "4", "ARMS": "scratch rotnet scalenet"}, " --only=rotnet --config.seeds=(1,)"),
    ],
)
def test_slurm_starts_what_it_says(settings, flags, tmp_path):
    """With an srun that only prints what it is to run."""
    fake = tmp_path / "srun"
    fake.write_text('#!/usr/bin/env bash\necho "$*${JAX_LOCAL_DEVICE_IDS:+ ids=$JAX_LOCAL_DEVICE_IDS}"\n')
    fake.chmod(0o755)
    kept = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **settings}
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "--config=x", "--workdir=a b"], env=kept, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"--kill-on-bad-exit=1 python -m jaxsd.main --config=x --workdir=a b{flags}\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([sys.executable, LAUNCH / "local.py", "--config=x"], "the number of processes comes first"),
        (["bash", LAUNCH / "tpu_vm.sh", "name"], "NAME ZONE --config"),
    ],
)
def test_wrong_use_is_said(command, message):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr
