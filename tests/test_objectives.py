"""Objectives against hand values and optax; probes trained together against probes trained alone."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Dense, Small, batch_of, close, same

from jaxsd import models, objectives, train
from jaxsd.errors import UserError
from jaxsd.models.forward import STANDARDISE, forward
from jaxsd.objectives.regression import losses
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


@pytest.mark.parametrize(
    "make, outputs", [(objectives.supervised, 4), (objectives.rotation, 4), (objectives.regression, 1)]
)
def test_masked_images_do_not_count(make, outputs):
    """A masked batch gives the loss, metrics and gradient of the shorter batch."""
    whole = scored_batch(6)
    long = {**whole, "mask": jnp.array([1.0, 1, 1, 1, 0, 0])}
    short = {name: values[:4] for name, values in whole.items()}
    objective = make(Dense(outputs))
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


def scored_batch(count):
    return batch_of(count) | {"score": jnp.asarray(np.random.default_rng(5).uniform(0, 100, count), jnp.float32)}


class Given(nn.Module):
    """Gives the first pixels of the images as outputs, [B] or [B, 1], plus a parameter that starts at 0."""

    flat: bool = False

    @nn.compact
    def __call__(self, images, train):
        shift = self.param("shift", nn.initializers.zeros_init(), ())
        outputs = images[:, 0, 0, 0] + shift
        return (outputs if self.flat else outputs[:, None]), {}


@pytest.mark.parametrize("flat", [False, True])
def test_regression_by_hand(flat):
    """Outputs .5, .3, .9 for scores 52, 50, 85: errors -.02, -.2, .05, the bend of Huber's loss at .1."""
    images = jnp.zeros((3, 1, 1, 1)).at[:, 0, 0, 0].set(jnp.array([0.5, 0.3, 0.9]))
    batch = {"image": images, "score": jnp.array([52.0, 50.0, 85.0]), "mask": jnp.ones(3)}
    squares = 0.02**2 + 0.05**2
    wanted = {
        "l1": (0.02 + 0.2 + 0.05) / 3,
        "l2": (squares + 0.2**2) / 3,
        "huber": (squares / 2 + 0.1 * (0.2 - 0.1 / 2)) / 3,
    }
    for kind, number in wanted.items():
        loss, metrics = value(objectives.regression(Given(flat), loss=kind), batch)
        assert loss == pytest.approx(number, rel=1e-4)
        assert metrics == {"mae": pytest.approx((2 + 20 + 5) / 3, rel=1e-4)}
    loss, metrics = value(objectives.regression(Given(flat)), {**batch, "mask": jnp.array([1.0, 0, 1])})
    assert loss == pytest.approx(0.035, rel=1e-4) and metrics["mae"] == pytest.approx(3.5, rel=1e-4)
    loss, _ = value(objectives.regression(Given(flat), loss="huber", delta=1.0), batch)
    assert loss == pytest.approx(wanted["l2"] / 2, rel=1e-4)  # below the bend it is half the square
    np.testing.assert_allclose(losses(jnp.array([0.4, -1.0]), jnp.zeros(2), "huber", 0.5), [0.08, 0.375], rtol=1e-6)


def test_regression_does_not_depend_on_the_unit_of_the_scores():
    """Scores and scale times ten: the same loss and gradient, ten times the error."""
    batch = scored_batch(5)
    results = []
    for factor in (1, 10):
        objective = objectives.regression(Dense(1), scale=100.0 * factor, loss="huber")
        params, extra = objective.init(KEY, batch)
        given = {**batch, "score": factor * batch["score"]}
        step = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
        (loss, (metrics, _)), gradient = step(params, extra, given, KEY)
        results.append((loss, metrics["mae"] / factor, gradient))
    close(*results)


def test_regression_on_every_block():
    batch = scored_batch(4)
    probe = models.LinearProbe(Small(outputs=4), outputs=1)
    _, metrics = value(objectives.regression(probe), batch)
    assert set(metrics) == {"mae_block1", "mae_block2"}


def test_wrong_regression():
    batch, objective = scored_batch(3), objectives.regression(Dense(1))
    params, extra = objective.init(KEY, batch)
    unscored = {name: values for name, values in batch.items() if name != "score"}
    wide = models.ResNet(outputs=2, depths=(1,), widths=(4,))
    for call, words in (
        (lambda: objectives.regression(Dense(1), loss="mse"), "'mse'.* l1, l2, huber"),
        (lambda: objectives.regression(Dense(1), scale=0.0), "above 0"),
        (lambda: objectives.regression(Dense(1), delta=-1.0), "above 0"),
        (lambda: objectives.regression(Dense(3)), "one output, got 3"),
        (lambda: objectives.regression(wide), "one output, got 2"),
        (lambda: objective.loss(params, extra, unscored, KEY), "with scores"),
        (lambda: objective.loss(params, extra, {**batch, "score": batch["score"][:, None]}, KEY), r"\[3\].*\[3, 1\]"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_no_shape_is_promoted():
    """[B] meets [B], never [B, 1]: such a slip would broadcast to [B, B] and train on nonsense."""
    batch = scored_batch(3)
    for objective in (
        objectives.rotation(Dense(4), label_smoothing=0.1),
        objectives.regression(Dense(1)),
        objectives.regression(Given(flat=True)),
    ):
        params, extra = objective.init(KEY, batch)
        collections = {name: tree for name, tree in extra["model"].items() if name != STANDARDISE}

        def loss(params, objective=objective, collections=collections):
            return objective.loss(params, {"model": collections}, batch, KEY)[0]

        with jax.numpy_rank_promotion("raise"):
            jax.eval_shape(jax.grad(loss), params)


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
