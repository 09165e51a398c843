"""`python -m jaxsd.check data --config=... [--out=FOLDER]`: what is in the data, what is wrong with them?

Prints what the files are, counts per split and class, copies, scores and scenes, and draws images, copies, what stages
are shown and learning rates; trains nothing. Exit status 0, or 2 where a run would stop with an error.

`python -m jaxsd.check replay --workdir=DIR/stages/.../seedK`: why did that stage stop at a loss of infinity or NaN?

Takes the step that it kept once more and prints which state, activation and gradient is the first that is not finite,
and the images of the batch. --config=... is needed where the config.json of the workdir is gone. Exit status 0, or 1
where all is finite this time.

`python -m jaxsd.check resume --config=... [--kills=N] [--devices=D]`: does a run that is killed end as one that is not?

Runs the config straight, then again with SIGKILL at N random moments spread over its progress, every third amid the
writing of a checkpoint, restarting it each time, and compares weights bit by bit and metrics.jsonl line by line. With
--devices both runs see so many CPU devices. Further flags go to jaxsd.main. Exit status 0 equal, 1 different.
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
    replay = commands.add_parser("replay", help="the step that stopped a stage, taken again")
    replay.add_argument("--workdir", required=True, help="the stage's folder: DIR/stages/.../seedK")
    replay.add_argument("--config", help="default: config.json of the workdir")
    resume = commands.add_parser("resume", help="a run killed N times against a straight one")
    resume.add_argument("--config", required=True)
    resume.add_argument("--kills", type=int, default=5)
    resume.add_argument("--random", type=int, default=0, help="seed of the moments")
    resume.add_argument("--devices", type=int, default=0, help="CPU devices of both runs; default as there are")
    options, rest = parser.parse_known_args(argv)
    try:
        if options.command == "data":
            return _data(options.config, options.out, rest)
        if options.command == "replay":
            return _replay(Path(options.workdir), options.config, rest)
        return check_resume(options.config, options.kills, options.random, rest, devices=options.devices)
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


def _replay(folder: Path, config: str | None, flags: Sequence[str]) -> int:
    """Takes the step in a stage's folder again, with a config or that of the workdir around it."""
    root = next((parent.parent for parent in folder.absolute().parents if parent.name == "stages"), None)
    if root is None or not (folder / "nonfinite" / "step.json").is_file():
        raise UserError(
            f"{folder} holds no step to replay: give the folder of a stage (DIR/stages/.../seedK) that stopped at "
            "infinity or NaN"
        )
    from jaxsd.main import parse, plain

    if config is not None:
        parsed = parse(["jaxsd.check", f"--config={config}", *flags])
    elif (root / "config.json").is_file():
        parsed = plain(json.loads((root / "config.json").read_text()))
    else:
        raise UserError(f"there is no config.json in {root}: give --config=...")
    from jaxsd.check_replay import replay  # loads jax, so after what can be wrong before

    return replay(parsed, root, folder)


def check_resume(config: str, kills: int, seed: int, flags: Sequence[str], *, devices: int = 0) -> int:
    """Both runs and their comparison; prints one line per kill and one verdict. devices: of the CPU, 0 for all."""
    root = Path(tempfile.mkdtemp(prefix="jaxsd-check-"))
    straight, killed = root / "straight", root / "killed"
    command = [sys.executable, "-m", "jaxsd.main", f"--config={config}", "--config.save_seconds=0.2", *flags]
    try:
        start = time.monotonic()
        _end(_start(command, straight, devices), straight)
        stages, epochs = sum(1 for _ in straight.rglob("done.json")), _progress(straight)
        seconds = time.monotonic() - start
        print(f"straight run: {seconds:.1f} s, {stages} stages, {epochs} lines of metrics", flush=True)
        longest = min(1.5, seconds / max(kills, 1))
        amid = _kill_along(command, killed, kills, random.Random(seed), epochs, longest, devices)
        _end(_start(command, killed, devices), killed)
        different = compare(straight, killed)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for line in different[:20]:
        print(f"different: {line}")
    count = "bit-identical" if not different else f"{len(different)} differences, first {different[0]}"
    where = f"{stages} stages" + (f", {devices} devices" if devices else "")
    print(f"{kills} kills of {config} ({where}), {amid} of them amid a save: {count}")
    return 1 if different else 0


def _start(command: Sequence[str], workdir: Path, devices: int) -> subprocess.Popen:
    environment = dict(os.environ)
    if devices:
        flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    with open(_errors(workdir), "w") as errors:  # a pipe that nobody reads would stop a run with much to say
        said = {"stdout": subprocess.DEVNULL, "stderr": errors}
        return subprocess.Popen([*command, f"--workdir={workdir}"], env=environment, **said)


def _errors(workdir: Path) -> Path:
    return workdir.with_name(f"{workdir.name}.errors")


def _end(process: subprocess.Popen, workdir: Path) -> int:
    """Waits for the end of a run; its status. RunError where it failed."""
    status = process.wait()
    if status not in (0, -signal.SIGKILL):
        raise RunError(f"the run ended with status {status}: {_errors(workdir).read_text().strip().splitlines()[-1:]}")
    return status


def _progress(workdir: Path) -> int:
    """Lines of metrics written so far, over all stages: one for each epoch and split."""
    folders = os.walk(workdir / "stages")  # unlike glob it bears folders that vanish meanwhile
    journals = [Path(folder, name) for folder, _, names in folders for name in names if name == "metrics.jsonl"]
    return sum(path.read_bytes().count(b"\n") for path in journals)


def _saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(".part" in name for _, names, _ in os.walk(workdir / "stages") for name in names)


def _kill_along(
    command: Sequence[str], workdir: Path, kills: int, moments: random.Random, total: int, longest: float, devices: int
) -> int:
    """Kills a run `kills` times: each time up to `longest` seconds after it has come a further share of the way.

    Returns how many of the kills fell within the writing of a checkpoint.
    """
    amid = 0
    for kill in range(kills):
        said, wanted = _log_size(workdir), total * kill / kills
        process = _start(command, workdir, devices)
        while process.poll() is None and (_log_size(workdir) == said or _progress(workdir) < wanted):
            time.sleep(0.01)
        while kill % 3 == 2 and process.poll() is None and not _saving(workdir):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1 if kill % 3 == 2 else longest))
        process.kill()
        ended = _end(process, workdir) == 0
        saving = not ended and _saving(workdir)
        amid += saving
        how = " (it had ended)" if ended else ", amid a save" if saving else ""
        print(f"kill {kill + 1} of {kills}: {_progress(workdir)} of {total} lines of metrics{how}", flush=True)
    return amid


def _log_size(workdir: Path) -> int:
    """Bytes of log.txt: they grow once a run has read its data."""
    log = workdir / "log.txt"
    return log.stat().st_size if log.exists() else 0


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
