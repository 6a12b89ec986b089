"""Files and objects: whole or absent, one winner, one line for what a user can mend."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from infra import leftovers, storage
from infra.errors import Unreachable, UserError


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


def test_a_directory_goes_up_unchanged(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "a.bin").write_bytes(b"aa")
    (source / "deep" / "er" / "b.bin").write_bytes(b"")
    (source / ".tmp-123").write_bytes(b"unfinished")
    records = storage.upload_dir(str(source), root)
    assert [(r.path, r.bytes) for r in records] == [("a.bin", 2), ("deep/er/b.bin", 0)]
    assert storage.describe_dir(root) == records
    storage.verify(root, records)
    assert storage.read_bytes(storage.join(root, "a.bin")) == b"aa"
    storage.remove_tree(root)
    assert not storage.exists(root)
    assert (source / "a.bin").read_bytes() == b"aa"


def test_linked_files_and_folders_are_listed(tmp_path: Path) -> None:
    for name in ("elsewhere/a", "root/b", "root/sub/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"xyz")
    root = tmp_path / "root"
    (root / "one").symlink_to(tmp_path / "elsewhere")
    (root / "two").symlink_to("sub")  # a folder of the tree by a second name is no circle
    (root / "sub" / "d").symlink_to(root / "b")
    names = [name for name, _ in storage.list_files(str(root))]
    assert names == ["b", "one/a", "sub/c", "sub/d", "two/c", "two/d"]


def test_a_link_to_nothing_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "gone.png").symlink_to(tmp_path / "moved.png")
    with pytest.raises(UserError, match=r"/sub/gone\.png: a link to nothing; mend or remove it"):
        storage.list_files(str(tmp_path))


@pytest.mark.parametrize(
    ("link", "target"), [("a/back", "a"), ("a/back", "."), ("a/back", ".."), ("a/back", "b")]
)
def test_links_in_a_circle_end_in_one_line(tmp_path: Path, link: str, target: str) -> None:
    root = tmp_path / "root"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    (root / link).symlink_to((root / target).resolve())
    (root / "b" / "forth").symlink_to(root / "a")  # with a/back -> b: a circle of two
    with pytest.raises(UserError, match=r"(back|forth): a link to a folder around it; remove it"):
        storage.list_files(str(root))


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    options = ["-t", "tmpfs", "-o", "size=1m"]
    made = subprocess.run(["mount", *options, "tmpfs", disk], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no small file system here: {made.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    small_disk: Path, tmp_path: Path
) -> None:
    url = str(small_disk / "a")
    storage.write_bytes(url, b"old")
    (tmp_path / "large").write_bytes(bytes(2 << 20))
    for write in (
        lambda: storage.write_bytes(url, bytes(2 << 20)),
        lambda: storage.put_if_absent(str(small_disk / "b"), bytes(2 << 20)),
        lambda: storage.upload_file(str(tmp_path / "large"), url),
        lambda: storage.upload_file(str(tmp_path / "large"), str(small_disk / "c")),
    ):
        with pytest.raises(UserError, match=f"^disk full: {small_disk}/[abc]: free space or"):
            write()
        assert os.listdir(small_disk) == ["a"]
        assert storage.read_bytes(url) == b"old"


def test_what_a_killed_writer_left_is_unseen_found_and_removed(tmp_path: Path) -> None:
    root, url = str(tmp_path / "root"), str(tmp_path / "root" / "a")
    storage.write_bytes(url, b"old")
    killed_at_sync = (
        "import os, signal, sys\nfrom infra import storage\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "storage.write_bytes(sys.argv[1], b'new')"
    )
    command = [sys.executable, "-c", killed_at_sync, url]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], timeout=60)
    assert done.returncode == -signal.SIGKILL
    (torn,) = (name for name in os.listdir(root) if name != "a")
    assert storage.read_bytes(url) == b"old"
    assert storage.list_dir(root) == ["a"]
    assert storage.list_files(root) == [("a", 3)]
    assert leftovers.stale_temps(root, 3600) == []
    os.utime(os.path.join(root, torn), (0, 0))
    (found,) = leftovers.stale_temps(root, 3600)
    assert (found.url, found.bytes) == (os.path.join(root, torn), 3)
    leftovers.remove_temp(found)
    leftovers.remove_temp(found)
    assert os.listdir(root) == ["a"]


def test_an_unfinished_folder_is_as_young_as_what_is_in_it(tmp_path: Path) -> None:
    inside = tmp_path / "x" / ".tmp-build" / "deep" / "file"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(b"12345")
    for path in (inside, *list(inside.parents)[:2]):
        os.utime(path, (0, 0))
    (found,) = leftovers.stale_temps(str(tmp_path), 3600)
    assert (found.url, found.bytes) == (str(tmp_path / "x" / ".tmp-build"), 5)
    os.utime(inside)
    assert leftovers.stale_temps(str(tmp_path), 3600) == []


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


def test_the_mend_names_the_setting_that_moves_the_file() -> None:
    full = OSError(errno.ENOSPC, "full")
    said = [storage.user_error_from(full, "/x"), storage.user_error_from(full, "/x", "TMPDIR")]
    assert [str(line) for line in said] == [
        "disk full: /x: free space or choose another --workspace",
        "disk full: /x: free space or choose another TMPDIR",
    ]


# --- an S3 store that does not answer, and one that has no such bucket ---------------------------


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """No credentials of this machine, few retries, nothing kept from other tests."""
    s3fs = pytest.importorskip("s3fs")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("CMFORGE_STORAGE_DEADLINE", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


def with_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def test_missing_credentials_are_one_line(s3: pytest.MonkeyPatch) -> None:
    for call in (storage.list_dir, storage.exists, storage.read_bytes, storage.list_files):
        with pytest.raises(UserError, match=r"^s3://b/k: Unable to locate credentials; check"):
            call("s3://b/k")
    with pytest.raises(UserError, match="Unable to locate credentials"):
        storage.write_bytes("s3://b/k", b"")


def test_a_store_that_does_not_answer_is_one_line(s3: pytest.MonkeyPatch) -> None:
    with_credentials(s3)
    with pytest.raises(
        Unreachable, match=r"^s3://b/k: no answer in \d+ tries over .*Could not connect.*AWS_ENDP"
    ) as caught:
        storage.read_bytes("s3://b/k")
    assert "\n" not in str(caught.value)


def test_a_bucket_that_does_not_exist_is_empty_to_read_and_one_line_to_write(
    s3: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moto = pytest.importorskip("moto.server")
    with_credentials(s3)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        s3.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3.delenv("CMFORGE_STORAGE_DEADLINE")
        assert storage.list_dir("s3://nowhere/k") == storage.list_files("s3://nowhere/k") == []
        assert not storage.exists("s3://nowhere/k")
        (tmp_path / "file").write_bytes(b"x")
        for write in (
            lambda url: storage.write_bytes(url, b""),
            lambda url: storage.put_if_absent(url, b""),
            lambda url: storage.upload_file(str(tmp_path / "file"), url),
        ):
            with pytest.raises(UserError, match=r"^s3://nowhere/k: .*create the bucket or mend"):
                write("s3://nowhere/k")
    finally:
        server.stop()
