"""What a user can mend: one line of error, one line of hint, one exit code.

Anything else that is raised is a bug: one line, too, with its traceback where VIT_DEBUG is set, and exit code 1.
"""


class UserError(ValueError):
    """A mistake outside the program. `hint` says what to type or change next."""

    exit_code = 2

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message, hint)
        self.hint = hint

    def __str__(self) -> str:
        return self.args[0]


class RecipeError(UserError):
    """A recipe or an option that cannot be used. The message may hold several lines, one a mistake."""


class DataError(UserError):
    """Images, labels or class names that cannot be used, or a check of results that failed."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint or model file that is missing, damaged, foreign or does not fit."""

    exit_code = 4


class NumericsError(UserError):
    """Training produced NaN or infinity."""

    exit_code = 5


class MemoryExhaustedError(UserError):
    """The batch does not fit into the device's memory."""

    exit_code = 6


class LockedError(UserError):
    """Another process is using the run folder."""

    exit_code = 7


class ProcessError(UserError):
    """Processes that train together lost one another: to start them again may help."""

    exit_code = 75


class StorageError(UserError):
    """The disk refused: full, read-only, or gone."""

    exit_code = 74
