"""This process's temporary folders, which go with it: if it was killed, the next one removes them.

A checkpoint on its way to a bucket is gigabytes; a machine where drivers and workers are killed
time and again would fill up with what they left.
"""

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "cmforge-process-"
NEW_SECONDS = 60.0  # younger ones may be about to be locked

_mine: tuple[int, Path] | None = None  # of which process; a fork is another one


def root() -> Path:
    """The folder of this process below TMPDIR. Put temporary files and folders in it."""
    global _mine
    if _mine is None or _mine[0] != os.getpid() or not _mine[1].is_dir():
        remove_those_of_the_dead()
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        # Held until the process ends, however it ends; also told apart from another container's.
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)
        _mine = (os.getpid(), folder)
        atexit.register(_leave, *_mine)
    return _mine[1]


def remove_those_of_the_dead() -> None:
    """Folders that nobody holds. What cannot be looked at or removed is left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < NEW_SECONDS:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _leave(pid: int, folder: Path) -> None:
    if pid == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
