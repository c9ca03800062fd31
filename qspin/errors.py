"""The one exception that a user sees without a traceback."""


class QspinError(Exception):
    """Something the user can put right. The message names the setting or file, the place, and what to do."""
