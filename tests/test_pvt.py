"""Pyramid vision transformers: maps, starts, norms, and what is random. Their values are in test_golden."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled, pictures

from jaxsd import models
from jaxsd.errors import UserError
from jaxsd.models.blocks import DropPath
from jaxsd.models.conv import Conv
from jaxsd.models.forward import forward
from jaxsd.models.norm import LayerNorm
from jaxsd.models.pvt import PVT, SIZES, Attention

pytestmark = pytest.mark.usefixtures("plain")


def tiny(**options):
    return PVT(outputs=4, depths=(1, 1, 2, 1), widths=(4, 8, 10, 16), ratios=(2, 2, 2, 2), **options)


def visit(model, sides, kind, channels=3):
    """(modules of a kind, shapes of what they give, outputs, features) of one inference, nothing computed."""
    seen = []

    def note(layer, args, kwargs, context):
        y = layer(*args, **kwargs)
        if isinstance(context.module, kind) and context.method_name == "__call__":
            seen.append((context.module, y.shape))
        return y

    images = jax.ShapeDtypeStruct((2, *sides, channels), jnp.float32)
    with nn.intercept_methods(note):
        outputs, features = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, False)[0], images)
    return seen, outputs, features


@pytest.mark.parametrize(
    "side, maps, keys",
    [(32, (8, 4, 2, 1), 1), (48, (12, 6, 3, 2), 1), (96, (24, 12, 6, 3), 3), (112, (28, 14, 7, 4), 3)],
)
def test_maps_and_reduced_maps(side, maps, keys):
    seen, _, features = visit(tiny(), (side, side), Conv)
    assert tuple(features[f"block{i}"].shape[1] for i in range(1, 5)) == maps
    reduced = [shape[1:3] for module, shape in seen if module.name == "reduce"]
    assert reduced == [(keys, keys)] * 4  # the last stage, of one unit, reduces nothing


def test_any_shape_and_channels():
    _, outputs, features = visit(tiny(), (45, 72), Conv, channels=1)
    assert features["block4"].shape == (2, 2, 3, 16) and outputs.shape == (2, 4)
    with pytest.raises(UserError, match="32 pixels or more, got 64x31"):
        visit(tiny(), (64, 31), Conv)
    seen, _, features = visit(tiny(linear=True), (8, 20), Conv)
    assert features["block4"].shape == (2, 1, 1, 16)
    assert [shape[1:3] for module, shape in seen if module.name == "reduce"] == [(7, 7)] * 5


def test_epsilons_of_the_norms():
    seen, *_ = visit(tiny(), (32, 32), LayerNorm)
    found = {"/".join(module.path): module.epsilon for module, _ in seen}
    small = {path for path, epsilon in found.items() if epsilon == 1e-6}
    stages = {f"block{i}/norm" for i in range(1, 5)}
    assert small == stages | {path for path in found if path.endswith(("norm1", "norm2"))}
    assert {found[path] for path in set(found) - small} == {1e-5} and len(found) == 4 + 10 + 4 + 4


def test_sizes():
    built = {name: models.build(name) for name in SIZES}
    assert built["pvt_v2_b3"].depths == (3, 4, 18, 3) and built["pvt_v2_b5"].ratios == (4, 4, 4, 4)
    assert [name for name, model in built.items() if model.linear] == ["pvt_v2_b2_li"]
    assert all(width % heads == 0 for m in built.values() for width, heads in zip(m.widths, m.heads, strict=True))


def test_start():
    model = PVT(outputs=2040, depths=(1, 1, 1, 1), widths=(32, 64, 160, 256))
    images = jnp.asarray(pictures(32, 16))

    def draw(key):
        params = model.init(key, images[:1], False)["params"]
        outputs, _ = model.apply({"params": params}, images, False)
        return {name: params[name] for name in ("stem", "head")}, params["block3"]["unit1"], outputs

    ends, unit, outputs = jax.tree.map(np.asarray, jax.jit(draw)(jax.random.key(3)))
    attention, mlp = unit["attention"], unit["mlp"]
    dense = (ends["head"], attention["query"], attention["keyvalue"], attention["project"], mlp["expand"])
    for layer in dense:
        assert np.std(layer["kernel"]) == pytest.approx(0.02, rel=0.02) and (layer["bias"] == 0).all()
        assert np.abs(layer["kernel"]).max() > 0.07  # not truncated at two deviations
    convs = ((ends["stem"]["conv"], 49 * 32), (attention["reduce"], 4 * 160), (mlp["depthwise"], 9))
    for layer, fan_out in convs:
        assert np.std(layer["kernel"]) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05) and (layer["bias"] == 0).all()
    assert (unit["norm1"]["scale"] == 1).all() and (attention["norm"]["bias"] == 0).all()
    # one normalised token is left of 32 pixels, of length 16: outputs of deviation 0.02 * 16 around ln 2040
    assert outputs.std() == pytest.approx(0.32, rel=0.03)
    assert jax.nn.logsumexp(outputs, -1).mean() == pytest.approx(np.log(2040) + 0.32**2 / 2, abs=0.01)


def test_attention_by_hand():
    layer = Attention(heads=2, reduction=2, linear=False)
    x = pictures(4, 1, 6)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape, np.float32), params)
    small = (
        np.einsum("ipjqc,pqcd->ijd", x.reshape(2, 2, 2, 2, 6), params["reduce"]["kernel"]) + params["reduce"]["bias"]
    )
    small = (small - small.mean(-1, keepdims=True)) / np.sqrt(small.var(-1, keepdims=True) + 1e-5)
    small = (small * params["norm"]["scale"] + params["norm"]["bias"]).reshape(4, 6)
    q, kv = (
        source @ params[name]["kernel"] + params[name]["bias"]
        for source, name in ((x.reshape(16, 6), "query"), (small, "keyvalue"))
    )
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        weights = np.exp(q[:, part] @ kv[:, :6][:, part].T / 3**0.5)
        heads.append(weights / weights.sum(1, keepdims=True) @ kv[:, 6:][:, part])
    expected = np.concatenate(heads, 1) @ params["project"]["kernel"] + params["project"]["bias"]
    found = np.asarray(jax.jit(layer.apply)({"params": params}, x))[0]
    np.testing.assert_allclose(found.reshape(16, 6), expected, rtol=1e-4, atol=1e-4)


def test_paths_drop_more_often_from_unit_to_unit():
    model = models.build("pvt_v2_b0_small", drop_path=0.1)
    seen, *_ = visit(model, (32, 32), DropPath)
    assert [module.rate for module, _ in seen] == pytest.approx([0.1 * (k // 2) / 7 for k in range(16)])
    with pytest.raises(UserError, match="drop_path"):
        models.build("pvt_v2_b0", drop_path=1.0)


def test_random_in_training_alone_and_each_image_for_itself():
    model = tiny(drop_path=0.8)
    params, collections = filled(model, 32)
    images = pictures(32, 6)

    def run(x, train, key=None):
        return forward(model, params, collections, x, train=train, key=key).outputs

    run = jax.jit(run, static_argnums=1)
    plain = run(images, False)
    np.testing.assert_allclose(run(images[::-1], False), plain[::-1], rtol=1e-4, atol=1e-4)
    assert not np.allclose(run(images, True, jax.random.key(1)), plain, rtol=0.01)


def test_bfloat16_is_near_and_remat_gives_the_same_gradients():
    model = PVT(outputs=4, depths=(1, 1), widths=(4, 6), drop_path=0.5)
    params, collections = filled(model, 32)
    images = pictures(32)

    def outputs(params, dtype):
        return forward(model.clone(dtype=dtype), params, collections, images, train=False)

    def gradient(params, remat):
        def total(params):
            network, key = model.clone(remat=remat), jax.random.key(0)
            return jnp.square(forward(network, params, collections, images, train=True, key=key).outputs).mean()

        return jax.grad(total)(params)

    a, b = jax.jit(lambda p: (outputs(p, jnp.float32), outputs(p, jnp.bfloat16)))(params)
    assert b.features["block2"].dtype == jnp.bfloat16 and b.outputs.dtype == b.features["pooled"].dtype == jnp.float32
    assert 0 < np.abs(a.outputs - b.outputs).max() < 0.1 * np.abs(a.outputs).max()
    plain, again = jax.jit(lambda p: (gradient(p, False), gradient(p, True)))(params)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * largest)
