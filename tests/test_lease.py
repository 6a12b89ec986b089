"""One driver per workspace: who is refused, who waits, and what a dead one leaves."""

import errno
import io
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.errors import Preempted, Unreachable, UserError
from pipelines import lease
from tests.test_dag import FULL, refusing


@pytest.fixture
def bucket():
    """A workspace that is no local folder."""
    url = "memory://lease-test"
    yield url
    storage.remove_tree(url)


@pytest.fixture(params=["local", "remote"])
def workspace(request, tmp_path, bucket):
    return bucket if request.param == "remote" else str(tmp_path / "new" / "work")


def claim(url: str) -> dict[str, Any]:
    found = json.loads(storage.read_bytes(storage.join(url, lease.FILE)))
    assert set(found) == {"token", "host", "pid", "expires"}
    return found


def put(url: str, **changes: Any) -> None:
    """Somebody else's claim."""
    theirs = {"token": "t", "host": "elsewhere", "pid": 1, "expires": time.time() + 60, **changes}
    storage.write_bytes(storage.join(url, lease.FILE), json.dumps(theirs).encode())


def test_a_second_driver_is_told_who_holds_the_workspace(workspace):
    with lease.hold(workspace):
        if not storage.is_local(workspace):  # within one process, a claim is not one's own twice
            put(workspace, host=platform.node(), pid=os.getppid())
        with pytest.raises(UserError) as caught, lease.hold(workspace):
            pass
        holder = os.getpid() if storage.is_local(workspace) else os.getppid()
        message = str(caught.value)
        assert f"workspace {workspace} is in use by pid {holder} on {platform.node()}" in message
        assert "\n" not in message
    storage.remove_tree(storage.join(workspace, lease.FILE))
    with lease.hold(workspace):
        pass


def test_one_that_was_given_back_is_free_at_once(workspace):
    for _ in range(2):
        with lease.hold(workspace) as held:
            assert held.lost is None


def test_a_dead_driver_holds_nothing(tmp_path):
    code = (
        f"from pipelines import lease; import os\nwith lease.hold({str(tmp_path)!r}): os._exit(9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(lease.__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 9
    with lease.hold(str(tmp_path)):
        pass


def test_a_dead_driver_of_this_machine_is_known_to_be_dead_at_once(bucket):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    put(bucket, host=platform.node(), pid=dead.pid)
    with lease.hold(bucket):
        assert claim(bucket)["pid"] == os.getpid()


def test_a_dead_driver_of_another_machine_holds_until_its_time_is_over(bucket, monkeypatch):
    monkeypatch.setattr(lease, "LOOK", 0.02)
    put(bucket, expires=time.time() + 0.3)
    told: list[str] = []
    with lease.hold(bucket, wait=True, waiting_for=told.append):
        assert claim(bucket)["pid"] == os.getpid()
    assert told == ["pid 1 on elsewhere"]


def test_asked_to_stop_nobody_waits_on(workspace, monkeypatch):
    monkeypatch.setattr(lease, "LOOK", 0.01)
    with lease.hold(workspace):
        if not storage.is_local(workspace):
            put(workspace)
        asked = iter([False, False, True])
        with (
            pytest.raises(Preempted),
            lease.hold(workspace, wait=True, asked_to_stop=lambda: next(asked)),
        ):
            pass


def test_it_is_renewed_while_it_is_held(bucket, monkeypatch):
    monkeypatch.setattr(lease, "RENEW", 0.02)
    with lease.hold(bucket):
        first = claim(bucket)
        end = time.monotonic() + 20
        while claim(bucket)["expires"] <= first["expires"]:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert claim(bucket)["expires"] == 0


def test_a_store_that_does_not_answer_costs_no_lease(bucket, monkeypatch):
    monkeypatch.setattr(lease, "RENEW", 0.02)
    failed = threading.Event()
    with lease.hold(bucket) as held:
        with monkeypatch.context() as patch:

            def away(url: str) -> bytes:
                failed.set()
                raise Unreachable(f"{url} did not answer")

            patch.setattr(storage, "read_bytes", away)
            assert failed.wait(20)
        assert held.lost is None


def test_whoever_lost_it_knows_to_whom_and_leaves_it_alone(bucket, monkeypatch):
    monkeypatch.setattr(lease, "RENEW", 0.02)
    with lease.hold(bucket) as held:
        put(bucket)
        end = time.monotonic() + 20
        while held.lost is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert held.lost == "pid 1 on elsewhere"
    assert claim(bucket)["token"] == "t"


def test_of_two_that_take_over_at_once_the_one_who_came_last_has_it(bucket, monkeypatch):
    put(bucket, expires=1.0)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: put(bucket))
    with pytest.raises(UserError, match="in use by pid 1 on elsewhere"), lease.hold(bucket):
        pass


@pytest.mark.parametrize("text", [b"", b"[1]", b"{}", b"\xff"])
def test_a_claim_that_nobody_wrote_holds_nobody_up(bucket, text):
    storage.write_bytes(storage.join(bucket, lease.FILE), text)
    with lease.hold(bucket):
        assert claim(bucket)["pid"] == os.getpid()


def test_a_file_system_without_locks_has_a_lease_instead(tmp_path, monkeypatch):
    import fcntl

    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lease.hold(str(tmp_path)):
        assert claim(str(tmp_path))["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "disk full"),
        (errno.EROFS, "read-only file system"),
        (errno.EACCES, "permission denied"),
    ],
)
def test_a_workspace_that_cannot_be_written_is_one_line_from_the_lock_on(
    tmp_path, monkeypatch, code, words
):
    monkeypatch.setattr(lease, "open", refusing(".lock", code), raising=False)
    with pytest.raises(UserError, match=f"^{words}: "), lease.hold(str(tmp_path)):
        pass


def test_a_disk_that_fills_while_the_lock_is_written_is_one_line(tmp_path, monkeypatch):
    class Full(io.TextIOWrapper):
        def write(self, text: str) -> int:
            raise FULL

    def full(path: Path, mode: str) -> Full:
        return Full(path.open("wb"))

    monkeypatch.setattr(lease, "open", full, raising=False)
    with pytest.raises(UserError, match=r"^disk full: .*free space"), lease.hold(str(tmp_path)):
        pass


def test_a_file_where_the_workspace_should_be_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    words = "a file stands where a folder is needed"
    with pytest.raises(UserError, match=words), lease.hold(str(file)):
        pass
