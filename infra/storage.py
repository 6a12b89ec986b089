"""Files and objects behind one small set of functions: local paths and any fsspec URL.

A write is either whole or not there: local files are written beside their target, synced and
renamed; objects appear with their last byte. Names starting with `.tmp-` are unfinished and unseen.
Requests to a store are tried until a deadline; past it they raise `infra.errors.Unreachable`.
"""

import errno
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import unquote

from infra import remote
from infra.errors import UserError

TEMP_PREFIX = ".tmp-"

_MENDS = {
    errno.ENOSPC: ("disk full", "free space or choose another {place}"),
    errno.EDQUOT: ("disk quota exceeded", "free space or choose another {place}"),
    errno.EROFS: ("read-only file system", "choose a writable {place}"),
    errno.EACCES: ("permission denied", "mend its owner or mode, or choose another place"),
    errno.EPERM: ("operation not permitted", "mend its owner or mode, or choose another place"),
    errno.EEXIST: ("a file stands where a folder is needed", "move it or choose another place"),
    errno.ENOTDIR: ("a file stands where a folder is needed", "move it or choose another place"),
    errno.EISDIR: ("a folder stands where a file is needed", "move it or choose another place"),
}


class CorruptError(UserError):
    """A file is missing, cut short or altered against its record."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a directory: path relative to it, with forward slashes."""

    path: str
    bytes: int
    sha256: str


def user_error_from(error: OSError, url: str, place: str = "--workspace") -> UserError | None:
    """The one line for an OSError the user can mend, else None; `place`: the setting to change."""
    code = errno.EACCES if isinstance(error, PermissionError) and not error.errno else error.errno
    if code not in _MENDS:
        return None
    what, mend = _MENDS[code]
    return UserError(f"{what}: {url}: {mend.format(place=place)}")


@contextmanager
def mendable(url: str, place: str = "--workspace") -> Iterator[None]:
    """Turns a full disk, a missing permission and their like into UserError; others pass."""
    try:
        yield
    except OSError as error:
        known = user_error_from(error, url, place)
        if known is None:
            raise
        raise known from error
    except Exception as error:
        # s3fs lets these through as they are: no credentials, no such host, no connection.
        botocore = sys.modules.get("botocore.exceptions")
        if botocore is None or not isinstance(error, botocore.BotoCoreError):
            raise
        raise UserError(
            f"{url}: {str(error).splitlines()[0]}; check the AWS credentials (AWS_ACCESS_KEY_ID or "
            f"AWS_PROFILE), AWS_ENDPOINT_URL and the network"
        ) from error


@contextmanager
def _writing(url: str) -> Iterator[None]:
    """`mendable` for writes to an object store, where only the bucket itself can be missing."""
    with mendable(url):
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(f"{url}: {error}; create the bucket or mend the URL") from error


def is_local(url: str) -> bool:
    """Plain paths and file:// URLs. UserError for pipes, chained URLs and secrets in a URL."""
    if url.startswith(("pipe:", "shell:")) or "::" in url:
        raise UserError(f"{url}: pipes and chained URLs are refused; give a path or a plain URL")
    if "://" not in url or url.startswith("file://"):
        return True
    remote.refuse_secrets(url)
    return False


def absolute(url: str) -> str:
    """A local path made absolute (~ expanded); other URLs as they are."""
    if not is_local(url):
        return url
    path = unquote(url[len("file://") :]) if url.startswith("file://") else url
    return os.path.abspath(os.path.expanduser(path))


def join(url: str, *parts: str) -> str:
    """`url/part/part`, for paths and URLs alike."""
    base = url if url.endswith("/") else url + "/"
    return base + "/".join(parts) if parts else url


def read_bytes(url: str) -> bytes:
    """The whole file. FileNotFoundError when it is not there."""
    with mendable(url):
        if is_local(url):
            with open(absolute(url), "rb") as file:
                return file.read()
        return remote.read_bytes(remote.place(url))


def write_bytes(url: str, data: bytes) -> None:
    """Writes or replaces the file in one step."""
    if not is_local(url):
        with _writing(url):
            remote.write(remote.place(url), data)
        return
    with mendable(url):
        target = absolute(url)
        temp = _write_temp(target, data)
        os.replace(temp, target)
        _sync_folder(target)


def put_if_absent(url: str, data: bytes) -> bool:
    """Writes the file unless it exists; True for the one caller whose bytes stand there.

    Exclusive on local disks and on stores that honour `If-None-Match: *`. Where a store ignores
    it the last of those who saw no file wins; one that comes later than SETTLE may win as well.
    """
    if is_local(url):
        return _link_if_absent(absolute(url), data)
    with _writing(url):
        return remote.put_if_absent(remote.place(url), data)


def conditional_put(url: str) -> bool:
    """Whether exactly one of several exclusive writes of one new file in a folder succeeds."""
    probe = join(url, f"{TEMP_PREFIX}{secrets.token_hex(6)}")

    def create(i: int) -> bool:
        if is_local(probe):
            return _link_if_absent(absolute(probe), bytes([i]))
        with _writing(probe):
            return remote.create(remote.place(probe), bytes([i]))

    try:
        with ThreadPoolExecutor(4) as pool:
            return sum(pool.map(create, range(4))) == 1
    finally:
        remove_tree(probe)


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    with mendable(url):
        if is_local(url):
            return os.path.exists(absolute(url))
        try:
            remote.info(remote.place(url))
        except FileNotFoundError:
            return False
        return True


def list_dir(url: str) -> list[str]:
    """Sorted names of files and folders in a folder; empty when it is missing."""
    with mendable(url):
        try:
            if is_local(url):
                names = os.listdir(absolute(url))
            else:
                at = remote.place(url)
                listed = remote.ask(at, at.fs.ls, at.path, detail=False)
                found = [entry.rstrip("/") for entry in listed]
                names = [entry.rsplit("/", 1)[-1] for entry in found if entry != at.path]
        except FileNotFoundError:
            return []
    return sorted(name for name in names if not name.startswith(TEMP_PREFIX))


def list_files(url: str) -> list[tuple[str, int]]:
    """(relative path, bytes) of every file below a folder, sorted; empty when it is missing.

    Links are followed. UserError for one that leads nowhere, or back to a folder above it.
    """
    with mendable(url):
        if is_local(url):
            found = _walk(absolute(url))
        else:
            files = remote.files(remote.place(url))
            found = ((path, int(entry["size"])) for path, entry in files)
        return sorted(
            (path, size)
            for path, size in found
            if not any(part.startswith(TEMP_PREFIX) for part in path.split("/"))
        )


def size(url: str) -> int:
    """Bytes of one file. FileNotFoundError when it is not there."""
    with mendable(url):
        if is_local(url):
            return os.path.getsize(absolute(url))
        return int(remote.info(remote.place(url))["size"])


def sha256(url: str) -> str:
    """Hex digest of one file's bytes, read in blocks."""
    with mendable(url):
        if is_local(url):
            with open(absolute(url), "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        place = remote.place(url)
        return remote.read(place, hashlib.sha256, lambda d, block: d.update(block)).hexdigest()


def download_file(url: str, local_file: str) -> None:
    """A copy of one file here, block by block. FileNotFoundError when it is not there."""

    def begin() -> BinaryIO:
        file.seek(0)
        file.truncate()
        return file

    with mendable(url), open(local_file, "wb") as file:
        if is_local(url):
            with open(absolute(url), "rb") as source:
                shutil.copyfileobj(source, file)
        else:
            remote.read(remote.place(url), begin, lambda target, block: target.write(block))


def remove_tree(url: str) -> None:
    """Removes a file or a folder with all below it; nothing to do when it is missing."""
    with mendable(url):
        try:
            if not is_local(url):
                at = remote.place(url)
                remote.ask(at, at.fs.rm, at.path, recursive=True)
            elif os.path.isdir(path := absolute(url)) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.remove(path)
        except FileNotFoundError:
            pass


def upload_file(local_file: str, url: str) -> None:
    """Publishes a finished local file; on local disks a hard link where possible, else a copy.

    The link shares its bytes with `local_file`, which must not be written to afterwards.
    """
    if not is_local(url):
        with _writing(url):
            remote.upload(remote.place(url), local_file)
            there, here = size(url), os.path.getsize(local_file)
        if there != here:
            raise CorruptError(f"{url} has {there} bytes after an upload of {here}: run again")
        return
    with mendable(url):
        target = absolute(url)
        if os.path.exists(target) and os.path.samefile(local_file, target):
            return
        temp = _temp_beside(target)
        try:
            try:
                os.link(os.path.realpath(local_file), temp)
            except OSError:  # another device, or a file system without links
                shutil.copyfile(local_file, temp)
            _sync(temp)
            os.replace(temp, target)
        except BaseException:
            with suppress(OSError):
                os.remove(temp)
            raise
        _sync_folder(target)


def upload_dir(local_dir: str, url: str) -> list[FileRecord]:
    """Publishes every file below `local_dir` and returns their records, sorted by path."""
    records = describe_dir(local_dir)
    for record in records:
        upload_file(os.path.join(local_dir, record.path), join(url, record.path))
    return records


def describe_dir(url: str) -> list[FileRecord]:
    """Path, size and sha256 of every file below a folder, sorted by path."""
    return [FileRecord(path, bytes, sha256(join(url, path))) for path, bytes in list_files(url)]


def verify(url: str, records: Iterable[FileRecord]) -> None:
    """CorruptError naming the first file that is missing, of the wrong size or altered."""
    for record in records:
        target = join(url, record.path)
        mend = f"delete {url} and run again"
        try:
            found = size(target)
        except FileNotFoundError:
            raise CorruptError(f"{target} is missing: {mend}") from None
        if found != record.bytes:
            raise CorruptError(f"{target} has {found} bytes, not {record.bytes}: {mend}")
        if sha256(target) != record.sha256:
            raise CorruptError(f"{target} is altered (its sha256 differs): {mend}")


def _walk(root: str) -> Iterator[tuple[str, int]]:
    """Follows links: data sets are often assembled from linked class folders."""
    if not os.path.isdir(root):
        return
    # A folder's path below root, its real path, and the real folders that links led away from.
    waiting: list[tuple[str, str, tuple[str, ...]]] = [("", os.path.realpath(root), ())]
    while waiting:
        above, real, left = waiting.pop()
        for entry in list(os.scandir(os.path.join(root, above))):
            path, linked = os.path.join(above, entry.name), entry.is_symlink()
            try:
                status = entry.stat()
            except OSError as error:
                if not linked:
                    raise
                raise UserError(f"{entry.path}: a link to nothing; mend or remove it") from error
            if not stat.S_ISDIR(status.st_mode):
                yield path, status.st_size
            elif not linked:
                waiting.append((path, os.path.join(real, entry.name), left))
            else:
                target = os.path.realpath(entry.path)
                if any(os.path.commonpath([target, one]) == target for one in (real, *left)):
                    raise UserError(f"{entry.path}: a link to a folder around it; remove it")
                waiting.append((path, target, (*left, real)))


def _temp_beside(target: str) -> str:
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, f"{TEMP_PREFIX}{os.getpid()}-{secrets.token_hex(6)}")


def _write_temp(target: str, data: bytes) -> str:
    temp = _temp_beside(target)
    try:
        with open(temp, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            os.remove(temp)
        raise
    return temp


def _link_if_absent(target: str, data: bytes) -> bool:
    """A hard link fails when its name is taken: exclusive, and whole from the first instant."""
    with mendable(target):
        temp = _write_temp(target, data)
        try:
            os.link(temp, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP):
                raise UserError(
                    f"{target}: this file system has no hard links; choose another --workspace"
                ) from error
            raise
        finally:
            os.remove(temp)
        _sync_folder(target)
        return True


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(target: str) -> None:
    with suppress(OSError):  # some network file systems refuse to sync a folder
        _sync(os.path.dirname(target))
