"""The shard step: what stands for the images in its identity, and data that cannot be used."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra import shards, sources, storage
from infra.errors import UserError
from pipelines.artifacts import ShardSet
from pipelines.recipe import DataConfig
from pipelines.steps import shard
from pipelines.steps.shard import ShardConfig


def content(kind: Any, path: object, **changes: Any) -> str:
    data = DataConfig(source=kind, path=str(path), size=8, **changes)
    return ShardConfig.of(data).content


def run(tmp_path: Path, data: DataConfig) -> ShardSet:
    ctx: Any = SimpleNamespace(out=tmp_path / "out")
    return shard.run(ctx, ShardConfig(data=data, content=""))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CMFORGE_CACHE", str(tmp_path / "cache"))


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / f"{i}.png")


# --- identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "edited"),
    [
        ("npz", ""),
        ("idx", "train-labels-idx1-ubyte.gz"),
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("sheets", "labels.npy"),
        ("sheets", "train_0.webp"),
    ],
)
def test_an_edit_that_keeps_the_size_is_seen_in_array_sources(
    tmp_path: Path, kind: str, edited: str
) -> None:
    files = [edited] if kind in ("npz", "cifar10") else [edited, "train_1.png", "labels.npy"]
    for name in files:
        storage.write_bytes(str(tmp_path / "one" / name).rstrip("/"), b"abc")
    before = content(kind, tmp_path / "one")
    os.rename(tmp_path / "one", tmp_path / "two")
    assert content(kind, tmp_path / "two") == before  # where it lies is not what it is
    os.utime(tmp_path / "two" / edited, (0, 0))
    assert content(kind, tmp_path / "two") == before
    (tmp_path / "two" / edited).write_bytes(b"abd")
    assert content(kind, tmp_path / "two") != before


def test_what_a_source_does_not_read_is_no_part_of_it(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "cat", 2)
    before = content("folder", tmp_path / "images")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    (tmp_path / "images" / ".DS_Store").write_text("nor this")
    assert content("folder", tmp_path / "images") == before
    write_images(tmp_path / "images" / "dog", 1)
    assert content("folder", tmp_path / "images") != before


def test_the_split_and_the_label_file_choose_what_stands_for_the_source(tmp_path: Path) -> None:
    for name in ("train_0.png", "test_0.png", "labels.npy", "fine.npy"):
        (tmp_path / name).write_text(name)
    fine = DataConfig(source="sheets", path=str(tmp_path), labels="fine.npy")
    before = ShardConfig.of(fine).content
    for name, seen in (("test_0.png", False), ("labels.npy", False), ("fine.npy", True)):
        (tmp_path / name).write_text("changed")
        assert (ShardConfig.of(fine).content != before) is seen, name


def test_large_sources_are_known_by_names_and_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.npz").write_bytes(b"abc")
    monkeypatch.setattr(shard, "HASHED", 2)
    monkeypatch.setattr(storage, "sha256", None)  # must not be called
    before = content("npz", tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"abcd")
    assert content("npz", tmp_path / "a.npz") != before


def test_links_that_lead_nowhere_or_in_circles_are_one_line(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "cat", 2)
    link = tmp_path / "images" / "cat" / "2.png"
    link.symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(UserError, match=r"images/cat/2\.png: a link to nothing"):
        content("folder", tmp_path / "images")
    link.unlink()
    link.symlink_to(tmp_path / "images")
    with pytest.raises(UserError, match=r"images/cat/2\.png: a link to a folder around it"):
        content("folder", tmp_path / "images")


# --- labels --------------------------------------------------------------------------------------


def test_labels_name_the_array_of_an_npz(tmp_path: Path) -> None:
    images = np.zeros((6, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.zeros(6, int), kind=np.arange(6) % 3)
    data = DataConfig(source="npz", path=str(tmp_path / "a.npz"), labels="kind", num_shards=1)
    assert run(tmp_path, data).class_names == ("0", "1", "2")


@pytest.mark.parametrize("kind", ["digits", "idx", "folder", "cifar10"])
def test_labels_are_refused_where_the_source_brings_its_own(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"^labels: source {kind} brings its own"):
        DataConfig(source=kind, path=None if kind == "digits" else "x", size=8, labels="y")
    with pytest.raises(ValueError, match=r"^labels: is empty"):
        DataConfig(source="npz", path="x", labels="")


# --- data that cannot be used --------------------------------------------------------------------


def test_fewer_than_four_images_are_refused_by_the_key_to_change(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.limit: 3 images are too few.* at least 4$"):
        run(tmp_path, DataConfig(limit=3, num_shards=1))
    write_images(tmp_path / "images", 3)
    few = DataConfig(source="folder", path=str(tmp_path / "images"), size=8, num_shards=1)
    with pytest.raises(UserError, match=r"^data\.path: .*/images: 3 images are too few"):
        run(tmp_path, few)
    assert run(tmp_path, DataConfig(limit=4, num_shards=1)).count == 4


def test_a_full_cache_disk_names_the_setting_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    data = sources.open_source("digits", None, size=None, fit="crop", limit=8)
    manifest = shards.write_shards(data, str(tmp_path / "shards"), num_shards=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"^disk full: .*/cache/.* choose another CMFORGE_CACHE$"):
        shards.load_shards(str(tmp_path / "shards"), manifest, str(tmp_path / "cache"))
