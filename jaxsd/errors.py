"""The two kinds of failure that a user sees as one line."""


class UserError(Exception):
    """Wrong use (a flag, a config, the data): what is wrong, where, what to do. Exit status 2."""


class RunError(Exception):
    """A run that cannot go on (a non-finite loss, no checkpoint to start from). Exit status 1."""


class Stopped(Exception):
    """A signal asked the run to end and everything is saved. Exit status 128 + signal."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
