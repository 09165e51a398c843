"""Optimisers as functions of the learning rate, so that the rate is an input of the compiled step.

    tx = with_rate(clip_norm(sgd(momentum=0.9, weight_decay=5e-4), 1.0))
    opt_state = set_rate(tx.init(params), 0.1)

They see the trainable parameters only: a frozen part has no state here.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxsd.errors import UserError

Make = Callable[[Any], optax.GradientTransformation]  # a scalar rate, often traced -> the transformation
Decay = Literal[
    "all", "kernels"
]  # "all": every array; "kernels": arrays of two or more dimensions (no biases, no norms)


def sgd(*, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0, decay: Decay = "all") -> Make:
    """Stochastic gradient descent as `torch.optim.SGD` defines it.

    Weight decay is an L2 term, added to the gradient before momentum. By default it acts on every parameter, batch
    norm and biases included.
    """
    _check(momentum=momentum)
    if nesterov and not momentum:
        raise UserError("sgd: nesterov needs momentum above 0")
    l2 = _l2(weight_decay, decay)
    return lambda rate: optax.chain(*l2, optax.sgd(rate, momentum=momentum or None, nesterov=nesterov))


def adam(
    *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, decay: Decay = "all"
) -> Make:
    """Adam (Kingma & Ba, 2015), with weight decay as an L2 term of the gradient, as `torch.optim.Adam` has it."""
    _check(beta1=beta1, beta2=beta2)
    l2 = _l2(weight_decay, decay)
    return lambda rate: optax.chain(*l2, optax.adam(rate, b1=beta1, b2=beta2, eps=eps))


def adamw(
    *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01, decay: Decay = "all"
) -> Make:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019): each step also subtracts rate * decay * weight."""
    _check(beta1=beta1, beta2=beta2)
    _check_decay(weight_decay, decay)
    mask = None if decay == "all" else kernels
    return lambda rate: optax.adamw(rate, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=mask)


def lars(*, momentum: float = 0.9, weight_decay: float = 1e-6, trust: float = 0.001) -> Make:
    """LARS (You et al., 2017) as in the public code of SimCLR.

    v = momentum * v + rate * trust * |w| / |g + decay * w| * (g + decay * w); w = w - v. Arrays of fewer than two
    dimensions (biases, norms) have neither the decay nor the ratio: v = momentum * v + rate * g.
    """
    _check(momentum=momentum)
    _check_decay(weight_decay, "kernels")
    return lambda rate: optax.lars(
        rate,
        weight_decay=weight_decay,
        weight_decay_mask=kernels,
        trust_coefficient=trust,
        trust_ratio_mask=kernels,
        momentum=momentum,
    )


def clip_norm(make: Make, limit: float) -> Make:
    """Scales the gradient to a global norm of `limit` where it is larger, before weight decay and momentum."""
    if not 0 < limit < math.inf:
        raise UserError(f"optimiser: a gradient norm limit of {limit}: give a positive, finite number")
    return lambda rate: optax.chain(optax.clip_by_global_norm(limit), make(rate))


def accumulate(make: Make, steps: int) -> Make:
    """One update from the mean gradient of `steps` batches in a row, with the rate of the last; none in between.

    Each batch has the same weight, whatever its mask, and its own batch norm statistics. Put it around `clip_norm`, so
    that the mean is clipped. Batches that are left over when the run ends change nothing.
    """
    if steps < 1:
        raise UserError(f"optimiser: cannot accumulate {steps} batches: give 1 or more")
    if steps == 1:
        return make
    return lambda rate: optax.MultiSteps(make(rate), steps).gradient_transformation()


def with_rate(make: Make) -> optax.GradientTransformation:
    """The optimiser with the rate in its state, so that a new rate compiles nothing. It is 0 until `set_rate`.

    make: one of the above, or any function of the rate, such as `optax.lamb`.
    """
    inject = optax.inject_hyperparams(lambda rate: make(rate), hyperparam_dtype=jnp.float32)
    return inject(rate=0.0)


def set_rate(opt_state: Any, rate: Any) -> Any:
    """The same optimiser state with another rate: a scalar, traced or not, kept as float32.

    Raises UserError where the optimiser was not made by `with_rate`.
    """
    if "rate" not in getattr(opt_state, "hyperparams", ()):
        raise UserError("optimiser: its state holds no rate: make it with train.optimiser.with_rate(...)")
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "rate": jnp.asarray(rate, jnp.float32)})


def kernels(params: Any) -> Any:
    """A tree of bools: True for arrays of two or more dimensions, which leaves out biases and norms."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def _l2(weight_decay: float, decay: Decay) -> tuple[optax.GradientTransformation, ...]:
    _check_decay(weight_decay, decay)
    if not weight_decay:
        return ()
    return (optax.add_decayed_weights(weight_decay, mask=None if decay == "all" else kernels),)


def _check_decay(weight_decay: float, decay: str) -> None:
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"optimiser: weight_decay {weight_decay} must be finite and not negative")
    if decay not in ("all", "kernels"):
        raise UserError(f"optimiser: decay {decay!r} is not known: give 'all' or 'kernels'")


def _check(**coefficients: float) -> None:
    for name, value in coefficients.items():
        if not 0 <= value < 1:
            raise UserError(f"optimiser: {name} {value} must be at least 0 and below 1")
