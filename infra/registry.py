# ruff: noqa: TID251
"""MLflow model registry: one version per artifact digest, and the gate that moves the alias.

Every call may be the last one before a crash; the next attempt takes up what it finds. mlflow is
imported inside functions only (seconds).
"""

import math
import sqlite3
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from infra import storage, tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

DIGEST_TAG = "cmforge.digest"
DISTANCE_TAG = "cmforge.distance"
EVAL_TAG = "cmforge.eval_digest"
DECISION_TAG = "cmforge.decision"


@dataclass(frozen=True, kw_only=True)
class ModelPackage:
    """What travels to a consumer: a models-from-code script and all that it needs."""

    code: Path  # calls mlflow.models.set_model
    packages: tuple[Path, ...]  # folders put on the consumer's import path
    artifacts: Mapping[str, Path]
    requirements: tuple[str, ...]
    inputs: Mapping[str, str]  # column -> MLflow type
    params: Mapping[str, tuple[str, int | str]]  # name -> (MLflow type, default)
    card: str  # markdown: README.md of the model, description of the version


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the gate compares. `distance` in percent, lower is better; None when not recorded."""

    version: int
    distance: float | None
    eval_digest: str


@dataclass(frozen=True, kw_only=True)
class Registration:
    """Where a model stands after `register_model`."""

    version: int
    holds_alias: bool
    decision: str


def decide(
    candidate: Standing, champion: Standing | None, alias: str, bound: float | None
) -> tuple[bool, str]:
    """The gate: does `candidate` hold `alias` from now on, and why.

    The gate gives the alias and never takes it away without a successor: a champion that was
    evaluated anew and fails the absolute checks keeps it, and the text says so.
    """
    distance = math.nan if candidate.distance is None else candidate.distance
    mine, version = f"{distance:.2f} %", f"version {candidate.version}"
    holds = champion is not None and champion.version == candidate.version
    failed = None
    if not math.isfinite(distance):
        failed = "its distance is not finite"
    elif bound is not None and distance > bound:
        failed = f"{mine} is above max_distance {bound:g} %"
    if failed and holds:
        return True, f"{version} is still {alias}, which nothing replaces, although {failed}"
    if failed:
        return False, f"{version} gets no alias: {failed}"
    if holds:
        return True, f"{version} already is {alias} ({mine})"
    if champion is None:
        return True, f"{version} is {alias}: the first one ({mine})"
    holder = f"version {champion.version}"
    if champion.distance is None:
        return False, f"{holder} stays {alias}: it has no recorded distance to compare with"
    if champion.eval_digest != candidate.eval_digest:
        return False, (
            f"{holder} stays {alias}: it was evaluated in another way, "
            f"{mine} cannot be compared with its {champion.distance:.2f} %"
        )
    if distance < champion.distance:
        return True, f"{version} is {alias}: {mine} beats {champion.distance:.2f} % of {holder}"
    return False, f"{holder} stays {alias}: {mine} does not beat its {champion.distance:.2f} %"


def register_model(
    uri: str,
    *,
    experiment: str,
    artifact_root: str | None,
    run_id: str,
    name: str,
    alias: str,
    digest: str,
    distance: float,
    eval_digest: str,
    max_distance: float | None,
    package: ModelPackage,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
) -> Registration:
    """One READY LoggedModel and one version per `digest`, whatever earlier attempts left behind.

    Call it from one process per registry: setting an alias is not compare-and-swap. Raises
    UserError as `tracking.experiment_id` does.
    """
    client = tracking.connect(uri)
    import mlflow

    mlflow.set_tracking_uri(uri)  # a sql registry looks `models:/` up there, not at its own (3.17)
    experiment_id = tracking.experiment_id(client, uri, experiment, artifact_root)
    standing = {DISTANCE_TAG: repr(distance), EVAL_TAG: eval_digest}
    every_tag = {**tags, DIGEST_TAG: digest, **standing}

    version = next(iter(_versions(client, name, digest)), None)
    if version is None or not _has_files(client, _model_id(version)):
        model = _log_model(client, experiment_id, run_id, name, package, every_tag, metrics)
        if version is not None and _model_id(version) != model.model_id:
            client.delete_model_version(name, str(version.version))  # it can never load again
            version = None
        if version is None:
            version = _create_version(client, name, model.model_id, run_id, package.card, every_tag)
    number = int(version.version)
    if any(version.tags.get(key) != value for key, value in standing.items()):
        # Evaluated anew. In between, no distance: it can never be read under the wrong protocol.
        client.set_model_version_tag(name, str(number), DISTANCE_TAG, "")
        client.set_model_version_tag(name, str(number), EVAL_TAG, eval_digest)
        client.set_model_version_tag(name, str(number), DISTANCE_TAG, repr(distance))

    champion = client.get_registered_model(name).aliases.get(alias)
    candidate = Standing(version=number, distance=distance, eval_digest=eval_digest)
    holder = None if champion is None else _standing(client, name, int(champion))
    holds, decision = decide(candidate, holder, alias, max_distance)
    if holds and (holder is None or holder.version != number):
        client.set_registered_model_alias(name, alias, str(number))
    client.set_model_version_tag(name, str(number), DECISION_TAG, decision)
    return Registration(version=number, holds_alias=holds, decision=decision)


def verify_registered(uri: str, name: str, version: int, digest: str) -> bool:
    """Is that version still in the registry, of that digest, with its files?

    Raises UserError when a tracking server cannot be asked.
    """
    database = tracking.sqlite_path(uri)
    if database is not None:
        return _verify_in_sqlite(database, name, version, digest)
    with tracking.user_errors(uri):
        client = tracking.connect(uri)
        found = _versions(client, name, digest)
        return any(int(v.version) == version and _has_files(client, _model_id(v)) for v in found)


def _verify_in_sqlite(database: Path, name: str, version: int, digest: str) -> bool:
    """The same question in milliseconds: importing mlflow takes longer than a cached run may."""
    if not database.exists():
        return False
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as rows:
            found = rows.execute(
                "SELECT v.storage_location FROM model_versions v"
                " JOIN model_version_tags t ON t.name = v.name AND t.version = v.version"
                " WHERE v.name = ? AND v.version = ? AND t.key = ? AND t.value = ?"
                " AND v.current_stage != 'Deleted_Internal'",
                (name, version, DIGEST_TAG, digest),
            ).fetchone()
    except sqlite3.Error:  # no such table: never prepared, or not by this MLflow
        return False
    return found is not None and storage.exists(storage.join(found[0], "MLmodel"))


def _versions(client: "MlflowClient", name: str, digest: str) -> list["ModelVersion"]:
    """Versions of that digest, lowest first."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'")
    return sorted(found, key=lambda version: int(version.version))


def _model_id(version: "ModelVersion") -> str:
    """Of its LoggedModel; read from the source, because search results carry no model_id."""
    return str(version.source).removeprefix("models:/")


def _has_files(client: "MlflowClient", model_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        files = client.list_logged_model_artifacts(model_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return any(file.path == "MLmodel" for file in files)


def _standing(client: "MlflowClient", name: str, version: int) -> Standing:
    tags = client.get_model_version(name, str(version)).tags
    distance = tags.get(DISTANCE_TAG, "")
    return Standing(
        version=version,
        distance=float(distance) if distance else None,
        eval_digest=tags.get(EVAL_TAG, ""),
    )


def _log_model(
    client: "MlflowClient",
    experiment_id: str,
    run_id: str,
    name: str,
    package: ModelPackage,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
) -> "LoggedModel":
    """The READY LoggedModel of this digest: found, or finished from where an attempt ended."""
    from mlflow.entities import LoggedModelOutput, Metric

    def oldest() -> "LoggedModel | None":
        # By status in Python: a status filter is an error on Postgres (MLflow 3.17).
        found = client.search_logged_models(
            [experiment_id], f"tags.`{DIGEST_TAG}` = '{tags[DIGEST_TAG]}'"
        )
        order = [(str(m.status) != "READY", m.creation_timestamp, m.model_id, m) for m in found]
        return min(order, key=lambda item: item[:3])[3] if order else None

    model = oldest()
    if model is None:
        title = name.replace(".", "-")  # dots are legal in a registered name only
        client.create_logged_model(experiment_id, title, run_id, tags=dict(tags))
        model = oldest()
        assert model is not None, tags[DIGEST_TAG]
    ready = str(model.status) == "READY"
    if not ready or not _has_files(client, model.model_id):
        with tempfile.TemporaryDirectory(prefix="cmforge-model-") as scratch:
            folder = Path(scratch) / "model"
            _save(folder, model.model_id, run_id, package)
            # log_model(model_id=...) fails for ever on a model that was once half logged.
            client.log_model_artifacts(model.model_id, str(folder))
        stamp = model.creation_timestamp  # the same in every attempt: MLflow drops exact doubles
        points = [Metric(k, v, stamp, 0, model_id=model.model_id) for k, v in metrics.items()]
        client.log_batch(run_id, metrics=points)
        outputs = client.get_run(run_id).outputs
        linked = [] if outputs is None else [o.model_id for o in outputs.model_outputs]
        if model.model_id not in linked:
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        if not ready:
            model = client.finalize_logged_model(model.model_id, "READY")
    return model


def _save(folder: Path, model_id: str, run_id: str, package: ModelPackage) -> None:
    """Write the model folder, free of this machine's paths."""
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    model = Model(model_id=model_id, model_uuid=model_id, run_id=run_id)
    signature = ModelSignature(
        inputs=Schema([ColSpec(kind, column) for column, kind in package.inputs.items()]),
        params=ParamSchema(
            [ParamSpec(name, kind, value) for name, (kind, value) in package.params.items()]
        ),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input example was not provided")  # no need
        mlflow.pyfunc.save_model(
            folder,
            mlflow_model=model,
            python_model=str(package.code),
            code_paths=[str(path) for path in package.packages],
            artifacts={name: str(path) for name, path in package.artifacts.items()},
            pip_requirements=list(package.requirements),  # inferring them takes 10 s
            signature=signature,
        )
    flavor = model.flavors["python_function"]
    flavor["model_code_path"] = package.code.name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    model.save(str(folder / "MLmodel"))
    (folder / "README.md").write_text(package.card)


def _create_version(
    client: "MlflowClient",
    name: str,
    model_id: str,
    run_id: str,
    card: str,
    tags: Mapping[str, str],
) -> "ModelVersion":
    """The version of this digest; where two processes made one each, the lower one stays."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    mine = client.create_model_version(
        name, f"models:/{model_id}", run_id, tags=dict(tags), description=card
    )
    first = _versions(client, name, tags[DIGEST_TAG])[0]
    if int(first.version) != int(mine.version):
        client.delete_model_version(name, str(mine.version))
    return first
