"""`cmforge weights fetch` and `import`: the whole file or none, and always the right one.

Tiny files stand for the real ones, and a server on this machine for the world.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import os
import socket
import threading
from pathlib import Path

import pytest

from consistency.evaluation.specs import SPECS
from pipelines import cli, weights, weights_fetch
from pipelines.weights import Resolved, locate, resolve
from tests.tiny_weights import FID, FID_DATA, OTHER_DATA, OTHER_SHA, put, refused, stand_alone


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    stand_alone(monkeypatch, tmp_path)


@pytest.fixture
def offline(monkeypatch):
    """Whoever opens a socket fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- fetching ------------------------------------------------------------------------------------


class Answers(http.server.BaseHTTPRequestHandler):
    """What a path stands for is how the answer goes wrong."""

    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/missing":
            self.send_error(404)
            return
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/good")
            self.end_headers()
            return
        data = {"/other": b"x" * FID.bytes, "/short": FID_DATA[:100]}.get(self.path, FID_DATA)
        self.send_response(200)
        page = self.path == "/page"
        self.send_header("Content-Type", "text/html" if page else "application/octet-stream")
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.path == "/cut":
            data = data[:3_000_000]
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data)
            while self.path == "/endless":
                self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def published(monkeypatch):
    """published("/cut"): the standard weights are fetched from there; returns the asked paths."""
    handler = type("Handler", (Answers,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()

    def at(path: str) -> list[str]:
        url = f"http://127.0.0.1:{server.server_port}{path}"
        monkeypatch.setitem(SPECS, "inception_fid", dataclasses.replace(FID, url=url))
        return handler.asked

    yield at
    server.shutdown()
    server.server_close()
    thread.join()


def cached() -> list[str]:
    """Everything in the cache, unfinished files too."""
    folder = weights.cache_folder()
    return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.mark.parametrize("path", ["/good", "/moved"])
def test_fetched_weights_are_found_and_not_fetched_twice(published, path):
    asked = published(path)
    file = weights_fetch.fetch("inception_fid")
    assert file == weights.cache_folder() / FID.file
    assert file.read_bytes() == FID_DATA
    assert cached() == [FID.file]
    assert resolve(["inception_fid"], None) == Resolved("inception_fid", file, FID.sha256)
    before = len(asked)
    assert weights_fetch.fetch("inception_fid") == file
    assert len(asked) == before


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/missing", "Not Found (after 0 bytes)"),
        ("/cut", f"3,000,000 bytes came instead of {FID.bytes:,}"),
        ("/endless", f"bytes came instead of {FID.bytes:,}"),
        ("/page", "a web page came, not a file"),
        ("/other", f"sha256 {hashlib.sha256(b'x' * FID.bytes).hexdigest()}, expected "),
        ("/short", f"100 bytes, sha256 {hashlib.sha256(FID_DATA[:100]).hexdigest()}, expected "),
    ],
)
def test_a_download_that_goes_wrong_is_one_line_and_leaves_nothing(published, path, said):
    published(path)
    text = refused(weights_fetch.fetch, "inception_fid")
    assert said in text
    assert "here: cmforge weights import PATH (" in text
    assert cached() == []


def test_an_unreachable_host_says_how_to_get_the_file_here():
    said = refused(weights_fetch.fetch, "inception_fid")
    assert said.startswith(FID.url)
    assert "refused" in said
    assert "fetch it where the network allows, then here: cmforge weights import PATH" in said
    assert cached() == []


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "nonsense://x", "127.0.0.1:x"])
def test_a_broken_proxy_is_one_line_too(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    spec = dataclasses.replace(FID, url="http://weights.invalid/file.pth")
    monkeypatch.setitem(SPECS, "inception_fid", spec)
    assert refused(weights_fetch.fetch, "inception_fid").startswith("http://weights.invalid/")


def test_a_host_that_does_not_speak_tls_is_one_line(published, monkeypatch):
    published("/good")
    url = SPECS["inception_fid"].url.replace("http://", "https://")
    monkeypatch.setitem(SPECS, "inception_fid", dataclasses.replace(FID, url=url))
    assert "SSL" in refused(weights_fetch.fetch, "inception_fid")


def test_a_host_that_falls_silent_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(weights_fetch, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        monkeypatch.setitem(SPECS, "inception_fid", dataclasses.replace(FID, url=url))
        assert "timed out" in refused(weights_fetch.fetch, "inception_fid")


def test_an_interrupt_leaves_no_half_file(published, monkeypatch):
    published("/good")

    def interrupt(received, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights_fetch, "_show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        weights_fetch.fetch("inception_fid")
    assert cached() == []


def test_a_damaged_file_in_the_cache_is_replaced_by_a_fetch(published):
    published("/good")
    put(weights.cache_folder() / FID.file, b"damaged")
    assert weights_fetch.fetch("inception_fid").read_bytes() == FID_DATA
    assert cached() == [FID.file]


def test_a_damaged_file_survives_a_fetch_that_fails(published):
    published("/cut")
    file = put(weights.cache_folder() / FID.file, b"damaged")
    refused(weights_fetch.fetch, "inception_fid")
    assert file.read_bytes() == b"damaged"
    assert cached() == [FID.file]


def test_a_damaged_file_that_would_be_found_first_is_not_fetched_around(published, monkeypatch):
    asked = published("/good")
    monkeypatch.setenv("CMFORGE_WEIGHTS", "mine")
    file = put(Path("mine") / FID.file, b"damaged").resolve()
    assert refused(weights_fetch.fetch, "inception_fid").startswith(f"{file}: not the weights of")
    assert asked == []


def test_what_nobody_publishes_cannot_be_fetched(offline):
    said = refused(weights_fetch.fetch, "squeezenet11")
    assert "cmforge weights import PATH --as squeezenet11" in said
    assert "did you mean 'squeezenet11'?" in refused(weights_fetch.fetch, "squeezenet12")


def test_a_cache_that_cannot_be_written_is_one_line(published, tmp_path):
    published("/good")
    put(tmp_path / "cache", b"a file stands here")
    for function, arguments in (
        (weights_fetch.fetch, ("inception_fid",)),
        (weights_fetch.take, (put(tmp_path / "x.pth"), None)),
    ):
        said = refused(function, *arguments)
        assert f"{tmp_path}/cache/cmforge/weights/{FID.file}" in said
        assert "a file stands where a folder is needed" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_folder_without_permission_is_one_line(published):
    published("/good")
    weights.cache_folder().mkdir(parents=True, mode=0o500)
    assert "permission denied" in refused(weights_fetch.fetch, "inception_fid")


# --- importing -----------------------------------------------------------------------------------


def test_the_hash_tells_whose_weights_are_imported(tmp_path, offline):
    source = put(tmp_path / "download (1).bin")
    for name in (None, "inception_fid"):
        file = weights_fetch.take(source, name)
        assert file == weights.cache_folder() / FID.file
        assert file.read_bytes() == FID_DATA
    assert cached() == [FID.file]
    assert source.exists()
    assert weights_fetch.take(file, None) == file  # onto itself
    assert file.read_bytes() == FID_DATA


def test_weights_without_a_pinned_hash_are_imported_by_name(tmp_path, offline):
    source = put(tmp_path / "x.safetensors", OTHER_DATA)
    file = weights_fetch.take(source, "squeezenet11")
    assert resolve(["squeezenet11"], None) == Resolved("squeezenet11", file, OTHER_SHA)
    said = refused(weights_fetch.take, source, None)
    assert f"sha256 {OTHER_SHA}: no network of a pinned hash" in said
    assert f"sha256 {FID.sha256}" in said
    assert "--as NAME" in said


def test_a_file_that_is_not_what_is_said_is_refused_with_both_hashes(tmp_path, offline):
    source = put(tmp_path / "x", OTHER_DATA)
    said = refused(weights_fetch.take, source, "inception_fid")
    assert OTHER_SHA in said
    assert FID.sha256 in said
    said = refused(weights_fetch.take, put(tmp_path / "y"), "squeezenet11")
    assert "these are the weights of inception_fid; leave out --as squeezenet11" in said
    assert "did you mean" in refused(weights_fetch.take, source, "squeezenet")
    assert "no such file" in refused(weights_fetch.take, tmp_path, None)
    assert "no such file" in refused(weights_fetch.take, tmp_path / "nowhere", None)
    assert cached() == []


def test_the_file_imported_last_is_the_one_in_use(tmp_path):
    small, large = (f"googlenet_bvlc_fp{bits}.safetensors" for bits in (16, 32))
    for name in (small, large, small, "mine.safetensors", large):
        weights_fetch.take(put(tmp_path / name, name.encode()), "googlenet_bvlc")
        found = locate("googlenet_bvlc")
        assert found is not None
        assert found.read_bytes() == name.encode()
        assert len(cached()) == 1


# --- commands ------------------------------------------------------------------------------------


def test_commands_print_where_the_file_is_and_exit_as_others_do(capsys, published, tmp_path):
    target = weights.cache_folder() / FID.file
    source = put(tmp_path / "x.pth")
    published("/cut")
    assert cli.main(["weights", "fetch", "inception_fid"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    published("/good")
    for argv in (["fetch", "inception_fid"], ["import", "x.pth"], ["import", str(source)]):
        assert cli.main(["weights", *argv]) == 0
        assert capsys.readouterr().out == f"{target}\n"
    assert cli.main(["weights", "import", "nowhere", "--as", "squeezenet11"]) == 2
    assert capsys.readouterr().err == "nowhere: no such file; give the file of weights itself\n"


def test_progress_is_for_terminals_alone(published, capsys, monkeypatch):
    published("/good")
    weights_fetch.fetch("inception_fid")
    assert capsys.readouterr().err.count("\n") == 1
    (weights.cache_folder() / FID.file).unlink()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    weights_fetch.fetch("inception_fid")
    assert "\r4 of 4 MiB\n" in capsys.readouterr().err
