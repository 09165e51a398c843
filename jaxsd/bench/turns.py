"""Our runs and a peer's in turn, in fresh processes, and what comes out of it."""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxsd.errors import RunError, UserError

Line = dict[str, Any]
LAYOUTS = {"contiguous": [], "channels_last": ["--channels-last"]}
POLICIES = {"default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}  # waiting threads spin, or sleep
TUNED = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592:glibc.malloc.arena_max=1"
ALLOCATORS = {"plain": {}, "tuned": {"GLIBC_TUNABLES": TUNED}}  # freed memory goes back to the system, or stays


class Turns(NamedTuple):
    """What is run in turn: the words of both command lines, and the ratios that are wanted.

    ratios: name -> the quantity of the lines and the states of our compilation cache that it is made of. allocators:
    those of ALLOCATORS that the peer is run with. cold_runs: every second of our runs begins with an empty compilation
    cache; else the first one alone does, and ours stands before every second of the peer's settings.
    """

    command: str
    ours: list[str]
    theirs: list[str]
    ratios: Mapping[str, tuple[str, tuple[str, ...]]]
    allocators: tuple[str, ...] = ("plain",)
    cold_runs: bool = True


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bind(threads: int) -> None:
    """Keeps this process and its children on the first cores; XLA and torch then have equally many."""
    if threads < 1:
        raise UserError(f"--threads={threads}: give 1 or more")
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if threads > len(cores):
            raise UserError(f"--threads={threads}: this process may use {len(cores)} cores")
        os.sched_setaffinity(0, cores[:threads])


def versions() -> Line:
    """The device and the versions that a line was measured with."""
    import jax

    device = jax.local_devices()[0].device_kind
    return {"device": device, "jax": jax.__version__, "python": platform.python_version()}


def as_flags(given: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """The named options as a command line, which both sides read alike."""
    words = []
    for name in names:
        value = getattr(given, name)
        values = value if isinstance(value, list) else [value]
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


def in_turn(given: argparse.Namespace, turns: Turns) -> Iterator[Line]:
    """Our run and the peer's one after the other, with every PyTorch setting; the last line compares.

    Ours begins with an empty compilation cache (cold) or with what the runs before have left there (warm).
    """
    if shutil.which(given.against) is None or not given.peer.is_file():
        raise UserError(f"--against={given.against} --peer={given.peer}: give an interpreter and the PyTorch script")
    load, lines = os.getloadavg()[0] if hasattr(os, "getloadavg") else None, []
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GLIBC_TUNABLES")
    }
    settings = list(itertools.product(LAYOUTS, POLICIES, turns.allocators))
    with tempfile.TemporaryDirectory() as caches:
        for repeat in range(given.repeats):
            for at, (layout, policy, allocator) in enumerate(settings):
                number = (repeat * len(settings) + at) // 2 if turns.cold_runs else 0
                cold = at % 2 == 0 if turns.cold_runs else at == repeat == 0
                cache = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": os.path.join(caches, str(number))}
                if turns.cold_runs or at % 2 == 0:
                    command = [sys.executable, "-m", "jaxsd.bench", turns.command, *turns.ours]
                    line = {"side": "jaxsd", "repeat": repeat, "cache": "cold" if cold else "warm"}
                    lines.append({**line, **_child(command, {**environment, **cache})})
                    yield lines[-1]
                command = [given.against, str(given.peer), *turns.theirs, *LAYOUTS[layout]]
                line = {"side": "torch", "repeat": repeat, "layout": layout, "policy": policy, "allocator": allocator}
                lines.append({**line, **_child(command, {**environment, **POLICIES[policy], **ALLOCATORS[allocator]})})
                yield lines[-1]
    hardware = {"cpu": _processor(), "cores": given.threads, "load_before": load}
    yield {**_verdict(lines, turns.ratios), "hardware": hardware}


def _child(command: list[str], environment: dict[str, str]) -> Line:
    """The last JSON line that a process prints, with the seconds from its start to its end."""
    start = time.perf_counter()
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if result.returncode:
        said = result.stderr.strip().splitlines() or ["nothing on stderr"]
        raise RunError(f"{' '.join(command)} ended with status {result.returncode}: {said[-1]}")
    return {**json.loads(result.stdout.splitlines()[-1]), "process_s": round(seconds, 3)}


def _verdict(lines: list[Line], ratios: Mapping[str, tuple[str, tuple[str, ...]]]) -> Line:
    """Medians over the repeats: the fastest PyTorch setting over ours, for every ratio."""
    ours, theirs = ([line for line in lines if line["side"] == side] for side in ("jaxsd", "torch"))
    if ours[0]["parameters"] != theirs[0]["parameters"]:
        raise RunError(f"not the same network: {ours[0]['parameters']} parameters, peer {theirs[0]['parameters']}")
    verdict: Line = {"side": "both"}
    for name, (quantity, caches) in ratios.items():
        mine = statistics.median(line[quantity] for line in ours if line["cache"] in caches)
        settings: dict[str, list[float]] = {}
        for line in theirs:
            settings.setdefault(f"{line['layout']}, {line['policy']}, {line['allocator']}", []).append(line[quantity])
        best = min(settings, key=lambda setting: statistics.median(settings[setting]))
        peer = statistics.median(settings[best])
        verdict[name] = round(peer / mine, 3)
        verdict[name.replace("ratio", "medians")] = {
            "jaxsd": round(mine, 3),
            "torch": round(peer, 3),
            "torch_setting": best,
        }
    return {**verdict, "repeats": len(theirs) // len(settings)}


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
