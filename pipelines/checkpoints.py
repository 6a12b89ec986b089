"""Checkpoints of one training stage: whole or unseen, checked when read, sent in the background.

    {work}/checkpoints/{images:012d}-{random}/  files, and record.json put last

The name is unique, so that a process thought dead never mixes its files with another's. A reader
takes the newest folder whose record is there and whose files are what the record says.
"""

import contextlib
import json
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from infra import storage, temporary
from infra.errors import Unreachable, UserError
from infra.storage import CorruptError, FileRecord

FOLDER, RECORD = "checkpoints", "record.json"
# Checkpoints in a row that a store may refuse to take: a day's training outlives its short outage.
FAILURES_BORNE = 5


def last_in(work: str) -> str | None:
    """Name of the last one that has a record, whole or not; None where there is none."""
    return max(_finished(storage.join(work, FOLDER)), default=None)


class Checkpoints:
    """Those of one stage, written by rank 0."""

    def __init__(self, work: str, keep: int) -> None:
        self._url, self._keep = storage.join(work, FOLDER), keep
        self._sender: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failures = 0

    @contextlib.contextmanager
    def newest(self) -> Iterator[tuple[str, Path] | None]:
        """Name and local files of the newest whole checkpoint; None at a fresh start.

        One that is damaged is passed over for an older one. Raises CorruptError where all are: a
        training that was under way never starts again unasked.
        """
        names, damage = _finished(self._url), ""
        for name in reversed(names):
            with contextlib.ExitStack() as stack:
                try:
                    folder = stack.enter_context(self.local(name))
                except CorruptError as error:
                    damage = damage or str(error).split(": delete")[0]
                else:
                    yield name, folder
                    return
        if names:
            raise CorruptError(
                f"{self._url}: none of its {len(names)} checkpoints is whole ({damage}); "
                f"delete it to train from the start"
            )
        yield None

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A folder of this machine with a checkpoint's files. CorruptError when one is damaged."""
        url = storage.join(self._url, name)
        try:
            record = json.loads(storage.read_bytes(storage.join(url, RECORD)))
            files = [FileRecord(**file) for file in record["files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{storage.join(url, RECORD)} is damaged ({error!r})") from error
        if storage.is_local(url):
            storage.verify(url, files)
            yield Path(storage.absolute(url))
            return
        with tempfile.TemporaryDirectory(dir=temporary.root()) as folder:
            for file in files:
                with contextlib.suppress(FileNotFoundError):  # told below, as any damage is
                    data = storage.read_bytes(storage.join(url, file.path))
                    (Path(folder) / file.path).write_bytes(data)
            try:
                storage.verify(folder, files)
            except CorruptError as error:
                raise CorruptError(str(error).replace(folder, url)) from None
            yield Path(folder)

    @property
    def busy(self) -> bool:
        """Whether the last one is still under way."""
        return self._sender is not None and self._sender.is_alive()

    def save(self, folder: Path, images: int) -> None:
        """Send the files of `folder`, which is removed afterwards, without waiting.

        Raises what went wrong with an earlier one; a store that does not answer is borne for a
        while.
        """
        self.wait()
        self._sender = threading.Thread(
            target=self._send, args=(folder, images), name="checkpoint", daemon=True
        )
        self._sender.start()

    def wait(self) -> None:
        """Until the last one has arrived. Raises what `save` would."""
        if self._sender is None:
            return
        self._sender.join()
        self._sender = None
        error, self._error = self._error, None
        if error is None:
            self._failures = 0
            return
        self._failures += 1
        if not isinstance(error, Unreachable) or self._failures > FAILURES_BORNE:
            raise error

    def _send(self, folder: Path, images: int) -> None:
        try:
            self._put(folder, images)
        except BaseException as error:  # told to the training, at its next checkpoint
            self._error = error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _put(self, folder: Path, images: int) -> None:
        url = storage.join(self._url, f"{images:012d}-{secrets.token_hex(3)}")
        try:
            files = storage.upload_dir(str(folder), url)
            record = {"images": images, "files": [vars(file) for file in files]}
            storage.write_bytes(storage.join(url, RECORD), json.dumps(record, indent=1).encode())
        except UserError:
            with contextlib.suppress(UserError):  # a full disk needs the room
                storage.remove_tree(url)
            raise
        for old in _finished(self._url)[: -self._keep]:
            storage.remove_tree(storage.join(self._url, old, RECORD))  # first: no half of it counts
            storage.remove_tree(storage.join(self._url, old))


def _finished(url: str) -> list[str]:
    """Names of the checkpoints that have a record, oldest first."""
    return [n for n in storage.list_dir(url) if storage.exists(storage.join(url, n, RECORD))]
