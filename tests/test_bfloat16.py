"""A network in bfloat16 learns about as well as in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import ttest_ind

from jaxsd import models, objectives, train
from jaxsd.data.embedded import digits
from jaxsd.models.forward import forward

SEEDS, STEPS, BATCH = 3, 50, 64
TX = optax.sgd(0.05, momentum=0.9)
FORM = {"patch": 8, "first": (16,), "widths": (), "hidden": (32,), "dropout": 0.0}


def learned(dtype, splits, starts):
    """[2, SEEDS]: the loss over the last ten steps, and the accuracy on other digits."""
    model = models.build("patchnet", outputs=10, dtype=dtype, **FORM)
    objective = objectives.supervised(model)
    step = jax.jit(train.make_train_step(objective, TX), donate_argnums=0)
    infer = jax.jit(lambda params, collections, x: forward(model, params, collections, x, train=False).outputs)

    def one(seed):
        random, losses, state = np.random.default_rng(seed), [], jax.tree.map(jnp.copy, starts[seed])
        for _ in range(STEPS):
            rows = random.integers(0, len(splits.train), BATCH)
            state, metrics = step(state, {"image": splits.train.images[rows], "label": splits.train.labels[rows]})
            losses.append(float(metrics["loss"]))
        answers = np.asarray(infer(state.params, state.extra["model"], splits.test.images)).argmax(-1)
        return np.mean(losses[-10:]), np.mean(answers == splits.test.labels)

    return np.transpose([one(seed) for seed in range(SEEDS)])


def test_bfloat16_learns_as_float32_does():
    """From the same starts, loss and accuracy are within the noise over seeds; untrained they are 2.3 and 0.1."""
    splits = digits(test=200, validation=0.0)
    objective = objectives.supervised(models.build("patchnet", outputs=10, **FORM))
    batch = {"image": splits.train.images[:1]}
    starts = [train.init(jax.random.key(seed), objective, TX, batch) for seed in range(SEEDS)]
    whole, half = (learned(dtype, splits, starts) for dtype in ("float32", "bfloat16"))
    assert whole[0].mean() < 0.5 and whole[1].mean() > 0.8
    np.testing.assert_allclose(half.mean(1), whole.mean(1), atol=0.06)
    assert (ttest_ind(half, whole, axis=1).pvalue > 0.01).all(), (whole, half)
