"""Checkpoints that can be trusted: what is damaged is named, what does not fit is refused, what is best is kept."""

import json
import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small import FROZEN, SGD, Small, arrays, plan_of, same, source_of, state_of
from test_interruptions import checkpointed, run_in, sums_of, timeless

from jaxsd import objectives
from jaxsd.check import compare
from jaxsd.errors import RunError, Stopped
from jaxsd.stage import data_of
from jaxsd.train import loop
from jaxsd.train.checkpoint import Checkpoints, read_model, restore_model, steps
from jaxsd.train.manifest import MANIFEST, damage, seal
from jaxsd.train.state import merge
from jaxsd.workdir import Journal, write_json

ROOT = Path(__file__).parents[1]
WIDE = objectives.rotation(Small(outputs=4, frozen=("block1",), widths=(64, 64)))  # tensors of kilobytes


def model_of(state):
    return {"params": merge(state.params, state.frozen), "extra": state.extra}


def flip(path, at):
    """Changes one byte of a file; the same again undoes it."""
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0xFF]))


# damage

DAMAGE = {
    "a byte": (lambda folder: flip(folder / "part/data", 70), "part/data is not as it was written"),
    "cut": (lambda folder: (folder / "part/data").write_bytes(b"x" * 99), "part/data is not as it was written"),
    "lost": (lambda folder: (folder / "part/data").unlink(), "part/data is missing"),
    "a folder lost": (lambda folder: shutil.rmtree(folder / "part"), "part/data is missing"),
    "added": (lambda folder: (folder / "part/more").touch(), "part/more does not belong to it"),
    "renamed": (lambda folder: (folder / "part/data").rename(folder / "data"), "data does not belong to it"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
    "cut manifest": (lambda folder: (folder / MANIFEST).write_bytes(b'{"a'), "manifest.json is no manifest"),
    "a list": (lambda folder: (folder / MANIFEST).write_text("[1]"), "manifest.json is no manifest"),
    "another space": (lambda folder: flip(folder / MANIFEST, 1), "manifest.json is no manifest"),
    "white space": (
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text() + "\n"),
        "manifest.json is not as it was written",
    ),
    "nothing": (lambda folder: None, None),
    "hidden": (lambda folder: (folder / "part/.DS_Store").touch(), None),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_kind_of_damage_is_named(tmp_path, kind):
    (tmp_path / "part").mkdir()
    (tmp_path / "part/data").write_bytes(b"x" * 100)
    (tmp_path / "empty").touch()
    seal(tmp_path)
    harm, words = DAMAGE[kind]
    harm(tmp_path)
    assert damage(tmp_path) == words


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, caplog):
    plan = plan_of(10, epochs=3)
    wanted = run_in(tmp_path / "straight", plan, objective=WIDE)
    with pytest.raises(Stopped):
        run_in(tmp_path / "damaged", plan, stop_at=7, save_seconds=0, objective=WIDE)
    (tmp_path / "damaged/checkpoints/7/training/_sharding").write_text("{}")  # which Orbax does not notice
    logging.getLogger("jaxsd").propagate = True
    with caplog.at_level(logging.INFO, "jaxsd"):
        found = run_in(tmp_path / "damaged", plan, objective=WIDE)
    assert "the checkpoint of step 7 in" in caplog.text
    assert "is damaged (training/_sharding is not as it was written)" in caplog.text
    assert "continues at step 6 of 9" in caplog.text
    assert (tmp_path / "damaged/damaged/7").is_dir()
    same(found, wanted)
    lines = [timeless(tmp_path / name / "metrics.jsonl") for name in ("straight", "damaged")]
    assert lines[0] == lines[1]


def test_without_any_whole_checkpoint_nothing_is_touched(tmp_path):
    with pytest.raises(Stopped):
        run_in(tmp_path, plan_of(10, epochs=2), stop_at=2, save_seconds=0)
    for step in (1, 2):
        (tmp_path / f"checkpoints/{step}/model/_METADATA").write_text("{")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RunError) as error:
        run_in(tmp_path, plan_of(10, epochs=2))
    text = str(error.value)
    assert f"no whole checkpoint is left in {tmp_path}/checkpoints: that of step 2 is damaged (model/_METADATA" in text
    assert f"1 before it; nothing was overwritten: bring it back, or remove {tmp_path} to" in text and "\n" not in text
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_no_checkpoint_and_a_damaged_one_say_so(tmp_path):
    for read in (lambda folder: restore_model(folder, {}), read_model):
        with pytest.raises(RunError, match="there is no checkpoint in"):
            read(tmp_path / "none")
    state = run_in(tmp_path, plan_of(10, epochs=1), objective=WIDE)
    folder, model = tmp_path / "checkpoints", model_of(state)
    same(restore_model(folder, model), model)
    same(arrays(read_model(folder)), arrays(model))
    assert jax.tree.structure(read_model(folder)) == jax.tree.structure(model)
    flip(folder / "3/record/metadata", 5)
    for read in (lambda folder: restore_model(folder, model), read_model):
        with pytest.raises(RunError, match="the checkpoint of step 3 in .* is damaged .record/metadata is not as"):
            read(folder)


def positions(folder):
    """(file, place) of the middle of every file, and of the middle of every 4 KiB of those that hold arrays."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        blocks = range(0, size, 4096) if path.parent.name == "d" else (0,)
        ends = [min(start + 4096, size) if len(blocks) > 1 else size for start in blocks]
        yield from ((path, (start + end) // 2) for start, end in zip(blocks, ends, strict=True))


@pytest.mark.parametrize(("every", "width"), [(17, 64), pytest.param(1, 256, marks=pytest.mark.slow)])
def test_a_flipped_byte_is_noticed_everywhere(tmp_path, every, width, capfd):
    """In every file and every block; of `every`-th flips it is counted what Orbax alone would have made of them."""
    objective = objectives.rotation(Small(outputs=4, frozen=("block1",), widths=(width, width)))
    checkpoints, kept = checkpointed(tmp_path, SGD, 1, objective=objective)
    checkpoints.close()
    folder, state = tmp_path / "1", kept[1]
    training = {"opt_state": state.opt_state, "key": state.key, "step": state.step, "sums": sums_of(1)}
    saved = {"model": model_of(state), "training": training}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), saved)

    def alone():
        """What a plain restore does: 'raised', 'wrong' or 'right'."""
        try:
            with warnings.catch_warnings(action="ignore"):
                with ocp.Checkpointer(ocp.CompositeCheckpointHandler("model", "training")) as reader:
                    parts = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
                    found = dict(reader.restore(folder, args=ocp.args.Composite(**parts)))
        except Exception:
            return "raised"
        pairs = zip(arrays(found), arrays(saved), strict=True)
        return "right" if all(a.tobytes() == b.tobytes() for a, b in pairs) else "wrong"

    places, count = list(positions(folder)), {"raised": 0, "wrong": 0, "right": 0}
    assert damage(folder) is None and alone() == "right"
    for number, (path, at) in enumerate(places):
        flip(path, at)
        assert damage(folder) is not None, (path, at)
        if number % every == 0:
            count[alone()] += 1
        flip(path, at)
    assert damage(folder) is None and len(places) > 30
    capfd.readouterr()  # what Orbax and tensorstore said
    files = len({path for path, _ in places})
    with capfd.disabled():
        print(
            f"\n{len(places)} flips in {files} files: {len(places)} noticed; of {sum(count.values())} Orbax alone "
            f"raised at {count['raised']}, gave wrong values for {count['wrong']}, right ones for {count['right']}"
        )


# what does not fit


def test_another_type_or_shape_is_refused_by_name(tmp_path):
    """Orbax casts the first silently and fills or cuts the second."""
    checkpoints, kept = checkpointed(tmp_path, SGD, 1)
    checkpoints.wait()
    state = kept[1]
    head = state.params["head"]
    for bias, words in (
        (head["bias"].astype(jnp.bfloat16), r"params/head/bias is float32\[4\] there and bfloat16\[4\] here"),
        (jnp.zeros(5), r"params/head/bias is float32\[4\] there and float32\[5\] here"),
    ):
        other = state.replace(params={**state.params, "head": {**head, "bias": bias}})
        for read in (
            lambda other=other: checkpoints.resume(other, sums_of(1)),
            lambda other=other: restore_model(tmp_path, model_of(other)),
        ):
            with pytest.raises(RunError, match=rf"checkpoint of step 1 in .* of another network or recipe: {words}"):
                read()
    with pytest.raises(RunError, match=r"sums/weight is float32\[\] there and absent here"):
        checkpoints.resume(state, {name: value for name, value in sums_of(1).items() if name != "weight"})
    assert damage(tmp_path / "1") is None and not (tmp_path.parent / "damaged").exists()
    checkpoints.close()


def test_a_network_is_read_where_there_are_fewer_devices(tmp_path, devices):
    devices(4)
    state = run_in(tmp_path, plan_of(10, epochs=1))
    assert len(state.step.sharding.device_set) == 4
    script = "import sys, numpy, jax; from pathlib import Path; from jaxsd.train.checkpoint import read_model\n"
    script += "model = read_model(Path(sys.argv[1])); assert jax.device_count() == 1\n"
    script += "print(model['params']['head']['bias'].tobytes().hex())"
    command = [sys.executable, "-c", script, str(tmp_path / "checkpoints")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == np.asarray(state.params["head"]["bias"]).tobytes().hex(), done.stderr


def test_a_comparison_of_runs_names_the_tensor(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    folder = straight / "stages/half/seed0"
    state = run_in(folder, plan_of(10, epochs=1))
    write_json(folder / "done.json", {})
    write_json(straight / "summary.json", {"rows": []})
    shutil.copytree(straight, killed)
    assert compare(straight, killed) == []
    shutil.rmtree(killed / "stages/half/seed0/checkpoints/3")
    head = state.params["head"]
    changed = {**state.params, "head": {**head, "bias": jnp.nextafter(head["bias"], jnp.inf)}}
    checkpoints = Checkpoints(killed / "stages/half/seed0/checkpoints")
    checkpoints.save(3, state.replace(params=changed), sums_of(0))
    checkpoints.close()
    assert compare(straight, killed) == ["stages/half/seed0: ['params']['head']['bias']"]


# what is kept


@pytest.mark.parametrize("stop_at", [None, 9])
def test_the_best_epoch_and_the_newest_are_kept(tmp_path, stop_at):
    """Epochs of three steps, best at the second; saved at each step, or only where an epoch is the best so far."""
    accuracies, plan, seen = {3: 0.2, 6: 0.9, 9: 0.9, 12: 0.1}, plan_of(10, epochs=4), {}

    def run(save_seconds, stop_at=None):
        stop = loop.Stop()

        def check(state):
            seen[int(state.step)] = jax.tree.map(np.array, model_of(state))
            return {"accuracy": accuracies[int(state.step)]}

        def on_epoch(entry):
            if entry["step"] == stop_at:
                stop.signal = 15

        checkpoints, journal = Checkpoints(tmp_path / "checkpoints"), Journal(tmp_path / "metrics.jsonl")
        options = {"checks": {"test": check}, "best": "test", "on_epoch": on_epoch, "stop": stop}
        watch = loop.Watch("here", checkpoints, journal, save_seconds, **options)
        try:
            loop.run(state_of(FROZEN, freeze=("block1",)), data_of(source_of(10)), plan, FROZEN, SGD, watch=watch)
        finally:
            checkpoints.close()

    if stop_at is None:
        run(60)
    else:
        with pytest.raises(Stopped, match=f"step {stop_at} of 12; saved"):
            run(0, stop_at)
        run(0)
    assert steps(tmp_path / "checkpoints") == ([6, 12] if stop_at is None else [6, 11, 12])
    assert Checkpoints(tmp_path / "checkpoints").best() == (6, 0.9)
    same(jax.tree.map(np.asarray, restore_model(tmp_path / "checkpoints", seen[6], 6)), seen[6])
    assert json.loads((tmp_path / "checkpoints/12/record/metadata").read_text())["score"] == 0.1
