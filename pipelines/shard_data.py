"""A committed shard set as arrays, staged once per machine."""

import os
import tempfile

from infra import shards, storage


def load(url: str, manifest_sha256: str) -> shards.ImageArray:
    """Images and labels of the shards at `url`, whose manifest must be the recorded one.

    Decoded pixels are kept in $CMFORGE_CACHE, else in a folder of this user's below the system's
    temporary one, keyed by content. Raises CorruptError naming what does not match.
    """
    manifest = shards.read_manifest(url)
    if manifest.sha256 != manifest_sha256:
        raise storage.CorruptError(
            f"{storage.join(url, 'manifest.json')} is altered (its sha256 differs): delete the "
            f"shard step's folder and run again"
        )
    private = os.path.join(tempfile.gettempdir(), f"cmforge-{os.getuid()}", "shards")
    return shards.load_shards(url, manifest, os.environ.get("CMFORGE_CACHE", private))
