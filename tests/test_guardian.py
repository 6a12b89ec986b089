"""What a killed driver has started goes with it, and nothing else does."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
# Says the pids of its guardian and of a child of its child, then waits; "drop" closes the pipe.
DRIVER = """
import os, subprocess, sys
from infra import guardian
standing = guardian.start(os.getpid())
code = "import subprocess, sys; c = subprocess.Popen(['sleep', '300']); print(c.pid); c.wait()"
child = subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
)
print(standing.pid, child.stdout.readline(), flush=True)
sys.stdin.readline()
standing.stdin.close()
sys.stdin.readline()
"""


@pytest.fixture
def driver() -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        yield process
        process.kill()


@pytest.fixture
def other() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process
        process.kill()


def test_a_killed_driver_takes_along_what_it_started_and_nothing_else(driver, other) -> None:
    standing, grandchild = (psutil.Process(int(pid)) for pid in driver.stdout.readline().split())
    time.sleep(3)  # a look
    driver.kill()
    driver.wait()
    _, left = psutil.wait_procs([standing, grandchild], timeout=20)
    assert left == []
    assert other.poll() is None


def test_a_driver_that_only_drops_the_pipe_keeps_its_children(driver) -> None:
    standing, grandchild = (psutil.Process(int(pid)) for pid in driver.stdout.readline().split())
    driver.stdin.write("drop\n")
    driver.stdin.flush()
    end = time.monotonic() + 20
    while standing.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.05)
    assert standing.status() == psutil.STATUS_ZOMBIE, "it should have left"
    assert grandchild.is_running()
    grandchild.kill()
