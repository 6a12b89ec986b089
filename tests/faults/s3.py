"""An S3 server of our own for tests: moto, or Ceph's radosgw where `CMFORGE_CEPH` names it.

`CMFORGE_CEPH` is the folder that `ceph_up.sh` beside this file has filled.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

KEY, SECRET = "cmforge-tests", "cmforge-tests-secret"
_STARTS_WITHIN = 240.0  # seconds


class Server(Protocol):
    """A bucket behind an endpoint. `durable`: the objects survive `kill()` and `start()`."""

    port: int
    bucket: str
    kind: Literal["radosgw", "moto"]
    durable: bool

    @property
    def endpoint(self) -> str: ...
    @property
    def environment(self) -> dict[str, str]: ...
    def kill(self) -> None: ...
    def start(self) -> None: ...


def environment(port: int) -> dict[str, str]:
    """The variables that lead every client to a server (or to a proxy before it) on `port`."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Server]:
    """A started server with an empty bucket; logs and data below `folder`."""
    prefix = os.environ.get("CMFORGE_CEPH")
    folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=folder))
    one: Moto | Radosgw = Radosgw(Path(prefix), folder) if prefix else Moto(folder)
    try:
        one.start()
        yield one
    finally:
        one.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


class Moto:
    """moto in a process of its own. It keeps everything in memory: a killed one is empty again."""

    kind: Literal["moto"] = "moto"
    durable = False
    bucket = "cmforge-tests"

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._log = folder / "moto.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.port)

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = _start(command, self._log)
        _create_bucket(self, self._process, self._log)

    def kill(self) -> None:
        """SIGKILL; `start()` brings up an empty one on the same port."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    stop = kill


class Radosgw:
    """One monitor, one object store daemon in memory, one gateway. Only the gateway is killed."""

    kind: Literal["radosgw"] = "radosgw"
    durable = True
    bucket = "cmforge-tests"

    def __init__(self, prefix: Path, folder: Path) -> None:
        self.port = free_port()
        self._prefix, self._folder = prefix, folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._gateway: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.port)

    def start(self) -> None:
        if not self._daemons:
            self._cluster()
        log = self._folder / "rgw.log"
        self._gateway = _start([*self._tool("radosgw", "-n", "client.rgw"), "-f"], log, self._paths)
        _create_bucket(self, self._gateway, log)

    def kill(self) -> None:
        """SIGKILL to the gateway; `start()` brings it up on the same port with the same objects."""
        if self._gateway is not None:
            self._gateway.kill()
            self._gateway.wait()

    def stop(self) -> None:
        self.kill()
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()

    @property
    def _libraries(self) -> Path:
        return self._prefix / "usr" / "lib" / "x86_64-linux-gnu"

    @property
    def _paths(self) -> dict[str, str]:
        libraries = self._libraries
        folders = [libraries, libraries / "ceph", self._prefix / "lib" / libraries.name]
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, folders))}

    def _tool(self, name: str, *arguments: str) -> list[str]:
        return [
            str(self._prefix / "usr" / "bin" / name),
            "-c",
            str(self._configuration),
            *arguments,
        ]

    @property
    def _configuration(self) -> Path:
        return self._folder / "ceph.conf"

    def _cluster(self) -> None:
        """A monitor and a store, new and empty, without authentication between them."""
        folder, libraries, monitor = self._folder, self._libraries, free_port()
        fsid = "b1d9a6f0-6f0c-4d6e-9d1f-3f1c7a6f0a01"
        self._configuration.write_text(
            f"""[global]
fsid = {fsid}
mon_host = v1:127.0.0.1:{monitor}
public_network = 127.0.0.0/8
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
plugin_dir = {libraries / "ceph"}
osd_class_dir = {libraries / "rados-classes"}
erasure_code_dir = {libraries / "ceph" / "erasure-code"}
run_dir = {folder}
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
mon_cluster_log_file = {folder}/cluster.log
pid_file =
[mon.a]
mon_data = {folder / "mon"}
mon_addr = v1:127.0.0.1:{monitor}
[osd.0]
osd_data = {folder / "osd"}
osd_objectstore = memstore
memstore_device_bytes = 2147483648
[client.rgw]
rgw_data = {folder / "rgw"}
rgw_frontends = beast endpoint=127.0.0.1:{self.port}
rgw_enable_usage_log = false
rgw_thread_pool_size = 64
"""
        )
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        map_file = str(folder / "monmap")
        address = f"[v1:127.0.0.1:{monitor}]"
        create = self._tool("monmaptool", "--create", "--addv", "a", address, "--fsid", fsid)
        self._run([*create, map_file])
        stores = str(folder / "osdmap")  # with osd.0 in it from the start
        self._run(self._tool("osdmaptool", "--createsimple", "1", stores))
        maps = ["--monmap", map_file, "--osdmap", stores]
        self._run(self._tool("ceph-mon", "--mkfs", "-i", "a", *maps))
        monitor_command = [*self._tool("ceph-mon", "-i", "a"), "-f"]
        self._daemons.append(_start(monitor_command, folder / "mon.out", self._paths))
        self._run(self._tool("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", fsid))
        store_command = [*self._tool("ceph-osd", "-i", "0"), "-f"]
        self._daemons.append(_start(store_command, folder / "osd.out", self._paths))
        user = ["user", "create", "--uid=tests", "--display-name=tests"]
        keys = [f"--access-key={KEY}", f"--secret-key={SECRET}"]
        self._run(self._tool("radosgw-admin", "-n", "client.rgw", *user, *keys))

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            command, env=self._paths, capture_output=True, text=True, timeout=_STARTS_WITHIN
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")


def _start(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    with log.open("ab") as sink:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment
        )


def _create_bucket(one: Moto | Radosgw, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for the server to answer, and makes the bucket unless it is there."""
    import botocore.config
    import botocore.exceptions
    import botocore.session

    client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=one.endpoint,
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        config=botocore.config.Config(retries={"total_max_attempts": 1}, read_timeout=20),
    )
    until = time.monotonic() + _STARTS_WITHIN
    while True:
        try:
            client.create_bucket(Bucket=one.bucket)
            return
        except botocore.exceptions.ClientError as error:
            if error.response["Error"]["Code"] in (
                "BucketAlreadyOwnedByYou",
                "BucketAlreadyExists",
            ):
                return
            raise
        except botocore.exceptions.BotoCoreError:
            if process.poll() is not None or time.monotonic() > until:
                said = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{one.kind} does not answer: {said}") from None
            time.sleep(0.1)
