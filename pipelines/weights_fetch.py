"""`cmforge weights fetch` and `import`: weights into cmforge's cache, whole or not at all."""

import contextlib
import hashlib
import http.client
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from consistency.evaluation.specs import SPECS, ExtractorSpec
from infra import storage
from infra.errors import UserError
from pipelines.weights import (
    as_option,
    cache_folder,
    checked,
    expected,
    locate,
    names,
    sha256_of,
    spec_of,
)

BLOCK = 1 << 20  # bytes
PATIENCE = 30.0  # seconds without a byte


def fetch(name: str) -> Path:
    """Downloads a network's weights into the cache, unless they are at hand; returns the file.

    Raises UserError when they are not published, cannot be reached, or are not what they should be.
    """
    spec = spec_of(name)
    if spec.url is None:
        raise UserError(
            f"{name}: nobody publishes this file; with one at hand: cmforge weights import PATH "
            f"--as {name}"
        )
    target = cache_folder() / spec.file
    found = locate(name)
    if found is not None:
        with contextlib.suppress(UserError):
            checked(spec, found)
            return found
        if found != target:
            checked(spec, found)  # it would be found before the one fetched
    print(f"{spec.url} -> {target} ({expected(spec)})", file=sys.stderr)
    with _whole(target) as file:
        digest, size = hashlib.sha256(), 0
        for block in _download(spec):
            file.write(block)
            digest.update(block)
            size += len(block)
        if spec.sha256 not in (None, digest.hexdigest()) or spec.bytes not in (None, size):
            raise UserError(
                f"{spec.url}: not the weights of {name}: {size:,} bytes, sha256 "
                f"{digest.hexdigest()}, expected {expected(spec)}; {_elsewhere(spec)}"
            )
    return target


def take(path: Path, name: str | None) -> Path:
    """Copies a file of weights into the cache; returns the copy.

    The hash tells whose they are; `name` says so for networks without a pinned one. UserError when
    neither does, or both and they disagree.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the file of weights itself")
    spec = _owner(path, name)
    target = cache_folder() / (path.name if path.name in names(spec) else spec.file)
    if target.exists() and target.samefile(path):
        return target
    with storage.mendable(str(path), "file"), open(path, "rb") as source, _whole(target) as file:
        while block := source.read(BLOCK):
            file.write(block)
    for other in names(spec):  # the file imported last is the one in use
        if other != target.name:
            (cache_folder() / other).unlink(missing_ok=True)
    return target


def _owner(path: Path, name: str | None) -> ExtractorSpec:
    with storage.mendable(str(path), "file"):
        size, digest = path.stat().st_size, sha256_of(path)
    by_hash = next((spec for spec in SPECS.values() if spec.sha256 == digest), None)
    said = None if name is None else spec_of(name)
    if by_hash is not None and said in (None, by_hash):
        return by_hash
    has = f"{path}: {size:,} bytes, sha256 {digest}"
    if by_hash is not None:
        raise UserError(f"{has}: these are the weights of {by_hash.name}; leave out --as {name}")
    if said is None:
        pinned = ", ".join(f"{s.name} {expected(s)}" for s in SPECS.values() if s.sha256)
        unpinned = ", ".join(s.name for s in SPECS.values() if s.sha256 is None)
        raise UserError(
            f"{has}: no network of a pinned hash ({pinned}); if it is one of {unpinned}, say so: "
            f"--as NAME"
        )
    if said.sha256 is not None:
        raise UserError(f"{has}: not the weights of {name}, expected {expected(said)}; refused")
    return said


def _download(spec: ExtractorSpec) -> Iterator[bytes]:
    """The bytes at spec.url, with a progress line on a terminal; every failure one UserError."""
    assert spec.url is not None
    request = urllib.request.Request(spec.url, headers={"User-Agent": "cmforge"})
    received = 0
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            if response.headers.get_content_type() == "text/html":
                raise UserError(f"{spec.url}: a web page came, not a file; {_elsewhere(spec)}")
            length = response.headers.get("Content-Length")
            total = spec.bytes if length is None else int(length)
            while block := response.read(BLOCK):
                received += len(block)
                if total is not None and received > total:
                    break  # it might never end
                yield block
                _show(received, total)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(
            f"{spec.url}: {_one_line(reason)} (after {received:,} bytes); {_elsewhere(spec)}"
        ) from error
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)
    if total is not None and received != total:
        raise UserError(
            f"{spec.url}: {received:,} bytes came instead of {total:,}; try again, or "
            f"{_elsewhere(spec)}"
        )


def _show(received: int, total: int | None) -> None:
    if sys.stderr.isatty():
        of = "" if total is None else f" of {total / 2**20:.0f}"
        print(f"\r{received / 2**20:.0f}{of} MiB", end="", file=sys.stderr, flush=True)


def _elsewhere(spec: ExtractorSpec) -> str:
    return (
        f"fetch it where the network allows, then here: cmforge weights import "
        f"PATH{as_option(spec)} (https_proxy and SSL_CERT_FILE are honoured)"
    )


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[BinaryIO]:
    """A file that gets its name only when all of it is written, checked and on the disk."""
    with storage.mendable(str(target), "folder by XDG_CACHE_HOME"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temp = target.with_name(f"{storage.TEMP_PREFIX}{os.getpid()}-{secrets.token_hex(6)}")
        try:
            with open(temp, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, target)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
