"""Runs and metrics on a real MLflow sqlite store; every case has its own copy of one database."""

import logging
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra import tracking
from infra.errors import UserError

REPO = Path(__file__).parents[1]


def open_any_run(uri: str, artifact_root: str | None = None) -> str:
    return tracking.open_run(uri, "empty", "teacher", "f0", artifact_root, {}, {})


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    tracking.open_run(tracking.default_tracking_uri(str(folder)), "empty", "e", "e", None, {}, {})
    return folder


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Path:
    shutil.copy(template / "mlflow.db", tmp_path / "mlflow.db")
    return tmp_path


def open_run(workspace: Path, fingerprint: str = "f" * 64, **params: Any) -> tuple[str, str]:
    uri = tracking.default_tracking_uri(str(workspace))
    root = tracking.artifact_root(str(workspace))
    return uri, tracking.open_run(uri, "tiny", "teacher", fingerprint, root, params, {"a": "b"})


def points(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    history = tracking.connect(uri).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in history)


# --- where ---------------------------------------------------------------------------------------


def test_importing_the_adapters_does_not_import_mlflow() -> None:
    code = "import sys, infra.tracking, infra.registry; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


@pytest.mark.parametrize("name", ["plain", "a b", "a%20b", "what?", "a#b", "é&+,=@~"])
def test_any_folder_name_survives_the_database_uri(name: str, tmp_path: Path) -> None:
    import sqlalchemy

    uri = tracking.default_tracking_uri(str(tmp_path / name))
    parsed = sqlalchemy.make_url(uri)
    assert parsed.database == str(tmp_path / name / "mlflow.db")
    assert not parsed.query
    assert tracking.sqlite_path(uri) == tmp_path / name / "mlflow.db"


def test_a_remote_workspace_needs_a_tracking_server() -> None:
    with pytest.raises(UserError, match=r"s3://b/w is remote.*MLFLOW_TRACKING_URI"):
        tracking.default_tracking_uri("s3://b/w")
    assert tracking.artifact_root("s3://b/w") == "s3://b/w/mlartifacts"


def test_prepare_makes_a_whole_database_and_nothing_in_the_current_folder(
    template: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    """The second call finds everything, is silent, and takes the odd folder name as it is."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    odd = tmp_path / "a%20b what?"
    uri = tracking.default_tracking_uri(str(odd))
    for _ in range(2):
        open_any_run(uri, tracking.artifact_root(str(odd)))
    assert not list(here.iterdir())
    assert sorted(p.name for p in odd.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
    home = tracking.connect(uri).get_experiment_by_name("empty")
    assert home is not None
    assert home.artifact_location == (odd / "mlartifacts").as_uri()
    assert "INFO" not in "".join(capfd.readouterr())


def test_a_database_half_made_by_a_killed_process_is_not_taken_for_whole(
    workspace: Path, template: Path
) -> None:
    (workspace / "mlflow.db").rename(workspace / "saved")
    (workspace / "mlflow.db.new").write_bytes((template / "mlflow.db").read_bytes()[:50_000])
    (workspace / "mlflow.db.lock").touch()
    open_run(workspace)
    assert not (workspace / "mlflow.db.new").exists()


def test_two_processes_at_once_on_no_database_share_one_experiment(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import sys
        from infra import tracking
        uri, root = tracking.default_tracking_uri(sys.argv[1]), tracking.artifact_root(sys.argv[1])
        print(tracking.open_run(uri, "tiny", "s", sys.argv[2], root, {"n": 1}, {}))
        """
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), fingerprint],
            cwd=REPO,
            stdout=subprocess.PIPE,
            text=True,
        )
        for fingerprint in ("1" * 64, "2" * 64)
    ]
    runs = [process.communicate()[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    client = tracking.connect(tracking.default_tracking_uri(str(tmp_path)))
    assert len({client.get_run(run).info.experiment_id for run in runs}) == 1
    assert len(set(runs)) == 2


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("postgresql+psycopg2://me:secret@localhost/mlflow", "psycopg2"),
        ("http://127.0.0.1:9", "127.0.0.1"),
        ("nonsense://x", "nonsense"),
        ("sqlite:///{tmp}/file/mlflow.db", "file"),
        ("sqlite:///{tmp}/text.db", "not a database"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_line_without_the_password(
    uri: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "file").touch()
    (tmp_path / "text.db").write_text("this is no database, but some text " * 100)
    for check in (open_any_run, tracking.probe):
        if "/file/" in uri and check is tracking.probe:
            continue
        with pytest.raises(UserError, match=says) as caught:
            check(uri.format(tmp=tmp_path))
        assert "\n" not in str(caught.value)
        assert "tracking_uri" in str(caught.value)
        assert "secret" not in str(caught.value)


def test_probe_makes_no_database(tmp_path: Path) -> None:
    tracking.probe(tracking.default_tracking_uri(str(tmp_path / "later")))
    assert not list(tmp_path.iterdir())


# --- runs ----------------------------------------------------------------------------------------


def test_a_resumed_stage_goes_on_in_its_run(workspace: Path) -> None:
    uri, run_id = open_run(workspace, lr=1e-3)
    tracking.finish_run(uri, run_id, "FAILED")
    assert tracking.connect(uri).get_run(run_id).info.status == "FAILED"
    assert open_run(workspace, lr=1e-3, betas=(0.9, 0.99))[1] == run_id  # a new key is no error
    run = tracking.connect(uri).get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"lr": "0.001", "betas": "(0.9, 0.99)"}
    assert run.data.tags["a"] == "b"
    assert open_run(workspace, fingerprint="0" * 64)[1] != run_id


def test_more_parameters_than_one_request_takes_are_logged(workspace: Path) -> None:
    uri, run_id = open_run(workspace, **{f"p{i}": i for i in range(230)})
    assert len(tracking.connect(uri).get_run(run_id).data.params) == 230


def test_an_experiment_deleted_by_hand_says_how_to_get_it_back(workspace: Path) -> None:
    uri, run_id = open_run(workspace)
    client = tracking.connect(uri)
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    with pytest.raises(UserError, match="mlflow experiments restore --experiment-id 2"):
        open_run(workspace)


def test_files_and_folders_go_below_the_workspace(workspace: Path) -> None:
    uri, run_id = open_run(workspace)
    (workspace / "grids").mkdir()
    (workspace / "grids" / "a.png").write_bytes(b"png")
    (workspace / "report.html").write_text("<html>")
    tracking.log_artifacts(uri, run_id, [workspace / "grids", workspace / "report.html"])
    stored = {p.name for p in (workspace / "mlartifacts").rglob("*") if p.is_file()}
    assert stored == {"a.png", "report.html"}


def test_a_moved_or_copied_workspace_is_refused_instead_of_written_to_the_old_place(
    workspace: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    open_run(workspace)
    other = tmp_path_factory.mktemp("other")
    shutil.copy(workspace / "mlflow.db", other / "mlflow.db")
    said = f"{other}/mlflow.db keeps its files in {(workspace / 'mlartifacts').as_uri()}.*moved"
    with pytest.raises(UserError, match=f"{said}.*move it back, or delete") as caught:
        open_run(other)
    assert "\n" not in str(caught.value)


def test_a_workspace_by_another_name_of_the_same_folder_is_not_moved(
    workspace: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _, run_id = open_run(workspace)
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(workspace)
    assert open_run(link)[1] == run_id


def test_workspaces_may_share_a_database_that_lies_in_neither(
    workspace: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    uri = tracking.default_tracking_uri(str(workspace))
    for name in ("one", "two"):
        root = tracking.artifact_root(str(tmp_path_factory.mktemp(name)))
        assert open_any_run(uri, root)
    assert open_any_run(uri, "s3://bucket/w/mlartifacts")


# --- a model that is not there -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("models:/nothing/1", r"models:/nothing/1: .*nothing.* not found"),
        ("models:/nothing@champion", "models:/nothing@champion: .*not found"),
        ("models:/nothing", "models:/nothing: .*"),
    ],
)
def test_a_model_that_does_not_exist_is_named_and_no_server_is_blamed(
    workspace: Path, model: str, says: str
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        tracking.predict(tracking.default_tracking_uri(str(workspace)), model, 1, {})
    assert "tracking_uri" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dead_server_is_blamed_when_a_model_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9.*mend cluster\.tracking_uri"):
        tracking.predict("http://127.0.0.1:9", "models:/m@champion", 1, {})


# --- metrics -------------------------------------------------------------------------------------


def test_metrics_arrive_in_few_batches_with_images_as_step(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, run_id = open_run(workspace)
    sizes: list[int] = []
    client = tracking.connect(uri)
    real = client.log_batch
    monkeypatch.setattr(
        client, "log_batch", lambda run, metrics: (sizes.append(len(metrics)), real(run, metrics))
    )
    monkeypatch.setattr(tracking, "connect", lambda uri: client)
    with tracking.MetricWriter(uri, run_id, interval=5.0) as writer:
        for k in range(600):
            writer.log(512 * (k + 1), {"loss": 1 / (k + 1), "lr (now)": 0.5})
    assert sizes == [1000, 200]
    loss = points(uri, run_id, "loss")
    assert len(loss) == 600
    assert loss[-1] == (512 * 600, 1 / 600)
    assert len(points(uri, run_id, "lr _now_")) == 600  # the nearest legal name


def test_a_resumed_writer_repeats_no_step(workspace: Path) -> None:
    uri, run_id = open_run(workspace)
    with tracking.MetricWriter(uri, run_id) as writer:
        for images in (100, 200, 300):
            writer.log(images, {"loss": images})
        writer.log(300, {"mu": 0.9})
    # Back to the checkpoint at 100: 200 and 300 come by again.
    with tracking.MetricWriter(uri, run_id, after=100) as writer:
        for images in (100, 200, 300, 400):
            writer.log(images, {"loss": -images, "mu": 0.9, "new": 1.0})
    assert points(uri, run_id, "loss") == [(100, 100), (200, 200), (300, 300), (400, -400)]
    assert [step for step, _ in points(uri, run_id, "mu")] == [300, 400]
    assert [step for step, _ in points(uri, run_id, "new")] == [200, 300, 400]


def test_a_server_that_fails_for_a_while_gets_everything_later(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri, run_id = open_run(workspace)
    client, calls = tracking.connect(uri), iter(range(100))

    def flaky(run: str, metrics: Any) -> None:
        if next(calls) < 3:
            raise ConnectionError("server gone")
        client.log_batch(run, metrics)

    fake = SimpleNamespace(
        log_batch=flaky, get_run=client.get_run, get_metric_history=client.get_metric_history
    )
    monkeypatch.setattr(tracking, "connect", lambda uri: fake)
    with caplog.at_level(logging.WARNING), tracking.MetricWriter(uri, run_id, interval=0.01) as w:
        for k in range(1, 6):
            w.log(k, {"loss": float(k)})
    monkeypatch.undo()
    assert [step for step, _ in points(uri, run_id, "loss")] == [1, 2, 3, 4, 5]
    assert [r.message for r in caplog.records if "server gone" in r.message] == [
        "metrics are kept back, the tracking server fails: server gone"
    ]


def test_a_dead_server_neither_raises_nor_hangs(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        tracking.MetricWriter("http://127.0.0.1:9", "r", interval=0.1, deadline=0.5) as writer,
    ):
        for k in range(1, 10):
            writer.log(k, {"loss": 1.0})
    writer.log(11, {"loss": 1.0})  # after the end: still no error
    assert "9 metric records did not reach" in caplog.text


def test_ranks_other_than_zero_start_no_thread() -> None:
    with tracking.MetricWriter("http://127.0.0.1:9", "r", enabled=False) as writer:
        writer.log(1, {"loss": 1.0})


def test_an_error_in_training_passes_through_the_writer(workspace: Path) -> None:
    uri, run_id = open_run(workspace)

    def train() -> None:
        with tracking.MetricWriter(uri, run_id) as writer:
            writer.log(1, {"loss": 2.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert points(uri, run_id, "loss") == [(1, 2.0)]
