"""The one exception that means "the user can mend this": printed as a single line, exit code 2."""


class UserError(Exception):
    """What is wrong, where (file and key), and how to mend it, in one line without a traceback."""


class WorkerLost(Exception):
    """The process or node that ran a task is gone; the task may be tried again."""
