"""A committed shard set as arrays, staged once per machine."""

import os
import tempfile

from infra import shards, storage
from infra.errors import UserError


def load(url: str, manifest_sha256: str) -> shards.ImageArray:
    """Images and labels of the shards at `url`, whose manifest must be the recorded one.

    Decoded pixels are kept in $CMFORGE_CACHE, else in a folder of this user's below the system's
    temporary one, keyed by content: at most $CMFORGE_CACHE_GB of them, by default half of the disk.
    Raises CorruptError naming what does not match, UserError where there is no room.
    """
    manifest = shards.read_manifest(url)
    if manifest.sha256 != manifest_sha256:
        raise storage.CorruptError(
            f"{storage.join(url, 'manifest.json')} is altered (its sha256 differs): delete the "
            f"shard step's folder and run again"
        )
    cache = os.environ.get("CMFORGE_CACHE") or _private()
    return shards.load_shards(url, manifest, cache, _bound(os.environ.get("CMFORGE_CACHE_GB", "")))


def _private() -> str:
    """A folder of this user's alone: whoever owns it decides what is trained on."""
    home = os.path.join(tempfile.gettempdir(), f"cmforge-{os.getuid()}")
    with storage.mendable(home, "CMFORGE_CACHE"):
        os.makedirs(home, mode=0o700, exist_ok=True)
        status = os.lstat(home)
    if status.st_uid != os.getuid() or not os.path.isdir(home) or os.path.islink(home):
        raise UserError(f"{home}: belongs to another user; set CMFORGE_CACHE to a folder of yours")
    return os.path.join(home, "shards")


def _bound(text: str) -> int | None:
    """Bytes of so many GB; None for nothing. UserError for what is no size."""
    if not text:
        return None
    try:
        bound = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        bound = 0
    if bound < 1:
        raise UserError(f"CMFORGE_CACHE_GB: {text!r} is no size; give a number of GB above 0")
    return bound
