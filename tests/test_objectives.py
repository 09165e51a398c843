"""Objectives against hand values and optax; probes trained together against probes trained alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Dense, Small, batch_of, close, same

from jaxsd import models, objectives, train
from jaxsd.errors import UserError
from jaxsd.models.forward import STANDARDISE, forward
from jaxsd.objectives.rotation import turned_batch
from jaxsd.objectives.supervised import smoothed_cross_entropy

KEY = jax.random.key(0)
LOGITS = jnp.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
LABELS = jnp.array([0, 1])


def value(objective, batch, **options):
    params, extra = objective.init(KEY, batch)
    loss, (metrics, _) = jax.jit(partial(objective.loss, **options))(params, extra, batch, KEY)
    return float(loss), {name: float(metric) for name, metric in metrics.items()}


def test_rotation_views_are_image_major_and_counter_clockwise():
    batch = batch_of(3) | {"mask": jnp.array([1.0, 0.0, 1.0])}
    views = turned_batch(batch)
    images = np.asarray(batch["image"])
    assert views["image"].shape == (12, 6, 6, 1)
    for i in range(3):
        for k in range(4):
            np.testing.assert_array_equal(views["image"][4 * i + k], np.rot90(images[i], k))
    assert views["label"].tolist() == [0, 1, 2, 3] * 3
    assert views["index"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert views["mask"].tolist() == [1] * 4 + [0] * 4 + [1] * 4
    two = turned_batch(batch, (1, 3))
    np.testing.assert_array_equal(two["image"][3], np.rot90(images[1], 3))
    assert two["label"].tolist() == [0, 1] * 3


def test_rotation_begins_at_chance():
    loss, metrics = value(objectives.rotation(Dense(4, zero=True)), batch_of(5))
    assert loss == pytest.approx(np.log(4), abs=1e-6)
    assert metrics == {"accuracy": 0.25}
    loss, _ = value(objectives.rotation(Dense(2, zero=True), turns=(0, 2)), batch_of(5))
    assert loss == pytest.approx(np.log(2), abs=1e-6)


def test_rotation_of_wrong_images_or_turns():
    with pytest.raises(UserError, match="square images, got 4 x 6"):
        turned_batch({"image": jnp.zeros((2, 4, 6, 1))})
    for turns in ((0,), (0, 0), (0, 4)):
        with pytest.raises(UserError, match="turns must be"):
            objectives.rotation(Dense(4), turns=turns)
    assert objectives.rotation(Dense(4)).views == 4
    assert objectives.supervised(Dense(3)).views == 1


@pytest.mark.parametrize("make", [objectives.supervised, objectives.rotation])
def test_masked_images_do_not_count(make):
    """A masked batch gives the loss, metrics and gradient of the shorter batch."""
    long, short = batch_of(6), batch_of(6)
    long["mask"] = jnp.array([1.0, 1, 1, 1, 0, 0])
    short = {name: values[:4] for name, values in short.items()}
    objective = make(Dense(4))
    params, extra = objective.init(KEY, long)
    function = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    close(function(params, extra, long, KEY), function(params, extra, short, KEY))
    assert float(function(params, extra, {**long, "mask": jnp.zeros(6)}, KEY)[0][0]) == 0


def test_label_smoothing_by_hand():
    """Three classes, smoothing 0.3: uniform gives 0.8, 0.1, 0.1; others 0.7, 0.15, 0.15."""
    logs = np.asarray(jax.nn.log_softmax(LOGITS))
    uniform = [-(0.8 * logs[0, 0] + 0.1 * logs[0, 1] + 0.1 * logs[0, 2])]
    uniform += [-(0.1 * logs[1, 0] + 0.8 * logs[1, 1] + 0.1 * logs[1, 2])]
    others = [-(0.7 * logs[0, 0] + 0.15 * logs[0, 1] + 0.15 * logs[0, 2])]
    others += [-(0.15 * logs[1, 0] + 0.7 * logs[1, 1] + 0.15 * logs[1, 2])]
    np.testing.assert_allclose(smoothed_cross_entropy(LOGITS, LABELS, 0.3, "uniform"), uniform, rtol=1e-6)
    np.testing.assert_allclose(smoothed_cross_entropy(LOGITS, LABELS, 0.3, "others"), others, rtol=1e-6)


def test_label_smoothing_is_optaxs():
    targets = optax.smooth_labels(jax.nn.one_hot(LABELS, 3), 0.3)
    wanted = optax.softmax_cross_entropy(LOGITS, targets)
    np.testing.assert_allclose(smoothed_cross_entropy(LOGITS, LABELS, 0.3, "uniform"), wanted, rtol=1e-6)
    plain = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
    for convention in ("uniform", "others"):
        np.testing.assert_array_equal(smoothed_cross_entropy(LOGITS, LABELS, 0.0, convention), plain)
        near = smoothed_cross_entropy(LOGITS, LABELS, 1e-7, convention)
        np.testing.assert_allclose(near, plain, rtol=1e-5)


def test_wrong_smoothing():
    with pytest.raises(UserError, match=r"label_smoothing must be in \[0, 1\)"):
        objectives.supervised(Dense(3), label_smoothing=1.0)
    with pytest.raises(UserError, match="one of uniform, others"):
        objectives.rotation(Dense(3), label_smoothing=0.1).init(KEY, batch_of(2))
        objectives.supervised(Dense(3), convention="other")


def test_no_shape_is_promoted():
    """[B] meets [B], never [B, 1]: such a slip would broadcast to [B, B] and train on nonsense."""
    objective = objectives.rotation(Dense(4), label_smoothing=0.1)
    batch = batch_of(3)
    params, extra = objective.init(KEY, batch)
    collections = {name: tree for name, tree in extra["model"].items() if name != STANDARDISE}
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(jax.grad(lambda p: objective.loss(p, {"model": collections}, batch, KEY)[0]), params)


def test_inference_leaves_extra_alone():
    objective = objectives.supervised(Small(outputs=3))
    batch = batch_of(4)
    params, extra = objective.init(KEY, batch)
    _, (_, after) = jax.jit(partial(objective.loss, train=False))(params, extra, batch, KEY)
    same(after, extra)
    _, (_, after) = jax.jit(objective.loss)(params, extra, batch, KEY)
    changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), after["model"], extra["model"])
    assert all(jax.tree.leaves(changed["batch_stats"])) and not any(jax.tree.leaves(changed[STANDARDISE]))


def test_probes_learn_as_if_alone():
    """Probes on two blocks trained together equal each trained with the other's loss left out."""
    model, batch, optimiser = models.LinearProbe(Small(outputs=4), outputs=3), batch_of(8), optax.sgd(0.1, momentum=0.9)
    together = objectives.supervised(model)

    def alone(block):
        def loss(params, extra, batch, key, train=True):
            result = forward(model, params, extra["model"], batch["image"], train=train, key=key)
            each = optax.softmax_cross_entropy_with_integer_labels(result.outputs[block], batch["label"])
            return each.mean(), ({}, {"model": result.collections})

        return objectives.Objective(together.init, loss)

    def trained(objective):
        state = train.init(KEY, objective, optimiser, batch, freeze=("trunk",))
        begin, step = state.params, jax.jit(train.make_train_step(objective, optimiser))
        for _ in range(3):
            state, metrics = step(state, batch)
        return begin, state.params, metrics

    begin, both, metrics = trained(together)
    assert set(metrics) == {"loss", "accuracy_block1", "accuracy_block2", "grad_norm"}
    for block, other in (("block1", "block2"), ("block2", "block1")):
        _, one, _ = trained(alone(block))
        close(both[f"probe_{block}"], one[f"probe_{block}"])
        same(one[f"probe_{other}"], begin[f"probe_{other}"])
        assert np.any(both[f"probe_{block}"]["dense"]["kernel"] != begin[f"probe_{block}"]["dense"]["kernel"])
