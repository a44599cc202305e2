"""Errors of training that its user can put right."""


class TrainingError(Exception):
    """Training cannot begin or go on as asked; the message says what to do instead."""


class Diverged(TrainingError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class DamagedCheckpoint(TrainingError):
    """A checkpoint is not what was saved."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM came, and there is nothing left to save. `code` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
