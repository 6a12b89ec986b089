"""Files and objects: whole or absent, one winner, one line for what a user can mend."""

import errno
import os
import threading
from pathlib import Path

import fsspec
import pytest

from infra import storage
from infra.errors import UserError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "root")
    url = f"memory://{tmp_path.name}"
    storage.remove_tree(url)
    return url


@pytest.mark.parametrize(
    ("url", "parts", "joined"),
    [
        ("/", ("a",), "/a"),
        ("/a/", ("b", "c"), "/a/b/c"),
        ("a", ("b",), "a/b"),
        ("s3://bucket", ("k", "m.json"), "s3://bucket/k/m.json"),
        ("memory://", ("x",), "memory://x"),
        ("s3://bucket/k", (), "s3://bucket/k"),
    ],
)
def test_join_puts_one_slash_between_parts(url: str, parts: tuple[str, ...], joined: str) -> None:
    assert storage.join(url, *parts) == joined


def test_absolute_expands_local_paths_and_leaves_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("a/b") == str(tmp_path / "a" / "b")
    assert storage.absolute("~/x") == "/home/someone/x"
    assert storage.absolute("file:///x%20y") == "/x y"
    assert storage.absolute("s3://bucket/k") == "s3://bucket/k"


@pytest.mark.parametrize(
    "url", ["pipe:cat /etc/passwd", "shell:ls", "simplecache::s3://b/k", "zip://x::/a.zip"]
)
def test_pipes_and_chained_urls_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="refused"):
        storage.read_bytes(url)
    with pytest.raises(UserError, match="refused"):
        storage.absolute(url)


def test_an_unknown_protocol_is_one_line() -> None:
    with pytest.raises(UserError, match="nonsense://x") as caught:
        storage.exists("nonsense://x")
    assert "\n" not in str(caught.value)


def test_bytes_come_back_and_are_replaced_whole(root: str) -> None:
    url = storage.join(root, "a", "b.bin")
    assert not storage.exists(url)
    storage.write_bytes(url, b"first, longer")
    storage.write_bytes(url, b"second")
    assert storage.read_bytes(url) == b"second"
    assert storage.size(url) == 6
    assert storage.list_dir(storage.join(root, "a")) == ["b.bin"]
    # echo -n second | sha256sum
    digest = "16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4"
    assert storage.sha256(url) == digest


def test_what_is_missing_is_said_so(root: str) -> None:
    url = storage.join(root, "nothing")
    assert storage.list_dir(url) == []
    assert storage.list_files(url) == []
    storage.remove_tree(url)
    for read in (storage.read_bytes, storage.size, storage.sha256):
        with pytest.raises(FileNotFoundError):
            read(url)


def test_put_if_absent_keeps_the_first(root: str) -> None:
    url = storage.join(root, "COMMIT.json")
    assert storage.put_if_absent(url, b"one")
    assert not storage.put_if_absent(url, b"two")
    assert storage.read_bytes(url) == b"one"
    assert storage.list_dir(root) == ["COMMIT.json"]


def test_a_race_to_put_has_one_winner_whose_bytes_stand(tmp_path: Path) -> None:
    for attempt in range(20):
        url = str(tmp_path / f"commit-{attempt}")
        start = threading.Barrier(8)
        wins: list[bytes] = []

        def put(data: bytes, url: str = url, start: threading.Barrier = start) -> None:
            start.wait()
            if storage.put_if_absent(url, data):
                wins.append(data)  # noqa: B023  joined before the next round

        threads = [threading.Thread(target=put, args=(bytes([i]) * 5000,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1
        assert storage.read_bytes(url) == wins[0]
    assert len(os.listdir(tmp_path)) == 20


@pytest.mark.parametrize("lost", [FileExistsError(), OSError(errno.EINVAL, "None")])
def test_a_lost_race_on_an_object_store_is_false(
    monkeypatch: pytest.MonkeyPatch, lost: OSError
) -> None:
    fs = fsspec.filesystem("memory")
    url = "memory://race/commit"
    storage.remove_tree(url)

    def other_was_first(path: str, value: bytes, mode: str = "overwrite") -> None:
        assert mode == "create"
        with fs.open(path, "wb") as file:
            file.write(b"theirs")
        raise lost

    monkeypatch.setattr(type(fs), "pipe_file", lambda _, *a, **k: other_was_first(*a, **k))
    assert not storage.put_if_absent(url, b"mine")
    assert storage.read_bytes(url) == b"theirs"


def test_a_bad_request_is_not_taken_for_a_lost_race(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EINVAL, "bad request")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", refuse)
    with pytest.raises(OSError, match="bad request"):
        storage.put_if_absent("memory://nobody/commit", b"mine")


def test_a_directory_goes_up_and_comes_down_unchanged(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "a.bin").write_bytes(b"aa")
    (source / "deep" / "er" / "b.bin").write_bytes(b"")
    (source / ".tmp-123").write_bytes(b"unfinished")
    records = storage.upload_dir(str(source), root)
    assert [(r.path, r.bytes) for r in records] == [("a.bin", 2), ("deep/er/b.bin", 0)]
    assert storage.describe_dir(root) == records
    storage.verify(root, records)
    storage.download_dir(root, str(tmp_path / "back"))
    assert storage.describe_dir(str(tmp_path / "back")) == records
    storage.remove_tree(root)
    assert not storage.exists(root)
    assert (source / "a.bin").read_bytes() == b"aa"


def test_uploading_a_directory_onto_itself_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    assert storage.upload_dir(str(tmp_path), str(tmp_path)) == storage.describe_dir(str(tmp_path))
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("damage", "said"), [(None, "missing"), (b"ab", "2 bytes, not 3"), (b"abd", "altered")]
)
def test_verify_names_the_first_bad_file(root: str, damage: bytes | None, said: str) -> None:
    for name in ("one", "two"):
        storage.write_bytes(storage.join(root, name), b"abc")
    records = storage.describe_dir(root)
    if damage is None:
        storage.remove_tree(storage.join(root, "two"))
    else:
        storage.write_bytes(storage.join(root, "two"), damage)
    with pytest.raises(storage.CorruptError, match=f"two .*{said}"):
        storage.verify(root, records)


@pytest.mark.parametrize(
    ("code", "said"),
    [(errno.ENOSPC, "disk full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission denied")],
)
def test_a_failed_write_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    url = str(tmp_path / "a")
    storage.write_bytes(url, b"old")

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    for write in (storage.write_bytes, storage.put_if_absent):
        with pytest.raises(UserError, match=f"^{said}.*{url}.*(choose|mend)"):
            write(url, b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert storage.read_bytes(url) == b"old"


def test_errors_no_user_can_mend_pass_through() -> None:
    assert storage.user_error_from(OSError(errno.EIO, "I/O error"), "x") is None
    assert storage.user_error_from(FileNotFoundError(errno.ENOENT, "gone"), "x") is None
    denied = storage.user_error_from(PermissionError("Access Denied"), "s3://b/k")
    assert denied is not None
    assert "s3://b/k" in str(denied)


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        storage.write_bytes(str(tmp_path / "file" / "x"), b"")
