"""The two kinds of failure that a user sees as one line."""


class UserError(Exception):
    """Wrong use (a flag, a config, the data): what is wrong, where, what to do. Exit status 2."""


class RunError(Exception):
    """A run that cannot go on (a non-finite loss, no checkpoint to start from). Exit status 1."""


class Damaged(RunError):
    """A checkpoint is lost, or not as it was written."""


class Diverged(RunError):
    """A loss or weight became infinite or NaN at a step, counted from 1."""

    def __init__(self, message: str, step: int, what: str):
        super().__init__(message)
        self.step, self.what = step, what


class Stopped(Exception):
    """A signal asked the run to end and everything is saved. Exit status 128 + signal."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
