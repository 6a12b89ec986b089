# ruff: noqa: TID251
"""MLflow model registry: one version per artifact digest, and the gate that moves the alias.

Every call may be the last one before a crash; the next attempt takes up what it finds. mlflow is
imported inside functions only (seconds).
"""

import json
import math
import sqlite3
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from infra import storage, temporary, tracking
from infra.gate import Decision, Measurement, Outcome, Rule, Standing, decide

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

DIGEST_TAG = "cmforge.digest"
METRIC_TAG = "cmforge.metric"
UNIT_TAG = "cmforge.unit"
VALUES_TAG = "cmforge.values"  # JSON, one per seed block; blank while the others change
PROTOCOL_TAG = "cmforge.protocol"  # JSON
SECONDARY_TAG = "cmforge.secondary"  # JSON
GATE_TAG = "cmforge.gate"  # "fid" or "proxy": what kind of number decided
OUTCOME_TAG = "cmforge.outcome"
DECISION_TAG = "cmforge.decision"  # why, in a sentence

CHALLENGER = "challenger"  # alias of the version that came close last
RECORD = "decision.json"  # artifact of the run


@dataclass(frozen=True, kw_only=True)
class ModelPackage:
    """What travels to a consumer: a models-from-code script and all that it needs."""

    code: Path  # calls mlflow.models.set_model
    packages: tuple[Path, ...]  # folders put on the consumer's import path
    artifacts: Mapping[str, Path]
    requirements: tuple[str, ...]
    inputs: Mapping[str, str]  # column -> MLflow type
    optional_inputs: Mapping[str, str]  # columns that a request may leave out
    params: Mapping[str, tuple[str, float | str]]  # name -> (MLflow type, default)
    card: str  # markdown: README.md of the model, description of the version


@dataclass(frozen=True, kw_only=True)
class Registration:
    """Where a model stands after `register_model`."""

    version: int
    outcome: Outcome
    decision: str  # the reason of the outcome

    @property
    def holds_alias(self) -> bool:
        return self.outcome == "champion"


def register_model(
    uri: str,
    *,
    experiment: str,
    artifact_root: str | None,
    run_id: str,
    name: str,
    alias: str,
    digest: str,
    measurement: Measurement,
    rule: Rule,
    package: ModelPackage,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
) -> Registration:
    """One READY LoggedModel and one version per `digest`, whatever earlier attempts left behind.

    A champion takes `alias`, a challenger the alias "challenger". Call it from one process per
    registry: setting an alias is not compare-and-swap. Raises UserError as
    `tracking.experiment_id` does.
    """
    client = tracking.connect(uri)
    import mlflow

    mlflow.set_tracking_uri(uri)  # a sql registry looks `models:/` up there, not at its own (3.17)
    experiment_id = tracking.experiment_id(client, uri, experiment, artifact_root)
    model_tags = {**tags, DIGEST_TAG: digest}
    measured = _measured_tags(measurement)

    version = next(iter(_versions(client, name, digest)), None)
    if version is None or not _has_files(client, _model_id(version)):
        model = _log_model(client, experiment_id, run_id, name, package, model_tags, metrics)
        if version is not None and _model_id(version) != model.model_id:
            client.delete_model_version(name, str(version.version))  # it can never load again
            version = None
        if version is None:
            every_tag = {**model_tags, **measured}
            version = _create_version(client, name, model.model_id, run_id, package.card, every_tag)
    number = str(version.version)
    if any(version.tags.get(key) != value for key, value in measured.items()):
        # Evaluated anew. In between, no values: they can never be read under the wrong protocol,
        # nor the old decision beside the new values.
        blank = dict.fromkeys((VALUES_TAG, OUTCOME_TAG, DECISION_TAG), "")
        for key, value in (*blank.items(), *measured.items()):
            client.set_model_version_tag(name, number, key, value)

    aliases = client.get_registered_model(name).aliases
    candidate, outcome_before = _standing(client, name, number)
    champion = _standing(client, name, aliases[alias])[0] if alias in aliases else None
    decision = decide(candidate, champion, rule, model=name, alias=alias)
    # What gave a version its alias stays on record when the same run comes by again.
    reason = decision.reason
    if (
        champion is not None
        and champion.version == candidate.version
        and outcome_before == decision.outcome
        and any(file.path == RECORD for file in client.list_artifacts(run_id))
    ):
        # For the caller too: an attempt that died before it told anybody left it here.
        reason = client.get_model_version(name, number).tags.get(DECISION_TAG) or reason
    else:
        record = _record(name, alias, rule, candidate, champion, decision)
        client.log_text(run_id, record, RECORD)  # stored before any alias moves
        client.set_model_version_tag(name, number, DECISION_TAG, reason)
        client.set_model_version_tag(name, number, OUTCOME_TAG, decision.outcome)
    _move_aliases(client, name, alias, number, decision.outcome, aliases)
    return Registration(version=int(number), outcome=decision.outcome, decision=reason)


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


def _measured_tags(measurement: Measurement) -> dict[str, str]:
    """The values come last: in this order they are never written beside another protocol."""
    plain = _plain(measurement)
    return {
        METRIC_TAG: measurement.name,
        UNIT_TAG: measurement.unit,
        GATE_TAG: "proxy" if measurement.is_proxy else "fid",
        PROTOCOL_TAG: json.dumps(plain["protocol"], sort_keys=True),
        SECONDARY_TAG: json.dumps(plain["secondary"], sort_keys=True),
        VALUES_TAG: json.dumps(plain["values"]),
    }


def _plain(measurement: Measurement) -> dict[str, Any]:
    """As strict JSON has it: null for a number that is not finite."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "metric": measurement.name,
        "unit": measurement.unit,
        "values": [finite(value) for value in measurement.values],
        "protocol": dict(measurement.protocol),
        "secondary": {key: finite(value) for key, value in measurement.secondary.items()},
    }


def _standing(client: "MlflowClient", name: str, version: str) -> tuple[Standing, str]:
    """What the registry knows of a version, and how its own decision went ("" for not yet)."""
    tags = client.get_model_version(name, version).tags

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    secondary = json.loads(tags.get(SECONDARY_TAG) or "{}")
    standing = Standing(
        version=int(version),
        name=tags.get(METRIC_TAG, ""),
        unit=tags.get(UNIT_TAG, ""),
        values=tuple(number(value) for value in json.loads(tags.get(VALUES_TAG) or "[]")),
        protocol=json.loads(tags.get(PROTOCOL_TAG) or "{}"),
        secondary={key: number(value) for key, value in secondary.items()},
    )
    return standing, tags.get(OUTCOME_TAG, "")


def _record(
    model: str,
    alias: str,
    rule: Rule,
    candidate: Standing,
    champion: Standing | None,
    decision: Decision,
) -> str:
    """All that the decision rests on, as JSON."""
    record = {
        "model": model,
        "alias": alias,
        **asdict(decision),
        "rule": asdict(rule),
        "candidate": {"version": candidate.version, **_plain(candidate)},
        "champion": champion and {"version": champion.version, **_plain(champion)},
    }
    return json.dumps(record, indent=2, allow_nan=False)


def _move_aliases(
    client: "MlflowClient",
    name: str,
    alias: str,
    version: str,
    outcome: Outcome,
    aliases: Mapping[str, Any],
) -> None:
    """`aliases` are those of before: alias -> version."""

    def holds(which: str) -> bool:
        return str(aliases.get(which)) == version

    if outcome == "champion" and not holds(alias):
        client.set_registered_model_alias(name, alias, version)
    if alias == CHALLENGER:
        return  # the recipe's own alias
    if outcome == "challenger" and not holds(CHALLENGER):
        client.set_registered_model_alias(name, CHALLENGER, version)
    elif outcome in ("champion", "refused") and holds(CHALLENGER):
        client.delete_registered_model_alias(name, CHALLENGER)


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
        with tempfile.TemporaryDirectory(dir=temporary.root()) as scratch:
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
        inputs=Schema(
            [
                *(ColSpec(kind, column) for column, kind in package.inputs.items()),
                *(
                    ColSpec(kind, column, required=False)
                    for column, kind in package.optional_inputs.items()
                ),
            ]
        ),
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
        name,
        f"models:/{model_id}",
        run_id,
        tags=dict(tags),
        description=card,
        model_id=model_id,  # a server refuses the source without it (3.17)
    )
    first = _versions(client, name, tags[DIGEST_TAG])[0]
    if int(first.version) != int(mine.version):
        client.delete_model_version(name, str(mine.version))
    return first
