"""How old and how large what lies in a folder is, by the clock of whoever stores it."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from infra import remote, storage

# What fsspec's file systems call the time of the last change: s3, gs, az, memory and sftp.
_CHANGED = ("LastModified", "mtime", "updated", "last_modified", "modified", "created")


@dataclass(frozen=True)
class Extent:
    """Of a file, or of a folder with all below it. `newest`: seconds since the epoch."""

    bytes: int
    newest: float


def newest(url: str) -> float | None:
    """When the newest file below a folder (or the file itself) was written; None for nothing.

    A local folder's own time counts too, so that one just made is not old for being empty. Infinite
    where the store does not say.
    """
    found = extent(url)
    return None if found is None else found.newest


def extent(url: str) -> Extent | None:
    """Bytes and newest time; None when nothing is there. Unfinished files count, links do not."""
    with storage.mendable(url):
        if storage.is_local(url):
            found = list(_local(Path(storage.absolute(url))))
        else:
            found = [(int(entry["size"] or 0), _changed(entry)) for entry in _entries(url)]
    if not found:
        return None
    return Extent(sum(bytes for bytes, _ in found), max(time for _, time in found))


def _local(root: Path) -> Iterator[tuple[int, float]]:
    if not os.path.lexists(root):
        return
    inside = [Path(above) / name for above, _, files in os.walk(root) for name in files]
    folders = [Path(above) for above, _, _ in os.walk(root)]
    for path in {root, *inside, *folders}:
        try:
            status = os.lstat(path)
        except FileNotFoundError:  # gone meanwhile
            continue
        yield (0 if path.is_dir() else status.st_size), status.st_mtime


def _entries(url: str) -> Iterable[Mapping[str, Any]]:
    """fsspec's, of the file or of all below the folder."""
    at = remote.place(url)
    try:
        found = remote.ask(at, at.fs.find, at.path, detail=True)
    except FileNotFoundError:  # not even the bucket is there
        return []
    return list(found.values())


def _changed(info: Mapping[str, Any]) -> float:
    time = next((info[key] for key in _CHANGED if info.get(key) is not None), math.inf)
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    return time.timestamp() if isinstance(time, datetime) else float(time)
