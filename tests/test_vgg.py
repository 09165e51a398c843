"""VGG-16 and torchvision's AlexNet: what the golden values do not show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled, pictures

from jaxsd import models
from jaxsd.errors import UserError
from jaxsd.models.blocks import Linear
from jaxsd.models.catalogue import costs, shapes, size
from jaxsd.models.convnet import MapLinear
from jaxsd.models.forward import forward, trunk
from jaxsd.models.vgg import VGG
from jaxsd.weights import to_timm

pytestmark = pytest.mark.usefixtures("plain")


def small(**options):
    form = {"outputs": 4, "depths": (1, 2), "widths": (6, 8), "hidden": (10, 12), "pool": 3}
    return VGG(**{**form, **options})


def run(model, params, collections, images, **options):
    return jax.jit(lambda p, x: forward(model, p, collections, x, train=False, **options))(params, images)


def test_parameters_of_the_parts():
    params = shapes(models.build("vgg16"), 224)["params"]
    sizes = {part: size(params[part]) for part in params}
    assert sum(sizes[f"block{i}"] for i in range(1, 6)) == 14_714_688
    assert (sizes["fc1"], sizes["fc2"], sizes["head"]) == (102_764_544, 16_781_312, 4_097_000)
    blog = models.build("vgg16", outputs=6, hidden=(256,), dropout=0)
    params = shapes(blog, 224)["params"]
    assert blog.parts == ("block1", "block2", "block3", "block4", "block5", "fc1", "head")
    assert size(params["fc1"]) + size(params["head"]) == 6_424_326
    assert sum(size(params[part]) for part in ("block1", "block2", "block3")) == 1_735_488
    assert size(params) - size(params["block1"]) - size(params["block2"]) == 21_139_014 - 260_160
    assert shapes(blog, 96)["params"] == params  # the parameters fit images of any size
    assert costs(models.build("vgg16"), 224)[1] // 2 == 15_470_264_320  # multiply-adds, as is known


@pytest.mark.parametrize("name, least, maps", [("vgg16", 32, (224, 112, 56, 28, 14)), ("alexnet", 63, None)])
def test_maps_and_the_least_size(name, least, maps):
    model = models.build(name, outputs=4, **({"hidden": (8,)} if name == "vgg16" else {}))
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    outputs, features = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, False)[0], images)
    sides = tuple(features[block].shape[1] for block in model.blocks)
    assert sides == (maps or (55, 27, 13, 13, 13)) and outputs.shape == (2, 4)
    shapes(model, least, channels=1)
    with pytest.raises(UserError, match=f"{least} pixels"):
        shapes(model, least - 1)


@pytest.mark.parametrize("order", ["channels last", "channels first"])
def test_a_dense_layer_on_a_map_is_the_flat_one(order):
    """Keras flattens [h, w, C], PyTorch [C, h, w]; the start is the flat layer's."""
    x = jnp.asarray(pictures(3, 5, 4))
    layer, flat = MapLinear(7), Linear(7)
    params = layer.init(jax.random.key(3), x)["params"]
    np.testing.assert_array_equal(
        params["kernel"].reshape(36, 7), flat.init(jax.random.key(3), x.reshape(5, -1))["params"]["kernel"]
    )
    assert params["kernel"].shape == (3, 3, 4, 7) and np.abs(params["bias"]).max() <= 1 / 6
    kernel, rows = params["kernel"], x
    if order == "channels first":
        kernel, rows = kernel.transpose(2, 0, 1, 3), x.transpose(0, 3, 1, 2)
    expected = rows.reshape(5, -1) @ kernel.reshape(-1, 7) + params["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, x)[:, 0, 0], expected, rtol=1e-4, atol=1e-5)


def test_published_names_and_shapes():
    norm, plain = models.build("vgg16_bn"), models.build("vgg16")
    assert plain.published("block2/layer1/conv") == "features.5" and plain.published("block5") == "features.29"
    assert norm.published("block2/layer1/norm") == "features.8" and norm.published("block5") == "features.42"
    alexnet = models.build("alexnet", outputs=3)
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes(alexnet, 64)["params"])
    kernel = np.zeros((6, 6, 256, 4096), np.float32)
    kernel[1, 2, 3, 4] = 1
    params["fc1"]["kernel"] = kernel
    tensors = to_timm(alexnet, params, {})
    assert tensors["classifier.1.weight"].shape == (4096, 9216) and tensors["classifier.4.weight"].shape == (4096, 4096)
    assert tensors["classifier.1.weight"][4, 3 * 36 + 1 * 6 + 2] == 1
    assert tensors["classifier.6.weight"].shape == (3, 4096) and tensors["features.10.weight"].shape == (256, 256, 3, 3)


def test_start_of_vgg():
    """torchvision's: He's normal draw by fan out, dense layers of deviation 0.01; Keras': Glorot's uniform draw."""
    images = jnp.zeros((1, 16, 16, 3))

    def start(init):
        model = small(widths=(32, 64), pool=4, hidden=(50,), outputs=40, start=init)
        return jax.jit(lambda key: model.init(key, images, False)["params"])(jax.random.key(0))

    ours, keras = start("torchvision"), start("keras")
    conv = ours["block2"]["layer2"]["conv"]
    assert np.std(conv["kernel"]) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    for part in ("fc1", "head"):
        assert np.std(ours[part]["kernel"]) == pytest.approx(0.01, rel=0.05)
        assert np.abs(ours[part]["kernel"]).max() > 0.03
    for kernel, fans in (
        (keras["block2"]["layer2"]["conv"]["kernel"], 9 * (64 + 64)),
        (keras["fc1"]["kernel"], 4 * 4 * 64 + 50),
        (keras["head"]["kernel"], 50 + 40),
    ):
        limit = (6 / fans) ** 0.5
        assert 0.98 * limit < np.abs(kernel).max() <= limit and np.std(kernel) == pytest.approx(
            limit / 3**0.5, rel=0.04
        )
    for params in (ours, keras):
        biases = [
            conv["bias"],
            params["fc1"]["bias"],
            params["head"]["bias"],
            params["block1"]["layer1"]["conv"]["bias"],
        ]
        assert all((bias == 0).all() for bias in biases)
    assert models.build("vgg16", init="keras").start == "keras"
    with pytest.raises(UserError, match="torchvision, keras"):
        models.build("vgg16", init="he")


def test_start_of_alexnet():
    model = models.build("alexnet", outputs=50)
    images = jnp.zeros((1, 64, 64, 3))
    params = jax.jit(lambda key: {k: model.init(key, images, False)["params"][k] for k in ("block2", "head")})
    started = params(jax.random.key(0))
    for leaf, fan_in in ((started["block2"]["conv"], 25 * 64), (started["head"], 4096)):
        for values in leaf.values():
            limit = fan_in**-0.5
            assert 0.9 * limit < np.abs(values).max() <= limit


@pytest.mark.parametrize("hidden, pool", [((), 1), ((5,), 1), ((5,), 3)])
def test_heads_of_vgg(hidden, pool):
    """Straight on the map's average, a dense layer on it, or one on a map that is pooled to 3x3 first."""
    model = small(hidden=hidden, pool=pool)
    params, collections = filled(model, 24)
    result = run(model, params, collections, pictures(24))
    last = np.asarray(result.features["block2"]).reshape(3, 6, 2, 6, 2, 8).max((2, 4))  # 12x12 before the 2x2 max pool
    x = last.reshape(3, pool, 6 // pool, pool, 6 // pool, 8).mean((2, 4)).reshape(3, -1)
    if hidden:
        x = np.maximum(x @ params["fc1"]["kernel"].reshape(-1, 5) + params["fc1"]["bias"], 0)
    np.testing.assert_allclose(result.features["pooled"], x, rtol=1e-4, atol=1e-5)
    expected = x @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(result.outputs, expected, rtol=1e-4, atol=1e-4)


def test_dropout_is_in_front_of_all_dense_layers_but_the_first():
    model = small(head_dropout=0.5, hidden=(300, 400))
    params, collections = filled(model, 12)
    images = pictures(12, 2)
    apply = jax.jit(
        lambda key, model: forward(model, params, collections, images, train=True, key=key), static_argnums=1
    )
    a, b = apply(jax.random.key(0), model), apply(jax.random.key(1), model)
    assert not np.allclose(a.features["pooled"], b.features["pooled"])  # fc1's output was thinned out
    assert np.array_equal(a.features["block2"], b.features["block2"])
    frozen = model.clone(frozen=("block1", "block2", "fc1", "fc2"))
    a, b = apply(jax.random.key(0), frozen), apply(jax.random.key(1), frozen)
    assert np.array_equal(a.features["pooled"], b.features["pooled"]) and not np.allclose(a.outputs, b.outputs)
    plain = model.clone(head_dropout=0.0)
    assert np.array_equal(apply(jax.random.key(0), plain).outputs, apply(jax.random.key(1), plain).outputs)
    alexnet = models.build("alexnet")
    assert alexnet.dropout == 0.5 and alexnet.head_dropout == 0 and models.build("vgg16").head_dropout == 0.5


def test_a_frozen_trunk_can_be_run_alone():
    model = small(frozen=("block1", "block2", "fc1"), norm=True)
    params, collections = filled(model, 12)
    images = pictures(12)
    kept = jax.jit(lambda: trunk(model, params, collections, images))()
    assert kept.shape == (3, 1, 1, 10)
    key = jax.random.key(0)
    step = jax.jit(
        lambda kept: forward(
            model.clone(head_dropout=0.5), params, collections, images, train=True, key=key, trunk=kept
        )
    )
    whole = jax.jit(lambda: forward(model.clone(head_dropout=0.5), params, collections, images, train=True, key=key))()
    np.testing.assert_array_equal(step(kept).outputs, whole.outputs)


def test_remat_changes_no_gradient_and_bfloat16_little():
    form = {"norm": True, "depths": (1, 1)}
    params, collections = filled(small(**form), 12)
    images = pictures(12, 4, contrast=True)

    def loss(params, model):
        return jnp.square(forward(model, params, collections, images, train=True).outputs).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = gradient(params, small(**form)), gradient(params, small(remat=True, **form))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), plain, again)
    wide = run(small(**form), params, collections, images)
    half = run(small(dtype=jnp.dtype("bfloat16"), **form), params, collections, images)
    assert half.features["block2"].dtype == jnp.bfloat16 and half.outputs.dtype == jnp.float32
    assert 0 < np.abs(wide.outputs - half.outputs).max() < 0.05 * np.abs(wide.outputs).max()
