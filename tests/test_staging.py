"""The cache of a machine: made once, kept within its bound, and never pulled from under anybody."""

import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from infra import staging
from infra.errors import UserError
from pipelines import shard_data

ROOT = Path(__file__).parents[1]


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def stage(cache: Path, name: str, size: int = 1_000, bound: int | None = 10_000) -> staging.Staged:
    """An entry whose only file has `size` bytes; its record is some hundred more."""

    def make(entry: staging.NewEntry) -> None:
        with entry.create("data") as file:
            file.write(name.encode().ljust(size, b"."))

    return staging.stage(str(cache), key(name), size, bound, make)


def kept(cache: Path, *names: str) -> str:
    """Those of the names that are still there."""
    return "".join(name for name in names if (cache / key(name)).is_dir())


def used_at(cache: Path, name: str, seconds: float) -> None:
    os.utime(cache / key(name) / staging.RECORD, (seconds, seconds))


def child(cache: Path, name: str, then: str) -> subprocess.Popen[str]:
    """Another process that stages an entry, and says so."""
    code = (
        f"import os, time, sys\nfrom tests.test_staging import stage\nfrom pathlib import Path\n"
        f"held = stage(Path({str(cache)!r}), {name!r})\nprint('ready', flush=True)\n{then}"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    for number, name in enumerate("abcde"):
        stage(tmp_path, name).close()
        used_at(tmp_path, name, 1_000 + number)
    stage(tmp_path, "a").close()  # used again: now the newest
    stage(tmp_path, "f", size=6_000).close()
    assert kept(tmp_path, *"abcdef") == "adef"


def test_nothing_goes_while_there_is_room(tmp_path: Path) -> None:
    for name in "abcde":
        stage(tmp_path, name).close()
    assert kept(tmp_path, *"abcde") == "abcde"


def test_what_would_never_fit_is_refused_before_it_is_made(tmp_path: Path) -> None:
    made: list[object] = []
    with pytest.raises(UserError) as caught:
        staging.stage(str(tmp_path), key("a"), 2_000_000_000, 1_500_000_000, made.append)
    assert str(caught.value) == (
        f"{tmp_path}: the data set takes 2 GB, the cache may have 1.5 GB; raise CMFORGE_CACHE_GB, "
        f"or set CMFORGE_CACHE to a folder on a larger disk"
    )
    assert made == []


def test_without_a_bound_half_the_disk_is_one(tmp_path: Path, monkeypatch) -> None:
    usage = staging.shutil.disk_usage(tmp_path)._replace(total=1_000, free=10**9)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    stage(tmp_path, "a", size=500, bound=None).close()
    with pytest.raises(UserError, match="CMFORGE_CACHE_GB"):
        stage(tmp_path, "b", size=501, bound=None)


def test_a_disk_that_others_filled_makes_old_entries_go(tmp_path: Path, monkeypatch) -> None:
    stage(tmp_path, "a", bound=10**9).close()
    usage = staging.shutil.disk_usage(tmp_path)._replace(free=500)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    stage(tmp_path, "b", bound=10**9).close()
    assert kept(tmp_path, *"ab") == "b"


def test_what_another_process_uses_stays_until_that_is_dead(tmp_path: Path) -> None:
    other = child(tmp_path, "a", "time.sleep(60)")
    try:
        used_at(tmp_path, "a", 1.0)
        stage(tmp_path, "b").close()
        stage(tmp_path, "c", size=8_000).close()
        assert kept(tmp_path, *"abc") == "ac"
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    stage(tmp_path, "d", size=9_500).close()
    assert kept(tmp_path, *"abcd") == "d"


def test_two_handles_of_one_process_are_two_users(tmp_path: Path) -> None:
    one, two = stage(tmp_path, "a"), stage(tmp_path, "a")
    one.close()
    with pytest.raises(UserError, match="running processes use"):
        stage(tmp_path, "b", size=9_500)
    two.close()
    stage(tmp_path, "b", size=9_500).close()


def test_what_a_killed_maker_left_is_cleared_up_and_a_living_ones_is_not(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f".tmp-{key(name)}-100-abc").mkdir()
    (tmp_path / ".tmp-notes").mkdir()  # not ours
    going, goes_on = threading.Event(), threading.Event()

    def make(entry: staging.NewEntry) -> None:
        going.set()
        assert goes_on.wait(10)

    maker = threading.Thread(
        target=lambda: staging.stage(str(tmp_path), key("b"), 6_000, 10_000, make).close()
    )
    maker.start()
    assert going.wait(10)  # `b` is being made anew; the old rest of it is gone
    stage(tmp_path, "c").close()
    left = [name for name in os.listdir(tmp_path) if name.startswith(".tmp-")]
    assert sorted(name[:12] for name in left) == sorted([".tmp-notes", f".tmp-{key('b')[:7]}"])
    with pytest.raises(UserError, match="running processes use"):
        stage(tmp_path, "d", size=4_500)  # room for what `b` will have is taken
    goes_on.set()
    maker.join()
    assert kept(tmp_path, *"bcd") == "b"


def test_a_maker_that_fails_leaves_nothing_and_the_next_one_goes_on(tmp_path: Path) -> None:
    def breaks(entry: staging.NewEntry) -> None:
        with entry.create("data") as file:
            file.write(b"half")
        raise RuntimeError("cut")

    with pytest.raises(RuntimeError):
        staging.stage(str(tmp_path), key("a"), 100, None, breaks)
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == []
    stage(tmp_path, "a").close()


def test_a_makers_death_lets_the_next_one_make_it(tmp_path: Path) -> None:
    code = (
        f"import os, sys\nfrom infra import staging\nfrom tests.test_staging import key\n"
        f"staging.stage({str(tmp_path)!r}, key('a'), 10, 10_000, lambda entry: os._exit(9))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 9
    assert any(name.startswith(".tmp-") for name in os.listdir(tmp_path))
    stage(tmp_path, "a").close()
    assert kept(tmp_path, "a")
    assert not any(name.startswith(".tmp-") for name in os.listdir(tmp_path))


def flip(path: Path, *, as_if_never_written: bool = False) -> None:
    status = path.stat()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    if as_if_never_written:  # as a disk does it
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def warned(caplog):
    """How many damaged entries were found so far."""
    caplog.set_level(logging.WARNING)
    return lambda: sum("is damaged" in line for line in caplog.messages)


@pytest.fixture
def another_process(monkeypatch):
    """What this process has seen is forgotten."""
    return lambda: monkeypatch.setattr(staging, "_seen", {})


def test_a_process_digests_an_entry_once(tmp_path: Path, monkeypatch, another_process) -> None:
    digested: list[str] = []
    plain = staging.storage.sha256
    monkeypatch.setattr(
        staging.storage, "sha256", lambda url: digested.append(url[-4:]) or plain(url)
    )
    for _ in range(3):
        stage(tmp_path, "a").close()
    assert digested == ["data"]
    another_process()
    stage(tmp_path, "a").close()
    assert digested == ["data"] * 2


def test_a_bit_that_a_disk_flipped_is_found_by_every_new_process(
    tmp_path: Path, warned, another_process
) -> None:
    for count in (1, 2):
        stage(tmp_path, "a").close()
        flip(tmp_path / key("a") / "data", as_if_never_written=True)
        another_process()
        stage(tmp_path, "a").close()
        assert warned() == count


def test_a_large_entry_is_digested_by_one_process_an_hour_or_when_written(
    tmp_path: Path, monkeypatch, warned, another_process
) -> None:
    monkeypatch.setattr(staging, "CHECKED_BY_ALL", 100)
    data = tmp_path / key("a") / "data"
    stage(tmp_path, "a").close()
    stage(tmp_path, "a").close()  # looked at, whole
    flip(data, as_if_never_written=True)
    another_process()
    stage(tmp_path, "a").close()
    assert warned() == 0  # within the hour
    os.utime(tmp_path / f"{key('a')}.checked", (time.time() - 3_601,) * 2)
    another_process()
    stage(tmp_path, "a").close()
    assert warned() == 1
    stage(tmp_path, "a").close()
    flip(data)
    another_process()
    stage(tmp_path, "a").close()
    assert warned() == 2


def test_only_the_caches_own_folders_are_ever_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_bytes(bytes(50_000))
    (tmp_path / (key("x") + ".bak")).mkdir()
    stage(tmp_path, "a").close()
    stage(tmp_path, "b", size=9_500).close()
    assert kept(tmp_path, *"ab") == "b"
    assert (tmp_path / "mine" / "thesis").exists()
    assert (tmp_path / (key("x") + ".bak")).exists()


# --- the settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["much", "0", "-1", "nan", "inf", "1e-10"])
def test_a_bound_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^CMFORGE_CACHE_GB: '.*' is no size"):
        shard_data._bound(text)


def test_the_bound_is_given_in_gb() -> None:
    assert shard_data._bound("") is None
    assert shard_data._bound("1.5") == 1_500_000_000


def test_a_private_cache_that_another_user_made_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shard_data.tempfile, "gettempdir", lambda: str(tmp_path))
    home = Path(shard_data._private()).parent
    assert home.stat().st_mode & 0o777 == 0o700
    home.rmdir()
    home.symlink_to(tmp_path)
    with pytest.raises(UserError, match="belongs to another user; set CMFORGE_CACHE"):
        shard_data._private()
