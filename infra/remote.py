"""Objects behind fsspec: each request tried until the deadline, each object whole or absent.

S3 is spoken to request by request, so that a broken one costs a block and not the object, and
nothing but a completed upload is ever published. Other stores go through fsspec's own methods.
"""

import contextlib
import errno
import math
import mimetypes
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from infra import retries
from infra.errors import Unreachable, UserError

T = TypeVar("T")

BLOCK = 8 << 20  # bytes per ranged read
PART = 16 << 20  # bytes per part of an upload; whatever is smaller goes up in one request
_MOST_PARTS = 10_000  # S3's limit
_AT_ONCE = 4  # blocks or parts under way; each of them is in memory
_ROUNDS = 3  # readings of an object that is replaced meanwhile
SETTLE = 0.5  # seconds until every writer that saw no object has written, where none is refused

_S3 = {"s3", "s3a"}
# Stores whose client caches listings: another process's new files would stay unseen.
_LISTING_CACHES = _S3 | {"gs", "gcs", "abfs", "abfss", "az"}

# `key:secret@` before a bucket (a secret may hold slashes), not a port and not an ARN's colons.
_USER_INFO = re.compile(r"^([a-z0-9.+-]+://)(?!arn:)[^/@:]*:(?!\d+(?:/|$))[^@]*@", re.IGNORECASE)
_QUERY_SECRET = re.compile(
    r"[?&](?:(?:aws_)?(?:secret_)?access_key(?:_id)?|(?:aws_)?session_token|account_key|key|"
    r"password|sas_token|secret|secret_key|token)=",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Place:
    """A URL, the file system that serves it, and the path within that."""

    url: str
    fs: Any
    path: str
    s3: bool

    @property
    def object(self) -> dict[str, str]:
        """Bucket and key, as S3's requests want them."""
        bucket, key, _ = self.fs.split_path(self.path)
        return {"Bucket": bucket, "Key": key}


def refuse_secrets(url: str) -> None:
    """UserError, without the secret, for a URL that carries one."""
    bare = _USER_INFO.sub(r"\1", url)
    if bare == url and not _QUERY_SECRET.search(url):
        return
    raise UserError(
        f"{bare.split('?')[0]}: credentials in a URL are refused; give them by AWS_ACCESS_KEY_ID "
        f"and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the machine's role"
    )


def place(url: str) -> Place:
    """Built per call and never kept: fsspec caches one per process, so that forks get their own."""
    import fsspec

    protocol = url.split("://", 1)[0]
    options: dict[str, Any] = {}
    if protocol in _LISTING_CACHES:
        options["use_listings_cache"] = False
    if protocol in _S3:
        # One try each in botocore and s3fs: between them they would make 25, past any deadline.
        limit = retries.deadline()
        options["config_kwargs"] = {
            "connect_timeout": min(5.0, limit / 4),
            "read_timeout": min(15.0, limit / 4),
            "retries": {"total_max_attempts": 1},
        }
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ValueError as error:
        raise UserError(f"{url}: {error}; give a path or an fsspec URL") from error
    except ImportError as error:
        raise UserError(f"{url}: {error}; install the package for {protocol}://") from error
    if protocol in _S3:
        fs.retries = 1
        _ = fs.s3  # made here, where no deadline runs yet
    return Place(url, fs, path.rstrip("/"), protocol in _S3)


def ask(at: Place, method: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """One method of the place's file system, tried until the deadline.

    It may make many requests (a listing does), so only its silences are bounded, not its length.
    """
    return retries.persist(at.url, lambda left: method(*arguments, **options))


def info(at: Place) -> dict[str, Any]:
    """fsspec's entry of a file or folder. FileNotFoundError when it is not there."""
    return cast(dict[str, Any], ask(at, at.fs.info, at.path))


def files(at: Place) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path relative to a folder, fsspec's entry) of every file below it; none when missing."""
    found: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):  # not even the bucket is there
        found = ask(at, at.fs.find, at.path, detail=True)
    for name, entry in found.items():
        if name.startswith(at.path + "/") and name != at.path + "/":
            yield name[len(at.path) + 1 :], entry


def read_bytes(at: Place) -> bytes:
    """The whole object. FileNotFoundError when it is not there."""
    blocks: list[bytes] = read(at, list, lambda before, block: before.append(block))
    return b"".join(blocks)


def read(at: Place, begin: Callable[[], T], feed: Callable[[T, bytes], object]) -> T:
    """Feeds the object's blocks in order to what `begin()` makes, and returns that.

    The blocks are of one version of the object: when it is replaced meanwhile, all begins anew.
    FileNotFoundError when it is not there.
    """
    for _ in range(_ROUNDS):
        fed = begin()
        if _feed_blocks(at, partial(feed, fed)):
            return fed
    raise UserError(f"{at.url}: replaced again and again while it was read; run again")


def _feed_blocks(at: Place, feed: Callable[[bytes], object]) -> bool:
    """False when a block was missing, short or of another version than the first."""
    block, total, version = _block(at, 0)
    feed(block)
    if len(block) == total:
        return True
    starts = range(len(block), total, BLOCK)
    if len(block) != BLOCK:
        return False
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for i in range(0, len(starts), _AT_ONCE):
            batch = starts[i : i + _AT_ONCE]
            for start, found in zip(batch, pool.map(lambda s: _block(at, s), batch), strict=True):
                block, size, other = found
                if (size, other) != (total, version) or len(block) != min(BLOCK, total - start):
                    return False
                feed(block)
    return True


def _block(at: Place, start: int) -> tuple[bytes, int, object]:
    """(bytes from `start` on, bytes of the whole object, its version)."""
    if at.s3:
        from fsspec.asyn import sync

        got = retries.persist(
            at.url, lambda left: sync(at.fs.loop, _ranged_get, at, start, timeout=left)
        )
        return cast(tuple[bytes, int, object], got)
    entry = info(at)
    total, version = entry.get("size"), [entry.get(key) for key in ("ETag", "etag", "mtime")]
    if total is None:  # a web server that does not say
        data = ask(at, at.fs.cat_file, at.path)
        return data, len(data), None
    data = ask(at, at.fs.cat_file, at.path, start=start, end=min(start + BLOCK, total))
    return data, total, version


async def _ranged_get(at: Place, start: int) -> tuple[bytes, int, object]:
    try:
        answer = await at.fs._call_s3(
            "get_object", **at.object, Range=f"bytes={start}-{start + BLOCK - 1}"
        )
    except OSError as error:
        if retries.answer(error)[0] != 416:
            raise
        # No such bytes: it is empty, or was replaced by a shorter one, which version and size say.
        head = await at.fs._call_s3("head_object", **at.object)
        return b"", head["ContentLength"], head.get("ETag")
    body = answer["Body"]
    try:
        data = await body.read()
    finally:
        body.close()
    total = answer.get("ContentRange", "").rpartition("/")[2]
    return data, int(total) if total.isdigit() else len(data), answer.get("ETag")


def write(at: Place, data: bytes) -> None:
    """Writes or replaces the object in one step."""
    if at.s3:
        _upload(at, len(data), lambda start, stop: data[start:stop])
    else:
        ask(at, at.fs.pipe_file, at.path, data)


def upload(at: Place, local_file: str) -> None:
    """Writes or replaces the object with a file's bytes, in one step."""
    if not at.s3:
        ask(at, at.fs.put_file, local_file, at.path)
        return
    with open(local_file, "rb") as file:
        number = file.fileno()
        size = os.fstat(number).st_size
        _upload(at, size, lambda start, stop: os.pread(number, stop - start, start))


def _upload(at: Place, size: int, cut: Callable[[int, int], bytes]) -> None:
    """One request, or parts that become the object only when the last one has arrived."""
    kind = mimetypes.guess_type(at.path)[0]  # a browser shows a report, and saves other files
    typed = {"ContentType": kind} if kind else {}
    if size <= PART:
        _s3(at, "put_object", Body=cut(0, size), **typed)
        return
    length = max(PART, math.ceil(size / _MOST_PARTS))
    starts = range(0, size, length)
    upload = {"UploadId": _s3(at, "create_multipart_upload", **typed)["UploadId"]}

    def send(number: int) -> dict[str, Any]:
        start = starts[number - 1]
        body = cut(start, min(start + length, size))
        sent = _s3(at, "upload_part", PartNumber=number, Body=body, **upload)
        return {"PartNumber": number, "ETag": sent["ETag"]}

    try:
        pool = ThreadPoolExecutor(_AT_ONCE)
        try:
            parts = list(pool.map(send, range(1, len(starts) + 1)))
        finally:  # parts still on their way would survive the abort
            pool.shutdown(cancel_futures=True)
        _complete(at, upload, parts, size)
    except BaseException:
        with contextlib.suppress(Exception):  # a store that is gone keeps it, for `stale` to find
            at.fs.call_s3("abort_multipart_upload", timeout=_last_words(), **at.object, **upload)
        raise


def _complete(at: Place, upload: dict[str, str], parts: list[dict[str, Any]], size: int) -> None:
    try:
        _s3(at, "complete_multipart_upload", MultipartUpload={"Parts": parts}, **upload)
    except FileNotFoundError as error:
        # Where the answer to a first try was lost, the upload is gone because it is the object.
        with contextlib.suppress(FileNotFoundError):
            head = _s3(at, "head_object")
            if head["ContentLength"] == size and head["ETag"].strip('"').endswith(f"-{len(parts)}"):
                return
        raise Unreachable(
            f"{at.url}: the store dropped the upload before its last part (aborted elsewhere?) "
            f"after {len(parts)} parts; run again"
        ) from error


def _last_words() -> float:
    return min(5.0, retries.deadline() / 2)


def _s3(at: Place, method: str, **options: Any) -> Any:
    """One request to S3, tried until the deadline, with all its tries within it."""
    return retries.persist(
        at.url, lambda left: at.fs.call_s3(method, timeout=left, **at.object, **options)
    )


def create(at: Place, data: bytes) -> bool:
    """A conditional write: False when the store refused it because the object is there.

    A refusal is ours when an earlier try of this very call had arrived unanswered.
    """
    tries = 0

    def attempt(left: float) -> bool:
        nonlocal tries
        tries += 1
        try:
            if at.s3:
                at.fs.call_s3("put_object", timeout=left, Body=data, IfNoneMatch="*", **at.object)
            else:
                at.fs.pipe_file(at.path, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # Ceph's answer to a lost race reaches us as errno 22, the same as a bad request.
            status = retries.answer(error)[0]
            if status == 412:
                return False
            if status is None and error.errno == errno.EINVAL and at.fs.exists(at.path):
                return False
            raise
        return True

    return retries.persist(at.url, attempt) or (tries > 1 and holds(at, data))


def put_if_absent(at: Place, data: bytes) -> bool:
    """Writes the object unless it exists; True for the one whose bytes then stand there.

    A store that honours the condition refuses our second, equal write: then the first one was
    exclusive. One that does not takes it, and the bytes found once all have written decide.
    """
    with contextlib.suppress(FileNotFoundError):
        info(at)
        return False
    if not create(at, data):
        return False
    if at.s3 and create(at, data):
        time.sleep(SETTLE)
    return holds(at, data)


def holds(at: Place, data: bytes) -> bool:
    """Whether the object has exactly these bytes."""
    try:
        return read_bytes(at) == data
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was begun and neither completed nor aborted."""

    url: str
    id: str
    began: float  # seconds since the epoch


def unfinished(at: Place) -> Iterator[Upload]:
    """Every unfinished upload below a folder; none where the store is not S3."""
    if not at.s3:
        return
    bucket, prefix = at.object["Bucket"], at.object["Key"]
    where: dict[str, str] = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
    protocol = at.url.split("://", 1)[0]
    while True:
        page = ask(at, at.fs.call_s3, "list_multipart_uploads", **where)
        for one in page.get("Uploads", []):
            url = f"{protocol}://{bucket}/{one['Key']}"
            yield Upload(url, one["UploadId"], one["Initiated"].timestamp())
        if not page.get("IsTruncated"):
            return
        where["KeyMarker"] = page["NextKeyMarker"]
        where["UploadIdMarker"] = page["NextUploadIdMarker"]


def abort(at: Place, upload_id: str) -> None:
    """Drops an unfinished upload and its parts; nothing to do when it is gone."""
    with contextlib.suppress(FileNotFoundError):
        _s3(at, "abort_multipart_upload", UploadId=upload_id)
