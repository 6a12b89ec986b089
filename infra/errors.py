"""What can go wrong that callers tell apart; UserError is a single line and exit code 2."""


class UserError(Exception):
    """What is wrong, where (file and key), and how to mend it, in one line without a traceback."""


class WorkerLost(Exception):
    """The process or node that ran a task is gone; the task may be tried again."""


class TrainingFailed(Exception):
    """The numbers of a training went wrong (a loss that is not finite); the text says where."""
