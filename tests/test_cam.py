"""Grad-CAM on a network small enough to differentiate by hand, and on a residual network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.data import astronaut

from jaxsd.errors import UserError
from jaxsd.evaluate.cam import channel_weights, grad_cam
from jaxsd.models import build
from jaxsd.models.forward import initialise

IMAGES = np.stack([astronaut()[y : y + 12, x : x + 16] for y, x in ((50, 210), (100, 200), (400, 60))])
TARGET = np.array([2, 0, 1])


class Linear(nn.Module):
    """Two 1x1 convolutions, each with 2x2 means behind it, a global mean, a linear head; nothing bends.

    Row i counts 1 + tilt * i in the global mean.
    """

    head_scale: float = 1.0
    tilt: float = 0.0

    @nn.compact
    def __call__(self, images, train):
        features = {}
        x = images
        for name, width in (("block1", 5), ("block2", 4)):
            x = nn.avg_pool(nn.Conv(width, (1, 1), use_bias=False, name=name)(x), (2, 2), (2, 2))
            x = features[name] = self.perturb(f"{name}_map", x)
        rows = 1 + self.tilt * jnp.arange(x.shape[1])[None, :, None, None]
        features["pooled"] = self.perturb("pooled_map", (rows * x).mean((1, 2)))
        return self.head_scale * nn.Dense(3, name="head")(features["pooled"]), features


@pytest.fixture(scope="module")
def trained():
    """(params, collections) of the linear network, standardising with other values than 0 and 1."""
    params, collections = initialise(Linear(), jax.random.key(3), jnp.asarray(IMAGES))
    return params, {
        **collections,
        "standardise": {"mean": jnp.array([0.5, 0.4, 0.3]), "std": jnp.array([0.2, 0.3, 0.4])},
    }


@pytest.mark.parametrize("tilt", [0.0, 0.5])
def test_weights_worked_by_hand(trained, tilt):
    params, collections = trained
    features, weights = channel_weights(
        Linear(tilt=tilt), params, collections, IMAGES, blocks=("block1", "block2"), target=TARGET
    )
    head = params["head"]["kernel"][:, TARGET].T * (1 + tilt * (0 + 1 + 2) / 3)  # [B, 4], times the mean row's count
    kernel1, kernel2 = params["block1"]["kernel"][0, 0], params["block2"]["kernel"][0, 0]
    np.testing.assert_allclose(weights["block2"], head / (3 * 4), rtol=1e-5)  # score = w . mean: w_c / (h w)
    np.testing.assert_allclose(weights["block1"], head @ kernel2.T / (6 * 8), rtol=1e-5, atol=1e-8)
    inputs = (IMAGES / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    halved = inputs.reshape(3, 6, 2, 8, 2, 3).mean((2, 4))
    np.testing.assert_allclose(features["block1"], halved @ np.asarray(kernel1), rtol=1e-4, atol=1e-5)


def test_maps_worked_by_hand(trained):
    params, collections = trained
    features, _ = channel_weights(Linear(), params, collections, IMAGES, blocks=("block2",), target=TARGET)
    maps = grad_cam(Linear(), params, collections, IMAGES, blocks=("block2",), target=TARGET)["block2"]
    assert maps.shape == (3, 12, 16) and maps.dtype == np.float32
    for image, (feature, label) in enumerate(zip(np.asarray(features["block2"]), TARGET, strict=True)):
        small = np.maximum(feature @ np.asarray(params["head"]["kernel"][:, label]), 0)
        small = small / max(small.max(), 1e-9)
        rows, columns = (np.clip((np.arange(4 * n) + 0.5) / 4 - 0.5, 0, n - 1) for n in small.shape)
        wide = np.stack([np.interp(columns, np.arange(small.shape[1]), row) for row in small])
        expected = np.stack([np.interp(rows, np.arange(small.shape[0]), column) for column in wide.T], axis=1)
        np.testing.assert_allclose(maps[image], expected, atol=1e-5)
    assert (maps.max((1, 2)) > 0).sum() == 2  # nothing in the third image speaks for its class


def test_what_must_not_change_a_map(trained):
    params, collections = trained

    def cam(params=params, images=IMAGES, target=TARGET, model=None):
        model = model or Linear()
        return grad_cam(model, params, collections, images, blocks=("block1", "block2"), target=target)

    maps = cam()
    other_bias = {**params, "head": {**params["head"], "bias": params["head"]["bias"] + 7}}
    mirrored = {name: value[:, :, ::-1] for name, value in cam(images=IMAGES[:, :, ::-1]).items()}
    for name, value in maps.items():
        np.testing.assert_allclose(cam(other_bias)[name], value, atol=1e-6)
        np.testing.assert_allclose(cam(model=Linear(head_scale=5.0))[name], value, atol=1e-5)
        np.testing.assert_allclose(cam(images=(IMAGES / 255).astype(np.float32))[name], value, atol=1e-5)
        np.testing.assert_allclose(cam(images=IMAGES[1:2], target=TARGET[1:2])[name], value[1:2], atol=1e-5)
        np.testing.assert_allclose(mirrored[name], value, atol=1e-5)


def test_a_map_without_evidence_stays_zero(trained):
    params, collections = trained
    silent = {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}
    maps = grad_cam(Linear(), silent, collections, IMAGES, blocks=("block1",), target=TARGET)
    np.testing.assert_array_equal(maps["block1"], 0)


def test_a_residual_network():
    model = build("resnet8", outputs=4)
    images = np.stack([astronaut()[y : y + 32, 200:232] for y in (60, 120)])
    params, collections = initialise(model, jax.random.key(0), jnp.asarray(images))
    target = np.array([3, 1])
    maps = grad_cam(model, params, collections, images, blocks=model.blocks, target=target)
    assert list(maps) == ["block1", "block2", "block3"]
    for value in maps.values():
        assert value.shape == (2, 32, 32) and value.min() >= 0 and 0 < value.max() <= 1
    _, weights = channel_weights(model, params, collections, images, blocks=model.blocks, target=target)
    np.testing.assert_allclose(weights["block3"], params["head"]["kernel"][:, target].T / 64, rtol=1e-5)


@pytest.mark.parametrize(
    ("blocks", "target", "words"),
    [
        (("block9",), TARGET, "choose from block1, block2"),
        (("pooled",), TARGET, "'pooled' has no feature map"),
        (("block1",), TARGET[:2], r"whole numbers \[3\]"),
        (("block1",), TARGET / 2, r"whole numbers \[3\]"),
        (("block1",), TARGET + 1, r"0\.\.2, got 1 to 3"),
    ],
)
def test_mistakes_are_named(trained, blocks, target, words):
    with pytest.raises(UserError, match=words):
        grad_cam(Linear(), *trained, IMAGES, blocks=blocks, target=target)
