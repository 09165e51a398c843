"""ResNeSt: what the golden values do not show."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled, pictures

from jaxsd import models
from jaxsd.models.blocks import DropPath
from jaxsd.models.catalogue import shapes
from jaxsd.models.forward import forward
from jaxsd.models.resnest import ResNeSt, SplitAttention, Unit, halved

pytestmark = pytest.mark.usefixtures("plain")


def small(**options):
    return ResNeSt(**{"outputs": 4, "depths": (1, 2), "widths": (8, 16), "stem_width": 4, **options})


def test_shares_of_split_attention():
    """Equal halves come out as they are, whatever the attention; without attention the halves are averaged."""
    layer = SplitAttention(6)
    x = jnp.asarray(pictures(5, 2, 8))
    variables = jax.jit(lambda key: layer.init(key, x, False))(jax.random.key(0))
    run = jax.jit(lambda variables, x: layer.apply(variables, x, False))
    kernel = variables["params"]["splits"]["conv"]["kernel"]
    assert kernel.shape == (3, 3, 4, 12)  # each half of the features sees half of the channels
    alike = {**variables["params"], "splits": {**variables["params"]["splits"], "conv": {"kernel": _twice(kernel)}}}
    halves = jnp.concatenate([x[..., :4]] * 2, -1)
    known = jax.lax.conv_general_dilated(
        x[..., :4], kernel[..., :6], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    known = jax.nn.relu(known / np.sqrt(1 + 1e-5))
    found = run({**variables, "params": alike}, halves)
    np.testing.assert_allclose(found, known, rtol=1e-4, atol=1e-5)
    flat = jax.tree.map(jnp.zeros_like, variables["params"]["expand"])
    even = run({**variables, "params": {**variables["params"], "expand": flat}}, x)
    one = {"kernel": jnp.zeros_like(flat["kernel"]), "bias": jnp.repeat(jnp.array([50.0, -50.0]), 6)}
    first = run({**variables, "params": {**variables["params"], "expand": one}}, x)
    one = {**one, "bias": -one["bias"]}
    second = run({**variables, "params": {**variables["params"], "expand": one}}, x)
    np.testing.assert_allclose(even, (first + second) / 2, rtol=1e-5, atol=1e-6)
    only_first = x.at[..., 4:].set(0)
    np.testing.assert_allclose(run({**variables, "params": {**variables["params"], "expand": one}}, only_first), 0)


def _twice(kernel):
    return jnp.concatenate([kernel[..., :6]] * 2, -1)


def test_average_of_an_odd_border_is_that_of_its_pixels():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    np.testing.assert_allclose(halved(x)[0, :, :, 0], [[3, 5, 6.5], [10.5, 12.5, 14]])


def test_sizes_and_channels():
    for side, channels in ((33, 1), (1, 3), (47, 4)):
        model = small()
        images = jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
        outputs, features = jax.eval_shape(
            lambda x, model=model: model.init_with_output(jax.random.key(0), x, False)[0], images
        )
        quarter = -(-side // 4)
        assert features["block1"].shape == (2, quarter, quarter, 32)
        assert features["block2"].shape == (2, -(-quarter // 2), -(-quarter // 2), 64)
        assert outputs.shape == (2, 4) and features["pooled"].shape == (2, 64)


def test_start():
    """timm's: He's draw by fan out, PyTorch's biases, and the last scale of each unit zero (or one, if asked)."""
    unit = Unit(64)
    x = jnp.zeros((1, 2, 2, 128))
    params = jax.jit(lambda key: unit.init(key, x, False)["params"])(jax.random.key(1))
    attention = params["layer2"]
    for kernel, fan_out in (
        (params["layer1"]["conv"]["kernel"], 64),
        (attention["splits"]["conv"]["kernel"], 9 * 128),  # groups do not count in PyTorch's fan out
        (attention["squeeze"]["conv"]["kernel"], 32),
        (attention["expand"]["kernel"], 128),
    ):
        deviation = (2 / fan_out) ** 0.5
        assert np.std(kernel) == pytest.approx(deviation, rel=0.06) and np.abs(kernel).max() > 2.5 * deviation
    for bias, fan_in in ((attention["squeeze"]["conv"]["bias"], 64), (attention["expand"]["bias"], 32)):
        assert 0.85 * fan_in**-0.5 < np.abs(bias).max() <= fan_in**-0.5
    assert (params["layer3"]["norm"]["scale"] == 0).all() and (params["shortcut"]["norm"]["scale"] == 1).all()
    assert (attention["splits"]["norm"]["scale"] == 1).all() and (params["layer3"]["norm"]["bias"] == 0).all()
    ones = Unit(64, zero_init_residual=False)
    other = jax.jit(lambda key: ones.init(key, x, False)["params"])(jax.random.key(1))
    assert (other["layer3"]["norm"]["scale"] == 1).all()


def test_published_sizes():
    stems = {name: models.build(name).stem_width for name in ("resnest50d", "resnest101e", "resnest269e")}
    assert stems == {"resnest50d": 32, "resnest101e": 64, "resnest269e": 64}
    model = models.build("resnest14d", outputs=0, dropout=0.2, drop_path=0.1, zero_init_residual=False)
    assert (model.head_dropout, model.drop_path, model.zero_init_residual) == (0.2, 0.1, False)
    assert model.published("block2/unit1/layer2/squeeze/norm") == "layer2.0.conv2.bn1"


def test_drop_path_grows_with_the_unit_and_drops_whole_branches():
    model = small(drop_path=0.9)
    rates = []

    def note(layer, args, kwargs, context):
        if isinstance(context.module, DropPath) and context.method_name == "__call__":
            rates.append(context.module.rate)
        return layer(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes(model, 16)
    assert rates == pytest.approx([0, 0.45, 0.9])
    unit = Unit(4, zero_init_residual=False, drop_path=0.5)
    x = jnp.asarray(np.abs(pictures(6, 16, 16)))
    variables = jax.jit(lambda key: unit.init(key, x, False))(jax.random.key(0))
    run = jax.jit(lambda key: unit.apply(variables, x, True, rngs={"dropout": key}, mutable=["batch_stats"])[0])
    dropped = (run(jax.random.key(2)) == x).all((1, 2, 3))
    assert 2 < dropped.sum() < 14


def test_remat_runs_every_unit_again():
    for remat, units in ((False, 0), (True, 3)):
        model = small(remat=remat)
        params, collections = filled(model, 16)
        loss = jax.make_jaxpr(lambda p, m=model, c=collections: forward(m, p, c, pictures(16), train=True).outputs)
        names = [equation.primitive.name for equation in loss(params).eqns]
        assert sum(name in ("checkpoint", "remat2") for name in names) == units


def test_bfloat16_is_near_float32():
    params, collections = filled(small(), 16, gain=0.5)
    infer = jax.jit(lambda model: forward(model, params, collections, pictures(16), train=False), static_argnums=0)
    wide, half = infer(small()), infer(small(dtype=jnp.dtype("bfloat16")))
    assert half.features["block2"].dtype == jnp.bfloat16 and half.outputs.dtype == jnp.float32
    assert 0 < np.abs(wide.outputs - half.outputs).max() < 0.05 * np.abs(wide.outputs).max()


def test_a_fresh_unit_is_its_shortcut():
    """With the last scale at zero, a unit without a projection changes nothing."""
    unit = Unit(4)
    x = jnp.asarray(np.abs(pictures(5, 2, 16)))
    variables = jax.jit(lambda key: unit.init(key, x, False))(jax.random.key(0))
    np.testing.assert_array_equal(jax.jit(lambda v: unit.apply(v, x, False))(variables), x)
