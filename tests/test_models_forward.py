"""What networks compute: values computed once by PyTorch, freezing, features, dtypes, the door to linen."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled, pictures
from flax.traverse_util import flatten_dict
from test_models import feature_shapes

from jaxsd import models
from jaxsd.models.blocks import joined
from jaxsd.models.catalogue import RESOLUTIONS, shapes
from jaxsd.models.forward import forward, initialise
from jaxsd.models.norm import BatchNorm

pytestmark = pytest.mark.usefixtures("plain")

SMALLEST = ("resnet8", "skresnext50_32x4d", "d_resnext50_32x4d", "nin", "alexnet_rotnet", "patchnet", "resnest14d")
SMALLEST += ("vgg16_bn", "efficientnet_b0")  # of every family with batch norms


# Computed by PyTorch 2.13 in float64 from `filled` parameters and `pictures`: inference logits of two images; then for
# training on three with labels 0, 1, 2: cross-entropy, the first image's logits, squared norm of the gradient, and
# the sums over all running means, running variances, squared means, squared variances after the step. The networks
# were RotNet's own code (nin, alexnet_rotnet) and torchvision's blocks (bottleneck).
GOLDEN = {
    "resnet8": (
        [[0.251027, 7.2621, 0.911224, 3.03394], [0.279883, 7.25522, 0.516999, 2.86046]],
        (1.89535349, [0.264762, 1.85162, 0.254508, 1.43554], 12.49817781),
        (1.638186748, 529.0556601, 4.273432951, 1391.784148),
    ),
    "resnet18": ([[9.20025, -0.469859, -7.58585, 18.7484], [13.7587, -5.52572, -2.11179, 18.471]], None, None),
    "nin": ([[-1.2722, 2.24691, -0.406637, -0.805991], [-1.2149, 2.22526, -0.486319, -0.836052]], None, None),
    "alexnet_rotnet": ([[-1.03746, 3.92744, -8.54564, -5.23549], [1.43092, 4.94355, -10.0836, -6.61762]], None, None),
    "bottleneck": (
        [[6.16907, 4.5676, 8.6265, 15.2688], [6.66413, 4.45606, 8.29507, 15.95]],
        (2.06628603, [-0.482904, -0.48008, 0.64003, 1.71715], 35.33476125),
        (3.300770020, 800.9712030, 8.871103813, 2205.406848),
    ),
}


def tiny(outputs):
    return models.ResNet(outputs=outputs, depths=(1, 1), widths=(4, 6))


def equal(a, b):
    return jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def golden_model(name):
    if name == "bottleneck":
        form = {"depths": (2, 1), "widths": (16, 24), "bottleneck": True, "stem_kind": "imagenet"}
        return models.ResNet(outputs=4, **form), 56
    options = {"resnet18": {"stem": "cifar"}, "nin": {"blocks": 5, "pool_block3": True}}.get(name, {})
    return models.build(name, outputs=4, **options), {"resnet8": 32, "resnet18": 16, "nin": 24}.get(name, 112)


@pytest.mark.parametrize("name", GOLDEN)
def test_same_numbers_as_pytorch(name):
    (model, resolution), (logits, train, running) = golden_model(name), GOLDEN[name]
    params, collections = filled(model, resolution)
    images = pictures(resolution)
    infer = jax.jit(lambda params, images: forward(model, params, collections, images, train=False).outputs)
    np.testing.assert_allclose(infer(params, images)[:2], logits, rtol=2e-4, atol=2e-4)
    if train is None:
        return

    def loss(params):
        result = forward(model, params, collections, images, train=True)
        return -jax.nn.log_softmax(result.outputs)[jnp.arange(3), jnp.arange(3)].mean(), result

    (value, result), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert value == pytest.approx(train[0], rel=1e-4)
    np.testing.assert_allclose(result.outputs[0], train[1], rtol=1e-3, atol=1e-3)
    assert sum(float(np.vdot(g, g)) for g in jax.tree.leaves(gradient)) == pytest.approx(train[2], rel=2e-3)
    leaves = flatten_dict(result.collections["batch_stats"]).items()
    means, variances = (np.concatenate([v for path, v in leaves if path[-1] == kind]) for kind in ("mean", "var"))
    sums = (means.sum(), variances.sum(), (means**2).sum(), (variances**2).sum())
    np.testing.assert_allclose(sums, running, rtol=1e-4)


def test_frozen_parts_run_in_inference_mode():
    model = models.build("resnet8", outputs=4)
    frozen = ("stem", "block1")
    params, collections = filled(model, 8)
    images = pictures(8, 2)
    run = jax.jit(lambda model, train: forward(model, params, collections, images, train=train), static_argnums=(0, 1))
    trained, plain = run(model.clone(frozen=frozen), True), run(model, False)
    before, after = collections["batch_stats"], trained.collections["batch_stats"]
    for part in before:
        assert all(equal(before[part], after[part])) == any(equal(before[part], after[part])) == (part in frozen)
    np.testing.assert_allclose(trained.features["block1"], plain.features["block1"], rtol=1e-5, atol=1e-5)
    assert not np.allclose(trained.features["block2"], plain.features["block2"], rtol=1e-2)


@pytest.mark.parametrize("name", SMALLEST)
def test_frozen_reaches_every_norm_of_the_part_and_no_other(name):
    model = models.build(name, outputs=4, resolution=224)
    frozen = model.parts[::2]
    seen = []

    def note(layer, args, kwargs, context):
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            seen.append((context.module.path[0], args[1]))
        return layer(*args, **kwargs)

    side = max(64, RESOLUTIONS[name])
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    with nn.intercept_methods(note):
        jax.eval_shape(lambda x: model.clone(frozen=frozen).init(jax.random.key(0), x, True), images)
    assert seen == [(part, part not in frozen) for part, _ in seen]
    normed = shapes(model, side).get("batch_stats", {})
    assert dict.fromkeys(part for part, _ in seen) == dict.fromkeys(part for part in model.body if part in normed)


def test_gradient_of_a_feature_is_the_head_weight_over_the_map():
    model = tiny(outputs=5)
    params, collections = filled(model, 16)

    def score(maps):
        variables = {"params": params, **collections, "perturbations": {"block2_map": maps, **others}}
        return model.apply(variables, pictures(16, 1), False)[0][0, 2]

    others = {f"{k}_map": jnp.zeros((1, *v.shape[1:])) for k, v in feature_shapes(model, 16)[1].items()}
    maps = others.pop("block2_map")
    expected = np.broadcast_to(params["head"]["kernel"][:, 2] / 64, (1, 8, 8, 6))
    np.testing.assert_allclose(jax.jit(jax.grad(score))(maps), expected, rtol=1e-5)


def test_bfloat16_computes_and_float32_comes_out():
    model = tiny(outputs=4)
    half = model.clone(dtype=models.build("resnet8", dtype="bfloat16").dtype)
    assert shapes(half, 16) == shapes(model, 16)
    params, collections = filled(model, 16)
    infer = jax.jit(lambda m: forward(m, params, collections, pictures(16), train=False), static_argnums=0)
    a, b = infer(model), infer(half)
    assert b.features["block2"].dtype == jnp.bfloat16
    assert b.outputs.dtype == b.features["pooled"].dtype == jnp.float32
    assert 0 < np.abs(a.outputs - b.outputs).max() < 0.05 * np.abs(a.outputs).max()


def test_door_standardises_and_leaves_collections_alone_in_inference():
    model = tiny(outputs=4)
    key, images = jax.random.key(0), np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    params, collections = initialise(model, key, images)
    collections["standardise"] = {"mean": jnp.array([0.1, 0.2, 0.3]), "std": jnp.array([0.5, 0.6, 0.7])}
    result = forward(model, params, collections, images, train=False)
    by_hand = (images / np.float32(255) - np.float32([0.1, 0.2, 0.3])) / np.float32([0.5, 0.6, 0.7])
    plain = {"params": params, "batch_stats": collections["batch_stats"]}
    expected, _ = model.apply(plain, by_hand, False)
    np.testing.assert_allclose(result.outputs, expected, rtol=1e-4, atol=1e-5)
    assert result.collections is collections
    trained = forward(model, params, collections, jnp.asarray(images) / 255, train=True).collections
    assert set(trained) == {"batch_stats", "standardise"}
    assert not any(equal(trained["batch_stats"], collections["batch_stats"]))
    assert all(equal(trained["standardise"], collections["standardise"]))


def test_parameters_are_drawn_within_other_programs_too():
    """Of a key that is known, of one that is traced, and of several at once: the same but for rounding."""
    model, images = models.ResNet(outputs=3, depths=(1,), widths=(4,)), np.zeros((2, 8, 8, 3), np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    known = jax.tree.leaves(initialise(model, keys[1], images))
    closed = jax.jit(lambda x: initialise(model, keys[1], x))(images)
    traced = jax.jit(lambda key: initialise(model, key, images))(keys[1])
    several = jax.tree.map(lambda x: x[1], jax.vmap(lambda key: initialise(model, key, images))(keys))
    for other in (closed, traced, several):
        for a, b in zip(known, jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_residual_sum_is_plain_relu(dtype):
    """Value and both gradients, zeros too, alone, under vmap and within shard_map."""
    x, y, gradient = (jax.random.normal(jax.random.key(i), (2, 4, 3)).astype(dtype) for i in range(3))
    y = y.at[0].set(-x[0])  # sums of exactly zero

    def both(sum_of, x, y, gradient):
        value, back = jax.vjp(sum_of, x, y)
        return value, *back(gradient)

    wanted = both(lambda x, y: jax.nn.relu(x + y), x, y, gradient)
    found = functools.partial(both, joined)
    mesh, split = jax.sharding.Mesh(jax.devices()[:2], ("data",)), jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(found, mesh=mesh, in_specs=(split,) * 3, out_specs=(split,) * 3)
    for way in (jax.jit(found), jax.vmap(found), jax.jit(sharded)):
        for a, b in zip(way(x, y, gradient), wanted, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
