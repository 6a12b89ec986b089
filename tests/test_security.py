"""Nothing that a user or a bucket supplies is run, nothing secret is written down, nothing is
written where it was not asked for."""

import ast
import dataclasses
import hashlib
import io
import json
import logging
import os
import pickle
import socket
import sqlite3
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consistency.lpips import load_lpips
from infra import shards, sources, storage, tracking
from infra.errors import UserError
from infra.resources import Resources
from pipelines import cli, commands
from pipelines.dag import Step, StepContext
from pipelines.execution import StepsFailed
from tests import test_dag, tiny_trials

ROOT = Path(__file__).parents[1]

# --- what the code may not call -------------------------------------------------------------------

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads"),
    *("dill.load", "dill.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("pd.read_pickle", "pandas.read_pickle", "torch.jit.load", "torch.package.PackageImporter"),
    *("tarfile.TarFile.extractall", "shutil.unpack_archive", "tempfile.mktemp"),
}
# A TorchScript file given as a feature network is a program and is run as one, by whoever gives it;
# exported.py goes through .pt2 files only.
ALLOWED = {"consistency/evaluation/extractors.py": ["torch.jit.load"]}
STARTS = {"run", "call", "check_call", "check_output", "Popen"}  # of subprocess


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a call's function; `?.c` where it is called on something else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def offences(source: str) -> list[str]:
    """Calls that production code must not make, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, options = dotted(node.func), {k.arg: k.value for k in node.keywords}
        last = name.rsplit(".", 1)[-1]

        def says(option: str, value: bool, given: dict[Any, ast.expr] = options) -> bool:
            constant = given.get(option)
            return isinstance(constant, ast.Constant) and constant.value is value

        wrong = (
            name in FORBIDDEN
            or last in ("extractall", "extract")
            or (name == "torch.load" and not says("weights_only", True))
            or (name in ("np.load", "np.save", "numpy.load") and not says("allow_pickle", False))
            or ("shell" in options and not says("shell", False))
            or (name.startswith("subprocess.") and last in STARTS and not _is_a_list(node))
            or says("trust_remote_code", True)
            or says("verify", False)
        )
        if wrong:
            found.append(f"{node.lineno}: {name}")
    return found


def _is_a_list(call: ast.Call) -> bool:
    return bool(call.args) and isinstance(call.args[0], ast.List | ast.Name)


PRODUCTION = sorted(
    path
    for package in ("consistency", "pipelines", "infra")
    for path in (ROOT / package).rglob("*.py")
)


def test_no_code_of_ours_unpickles_evaluates_or_asks_a_shell():
    assert len(PRODUCTION) > 100
    assert {
        str(path.relative_to(ROOT)): [line.split(": ")[1] for line in wrong]
        for path in PRODUCTION
        if (wrong := offences(path.read_text()))
    } == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "pickle.loads(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "yaml.load(x, Loader=L)",
        "eval('1')",
        "os.system('ls')",
        "subprocess.run('ls')",
        "subprocess.run(f'ls {x}')",
        "subprocess.run(['ls'], shell=True)",
        "tarfile.open(x).extractall(y)",
    ],
)
def test_such_a_call_would_be_seen(line):
    assert offences(line) != []


@pytest.mark.parametrize(
    "line",
    ["net.eval()", "re.compile('x')", "np.load(x, allow_pickle=False)", "subprocess.run(['ls'])"],
)
def test_such_a_call_is_none(line):
    assert offences(line) == []


def test_pickle_is_imported_for_the_official_cifar_batches_alone():
    modules = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
    importers = {
        str(path.relative_to(ROOT))
        for path in PRODUCTION
        for node in ast.walk(ast.parse(path.read_text()))
        if (
            isinstance(node, ast.Import)
            and any(a.name.split(".")[0] in modules for a in node.names)
        )
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in modules)
    }
    assert importers == {"infra/cifar10.py"}


# --- secrets --------------------------------------------------------------------------------------

MARKER = "hush-e3b0c442"
SECRETS = {
    name: f"{MARKER}-{name}"
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "RAY_AUTH_TOKEN",
    )
}


class InProcess:
    """Runs each step where it is waited for."""

    def __init__(self) -> None:
        self.calls: dict[int, Any] = {}

    def capacity(self) -> Resources:
        return Resources(2.0)

    def submit(self, function: Any, *args: Any, needs: Resources, name: str) -> int:
        self.calls[len(self.calls)] = (function, args)
        return len(self.calls) - 1

    def wait(self, handles: Sequence[int], timeout: float) -> list[int]:
        return list(handles[:1])

    def result(self, handle: int) -> Any:
        function, args = self.calls[handle]
        return function(*args)

    def cancel(self, handles: Sequence[int]) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """Commands run here, with every secret in the environment and real MLflow."""
    writer = tracking.MetricWriter
    tiny_trials.stand_in(monkeypatch)
    monkeypatch.setattr(tracking, "MetricWriter", writer)
    monkeypatch.setattr(commands, "_ray", lambda address: InProcess())
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_trials.TEXT)


def told(folder: Path) -> list[str]:
    """Files below a folder that tell a secret: plain, percent-encoded, or in an archive."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if zipfile.is_zipfile(io.BytesIO(data)):
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    data += b"".join(archive.read(name) for name in archive.namelist())
            if MARKER.encode() in data:
                found.append(str(path.relative_to(folder)))
    return found


def params_and_tags(database: Path) -> list[str]:
    """Everything that MLflow keeps as text."""
    with sqlite3.connect(database) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master")]
        tables = [n for n in names if n in ("params", "tags", "model_version_tags", "experiments")]
        return [str(row) for t in tables for row in connection.execute(f"SELECT * FROM {t}")]


def dead_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_a_run_writes_no_secret_anywhere(in_process, capfd, caplog, tmp_path, monkeypatch):
    caplog.set_level(logging.DEBUG, logger="infra")

    def says_nothing(*command: str) -> int:
        # In the product each step has a process of its own; here MLflow leaves it in this one's.
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        with pytest.MonkeyPatch.context() as patch:
            if uri is not None:
                patch.setenv("MLFLOW_TRACKING_URI", uri)
            code = cli.main([*command, "--workspace", "work", "--cluster", "laptop"])
        captured = capfd.readouterr()
        assert MARKER not in captured.out + captured.err
        own = [record.getMessage() for record in caplog.records if record.name[:5] == "infra"]
        assert MARKER not in "".join(own)
        assert told(tmp_path) == []
        return code

    uri = None
    assert [says_nothing(*c) for c in (["plan", "tiny.yaml"], ["run", "tiny.yaml"])] == [0, 0]
    assert [says_nothing(command) for command in ("status", "report", "doctor")] == [0, 0, 0]
    assert len(list(Path("work").glob("steps/*/*/COMMIT.json"))) == 8
    kept = params_and_tags(Path("work/mlflow.db"))
    assert len(kept) > 20
    assert MARKER not in "".join(kept)

    # The same with a registry that has a password, and does not answer.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://me:{MARKER}@127.0.0.1:{dead_port()}"
    assert says_nothing("plan", "tiny.yaml") == 0
    assert says_nothing("run", "tiny.yaml") in (1, 2)
    assert says_nothing("doctor") == 1


def test_a_tracking_server_that_does_not_answer_is_named_without_its_password(caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://me:{MARKER}@127.0.0.1:{dead_port()}"
    with tracking.MetricWriter(uri, "run", interval=0.01, deadline=0.1) as metrics:
        metrics.log(1, {"loss": 1.0})
        while not metrics.failures:
            time.sleep(0.01)
    assert "metrics are kept back" in caplog.text
    assert MARKER not in caplog.text
    with pytest.raises(UserError) as caught:
        tracking.open_run(uri, "e", "n", "f", None, {}, {})
    assert MARKER not in str(caught.value)


def test_whatever_a_step_dies_of_is_told_without_a_password(tmp_path):
    """MLflow's own errors repeat the server's whole URL."""

    def dies(ctx: StepContext, config: test_dag.Config) -> test_dag.Number:
        said = f"API request to http://me:{MARKER}@registry/api failed\nPOST //me:{MARKER}@registry"
        raise ConnectionError(said)

    step = Step(name="dies", run=dies, config=test_dag.Config(), returns=test_dag.Number)
    with pytest.raises(StepsFailed) as caught:
        test_dag.Place(str(tmp_path)).run([step])
    message = str(caught.value.failures["dies"])
    assert message == "ConnectionError: API request to http://registry/api failed"
    (log,) = tmp_path.glob("steps/dies/*/failures/*.txt")
    assert "POST //registry" in log.read_text()
    assert told(tmp_path) == []


@pytest.mark.parametrize(
    ("option", "where"),
    [
        (["--workspace", f"s3://AKIA:{MARKER}@bucket/w"], "workspace"),
        (["data.source=npz", f"data.path=s3://AKIA:{MARKER}@bucket/a.npz"], "data"),
        ([f"teacher.from=s3://AKIA:{MARKER}@bucket/model"], "teacher"),
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(in_process, capfd, tmp_path, option, where):
    assert cli.main(["run", "tiny.yaml", *option]) == 2
    captured = capfd.readouterr()
    assert "credentials in a URL are refused" in captured.err
    assert MARKER not in captured.out + captured.err
    assert told(tmp_path) == []


# --- paths ----------------------------------------------------------------------------------------


@pytest.fixture
def fenced(tmp_path):
    """A folder to work in; nothing may appear around it."""
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    before = sorted(path for path in tmp_path.rglob("*") if inside not in path.parents)
    yield inside
    assert sorted(path for path in tmp_path.rglob("*") if inside not in path.parents) == before


def member(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def cifar_archive(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


ROWS = bytes(10 * 3073)
BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)]


@pytest.mark.parametrize("folder", ["", "../", "../../../", "/tmp/cmforge-escaped/", "a/../../"])
def test_members_of_an_archive_are_read_and_never_written_wherever_they_point(fenced, folder):
    path = fenced / "cifar.tar.gz"
    cifar_archive(path, *((member(f"{folder}{name}"), ROWS) for name in BATCHES))
    found = sources.open_source("cifar10", str(path), size=None, fit="crop")
    assert found.count == len(list(found.samples())) == 50
    assert os.listdir(fenced) == ["cifar.tar.gz"]
    assert not Path("/tmp/cmforge-escaped").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_of_an_archive_are_as_good_as_absent(fenced, kind):
    path = fenced / "cifar.tar.gz"
    (fenced / "secret").write_bytes(ROWS)
    whole = [(member(name), ROWS) for name in BATCHES[1:]]
    cifar_archive(path, (member(BATCHES[0], kind, str(fenced / "secret")), b""), *whole)
    with pytest.raises(UserError, match=r"has no data_batch_1"):
        sources.open_source("cifar10", str(path), size=None, fit="crop")
    assert sorted(os.listdir(fenced)) == ["cifar.tar.gz", "secret"]


def test_members_of_an_npz_are_only_names(fenced):
    path = fenced / "a.npz"
    array = io.BytesIO()
    np.save(array, np.zeros((4, 8, 8), np.uint8))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", array.getvalue())
        for name in ("../../escaped.npy", "/tmp/cmforge-escaped.npy"):
            archive.writestr(name, array.getvalue())
    assert sources.open_source("npz", str(path), size=None, fit="crop").count == 4
    assert os.listdir(fenced) == ["a.npz"]
    assert not Path("/tmp/cmforge-escaped.npy").exists()


def test_a_label_file_of_sheets_is_read_and_no_more(fenced):
    from PIL import Image

    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(fenced / "train_0.png")
    with pytest.raises(UserError, match=r"data.labels: .* does not exist"):
        sources.open_source("sheets", str(fenced), size=None, fit="crop", labels="../../labels.npy")


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a/b.tar", "..", "pipe:ls", "x.tar::y"])
def test_a_manifest_cannot_name_files_elsewhere(fenced, name):
    data = sources.open_source("digits", None, size=None, fit="crop", limit=8)
    shards.write_shards(data, str(fenced), num_shards=1)
    fields = json.loads((fenced / "manifest.json").read_text())
    fields["shards"][0]["name"] = name
    (fenced / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(storage.CorruptError, match="not a plain shard name"):
        shards.load_shards(str(fenced), cache_dir=str(fenced / "cache"))
    assert not (fenced / "cache").exists()


# --- pipes and chained URLs -----------------------------------------------------------------------

PIPES = ["pipe:touch TRACE", "shell:touch TRACE", "simplecache::s3://b/x", "zip://x::file:///y"]


@pytest.mark.parametrize("url", PIPES)
@pytest.mark.parametrize(
    "argument",
    [
        "--workspace={}",
        "data.path={}",
        "reference.weights={}",
        "reference.statistics={}",
        "distill.lpips={}",
        "teacher.from={}",
    ],
)
def test_pipes_and_chained_urls_are_refused_in_one_line(in_process, capfd, tmp_path, argument, url):
    url = url.replace("TRACE", str(tmp_path / "trace"))
    more = {
        "data.path={}": ["data.source=npz"],
        "reference.statistics={}": ["reference.extractor=[resnet56_cifar10]"],
        "distill.lpips={}": ["distill.distance=lpips"],
    }
    extra = more.get(argument, [])
    code = cli.main(["plan", "tiny.yaml", argument.format(url), *extra])
    captured = capfd.readouterr()
    assert code == 2, captured.out
    assert captured.err.count("\n") == 1, captured.err
    assert "pipes and chained URLs are refused" in captured.err
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("url", PIPES)
def test_a_tracking_uri_is_no_pipe_either(in_process, capfd, tmp_path, monkeypatch, url):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("TRACE", str(tmp_path / "trace")))
    assert cli.main(["doctor", "--workspace", "work", "--cluster", "laptop"]) == 1
    captured = capfd.readouterr()
    assert "FAIL  registry" in captured.out
    assert "Traceback" not in captured.out + captured.err
    assert not (tmp_path / "trace").exists()


# --- pickles --------------------------------------------------------------------------------------


class Hostile:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path):
    """Appears when something hostile is unpickled; it does here, and nowhere below."""
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists()
    mark.unlink()
    yield mark
    assert not mark.exists()


def hostile_array(mark: Path) -> np.ndarray:
    array = np.empty(1, object)
    array[0] = Hostile(mark)
    return array


def hostile_npy(path: Path, mark: Path) -> None:
    np.save(path, hostile_array(mark), allow_pickle=True)


def npz_images(folder: Path, mark: Path) -> Any:
    np.savez(folder / "a.npz", images=hostile_array(mark))
    return lambda: sources.open_source("npz", str(folder / "a.npz"), size=None, fit="crop")


def npz_that_is_a_pickle(folder: Path, mark: Path) -> Any:
    (folder / "a.npz").write_bytes(pickle.dumps(Hostile(mark)))
    return lambda: sources.open_source("npz", str(folder / "a.npz"), size=None, fit="crop")


def sheet_labels(folder: Path, mark: Path) -> Any:
    from PIL import Image

    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(folder / "train_0.png")
    hostile_npy(folder / "labels.npy", mark)
    return lambda: sources.open_source("sheets", str(folder), size=None, fit="crop")


def cifar_batch(folder: Path, mark: Path) -> Any:
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps({b"data": Hostile(mark)}))
    return lambda: sources.open_source("cifar10", str(folder), size=None, fit="crop")


def lpips_weights(folder: Path, mark: Path) -> Any:
    torch.save({"lin0": Hostile(mark)}, folder / "w.pt")
    return lambda: load_lpips(folder / "w.pt")


def feature_weights(folder: Path, mark: Path) -> Any:
    from consistency.evaluation.extractors import load_extractor

    torch.save({"linear.bias": Hostile(mark)}, folder / "w.pth")
    return lambda: load_extractor("resnet56_cifar10", folder / "w.pth")


def weights_to_import(folder: Path, mark: Path) -> Any:
    from pipelines import weights_fetch

    (folder / "w.pth").write_bytes(pickle.dumps(Hostile(mark)))
    return lambda: weights_fetch.take(folder / "w.pth", None)


def statistics(folder: Path, mark: Path) -> Any:
    from consistency.evaluation.npz import read_npz

    np.savez(folder / "s.npz", mu=hostile_array(mark), sigma=hostile_array(mark))
    return lambda: read_npz(folder / "s.npz")


OFFERED: list[Callable[[Path, Path], Any]] = [
    npz_images,
    npz_that_is_a_pickle,
    sheet_labels,
    cifar_batch,
    lpips_weights,
    feature_weights,
    weights_to_import,
    statistics,
]


@pytest.mark.parametrize("offer", OFFERED, ids=lambda offer: offer.__name__)
def test_a_pickle_that_a_user_offers_is_refused_and_not_run(tmp_path, mark, offer):
    (tmp_path / "in").mkdir()
    read = offer(tmp_path / "in", mark)
    with pytest.raises((UserError, ValueError)) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_a_pickle_in_a_shard_whose_manifest_fits_is_refused_and_not_run(tmp_path, mark):
    data = sources.open_source("digits", None, size=None, fit="crop", limit=8)
    manifest = shards.write_shards(data, str(tmp_path / "set"), num_shards=1)
    array, stream = io.BytesIO(), io.BytesIO()
    np.save(array, hostile_array(mark), allow_pickle=True)
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("000000.images.npy", "000000.labels.npy"):
            info = member(name)
            info.size = len(array.getvalue())
            archive.addfile(info, io.BytesIO(array.getvalue()))
    tar = stream.getvalue()
    (tmp_path / "set" / "shard-000000.tar").write_bytes(tar)
    digest = hashlib.sha256(tar).hexdigest()
    shard = dataclasses.replace(manifest.shards[0], bytes=len(tar), sha256=digest)
    with pytest.raises(storage.CorruptError, match="not of our making"):
        shards.load_shards(str(tmp_path / "set"), dataclasses.replace(manifest, shards=(shard,)))


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
def test_a_pickle_in_the_cache_is_thrown_away_and_not_run(tmp_path, mark, name):
    data = sources.open_source("digits", None, size=None, fit="crop", limit=8)
    url, cache = str(tmp_path / "set"), str(tmp_path / "cache")
    manifest = shards.write_shards(data, url, num_shards=1)
    shards.load_shards(url, cache_dir=cache)
    staged = Path(cache) / manifest.sha256
    hostile_npy(staged / name, mark)
    # Whoever can write there can also make the record fit.
    record = json.loads((staged / "staged.json").read_text())
    for file in record["files"]:
        text = (staged / file["path"]).read_bytes()
        file |= {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (staged / "staged.json").write_text(json.dumps(record))
    with pytest.raises(storage.CorruptError, match="is damaged"):
        shards.load_shards(url, cache_dir=cache)
