"""Training: state, step, optimisers, checkpoints and the one loop."""

from jaxsd.train.state import State, carry, create, init, merge, partition
from jaxsd.train.step import make_train_step

__all__ = ["State", "carry", "create", "init", "make_train_step", "merge", "partition"]
