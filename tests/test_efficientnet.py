"""EfficientNets: scaling, TensorFlow's padding, starts, and what is random. Their values are in test_golden."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled, pictures

from jaxsd import models
from jaxsd.errors import UserError
from jaxsd.models.blocks import DropPath
from jaxsd.models.catalogue import shapes
from jaxsd.models.conv import Conv
from jaxsd.models.efficientnet import STAGES, EfficientNet, MBConv, SqueezeExcite, Stage, padding, scaled
from jaxsd.models.forward import forward

pytestmark = pytest.mark.usefixtures("plain")


def tiny(**options):
    """One unit in each stage, 8 to 80 channels."""
    return EfficientNet(outputs=4, width=0.25, depth=0.25, **options)


def test_channels_scale_as_published():
    factors = (1.0, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0)
    assert [scaled(32, factor) for factor in factors] == [32, 32, 32, 40, 48, 48, 56, 64]
    assert [scaled(1280, factor) for factor in factors] == [1280, 1280, 1408, 1536, 1792, 2048, 2304, 2560]
    assert [scaled(plan.channels, 1.2) for plan in STAGES] == [24, 32, 48, 96, 136, 232, 384]
    assert [scaled(plan.channels, 2.0) for plan in STAGES] == [32, 48, 80, 160, 224, 384, 640]


@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_padding_is_that_of_tensorflow(size, stride):
    for height, width in ((1, 2), (6, 7), (8, 15), (224, 225)):
        x = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        expected = jax.lax.padtype_to_pads((height, width), (size, size), (stride, stride), "SAME")
        assert padding(x, size, stride, tf=True) == tuple(expected)
        assert padding(x, size, stride, tf=False) == size // 2


@pytest.mark.parametrize("tf", [False, True])
def test_maps_of_any_image(tf):
    model = tiny(tf=tf)
    for sides, last in (((1, 1), (1, 1)), ((33, 50), (2, 2)), ((64, 96), (2, 3))):
        x = jax.ShapeDtypeStruct((2, *sides, 1), jnp.float32)
        outputs, features = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, False)[0], x)
        assert features["block7"].shape == (2, *last, 80) and features["pooled"].shape == (2, 320)
        assert outputs.shape == (2, 4) and tuple(features) == (*model.blocks, "pooled")
    assert shapes(model, 33)["params"] == shapes(tiny(), 64)["params"]


def test_start():
    model = models.build("efficientnet_b0", outputs=100)

    def draw(key):
        params = model.init(key, jnp.zeros((1, 32, 32, 3)), False)["params"]
        return params["block6"]["unit2"], params["head"]

    unit, head = jax.jit(draw)(jax.random.key(3))
    for name, fan_out in (("expand", 1152), ("depthwise", 25), ("project", 192)):
        kernel = np.asarray(unit[name]["conv"]["kernel"])
        assert kernel.std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02) and abs(kernel.mean()) < 0.01
        assert np.abs(kernel).max() > 3.5 * kernel.std()  # not truncated
        assert (unit[name]["norm"]["scale"] == 1).all() and (unit[name]["norm"]["bias"] == 0).all()
    assert unit["se"]["reduce"]["kernel"].shape == (1, 1, 1152, 48)  # a quarter of the channels that come in
    for name, fan_out in (("reduce", 48), ("expand", 1152)):
        assert np.std(unit["se"][name]["kernel"]) == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
        assert (unit["se"][name]["bias"] == 0).all()
    assert (head["bias"] == 0).all()
    assert 0.099 < np.abs(head["kernel"]).max() <= 0.1 and np.std(head["kernel"]) == pytest.approx(
        0.1 / 3**0.5, rel=0.02
    )


def test_excitation_weighs_whole_channels():
    layer, x = SqueezeExcite(3), jnp.asarray(pictures(4, 2, 6))
    params = layer.init(jax.random.key(0), x)["params"]
    ratio = np.asarray(layer.apply({"params": params}, x) / x)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-5)
    assert ((ratio > 0) & (ratio < 1)).all() and ratio[0, 0, 0].std() > 0.01
    nothing = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_allclose(layer.apply({"params": nothing}, x), x / 2, rtol=1e-6)


def test_paths_drop_more_often_from_unit_to_unit():
    found, strides = [], []

    def note(layer, args, kwargs, context):
        if isinstance(context.module, DropPath):
            found.append((context.module.path[:2], context.module.rate))
        if isinstance(context.module, Conv):
            strides.append(context.module.stride)
        return layer(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes(models.build("efficientnet_b0"), 32)
    with_skip = (2, 4, 6, 7, 9, 10, 12, 13, 14)  # of the sixteen units, those that keep the shape
    assert [rate for _, rate in found] == pytest.approx([0.2 * k / 16 for k in with_skip])
    assert found[0][0] == ("block2", "unit2") and sum(stride == 2 for stride in strides) == 5


def test_random_in_training_alone():
    model = EfficientNet(outputs=4, width=0.25, depth=0.5, drop_path=0.9, head_dropout=0.5)
    params, collections = filled(model, 16)
    images = pictures(16)
    run = jax.jit(lambda key: forward(model, params, collections, images, train=True, key=key).features)
    a, b, again = (run(jax.random.key(seed)) for seed in (1, 2, 1))
    assert (a["block7"] == again["block7"]).all() and not np.allclose(a["block7"], b["block7"])
    np.testing.assert_array_equal(a["block3"], b["block3"])  # its units all change the shape
    calm = model.clone(drop_path=0.0, head_dropout=0.0)
    jax.eval_shape(lambda: forward(calm, params, collections, images, train=True).outputs)  # needs no key
    for option in ("drop_path", "dropout"):
        with pytest.raises(UserError, match=option):
            models.build("efficientnet_b1", **{option: 1.0})


def test_published_dropout():
    rates = [models.build(f"efficientnet_b{i}").head_dropout for i in range(8)]
    assert rates == [0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5]
    assert models.build("efficientnet_b7", dropout=0).head_dropout == 0


def test_bfloat16_is_near():
    model = tiny()
    params, collections = filled(model, 32)
    infer = jax.jit(lambda m: forward(m, params, collections, pictures(32), train=False), static_argnums=0)
    a, b = infer(model), infer(model.clone(dtype=jnp.bfloat16))
    assert b.features["block5"].dtype == jnp.bfloat16 and b.outputs.dtype == b.features["pooled"].dtype == jnp.float32
    assert 0 < np.abs(a.outputs - b.outputs).max() < 0.1 * np.abs(a.outputs).max()


def test_remat_gives_the_same_gradients():
    units = {remat: tiny(remat=remat).unit(MBConv) for remat in (False, True)}
    assert units[True] is not units[False] is MBConv
    layers = {remat: Stage(STAGES[1], 8, (0.0, 0.5, 0.5), False, unit) for remat, unit in units.items()}
    images = jnp.asarray(pictures(8, 4))
    variables = jax.jit(lambda key: layers[False].init(key, images, False))(jax.random.key(0))

    def gradient(params, remat):
        def total(params):
            given, rngs = {**variables, "params": params}, {"dropout": jax.random.key(1)}
            y, _ = layers[remat].apply(given, images, True, rngs=rngs, mutable=["batch_stats"])
            return jnp.square(y).mean()

        return jax.grad(total)(params)

    plain, again = jax.jit(lambda p: (gradient(p, False), gradient(p, True)))(variables["params"])
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * largest)
