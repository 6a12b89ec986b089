"""Temporary folders end with their process, and those of a killed one with the next."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from infra import temporary

HOLDS = "from infra import temporary; print(temporary.root(), flush=True); input()"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(temporary, "_mine", None)
    monkeypatch.setattr(temporary, "NEW_SECONDS", -1.0)
    return tmp_path


def start(place: Path) -> tuple["subprocess.Popen[str]", Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TMPDIR": str(place)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    (folder / "checkpoint").write_bytes(b"much")
    return process, folder


def test_what_a_killed_process_left_goes_with_the_next_and_the_living_keep_theirs(
    place: Path,
) -> None:
    killed, left = start(place)
    living, held = start(place)
    killed.kill()
    killed.communicate()
    assert left.is_dir()  # nobody could clean up
    mine = temporary.root()
    assert not left.exists()
    assert (held / "checkpoint").is_file()
    assert mine.parent == place
    assert temporary.root() == mine
    living.communicate("\n")
    assert living.returncode == 0
    assert not held.exists()


def test_a_folder_made_just_now_is_not_taken_for_a_dead_ones(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temporary, "NEW_SECONDS", 60.0)
    fresh = place / f"{temporary.PREFIX}fresh"
    fresh.mkdir()
    old = place / f"{temporary.PREFIX}old"
    old.mkdir()
    os.utime(old, (time.time() - 90,) * 2)
    other = place / "somebody-elses"
    other.mkdir()
    os.utime(other, (time.time() - 90,) * 2)
    temporary.root()
    assert fresh.is_dir()
    assert other.is_dir()
    assert not old.exists()


def test_a_forked_child_has_a_folder_of_its_own(place: Path) -> None:
    mine = temporary.root()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, str(temporary.root()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert Path(os.read(read, 1000).decode()) != mine
    assert mine.is_dir()
