"""A step that gives infinity or NaN: kept bit for bit, found again, its cause named."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CACHE
from small import KEY, OBJECTIVE, SGD, Small, batch_of, plan_of, same, source_of, state_of
from test_interruptions import flip_horizontal_once, run_in

from jaxsd import check, check_replay, main, objectives, train
from jaxsd.errors import Diverged, RunError, Stopped, UserError
from jaxsd.stage import data_of
from jaxsd.train import loop, nonfinite
from jaxsd.train.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("saved", [False, True])
def test_the_state_before_a_step_is_that_of_the_run(tmp_path, saved):
    """Recomputed from the start, or from a checkpoint, over the border of an epoch: what a run saved there."""
    plan, objective, data = plan_of(10, epochs=3), OBJECTIVE, data_of(source_of(10))
    with pytest.raises(Stopped):
        run_in(tmp_path / "whole", plan, stop_at=5, objective=objective)
    checkpoints = Checkpoints(tmp_path / "whole/checkpoints")
    sums = {"steps": np.int32(0), "weight": np.float32(0)}
    sums["totals"] = {name: np.float32(0) for name in ("loss", "accuracy", "grad_norm")}
    like = jax.eval_shape(lambda: state_of(objective, freeze=("block1",)))
    wanted = checkpoints.restore(5, like, sums).state
    checkpoints.close()
    if saved:
        with pytest.raises(Stopped):
            run_in(tmp_path / "part", plan, stop_at=2, objective=objective)
    checkpoints = Checkpoints(tmp_path / "part/checkpoints") if saved else None
    state = state_of(objective, freeze=("block1",))
    found, batch = nonfinite.before(6, state, data, plan, objective, SGD, flip_horizontal_once, checkpoints=checkpoints)
    same(found, wanted)
    index, mask = plan.batches(1)
    np.testing.assert_array_equal(batch["index"], index[2])
    np.testing.assert_array_equal(batch["mask"], mask[2])
    np.testing.assert_array_equal(batch["image"], data["image"][index[2]])
    if checkpoints is not None:
        checkpoints.close()


@pytest.mark.parametrize("last", [False, True])
def test_a_kept_step_goes_wrong_again(tmp_path, last):
    """By its loss, or at the last step by its weights alone; the kept state is finite and gives the same numbers."""
    plan = plan_of(10, epochs=2)
    plan.rates[5 if last else 3 :] = np.inf
    watch = loop.Watch("here", Checkpoints(tmp_path / "checkpoints"))
    options = {"begin": state_of, "folder": tmp_path, "watch": watch}
    step = 6 if last else 5
    with pytest.raises(RunError, match=f"at here, step {step} .* replay --workdir={tmp_path}"):
        nonfinite.run(state_of(), data_of(source_of(10)), plan, OBJECTIVE, SGD, flip_horizontal_once, **options)
    watch.checkpoints.close()
    kept = nonfinite.load(tmp_path / "nonfinite", jax.eval_shape(state_of))
    assert (kept.step, int(kept.state.step), kept.rate) == (step, step - 1, np.inf)
    taken = nonfinite.take(kept, OBJECTIVE, SGD, flip_horizontal_once)
    bad = {name for name, value in taken.before.items() if not np.isfinite(value)}
    if last:
        assert not bad and np.isfinite(taken.loss) and all(np.isfinite(list(taken.gradients.values())))
    else:  # step 4 made them infinite, step 5 saw it
        assert "params/head/kernel" in bad and np.isnan(taken.loss)
    assert not np.isfinite(taken.after["params/head/kernel"])


def test_a_step_without_a_folder_or_with_a_full_disk_fails_as_before(tmp_path, monkeypatch):
    plan = plan_of(10)
    plan.rates[:] = np.inf
    what = (data_of(source_of(10)), plan, OBJECTIVE, SGD)
    with pytest.raises(RunError, match="the loss became nan at training, step 2") as error:
        nonfinite.run(state_of(), *what, begin=state_of, folder=None, watch=loop.Watch())
    assert "replay" not in str(error.value)

    def full(folder, kept):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nonfinite, "keep", full)
    with pytest.raises(RunError, match="the loss became nan at training, step 2") as error:
        nonfinite.run(state_of(), *what, begin=state_of, folder=tmp_path, watch=loop.Watch())
    assert "replay" not in str(error.value)


def test_a_write_that_fails_does_not_hide_it(tmp_path, monkeypatch):
    """The write of step 2 fails in the background, while the loss of step 3 becomes NaN."""
    watch = loop.Watch(checkpoints=Checkpoints(tmp_path / "checkpoints"))
    watch.checkpoints.save(1, state_of(), {})
    watch.checkpoints.wait()

    def broken(step, args, size):
        raise RunError("no room")

    monkeypatch.setattr(watch.checkpoints, "_write", broken)
    watch.checkpoints.save(2, state_of(), {})
    with pytest.raises(Diverged, match="the loss became nan at training, step 3 .*the checkpoint of step 1 stays"):
        loop._Loop(watch, plan_of(10), 3, 0.0, None)._fail(3, "the loss became nan")
    with pytest.raises(RunError, match="no room"):
        watch.checkpoints.close()


def test_a_signal_ends_the_way_back(tmp_path, monkeypatch):
    """It comes amid the steps that are taken again; what the run had on the device is gone by then."""
    plan, watch, seen = plan_of(10), loop.Watch("here"), []
    plan.rates[:] = np.inf
    no_sums, spread = loop.no_sums, loop.spread

    def noted(tree, mesh):
        found = spread(tree, mesh)
        if isinstance(tree, dict) and "image" in tree:
            assert all(held() is None for held in seen)
            seen.append(weakref.ref(found["image"]))
        return found

    def asked(*args):
        if len(seen) == 2:
            watch.stop.signal = 15
        return no_sums(*args)

    monkeypatch.setattr(loop, "spread", noted)
    monkeypatch.setattr(loop, "no_sums", asked)
    what = (data_of(source_of(10)), plan, OBJECTIVE, SGD)
    with pytest.raises(Stopped, match="stopped at here, before a step"):
        nonfinite.run(state_of(), *what, begin=state_of, folder=tmp_path, watch=watch)
    assert len(seen) == 2 and not (tmp_path / "nonfinite").exists()


class Root(nn.Module):
    """The root of a dense layer started at zero: 0, with an infinite slope."""

    outputs: int

    @nn.compact
    def __call__(self, images, train):
        x = nn.Dense(3, name="first")(images.reshape(len(images), -1))
        x = nn.Dense(2, use_bias=False, kernel_init=nn.initializers.zeros_init(), name="second")(x)
        return nn.Dense(self.outputs, name="head")(jnp.sqrt(jnp.abs(x))), {}


def kept_of(objective, batch, change=lambda params: params):
    state = train.init(KEY, objective, SGD, batch)
    return nonfinite.Kept(3, "the loss became nan", 0.1, state.replace(params=change(state.params)), batch)


def first(values):
    return next((name for name, value in values.items() if not np.isfinite(value)), None)


def test_the_first_that_is_not_finite_is_named():
    """A weight, an activation, a slope, a score: each cause is found where it was put."""
    objective = objectives.supervised(Small(outputs=3, widths=(4, 6)))

    def spoilt(params):
        kernel = params["block2"]["dense"]["kernel"].at[1, 2].set(jnp.nan)
        return {**params, "block2": {**params["block2"], "dense": {**params["block2"]["dense"], "kernel": kernel}}}

    taken = nonfinite.take(kept_of(objective, batch_of(4), spoilt), objective, SGD)
    assert first(taken.before) == "params/block2/dense/kernel"
    assert list(taken.activations)[:3] == ["block1/dense", "block1/norm", "block1"]
    assert first(taken.activations) == "block2/dense" and np.isnan(taken.loss)
    assert list(taken.gradients)[0].startswith("head/") and list(taken.gradients)[-1].startswith("block1/")

    objective = objectives.supervised(Root(3))
    kept = kept_of(objective, batch_of(4))
    taken = nonfinite.take(kept, objective, SGD)
    assert np.isfinite(taken.loss) and first(taken.activations) is None
    assert first(taken.gradients) == "second/kernel"
    lines = check_replay.findings(kept, taken)
    assert any(line.startswith("gradients: 3 of 5 not finite, first in the order of the backward") for line in lines)
    assert np.isfinite(taken.gradients["head/kernel"]) and first(taken.after) is not None

    objective = objectives.regression(Small(outputs=1))
    kept = kept_of(objective, batch_of(4) | {"score": jnp.array([1.0, 2, jnp.inf, 3])})
    taken = nonfinite.take(kept, objective, SGD)
    assert first(taken.batch) == "score" and first(taken.activations) is None and taken.loss == np.inf
    assert "it is the loss itself" in "\n".join(check_replay.findings(kept, taken))


def test_a_step_that_is_finite_is_said_to_be():
    """The numbers are those of the plain step; units run again for their gradients hide nothing."""
    objective, batch = objectives.supervised(Small(outputs=3, remat=True)), batch_of(4)
    kept = kept_of(objective, batch)
    taken = nonfinite.take(kept, objective, SGD)
    _, metrics = jax.jit(train.make_train_step(objective, SGD))(kept.state, batch)
    assert taken.loss == pytest.approx(float(metrics["loss"]), rel=1e-5)
    assert taken.grad_norm == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    assert all(value > 0 for value in taken.activations.values())
    assert "all is finite this time" in check_replay.findings(kept, taken)[-1]


def test_a_run_that_stops_and_its_replay(tmp_path, capsys):
    """A rate far too high: status 1 and one line, then the command of that line finds the step and its images."""
    flags = ["--config=configs/scalenet.py:tiny", "--only=scalenet", "--config.seeds=(0,)"]
    command = [sys.executable, "-m", "jaxsd.main", *flags, "--config.stages.half.schedule.rate=1e30"]
    kept = {**os.environ, "XDG_CACHE_HOME": str(CACHE)}
    done = subprocess.run([*command, f"--workdir={tmp_path}"], cwd=ROOT, env=kept, capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    folder = tmp_path / "stages/original/half/seed0"
    assert line.startswith("error: the loss became ") and line.endswith(f"check replay --workdir={folder}")
    before = sorted(path for path in tmp_path.rglob("*"))
    assert check.main(["replay", f"--workdir={folder}"]) == 0
    said = capsys.readouterr().out
    assert "original/half seed 0\nstep " in said and "rate 1e+30" in said and "not finite, first" in said
    rows = json.loads((tmp_path / "subsets/subsets-unlabelled-seed0.json").read_text())
    shown = [part for part in said.splitlines() if part.startswith("  image ")]
    assert len(shown) == 32 and len(rows) == 128 and sorted(path for path in tmp_path.rglob("*")) == before
    assert check.main(["replay", f"--workdir={folder}", "--config=configs/scalenet.py:tiny"]) == 2
    assert "not that of the stage: original/half/seed0: stage.schedule.rate: 1e+30 -> 0.1" in capsys.readouterr().err


def test_the_run_of_a_folder_has_its_seed(tmp_path):
    """The config of a workdir may name the seeds of another job only."""
    config = main.parse(["main", f"--config={ROOT}/configs/scalenet.py:tiny", "--config.seeds=(0,)"])
    run, source = check_replay.find(config, tmp_path, tmp_path / "stages/original/half/seed7")
    assert (run.seed, run.path, len(source)) == (7, ("original", "half"), 128)
    for name in ("half/seed", "half/done.json", "nothing/seed0"):
        with pytest.raises(UserError, match="is no stage of the config"):
            check_replay.find(config, tmp_path, tmp_path / "stages/original" / name)


@pytest.mark.parametrize("place", ["", "stages/original/half/seed0"])
def test_nothing_to_replay_is_one_line(tmp_path, place, capsys):
    assert check.main(["replay", f"--workdir={tmp_path / place}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "holds no step to replay" in said and said.count("\n") == 1
    with pytest.raises(UserError, match="no step is kept in"):
        nonfinite.load(tmp_path, jax.eval_shape(state_of))
