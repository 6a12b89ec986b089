"""What writers that died left behind: unseen by every reader, but it takes room."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from infra import remote, storage


@dataclass(frozen=True)
class Leftover:
    """An unfinished file, folder or upload. `bytes`: None for an upload, which does not say.

    `upload`: the store's name for the upload; empty for files and folders.
    """

    url: str
    age: float  # seconds since it was last written to; for uploads since they began
    bytes: int | None
    upload: str = ""


def stale_temps(url: str, older_than_seconds: float) -> list[Leftover]:
    """Everything unfinished below a folder that is older than that, sorted by URL.

    A live writer has some too: younger than the longest upload they may be its own.
    """
    with storage.mendable(url):
        found = _local(storage.absolute(url)) if storage.is_local(url) else _remote(url)
        old = [one for one in found if one.age > older_than_seconds]
    return sorted(old, key=lambda one: (one.url, one.upload))


def remove_temp(leftover: Leftover) -> None:
    """Removes it; nothing to do when it is gone."""
    if not leftover.upload:
        storage.remove_tree(leftover.url)
        return
    with storage.mendable(leftover.url):
        remote.abort(remote.place(leftover.url), leftover.upload)


def _local(root: str) -> Iterator[Leftover]:
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            if name.startswith(storage.TEMP_PREFIX):
                yield _aged(os.path.join(folder, name))
        folders[:] = [name for name in folders if not name.startswith(storage.TEMP_PREFIX)]


def _aged(path: str) -> Leftover:
    """A folder is as young as the youngest file in it."""
    inside = [path, *(os.path.join(d, name) for d, _, names in os.walk(path) for name in names)]
    now, written, size = time.time(), [], 0
    for one in inside:
        try:
            status = os.lstat(one)
        except FileNotFoundError:  # its writer has just finished
            continue
        written.append(status.st_mtime)
        size += 0 if os.path.isdir(one) else status.st_size
    return Leftover(path, now - max(written, default=now), size)


def _remote(url: str) -> Iterator[Leftover]:
    at, now = remote.place(url), time.time()
    for upload in remote.unfinished(at):
        yield Leftover(upload.url, now - upload.began, None, upload.id)
    for path, entry in remote.files(at):
        written = entry.get("LastModified")
        parts = path.split("/")
        if written is not None and any(part.startswith(storage.TEMP_PREFIX) for part in parts):
            yield Leftover(storage.join(url, path), now - written.timestamp(), int(entry["size"]))
