"""A recipe in bfloat16 learns about as well as in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsd import models, objectives, train
from jaxsd.data.embedded import digits
from jaxsd.data.source import standardisation
from jaxsd.models.forward import STANDARDISE, forward

SEEDS, STEPS, BATCH = 3, 150, 32


def learned(dtype):
    """[SEEDS] losses of the last ten steps and accuracies on other digits, after training on 512."""
    splits = digits(test=500, validation=0.0)
    mean, std = standardisation(splits.train)
    model = models.build("patchnet", outputs=10, patch=8, first=(16,), widths=(), hidden=(32,), dropout=0.0, dtype=dtype)
    objective = objectives.supervised(model)
    tx = optax.sgd(0.05, momentum=0.9)
    step = train.make_train_step(objective, tx)
    images, labels = jnp.asarray(splits.train.images[:512]), jnp.asarray(splits.train.labels[:512])

    def batch_of(rows):
        mask = jnp.ones(BATCH, jnp.float32)
        return {"image": images[rows], "label": labels[rows], "index": rows.astype(jnp.int32), "mask": mask}

    def one(key):
        state = train.init(key, objective, tx, batch_of(jnp.arange(BATCH)))
        extra = {**state.extra, "model": {**state.extra["model"], STANDARDISE: {"mean": mean, "std": std}}}
        rows = jax.random.randint(jax.random.fold_in(key, 1), (STEPS, BATCH), 0, 512)
        state, metrics = jax.lax.scan(lambda s, r: step(s, batch_of(r)), state.replace(extra=extra), rows)
        outputs = forward(model, state.params, state.extra["model"], splits.test.images, train=False).outputs
        return metrics["loss"][-10:].mean(), (outputs.argmax(-1) == splits.test.labels).mean()

    trained = jax.jit(one)
    import time

    t = time.time()
    jax.block_until_ready(trained(jax.random.key(0)))
    print("first", time.time() - t)
    t = time.time()
    jax.block_until_ready(trained(jax.random.key(0)))
    print("second", time.time() - t)
    return np.asarray([trained(jax.random.key(seed)) for seed in range(SEEDS)]).T


def test_bfloat16_learns_as_float32_does():
    losses, accuracies = zip(*(learned(dtype) for dtype in ("float32", "bfloat16")), strict=True)
    print(losses, accuracies)
