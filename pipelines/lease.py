"""One driver per workspace, as a courtesy: two would do the same work twice, and commits decide.

On local disks the kernel keeps the lock and drops it with its holder. Elsewhere `LEASE.json` says
who holds it until when; it is written anew all the time, so a dead holder's expires.
"""

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from infra import storage
from infra.errors import Preempted, UserError

FILE, LOCK = "LEASE.json", ".lock"
SECONDS = 60.0  # without a renewal, and somebody else may have it
RENEW = 15.0
SETTLE = 0.5  # two that take over an expired one in the same moment see who came last
LOOK = 1.0  # between looks at a lease that another holds


@dataclass(frozen=True)
class _Claim:
    """What LEASE.json says. `expires`: seconds since the epoch, 0 once given back."""

    token: str
    host: str
    pid: int
    expires: float

    @property
    def live(self) -> bool:
        if self.expires < time.time():
            return False
        return self.host != platform.node() or _alive(self.pid)

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


class Lease:
    """A workspace that is ours. `token` names this run; `lost` says who took it, if any."""

    def __init__(self) -> None:
        self.token = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(4)}"
        self.lost: str | None = None

    def claim(self) -> _Claim:
        return _Claim(self.token, platform.node(), os.getpid(), time.time() + SECONDS)


@contextlib.contextmanager
def hold(
    workspace: str,
    *,
    wait: bool = False,
    waiting_for: Callable[[str], None] = lambda holder: None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Lease]:
    """The workspace's lease while the context lasts.

    Where another driver holds it: UserError naming the holder, or with `wait` told once to
    `waiting_for` and then waited for. Preempted when asked to stop meanwhile.
    """
    lease = Lease()
    with contextlib.ExitStack() as stack:
        told = False
        while (holder := _take(workspace, lease, stack)) is not None:
            if not wait:
                raise UserError(
                    f"workspace {workspace} is in use by {holder}; wait for it (--wait), or choose "
                    f"another --workspace"
                )
            if asked_to_stop():
                raise Preempted("asked to stop while waiting for the workspace")
            if not told:
                waiting_for(holder)
                told = True
            time.sleep(LOOK)
        yield lease


def _take(workspace: str, lease: Lease, stack: contextlib.ExitStack) -> str | None:
    """Who else has it; None when it is ours now, until `stack` is closed."""
    if storage.is_local(workspace):
        file, holder = _lock(workspace)
        if holder is not None:
            return holder
        if file is not None:
            stack.enter_context(file)
            return None
    url = storage.join(workspace, FILE)
    found = _read(url)
    if found is not None and found.live:
        return str(found)
    data = json.dumps(asdict(lease.claim())).encode()
    if found is not None or not storage.put_if_absent(url, data):
        storage.write_bytes(url, data)
        time.sleep(SETTLE)
    found = _read(url)
    if found is not None and found.token != lease.token:
        return str(found)
    stack.enter_context(_renewed(url, lease))
    return None


@contextlib.contextmanager
def _renewed(url: str, lease: Lease) -> Iterator[None]:
    """Keeps the lease from expiring; gives it back at the end."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(RENEW):
            # A store that does not answer is no reason to stop: nobody else can write there.
            with contextlib.suppress(OSError, UserError):
                found = _read(url)
                if found is not None and found.token != lease.token:
                    lease.lost = str(found)
                    return
                storage.write_bytes(url, json.dumps(asdict(lease.claim())).encode())

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=RENEW)
        if lease.lost is None:
            with contextlib.suppress(OSError, UserError):
                given = _Claim(lease.token, platform.node(), os.getpid(), 0.0)
                storage.write_bytes(url, json.dumps(asdict(given)).encode())


def _read(url: str) -> _Claim | None:
    """The claim there is; None for none, or for one that nobody could have written."""
    try:
        return _Claim(**json.loads(storage.read_bytes(url)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _lock(workspace: str) -> tuple[IO[str] | None, str | None]:
    """(our lock, None), (None, who has it), or (None, None) on a file system without locks."""
    import fcntl

    path = Path(storage.absolute(workspace)) / LOCK
    with storage.mendable(workspace):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (held open for the life of the run)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                return None, file.read().strip() or "another process"
        except OSError:
            file.close()
            return None, None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}")
        file.flush()
    return file, None


def _alive(pid: int) -> bool:
    """Whether another process of this machine has that number."""
    if pid == os.getpid():
        return False  # ours is another claim: a container begun anew has the old one's number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
