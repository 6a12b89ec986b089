"""Checkpoints through crashes, damage and a store that is away: whole, or passed over."""

import json
import threading
from pathlib import Path

import pytest

from infra import storage
from infra.errors import Unreachable, UserError
from infra.storage import CorruptError
from pipelines import checkpoints
from pipelines.checkpoints import Checkpoints


@pytest.fixture(params=["local", "remote"])
def work(request, tmp_path):
    url = "memory://checkpoints-test/work" if request.param == "remote" else str(tmp_path / "work")
    yield url
    storage.remove_tree(url)


def made(tmp_path: Path, images: int) -> Path:
    folder = tmp_path / f"made-{images}"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"images": images}))
    (folder / "state.safetensors").write_bytes(bytes([images % 256]) * 1000)
    return folder


def save(kept: Checkpoints, tmp_path: Path, *images: int) -> None:
    for each in images:
        kept.save(made(tmp_path, each), each)
        kept.wait()


def newest(work: str) -> int | None:
    """Images of what a training that begins now goes on from."""
    with Checkpoints(work, 2).newest() as found:
        if found is None:
            return None
        name, folder = found
        state = json.loads((folder / "state.json").read_text())
        images = int(state["images"])
        assert name.startswith(f"{images:012d}-")
        assert (folder / "state.safetensors").read_bytes() == bytes([images % 256]) * 1000
        return images


def place(work: str, images: int) -> str:
    url = storage.join(work, checkpoints.FOLDER)
    (name,) = [n for n in storage.list_dir(url) if n.startswith(f"{images:012d}-")]
    return storage.join(url, name)


def test_there_is_none_at_a_fresh_start(work):
    assert newest(work) is None
    assert checkpoints.last_in(work) is None


def test_the_newest_is_gone_on_from_and_so_many_are_kept(work, tmp_path):
    save(Checkpoints(work, 2), tmp_path, 16, 999, 1024)
    assert newest(work) == 1024
    names = storage.list_dir(storage.join(work, checkpoints.FOLDER))
    assert [int(name.partition("-")[0]) for name in names] == [999, 1024]
    assert not list(tmp_path.glob("made-*"))  # the folders were taken over


def test_one_without_a_record_is_none(work, tmp_path):
    save(Checkpoints(work, 2), tmp_path, 16, 32)
    storage.remove_tree(storage.join(place(work, 32), checkpoints.RECORD))
    assert newest(work) == 16
    storage.remove_tree(storage.join(place(work, 16), checkpoints.RECORD))
    assert newest(work) is None


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "record cut", "record of another kind"])
def test_a_damaged_one_is_passed_over_for_an_older_one(work, tmp_path, how):
    save(Checkpoints(work, 2), tmp_path, 16, 32)
    file = storage.join(place(work, 32), "state.safetensors")
    record = storage.join(place(work, 32), checkpoints.RECORD)
    match how:
        case "flipped":
            storage.write_bytes(file, bytes([32]) * 999 + b"\x21")
        case "cut":
            storage.write_bytes(file, bytes([32]) * 512)
        case "gone":
            storage.remove_tree(file)
        case "record cut":
            storage.write_bytes(record, storage.read_bytes(record)[:-9])
        case _:
            storage.write_bytes(record, b"[]")
    assert newest(work) == 16


def test_where_all_are_damaged_training_does_not_silently_start_at_zero(work, tmp_path):
    save(Checkpoints(work, 2), tmp_path, 16, 32)
    for images in (16, 32):
        storage.write_bytes(storage.join(place(work, images), "state.json"), b"{")
    with pytest.raises(CorruptError) as caught:
        newest(work)
    message = str(caught.value)
    assert "none of its 2 checkpoints is whole" in message
    assert place(work, 32) in message  # the newest one's damage is named
    assert "delete it to train from the start" in message
    assert "\n" not in message


def test_training_goes_on_while_one_is_sent(work, tmp_path, monkeypatch):
    let, real = threading.Event(), storage.upload_dir

    def slow(folder: str, url: str) -> list[storage.FileRecord]:
        assert let.wait(20)
        return real(folder, url)

    monkeypatch.setattr(storage, "upload_dir", slow)
    kept = Checkpoints(work, 2)
    kept.save(made(tmp_path, 16), 16)
    assert kept.busy
    assert newest(work) is None
    let.set()
    kept.wait()
    assert not kept.busy
    assert newest(work) == 16


def test_a_store_that_is_away_for_a_while_is_borne(work, tmp_path, monkeypatch):
    kept = Checkpoints(work, 2)
    save(kept, tmp_path, 16)
    with monkeypatch.context() as patch:

        def away(folder: str, url: str) -> list[storage.FileRecord]:
            raise Unreachable(f"{url}: no answer in 5 attempts, 60 s")

        patch.setattr(storage, "upload_dir", away)
        borne = range(100, 100 + checkpoints.FAILURES_BORNE)
        save(kept, tmp_path, *borne)
        with pytest.raises(Unreachable, match="no answer"):
            save(kept, tmp_path, 200)
    assert newest(work) == 16
    save(kept, tmp_path, 300)
    assert newest(work) == 300


def test_a_full_disk_stops_training_and_leaves_no_part_of_a_checkpoint(work, tmp_path, monkeypatch):
    kept = Checkpoints(work, 2)
    save(kept, tmp_path, 16)
    with monkeypatch.context() as patch:

        def full(url: str, data: bytes) -> None:
            raise UserError(f"disk full: {url}: free space or choose another --workspace")

        patch.setattr(storage, "write_bytes", full)
        with pytest.raises(UserError, match=r"^disk full"):
            save(kept, tmp_path, 32)
    names = storage.list_dir(storage.join(work, checkpoints.FOLDER))
    assert [int(name.partition("-")[0]) for name in names] == [16]
    assert newest(work) == 16
