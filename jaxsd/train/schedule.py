"""Learning rates over a run: plain numbers, computed on the host before training starts.

Lengths are in epochs. A drop happens between two epochs; cosine and warm-up move with every step.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from jaxsd.errors import UserError

_ROUNDING = 1e-9  # milestones come from products such as 10 * 1.1, which is 11.000000000000002


@dataclass(frozen=True)
class Schedule:
    """A learning rate as a function of the epoch; made by `constant`, `steps`, `cosine` and `warmup`."""

    rate: float
    milestones: tuple[float, ...] = ()  # epochs at which the rate is multiplied by `factor`
    factor: float = 1.0
    final: float | None = None  # the end of a cosine; None: no cosine
    warmup_epochs: float = 0.0
    warmup_start: float = 0.0

    def rates(self, epochs: int, steps_per_epoch: int) -> np.ndarray:
        """The rate of every step of a run, float32 [epochs * steps_per_epoch].

        Raises UserError where the warm-up would not end before the run does.
        """
        if epochs < 0 or steps_per_epoch < 1:
            raise UserError(f"schedule: {epochs} epochs of {steps_per_epoch} steps: give 0 or more epochs of 1 or more")
        if epochs and self.warmup_epochs >= epochs:
            raise UserError(
                f"schedule: a warm-up of {self.warmup_epochs:g} epochs does not end within {epochs}: shorten it"
            )
        step = np.arange(epochs * steps_per_epoch)
        position = step / steps_per_epoch
        rates = self._after_warmup(step // steps_per_epoch, position, epochs)
        if self.warmup_epochs:
            whole, share = math.floor(self.warmup_epochs + _ROUNDING), position / self.warmup_epochs
            peak = self._after_warmup(np.array([whole]), np.array([self.warmup_epochs]), epochs)
            ramp = self.warmup_start + (peak - self.warmup_start) * share
            rates = np.where(share < 1, ramp, rates)
        return rates.astype(np.float32)

    def _after_warmup(self, epoch: np.ndarray, position: np.ndarray, epochs: int) -> np.ndarray:
        drops = (epoch[:, None] >= np.asarray(self.milestones) - _ROUNDING).sum(1)
        rates = self.rate * self.factor**drops
        if self.final is None:
            return rates
        share = (position - self.warmup_epochs) / (epochs - self.warmup_epochs)
        return self.final + (rates - self.final) * (1 + np.cos(np.pi * share)) / 2

    def unreached(self, epochs: int) -> tuple[float, ...]:
        """The milestones that a run of so many epochs ends before: its rate never drops there."""
        return tuple(m for m in self.milestones if m - _ROUNDING > epochs - 1)

    def stretched(self, factor: float) -> "Schedule":
        """The same course over `factor` times as many epochs: every milestone and the warm-up scale."""
        if not 0 < factor < math.inf:
            raise UserError(f"schedule: cannot stretch by {factor}: the factor must be positive and finite")
        milestones = tuple(m * factor for m in self.milestones)
        return replace(self, milestones=milestones, warmup_epochs=self.warmup_epochs * factor)


def constant(rate: float) -> Schedule:
    """The same rate throughout."""
    return Schedule(_checked("rate", rate))


def steps(rate: float, *, milestones: tuple[float, ...], factor: float) -> Schedule:
    """A rate multiplied by `factor` from each milestone on.

    milestones: epochs, counted from 0 and increasing; an epoch >= the milestone has the new rate. ScaleNet (section
    3.1.1): 0.1, milestones 30, 60, 80, factor 1/5.
    """
    milestones = tuple(float(m) for m in milestones)
    if any(not 0 < m < math.inf for m in milestones) or any(b <= a for a, b in pairwise(milestones)):
        raise UserError(f"schedule: milestones {milestones} must be positive epochs in increasing order")
    if not 0 < factor < math.inf:
        raise UserError(f"schedule: factor {factor} must be positive and finite, for example 0.2")
    return Schedule(_checked("rate", rate), milestones, float(factor))


def cosine(rate: float, *, final: float = 0.0) -> Schedule:
    """Half a cosine from `rate` at the first step towards `final` at the end of the run (Loshchilov & Hutter, 2017).

    After a warm-up it spans the epochs that remain, as in the public code of SimCLR.
    """
    rate, final = _checked("rate", rate), _checked("final", final)
    if final > rate:
        raise UserError(f"schedule: final {final:g} is above the rate {rate:g}: a cosine falls")
    return Schedule(rate, final=final)


def warmup(schedule: Schedule, *, epochs: float, start: float = 0.0) -> Schedule:
    """The same schedule, with a straight line from `start` over the first epochs.

    Milestones stay where they are (epochs from the start of the run, as in Goyal et al., 2017); a cosine starts where
    the line ends.
    """
    if schedule.warmup_epochs:
        raise UserError("schedule: it has a warm-up already: give one")
    if not 0 < epochs < math.inf:
        raise UserError(f"schedule: a warm-up of {epochs} epochs: give a positive, finite number")
    return replace(schedule, warmup_epochs=float(epochs), warmup_start=_checked("start", start))


def _checked(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise UserError(f"schedule: {name} {value} must be finite and not negative")
    return float(value)
