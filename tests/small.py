"""The smallest things that training can be tested with."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import objectives, train
from jaxsd.data.source import Source
from jaxsd.models.blocks import Backbone
from jaxsd.models.norm import BatchNorm
from jaxsd.train import loop, optimiser


class Part(nn.Module):
    """A dense layer over the channels, batch norm, ReLU."""

    features: int

    @nn.compact
    def __call__(self, x, train):
        return nn.relu(BatchNorm(name="norm")(nn.Dense(self.features, name="dense")(x), train))


class Small(Backbone):
    """Two parts on each pixel and its left neighbour, average, head: compiled in a moment, yet all of a ResNet."""

    widths: tuple[int, ...] = (4, 6)

    @property
    def blocks(self):
        return tuple(f"block{i + 1}" for i in range(len(self.widths)))

    @nn.compact
    def __call__(self, images, train):
        features = {}
        x = jnp.concatenate([images, images - jnp.roll(images, 1, 2)], -1)  # a turn changes it
        for name, width in zip(self.blocks, self.widths, strict=True):
            x = self.shown(features, name, Part(width, name=name)(x, self.trains(name, train)))
        return self.ending(features, x, train)


class Dense(nn.Module):
    """One dense layer on the pixels, started at zero where asked; no batch statistics."""

    outputs: int
    zero: bool = False

    @nn.compact
    def __call__(self, images, train):
        x = images.reshape(len(images), -1)
        start = nn.initializers.zeros_init() if self.zero else nn.initializers.lecun_normal()
        return nn.Dense(self.outputs, kernel_init=start, name="head")(x), {"pooled": x}


KEY = jax.random.key(0)
SGD = optimiser.with_rate(optimiser.sgd(momentum=0.9, weight_decay=1e-3))
OBJECTIVE = objectives.rotation(Small(outputs=4))
FROZEN = objectives.rotation(Small(outputs=4, frozen=("block1",)))


def batch_of(count, *, side=6, channels=1, classes=3, seed=0):
    """A batch of random images as the step takes it."""
    random = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(random.random((count, side, side, channels), np.float32)),
        "label": jnp.asarray(random.integers(0, classes, count), jnp.int32),
        "index": jnp.arange(count, dtype=jnp.int32),
        "mask": jnp.ones(count, jnp.float32),
    }


def source_of(count, *, side=6, classes=3, seed=0):
    """Random labelled images."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, side, side, 1), dtype=np.uint8)
    labels = random.integers(0, classes, count).astype(np.int32)
    return Source(images, labels, tuple("abcdefghij"[:classes]))


def state_of(objective=OBJECTIVE, tx=SGD, **options):
    return train.init(KEY, objective, tx, batch_of(1), **options)


def plan_of(images, *, batch_size=4, epochs=2, rate=0.1, order=1, **options):
    index, _ = loop.Plan(images, batch_size, 1, np.zeros(1), jax.random.key(order), **options).batches(0)
    rates = np.linspace(rate, rate / 2, epochs * len(index)).astype(np.float32)
    return loop.Plan(images, batch_size, epochs, rates, jax.random.key(order), **options)


def arrays(tree):
    """The leaves of a tree as numpy arrays, keys as their data."""
    typed = jax.dtypes.prng_key
    data = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, typed) else x, tree)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(data)]


def same(found, wanted):
    """Asserts that two trees are equal bit for bit."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(arrays(found), arrays(wanted), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def close(found, wanted, *, rtol=1e-5, atol=1e-6):
    """Asserts that two trees are equal but for rounding."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(arrays(found), arrays(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
