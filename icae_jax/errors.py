"""What a user must change, as against what a machine or this code did wrong; and which failures are worth another try."""

import errno

# A full disk, or a full share of it: nothing is wrong with the code, and running again does not help until somebody makes room.
_FULL = {errno.ENOSPC, errno.EDQUOT}


class UserError(ValueError):
    """Bad input: the message names the field or file, the value and the remedy. It alone (and a full disk) gives exit code 2."""


def disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, is a disk without room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__
    return False


def is_users(error: BaseException) -> bool:
    """Whether the user must change something (exit code 2): launchers do not restart such a run."""
    return isinstance(error, UserError) or disk_full(error)
