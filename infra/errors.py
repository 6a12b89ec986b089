"""What can go wrong that callers tell apart; UserError is a single line and exit code 2."""


class UserError(Exception):
    """What is wrong, where (file and key), and how to mend it, in one line without a traceback."""


class Unreachable(UserError):
    """A store or server did not answer until the deadline; the same again may succeed later.

    The text names the URL, the number of attempts and the seconds they took.
    """


class WorkerLost(Exception):
    """The process or node that ran a task is gone; the task may be tried again."""


class HeadLost(Exception):
    """The head of a Ray cluster no longer answers: nothing can be started or stopped there."""


class TrainingFailed(Exception):
    """The numbers of a training went wrong (a loss that is not finite); the text says where."""


class Preempted(Exception):
    """Asked to stop, and stopped: what was done is saved, the same command goes on from there."""
