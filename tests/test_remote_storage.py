"""An S3 server behind a proxy that breaks connections: whole, or absent, or one line in time."""

import errno
import hashlib
import io
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import botocore.exceptions
import pytest
import s3fs
from s3fs.errors import translate_boto_error

from infra import leftovers, remote, retries, storage
from infra.errors import Unreachable, UserError
from pipelines import doctor
from tests.faults import s3
from tests.faults.proxy import FaultProxy, Mode

MIB = 1 << 20
LARGE = 11 * MIB + 12_345  # three parts of 5 MiB, the least S3 takes, and twelve blocks
SMALL = b"a small object"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.server(tmp_path_factory.mktemp("s3")) as one:
        yield one


@pytest.fixture(scope="module")
def before(server: s3.Server) -> Iterator[FaultProxy]:
    """One proxy for all tests, so that they share clients, which take long to make."""
    s3fs.S3FileSystem.clear_instance_cache()
    with FaultProxy(server.port) as one:
        yield one
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(before: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """Before the server; every client of this process goes through it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3.environment(before.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CMFORGE_STORAGE_DEADLINE", "20")
    monkeypatch.setattr(remote, "BLOCK", MIB)
    monkeypatch.setattr(remote, "PART", 5 * MIB)
    before.drop()
    before.mode, before.connections, before.faults = "pass", 0, 0
    return before


@pytest.fixture
def home(proxy: FaultProxy, server: s3.Server, request: pytest.FixtureRequest) -> str:
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    return f"s3://{server.bucket}/{name}"


@pytest.fixture(scope="module")
def large() -> bytes:
    return bytes(range(251)) * (LARGE // 251) + bytes(LARGE % 251)


def uploads(home: str) -> list[str]:
    return [one.url for one in remote.unfinished(remote.place(home))]


# --- reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 300, 500_000])
def test_a_small_read_cut_anywhere_comes_whole(proxy: FaultProxy, home: str, cut: int) -> None:
    data = os.urandom(600_000)
    storage.write_bytes(f"{home}/x", data)
    proxy.break_for(("cut", cut), 3)
    assert storage.read_bytes(f"{home}/x") == data
    assert proxy.faults == 3


def test_a_cut_connection_costs_a_block_not_the_object(
    proxy: FaultProxy, home: str, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{home}/x", large)
    asked: list[int] = []
    real = remote._ranged_get

    async def get(at: remote.Place, start: int) -> tuple[bytes, int, object]:
        asked.append(start)
        return await real(at, start)

    monkeypatch.setattr(remote, "_ranged_get", get)
    proxy.break_for(("cut", 700_000), 3)
    assert storage.read_bytes(f"{home}/x") == large
    assert proxy.faults == 3
    assert set(asked) == set(range(0, LARGE, MIB))
    assert len(asked) == 12 + 3
    assert storage.sha256(f"{home}/x") == hashlib.sha256(large).hexdigest()


def test_an_empty_object_is_read_as_such(home: str) -> None:
    storage.write_bytes(f"{home}/x", b"")
    assert storage.read_bytes(f"{home}/x") == b""
    assert storage.size(f"{home}/x") == 0
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{home}/y")


def test_an_object_replaced_under_a_reader_is_read_anew(home: str) -> None:
    old, new = b"a" * (3 * MIB), b"b" * (2 * MIB)
    storage.write_bytes(f"{home}/x", old)
    at = remote.place(f"{home}/x")
    fed: list[int] = []

    def feed(into: io.BytesIO, block: bytes) -> None:
        if not fed:
            storage.write_bytes(f"{home}/x", new)
        fed.append(len(block))
        into.write(block)

    assert remote.read(at, io.BytesIO, feed).getvalue() == new
    assert fed == [MIB, MIB, MIB]  # the first block of the old one, and the new one


def test_an_object_that_never_rests_is_one_line(home: str) -> None:
    storage.write_bytes(f"{home}/x", bytes(3 * MIB))
    kinds = iter(range(1, 9))

    def feed(_: object, block: bytes) -> None:
        storage.write_bytes(f"{home}/x", bytes([next(kinds)]) * 3 * MIB)

    with pytest.raises(UserError, match="replaced again and again while it was read"):
        remote.read(remote.place(f"{home}/x"), io.BytesIO, feed)


# --- writes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [("cut_up", 0), ("cut_up", 250), ("cut", 0), ("cut", 20)])
def test_a_small_write_arrives_over_broken_connections(
    proxy: FaultProxy, home: str, mode: Mode
) -> None:
    proxy.break_for(mode, 2)
    storage.write_bytes(f"{home}/x", SMALL)
    assert proxy.faults == 2
    assert storage.read_bytes(f"{home}/x") == SMALL


@pytest.mark.parametrize("mode", [("cut_up", MIB), ("cut_up", 5 * MIB), ("cut", 1000)])
def test_a_large_write_arrives_over_broken_connections(
    proxy: FaultProxy, home: str, large: bytes, tmp_path: Path, mode: Mode
) -> None:
    (tmp_path / "file").write_bytes(large)
    proxy.break_for(mode, 4)
    storage.upload_file(str(tmp_path / "file"), f"{home}/x")
    proxy.mode = "pass"
    assert storage.sha256(f"{home}/x") == hashlib.sha256(large).hexdigest()
    assert uploads(home) == []


def test_a_large_write_that_fails_publishes_nothing_and_leaves_no_parts(
    proxy: FaultProxy, home: str, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{home}/x", SMALL)
    monkeypatch.setenv("CMFORGE_STORAGE_DEADLINE", "2")
    proxy.mode = ("cut_up", 3 * MIB)  # small requests pass, no part does
    with pytest.raises(Unreachable, match=f"^{home}/x: no answer in .*tr"):
        storage.write_bytes(f"{home}/x", large)
    proxy.mode = "pass"
    monkeypatch.delenv("CMFORGE_STORAGE_DEADLINE")
    assert storage.read_bytes(f"{home}/x") == SMALL
    assert uploads(home) == []


def test_an_interrupted_large_write_leaves_no_parts(home: str, large: bytes) -> None:
    def cut(start: int, stop: int) -> bytes:
        if start:
            raise KeyboardInterrupt
        return large[start:stop]

    with pytest.raises(KeyboardInterrupt):
        remote._upload(remote.place(f"{home}/x"), LARGE, cut)
    assert uploads(home) == []
    assert not storage.exists(f"{home}/x")


def answers_lost(monkeypatch: pytest.MonkeyPatch, method: str, times: int = 1) -> list[str]:
    """The next requests of a kind reach the store, but their answers do not reach us."""
    lost: list[str] = []
    real = s3fs.S3FileSystem.call_s3

    def call(self: s3fs.S3FileSystem, name: str, *arguments: object, **options: object) -> object:
        found = real(self, name, *arguments, **options)
        if name == method and len(lost) < times:
            lost.append(name)
            raise ConnectionResetError("answer lost")
        return found

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", call)
    return lost


def test_a_completion_whose_answer_is_lost_counts(
    home: str, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = answers_lost(monkeypatch, "complete_multipart_upload")
    storage.write_bytes(f"{home}/x", large)
    assert lost
    assert storage.read_bytes(f"{home}/x") == large


def test_an_upload_that_another_aborts_is_not_taken_for_a_missing_bucket(
    home: str, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = s3fs.S3FileSystem.call_s3

    def call(self: s3fs.S3FileSystem, name: str, *arguments: object, **options: object) -> object:
        if name == "complete_multipart_upload":
            real(self, "abort_multipart_upload", *arguments, **options)
            raise refusal(404, "NoSuchUpload")  # moto says 500
        return real(self, name, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", call)
    with pytest.raises(Unreachable, match="dropped the upload"):
        storage.write_bytes(f"{home}/x", large)
    assert not storage.exists(f"{home}/x")


def test_an_upload_of_the_wrong_size_is_said_so(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(SMALL)
    monkeypatch.setattr(remote, "upload", lambda at, file: remote.write(at, SMALL[1:]))
    with pytest.raises(storage.CorruptError, match="13 bytes after an upload of 14"):
        storage.upload_file(str(tmp_path / "file"), f"{home}/x")


def test_a_report_is_kept_as_a_page_that_browsers_show(home: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_bytes(b"<p>")
    storage.upload_file(str(tmp_path / "report.html"), f"{home}/report.html")
    assert remote.info(remote.place(f"{home}/report.html"))["ContentType"] == "text/html"


# --- a store that is away ------------------------------------------------------------------------


def every_call(home: str) -> dict[str, Callable[[], object]]:
    return {
        "write": lambda: storage.write_bytes(f"{home}/x", SMALL),
        "read": lambda: storage.read_bytes(f"{home}/x"),
        "sha256": lambda: storage.sha256(f"{home}/x"),
        "exists": lambda: storage.exists(f"{home}/x"),
        "size": lambda: storage.size(f"{home}/x"),
        "list_dir": lambda: storage.list_dir(home),
        "list_files": lambda: storage.list_files(home),
        "put_if_absent": lambda: storage.put_if_absent(f"{home}/y", SMALL),
        "stale_temps": lambda: leftovers.stale_temps(home, 0),
        "remove_tree": lambda: storage.remove_tree(f"{home}/x"),
    }


def test_a_store_away_for_two_seconds_is_waited_for(proxy: FaultProxy, home: str) -> None:
    proxy.mode = ("refuse_for", 2)
    done = {name: call() for name, call in every_call(home).items()}
    assert proxy.faults >= 3
    assert done["read"] == SMALL
    assert done["list_files"] == [("x", len(SMALL))]
    assert done["put_if_absent"] is True
    assert storage.list_dir(home) == ["y"]


def test_a_stalled_connection_is_given_up_for_another(
    proxy: FaultProxy, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{home}/x", SMALL)
    monkeypatch.setenv("CMFORGE_STORAGE_DEADLINE", "6")  # 1.5 s for each silence
    proxy.break_for("stall", 1)
    held = threading.Event()
    monkeypatch.setattr("tests.faults.proxy.time.sleep", lambda _: held.wait(0.02))
    assert storage.read_bytes(f"{home}/x") == SMALL


@pytest.mark.parametrize(("mode", "every"), [("refuse", 1), ("stall", 3)])
def test_a_store_gone_for_good_is_one_line_from_every_call(
    proxy: FaultProxy, home: str, monkeypatch: pytest.MonkeyPatch, mode: str, every: int
) -> None:
    monkeypatch.setenv("CMFORGE_STORAGE_DEADLINE", "0.5")
    proxy.mode = mode
    for call in list(every_call(home).values())[::every]:
        with pytest.raises(Unreachable, match=rf"^{home}.* in [1-9] tr.* over \d\.\d s") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert proxy.faults >= 4


def test_a_killed_server_that_comes_back_is_the_same(
    server: s3.Server, proxy: FaultProxy, home: str
) -> None:
    if not server.durable:
        pytest.skip(f"{server.kind} forgets its objects; CMFORGE_CEPH has the one that does not")
    storage.write_bytes(f"{home}/x", SMALL)
    server.kill()
    threading.Timer(1.0, server.start).start()
    assert storage.read_bytes(f"{home}/x") == SMALL


# --- what is tried again -------------------------------------------------------------------------


def refusal(status: int, code: str) -> OSError:
    error = {
        "Error": {"Code": code, "Message": "m"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    found = translate_boto_error(botocore.exceptions.ClientError(error, "GetObject"))
    assert isinstance(found, OSError)
    return found


@pytest.mark.parametrize(
    ("status", "code", "again"),
    [
        (500, "InternalError", True),
        (503, "SlowDown", True),
        (503, "503", True),
        (502, "BadGateway", True),
        (429, "TooManyRequests", True),
        (409, "ConditionalRequestConflict", True),
        (400, "RequestTimeout", True),
        (400, "IncompleteBody", True),
        (400, "InvalidRequest", False),
        (403, "AccessDenied", False),
        (403, "InvalidAccessKeyId", False),
        (403, "SignatureDoesNotMatch", False),
        (403, "403", False),
        (404, "NoSuchKey", False),
        (404, "NoSuchBucket", False),
        (409, "BucketAlreadyExists", False),
        (412, "PreconditionFailed", False),
        (501, "NotImplemented", False),
    ],
)
def test_busy_stores_are_asked_again_and_refusals_are_not(
    status: int, code: str, again: bool
) -> None:
    assert retries.transient(refusal(status, code)) is again


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (botocore.exceptions.EndpointConnectionError(endpoint_url="u"), True),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="u"), True),
        (botocore.exceptions.ResponseStreamingError(error="cut"), True),
        (botocore.exceptions.SSLError(endpoint_url="u", error="CERTIFICATE_VERIFY_FAILED"), False),
        (botocore.exceptions.NoCredentialsError(), False),
        (BrokenPipeError(), True),
        (TimeoutError(), True),
        (OSError(errno.ENOSPC, "full"), False),
        (FileNotFoundError(), False),
        (ValueError(), False),
    ],
)
def test_broken_connections_are_tried_again_and_mistakes_are_not(
    error: Exception, again: bool
) -> None:
    assert retries.transient(error) is again


def test_pauses_grow_and_end_with_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pauses = [0.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += seconds

    def busy(left: float) -> None:
        clock[0] += 1.0
        raise refusal(503, "SlowDown")

    monkeypatch.setattr(retries.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(retries.time, "sleep", sleep)
    monkeypatch.setenv("CMFORGE_STORAGE_DEADLINE", "30")
    with pytest.raises(
        Unreachable, match=r"^s3://b/k: no answer in \d+ tries over \d+\.\d s \(.*m\)"
    ):
        retries.persist("s3://b/k", busy)
    assert all(0.05 * 2**i <= pause <= 0.1 * 2**i for i, pause in enumerate(pauses[:6]))
    assert max(pauses) <= 5.0
    assert len(pauses) > 6
    assert clock[0] <= 30 + 1  # the last try may have begun just before


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_a_deadline_that_is_no_time_is_one_line(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CMFORGE_STORAGE_DEADLINE", text)
    with pytest.raises(UserError, match=f"CMFORGE_STORAGE_DEADLINE={text}: not a number of sec"):
        storage.exists("s3://bucket/key")


def test_refused_keys_are_one_line_at_once(
    server: s3.Server, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if server.kind != "radosgw":
        pytest.skip("moto takes any key; CMFORGE_CEPH has the server that does not")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=f"^permission denied: {home}/x"):
        storage.write_bytes(f"{home}/x", SMALL)
    s3fs.S3FileSystem.clear_instance_cache()


# --- one writer ----------------------------------------------------------------------------------


def race(url: str, writers: int = 16) -> list[bytes]:
    """The data of those told that it was they who wrote the file."""
    start = threading.Barrier(writers)
    wins: list[bytes] = []

    def put(data: bytes) -> None:
        start.wait()
        if storage.put_if_absent(url, data):
            wins.append(data)

    threads = [threading.Thread(target=put, args=(b"writer %d" % i,)) for i in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wins


def test_sixteen_writers_race_and_one_wins(home: str) -> None:
    for attempt in range(3):
        wins = race(f"{home}/{attempt}")
        assert len(wins) == 1
        assert storage.read_bytes(f"{home}/{attempt}") == wins[0]
    assert storage.conditional_put(home)
    assert storage.list_dir(home) == ["0", "1", "2"]  # the probe has left nothing


def test_where_conditions_are_ignored_the_last_writer_wins_and_doctor_says_so(
    server: s3.Server, proxy: FaultProxy, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if server.kind != "moto":
        pytest.skip("taking a header away breaks the signature, which radosgw checks")
    monkeypatch.setattr(remote, "SETTLE", 3.0)
    proxy.mode = "strip_if_none_match"
    wins = race(f"{home}/x")
    assert len(wins) == 1
    assert storage.read_bytes(f"{home}/x") == wins[0]
    assert not storage.put_if_absent(f"{home}/x", b"later")
    assert not storage.conditional_put(home)
    assert proxy.faults > 16
    monkeypatch.setattr(remote, "SETTLE", 0.1)
    assert doctor._workspace(home).endswith("not honoured: drivers take turns by lease")


def test_doctor_says_where_conditions_are_honoured_and_leaves_nothing(
    home: str, tmp_path: Path
) -> None:
    assert doctor._workspace(home).endswith("put-if-absent honoured")
    assert "put-if-absent honoured" in doctor._workspace(str(tmp_path))
    assert list(remote.files(remote.place(home))) == []
    assert os.listdir(tmp_path) == []


def test_a_conditional_write_whose_answer_is_lost_is_our_own(
    home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = answers_lost(monkeypatch, "put_object")
    assert storage.put_if_absent(f"{home}/x", b"ours")
    assert lost
    assert storage.read_bytes(f"{home}/x") == b"ours"


def test_a_conditional_write_retried_behind_another_is_not_ours(
    home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = s3fs.S3FileSystem.call_s3
    cut = []

    def call(self: s3fs.S3FileSystem, name: str, *arguments: object, **options: object) -> object:
        if name == "put_object" and not cut:  # ours does not arrive, and another's does meanwhile
            cut.append(True)
            storage.write_bytes(f"{home}/x", b"theirs")
            raise ConnectionResetError
        return real(self, name, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", call)
    assert not storage.put_if_absent(f"{home}/x", b"ours")
    assert cut
    assert storage.read_bytes(f"{home}/x") == b"theirs"


# --- leftovers, secrets, forks -------------------------------------------------------------------


def test_unfinished_uploads_below_a_folder_are_found_and_removed(home: str) -> None:
    ids = {}
    for url in (f"{home}/a/x", f"{home}/b", f"{home}-other/x"):
        at = remote.place(url)
        ids[url] = at.fs.call_s3("create_multipart_upload", **at.object)["UploadId"]
    storage.write_bytes(f"{home}/.tmp-1", b"xyz")
    storage.write_bytes(f"{home}/kept", SMALL)
    assert leftovers.stale_temps(home, 1e10) == []  # moto's uploads are all from 2010
    found = leftovers.stale_temps(home, -60)
    assert [(one.url, one.upload, one.bytes) for one in found] == [
        (f"{home}/.tmp-1", "", 3),
        (f"{home}/a/x", ids[f"{home}/a/x"], None),
        (f"{home}/b", ids[f"{home}/b"], None),
    ]
    for one in [*found, *found]:  # twice: another may have been faster
        leftovers.remove_temp(one)
    assert leftovers.stale_temps(home, -60) == []
    assert storage.list_dir(home) == ["kept"]
    assert uploads(f"{home}-other") == [f"{home}-other/x"]


def test_a_store_gone_in_the_middle_leaves_an_upload_that_is_found_later(
    proxy: FaultProxy, home: str, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = remote._complete

    def complete(*arguments: object) -> None:
        monkeypatch.setenv("CMFORGE_STORAGE_DEADLINE", "0.5")
        proxy.mode = "refuse"
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(remote, "_complete", complete)
    with pytest.raises(Unreachable):
        storage.write_bytes(f"{home}/x", large)
    proxy.mode = "pass"
    monkeypatch.delenv("CMFORGE_STORAGE_DEADLINE")
    assert not storage.exists(f"{home}/x")
    (left,) = leftovers.stale_temps(home, -60)
    assert left.url == f"{home}/x"
    leftovers.remove_temp(left)
    assert uploads(home) == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://AKIA:hush@bucket/k", "s3://bucket/k"),
        ("s3://AKIA:hu/sh@bucket/k", "s3://bucket/k"),
        ("s3://bucket/k?access_key=AKIA&secret_key=hush", "s3://bucket/k"),
        ("https://host/k?x=1&token=hush", "https://host/k"),
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str, said: str) -> None:
    for call in (storage.exists, storage.read_bytes, storage.absolute, storage.is_local):
        with pytest.raises(UserError, match=f"^{said}: credentials in a URL") as caught:
            call(url)
        assert "AKIA" not in str(caught.value)
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://bucket/a@b", "http://host:80/a@b", "abfs://box@account/x", "https://h/k?page=2"]
)
def test_other_urls_are_taken_as_they_are(url: str) -> None:
    assert storage.absolute(url) == url


def test_a_forked_process_reads_with_a_client_of_its_own(home: str) -> None:
    storage.write_bytes(f"{home}/x", SMALL)
    assert storage.read_bytes(f"{home}/x") == SMALL
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if storage.read_bytes(f"{home}/x") == SMALL else 1)
    assert os.waitpid(child, 0)[1] == 0


# --- the proxy itself ----------------------------------------------------------------------------


def test_the_proxy_passes_what_it_is_not_told_to_break(
    server: s3.Server, proxy: FaultProxy
) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{proxy.port}/", timeout=20) as answer:
        assert answer.status == 200
    assert (proxy.connections, proxy.faults) == (1, 0)
    proxy.mode = "refuse"
    with pytest.raises(OSError, match=r"reset|closed"):
        urllib.request.urlopen(f"http://127.0.0.1:{proxy.port}/", timeout=20)
    assert (proxy.connections, proxy.faults) == (2, 1)
