"""What is asked of a network: pure functions init and loss, one question per file."""

from jaxsd.objectives.objective import Objective, masked_mean
from jaxsd.objectives.regression import regression
from jaxsd.objectives.rotation import rotation
from jaxsd.objectives.supervised import supervised

__all__ = ["Objective", "masked_mean", "regression", "rotation", "supervised"]
