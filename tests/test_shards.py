"""Shards: the same bytes each time, nothing lost, and no damage that passes for a smaller set."""

import dataclasses
import errno
import gc
import hashlib
import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from infra import shards, staging, storage
from infra.errors import UserError
from infra.shards import ImageArray, load_shards, read_manifest, write_shards
from infra.sources import Source
from infra.storage import CorruptError


def made_source(count: int = 23, side: int = 4, channels: int = 3, seed: int = 0) -> Source:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side, side, channels), np.uint8)
    labels = rng.integers(0, 3, count)

    def samples() -> Iterator[tuple[np.ndarray, int]]:
        yield from zip(images, labels.tolist(), strict=True)

    return Source("made", count, side, side, channels, ("a", "b", "c"), samples)


def pairs(data: ImageArray | Source) -> list[tuple[int, bytes]]:
    """The data as a set with repetitions: sorted (label, pixels)."""
    if isinstance(data, Source):
        return sorted((label, image.tobytes()) for image, label in data.samples())
    return sorted(
        (int(label), image.tobytes()) for image, label in zip(data.images, data.labels, strict=True)
    )


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_shards(made_source(), str(tmp_path / name), num_shards=3, record_images=5)
    one = storage.describe_dir(str(tmp_path / "one"))
    assert one == storage.describe_dir(str(tmp_path / "two"))
    assert [record.path for record in one] == [
        "manifest.json",
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
    ]
    assert sorted(os.listdir(tmp_path / "one")) == [record.path for record in one]


def test_the_bytes_of_a_shard_are_those_of_the_first_release(tmp_path: Path) -> None:
    """A changed hash here means every workspace would shard anew: say so in the change log."""
    images = np.arange(4 * 48, dtype=np.uint8).reshape(4, 4, 4, 3)
    source = dataclasses.replace(
        made_source(4), samples=lambda: iter([(image, i % 3) for i, image in enumerate(images)])
    )
    manifest = write_shards(source, str(tmp_path), num_shards=1)
    assert (
        manifest.shards[0].sha256
        == "da9a39962a86f970ef21ff07fabd3c610fb7adf2eab8dbdc787a9e00d0eb1f0e"
    )
    assert (
        manifest.pixel_digest == "5ad933137d9c7c04ff0d8b1129fdce391568498eeb977ec86c0ea86378a3d318"
    )


@pytest.mark.parametrize("num_shards", [1, 2, 5, 23])
def test_shards_are_balanced_and_lose_nothing(tmp_path: Path, num_shards: int) -> None:
    source = made_source()
    manifest = write_shards(source, str(tmp_path), num_shards=num_shards, record_images=4)
    sizes = [shard.samples for shard in manifest.shards]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == source.count == manifest.count
    loaded = load_shards(str(tmp_path))
    assert pairs(loaded) == pairs(source)
    assert loaded.images.dtype == np.uint8
    assert loaded.labels.dtype == np.int64
    assert loaded.class_names == source.class_names


def test_the_pixel_digest_ignores_the_cut_and_follows_every_pixel_and_label(
    tmp_path: Path,
) -> None:
    source = made_source()
    url = str(tmp_path)
    first = write_shards(source, url, num_shards=2)
    other = write_shards(source, url, num_shards=5, record_images=2, seed=9)
    assert first.pixel_digest == other.pixel_digest
    assert first.sha256 != other.sha256
    # by the definition in the docstring, from the decoded data
    loaded = load_shards(url)
    each = [
        hashlib.sha256(np.int64(label).tobytes() + image.tobytes()).digest()
        for image, label in zip(loaded.images, loaded.labels, strict=True)
    ]
    assert first.pixel_digest == hashlib.sha256(b"4 4 3" + b"".join(sorted(each))).hexdigest()

    def relabelled() -> Iterator[tuple[np.ndarray, int]]:
        for i, (image, label) in enumerate(source.samples()):
            yield image, (label + 1) % 3 if i == 7 else label

    changed = dataclasses.replace(source, samples=relabelled)
    assert write_shards(changed, url, num_shards=2).pixel_digest != first.pixel_digest


def test_the_seed_mixes_classes_over_shards(tmp_path: Path) -> None:
    source = made_source(600, side=1)
    ordered = sorted(source.samples(), key=lambda sample: sample[1])
    source = dataclasses.replace(source, samples=lambda: iter(ordered))
    orders = []
    for seed in (0, 1):
        manifest = write_shards(source, str(tmp_path), num_shards=4, seed=seed)
        loaded = load_shards(str(tmp_path), manifest)
        orders.append(loaded.images.tobytes())
        for part in np.split(loaded.labels, 4):
            assert np.bincount(part, minlength=3).min() > 25  # expected: about 50 of each
    assert orders[0] != orders[1]


def test_any_webdataset_reader_sees_the_same_data(tmp_path: Path) -> None:
    write_shards(made_source(), str(tmp_path), num_shards=3, record_images=5)
    paths = sorted(str(path) for path in tmp_path.glob("*.tar"))
    records = list(wds.WebDataset(paths, shardshuffle=False).decode())
    keys = [record["__key__"] for record in records]
    assert keys == [f"{i:06d}" for i in range(6)]
    assert {len(record["labels.npy"]) for record in records} <= {5, 3, 2}
    loaded = load_shards(str(tmp_path))
    np.testing.assert_array_equal(
        np.concatenate([record["images.npy"] for record in records]), loaded.images
    )
    np.testing.assert_array_equal(
        np.concatenate([record["labels.npy"] for record in records]), loaded.labels
    )


def test_members_carry_no_time_and_no_owner(tmp_path: Path) -> None:
    write_shards(made_source(), str(tmp_path), num_shards=1)
    with tarfile.open(tmp_path / "shard-000000.tar") as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
            assert (member.uname, member.gname, member.mode) == ("", "", 0o644)
            assert not member.pax_headers


def test_a_shard_cut_at_any_512_byte_boundary_is_detected_and_named(tmp_path: Path) -> None:
    manifest = write_shards(made_source(), str(tmp_path), num_shards=2, record_images=4)
    file = tmp_path / "shard-000001.tar"
    whole = file.read_bytes()
    assert len(whole) % 512 == 0
    for end in range(0, len(whole), 512):
        file.write_bytes(whole[:end])
        with pytest.raises(CorruptError, match=r"shard-000001\.tar is truncated"):
            load_shards(str(tmp_path), manifest)
    file.write_bytes(whole + bytes(512))
    with pytest.raises(CorruptError, match=r"shard-000001\.tar is too long"):
        load_shards(str(tmp_path), manifest)
    file.write_bytes(whole)
    load_shards(str(tmp_path), manifest)


def test_one_flipped_bit_anywhere_is_detected_and_named(tmp_path: Path) -> None:
    write_shards(made_source(), str(tmp_path), num_shards=2)
    file = tmp_path / "shard-000000.tar"
    whole = file.read_bytes()
    for place in range(0, len(whole), 397):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CorruptError, match=r"shard-000000\.tar is altered"):
            load_shards(str(tmp_path))


def test_a_missing_shard_and_swapped_shards_are_named(tmp_path: Path) -> None:
    write_shards(made_source(22), str(tmp_path), num_shards=2)
    one, two = (tmp_path / f"shard-00000{i}.tar" for i in range(2))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    with pytest.raises(CorruptError, match=r"shard-000000\.tar is altered"):
        load_shards(str(tmp_path))
    one.write_bytes(kept)
    two.unlink()
    with pytest.raises(CorruptError, match=r"shard-000001\.tar is missing"):
        load_shards(str(tmp_path))


def test_shards_without_a_manifest_are_not_a_data_set(tmp_path: Path) -> None:
    write_shards(made_source(), str(tmp_path), num_shards=1)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"{tmp_path}/manifest.json does not exist"):
        load_shards(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("version", 2, "version 2"),
        ("count", 22, "do not add up"),
        ("count", "23", "positive integers"),
        ("height", -4, "positive integers"),
        ("dtype", "float32", "dtype uint8"),
        ("class_names", [1, 2, 3], "strings"),
        ("shards", [{"name": "x.tar"}], "TypeError"),
        ("surprise", 1, "surprise"),
    ],
)
def test_a_malformed_manifest_is_one_line(
    tmp_path: Path, key: str, value: object, said: str
) -> None:
    write_shards(made_source(), str(tmp_path), num_shards=1)
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CorruptError, match=f"manifest.json is malformed .*{said}"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "null", '{"version": 1}', "\xff"])
def test_a_manifest_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(CorruptError, match=r"manifest\.json is malformed"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a/b.tar", "..", ".x.tar", "pipe:ls"])
def test_a_shard_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    write_shards(made_source(), str(tmp_path), num_shards=1)
    file = tmp_path / "manifest.json"
    fields = json.loads(file.read_text())
    fields["shards"][0]["name"] = name
    file.write_text(json.dumps(fields))
    with pytest.raises(CorruptError, match="not a plain shard name"):
        read_manifest(str(tmp_path))


def test_a_foreign_tar_under_a_matching_manifest_extracts_nothing(tmp_path: Path) -> None:
    manifest = write_shards(made_source(2), str(tmp_path / "set"), num_shards=1)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("../../escaped.images.npy")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    data = stream.getvalue()
    (tmp_path / "set" / "shard-000000.tar").write_bytes(data)
    forged = dataclasses.replace(
        manifest.shards[0], bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )
    with pytest.raises(CorruptError, match=r"shard-000000\.tar is not of our making"):
        load_shards(str(tmp_path / "set"), dataclasses.replace(manifest, shards=(forged,)))
    assert os.listdir(tmp_path) == ["set"]


def test_a_staged_copy_is_mapped_once_per_content_and_read_only(tmp_path: Path) -> None:
    url, cache = str(tmp_path / "set"), str(tmp_path / "cache")
    manifest = write_shards(made_source(), url, num_shards=2)
    in_memory, staged = load_shards(url), load_shards(url, cache_dir=cache)
    assert isinstance(staged.images, np.memmap)
    assert not staged.images.flags.writeable
    np.testing.assert_array_equal(staged.images, in_memory.images)
    np.testing.assert_array_equal(staged.labels, in_memory.labels)
    assert sorted(os.listdir(cache)) == [manifest.sha256, f"{manifest.sha256}.lock", "room.lock"]
    for shard in manifest.shards:  # a second load needs the shards no more
        os.remove(os.path.join(url, shard.name))
    again = load_shards(url, cache_dir=cache)
    np.testing.assert_array_equal(again.images, in_memory.images)
    other = write_shards(made_source(seed=1), url, num_shards=2)
    assert pairs(load_shards(url, cache_dir=cache)) == pairs(made_source(seed=1))
    assert {manifest.sha256, other.sha256} <= set(os.listdir(cache))


def load_together(url: str, cache: str, count: int = 4) -> list[list[tuple[int, bytes]]]:
    """What so many stagers find that begin in the same moment."""
    found: list[list[tuple[int, bytes]]] = []
    together = threading.Barrier(count)

    def load() -> None:
        together.wait(10)
        found.append(pairs(load_shards(url, cache_dir=cache)))

    threads = [threading.Thread(target=load) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_stagers_of_one_machine_wait_for_the_first_and_fetch_each_shard_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, cache = str(tmp_path / "set"), str(tmp_path / "cache")
    write_shards(made_source(), url, num_shards=3)
    fetched: list[str] = []
    plain = storage.read_bytes

    def slowly(file: str) -> bytes:
        if file.endswith(".tar"):
            fetched.append(file[-10:])
            time.sleep(0.05)
        return plain(file)

    monkeypatch.setattr(storage, "read_bytes", slowly)
    assert load_together(url, cache) == [pairs(made_source())] * 4
    assert fetched == ["000000.tar", "000001.tar", "000002.tar"]


def test_without_locks_stagers_race_and_all_find_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, cache = str(tmp_path / "set"), str(tmp_path / "cache")
    manifest = write_shards(made_source(), url, num_shards=2)
    together = threading.Barrier(4)
    plain = shards._read_shard

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def read_together(*args: object) -> object:
        together.wait(10)  # nobody has published before all have begun
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(staging.fcntl, "flock", none)
    monkeypatch.setattr(shards, "_read_shard", read_together)
    assert load_together(url, cache) == [pairs(made_source())] * 4
    assert [name for name in os.listdir(cache) if "lock" not in name] == [manifest.sha256]


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "staged.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_stage_is_thrown_away_and_staged_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, how: str
) -> None:
    url, cache = str(tmp_path / "set"), str(tmp_path / "cache")
    manifest = write_shards(made_source(), url, num_shards=2)
    mapped = load_shards(url, cache_dir=cache)
    staged = Path(cache) / manifest.sha256
    data = (staged / file).read_bytes()
    (staged / "new").write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    os.replace(staged / "new", staged / file)  # what is mapped keeps its bytes
    if how == "cut":
        (staged / file).write_bytes(data[:100])
    if how == "gone":
        (staged / file).unlink()
    assert pairs(load_shards(url, cache_dir=cache)) == pairs(made_source())
    assert pairs(mapped) == pairs(made_source())
    (line,) = caplog.messages
    assert str(staged) in line
    assert "is damaged" in line
    assert (staged / file).read_bytes() == data
    assert sorted(os.listdir(staged)) == ["images.npy", "labels.npy", "staged.json"]


def test_a_damaged_shard_is_never_staged(tmp_path: Path) -> None:
    url, cache = tmp_path / "set", tmp_path / "cache"
    write_shards(made_source(), str(url), num_shards=2)
    file = url / "shard-000001.tar"
    file.write_bytes(file.read_bytes()[:-1024])
    with pytest.raises(CorruptError, match="truncated"):
        load_shards(str(url), cache_dir=str(cache))
    assert [name for name in os.listdir(cache) if not name.endswith("lock")] == []


def test_a_set_in_use_stays_as_long_as_any_view_of_it(tmp_path: Path) -> None:
    url, cache = str(tmp_path / "set"), str(tmp_path / "cache")
    first = write_shards(made_source(), url, num_shards=2)
    view = np.asarray(load_shards(url, cache_dir=cache).images)[3:, ::2]
    gc.collect()
    second = write_shards(made_source(seed=1), url, num_shards=2)
    bound = 7_000  # of the two sets, only one
    with pytest.raises(UserError, match=r"running processes use .* CMFORGE_CACHE_GB"):
        load_shards(url, cache_dir=cache, cache_bytes=bound)
    del view
    gc.collect()
    assert pairs(load_shards(url, cache_dir=cache, cache_bytes=bound)) == pairs(made_source(seed=1))
    kept = os.listdir(cache)
    assert second.sha256 in kept
    assert first.sha256 not in kept


def test_a_full_disk_is_one_line_and_leaves_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(made_source(), str(tmp_path), num_shards=3)  # an older set is in the way
    uploads: list[str] = []
    plain = storage.upload_file

    def fill_up(local_file: str, url: str) -> None:
        if uploads:
            raise OSError(errno.ENOSPC, "No space left on device")
        uploads.append(url)
        plain(local_file, url)

    monkeypatch.setattr(storage, "upload_file", fill_up)
    with pytest.raises(UserError, match=f"disk full: {tmp_path}"):
        write_shards(made_source(seed=1), str(tmp_path), num_shards=3)
    assert uploads
    assert sorted(os.listdir(tmp_path)) == [f"shard-00000{i}.tar" for i in range(3)]


def test_a_source_that_fails_midway_leaves_no_manifest(tmp_path: Path) -> None:
    def breaks() -> Iterator[tuple[np.ndarray, int]]:
        yield np.zeros((4, 4, 3), np.uint8), 0
        raise UserError("data.path: b.png is not a readable image")

    source = dataclasses.replace(made_source(), samples=breaks)
    with pytest.raises(UserError, match=r"b\.png"):
        write_shards(source, str(tmp_path), num_shards=2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("num_shards", "record_images", "key"),
    [(0, 5, "data.num_shards"), (24, 5, "data.num_shards"), (2, 0, "data.record_images")],
)
def test_impossible_cuts_are_refused(
    tmp_path: Path, num_shards: int, record_images: int, key: str
) -> None:
    with pytest.raises(UserError, match=key):
        write_shards(
            made_source(), str(tmp_path), num_shards=num_shards, record_images=record_images
        )


def test_an_fsspec_url_holds_the_same_bytes_as_a_folder(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    storage.remove_tree(url)
    manifest = write_shards(made_source(), url, num_shards=2)
    assert write_shards(made_source(), str(tmp_path / "set"), num_shards=2) == manifest
    assert storage.describe_dir(url) == storage.describe_dir(str(tmp_path / "set"))
    assert read_manifest(url) == manifest
    assert pairs(load_shards(url)) == pairs(made_source())
    storage.remove_tree(storage.join(url, "shard-000001.tar"))
    with pytest.raises(CorruptError, match=r"shard-000001\.tar is missing"):
        load_shards(url)
