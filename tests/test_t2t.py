"""T2T-ViT beyond what golden values show: windows, fixed tensors, performers, starts, dropout, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled, pictures
from flax.traverse_util import flatten_dict

from jaxsd import models
from jaxsd.errors import UserError
from jaxsd.models.catalogue import shapes, size
from jaxsd.models.forward import forward, initialise, trunk
from jaxsd.models.t2t import (
    T2TViT,
    TokenAttention,
    Transformer,
    linear_attention,
    random_features,
    sinusoid,
    token_grid,
    unfold,
)
from jaxsd.models.vit import resized
from jaxsd.weights import published_name

pytestmark = pytest.mark.usefixtures("plain")

KEY = jax.random.key(5)


def small(**options):
    """Two layers of two heads, positions for images of 32 pixels."""
    return T2TViT(**{"outputs": 5, "width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2, "side": 32, **options})


def run(model, images, train=False, seed=0, side=None):
    params, collections = filled(model, side or model.side)
    infer = jax.jit(lambda images, key: forward(model, params, collections, images, train=train, key=key))
    return infer(images, jax.random.key(seed))


@pytest.mark.parametrize("window, sides", [((7, 4, 2), (12, 17)), ((3, 2, 1), (5, 8))])
def test_unfold_is_channel_major(window, sides):
    """Column c k k + i k + j is channel c at row i and column j of the window."""
    x = np.arange(2 * sides[0] * sides[1] * 2, dtype=np.float32).reshape(2, *sides, 2) + 1
    size_, stride, padding = window
    dims = ("NHWC", "HWIO", "NHWC")
    pads = [(padding, padding)] * 2
    patches = functools.partial(jax.lax.conv_general_dilated_patches, dimension_numbers=dims)
    expected = jax.jit(lambda x: patches(x, (size_,) * 2, (stride,) * 2, pads))(x)
    found = jax.jit(unfold, static_argnums=1)(x, window)
    np.testing.assert_array_equal(found, expected)
    middle = np.asarray(found)[1, 1, 1].reshape(2, size_, size_)
    start = stride - padding
    np.testing.assert_array_equal(middle, x[1, start : start + size_, start : start + size_].transpose(2, 0, 1))


def test_grids():
    sides = {112: 7, 224: 14, 448: 28, 48: 3, 32: 2, 3: 1, 100: 7}
    assert {side: token_grid((side, side))[0] for side in sides} == sides
    assert token_grid((37, 64)) == (3, 4)


def test_sinusoid():
    table = sinusoid(197, 256)
    assert table.shape == (1, 197, 256)
    np.testing.assert_array_equal(table[0, 0], np.tile([0, 1], 128))
    np.testing.assert_allclose(table[0, 1, :4], [0.8415, 0.5403, 0.8020, 0.5974], atol=5e-5)
    np.testing.assert_allclose(table[0, 1, -2:], [1.0746e-4, 1.0], rtol=1e-4)


def test_random_features_and_linear_attention():
    q, k, v = (jax.random.normal(key, (2, 9, 64)) for key in jax.random.split(KEY, 3))
    w = jax.random.normal(KEY, (32, 64)) * 0.3
    a, b = (np.exp(u @ w.T - (u**2).sum(-1, keepdims=True) / 2) / 32**0.5 for u in map(np.float64, (q, k)))
    np.testing.assert_allclose(random_features(q, w), a, rtol=1e-4)
    assert (a > 0).all()
    weights = a @ b.transpose(0, 2, 1)
    weights /= weights.sum(-1, keepdims=True) + 1e-8
    found = linear_attention(q, k, v, w)
    np.testing.assert_allclose(found, weights @ v, rtol=1e-4, atol=1e-4)
    order = np.array([3, 0, 8, 1, 2, 4, 7, 6, 5])
    np.testing.assert_allclose(
        linear_attention(q[:, order], k[:, order], v[:, order], w), found[:, order], rtol=1e-4, atol=1e-5
    )


def test_token_attention_is_scaled_by_the_inputs_width_and_skips_from_the_values():
    x = jax.random.normal(KEY, (2, 6, 147))
    layer = TokenAttention()
    params = layer.init(KEY, x)["params"]
    assert "bias" not in params["qkv"]
    q, k, v = np.split(np.asarray(x) @ params["qkv"]["kernel"], 3, -1)
    scores = q @ k.transpose(0, 2, 1) / 147**0.5
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = v + weights @ v @ params["proj"]["kernel"]
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, counts",
    [
        ("t2t_vit_7", (4_041_804, 4_229_964)),
        ("t2t_vit_10", (5_620_812, 5_808_972)),
        ("t2t_vit_12", (6_673_484, 6_861_644)),
        ("t2t_vit_14", (21_143_372, 21_425_612)),
        ("t2t_vit_t_14", (21_138_892, 21_421_132)),
    ],
)
def test_exact_number_of_values_at_other_resolutions(name, counts):
    for side, count in zip((112, 448), counts, strict=True):
        assert size(shapes(models.build(name, outputs=102, resolution=side), side)) == count


def test_start():
    model = models.build("t2t_vit_7", outputs=300, resolution=32).clone(depth=1)
    params, collections = initialise(model, KEY, pictures(32, 1))
    embed, constants = params["embed"], collections["constants"]["embed"]
    np.testing.assert_array_equal(constants["positions"], sinusoid(5, 256))
    first, second = (np.asarray(constants[f"attention{i}"]["w"]) for i in (1, 2))
    for w in (first, second):
        np.testing.assert_allclose(w @ w.T, 32 * np.eye(32), atol=1e-4)
    other = initialise(model, jax.random.key(6), pictures(32, 1))[1]["constants"]["embed"]["attention1"]["w"]
    assert np.abs(first - second).max() > 1 and np.abs(first - other).max() > 1
    block = params["block1"]
    kernels = [embed["attention1"]["kqv"], embed["attention2"]["mlp"]["fc2"], embed["project"], block["attn"]["qkv"]]
    for layer in (*kernels, params["head"]):
        assert np.std(layer["kernel"]) == pytest.approx(0.02, rel=0.05)
        assert (layer.get("bias", np.zeros(1)) == 0).all()
    assert np.std(embed["class_token"]) == pytest.approx(0.02, rel=0.2)
    assert (
        "bias" not in block["attn"]["qkv"] and "bias" in block["attn"]["proj"] and "bias" in embed["attention1"]["kqv"]
    )


def test_names_are_those_of_the_authors_code():
    model = small(depth=1)
    names = {published_name(model, path) for path in flatten_dict(shapes(model, 32))}

    def leaves(*layers):
        return {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}

    inner = {"w", *leaves("kqv", "proj", "mlp.0", "mlp.2", "norm1", "norm2")}
    tokens = {f"tokens_to_token.attention{i}.{name}" for i in (1, 2) for name in inner}
    block = {f"blocks.0.{name}" for name in leaves("attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")}
    rest = leaves("tokens_to_token.project", "norm", "head")
    assert model.published("embed") == "tokens_to_token" and model.published("block1") == "blocks.0"
    assert names == tokens | block | rest | {"blocks.0.attn.qkv.weight", "cls_token", "pos_embed"}


def test_constants_are_kept_and_never_trained():
    model = small()
    params, collections = filled(model, 32)
    assert not any(path[-1] in ("w", "positions") for path in flatten_dict(params))
    after = run(model, pictures(32), train=True).collections
    for path, leaf in flatten_dict(collections["constants"]).items():
        np.testing.assert_array_equal(flatten_dict(after["constants"])[path], leaf)
    trees = {"params": params, **collections}
    moved = resized(trees, shapes(small(side=64), 64))
    assert moved["constants"]["embed"]["positions"].shape == (1, 17, 16)
    infer = jax.jit(
        lambda params, constants: forward(model, params, {"constants": constants}, pictures(64), train=False)
    )
    inside, told = (infer(tree["params"], tree["constants"]) for tree in (trees, moved))
    np.testing.assert_allclose(told.outputs, inside.outputs, rtol=1e-4, atol=1e-5)


def test_dropout_is_in_the_performers_alone():
    images = np.repeat(pictures(32, 1), 3, 0)
    plain = run(small(), images)
    outputs = run(small(), images, train=True).outputs
    assert len(np.unique(np.asarray(outputs[:, 0]))) == 3
    for calm in (small(frozen=("embed",)), small(token_layer=Transformer)):
        trained = run(calm, images, train=True)
        assert len(np.unique(np.asarray(trained.outputs[:, 0]).round(5))) == 1
    np.testing.assert_allclose(run(small(frozen=("embed",)), images, train=True).outputs, plain.outputs, rtol=1e-4)


def test_images_of_any_size_in_two_goes():
    model = small(frozen=("embed", "block1"))
    params, collections = filled(model, 32)
    images = pictures(64, 2)[:, :37]
    known = jax.jit(lambda images: trunk(model, params, collections, images))(images)
    infer = jax.jit(lambda images, known: forward(model, params, collections, images, train=True, trunk=known))
    whole, rest = infer(images, None), infer(images, known)
    np.testing.assert_array_equal(whole.outputs, rest.outputs)
    assert rest.features["block2"].shape == (2, 3, 4, 16) and "block1" not in rest.features


def test_tokens_are_float32_in_bfloat16():
    """Exponentials of 8 bits would be far off."""
    images = pictures(32)
    plain, half = (run(small(dtype=kind), images) for kind in (jnp.float32, jnp.bfloat16))
    assert half.features["block2"].dtype == jnp.bfloat16 and half.outputs.dtype == jnp.float32
    assert 0 < np.abs(half.outputs - plain.outputs).max() < 0.05 * np.abs(plain.outputs).max()
    program = jax.make_jaxpr(lambda x: run(small(dtype=jnp.bfloat16), x).outputs)(images)
    exponentials = [line for line in str(program).splitlines() if " exp " in line]
    assert exponentials and not any("bf16" in line for line in exponentials)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"resolution": 2}, ["3 pixels", "2x2"]),
        ({"drop_path": 1.0}, ["drop_path", "[0, 1)"]),
        ({"patch": 4}, ["'patch'", "drop_path"]),
    ],
)
def test_wrong_use_is_one_line(options, words):
    with pytest.raises(UserError) as failure:
        models.build("t2t_vit_7", **options)
    assert "\n" not in str(failure.value) and all(word in str(failure.value) for word in words)
