"""Real images as WebDataset shards under a manifest, and back.

A shard is a plain tar of records: `KEY.images.npy` [n, H, W, C] uint8 and `KEY.labels.npy` [n]
int64, readable by any WebDataset reader. `manifest.json` is written last and says what whole means:
readers check size and sha256 of every shard, since a cut tar reads as a shorter one, with no error.
"""

import hashlib
import io
import json
import math
import os
import re
import tarfile
import tempfile
import threading
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import staging, storage
from infra.errors import UserError
from infra.sources import Source
from infra.storage import CorruptError

VERSION = 1
MANIFEST = "manifest.json"
_HEADERS = 4096  # bytes, more than two .npy headers and the record of a staged copy take
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.tar")


@dataclass(frozen=True)
class Shard:
    """One tar file. `samples` counts images."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class ShardManifest:
    """What a whole data set is.

    `pixel_digest` depends on the decoded images and labels alone, not on their order, the number of
    shards or the tar: sha256 over "H W C" and the sorted sha256 of each (label as little-endian
    int64, then pixels).
    """

    version: int
    count: int
    height: int
    width: int
    channels: int
    dtype: str
    record_images: int
    class_names: tuple[str, ...]
    pixel_digest: str
    source: str
    shards: tuple[Shard, ...]

    @property
    def total_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def sha256(self) -> str:
        """Of manifest.json as written: the identity of this very cut of the data."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()


@dataclass(frozen=True)
class ImageArray:
    """images [N, H, W, C] uint8 (in memory, or a read-only memory map) and labels [N] int64."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


# --- writing -------------------------------------------------------------------------------------


def write_shards(
    source: Source, url: str, *, num_shards: int, record_images: int = 500, seed: int = 0
) -> ShardManifest:
    """Writes `source` as `num_shards` tars and their manifest into the folder `url`.

    The same source and arguments give the same bytes. Images are spread by a seeded permutation,
    and shards differ by at most one image. One pass over the source drops each image into its place
    in a scratch file, which is then cut into tars: memory holds one record, one permutation and 32
    bytes per image, whatever the size of the data. Scratch space: the raw pixels and one shard,
    beside the target when it is local, in the system's temporary folder when it is not.

    UserError when the source is bad, smaller than `num_shards`, or the disk is full.
    """
    if num_shards < 1 or num_shards > source.count:
        raise UserError(
            f"data.num_shards: {num_shards} shards for {source.count} images; "
            f"give 1 to {source.count}"
        )
    if record_images < 1:
        raise UserError(f"data.record_images: {record_images} must be at least 1")
    url = storage.absolute(url)
    # An older manifest would be wrong from the first shard replaced on.
    storage.remove_tree(storage.join(url, MANIFEST))
    beside = url if storage.is_local(url) else None
    place = "--workspace" if beside else "TMPDIR"
    with storage.mendable(beside or tempfile.gettempdir(), place):
        if beside:
            os.makedirs(beside, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=storage.TEMP_PREFIX, dir=beside) as scratch:
            pixels = os.path.join(scratch, "pixels.raw")
            labels, pixel_digest = _scatter(source, pixels, _positions(source.count, seed))
            shards = tuple(_write_tars(source, pixels, labels, url, num_shards, record_images))
    manifest = ShardManifest(
        version=VERSION,
        count=source.count,
        height=source.height,
        width=source.width,
        channels=source.channels,
        dtype="uint8",
        record_images=record_images,
        class_names=source.class_names,
        pixel_digest=pixel_digest,
        source=source.name,
        shards=shards,
    )
    storage.write_bytes(storage.join(url, MANIFEST), manifest.to_json())
    return manifest


def _positions(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation of range(count), from raw PCG64 words: their stream is promised for good."""
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _scatter(
    source: Source, path: str, positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], str]:
    """Writes sample i's pixels at positions[i] of the file; labels in that order, pixel digest."""
    shape = (source.height, source.width, source.channels)
    labels = np.full(source.count, -1, np.int64)
    digests = []
    with open(path, "wb") as file:
        for position, (image, label) in zip(positions.tolist(), source.samples(), strict=True):
            assert image.shape == shape, f"{source.name} gave {image.shape}, promised {shape}"
            assert image.dtype == np.uint8
            data = image.tobytes()
            file.seek(position * len(data))
            file.write(data)
            labels[position] = label
            named = int(label).to_bytes(8, "little", signed=True) + data
            digests.append(hashlib.sha256(named).digest())
    whole = hashlib.sha256(" ".join(map(str, shape)).encode())
    for digest in sorted(digests):
        whole.update(digest)
    return labels, whole.hexdigest()


def _write_tars(
    source: Source,
    pixels: str,
    labels: NDArray[np.int64],
    url: str,
    num_shards: int,
    record_images: int,
) -> Iterator[Shard]:
    """Cuts the scratch file into tars, uploading each before the next is made."""
    from webdataset.writer import TarWriter  # imports torch: seconds

    shape = (source.height, source.width, source.channels)
    record = 0  # keys count on through all shards: no two records share one
    stop = 0
    with open(pixels, "rb") as file:
        for index in range(num_shards):
            start, stop = (
                stop,
                stop + source.count // num_shards + (index < source.count % num_shards),
            )
            name = f"shard-{index:06d}.tar"
            tar = os.path.join(os.path.dirname(pixels), name)
            # An int mtime: a float one makes pax headers, and time.time() another file each run.
            with (
                open(tar, "wb") as stream,
                TarWriter(stream, user="", group="", mode=0o644, mtime=0) as writer,
            ):
                for first in range(start, stop, record_images):
                    last = min(first + record_images, stop)
                    images = np.frombuffer(file.read((last - first) * math.prod(shape)), np.uint8)
                    writer.write(
                        {
                            "__key__": f"{record:06d}",
                            "images.npy": images.reshape(-1, *shape),
                            "labels.npy": labels[first:last],
                        }
                    )
                    record += 1
            shard = Shard(name, os.path.getsize(tar), storage.sha256(tar), stop - start)
            storage.upload_file(tar, storage.join(url, name))
            os.remove(tar)
            yield shard


# --- reading -------------------------------------------------------------------------------------


def read_manifest(url: str) -> ShardManifest:
    """The manifest of the shards in folder `url`. UserError when it is missing or malformed."""
    file = storage.join(storage.absolute(url), MANIFEST)
    try:
        data = storage.read_bytes(file)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: {url} holds no finished shards") from None
    try:
        return _parse_manifest(json.loads(data))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{file} is malformed ({error!r}): delete it and run again") from error


def _parse_manifest(fields: dict[str, Any]) -> ShardManifest:
    if fields["version"] != VERSION:
        raise ValueError(f"version {fields['version']}, this program reads {VERSION}")
    shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
    names = tuple(fields.pop("class_names"))
    manifest = ShardManifest(**fields, shards=shards, class_names=names)
    # Names become paths and numbers become allocations: nothing else may get through.
    for shard in shards:
        if not _SHARD_NAME.fullmatch(shard.name):
            raise ValueError(f"{shard.name!r} is not a plain shard name")
    numbers = (manifest.count, manifest.height, manifest.width, manifest.channels)
    sizes = [n for shard in shards for n in (shard.bytes, shard.samples)]
    if any(type(n) is not int or n < 1 for n in (*numbers, manifest.record_images, *sizes)):
        raise ValueError("counts and sizes must be positive integers")
    if any(type(name) is not str for name in names) or manifest.dtype != "uint8":
        raise ValueError("class names must be strings and dtype uint8")
    if len({shard.name for shard in shards}) != len(shards):
        raise ValueError("a shard is named twice")
    if sum(shard.samples for shard in shards) != manifest.count:
        raise ValueError("the shards' samples do not add up to count")
    return manifest


def load_shards(
    url: str,
    manifest: ShardManifest | None = None,
    cache_dir: str | None = None,
    cache_bytes: int | None = None,
) -> ImageArray:
    """Every image and label, in manifest order.

    Each shard is read whole and held against the manifest before a byte of it is decoded.
    CorruptError names the shard that is missing, truncated or altered. Without `cache_dir` all is
    in memory; with it (a local folder of at most `cache_bytes`, see `infra.staging`) the images are
    staged there once per manifest and mapped read-only, so that processes of one machine share
    them; a staged copy that is damaged is staged again.
    """
    url = storage.absolute(url)
    manifest = manifest or read_manifest(url)
    if cache_dir is None:
        images = np.empty(_shape(manifest), np.uint8)
        labels = np.empty(manifest.count, np.int64)
        start = 0
        for shard in manifest.shards:
            stop = start + shard.samples
            images[start:stop], labels[start:stop] = _read_shard(url, shard, manifest)
            start = stop
        return ImageArray(images, labels, manifest.class_names)
    size = math.prod(_shape(manifest)) + 8 * manifest.count + _HEADERS
    staged = staging.stage(
        storage.absolute(cache_dir),
        manifest.sha256,
        size,
        cache_bytes,
        lambda entry: _stage(url, manifest, entry),
    )
    try:
        images = np.load(f"{staged.folder}/images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(f"{staged.folder}/labels.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorruptError(f"{staged.folder} is damaged ({error}): delete it") from error
    weakref.finalize(images, staged.close)  # views of it keep it alive
    if images.shape != _shape(manifest) or labels.shape != (manifest.count,):
        raise CorruptError(f"{staged.folder} holds {images.shape}: delete it and run again")
    return ImageArray(images, labels, manifest.class_names)


def _stage(url: str, manifest: ShardManifest, entry: staging.NewEntry) -> None:
    labels = []
    # Written as a stream: a full disk is an error here, under a memory map it is a SIGBUS.
    with entry.create("images.npy") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": _shape(manifest)}
        np.lib.format.write_array_header_1_0(file, header)
        for shard in manifest.shards:
            images, own = _read_shard(url, shard, manifest)
            file.write(images.data)
            labels.append(own)
    with entry.create("labels.npy") as file:
        np.save(file, np.concatenate(labels), allow_pickle=False)


def _shape(manifest: ShardManifest) -> tuple[int, int, int, int]:
    return (manifest.count, manifest.height, manifest.width, manifest.channels)


def _read_shard(
    url: str, shard: Shard, manifest: ShardManifest
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One shard's images and labels. CorruptError names it."""
    file = storage.join(url, shard.name)
    mend = f"delete {url} and run again"
    try:
        data = storage.read_bytes(file)
    except FileNotFoundError:
        raise CorruptError(f"shard {file} is missing: {mend}") from None
    if len(data) != shard.bytes:
        what = "truncated" if len(data) < shard.bytes else "too long"
        raise CorruptError(f"shard {file} is {what}: {len(data)} of {shard.bytes} bytes: {mend}")
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise CorruptError(f"shard {file} is altered (its sha256 differs): {mend}")
    try:
        images, labels = _decode(data, shard.name)
    except (tarfile.TarError, ValueError, KeyError, EOFError) as error:
        raise CorruptError(f"shard {file} is not of our making ({error!r}): {mend}") from error
    expected = (shard.samples, *_shape(manifest)[1:])
    if images.shape != expected or images.dtype != np.uint8 or labels.shape != expected[:1]:
        raise CorruptError(f"shard {file} holds {images.shape}, not {expected}: {mend}")
    if labels.min() < 0 or labels.max() >= len(manifest.class_names):
        raise CorruptError(f"shard {file} has labels outside the classes: {mend}")
    return images, labels.astype(np.int64)


# The header of an array is a Python literal, and CPython 3.11's parser counts its depth for all
# threads together: two at once end in a SystemError now and then.
_PARSING = threading.Lock()


def _decode(data: bytes, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Tar bytes to arrays. Member names are only keys: nothing is extracted to disk."""
    from webdataset.tariterators import group_by_keys, tar_file_expander  # imports torch: seconds

    records = list(group_by_keys(tar_file_expander([{"url": name, "stream": io.BytesIO(data)}])))
    with _PARSING:
        images, labels = (
            np.concatenate([np.load(io.BytesIO(r[part]), allow_pickle=False) for r in records])
            for part in ("images.npy", "labels.npy")
        )
    return images, labels
