"""A stage: what it begins with, how long it trains, what is written, and by what it is known again."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import threading

import jax
import numpy as np
import pytest
from small import Small, same, source_of

import jaxsd.stage
from jaxsd import models, objectives
from jaxsd.data.source import standardisation
from jaxsd.errors import RunError, Stopped, UserError
from jaxsd.fits import check_names
from jaxsd.models.forward import STANDARDISE, forward
from jaxsd.models.vit import resize_positions
from jaxsd.stage import Run, Stage, check_folder, done, plan_of, restore, run_stage, start
from jaxsd.train import loop, optimiser, schedule
from jaxsd.views.view import scale
from jaxsd.workdir import locked, write_json

SOURCE = source_of(10)
STANDARD = standardisation(SOURCE)
OPTIMISER = optimiser.with_rate(optimiser.sgd(momentum=0.9))
SMALL = Small(outputs=4)
ROTATION = objectives.rotation(SMALL)


def stage_of(name="first", *, model=SMALL, objective=ROTATION, epochs=2, rate=0.1, **options):
    options = {"batch_size": 4, "spec": {"network": name}, **options}
    rates = schedule.steps(rate, milestones=(1,), factor=0.5)
    return Stage(name, model, objective, OPTIMISER, rates, epochs, **options)


def run_of(stage=None, path=None, *, seed=0, data="digits", parent=None):
    stage = stage or stage_of()
    return Run(stage, path or (stage.name,), seed, data, parent, STANDARD)


def trained(run, folder=None, source=SOURCE, **options):
    return run_stage(run, source, workdir=folder, **options)


# what it begins with


def test_the_next_scale_begins_with_what_the_last_ended_with(plain):
    """The first forward pass on the larger images is that of the carried weights, bit for bit; only the head is new."""
    network = {"depths": (1, 1), "widths": (4, 4)}
    source = source_of(6, side=12)
    model = models.ResNet(outputs=4, **network)
    half = stage_of("half", model=model, objective=objectives.rotation(model), view=scale(0.5), epochs=1)
    parent = trained(run_of(half), source=source)

    def outputs(model, params, extra):
        apply = jax.jit(lambda p, c, x: forward(model, p, c, x, train=False))
        return apply(params, extra["model"], source.images)

    full = dataclasses.replace(half, name="full", view=scale(1.0))
    state, lines = start(full, jax.random.key(7), full.view(source), STANDARD, parent)
    same(outputs(model, state.params, state.extra)[:2], outputs(model, parent.params, parent.extra)[:2])
    assert {line["action"] for line in lines} == {"copied"}
    assert int(state.step) == 0 and not np.any(jax.tree.leaves(state.opt_state.inner_state)[0])

    other = models.ResNet(outputs=3, **network)
    task = stage_of("task", model=other, objective=objectives.supervised(other), fresh=("head",))
    state, lines = start(task, jax.random.key(7), source, STANDARD, parent)
    assert {line["tensor"] for line in lines if line["action"] == "fresh"} == {"params/head/kernel", "params/head/bias"}
    found = outputs(other, state.params, state.extra).features
    same(found, outputs(model, parent.params, parent.extra).features)


def test_positions_are_fitted_to_larger_images(plain):
    """A transformer goes on at twice the resolution: only the position table changes, and the account says so."""
    form = {"width": 8, "depth": 1, "heads": 2, "patch": 4}
    source = source_of(6, side=16)
    models_of = {side: models.VisionTransformer(outputs=4, side=side, **form) for side in (8, 16)}
    small, large = (
        stage_of(str(side), model=model, objective=objectives.rotation(model), view=scale(side / 16), epochs=1)
        for side, model in models_of.items()
    )
    parent = trained(run_of(small), source=source)
    state, lines = start(large, jax.random.key(7), large.view(source), STANDARD, parent)
    told = {line["tensor"]: line["action"] for line in lines}
    assert {tensor for tensor, action in told.items() if action == "adapted"} == {"params/embed/positions"}
    assert set(told.values()) == {"adapted", "copied"}
    table = resize_positions(parent.params["embed"]["positions"], (4, 4))
    np.testing.assert_array_equal(state.params["embed"]["positions"], table)
    same(state.params["block1"], parent.params["block1"])


def test_a_stage_without_one_before_is_fresh_and_standardised():
    state, lines = start(stage_of(), jax.random.key(0), SOURCE, STANDARD, None)
    assert {line["action"] for line in lines} == {"fresh"}
    assert len(lines) == len(jax.tree.leaves((state.params, state.extra["model"]["batch_stats"])))
    same(list(jax.tree.map(np.asarray, state.extra["model"][STANDARDISE]).values()), list(STANDARD))


def test_training_leaves_the_parent_alone():
    """Other arms begin with the same weights: no buffer of theirs is given away."""
    parent = trained(run_of())
    copies = jax.tree.map(np.array, parent)
    frozen = Small(outputs=4, frozen=("block1",))
    tuned = stage_of("tuned", model=frozen, objective=objectives.rotation(frozen), freeze=("block1",))
    first = trained(run_of(tuned, ("first", "tuned")), parent=parent)
    same(jax.tree.map(np.asarray, parent), copies)
    same(first.params["block1"], parent.params["block1"])
    same(first.extra["model"]["batch_stats"]["block1"], parent.extra["model"]["batch_stats"]["block1"])
    same(trained(run_of(tuned, ("first", "tuned")), parent=parent), first)


def test_keys_are_a_function_of_seed_and_place():
    first, again, seed, place = run_of(), run_of(), run_of(seed=1), run_of(path=("other", "first"))
    same(trained(first), trained(again))
    for other in (seed, place):
        assert np.any(trained(first).params["head"]["kernel"] != trained(other).params["head"]["kernel"])


# how long it trains


@pytest.mark.parametrize(
    ("options", "images", "batch_size", "repeat", "steps"),
    [
        ({}, 10, 4, 1, 3),
        ({"drop_last": True}, 10, 4, 1, 2),
        ({"epoch_images": 30}, 10, 4, 3, 8),
        ({"epoch_images": 4}, 10, 4, 1, 3),
        ({"batch_size": 128}, 10, 10, 1, 1),
        ({"batch_size": 128, "drop_last": True}, 10, 10, 1, 1),
        ({"batch_size": 16, "epoch_images": 25}, 10, 16, 2, 2),
    ],
)
def test_plans(options, images, batch_size, repeat, steps):
    plan = plan_of(stage_of(**options), jax.random.key(0), images)
    assert (plan.batch_size, plan.repeat, len(plan.rates)) == (batch_size, repeat, 2 * steps)
    index, mask = plan.batches(0)
    assert index.shape == (steps, batch_size)
    if not options.get("drop_last"):
        assert np.bincount(index[mask > 0]).tolist() == [repeat] * images
    np.testing.assert_allclose(plan.rates, [0.1] * steps + [0.05] * steps)


def test_pixels_and_stretching():
    """Rotation shows four views; 2 epochs of 3 x 10 images of 6 x 6."""
    stage = stage_of(epoch_images=30)
    assert stage.pixels(10, (6, 6), 2) == 2 * 30 * 4 * 36
    longer = stage.stretched(6)
    assert (longer.epochs, longer.schedule.milestones, longer.match) == (6, (3.0,), ())


def test_wrong_lengths_and_names():
    for options in ({"epochs": 0}, {"batch_size": 0}):
        with pytest.raises(UserError, match="stage 'first': .*give 1 or more"):
            stage_of(**options)
    with pytest.raises(UserError, match="arm 'a': a stage stands twice in first, first"):
        check_names([stage_of(), stage_of()], "arm 'a'")


def test_a_set_smaller_than_a_batch_is_said(caplog):
    logging.getLogger("jaxsd").propagate = True
    with caplog.at_level(logging.INFO, "jaxsd"):
        trained(run_of(stage_of(batch_size=64, epochs=1)))
    assert "fewer images than a batch: batch size 10, not 64" in caplog.text
    assert "the rate never drops at epoch 1: the stage has 1" in caplog.text


# what is written


def test_files_of_a_stage(tmp_path):
    run = run_of(path=("half", "first"), seed=3)
    found = trained(run, tmp_path, validation=source_of(5, seed=1))
    folder = tmp_path / "stages/half/first/seed3"
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {"checkpoints", "done.json", "metrics.jsonl", "stage.json", "transfer.json"}
    record = done(run, tmp_path)
    assert record == json.loads((folder / "done.json").read_text())
    assert (record["images"], record["steps"], record["pixels"]) == (20, 6, 20 * 4 * 36)
    assert record["metrics"].keys() == {"loss", "accuracy", "grad_norm", "rate"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["split"]) for line in lines] == [
        (1, "train"), (1, "validation"), (2, "train"), (2, "validation"),
    ]  # fmt: skip
    assert record["metrics"]["loss"] == lines[2]["loss"] and record["seconds"] == lines[2]["seconds"]
    same(found, trained(run))  # without a folder: the same bits
    same(restore(run, SOURCE, tmp_path), found)
    assert check_folder(run, tmp_path) == []


def test_a_finished_stage_is_not_trained_again(tmp_path):
    run = run_of()
    found = trained(run, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run", None)
        same(trained(run, tmp_path), found)


@pytest.mark.parametrize("lost", ["done.json", "transfer.json", "stage.json", "metrics.jsonl"])
def test_any_file_of_a_killed_stage_may_be_missing(tmp_path, lost):
    """Killed between the last checkpoint and done.json, or a file removed by hand: the same weights, no training."""
    run = run_of()
    found = trained(run, tmp_path)
    folder = run.folder(tmp_path)
    (folder / "done.json").unlink()
    (folder / lost).unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "epoch", None)
        same(trained(run, tmp_path), found)
    assert done(run, tmp_path)["fingerprint"] == run.fingerprint()
    assert (folder / "stage.json").exists() and (folder / "transfer.json").exists()


def test_damaged_weights_of_a_finished_stage_are_trained_again(tmp_path, caplog):
    """From the checkpoint before, which is never taken for the result; with none left one line, and all stays."""
    run = run_of()
    found = trained(run, tmp_path, save_seconds=0)
    folder = run.folder(tmp_path)
    (folder / "checkpoints/6/model/_METADATA").write_text("{")
    logging.getLogger("jaxsd").propagate = True
    with caplog.at_level(logging.INFO, "jaxsd"):
        assert restore(run, SOURCE, tmp_path) is None and done(run, tmp_path) is None
        same(trained(run, tmp_path), found)
    assert "checkpoint of step 6" in caplog.text and "continues at step 5 of 6" in caplog.text
    same(restore(run, SOURCE, tmp_path), found)
    shutil.rmtree(folder / "checkpoints/6")  # done.json says that step 6 is the result
    assert restore(run, SOURCE, tmp_path) is None and "no checkpoint of step 6" in caplog.text
    (folder / "checkpoints/5/manifest.json").unlink()
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(RunError, match=rf"no whole checkpoint is left in .*step 5 .*remove {folder} to train"):
        trained(run, tmp_path)
    assert kept == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("why", ["unreadable", "a misfit"])
def test_whole_weights_are_never_given_up(tmp_path, monkeypatch, why):
    """A disk that fails for a moment and a network changed in the code are errors; everything stays where it is."""
    run = run_of()
    trained(run, tmp_path)
    folder = run.folder(tmp_path)
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if why == "unreadable":
        digest = hashlib.file_digest

        def failing(file, kind):
            if file.name.endswith("_METADATA"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), file.name)
            return digest(file, kind)

        monkeypatch.setattr(hashlib, "file_digest", failing)
        with pytest.raises(OSError, match="Input/output error.*_METADATA"):
            restore(run, SOURCE, tmp_path)
        (folder / "done.json").rename(tmp_path / "aside")
        with pytest.raises(OSError, match="Input/output error.*_METADATA"):  # of an unfinished run just so
            trained(run, tmp_path)
        (tmp_path / "aside").rename(folder / "done.json")
    else:
        wide = stage_of(objective=objectives.rotation(Small(outputs=4, widths=(4, 8))))
        with pytest.raises(RunError, match="of another network or recipe"):
            restore(run_of(wide), SOURCE, tmp_path)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept


# by what it is known again


def test_the_fingerprint_is_of_all_that_decides_the_weights():
    base = run_of()
    others = [
        run_of(seed=1),
        run_of(data="other"),
        run_of(parent="abc"),
        run_of(path=("other", "first")),
        run_of(stage_of(spec={"network": "another"})),
        run_of(stage_of(epochs=3)),
        run_of(stage_of(rate=0.2)),
        run_of(stage_of(epochs=4).stretched(2)),  # the same length and spec, another course of the rate
    ]
    prints = {run.fingerprint() for run in (base, *others)}
    assert len(prints) == len(others) + 1
    assert (
        run_of(stage_of(spec={"b": (1, 2), "a": 0})).identity()
        == run_of(stage_of(spec={"a": 0, "b": [1, 2]})).identity()
    )
    assert base.fingerprint() == run_of().fingerprint()


def test_another_stage_in_the_folder_is_an_error(tmp_path):
    trained(run_of(), tmp_path)
    other = run_of(stage_of(rate=0.3))
    with pytest.raises(UserError, match=r"made otherwise: first/seed0: stage.schedule.rate: 0.1 -> 0.3; take another"):
        trained(other, tmp_path)
    assert check_folder(other, tmp_path) == ["first/seed0: stage.schedule.rate: 0.1 -> 0.3"]
    assert check_folder(other, tmp_path, reuse=True) == []
    same(trained(other, tmp_path), trained(other))


def test_a_folder_is_not_emptied_under_the_hands_of_another(tmp_path):
    """It is waited for; what it has begun anew by then stays, and is named where it is yet another run's."""
    trained(run_of(), tmp_path)
    other, third = run_of(stage_of(rate=0.3)), run_of(stage_of(rate=0.5))
    folder = other.folder(tmp_path)
    kept = sorted(folder.rglob("*"))
    with locked(folder / ".lock", lambda owner: None):
        with pytest.raises(Stopped, match="stopped at .*seed0, which process "):
            check_folder(other, tmp_path, reuse=True, stop=loop.Stop(signal=15))
        assert sorted(folder.rglob("*")) == kept

    def begun(wanted):
        """`locked` after a wait in which another process has trained a run there."""

        @contextlib.contextmanager
        def taken(path, on_wait):
            write_json(folder / "stage.json", wanted.identity())
            yield

        return taken

    for wanted, lines in ((other, []), (third, ["first/seed0: stage.schedule.rate: 0.5 -> 0.3"])):
        write_json(folder / "stage.json", run_of().identity())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jaxsd.stage, "locked", begun(wanted))
            assert check_folder(other, tmp_path, reuse=True) == lines
        assert done(run_of(), tmp_path) is not None
    assert check_folder(other, tmp_path, reuse=True) == []
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_stage_that_cannot_be_known_again_is_not_written(tmp_path):
    with pytest.raises(UserError, match="stage 'first': give a spec"):
        trained(run_of(stage_of(spec={})), tmp_path)
    assert not list(tmp_path.iterdir())


# two processes


def test_a_stage_that_another_process_trains_is_waited_for(tmp_path):
    """The lock is held, then let go with the stage done: the weights are read, not trained."""
    run, results = run_of(), []
    held, finished = threading.Event(), threading.Event()

    def other():
        with locked(run.folder(tmp_path) / ".lock", lambda owner: None):
            held.set()
            assert finished.wait(60)

    def mine():
        results.append(trained(run, tmp_path))

    holder, waiter = threading.Thread(target=other), threading.Thread(target=mine)
    holder.start()
    assert held.wait(60)
    stop = loop.Stop(signal=15)
    with pytest.raises(Stopped, match=f"stopped at .*, which process {os.getpid()} on {platform.node()} trains"):
        trained(run, tmp_path, stop=stop)
    waiter.start()
    waiter.join(0.5)
    assert waiter.is_alive() and not (run.folder(tmp_path) / "stage.json").exists()
    finished.set()
    waiter.join(60)
    holder.join(60)
    same(results[0], trained(run))
