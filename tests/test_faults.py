"""What a machine does to a run: full disks, folders that are gone or may not be written, two processes, signals."""

import logging
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import CACHE
from small import plan_of, same
from test_checkpoint import WIDE
from test_interruptions import run_in

from jaxsd.errors import RunError, UserError
from jaxsd.train import loop, trunk
from jaxsd.train.checkpoint import steps
from jaxsd.workdir import locked, log, read_json, start_log, write_json

ROOT = Path(__file__).parents[1]
ALONE = ["unshare", "--user", "--map-root-user", "--mount"]  # a name space in which anyone may mount
FLAGS = ["--config=configs/scalenet.py:tiny", "--only=scratch", "--config.seeds=(0,)", "--config.attention=False"]
FLAGS += ["--config.evaluations=('finetune',)", "--config.stages.finetune.epochs=8", "--config.save_seconds=0.3"]


def can_mount():
    return shutil.which("unshare") is not None and subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="name spaces of users are not allowed here")


def shell(script, *words):
    """Runs a bash script with words as $1, $2, ... where it may mount; returns what it printed and its errors."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(CACHE)}
    command = [*ALONE, "bash", "-ec", script, "bash", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout, done.stderr


# the disk


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorstore's threads, on failure
def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path):
    """No file may grow beyond 4 kB from the seventh step on: one line; with room again the run ends as without."""
    plan, least = plan_of(10, epochs=3), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    wanted = run_in(tmp_path / "straight", plan, objective=WIDE)
    save = loop.Checkpoints.save

    def limited(self, step, *args, **options):
        self.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if step == 7 else least, least))
        save(self, step, *args, **options)

    try:
        with pytest.raises(RunError) as error, pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Checkpoints, "save", limited)
            run_in(tmp_path / "full", plan, objective=WIDE, save_seconds=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, least))
    text, folder = str(error.value), tmp_path / "full/checkpoints"
    assert text == (
        f"the checkpoint of step 7 could not be written to {folder} (File too large); the one of step 6 stays; once "
        "that is mended give the same command again"
    )
    assert steps(folder) == [5, 6]
    same(run_in(tmp_path / "full", plan, objective=WIDE), wanted)
    assert sorted(path.name for path in folder.iterdir()) == ["6", "9"]


@needs_mounts
@pytest.mark.slow
@pytest.mark.parametrize("size", ["12k", "60k", "200k", "400k"])
def test_the_command_on_a_full_disk(tmp_path, size):
    """Wherever the room ends: one line and status 1; then, with more room, the table of a run without trouble."""
    script = """
    mount -t tmpfs -o size=$1 none $2; shift; workdir=$1/run; python=$2; shift 2
    $python -m jaxsd.main --workdir=$workdir "$@" && echo done || echo status $?
    echo more room >&2; mount -o remount,size=20m ${workdir%/run}
    $python -m jaxsd.main --workdir=$workdir "$@" && echo done || echo status $?
    """
    said, errors = shell(script, size, tmp_path, sys.executable, *FLAGS)
    full, _, after = errors.partition("more room\n")
    assert "Traceback" not in errors and "orbax" not in errors, errors
    assert said.startswith("status 1\n") and said.endswith("done\n"), (said, errors)
    assert full.splitlines()[-1].startswith("error: ") and "No space left on device" in full.splitlines()[-1]
    assert "Further measures" in said and "error" not in after


@needs_mounts
def test_a_workdir_that_may_not_be_written(tmp_path):
    script = """
    mount -t tmpfs none $1; echo mine > $1/kept; mount -o remount,ro $1
    $2 -m jaxsd.main --workdir=$1/run "${@:3}" && echo done || echo status $?; ls $1
    """
    said, errors = shell(script, tmp_path, sys.executable, *FLAGS)
    assert said == "status 2\nkept\n"
    assert errors == (
        f"error: the workdir {tmp_path}/run cannot be written (Read-only file system): take another --workdir\n"
    )


def test_a_workdir_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "handlers", [])
    for name in ("level", "propagate"):
        monkeypatch.setattr(log, name, getattr(log, name))
    monkeypatch.setattr(logging, "raiseExceptions", True)
    tmp_path.chmod(0o555)
    user = os.geteuid()
    if user == 0:  # whom nothing is forbidden
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"workdir .*run cannot be written \(Permission denied\): take another"):
            start_log(tmp_path / "run/log.txt")
    finally:
        os.seteuid(user)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_json(tmp_path / "value.json", {"old": 1})

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "value.json", {"new": 2})
    assert read_json(tmp_path / "value.json") == {"old": 1} and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "value.json").write_text('{"old": ')
    with pytest.raises(RunError, match=f"{tmp_path}/value.json is damaged .*: remove it"):
        read_json(tmp_path / "value.json")


def test_writers_of_several_machines_do_not_meet(tmp_path, monkeypatch):
    """Process numbers of two machines may be equal: while one writes, another one's file comes and stays whole."""
    path, flush, inner = tmp_path / "value.json", os.fsync, []

    def amid(descriptor):
        flush(descriptor)
        if not inner:
            inner.append(True)
            write_json(path, {"theirs": 1})

    monkeypatch.setattr(os, "fsync", amid)
    write_json(path, {"ours": 2})
    assert read_json(path) == {"ours": 2} and [file.name for file in tmp_path.iterdir()] == ["value.json"]


def test_features_that_the_disk_has_no_room_for(tmp_path, monkeypatch):
    """Room that is gone between the look at the disk and the first write: an error, where memory would be killed."""
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    with pytest.raises(OSError, match="No space left"):
        trunk._filled(tmp_path / "trunk", ((4, 2), "float32"), "", 2, lambda first: pytest.fail("written"))


# the folder


@pytest.mark.parametrize("part", ["checkpoints", "."])
def test_a_workdir_that_vanishes(tmp_path, monkeypatch, part):
    """Nothing is made anew in its place, which would be half a workdir."""
    save = loop.Checkpoints.save

    def vanishing(self, step, *args, **options):
        self.wait()
        if step == 3:
            shutil.rmtree(tmp_path / "run" / part)
        save(self, step, *args, **options)

    monkeypatch.setattr(loop.Checkpoints, "save", vanishing)
    with pytest.raises(RunError, match=r"step 3 could not be written to .* \(the folder has vanished\); there is none"):
        run_in(tmp_path / "run", plan_of(10, epochs=1), save_seconds=0)
    assert not (tmp_path / "run" / part).exists()


# two processes

HOLDER = """
import sys, time
from pathlib import Path
from jaxsd.workdir import locked
with locked(Path(sys.argv[1]), lambda owner: None):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_owner_and_a_stale_one_is_taken_over(tmp_path, caplog):
    lock = tmp_path / "stage/.lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as it:
        try:
            assert it.stdout.readline() == "held\n"
            log.propagate = True
            owner, asked, entered = f"process {it.pid} on {platform.node()}", [], threading.Event()

            def wait():
                with locked(lock, lambda who: (asked.append(who), it.kill())):
                    entered.set()

            with caplog.at_level("INFO", "jaxsd"):
                thread = threading.Thread(target=wait)
                thread.start()
                thread.join(30)
        finally:
            it.kill()
    assert entered.is_set() and set(asked) == {owner}
    assert caplog.messages == [
        f"{lock.parent}: {owner} works on it: waiting",
        f"{lock.parent}: {owner}, which was working on it, is gone: its lock is taken over",
    ]
    assert lock.read_text() == ""
    with locked(lock, lambda who: pytest.fail("waited")):
        assert lock.read_text() == f"process {os.getpid()} on {platform.node()}"
    assert len(caplog.messages) == 2


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    import fcntl

    log.propagate = True
    monkeypatch.setattr(fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(38, os.strerror(38))))
    with locked(tmp_path / ".lock", lambda who: None):
        assert "cannot be locked (Function not implemented): start only one process for it" in caplog.text


@pytest.mark.slow
def test_two_commands_in_one_workdir(tmp_path):
    """Both print the same table; each stage is trained once."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(CACHE)}
    command = [sys.executable, "-m", "jaxsd.main", f"--workdir={tmp_path}", *FLAGS]
    both = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    (first, told), (second, said) = (process.communicate() for process in both)
    assert [process.returncode for process in both] == [0, 0], told + said
    assert first == second and (told + said).count("trained in ") == 1
    assert len(steps(next(tmp_path.rglob("checkpoints")))) <= 2


# the page about all this


def test_the_page_names_tests_that_there_are():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "trust.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
