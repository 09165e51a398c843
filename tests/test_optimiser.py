import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsd.errors import UserError
from jaxsd.train import optimiser, schedule
from jaxsd.train.optimiser import accumulate, adam, adamw, clip_norm, lars, set_rate, sgd, with_rate

WEIGHT = [[1.0, -2.0], [0.5, 3.0]]
GRADIENTS = [[[0.1, -0.2], [0.3, 0.4]], [[-0.5, 0.1], [0.2, -0.1]], [[0.3, 0.3], [-0.6, 0.2]]]
RATES = [0.1, 0.1, 0.02]  # the last one tells whether momentum holds the rate


def trained(make, params, gradients, rates):
    tx = with_rate(make)
    state = tx.init(params)
    for gradient, rate in zip(gradients, rates, strict=True):
        updates, state = tx.update(gradient, set_rate(state, rate), params)
        params = optax.apply_updates(params, updates)
    return params


def by_torch_rule(rule, *, nesterov=False, decay=0.1, momentum=0.9, beta2=0.999):
    """The update rules in torch's documentation of SGD, Adam and AdamW, in float64."""
    w, m, v = np.array(WEIGHT), np.zeros((2, 2)), np.zeros((2, 2))
    for t, (g, rate) in enumerate(zip(np.array(GRADIENTS), RATES, strict=True), 1):
        if rule == "adamw":
            w = w - rate * decay * w
        else:
            g = g + decay * w
        if rule == "sgd":
            m = momentum * m + g
            w = w - rate * (g + momentum * m if nesterov else m)
        else:
            m, v = momentum * m + (1 - momentum) * g, beta2 * v + (1 - beta2) * g**2
            w = w - rate * (m / (1 - momentum**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-8)
    return w


@pytest.mark.parametrize(
    ("make", "rule", "torch"),  # torch: computed with torch 2.13, float64
    [
        (sgd(weight_decay=0.1), dict(rule="sgd"), [0.9981916, -1.9083632, 0.4099253, 2.8231906]),
        (
            sgd(nesterov=True, weight_decay=0.1),
            dict(rule="sgd", nesterov=True),
            [1.010861976, -1.870993753, 0.371304359, 2.743452117],
        ),
        (adam(weight_decay=0.1), dict(rule="adam"), [0.933561254, -1.80969137, 0.303913337, 2.797925593]),
        (adamw(weight_decay=0.1), dict(rule="adamw"), [0.940544244, -1.838684965, 0.296658061, 2.776654999]),
    ],
    ids=["sgd", "nesterov", "adam", "adamw"],
)
def test_rules_are_torchs(make, rule, torch):
    np.testing.assert_allclose(by_torch_rule(**rule).ravel(), torch, atol=1e-9)
    ours = trained(make, jnp.array(WEIGHT), jnp.array(GRADIENTS), RATES)
    np.testing.assert_allclose(np.ravel(ours), torch, rtol=0, atol=2e-6)


def test_lars_by_hand():
    params = {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([1.0])}
    gradients = {"kernel": jnp.array([[0.0, 1.6]]), "bias": jnp.array([0.5])}
    once = trained(lars(momentum=0.5, weight_decay=0.1), params, [gradients], [2.0])
    # g + 0.1 w = (0.3, 2); |w| = 5; the step is rate 2 * trust 0.001 * 5 along that unit vector; the bias: plain SGD
    direction = np.array([0.3, 2.0]) / np.hypot(0.3, 2.0)
    np.testing.assert_allclose(once["kernel"][0], [3, 4] - 0.01 * direction, rtol=1e-6)
    np.testing.assert_allclose(once["bias"], [0.0], atol=1e-7)
    # with rate 0 only the momentum of the first, already scaled, step remains
    twice = trained(lars(momentum=0.5, weight_decay=0.1), params, [gradients] * 2, [2.0, 0.0])
    np.testing.assert_allclose(twice["kernel"][0], [3, 4] - 0.015 * direction, rtol=1e-6)
    np.testing.assert_allclose(twice["bias"], [-0.5], rtol=1e-6)
    zero = {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(1)}  # a zero-initialised array must be able to leave zero
    np.testing.assert_allclose(trained(lars(), zero, [gradients], [1.0])["kernel"], [[0.0, -1.6]], rtol=1e-6)


@pytest.mark.parametrize("make", [sgd, adam, adamw])
def test_decay_reaches_every_parameter_unless_kernels_only(make):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    still = jax.tree.map(jnp.zeros_like, params)
    everywhere = trained(make(weight_decay=0.1), params, [still], [0.1])
    assert all((np.asarray(p) < 1).all() for p in jax.tree.leaves(everywhere))
    kernels = trained(make(weight_decay=0.1, decay="kernels"), params, [still], [0.1])
    assert (np.asarray(kernels["kernel"]) < 1).all()
    assert (np.asarray(kernels["bias"]) == 1).all() and (np.asarray(kernels["scale"]) == 1).all()


def test_clipping_is_by_the_norm_of_the_whole_gradient_before_decay():
    params = {"a": jnp.array([[10.0]]), "b": jnp.array([0.0])}
    make = clip_norm(sgd(momentum=0, weight_decay=0.1), 1.0)
    large = trained(make, params, [{"a": jnp.array([[3.0]]), "b": jnp.array([4.0])}], [1.0])
    np.testing.assert_allclose([large["a"][0, 0], large["b"][0]], [10 - 0.6 - 1, -0.8], rtol=1e-6)
    small = trained(make, params, [{"a": jnp.array([[0.3]]), "b": jnp.array([0.4])}], [1.0])
    np.testing.assert_allclose([small["a"][0, 0], small["b"][0]], [10 - 0.3 - 1, -0.4], rtol=1e-6)


@pytest.mark.parametrize("make", [sgd(weight_decay=0.1), adamw(), clip_norm(lars(), 0.1)], ids=["sgd", "adamw", "lars"])
def test_accumulated_batches_equal_the_large_batch(make):
    params = {"kernel": jnp.array(WEIGHT), "bias": jnp.array([0.5, -1.0])}
    inputs = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    grad = jax.grad(lambda p, x: jnp.mean((x @ p["kernel"] + p["bias"]) ** 2))

    def run(make, size):
        tx = with_rate(make)

        @jax.jit
        def step(p, state, batch):
            updates, state = tx.update(grad(p, batch), state, p)
            return optax.apply_updates(p, updates), state

        state, p = tx.init(params), params
        for at in range(0, 12, size):
            # The rate counts where the update happens: at the third small batch.
            state = set_rate(state, 0.1 if size == 6 or at in (4, 10) else 99.0)
            p, state = step(p, state, inputs[at : at + size])
        return p

    for ours, large in zip(jax.tree.leaves(run(accumulate(make, 3), 2)), jax.tree.leaves(run(make, 6)), strict=True):
        np.testing.assert_allclose(ours, large, rtol=1e-5, atol=1e-6)
    assert accumulate(make, 1) is make


@pytest.mark.parametrize(
    "make", [sgd(), accumulate(clip_norm(adamw(), 1.0), 2), optax.lamb], ids=["sgd", "all", "lamb"]
)
def test_rate_is_state_and_a_new_one_compiles_nothing(make):
    tx, params, traces = with_rate(make), {"w": jnp.array(WEIGHT, jnp.bfloat16)}, []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for rate in (np.float32(0.1), 0.001, jnp.asarray(0.3)):
        state = set_rate(state, rate)
        held = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == () and leaf.dtype == jnp.float32]
        assert np.float32(rate) in held
        params, state = step(params, state)
    assert len(traces) == 1
    assert state.hyperparams["rate"] == np.float32(0.3)  # float32 although the parameters are bfloat16


def test_wrong_use_is_one_line():
    for wrong in (
        lambda: sgd(momentum=1.0),
        lambda: sgd(momentum=0.0, nesterov=True),
        lambda: adam(weight_decay=-1.0),
        lambda: adamw(decay="biases"),
        lambda: clip_norm(sgd(), 0.0),
        lambda: accumulate(sgd(), 0),
        lambda: set_rate(optax.sgd(0.1).init({}), 0.1),
        lambda: schedule.constant(float("nan")),
        lambda: schedule.steps(0.1, milestones=(60, 30), factor=0.2),
        lambda: schedule.steps(0.1, milestones=(30,), factor=0.0),
        lambda: schedule.cosine(0.1, final=0.2),
        lambda: schedule.warmup(schedule.warmup(schedule.constant(1.0), epochs=1), epochs=1),
        lambda: schedule.warmup(schedule.constant(1.0), epochs=5).rates(5, 10),
    ):
        with pytest.raises(UserError) as error:
            wrong()
        assert "\n" not in str(error.value)


def test_options_are_keyword_only():
    for name, function in inspect.getmembers(optimiser, inspect.isfunction):
        if function.__module__ == optimiser.__name__ and name in ("sgd", "adam", "adamw", "lars"):
            assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(function).parameters.values()), name


@pytest.mark.parametrize(
    ("rate", "milestones", "ladder"),  # ScaleNet, section 3.1.1, written out: first epoch of each rate
    [
        (0.1, (30, 60, 80), {0: 0.1, 29: 0.1, 30: 0.02, 59: 0.02, 60: 0.004, 79: 0.004, 80: 0.0008, 99: 0.0008}),
        (0.05, (30, 60, 80), {0: 0.05, 30: 0.01, 60: 0.002, 80: 0.0004}),
        (0.01, (30, 60, 80), {0: 0.01, 30: 0.002, 60: 0.0004, 80: 0.00008}),
        (0.001, (80, 160, 200), {79: 0.001, 80: 0.0002, 159: 0.0002, 160: 0.00004, 200: 0.000008, 239: 0.000008}),
    ],
)
def test_steps_are_the_papers_ladders(rate, milestones, ladder):
    course = schedule.steps(rate, milestones=milestones, factor=0.2)
    epochs = 100 if milestones == (30, 60, 80) else 240
    rates = course.rates(epochs, 3)
    assert rates.shape == (epochs * 3,) and rates.dtype == np.float32
    for epoch, expected in ladder.items():
        np.testing.assert_allclose(rates[epoch * 3 : epoch * 3 + 3], expected, rtol=1e-6)
    assert course.unreached(epochs) == ()
    assert course.unreached(milestones[1]) == milestones[1:]  # epochs count from 0: a run of 60 ends before epoch 60


def test_stretched_keeps_the_course():
    course = schedule.steps(0.1, milestones=(30, 60, 80), factor=0.2)
    ten = course.stretched(0.1).rates(10, 2)
    np.testing.assert_allclose(ten[::2], [0.1] * 3 + [0.02] * 3 + [0.004] * 2 + [0.0008] * 2, rtol=1e-6)
    # 10 * 1.1 is 11.000000000000002: the drop is at epoch 11 all the same
    eleven = schedule.steps(1.0, milestones=(10,), factor=0.5).stretched(1.1)
    assert eleven.rates(12, 1).tolist() == [1.0] * 11 + [0.5] and eleven.unreached(12) == ()
    warm = schedule.warmup(schedule.cosine(1.0), epochs=2)
    np.testing.assert_allclose(warm.stretched(3).rates(30, 1)[::3], warm.rates(10, 1), atol=1e-6)


def test_cosine_and_warmup_are_optaxs():
    step = np.arange(60)
    ours = schedule.cosine(0.3, final=0.03).rates(6, 10)
    np.testing.assert_allclose(ours, optax.cosine_decay_schedule(0.3, 60, alpha=0.1)(step), rtol=1e-5)
    ours = schedule.warmup(schedule.cosine(0.3, final=0.03), epochs=1.5, start=0.01).rates(6, 10)
    theirs = optax.warmup_cosine_decay_schedule(0.01, 0.3, 15, 60, end_value=0.03)
    np.testing.assert_allclose(ours, [theirs(s) for s in step], rtol=1e-5)


def test_warmup_leaves_milestones_where_they_are():
    course = schedule.warmup(schedule.steps(1.0, milestones=(3,), factor=0.1), epochs=2)
    np.testing.assert_allclose(course.rates(4, 2), [0, 0.25, 0.5, 0.75, 1, 1, 0.1, 0.1], rtol=1e-6)
    assert schedule.constant(0.2).rates(2, 2).tolist() == [np.float32(0.2)] * 4
    assert schedule.constant(0.2).rates(0, 2).shape == (0,)
