"""Vision transformers beyond what golden values show: positions of other sizes, starts, running in parts, errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled, pictures
from flax.traverse_util import flatten_dict

from jaxsd import models
from jaxsd.errors import UserError
from jaxsd.models.blocks import DropPath
from jaxsd.models.catalogue import shapes, size
from jaxsd.models.forward import forward, trunk
from jaxsd.models.vit import VisionTransformer, attend, resize_positions, resized

pytestmark = pytest.mark.usefixtures("plain")

KEY = jax.random.key(3)
# Of tables sin(0.7 i), 3 columns, bicubic by PyTorch 2.13 in float64: the second column of the first, second and last
# cell, and the sum of all entries times cos(i).
RESIZED = [
    (7, (14, 14), [0.645259, 0.038465, -0.111576], -4.77009),
    (14, (28, 28), [0.444422, -0.091566, -0.912204], 0.01116),
    (14, (7, 7), [0.117583, 0.323868, -0.27573], -3.11473),
    (5, (8, 8), [0.434427, -0.454526, 0.269684], -11.57083),
    (5, (3, 9), [0.645534, 0.13806, -0.344484], -0.76996),
    (14, (13, 20), [0.45302, -0.530332, -0.804825], 0.67605),
]


def small(**options):
    """Three layers of two heads on 4 x 4 patches, positions for images of 16 pixels."""
    return VisionTransformer(**{"outputs": 5, "width": 16, "depth": 3, "heads": 2, "patch": 4, "side": 16, **options})


def run(model, images, train=False, seed=0):
    params, collections = filled(model, model.side, images.shape[-1])
    infer = jax.jit(lambda images, key: forward(model, params, collections, images, train=train, key=key))
    return infer(images, jax.random.key(seed))


@pytest.mark.parametrize("side, grid, some, total", RESIZED)
def test_positions_are_resized_as_by_pytorch(side, grid, some, total):
    table = np.sin(0.7 * np.arange((1 + side * side) * 3)).astype(np.float32).reshape(1, -1, 3)
    found = np.asarray(resize_positions(table, grid))
    assert found.shape == (1, 1 + grid[0] * grid[1], 3) and found.dtype == np.float32
    np.testing.assert_array_equal(found[:, 0], table[:, 0])
    np.testing.assert_allclose(found[0, [1, 2, -1], 1], some, atol=2e-6)
    assert found.ravel() @ np.cos(np.arange(found.size)) == pytest.approx(total, abs=1e-4)


def test_positions_by_hand():
    table = jnp.arange(4.0).reshape(1, 4, 1)
    rows = [-0.3164, 0.0156, 0.5625, 0.8945, 0.3477, 0.6797, 1.2266, 1.5586]
    rows += [1.4414, 1.7734, 2.3203, 2.6523, 2.1055, 2.4375, 2.9844, 3.3164]
    np.testing.assert_allclose(resize_positions(table, (4, 4), prefix=0)[0, :, 0], rows, atol=1e-4)
    ramp = resize_positions(jnp.arange(49.0).reshape(1, 49, 1), (14, 14), prefix=0)[0, :, 0].reshape(14, 14)
    found = [ramp[0, 0], ramp[0, 1], ramp[6, 6], ramp[7, 7], ramp[13, 13], ramp.sum()]
    np.testing.assert_allclose(found, [-0.84375, -0.546875, 21.625, 26.375, 48.84375, 4704], rtol=1e-5)
    constant = jnp.full((1, 50, 2), 3.0)
    np.testing.assert_allclose(resize_positions(constant, (28, 28)), 3, rtol=1e-6)
    np.testing.assert_array_equal(resize_positions(ramp.reshape(1, -1, 1), (14, 14), prefix=0)[0, :, 0], ramp.ravel())
    with pytest.raises(UserError, match="no square"):
        resize_positions(jnp.zeros((1, 52, 2)), (3, 3))


def test_weights_move_to_other_images_by_their_table_alone():
    (source, _), larger = filled(small(), 16), small(side=24, outputs=7)
    moved = resized({"params": source}, {"params": shapes(larger, 24)["params"]})["params"]
    changed = {path for path, leaf in flatten_dict(moved).items() if leaf is not flatten_dict(source)[path]}
    assert changed == {("embed", "positions")} and moved["embed"]["positions"].shape == (1, 37, 16)
    images = pictures(24, 2)
    infer = jax.jit(lambda model, params: forward(model, params, {}, images, train=False), static_argnums=0)
    inside, told = infer(small(), source), infer(larger.clone(outputs=5), moved)
    np.testing.assert_allclose(told.outputs, inside.outputs, rtol=1e-5, atol=1e-6)
    wider = shapes(small(side=24, width=8), 24)["params"]
    assert resized(source, wider)["embed"]["positions"] is source["embed"]["positions"]


def test_images_of_any_size():
    images = pictures(24, 2, 4)
    result = run(small(), images[:, :9, :22])
    assert [result.features[f"block{i}"].shape for i in (1, 2, 3)] == [(2, 2, 5, 16)] * 3
    np.testing.assert_array_equal(result.outputs, run(small(), images[:, :8, :20]).outputs)
    for wrong in (images[:, :3], images[:, :, :3]):
        with pytest.raises(UserError, match="4 pixels or more"):
            run(small(), wrong)


@pytest.mark.parametrize(
    "name, counts",
    [("tiny", (5_515_878, 5_656_998)), ("small", (21_648_486, 21_930_726)), ("base", (85_764_198, 86_328_678))],
)
def test_exact_number_of_parameters_at_other_resolutions(name, counts):
    for side, count in zip((112, 448), counts, strict=True):
        model = models.build(f"deit_{name}", outputs=102, resolution=side)
        assert size(shapes(model, side)["params"]) == count
        assert shapes(model, side)["params"]["embed"]["positions"].shape[1] == {112: 50, 448: 785}[side]


def test_start():
    model = models.build("deit_tiny", outputs=300).clone(depth=1)
    params = jax.jit(lambda key: model.init(key, jnp.zeros((1, 224, 224, 3)), False)["params"])(KEY)
    block = params["block1"]
    kernels = [block["attn"]["qkv"], block["attn"]["proj"], block["mlp"]["fc1"], block["mlp"]["fc2"], params["head"]]
    for leaf in (*(layer["kernel"] for layer in kernels), params["embed"]["positions"], params["embed"]["class_token"]):
        assert np.std(leaf) == pytest.approx(0.02, rel=0.2 if leaf.size == 192 else 0.02)
        assert leaf.size == 192 or np.abs(leaf).max() > 0.075  # not cut at two deviations
    assert all((layer["bias"] == 0).all() for layer in kernels)
    assert all((norm["scale"] == 1).all() and (norm["bias"] == 0).all() for norm in (block["norm1"], params["norm"]))
    for leaf in params["embed"]["patch"].values():
        limit = 768**-0.5
        assert 0.95 * limit < np.abs(leaf).max() <= limit and np.std(leaf) == pytest.approx(limit / 3**0.5, rel=0.1)


@pytest.mark.slow
def test_first_loss_of_instance_discrimination():
    """ln N + 0.0002 D: layer-normed features have length sqrt(D), the head's weights a deviation of 0.02."""
    model = models.build("deit_tiny", outputs=2040, resolution=112)
    variables = jax.jit(lambda: model.init(KEY, jnp.zeros((1, 112, 112, 3)), False))()
    outputs = jax.jit(lambda x: model.apply(variables, x, False)[0])(pictures(112, 16))
    loss = -jax.nn.log_softmax(outputs)[jnp.arange(16), jnp.arange(16)].mean()
    assert loss == pytest.approx(7.6591, abs=0.2) and np.std(outputs) == pytest.approx(0.277, rel=0.05)
    assert jax.nn.logsumexp(outputs, 1).mean() == pytest.approx(7.6591, abs=0.02)


def test_attention_is_a_mean_of_the_values():
    q, k, v = (jax.random.normal(key, (2, 3, 5, 4)) for key in jax.random.split(KEY, 3))
    scores = np.einsum("bhnd,bhmd->bhnm", q, k) / 2
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhnm,bhmd->bnhd", weights, v).reshape(2, 5, 12)
    np.testing.assert_allclose(attend(q, k, v, 0.5), expected, rtol=1e-5, atol=1e-6)


def test_features_are_the_patches_and_every_image_stands_alone():
    images = pictures(16, 3)
    result = run(small(outputs=0), images)
    np.testing.assert_array_equal(result.outputs, result.features["pooled"])
    assert result.outputs.shape == (3, 16) and result.outputs.dtype == jnp.float32
    turned = run(small(outputs=0), images[::-1])
    np.testing.assert_allclose(turned.outputs[::-1], result.outputs, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_features():
    """Every map is read by the layers behind it; the last is not: the head reads the class token."""
    model = small()
    params, _ = filled(model, 16)
    zeros = {f"block{i}_map": jnp.zeros((2, 4, 4, 16)) for i in (1, 2, 3)} | {"pooled_map": jnp.zeros((2, 16))}

    def score(maps):
        return model.apply({"params": params, "perturbations": maps}, pictures(16, 2), False)[0][:, 1].sum()

    found = jax.jit(jax.grad(score))(zeros)
    assert all(np.abs(found[f"block{i}_map"]).max() > 0 for i in (1, 2)) and (found["block3_map"] == 0).all()
    np.testing.assert_allclose(found["pooled_map"][0], params["head"]["kernel"][:, 1], rtol=1e-6)


def test_drop_path_grows_over_the_blocks():
    model = models.build("deit_tiny", drop_path=0.1)
    rates = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, DropPath) and context.method_name == "__call__":
            rates.append(context.module.rate)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, 32, 32, 3)), True))
    np.testing.assert_allclose(rates, np.repeat(0.1 * np.arange(12) / 11, 2), rtol=1e-6)
    images = np.repeat(pictures(16, 1), 64, 0)
    outputs = run(small(drop_path=0.5), images, train=True).outputs
    assert len(np.unique(np.asarray(outputs[:, 0]))) in range(8, 17)  # two branches of the second and of the third
    np.testing.assert_array_equal(run(small(drop_path=0.5), images).outputs, run(small(), images).outputs)


def test_bfloat16_and_remat():
    images, (params, collections) = pictures(16), filled(small(), 16)
    plain, half = (run(small(dtype=kind), images) for kind in (jnp.float32, jnp.bfloat16))
    assert half.features["block3"].dtype == jnp.bfloat16 and half.outputs.dtype == jnp.float32
    assert 0 < np.abs(half.outputs - plain.outputs).max() < 0.05 * np.abs(plain.outputs).max()

    def gradient(model):
        def loss(params):
            key = jax.random.key(1)
            return jnp.square(forward(model, params, collections, images, train=True, key=key).outputs).sum()

        return jax.jit(jax.grad(loss))(params)

    a, b = (gradient(small(drop_path=0.3, remat=remat)) for remat in (False, True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4 * np.abs(x).max()), a, b)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_trunk_then_rest_is_all(cut):
    model = small().clone(frozen=small().parts[:cut])
    params, collections = filled(model, 16)
    images = pictures(24, 2)[:, :, :12]
    known = jax.jit(lambda images: trunk(model, params, collections, images))(images)
    infer = jax.jit(lambda images, known: forward(model, params, collections, images, train=True, trunk=known))
    whole, rest = infer(images, None), infer(images, known)
    np.testing.assert_array_equal(whole.outputs, rest.outputs)
    assert set(rest.features) == {"pooled", *model.parts[max(cut, 1) : 4]}
    assert all(value.shape[1:3] == (6, 3) for name, value in rest.features.items() if name != "pooled")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"patch": 32, "resolution": 16}, ["16 pixels", "patch="]),
        ({"drop_path": 1.0}, ["drop_path", "[0, 1)"]),
        ({"dropout": -0.1}, ["dropout", "[0, 1)"]),
        ({"frozen": ["patch"]}, ["'patch'", "'embed'", "'norm'"]),
    ],
)
def test_wrong_use_is_one_line(options, words):
    with pytest.raises(UserError) as failure:
        models.build("deit_tiny", **options)
    assert "\n" not in str(failure.value) and all(word in str(failure.value) for word in words)
