"""What the network families start from: the laws that their kernels, biases and norms are drawn by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd import models
from jaxsd.models.blocks import uniform
from jaxsd.models.catalogue import RESOLUTIONS


def started(name, part, **options):
    """The freshly drawn parameters of one part; XLA drops the draws of the others."""
    model = models.build(name, outputs=50, **options)
    images = jnp.zeros((1, RESOLUTIONS[name] // 2, RESOLUTIONS[name] // 2, 3))
    return jax.jit(lambda key: model.init(key, images, False)["params"][part])(jax.random.key(3))


def test_start_of_residual_networks():
    block = started("resnet8", "block3")["unit1"]
    kernel = np.asarray(block["layer2"]["conv"]["kernel"])
    assert kernel.std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02) and abs(kernel.mean()) < 0.001
    assert np.abs(kernel).max() > 3.5 * kernel.std()  # a normal draw, not truncated at two deviations
    assert (block["layer2"]["norm"]["scale"] == 1).all() and (block["layer2"]["norm"]["bias"] == 0).all()
    head = started("resnet8", "head")
    for leaf in (head["kernel"], head["bias"]):  # 64 inputs: +- 1/8, a uniform draw's deviation is limit / sqrt(3)
        assert 0.11 < np.abs(leaf).max() <= 0.125 and np.std(leaf) == pytest.approx(0.125 / 3**0.5, rel=0.15)
    zero = started("resnet8", "block3", zero_init_residual=True)["unit1"]
    assert (zero["layer2"]["norm"]["scale"] == 0).all() and (zero["layer1"]["norm"]["scale"] == 1).all()
    assert (zero["shortcut"]["norm"]["scale"] == 1).all()


def test_start_of_rotnet_networks():
    for leaf, fan_in in (
        (started("nin", "block2")["layer1"]["conv"]["kernel"], 25 * 96),
        (started("alexnet_rotnet", "block1")["conv"]["kernel"], 121 * 3),
        (started("alexnet_rotnet", "block1")["conv"]["bias"], 121 * 3),
    ):
        limit = fan_in**-0.5
        assert 0.95 * limit < np.abs(leaf).max() <= limit and abs(np.mean(leaf)) < 0.2 * limit
        assert np.std(leaf) == pytest.approx(limit / 3**0.5, rel=0.15)


def test_draws_are_those_of_the_shape():
    key = jax.random.key(5)
    expected = jax.random.uniform(key, (3, 2, 5), minval=-0.5, maxval=0.5)
    np.testing.assert_array_equal(uniform(0.5)(key, (3, 2, 5)), expected)
