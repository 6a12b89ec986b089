"""MLflow runs, and metrics out of training. The model registry is in `infra.registry`.

These two files alone import mlflow, and only inside functions: the import takes seconds. Every
call names its server (`MlflowClient(uri)`); the global URI is set only where MLflow leaves no way.
"""

import fcntl
import logging
import math
import os
import queue
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from infra import storage, temporary
from infra.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

FINGERPRINT_TAG = "cmforge.fingerprint"

_log = logging.getLogger(__name__)
_SQLITE = "sqlite:///"
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # the default 7 hangs for minutes on a dead server
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # else a uv.lock in the current folder goes into the model
}


# --- where --------------------------------------------------------------------------------------


def default_tracking_uri(workspace: str) -> str:
    """`sqlite:///<absolute workspace>/mlflow.db`. UserError for a workspace that is not local."""
    if not storage.is_local(workspace):
        raise UserError(
            f"workspace: {workspace} is remote, where sqlite cannot live; "
            "set cluster.tracking_uri or MLFLOW_TRACKING_URI to an MLflow server"
        )
    # SQLAlchemy 2.1 decodes %xx in the path and takes ? for the start of options.
    return _SQLITE + quote(storage.absolute(storage.join(workspace, "mlflow.db")), safe="/ #+&=,@~")


def artifact_root(workspace: str) -> str:
    """`<workspace>/mlartifacts` for sqlite, which else writes below the current folder.

    MLflow records it once per experiment, as an absolute URI: `experiment_id` refuses a workspace
    that was moved since.
    """
    if not storage.is_local(workspace):
        return storage.join(workspace, "mlartifacts")
    return Path(storage.absolute(storage.join(workspace, "mlartifacts"))).as_uri()


def probe(uri: str) -> None:
    """Ask the server for something: a green /health does not mean that clients may talk to it.

    A sqlite file that is not there yet is no error, and is not made. Raises UserError.
    """
    database = sqlite_path(uri)
    if database is None or database.exists():
        with user_errors(uri):
            connect(uri).search_experiments(max_results=1)


def without_secrets(text: str) -> str:
    """A URI, or a text with some in it, without users and passwords."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _said(error: Exception) -> str:
    """Its first line; MLflow repeats the whole URI in its own."""
    return without_secrets((str(error) or type(error).__name__).splitlines()[0])


@contextmanager
def user_errors(uri: str) -> Iterator[None]:
    """What a tracking server can do wrong, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        from mlflow.exceptions import MlflowException

        if not isinstance(error, ImportError | OSError | sqlite3.Error | MlflowException):
            raise
        raise UserError(
            f"tracking server {without_secrets(uri)}: {_said(error)}; "
            "mend cluster.tracking_uri or MLFLOW_TRACKING_URI"
        ) from error


def connect(uri: str) -> "MlflowClient":
    """A client of the runs and the registry at `uri`, without MLflow's chatter."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):
        logging.getLogger(name).setLevel(logging.WARNING)
    database = sqlite_path(uri)
    if database is not None:
        _ensure_database(database)
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def sqlite_path(uri: str) -> Path | None:
    """The file of a sqlite URI."""
    return Path(unquote(uri.removeprefix(_SQLITE))) if uri.startswith(_SQLITE) else None


def _ensure_database(path: Path) -> None:
    """A database with MLflow's schema, whole or absent. Raises OSError or sqlite3.Error.

    MLflow migrates in place: a kill, or two processes at once, leave a schema it cannot mend.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel, also after SIGKILL
            if not path.exists():
                _create_database(path)
    # Asked here because MLflow tries for 100 s to open what cannot be opened.
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True)) as connection:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()


def _create_database(path: Path) -> None:
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(dir=temporary.root()) as scratch:
        MlflowClient(f"{_SQLITE}{scratch}/mlflow.db").search_experiments(max_results=1)
        new = path.with_name(path.name + ".new")
        new.unlink(missing_ok=True)
        with (
            closing(sqlite3.connect(f"{scratch}/mlflow.db")) as source,
            closing(sqlite3.connect(new)) as target,
        ):
            source.backup(target)
        os.replace(new, path)


def experiment_id(client: "MlflowClient", uri: str, name: str, artifact_root: str | None) -> str:
    """Id of the experiment, found or created.

    UserError when a person deleted it, or moved the workspace with its sqlite database: artifacts
    would go to the old place.
    """
    from mlflow.exceptions import MlflowException

    location = artifact_root if sqlite_path(uri) is not None else None  # a server has its own
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)  # another process was first
        assert found is not None, name
    if found.lifecycle_stage != "active":
        raise UserError(
            f"experiment {name} was deleted in MLflow: restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    if location is not None and _moved(found.artifact_location, location, uri):
        raise UserError(
            f"the registry {sqlite_path(uri)} keeps its files in {found.artifact_location}: its "
            f"workspace was moved or copied; move it back, or delete that mlflow.db to register "
            f"anew, or set MLFLOW_TRACKING_URI to another registry"
        )
    return str(found.experiment_id)


def _moved(recorded: str, location: str, uri: str) -> bool:
    """Whether a workspace's own database records artifacts that lie in another workspace."""
    database, root = sqlite_path(uri), os.path.realpath(storage.absolute(location))
    assert database is not None
    if os.path.realpath(database.parent) != os.path.dirname(root):
        return False  # a database beside the workspaces, shared by several of them
    return os.path.realpath(storage.absolute(recorded)) != root


# --- runs ---------------------------------------------------------------------------------------


def open_run(
    uri: str,
    experiment: str,
    name: str,
    fingerprint: str,
    artifact_root: str | None,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> str:
    """Id of the run of `fingerprint`, found or created, now RUNNING: a resumed stage goes on in it.

    Parameters are logged once; those already there are left alone. Raises UserError when the
    server cannot be reached, opened or understood.
    """
    from mlflow.entities import Param

    with user_errors(uri):
        client = connect(uri)
        home = experiment_id(client, uri, experiment, artifact_root)
    found = client.search_runs(
        [home],
        f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'",
        max_results=1,
        order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
    )
    if found:
        run = found[0]
        client.update_run(run.info.run_id, status="RUNNING")
    else:
        run = client.create_run(home, tags={**tags, FINGERPRINT_TAG: fingerprint}, run_name=name)
    run_id = str(run.info.run_id)
    missing = [Param(k, str(v)) for k, v in params.items() if k not in run.data.params]
    for start in range(0, len(missing), 100):  # MLflow's limit per request
        client.log_batch(run_id, params=missing[start : start + 100])
    return run_id


def finish_run(uri: str, run_id: str, status: str) -> None:
    """Close a run: FINISHED, FAILED or KILLED."""
    connect(uri).set_terminated(run_id, status)


def log_metrics(uri: str, run_id: str, metrics: Mapping[str, float]) -> None:
    """Figures of a whole run."""
    client = connect(uri)
    for name, value in metrics.items():
        client.log_metric(run_id, name, value)


def log_artifacts(uri: str, run_id: str, paths: Sequence[Path]) -> None:
    """Files, or folders under their own name, into the run."""
    client = connect(uri)
    for path in paths:
        if path.is_dir():
            client.log_artifacts(run_id, str(path), artifact_path=path.name)
        else:
            client.log_artifact(run_id, str(path))


def predict(uri: str, model: str, num_samples: int, params: Mapping[str, Any]) -> Any:
    """What the registered model `models:/NAME@ALIAS` (or /VERSION) draws. Raises UserError."""
    with _asked_for(uri, model) as mlflow:
        import pandas as pd  # type: ignore[import-untyped]

        loaded = mlflow.pyfunc.load_model(model)
        return loaded.predict(pd.DataFrame({"num_samples": [num_samples]}), params=dict(params))


def download_model(uri: str, model: str, folder: Path) -> Path:
    """The files of `models:/NAME@ALIAS` (or /VERSION) below `folder`. Raises UserError."""
    with _asked_for(uri, model) as mlflow:
        return Path(mlflow.artifacts.download_artifacts(model, dst_path=str(folder)))


@contextmanager
def _asked_for(uri: str, model: str) -> Iterator[Any]:
    """MLflow, whose own functions on a registered model take no argument for the server."""
    with user_errors(uri):
        connect(uri)
        import mlflow
        from mlflow.exceptions import MlflowException

        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        try:
            yield mlflow
        except MlflowException as error:
            # The server answers well: there is no such model, or the model refuses the request.
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UserError(f"{model}: {error.message.splitlines()[0]}") from error


class MetricWriter:
    """Metrics of a training loop, written in batches by a thread; `log` never waits nor raises.

    The step of a metric is images seen. What the run already holds is not logged again, so a
    resumed stage leaves one point per step: a floor `after`, and per metric the last point found.
    A tracking server that fails costs metrics, never training: one warning, then retries.

    `run` is a run's id, or a function that opens it: called in the thread, since importing mlflow
    and finding a run take seconds a training step should not wait for. A run opened here is also
    ended here, as FINISHED, or as FAILED when the block raised.
    """

    def __init__(
        self,
        uri: str,
        run: str | Callable[[], str],
        *,
        after: int = 0,
        enabled: bool = True,
        interval: float = 2.0,
        deadline: float = 30.0,
    ) -> None:
        self._uri, self._run, self._after = uri, run, after
        self._status = "FINISHED"
        self._interval, self._deadline = interval, deadline
        self._queue: queue.SimpleQueue[tuple[int, int, dict[str, float]]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._pending: list[Metric] = []
        self.failures = 0
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._enabled = enabled
        if enabled:
            self._thread.start()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._status = "FAILED"
        self.close()

    def log(self, images: int, metrics: Mapping[str, float]) -> None:
        """Queue values at `images` seen."""
        if self._enabled and images > self._after:
            self._queue.put((images, int(time.time() * 1000), dict(metrics)))

    def close(self, status: str | None = None) -> None:
        """Write what is queued, within the deadline; what is then left is lost, with a warning.

        `status` is how a run that was opened here ends, if not as FINISHED.
        """
        if not self._enabled or self._closing.is_set():
            return
        self._status = status or self._status
        self._closing.set()
        self._thread.join(self._deadline)
        left = len(self._pending) + self._queue.qsize()
        if left:
            _log.warning("%d metric records did not reach the tracking server", left)

    def _work(self) -> None:
        client: MlflowClient | None = None
        run_id = ""
        last: dict[str, int] = {}
        end = math.inf
        while True:
            stopping = self._closing.wait(min(self._interval * 2 ** min(self.failures, 5), 60.0))
            end = min(end, time.monotonic() + self._deadline) if stopping else math.inf
            try:
                if client is None:
                    run_id = self._run if isinstance(self._run, str) else self._run()
                    client = connect(self._uri)
                    last = _last_steps(client, run_id)
                self._drain(last)
                while self._pending:
                    client.log_batch(run_id, metrics=self._pending[:1000])
                    del self._pending[:1000]
                self.failures = 0
                if stopping and self._queue.empty():
                    if not isinstance(self._run, str):
                        client.set_terminated(run_id, self._status)
                    return
            except Exception as error:  # whatever ails the server, training goes on
                self.failures += 1
                if self.failures == 1:
                    said = _said(error)
                    _log.warning("metrics are kept back, the tracking server fails: %s", said)
                if stopping:
                    if time.monotonic() > end:
                        return
                    time.sleep(min(self._interval, 1.0))

    def _drain(self, last: Mapping[str, int]) -> None:
        from mlflow.entities import Metric

        while not self._queue.empty():
            images, stamp, metrics = self._queue.get()
            for key, value in metrics.items():
                name = re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)
                if images > last.get(name, self._after):
                    self._pending.append(Metric(name, float(value), stamp, images))


def _last_steps(client: "MlflowClient", run_id: str) -> dict[str, int]:
    """Metric name -> last step the run holds."""
    return {
        name: max(point.step for point in client.get_metric_history(run_id, name))
        for name in client.get_run(run_id).data.metrics
    }
