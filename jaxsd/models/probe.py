"""Linear probes: a linear classifier on the features of each block of a frozen network, all trained at once."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxsd.errors import UserError
from jaxsd.models.blocks import Backbone, Linear, Part, normal
from jaxsd.models.norm import BatchNorm
from jaxsd.models.pool import adaptive_max_pool

PROBE_FEATURES = 9600


def probe_grid(shape: tuple[int, ...]) -> int:
    """The side of the pooled map that a probe reads from features of `shape` [.., h, w, D].

    The largest that keeps at most 9,600 numbers and does not exceed the map; for RotNet's AlexNet at 224 pixels this
    gives the sides of its public code, 12, 7, 5, 6, 6 for the five convolutions.
    """
    height, width, channels = shape[-3:]
    return max(1, min(height, width, int((PROBE_FEATURES / channels) ** 0.5)))


class Probe(nn.Module):
    """Batch norm without parameters, flattening, a dense layer ("dense").

    The dense layer starts at bias 0 and weights of variance 2 / outputs, as in RotNet's public code.
    """

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, h, w, D] to float32 [B, outputs]."""
        x = BatchNorm(affine=False, name="norm")(x.astype(jnp.float32), train).reshape(x.shape[0], -1)
        start = normal((2 / self.outputs) ** 0.5)
        return Linear(self.outputs, kernel_init=start, bias_init=nn.initializers.zeros_init(), name="dense")(x)


class LinearProbe(nn.Module):
    """A linear probe on every block of `trunk` (RotNet's protocol, used by ScaleNet section 3.2 on ImageNet).

    The trunk (submodule "trunk") runs in inference mode and gets no gradient, whatever `train` and `frozen` say; the
    probes are the submodules "probe_block1" onwards; each reads its block's map after an adaptive max pool. Called as
    `model(images, train)` -> (outputs, features): outputs {"block1": float32 [B, outputs], ..}, features the trunk's.
    `pool` sets the side of the pooled map of named blocks (see `probe_grid` for the others). `frozen` names what is not
    trained, for those who partition the parameters. Raises UserError on unknown names.

    With `part="trunk"` a call gives the pooled maps {"block1": [B, g, g, D], ..} and {}; with `part="rest"` it takes
    them instead of images and gives (outputs, {}).
    """

    trunk: Backbone
    outputs: int
    pool: Mapping[str, int] | None = None
    frozen: tuple[str, ...] = ("trunk",)

    def __post_init__(self) -> None:
        unknown = sorted((set(self.pool or ()) - set(self.blocks)) | (set(self.frozen) - set(self.parts)))
        if unknown:
            raise UserError(f"LinearProbe has no {unknown}: choose blocks or parts from {[*self.blocks, *self.parts]}")
        self.pool = FrozenDict(self.pool) if self.pool else None  # modules are keys of compiled programs
        super().__post_init__()

    @property
    def blocks(self) -> tuple[str, ...]:
        """The trunk's blocks: the keys of the outputs."""
        return self.trunk.blocks

    @property
    def parts(self) -> tuple[str, ...]:
        """("trunk", "probe_block1", ..)."""
        return ("trunk", *(f"probe_{name}" for name in self.blocks))

    @property
    def prefix(self) -> tuple[str, ...]:
        """("trunk",), as long as it is frozen."""
        return tuple(name for name in ("trunk",) if name in self.frozen)

    @nn.compact
    def __call__(self, x: Any, train: bool, part: Part = "all") -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """x: images [B, H, W, C], or the pooled maps for `part="rest"`; to (outputs, features)."""
        maps, features = (x, {}) if part == "rest" else self._maps(x)
        if part == "trunk":
            return maps, {}
        outputs = {}
        for name in self.blocks:
            probe = f"probe_{name}"
            outputs[name] = Probe(self.outputs, name=probe)(maps[name], train and probe not in self.frozen)
        return outputs, features

    def _maps(self, images: jax.Array) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The pooled map of every block, and all features of the trunk."""
        _, features = self.trunk(images, False)
        features = {name: jax.lax.stop_gradient(value) for name, value in features.items()}
        grids = {name: (self.pool or {}).get(name) or probe_grid(features[name].shape) for name in self.blocks}
        maps = {name: adaptive_max_pool(features[name], grid) for name, grid in grids.items()}
        return jax.lax.optimization_barrier(maps), features  # bit for bit as in two goes: nothing is fused across
