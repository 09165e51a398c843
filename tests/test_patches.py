"""Patches that grow over a frozen trunk: the grid, the trunk computed once, the ladder, two ways of splitting."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from small import same

from jaxsd import models, objectives, train
from jaxsd.data.batches import cut, cut_on_host
from jaxsd.data.source import Grid, Source, Splits
from jaxsd.errors import Stopped, UserError
from jaxsd.evaluate.answers import averaged, patch_scores
from jaxsd.measure import measure
from jaxsd.recipe import Experiment, Recipe
from jaxsd.stage import Run, Stage, data_of, run_stage, start
from jaxsd.train import loop, optimiser, schedule, trunk
from jaxsd.views.view import compose, patches, scale

TX = optimiser.with_rate(optimiser.adam())


def source_of(count=12, side=16, seed=0):
    random = np.random.default_rng(seed)
    noise = np.arange(count) % 4
    images = np.clip(128 + random.normal(size=(count, side, side, 1)) * (10 + 20 * noise[:, None, None, None]), 0, 255)
    groups = tuple(f"scene{i // 4}" for i in range(count))
    return Source(images.astype(np.uint8), scores=10.0 + 20 * noise, groups=groups)


def network(grow, frozen=()):
    return models.build(
        "patchnet", patch=8, first=(4,), widths=(4,), hidden=(16, 8), grow=grow, outputs=1, dropout=0.0, frozen=frozen
    )


def step_of(name, grow, size, *, freeze=(), fresh=(), **options):
    model = network(grow, freeze)
    return Stage(
        name, model, objectives.regression(model), TX, schedule.constant(0.01), 3, 8, on="labelled",
        view=patches(size), freeze=freeze, fresh=fresh, spec={"is": name}, **options,
    )  # fmt: skip


FIRST = step_of("patch8", 1, 8)
SECOND = step_of("patch16", 2, 16, freeze=("block1",), fresh=("block2", "fc1", "fc2", "head"))


# the grid


def test_patches_of_a_ramp_by_hand():
    ramp = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    viewed = patches(2)(Source(ramp))
    assert (len(viewed), viewed.patches, viewed.shape) == (4, 4, (2, 2, 1))
    found = cut_on_host(ramp, np.arange(4), viewed.grid)[..., 0]
    assert found[:3].tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]], [[8, 9], [12, 13]]]
    assert np.array_equal(jax.jit(cut, static_argnums=2)(ramp, np.arange(4), viewed.grid)[..., 0], found)


@pytest.mark.parametrize(
    ("side", "size", "stride", "count"),
    [(512, 32, None, 256), (512, 64, None, 64), (512, 128, None, 16), (512, 256, None, 4), (512, 512, None, 1)]
    + [(512, 32, 16, 961), (512, 64, 32, 225), (512, 128, 64, 49), (512, 256, 128, 9), (256, 64, None, 16)],
)
def test_patches_of_an_image(side, size, stride, count):
    assert Grid(size, stride or size).count(side, side) == count


def test_patches_side_by_side_are_the_images():
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 8, 3), np.uint8)
    found = np.asarray(cut(images, np.arange(3 * 6), Grid(4, 4)))
    again = found.reshape(3, 3, 2, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
    assert np.array_equal(again, images)
    overlapping = Grid(6, 2)
    rows = np.arange(3 * overlapping.count(12, 8))
    assert np.array_equal(np.asarray(cut(images, rows, overlapping)), cut_on_host(images, rows, overlapping))
    assert np.array_equal(cut_on_host(images, rows, overlapping)[rows[-1]], images[-1, -6:, -6:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: patches(5)(s), "sides that do: 15, 20; or strides: 1"),
        (lambda s: patches(6, 4)(s), "sides that do: 14, 18; or strides: 1, 2, 5"),
        (lambda s: patches(20)(s), "larger than images with a side of 16"),
        (lambda s: patches(0)(s), "size and a stride of 1 or more"),
        (lambda s: patches(8)(patches(8)(s)), "give one view 'patches'"),
        (lambda s: compose(patches(8), scale(0.5))(s), "must be the last view"),
    ],
)
def test_patches_that_do_not_fit_say_what_does(make, message):
    with pytest.raises(UserError) as error:
        make(source_of())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_image_is_the_mean_of_its_patches():
    outputs = np.log(np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8]]))
    assert np.allclose(averaged(outputs, 2), [[0.65, 0.35], [0.3, 0.7]])
    assert averaged(outputs, 2, "vote").tolist() == [[0.5, 0.5], [0, 1]]
    assert np.allclose(averaged(outputs, 2, "logits"), outputs.reshape(2, 2, 2).mean(1))
    assert np.allclose(averaged(outputs[[1, 0, 3, 2]], 2), averaged(outputs, 2))
    assert averaged(np.array([[1.0], [3.0]]), 2).tolist() == [[2.0]]
    with pytest.raises(UserError, match="choose from probability"):
        averaged(outputs, 2, "mean")


def test_the_loop_trains_on_patches_as_on_a_copied_set():
    """Patches that are cut in the step, against the same patches as images of their own."""
    source = source_of()
    viewed = patches(8)(source)
    copied = Source(
        cut_on_host(source.images, np.arange(len(viewed)), viewed.grid), scores=np.repeat(source.scores, viewed.patches)
    )
    objective = FIRST.objective
    plan = loop.Plan(len(viewed), 8, 2, np.full(2 * 6, 0.01, np.float32), jax.random.key(3))
    ends = []
    for data, grid in ((data_of(viewed), viewed.grid), (data_of(copied), None)):
        state = train.init(jax.random.key(0), objective, TX, {"image": copied.images[:1]})
        ends.append(loop.run(state, data, plan, objective, TX, grid=grid))
    same(ends[0].params, ends[1].params)
    measured = [
        loop.evaluate(objective, ends[0].params, ends[0].extra, data_of(s), grid=s.grid) for s in (viewed, copied)
    ]
    assert measured[0] == measured[1]


# the trunk computed once


@pytest.fixture(scope="module")
def first():
    source = source_of()
    return run_stage(Run(FIRST, ("a", "patch8"), 0, "data", None, standard()), source)


def standard():
    return np.array([0.5], np.float32), np.array([0.2], np.float32)


def second(first, stage=SECOND, workdir=None, **options):
    run = Run(stage, ("a", "patch8", "patch16"), 0, "data", "parent", standard())
    return run_stage(run, source_of(), parent=first, workdir=workdir, **options)


def test_frozen_leaves_are_those_of_the_step_before(first):
    end = second(first)
    same(end.params["block1"], first.params["block1"])
    same(end.extra["model"]["batch_stats"]["block1"], first.extra["model"]["batch_stats"]["block1"])
    for part in ("fc1", "fc2"):
        assert not np.array_equal(end.params[part]["dense"]["kernel"], first.params[part]["dense"]["kernel"])
    assert "block2" not in first.params and "block2" in end.params


@pytest.mark.parametrize("place", ["device", "host", "disk", "auto"])
def test_a_trunk_computed_once_gives_the_same_weights(first, place, tmp_path):
    plain = second(first, dataclasses.replace(SECOND, trunk="never"))
    known = second(first, dataclasses.replace(SECOND, trunk=place), tmp_path if place == "disk" else None)
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(known.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert not list(tmp_path.rglob("trunk"))  # a finished stage keeps no features


def test_features_on_disk_are_taken_up_where_they_were_left(first, tmp_path, monkeypatch):
    monkeypatch.setattr(trunk, "BATCH", 4)
    monkeypatch.setattr(trunk, "FLUSH_SECONDS", 0)
    stage, stop = dataclasses.replace(SECOND, trunk="disk"), loop.Stop()
    straight = second(first, stage, tmp_path / "straight")
    computed = []
    look = loop.Stop.look

    def stopping(self, where):
        if len(computed) == 2:
            self.signal = 15
        look(self, where)
        computed.append(where)

    monkeypatch.setattr(loop.Stop, "look", stopping)
    with pytest.raises(Stopped):
        second(first, stage, tmp_path / "stopped", stop=stop)
    note = next((tmp_path / "stopped").rglob("rows.json"))
    assert json.loads(note.read_text())["rows"] == 8
    monkeypatch.setattr(loop.Stop, "look", lambda self, where: (computed.append(where), look(self, where))[1])
    computed.clear()
    again = second(first, stage, tmp_path / "stopped")
    assert len(computed) == 1  # the last 4 of 12 rows
    same(again.params, straight.params)


def test_damaged_features_on_disk_are_computed_again(first, tmp_path, monkeypatch, caplog):
    """A byte changed in what an earlier start has left, or the file cut: noticed before anything is trained on it."""
    logging.getLogger("jaxsd").propagate = True
    monkeypatch.setattr(trunk, "FLUSH_SECONDS", 0)
    state, _ = start(SECOND, jax.random.key(0), SECOND.view(source_of()), standard(), first)
    given = (SECOND.objective, {**state.params, **state.frozen}, state.extra, data_of(source_of()))
    wanted = trunk.compute(*given, place="device").features
    options, file = {"place": "disk", "folder": tmp_path / "trunk"}, tmp_path / "trunk/0.npy"
    for content in (None, lambda old: old[:-3] + bytes([old[-3] ^ 1]) + old[-2:], lambda old: old[:-50]):
        caplog.clear()
        if content is not None:
            file.write_bytes(content(file.read_bytes()))
        same(np.asarray(trunk.compute(*given, **options).feed(np.arange(12))), np.asarray(wanted))
        assert ("are damaged: they are computed again" in caplog.text) == (content is not None)


def test_features_of_another_run_are_thrown_away(first, tmp_path):
    folder = tmp_path / "trunk"
    frozen = SECOND.objective
    state, _ = start(SECOND, jax.random.key(0), SECOND.view(source_of()), standard(), first)
    params = {**state.params, **state.frozen}
    given = (frozen, params, state.extra, data_of(source_of()))
    wanted = trunk.compute(*given, place="device").features
    for stamp in ("a", "b", "b"):
        found = trunk.compute(*given, place="disk", folder=folder, stamp=stamp)
        same(np.asarray(found.feed(np.arange(12))), np.asarray(wanted))
    other = jax.tree.map(lambda x: x * 0, params)
    kept = trunk.compute(frozen, other, *given[2:], place="disk", folder=folder, stamp="b")
    assert np.array_equal(kept.feed(np.arange(12)), wanted)  # the stamp is what says that they are the same
    with pytest.raises(UserError, match="choose from auto"):
        trunk.compute(*given, place="floppy")


def test_augmented_images_have_no_fixed_trunk(first, monkeypatch):
    from jaxsd.views.augment import flip_horizontal

    monkeypatch.setattr(trunk, "compute", lambda *args, **options: pytest.fail("computed"))
    second(first, dataclasses.replace(SECOND, augment=flip_horizontal()))


# the ladder and its splits


def test_a_ladder_is_measured_by_scene_and_by_image(tmp_path):
    source = source_of(count=40)
    long = {"epochs": 30, "batch_size": 32}
    one, two = (dataclasses.replace(stage, **long) for stage in (FIRST, SECOND))
    full = dataclasses.replace(step_of("scratch", 2, 16), batch_size=32, match=("patch8", "patch16"))
    recipe = Recipe(
        name="ladder",
        arms={"statistics": (), "scratch": (full,), "patch8": (one,), "patch16": (one, two)},
        evaluations=("finetune",),
        baseline="scratch",
        seeds=(0, 1),
        splits={"by_scene": {"by": "group"}, "by_image": {"by": "image"}},
    )
    experiment = Experiment(recipe, Splits("noise", source, None, None), tmp_path)
    cells = list(experiment.cells())
    assert len(cells) == 4 * 2 * 2
    experiment.check(cells)
    rows = [row for cell in cells for row in measure(experiment, cell)]
    found = {(row["arm"], row["split"], row["metric"], row["seed"]): row for row in rows}
    assert {key[2] for key in found} >= {"pearson", "spearman", "kendall", "mae", "rmse"}
    for cell in cells:
        splits = experiment.viewed(cell).splits
        assert len(splits.train) == 32 and len(splits.test) == 8
        assert (set(splits.train.groups) & set(splits.test.groups) == set()) == (cell.split == "by_scene")
    shown = found["patch16", "by_scene", "mae", 0]
    assert shown["n"] == 8 and shown["images"] == 30 * 32 * 5 and shown["pixels"] == 2 * 30 * 32 * 16 * 16
    for arm in ("patch8", "patch16"):  # the score is the level of noise
        assert min(found[arm, "by_scene", "spearman", seed]["value"] for seed in (0, 1)) > 0.9
    assert found["scratch", "by_scene", "mae", 0]["pixels"] == shown["pixels"]
    assert len(list(tmp_path.rglob("patch8/seed*/done.json"))) == 4  # shared by patch8 and patch16


def test_a_stage_copied_alone_is_built_upon(tmp_path):
    """The checkpoint of one step, moved to another workdir, is all that the next step needs."""
    recipe = Recipe(
        name="ladder",
        arms={"patch8": (FIRST,), "patch16": (FIRST, SECOND)},
        evaluations=("finetune",),
        baseline="patch8",
        seeds=(0,),
        splits={"by_scene": {"by": "group"}},
    )
    splits = Splits("noise", source_of(count=40), None, None)
    here, there = (Experiment(recipe, splits, tmp_path / name) for name in ("here", "there"))
    one, two = here.cells()
    here.train(one)
    (done,) = (tmp_path / "here").rglob("done.json")
    shutil.copytree(done.parent, tmp_path / "there" / done.parent.relative_to(tmp_path / "here"))
    there.train(two)
    trained = there.trained(two, there.runs(two))
    assert (tmp_path / "there" / done.relative_to(tmp_path / "here")).read_bytes() == done.read_bytes()
    same(trained.params["block1"], here.trained(one, here.runs(one)).params["block1"])


def test_scores_of_patches_lie_where_the_patches_are(first):
    source = source_of(count=2)
    images = source.images.copy()
    images[0, 8:, :8] = 255
    viewed = patches(8)(source.with_images(images))
    found = patch_scores(FIRST.model, first.params, first.extra["model"], viewed, 100.0)
    before = patch_scores(FIRST.model, first.params, first.extra["model"], patches(8)(source), 100.0)
    assert found.shape == (2, 2, 2)
    assert (found != before).tolist() == [[[False, False], [True, False]], [[False, False], [False, False]]]
