"""Linear probes on every block of a frozen network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled, pictures
from test_models_forward import equal

from jaxsd import models
from jaxsd.models.catalogue import shapes, size
from jaxsd.models.forward import forward


def test_linear_probes_of_alexnet_have_the_papers_sizes():
    probe = models.LinearProbe(models.build("alexnet_rotnet", outputs=4), outputs=1000)
    variables = shapes(probe, 224)
    counts = [size(variables["params"][f"probe_{block}"]) for block in probe.blocks]
    assert counts == [9_217_000, 9_409_000, 9_601_000, 9_217_000, 9_217_000]
    assert set(variables["params"]) == set(probe.parts) and size(variables["params"]["trunk"]) == 57_030_724
    running = [size(variables["batch_stats"][f"probe_{block}"]) for block in probe.blocks]
    assert running == [128, 384, 768, 512, 512]
    kernel = shapes(probe.clone(pool={"block5": 2}), 112)["params"]["probe_block5"]["dense"]["kernel"]
    assert kernel.shape == (2 * 2 * 256, 1000)


def test_linear_probe_trains_the_probes_alone():
    trunk = models.build("resnet8", outputs=4)
    probe = models.LinearProbe(trunk, outputs=10, pool={"block1": 3})
    params, collections = filled(probe, 8)
    images = pictures(8, 4)

    def total(params):
        result = forward(probe, params, collections, images, train=True)
        return sum(jnp.square(value).mean() for value in result.outputs.values()), result

    gradient, result = jax.jit(jax.grad(total, has_aux=True))(params)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient["trunk"]))
    assert all(np.abs(gradient[f"probe_{block}"]["dense"]["kernel"]).max() > 0 for block in probe.blocks)
    before, after = collections["batch_stats"], result.collections["batch_stats"]
    assert all(equal(before["trunk"], after["trunk"]))
    assert not any(equal(before["probe_block2"], after["probe_block2"]))
    maps = np.asarray(result.features["block1"])  # 8x8 in bins 0..2, 2..5, 5..7
    bins = ((0, 3), (2, 6), (5, 8))
    x = np.stack([[maps[:, a:b, c:d].max((1, 2)) for c, d in bins] for a, b in bins]).transpose(2, 0, 1, 3)
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    dense = params["probe_block1"]["dense"]
    expected = x.reshape(4, -1) @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(result.outputs["block1"], expected, rtol=1e-3, atol=1e-3)
    start = jax.jit(lambda key: probe.init(key, images, False)["params"]["probe_block3"]["dense"])(jax.random.key(0))
    assert np.std(start["kernel"]) == pytest.approx((2 / 10) ** 0.5, rel=0.05) and (start["bias"] == 0).all()
