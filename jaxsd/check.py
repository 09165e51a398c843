"""`python -m jaxsd.check data --config=... [--out=FOLDER]`: what is in the data, what is wrong with them?

Prints what the files are, counts per split and class, copies, scores and scenes, and draws images, copies, what stages
are shown and learning rates; trains nothing. Exit status 0, or 2 where a run would stop with an error.

`python -m jaxsd.check resume --config=... [--kills=N]`: does a run that is killed end as one that is not?

Runs the config straight, then again with SIGKILL at N random moments spread over its progress, restarting it each time,
and compares weights bit by bit and metrics.jsonl line by line. Further flags go to jaxsd.main.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsd.errors import RunError, UserError

TIME_FIELDS = ("seconds", "images/s")


def main(argv: Sequence[str]) -> int:
    """Runs the check; returns the exit status: 0 fine or equal, 1 different, 2 wrong use or wrong data."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m jaxsd.check", description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="what is in the data of a config")
    data.add_argument("--config", required=True, help="config file; further --config.KEY=VALUE override its values")
    data.add_argument("--out", help="folder for the pictures; default runs/check-NAME")
    resume = commands.add_parser("resume", help="a run killed N times against a straight one")
    resume.add_argument("--config", required=True)
    resume.add_argument("--kills", type=int, default=5)
    resume.add_argument("--random", type=int, default=0, help="seed of the moments")
    options, rest = parser.parse_known_args(argv)
    try:
        if options.command == "data":
            return _data(options.config, options.out, rest)
        return check_resume(options.config, options.kills, options.random, rest)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _data(config: str, out: str | None, flags: Sequence[str]) -> int:
    """Checks the data of a config with overrides."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxsd.main import parse

    parsed = parse(["jaxsd.check", f"--config={config}", *flags])
    from jaxsd.check_data import check_data  # loads jax, so after what can be wrong before

    name = parsed["name"] + (f"-{parsed['preset']}" if parsed["preset"] else "")
    return check_data(parsed, Path(out or Path("runs", f"check-{name}")))


def check_resume(config: str, kills: int, seed: int, flags: Sequence[str]) -> int:
    """Both runs and their comparison; prints one line per kill and one verdict."""
    root = Path(tempfile.mkdtemp(prefix="jaxsd-check-"))
    straight, killed = root / "straight", root / "killed"
    command = [sys.executable, "-m", "jaxsd.main", f"--config={config}", "--config.save_seconds=0.2", *flags]
    try:
        start = time.monotonic()
        _finish(command, straight)
        print(f"straight run: {time.monotonic() - start:.1f} s", flush=True)
        _kill_along(command, killed, kills, seed, total=_progress(straight))
        _finish(command, killed)
        different = compare(straight, killed)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for line in different[:20]:
        print(f"different: {line}")
    count = "bit-identical" if not different else f"{len(different)} differences"
    print(f"{kills} kills of {config}: {count}")
    return 1 if different else 0


def _start(command: Sequence[str], workdir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, f"--workdir={workdir}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _finish(command: Sequence[str], workdir: Path) -> None:
    process = _start(command, workdir)
    _, errors = process.communicate()
    if process.returncode:
        raise RunError(f"the run ended with status {process.returncode}: {errors.strip().splitlines()[-1:]}")


def _progress(workdir: Path) -> int:
    """Epochs written so far, over all stages."""
    folders = os.walk(workdir / "stages")  # unlike glob it bears folders that vanish meanwhile
    journals = [Path(folder, name) for folder, _, names in folders for name in names if name == "metrics.jsonl"]
    return sum(path.read_bytes().count(b"\n") for path in journals)


def _saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(".part" in name for _, names, _ in os.walk(workdir / "stages") for name in names)


def _kill_along(command: Sequence[str], workdir: Path, kills: int, seed: int, total: int) -> None:
    """Kills a run `kills` times: each time a random while after it has come a further share of the way."""
    moments = random.Random(seed)
    for kill in range(kills):
        process = _start(command, workdir)
        while _progress(workdir) < total * kill / kills and process.poll() is None:
            time.sleep(0.01)
        if kill % 5 == 4:  # every fifth within a save
            while not _saving(workdir) and process.poll() is None:
                time.sleep(0.001)
        else:
            time.sleep(moments.uniform(0, 1.5))
        process.kill()
        process.communicate()
        where = f"{_progress(workdir)} of {total} epochs"
        ended = "" if process.returncode == -signal.SIGKILL else f" (it had ended with {process.returncode})"
        print(f"kill {kill + 1}: {where}{ended}", flush=True)


def compare(straight: Path, killed: Path) -> list[str]:
    """What differs between two workdirs: weights bit by bit; metrics.jsonl, transfer.json, evaluations, summary.

    Times do not count, nor do the logs.
    """
    lines = [f"only in one of both: {name}" for name in sorted(_files(straight) ^ _files(killed))]
    for name in sorted(_files(straight) & _files(killed)):
        if name.endswith(("transfer.json", "stage.json")) or name.startswith(("evaluations", "subsets")):
            if (straight / name).read_bytes() != (killed / name).read_bytes():
                lines.append(name)
    for done in sorted(straight.glob("stages/**/done.json")):
        stage = done.parent.relative_to(straight)
        if not (killed / stage / "done.json").exists():
            lines.append(f"{stage}: not finished")
            continue
        lines += _compare_weights(stage, straight, killed) + _compare_journals(stage, straight, killed)
    if _values(straight) != _values(killed):
        lines.append("summary.json: the rows differ")
    return lines


def _files(workdir: Path) -> set[str]:
    """The JSON files that runs write, but for their logs."""
    return {str(path.relative_to(workdir)) for path in workdir.rglob("*.json") if "checkpoints" not in path.parts}


def _compare_weights(stage: Path, straight: Path, killed: Path) -> list[str]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from jaxsd.train.checkpoint import read_model

    first, second = (read_model(root / stage / "checkpoints") for root in (straight, killed))
    leaves, others = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (first, second))
    if leaves.keys() != others.keys():
        return [f"{stage}: other tensors"]
    unequal = [path for path, leaf in leaves.items() if leaf.tobytes() != others[path].tobytes()]
    return [f"{stage}: {jax.tree_util.keystr(path)}" for path in unequal]


def _compare_journals(stage: Path, straight: Path, killed: Path) -> list[str]:
    texts = [(root / stage / "metrics.jsonl").read_text().splitlines() for root in (straight, killed)]
    first, second = ([_timeless(json.loads(line)) for line in lines] for lines in texts)
    if len(first) != len(second):
        return [f"{stage}: metrics.jsonl has {len(first)} and {len(second)} lines"]
    return [
        f"{stage}: metrics.jsonl line {i + 1}" for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b
    ]


def _timeless(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in TIME_FIELDS}


def _values(workdir: Path) -> list[Any]:
    rows = json.loads((workdir / "summary.json").read_text())["rows"]
    return [[row[name] for name in ("arm", "evaluation", "block", "metric", "values")] for row in rows]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
