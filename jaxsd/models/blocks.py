"""What the network families share: their common fields, a convolution with its norm, a dense layer, initialisers."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsd.errors import UserError
from jaxsd.models.conv import Conv, IntOrPair, Padding, dense
from jaxsd.models.norm import BatchNorm
from jaxsd.models.pool import global_average_pool

Start = Callable[..., jax.Array]  # (key, shape, dtype) -> the first value of a parameter
Part = Literal["all", "trunk", "rest"]  # what of a network a call runs


@functools.cache  # so that layers with the same start are equal
def normal(deviation: float) -> Start:
    """A normal draw of mean 0. Drawn as a vector: the same numbers as drawn by shape, compiled several times faster."""

    def start(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return deviation * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)

    return start


@functools.cache
def uniform(limit: float) -> Start:
    """A uniform draw in +- limit, as a vector like `normal`'s."""

    def start(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, (math.prod(shape),), dtype, -limit, limit).reshape(shape)

    return start


def he_fan_out(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Kernels [.., C, features] of variance 2 / (positions * features): He et al. 2015, as torchvision's ResNets."""
    return normal((2 / (math.prod(shape[:-2]) * shape[-1])) ** 0.5)(key, shape, dtype)


def uniform_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Kernels [.., C, features] uniform in +- 1 / sqrt(positions * C): PyTorch's default."""
    return uniform(math.prod(shape[:-1]) ** -0.5)(key, shape, dtype)


def glorot(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Kernels [D, features] uniform in +- sqrt(6 / (D + features)): Glorot & Bengio 2010."""
    return uniform((6 / sum(shape)) ** 0.5)(key, shape, dtype)


def gelu(x: jax.Array) -> jax.Array:
    """x times the share of a standard normal below x (Hendrycks & Gimpel 2016), by erf as PyTorch does it."""
    wide = x.astype(jnp.float32)  # in bfloat16 nothing would be left of the tail
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


@jax.custom_vjp
def joined(x: jax.Array, y: jax.Array) -> jax.Array:
    """relu(x + y): how a residual branch ends; x and y of one shape and dtype. Not for forward-mode derivatives.

    Kept as an array, in the gradient too: a CPU would add up the whole stream of units in everything that reads it.
    """
    return jax.lax.optimization_barrier(nn.relu(x + y))


def _joined_gradients(result: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    gradient = jax.lax.optimization_barrier(jnp.where(result > 0, gradient, 0))
    return gradient, gradient


joined.defvjp(lambda x, y: (joined(x, y),) * 2, _joined_gradients)


class Linear(nn.Module):
    """A dense layer in x's dtype, started as PyTorch starts one: uniform in +- 1 / sqrt(fan in), the bias too."""

    features: int
    use_bias: bool = True
    kernel_init: Start = uniform_fan_in
    bias_init: Start | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, D] to [B, features]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = dense(x, kernel.astype(x.dtype))
        if self.use_bias:
            start = self.bias_init or uniform(x.shape[-1] ** -0.5)
            y = y + self.param("bias", start, (self.features,)).astype(x.dtype)
        return y


class ConvNorm(nn.Module):
    """Convolution, batch norm of `epsilon`, `activation` if any; submodules "conv" and "norm".

    `zero_scale` starts the norm's scale at zero, so that a residual branch ending here starts as nothing.
    """

    features: int
    kernel_size: IntOrPair
    stride: IntOrPair = 1
    padding: Padding = 0
    use_bias: bool = False
    dilation: IntOrPair = 1
    groups: int = 1
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu
    zero_scale: bool = False
    epsilon: float = 1e-5
    kernel_init: Start = he_fan_out
    bias_init: Start = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] to [B, h, w, features]."""
        x = Conv(
            self.features, self.kernel_size, self.stride, self.padding, self.use_bias, self.dilation, self.groups,
            kernel_init=self.kernel_init, bias_init=self.bias_init, name="conv",
        )(x)  # fmt: skip
        norm = BatchNorm(epsilon=self.epsilon, name="norm")
        x = norm(x, train)
        if self.zero_scale and self.is_initializing():
            norm.put_variable("params", "scale", jnp.zeros(self.features))
        return self.activation(x) if self.activation else x


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): while training, drops a residual branch for some of the images.

    Those that keep it have it divided by the share that does, so that the mean stays. `rate` in [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, ...] to the same shape."""
        if not train or not self.rate:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        return x * (kept / (1 - self.rate)).astype(x.dtype)


class Backbone(nn.Module):
    """The fields and the ending of every family; called as `model(images, train)` -> (outputs, features).

    images: float32 [B, H, W, C], standardised. outputs: float32 [B, outputs]; with `outputs=0` there is no head and
    the pooled features take their place. features: one [B, h, w, D] for each of `blocks`, in the compute dtype, and
    "pooled" float32 [B, D], what the head reads; each passes through `perturb` as NAME_map, so that gradients with
    respect to it can be had. `frozen` names top-level submodules that run in inference mode even in training: their
    batch norms use the running statistics and leave them alone. `dtype` is that of the computation, parameters and
    statistics are float32. With `remat` the units of the blocks (see `unit`) are run again for their gradients, which
    saves the memory of what lies inside them. `head_dropout` is the share of the pooled features that is dropped in
    front of the head while training. Raises UserError on a frozen name that does not exist.
    """

    before: ClassVar[tuple[str, ...]] = ()  # the names of the submodules in front of the blocks

    outputs: int = 1000
    frozen: tuple[str, ...] = ()
    dtype: Any = jnp.float32
    remat: bool = False
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.frozen) - set(self.parts))
        if unknown:
            raise UserError(f"frozen parts {unknown} are not in {type(self).__name__}: choose from {list(self.parts)}")
        super().__post_init__()

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks whose features are shown, input first."""
        raise NotImplementedError

    @property
    def behind(self) -> tuple[str, ...]:
        """The names of the submodules between the blocks and the head."""
        return ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all top-level submodules, input first: what can be frozen or carried by name."""
        return (*self.before, *self.blocks, *self.behind, *(("head",) if self.outputs else ()))

    @property
    def prefix(self) -> tuple[str, ...]:
        """What `part="trunk"` runs: the leading parts, head apart, that are frozen; () if it cannot run in parts."""
        return ()

    def published(self, name: str) -> str:
        """The name under which timm (or torchvision) keeps the tensors of a submodule, "block1/unit2/conv" for one.

        Also that of a parameter which is no kernel, scale or bias ("class_token"), and of a block as a module whose
        output is the block's feature.
        """
        raise NotImplementedError(f"{type(self).__name__} has no published counterpart")

    def published_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The published shape of a tensor ("fc1/kernel"), where it is not `shape`, PyTorch's for the same layer."""
        return shape

    def unit(self, module: type[nn.Module]) -> type[nn.Module]:
        """A submodule class, called as (x, train), that is run again for its gradients where `remat` asks for it."""
        return nn.remat(module, static_argnums=(2,)) if self.remat else module

    def trains(self, name: str, train: bool) -> bool:
        """Whether the part called `name` runs in training mode."""
        return train and name not in self.frozen

    def shown(self, features: dict[str, jax.Array], name: str, value: jax.Array) -> jax.Array:
        """Notes `value` as the feature `name`; the network goes on with what is returned."""
        features[name] = self.perturb(f"{name}_map", value)
        return features[name]

    def ending(
        self, features: dict[str, jax.Array], x: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Pools x [B, h, w, D] over space (or takes x [B, D] as it is), in float32, and applies the head."""
        x = self.shown(features, "pooled", pooled(x))
        if not self.outputs:
            return x, features
        x = nn.Dropout(self.head_dropout, deterministic=not self.trains("head", train))(x)
        return self.head_layer()(x), features

    def head_layer(self) -> Linear:
        """The layer behind the pooled features."""
        return Linear(self.outputs, name="head")


class Sequential(Backbone):
    """A backbone whose parts run one after the other, so that it can also be run in two goes.

    Called as `model(x, train, part)`. "all" runs everything. "trunk" runs only the `prefix`, on images, and gives (its
    output, {}): an array [B, ...], the pooled features if all but the head is frozen. "rest" takes that for x and runs
    the others: (outputs, features of the parts that it ran). Nothing random or trained stands before the rest, so the
    trunk's output can be kept and used in every step. Initialise with "all": the variables belong to the whole.
    """

    @property
    def prefix(self) -> tuple[str, ...]:
        """The leading parts that are frozen, without a gap; the head is never one."""
        return tuple(itertools.takewhile(self.frozen.__contains__, self.body))

    @property
    def body(self) -> tuple[str, ...]:
        """All parts but the head."""
        return tuple(name for name in self.parts if name != "head")

    def run(self, name: str, x: jax.Array, train: bool, features: dict[str, jax.Array]) -> jax.Array:
        """One part of the body, up to what the next one takes; notes its feature if it is a block."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, part: Part = "all") -> tuple[jax.Array, dict[str, jax.Array]]:
        """x: images [B, H, W, C], or the trunk's output for `part="rest"`; to (outputs, features), see Backbone."""
        features: dict[str, jax.Array] = {}
        cut = len(self.prefix)
        names = {"all": self.body, "trunk": self.body[:cut], "rest": self.body[cut:]}[part]
        if part != "rest":
            x = x.astype(self.dtype)
        for i, name in enumerate(names):
            if i == cut > 0 and part == "all":
                x = jax.lax.optimization_barrier(x)  # nothing is fused across the cut: bit for bit as in two goes
            x = self.run(name, x, self.trains(name, train), features)
        if cut == len(self.body) and part != "rest":
            x = jax.lax.optimization_barrier(pooled(x))
        return (x, {}) if part == "trunk" else self.ending(features, x, train)


class Staged(Sequential):
    """A stem, then one block of repeated units for each entry of `depths`: how many it has of them.

    `depths` is a field of the family, or a property.
    """

    before: ClassVar[tuple[str, ...]] = ("stem",)

    @property
    def depths(self) -> tuple[int, ...]:
        """The number of units of each block."""
        raise NotImplementedError

    @property
    def blocks(self) -> tuple[str, ...]:
        """("block1", ..): the stages, without the stem."""
        return numbered("block", len(self.depths))


def numbered(name: str, count: int) -> tuple[str, ...]:
    """("block1", "block2", ..) of "block"."""
    return tuple(f"{name}{i + 1}" for i in range(count))


def growing(last: float, depths: Sequence[int], *, steps: int | None = None) -> list[tuple[float, ...]]:
    """Rates that grow linearly over the units of all blocks, from 0 in the first: a tuple for each of `depths`.

    The last unit has the rate `last`, or with `steps` unit k (from 0) has k / steps of it.
    """
    steps = steps or max(sum(depths) - 1, 1)
    ends = itertools.accumulate(depths)
    return [tuple(last * k / steps for k in range(end - depth, end)) for depth, end in zip(depths, ends, strict=True)]


def pooled(x: jax.Array) -> jax.Array:
    """x [B, h, w, D] averaged over space (or x [B, D] as it is), float32."""
    x = x.astype(jnp.float32)
    return global_average_pool(x) if x.ndim == 4 else x


def grown(name: str, blocks: int, grow: int | None) -> int:
    """How many of its blocks a network uses: the first `grow`, None for all. Raises UserError on any other number."""
    if grow is not None and grow not in range(1, blocks + 1):
        raise UserError(f"{name} has {blocks} blocks, so it cannot use the first {grow}: set grow= to 1 .. {blocks}")
    return blocks if grow is None else grow


def check_rates(name: str, **rates: float) -> None:
    """Raises UserError unless all rates, options of the network called `name`, are in [0, 1)."""
    for option, rate in rates.items():
        if not 0 <= rate < 1:
            raise UserError(f"{name}'s {option} must be in [0, 1), got {rate}")
