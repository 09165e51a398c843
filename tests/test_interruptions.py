"""Stopping, going on and checkpoints: what was interrupted ends bit for bit as what was not."""

import json
import logging
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import FROZEN, SGD, Small, batch_of, close, plan_of, same, source_of, state_of

from jaxsd import objectives, train
from jaxsd.errors import Stopped
from jaxsd.stage import data_of
from jaxsd.train import loop, optimiser
from jaxsd.train.checkpoint import Checkpoints, restore_model
from jaxsd.train.state import merge
from jaxsd.views.augment import flip_horizontal
from jaxsd.workdir import Journal

# interruptions


def timeless(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images/s")} for line in lines]


def run_in(folder, plan, *, stop_at=None, save_seconds=60.0, objective=FROZEN, source=None):
    """Trains in a folder with validation; asks to stop once step `stop_at` has begun. Returns the state."""
    source, stop = source or source_of(10), loop.Stop()
    checkpoints, journal = Checkpoints(folder / "checkpoints"), Journal(folder / "metrics.jsonl")

    def validate(state):
        return loop.evaluate(objective, merge(state.params, state.frozen), state.extra, data_of(source_of(5, seed=9)))

    watch = loop.Watch("here", checkpoints, journal, save_seconds, stop, checks={"validation": validate})
    look = loop._Loop._look

    def looking(self, step, loss, ahead):
        if stop_at is not None and step == stop_at:
            stop.signal = 15
        look(self, step, loss, ahead)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop._Loop, "_look", looking)
            state = state_of(objective, freeze=("block1",))
            return loop.run(state, data_of(source), plan, objective, SGD, flip_horizontal_once, watch=watch)
    finally:
        checkpoints.close()


flip_horizontal_once = flip_horizontal()


@pytest.mark.parametrize("save_seconds", [60.0, 0.0])
def test_a_stopped_run_ends_as_one_that_is_not(tmp_path, save_seconds):
    """Stopped at the first step, within an epoch, at an epoch's end and at the very end: the same bits."""
    plan = plan_of(10, epochs=3)
    wanted = run_in(tmp_path / "straight", plan)
    for stop_at in (1, 2, 5, 6, 9):
        with pytest.raises(Stopped, match=f"stopped at here, step {stop_at} of 9; saved") as stopped:
            run_in(tmp_path / "stopped", plan, stop_at=stop_at, save_seconds=save_seconds)
        assert stopped.value.signal == 15
    found = run_in(tmp_path / "stopped", plan)
    same(found, wanted)
    metrics = [timeless(tmp_path / name / "metrics.jsonl") for name in ("straight", "stopped")]
    assert metrics[0] == metrics[1]
    assert [(line["split"], line["epoch"]) for line in metrics[0]] == [
        (split, epoch) for epoch in (1, 2, 3) for split in ("train", "validation")
    ]
    seconds = [json.loads(line).get("seconds", 0) for line in (tmp_path / "stopped/metrics.jsonl").open()]
    assert seconds[::2] == sorted(seconds[::2]) and seconds[0] > 0


def test_a_signal_before_the_first_step_costs_nothing(tmp_path):
    objective = objectives.rotation(Small(outputs=4))
    watch = loop.Watch(stop=loop.Stop(signal=2))
    with pytest.raises(Stopped, match="step 0 of 6; not saved: there is no workdir") as stopped:
        loop.run(state_of(objective), data_of(source_of(10)), plan_of(10), objective, SGD, watch=watch)
    assert stopped.value.signal == 2
    assert loop.compiled(objective, SGD, None, None)[1]._cache_size() == 0


@pytest.mark.parametrize("count", [1, 4])
def test_a_resumed_run_is_the_same_program(tmp_path, devices, count, caplog):
    """Compiled programs are kept on disk: a run that goes on finds its own there."""
    devices(count)
    plan, objective = plan_of(10, epochs=2), objectives.rotation(Small(outputs=4, frozen=("block1",)))
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        with pytest.raises(Stopped):
            run_in(tmp_path, plan, stop_at=2, objective=objective)
        run_in(tmp_path, plan, objective=objective)
    for name in ("advance", "evaluate"):
        assert sum(f"Compiling jit({name})" in line for line in caplog.messages) == 1


def test_a_run_goes_on_with_other_devices(tmp_path, devices):
    plan = plan_of(10, epochs=3)
    wanted = run_in(tmp_path / "straight", plan)
    for count, stop_at in ((4, 4), (2, 7)):
        devices(count)
        with pytest.raises(Stopped):
            run_in(tmp_path / "moved", plan, stop_at=stop_at)
    devices(1)
    close(run_in(tmp_path / "moved", plan), wanted, rtol=1e-4, atol=1e-5)


def test_the_journal_bears_a_cut_line(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.rewind(5)
    assert journal.last() is None
    for step in (2, 4, 6):
        journal.write({"step": step, "split": "train"})
    with journal.path.open("a") as file:
        file.write('{"step": 8, "spl')
    journal.rewind(4)
    assert [line["step"] for line in timeless(journal.path)] == [2, 4]
    assert journal.last() == {"step": 4, "split": "train"} and journal.last("validation") is None


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are asked of Linux")
def test_what_is_promised_is_on_disk(tmp_path, monkeypatch):
    """Every line of the journal, what a rewind leaves, the name of a checkpoint: each flushed, and with its content."""
    flush, flushed = os.fsync, []

    def noted(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        flushed.append((path, sorted(path.glob("[0-9]*")) if path.is_dir() else path.read_bytes()))
        flush(descriptor)

    journal = Journal(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(os, "fsync", noted)
    lines = []
    for step in (2, 4):
        journal.write({"step": step, "split": "train"})
        lines.append(journal.path.read_bytes())
    assert flushed == [(journal.path, text) for text in lines]
    journal.rewind(2)
    assert [text for _, text in flushed[2:]] == lines[:1] and journal.path.read_bytes() == lines[0]
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, state_of(), {})
    checkpoints.close()
    assert (tmp_path / "checkpoints", [tmp_path / "checkpoints/3"]) in flushed


# checkpoints


def checkpointed(folder, tx, steps, *, objective=FROZEN, **options):
    """Trains so many steps with donated buffers, saving a copy of each state; returns the manager and the states."""
    step = jax.jit(train.make_train_step(objective, tx), donate_argnums=0)
    state, kept = state_of(objective, tx, freeze=("block1",)), {}
    checkpoints = Checkpoints(folder, **options)
    for number in range(1, steps + 1):
        state, _ = step(state, batch_of(4, seed=number))
        kept[number] = jax.tree.map(jnp.copy, state)
        checkpoints.save(number, kept[number], sums_of(number), seconds=number / 2)
    return checkpoints, kept


def sums_of(number):
    return {"steps": jnp.int32(number), "weight": jnp.float32(0.1), "totals": {"loss": jnp.float32(1 / 3)}}


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
        optimiser.with_rate(optimiser.accumulate(optimiser.lars(), 2)),
        optax.sgd(0.1),
    ],
    ids=["adamw", "accumulated lars", "sgd"],
)
def test_a_checkpoint_holds_every_bit(tmp_path, tx):
    checkpoints, kept = checkpointed(tmp_path, tx, 3)
    checkpoints.wait()
    like = jax.eval_shape(lambda: (state_of(FROZEN, tx, freeze=("block1",)), sums_of(0)))
    step, state, sums, seconds = checkpoints.resume(*like)
    assert (step, seconds) == (3, 1.5)
    same(state, kept[3])
    same(sums, sums_of(3))
    assert jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
    same(checkpoints.restore(2, *like).state, kept[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]  # the newest two
    checkpoints.close()
    model = {"params": merge(kept[3].params, kept[3].frozen), "extra": kept[3].extra}
    same(restore_model(tmp_path, model), model)


def test_saving_in_the_background_keeps_the_state_of_the_step(tmp_path):
    """The loop gives its buffers away while Orbax writes: what is on disk is the state of the step all the same."""
    plan, copies = plan_of(10, epochs=5), {}
    save = Checkpoints.save

    def copying(self, step, state, sums, **options):
        copies[step] = jax.tree.map(lambda x: np.array(x, copy=True), (state.params, state.opt_state))
        save(self, step, state, sums, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", copying)
        with pytest.raises(Stopped):
            run_in(tmp_path, plan, stop_at=13, save_seconds=0)
    assert sorted(copies) == list(range(1, 14))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    like = jax.eval_shape(lambda: state_of(FROZEN, freeze=("block1",)))
    sums = {"steps": np.int32(0), "weight": np.float32(0)}
    sums["totals"] = {name: np.float32(0) for name in ("loss", "accuracy", "grad_norm")}
    for step in (12, 13):
        state = checkpoints.restore(step, like, sums).state
        same(jax.tree.map(np.asarray, (state.params, state.opt_state)), copies[step])
    checkpoints.close()
