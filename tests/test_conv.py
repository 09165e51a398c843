"""Convolution, batch norm and pooling against XLA's own operations, plain formulas and values worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsd.models import conv as rules
from jaxsd.models import fused, lowering
from jaxsd.models.conv import conv, dense, library_conv
from jaxsd.models.norm import BatchNorm, normalise
from jaxsd.models.pool import (
    adaptive_average_pool,
    adaptive_max_pool,
    average_pool,
    global_average_pool,
    max_pool,
)

# batch, height, width, channels, features, kernel, stride, padding, and where they are not 1: dilation, groups
SHAPES = [
    (4, 8, 8, 5, 6, 3, 1, 1),
    (6, 7, 9, 5, 6, 3, 1, 1),
    (3, 6, 10, 5, 6, 3, 1, 0),
    (3, 6, 6, 5, 6, 3, 1, 3),
    (4, 1, 2, 5, 6, 3, 1, 1),
    (4, 9, 8, 8, 6, 3, 2, 1),
    (4, 8, 8, 3, 6, 3, 1, 1),
    (4, 9, 9, 3, 6, 3, 2, 1),
    (4, 9, 12, 6, 5, 5, 1, 2),
    (4, 12, 11, 6, 5, 7, 2, 3),
    (2, 23, 23, 3, 6, 11, 4, 2),
    (2, 12, 12, 2, 6, 11, 1, 5),
    (4, 8, 8, 6, 5, 1, 1, 0),
    (4, 7, 8, 6, 5, 1, 2, 0),
    (5, 8, 8, 6, 4, 4, 4, 0),
    (2, 9, 9, 5, 4, (3, 1), (1, 2), (1, 0)),
    (3, 8, 8, 5, 6, 3, 1, ((0, 1), (2, 0))),
    (3, 7, 8, 5, 6, (2, 3), 2, ((1, 0), (0, 3))),
    (4, 9, 8, 6, 5, 3, 1, 2, 2),
    (4, 9, 8, 6, 5, 3, 2, (2, 4), (2, 3)),
    (2, 2, 2, 6, 5, 3, 1, 1),
    (2, 2, 3, 3, 4, 3, 1, 4, 3),
    (4, 8, 6, 12, 18, 3, 1, 1, 1, 3),
    (4, 9, 8, 48, 24, 3, 2, 1, 1, 12),
    (2, 8, 8, 16, 16, 3, 1, 2, 2, 2),
    (2, 7, 6, 10, 15, 1, 2, 0, 1, 5),
    (4, 9, 8, 6, 6, 3, 1, 1, 1, 6),
    (4, 9, 8, 6, 6, 5, 2, 2, 1, 6),
    (2, 5, 9, 6, 6, (3, 5), (2, 1), ((0, 3), (4, 5)), (2, 1), 6),
    (2, 40, 3, 6, 6, 3, 2, 1, 1, 6),
    (4, 6, 6, 6, 12, 3, 1, 1, 1, 6),
]


def draw(*shapes, seed=0):
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes]


def distance(a, b):
    """Largest difference, in units of the largest expected value."""
    assert a.shape == b.shape and a.dtype == b.dtype
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


def value_and_gradients(function, x, k, dy):
    y, pull = jax.vjp(function, x, k)
    return y, *pull(dy)


def both(shape, dtype=jnp.float32):
    b, h, w, c, o, kernel, stride, padding, dilation, groups = (*shape, 1, 1)[:10]
    kh, kw = rules.pair(kernel)
    x, k = (v.astype(dtype) for v in draw((b, h, w, c), (kh, kw, c // groups, o)))
    sides = []
    for function in (conv, library_conv):
        apply = functools.partial(function, stride=stride, padding=padding, dilation=dilation, groups=groups)
        (dy,) = draw(jax.eval_shape(apply, x, k).shape, seed=1)
        sides.append(jax.jit(functools.partial(value_and_gradients, apply))(x, k, dy.astype(dtype)))
    return sides


@pytest.fixture
def little_cache(monkeypatch):
    """Limits so low that small images are cut into many parts, too."""
    for module, name, value in (
        (rules, "CHUNK_BYTES", 1 << 11),
        (fused, "TILE_BYTES", 1 << 8),
        (fused, "TILE_COLUMNS", 3),
        (lowering, "WIDE", 12),
    ):
        monkeypatch.setattr(module, name, value)
    jax.clear_caches()  # of what was traced with other limits
    yield
    jax.clear_caches()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_those_of_the_library(shape):
    for ours, theirs in zip(*both(shape), strict=True):
        assert distance(ours, theirs) < 3e-6  # float32 with Winograd's transforms


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_so_they_are_in_many_parts(shape, little_cache):
    for ours, theirs in zip(*both(shape), strict=True):
        assert distance(ours, theirs) < 3e-6


@pytest.mark.parametrize("depth, features", [(5, 300), (300, 260), (256, 256)])
def test_dense_is_a_matrix_product(depth, features):
    x, w, dy = draw((2, 3, 2, depth), (depth, features), (2, 3, 2, features))
    for ours, theirs in zip(
        jax.jit(functools.partial(value_and_gradients, dense))(x, w, dy),
        value_and_gradients(jnp.matmul, x, w, dy),
        strict=True,
    ):
        assert distance(ours, theirs) < 1e-6
    assert dense(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[5], SHAPES[8], SHAPES[22], SHAPES[27]], ids=str)
def test_bfloat16_is_rounded_once(shape):
    for ours, theirs in zip(*both(shape, jnp.bfloat16), strict=True):
        assert distance(ours, theirs) < 2**-7


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_kernels_under_vmap_scan_and_checkpoint(groups, monkeypatch):
    monkeypatch.setattr(rules, "CHUNK_BYTES", 1 << 11)
    x, kernels = draw((4, 8, 8, 6), (3, 3, 3, 6 // groups, 6))  # three seeds

    def loss(k, x, function=conv):
        return jnp.sin(function(x, k, padding=1, groups=groups)).sum()

    expected = jnp.stack([jax.grad(loss)(k, x, library_conv) for k in kernels])
    assert distance(jax.vmap(jax.grad(loss), (0, None))(kernels, x), expected) < 3e-6
    scanned = jax.jit(lambda ks: jax.lax.scan(lambda s, k: (s, jax.grad(jax.checkpoint(loss))(k, x)), 0, ks)[1])
    assert distance(scanned(kernels), expected) < 3e-6


def plain_norm(x, scale, bias, epsilon=1e-5):
    x = x.astype(jnp.float32)
    mean = x.mean((0, 1, 2))
    var = jnp.square(x - mean).mean((0, 1, 2))
    return (x - mean) / jnp.sqrt(var + epsilon) * scale + bias


def test_normalise_and_its_gradient_are_the_plain_formula():
    x, scale, bias, dy = draw((4, 5, 3, 7), (7,), (7,), (4, 5, 3, 7))
    x = 3 * x + 10
    y, pull = jax.vjp(lambda *a: normalise(*a, 1e-5)[0], x, scale, bias)
    expected, plain_pull = jax.vjp(plain_norm, x, scale, bias)
    assert distance(y, expected) < 1e-5
    for ours, theirs in zip(pull(dy), plain_pull(dy), strict=True):
        assert distance(ours, theirs) < 2e-5
    assert normalise(x.astype(jnp.bfloat16), scale, bias, 1e-5)[0].dtype == jnp.bfloat16


def test_running_statistics_by_hand():
    x = jnp.array([1.0, 2.0, 3.0, 6.0]).reshape(4, 1, 1, 1)  # mean 3, biased variance 3.5, unbiased 14/3
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, True)
    assert variables["batch_stats"]["mean"] == 0 and variables["batch_stats"]["var"] == 1
    y, changed = norm.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.ravel(), (np.array([1, 2, 3, 6]) - 3) / np.sqrt(3.5 + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(changed["batch_stats"]["mean"], [0.3], rtol=1e-6)
    np.testing.assert_allclose(changed["batch_stats"]["var"], [0.9 + 0.1 * 14 / 3], rtol=1e-6)
    y = norm.apply({**variables, **changed}, x, False)
    np.testing.assert_allclose(y.ravel(), (np.array([1, 2, 3, 6]) - 0.3) / np.sqrt(0.9 + 1.4 / 3 + 1e-5), rtol=1e-5)
    assert "params" not in BatchNorm(affine=False).init(jax.random.key(0), x, True)


def test_pools_by_hand():
    ones = jnp.ones((1, 4, 4, 1))
    ninths = average_pool(ones, 3, 2, 1)[0, :, :, 0] * 9
    np.testing.assert_allclose(ninths, [[4, 6], [6, 9]], rtol=1e-6)
    np.testing.assert_array_equal(max_pool(-ones, 3, 2, 1), -np.ones((1, 2, 2, 1)))  # padding never wins
    count = jnp.arange(35.0).reshape(1, 5, 7, 1)
    # bins of 7 in 3: 0..3, 2..5, 4..7; of 5 in 2: 0..3, 2..5
    np.testing.assert_array_equal(adaptive_max_pool(count, (2, 3))[0, :, :, 0], [[16, 18, 20], [30, 32, 34]])
    np.testing.assert_allclose(adaptive_average_pool(count, (2, 3))[0, :, :, 0], [[8, 10, 12], [22, 24, 26]])
    np.testing.assert_array_equal(adaptive_average_pool(count, (5, 7)), count)
    np.testing.assert_allclose(global_average_pool(count), [[17.0]])


@pytest.mark.parametrize("window, stride, padding", [(3, 2, 1), (2, 2, 0), ((3, 2), (1, 3), (1, 0))])
def test_max_pool_sends_gradients_to_the_first_maximum(window, stride, padding, monkeypatch):
    (kh, kw), (sh, sw), (ph, pw) = (rules.pair(value) for value in (window, stride, padding))
    x = np.round(2 * draw((3, 8, 9, 2))[0])  # with ties

    def library(x):
        edges = ((0, 0), (ph, ph), (pw, pw), (0, 0))
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, kh, kw, 1), (1, sh, sw, 1), edges)

    def pooled(function):
        def both(x, dy):
            y, pull = jax.vjp(function, x)
            return y, pull(dy)[0]

        return jax.jit(both)(x, dy)

    (dy,) = draw(jax.eval_shape(library, x).shape, seed=1)
    expected, library_dx = pooled(library)
    y, dx = pooled(lambda x: max_pool(x, window, stride, padding))
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(dx, library_dx, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elsewhere, dx = pooled(lambda x: max_pool(x, window, stride, padding))
    np.testing.assert_array_equal(elsewhere, expected)
    np.testing.assert_array_equal(dx, library_dx)


@pytest.mark.parametrize(
    "shape", [(0, 8, 8, 6, 5, 3, 1, 1), (0, 8, 8, 6, 6, 3, 1, 1, 1, 6)], ids=["dense", "depthwise"]
)
def test_no_images_have_no_gradient(shape):
    y, dx, dk = both(shape)[0]
    assert not y.size and not dx.size and not np.any(dk)


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("checked", [True, False])
def test_within_shard_map(groups, checked, monkeypatch):
    """Chunks and tiles of what differs on every device, with a kernel that all share: its gradient is added up."""
    monkeypatch.setattr(rules, "CHUNK_BYTES", 1 << 13)
    x, w, places = draw((32, 8, 8, 16), (3, 3, 16 // groups, 16), (32, 8, 8, 16))

    def loss(x, w, places):
        return (places * conv(x, w, padding=1, groups=groups)).sum()

    def each(x, w, places):
        dx, dw = jax.grad(loss, (0, 1))(x, w, places)
        return dx, dw if checked else jax.lax.psum(dw, "data")

    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    split = P("data")
    sharded = jax.shard_map(each, mesh=mesh, in_specs=(split, P(), split), out_specs=(split, P()), check_vma=checked)
    found, wanted = jax.jit(sharded)(x, w, places), jax.jit(jax.grad(loss, (0, 1)))(x, w, places)
    for ours, theirs in zip(found, wanted, strict=True):
        assert distance(ours, theirs) < 2e-5


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_eight_devices_give_the_numbers_of_one(groups, monkeypatch):
    monkeypatch.setattr(rules, "CHUNK_BYTES", 1 << 13)
    x, w, places = draw((32, 8, 8, 16), (3, 3, 16 // groups, 16), (32, 8, 8, 16))

    def loss(x, w):
        y = conv(x, w, padding=1, groups=groups)
        return (places * normalise(y, jnp.ones(16), jnp.zeros(16), 1e-5)[0]).sum()

    mesh = Mesh(np.array(jax.devices("cpu")), ("data",))
    assert mesh.size == 8
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    one = step(x, w)
    shards = jax.device_put(x, NamedSharding(mesh, P("data"))), jax.device_put(w, NamedSharding(mesh, P()))
    many = step(*shards)
    if groups == 16:  # tile by tile: every device works on its own images
        assert "all-gather" not in step.lower(*shards).compile().as_text()
    assert len(many[1][0].sharding.device_set) == 8
    for ours, theirs in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        assert distance(ours, theirs) < 2e-5
