"""A bounded cache of what costs a download: made once per machine, named by content, checked.

    {cache}/{key}/            the files, and staged.json with their sizes and digests
    {cache}/{key}.lock        locked while the entry is made, opened or evicted; others wait
    {cache}/{key}.checked     when somebody last held the digests of a large entry against its files
    {cache}/.tmp-{key}-...    being made, or going

Whoever uses an entry holds a shared lock on its staged.json, and so keeps it from being evicted.
Locks are the kernel's and go with their process. On a file system without any, the first of several
makers wins by a rename, and nothing is evicted.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from infra import storage
from infra.errors import UserError
from infra.storage import CorruptError, FileRecord

RECORD = "staged.json"
# Up to so many bytes (0.2 s of SHA-256) every process checks every byte once. Of more, one process
# of the machine does, unless one did within the last hour and nothing was written since.
CHECKED_BY_ALL = 256 << 20
CHECKED_FOR = 3600.0  # seconds
SHARE = 0.5  # of the cache's disk, where no bound is given

_KEY = r"[0-9a-f]{64}"
_UNFINISHED = re.compile(rf"\{storage.TEMP_PREFIX}({_KEY})-(\d+)-[0-9a-f]+")
_log = logging.getLogger(__name__)
_seen: dict[str, tuple[tuple[int, ...], ...]] = {}  # folder -> its files as this process found them


@dataclass(frozen=True)
class Staged:
    """An entry in use; `close` lets it be evicted."""

    folder: str
    lock: IO[Any]

    def close(self) -> None:
        self.lock.close()


class NewEntry:
    """The files of an entry that is being made."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.records: list[FileRecord] = []

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator["Digested"]:
        """One file to write, in one pass; synced at the end."""
        with open(os.path.join(self._folder, name), "xb") as file:
            digested = Digested(file)
            yield digested
            file.flush()
            os.fsync(file.fileno())
        self.records.append(FileRecord(name, digested.bytes, digested.sha256.hexdigest()))


class Digested:
    """A file whose digest is that of what was written, not of what a disk made of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.bytes += memoryview(data).nbytes
        return self._file.write(data)


def stage(
    cache: str, key: str, size: int, bound: int | None, make: Callable[[NewEntry], None]
) -> Staged:
    """The entry `key` of the folder `cache`, made by `make` where it is not there or damaged.

    key    64 hex digits of a digest of what the entry is
    size   bytes it will have
    bound  bytes the whole cache may have (None: half of its disk); what was used longest ago goes

    Raises UserError when there is no room for it; nothing has been fetched then.
    """
    assert re.fullmatch(_KEY, key), key
    folder = os.path.join(cache, key)
    with storage.mendable(folder, "CMFORGE_CACHE"):
        os.makedirs(cache, exist_ok=True)
        with _locked(f"{folder}.lock") as alone:
            wrong = _damage(folder) if os.path.lexists(folder) else None
            if wrong is not None:
                _log.warning("%s is damaged (%s): it is staged again", folder, wrong)
                _remove(folder)
            if not os.path.lexists(folder):
                _make(folder, size, bound, make, alone)
            return _use(folder)


def _use(folder: str) -> Staged:
    path = os.path.join(folder, RECORD)
    try:
        file = open(path, "rb")  # noqa: SIM115 (held open as long as the entry is used)
    except FileNotFoundError as error:  # only where there are no locks
        raise CorruptError(f"{path} was removed as it was opened: run again") from error
    _lock(file, fcntl.LOCK_SH)
    with contextlib.suppress(OSError):  # another user's cache
        os.utime(path)
    return Staged(folder, file)


# --- whole or not ---------------------------------------------------------------------------------


def _damage(folder: str) -> str | None:
    """What is wrong with an entry, or None."""
    try:
        with open(os.path.join(folder, RECORD), "rb") as file:
            records = [FileRecord(**record) for record in json.load(file)["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{RECORD}: {error!r}"
    present = dict(storage.list_files(folder))
    for record in records:
        if present.get(record.path) != record.bytes:
            return f"{record.path} is missing or has another size"
    state = _state(folder, records)
    if _seen.get(folder) == state:
        return None
    large = sum(record.bytes for record in records) > CHECKED_BY_ALL
    if not (large and _checked_lately(folder, records)):
        for record in records:
            if storage.sha256(os.path.join(folder, record.path)) != record.sha256:
                return f"{record.path} is altered"
        if large:
            with contextlib.suppress(OSError):
                storage.write_bytes(f"{folder}.checked", b"")
    _seen[folder] = state
    return None


def _state(folder: str, records: list[FileRecord]) -> tuple[tuple[int, ...], ...]:
    found = [os.stat(os.path.join(folder, record.path)) for record in records]
    return tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in found)


def _checked_lately(folder: str, records: list[FileRecord]) -> bool:
    try:
        checked = os.stat(f"{folder}.checked").st_mtime
    except FileNotFoundError:
        return False
    written = max(os.stat(os.path.join(folder, record.path)).st_mtime for record in records)
    return written < checked and 0 <= time.time() - checked < CHECKED_FOR


# --- making, and making room ----------------------------------------------------------------------


def _make(
    folder: str, size: int, bound: int | None, make: Callable[[NewEntry], None], alone: bool
) -> None:
    cache, key = os.path.split(folder)
    if bound is None:
        bound = int(SHARE * shutil.disk_usage(cache).total)
    if size > bound:
        raise UserError(
            f"{cache}: the data set takes {_gb(size)}, the cache may have {_gb(bound)}; raise "
            f"CMFORGE_CACHE_GB, or set CMFORGE_CACHE to a folder on a larger disk"
        )
    # Its size is part of the name, so that others who look for room count on it from the start.
    temp = os.path.join(cache, f"{storage.TEMP_PREFIX}{key}-{size}-{secrets.token_hex(6)}")
    with _locked(os.path.join(cache, "room.lock")):
        _clear_up(cache, key if alone else None)
        _make_room(cache, size, bound)
        os.mkdir(temp)
    try:
        new = NewEntry(temp)
        make(new)
        with new.create(RECORD) as file:
            text = json.dumps({"files": [vars(record) for record in new.records]}, indent=1)
            file.write(text.encode())
        try:
            os.rename(temp, folder)
        except OSError:
            if not os.path.isdir(folder):  # else another was first, with the same bytes
                raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _clear_up(cache: str, own: str | None) -> None:
    """Remove what dead makers left; `own`: the key that is locked by us."""
    for name in sorted(os.listdir(cache)):
        if (match := _UNFINISHED.fullmatch(name)) is None:
            continue
        with contextlib.ExitStack() as stack:
            lock = os.path.join(cache, f"{match[1]}.lock")
            if match[1] == own or stack.enter_context(_locked(lock, wait=False)):
                shutil.rmtree(os.path.join(cache, name), ignore_errors=True)


def _make_room(cache: str, size: int, bound: int) -> None:
    """Evict what was used longest ago until `size` more bytes keep to the bound and the disk."""
    used, entries = 0, []
    for name in sorted(os.listdir(cache)):
        if (match := _UNFINISHED.fullmatch(name)) is not None:
            used += int(match[2])
        elif re.fullmatch(_KEY, name):
            own = sum(bytes for _, bytes in storage.list_files(os.path.join(cache, name)))
            used += own
            entries.append((_last_used(os.path.join(cache, name)), name, own))
    free = shutil.disk_usage(cache).free
    for _, name, own in sorted(entries):
        if used + size <= bound and size <= free:
            return
        if _evict(os.path.join(cache, name)):
            used, free = used - own, free + own
    if used + size > bound:
        raise UserError(
            f"{cache}: the data set takes {_gb(size)}, and of the {_gb(bound)} that the cache may "
            f"have, running processes use {_gb(used)}; wait for them, or raise CMFORGE_CACHE_GB"
        )


def _last_used(folder: str) -> float:
    try:
        return os.stat(os.path.join(folder, RECORD)).st_mtime
    except OSError:
        return 0.0


def _evict(folder: str) -> bool:
    """Whether the entry is gone; it stays where anybody makes, opens or uses it."""
    with _locked(f"{folder}.lock", wait=False) as alone:
        if not alone:
            return False
        # Locked by its users, who have it open; for writing, as some network file systems ask.
        with _locked(os.path.join(folder, RECORD), wait=False, make=False) as unused:
            if not unused and os.path.exists(os.path.join(folder, RECORD)):
                return False
            _remove(folder)
            return True


def _remove(folder: str) -> None:
    """At once for those who look, in a while for those who have it mapped."""
    cache, key = os.path.split(folder)
    going = os.path.join(cache, f"{storage.TEMP_PREFIX}{key}-0-{secrets.token_hex(6)}")
    os.rename(folder, going)
    shutil.rmtree(going, ignore_errors=True)


# --- locks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: str, *, wait: bool = True, make: bool = True) -> Iterator[bool]:
    """Hold a file's lock; False where it is another's (without `wait`), or there is none to have.

    make: whether to make the file where it is missing.
    """
    try:
        file = open(path, "a+b" if make else "r+b")  # noqa: SIM115 (closed below, which unlocks)
    except OSError:  # another user's, or a read-only file system, or gone
        yield False
        return
    with file:
        yield _lock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock(file: IO[Any], how: int) -> bool:
    try:
        fcntl.flock(file, how)
    except OSError:  # another's, or a file system without locks
        return False
    return True


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
