"""Whether the stages of a path fit together, found before any of them is trained: by names, then by shapes."""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jaxsd import weights
from jaxsd.data.source import Source
from jaxsd.errors import UserError
from jaxsd.stage import Stage, Trained, start
from jaxsd.train.state import merge


def check_names(stages: Sequence[Stage], where: str) -> None:
    """Raises UserError where a path of stages has a name twice."""
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise UserError(f"{where}: a stage stands twice in {', '.join(names)}")


def check_fresh(paths: Iterable[Sequence[Stage]]) -> None:
    """Raises UserError where `fresh` or `under` of a stage names a part that there is not.

    A part is one of its own network, or of one that comes right before it on any of the paths. Names within a part,
    networks that do not list their `parts`, and stages that begin with published weights are left to `check_fits`.
    """
    pairs = [(before, stage) for path in paths for before, stage in zip((None, *path), path, strict=False)]
    for stage in {id(stage): stage for _, stage in pairs}.values():
        befores = [before for before, other in pairs if other is stage]
        networks = [stage.model, *(before.model for before in befores if before is not None)]
        if not all(hasattr(network, "parts") for network in networks):
            continue
        if stage.under and stage.under.split("/")[0] not in stage.model.parts:
            parts = ", ".join(stage.model.parts)
            raise UserError(f"stage {stage.name!r}: under: {stage.under!r} is no part of its network: {parts}")
        parts = list(dict.fromkeys(part for network in networks for part in network.parts))
        unknown = [name for name in stage.fresh if name.split("/")[0] not in parts]
        if unknown and not (None in befores and stage.init is not None):
            raise UserError(
                f"stage {stage.name!r}: fresh: {', '.join(map(repr, unknown))} is no part of its network or of one "
                f"before it: choose from {', '.join(parts)}"
            )


def check_fits(stage: Stage, source: Source, parent: Trained | None = None) -> Trained:
    """The weights of a stage as shapes, begun as it will be; nothing is computed, but published weights are read.

    source: its images before its view; parent: the weights of the stage before, as shapes.

    Raises:
      UserError, with the stage's name, where its network does not take its images, or what it begins with does not fit.
    """
    one = stage.view(source.take([0]))
    standard = np.zeros(one.shape[2], np.float32), np.ones(one.shape[2], np.float32)

    def begun(parent: Trained | None) -> Trained:
        state, _ = start(dataclasses.replace(stage, init=None), jax.random.key(0), one, standard, parent)
        return Trained(merge(state.params, state.frozen), state.extra)

    try:
        found = jax.eval_shape(begun, parent)
        if parent is None and stage.init is not None:
            weights.load(stage.init, stage.model, found.params, found.extra["model"], fresh=("head", *stage.fresh))
    except UserError as error:
        raise UserError(f"stage {stage.name!r}: {error}") from error
    return found
