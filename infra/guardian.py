"""Ends what a killed driver's Ray leaves running: `python guardian.py PID`, at a pipe from it.

Head and raylet die with the driver that started them; the kernel sees to that. Their agents tell
the head before they leave, and wait a minute for its answer. This process stands beside the driver,
in a session of its own, until the pipe closes.
"""

import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

LOOK = 2.0  # seconds between looks at which processes there are
LEAVE = 2.0  # seconds for those that leave by themselves


def start(driver: int) -> "subprocess.Popen[bytes]":
    """Stand beside `driver`, the process that calls; to be killed where Ray ended in order."""
    return subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).resolve()), str(driver)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # what kills the driver's group leaves this one
    )


def main() -> None:
    driver, family = psutil.Process(int(sys.argv[1])), set[psutil.Process]()
    while not select.select([sys.stdin], [], [], LOOK)[0]:
        family = _living(family) | _below(driver)
    family = _living(family) | _below(driver)
    if not _dies(driver):
        return  # it only dropped the pipe
    _, left = psutil.wait_procs(family, timeout=LEAVE)
    for process in left:
        with suppress(psutil.Error):  # a number that another has by now is not killed
            process.kill()


def _living(family: set[psutil.Process]) -> set[psutil.Process]:
    return {process for process in family if process.is_running()}


def _below(driver: psutil.Process) -> set[psutil.Process]:
    """What it has started, and they; without this process."""
    with suppress(psutil.Error):
        return {*driver.children(recursive=True)} - {psutil.Process()}
    return set()


def _dies(driver: psutil.Process) -> bool:
    """Whether it is dead, at the latest in a moment: its files are closed before it counts so."""
    end = time.monotonic() + LEAVE
    while time.monotonic() < end:
        try:
            if driver.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


if __name__ == "__main__":
    main()
