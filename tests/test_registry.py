"""The registry on a real MLflow sqlite store: exactly one version, and aliases that move safely."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra import registry, tracking
from infra.errors import UserError
from infra.gate import Measurement, Rule
from infra.registry import Registration

REPO = Path(__file__).parents[1]
NAME, ALIAS = "tiny.digits", "champion"
PROTOCOL = {"extractor": "domain", "samples": 2_000, "seed_blocks": 1, "steps": 1}
OTHER = {**PROTOCOL, "samples": 4_000}  # another protocol
RULE = Rule(max_distance=None, allow_proxy=True)


def measured(*values: float, **changes: Any) -> Measurement:
    """In percent, by the proxy of the quickstart."""
    given: dict[str, Any] = {
        "name": "fd_domain_2k",
        "unit": "%",
        "protocol": {**PROTOCOL, "seed_blocks": len(values)},
        "secondary": {},
    }
    return Measurement(values=values, **{**given, **changes})


def write_model(folder: Path, seed: int = 0) -> str:
    """A consistency model of about a thousand weights; returns the sha256 of the weights file."""
    import hashlib

    import torch
    from safetensors.torch import save_file

    from consistency import published
    from consistency.config import NetworkConfig, NoiseConfig

    about = published.ModelDescription(
        kind="consistency",
        network=NetworkConfig(
            channels=4, channel_mult=(1,), num_blocks=1, attention=(), class_conditional=True
        ),
        noise=NoiseConfig(),
        size=8,
        channels=1,
        class_names=("zero", "one", "two"),
        mid_sigma=5.0,
    )
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key: 0.1 * torch.randn(value.shape, generator=generator)
        for key, value in published.build_network(about).state_dict().items()
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "weights.safetensors")
    (folder / "config.json").write_text(about.to_json())
    return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the schema, and a model folder."""
    folder = tmp_path_factory.mktemp("template")
    uri = tracking.default_tracking_uri(str(folder))
    tracking.open_run(uri, "empty", "empty", "empty", None, {}, {})
    write_model(folder / "distill", seed=1)
    return folder


@dataclass
class Place:
    """One case: a workspace of its own, and `register_model` with everything filled in."""

    workspace: Path
    models: Path

    @property
    def uri(self) -> str:
        return tracking.default_tracking_uri(str(self.workspace))

    def register(
        self, digest: str = "d1", *values: float, run: str | None = None, **changes: Any
    ) -> Registration:
        """`values` of a measurement that needs no more; `run`: fingerprint, else the digest."""
        from consistency.published import ModelDescription
        from pipelines.steps import register

        if values:
            changes["measurement"] = measured(*values)
        root = tracking.artifact_root(str(self.workspace))
        run_id = self.run_id(run or digest)
        scratch = Path(tempfile.mkdtemp(dir=self.workspace))
        text = (self.models / "distill" / "config.json").read_text()
        package = register.package(
            scratch,
            self.models / "distill" / "weights.safetensors",
            ModelDescription.from_json(text),
            "# a card",
        )
        given = {
            "experiment": "tiny",
            "artifact_root": root,
            "run_id": run_id,
            "name": NAME,
            "alias": ALIAS,
            "digest": digest,
            "measurement": measured(2.0),
            "rule": RULE,
            "package": package,
            "tags": {"cmforge.recipe": "tiny"},
            "metrics": {"fd_domain/steps_1": 2.0},
        }
        return registry.register_model(self.uri, **{**given, **changes})

    def run_id(self, fingerprint: str) -> str:
        root = tracking.artifact_root(str(self.workspace))
        return tracking.open_run(self.uri, "tiny", "register", fingerprint, root, {}, {})

    def record(self, fingerprint: str) -> dict[str, Any] | None:
        """decision.json of that run."""
        runs = self.workspace / "mlartifacts" / self.run_id(fingerprint)
        path = runs / "artifacts" / registry.RECORD
        return json.loads(path.read_text()) if path.exists() else None

    def tags(self, version: int) -> dict[str, str]:
        return dict(tracking.connect(self.uri).get_model_version(NAME, str(version)).tags)

    def versions(self) -> list[tuple[int, str]]:
        found = tracking.connect(self.uri).search_model_versions(f"name = '{NAME}'")
        return sorted((int(v.version), v.tags[registry.DIGEST_TAG]) for v in found)

    def aliases(self) -> dict[str, int]:
        aliases = tracking.connect(self.uri).get_registered_model(NAME).aliases
        return {alias: int(version) for alias, version in aliases.items()}

    def logged_models(self) -> list[Any]:
        client = tracking.connect(self.uri)
        home = client.get_experiment_by_name("tiny")
        assert home is not None
        return list(client.search_logged_models([home.experiment_id]))

    def load(self, version: int | str = f"@{ALIAS}") -> Any:
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        tail = version if isinstance(version, str) else f"/{version}"
        return mlflow.pyfunc.load_model(f"models:/{NAME}{tail}")

    def assert_exactly_one(self) -> None:
        """One version, which holds the alias, whose one READY model loads; all links once."""
        client = tracking.connect(self.uri)
        assert self.versions() == [(1, "d1")]
        assert self.aliases() == {ALIAS: 1}
        (model,) = self.logged_models()
        assert str(model.status) == "READY"
        assert client.get_model_version(NAME, "1").source == f"models:/{model.model_id}"
        outputs = client.get_run(model.source_run_id).outputs
        assert [output.model_id for output in outputs.model_outputs] == [model.model_id]
        history = client.get_metric_history(model.source_run_id, "fd_domain/steps_1")
        assert [point.value for point in history] == [2.0]
        assert registry.verify_registered(self.uri, NAME, 1, "d1")


@pytest.fixture
def place(template: Path, tmp_path: Path) -> Place:
    shutil.copy(template / "mlflow.db", tmp_path / "mlflow.db")
    return Place(tmp_path, template)


class Crash(BaseException):
    """Not an Exception: nothing may catch it on the way."""


class CrashingClient:
    """An MlflowClient that dies right after its write number `fatal`.

    Reads are not counted: to die after one is to die after the write before it.
    """

    def __init__(self, client: Any, fatal: int, written: list[str]) -> None:
        self._client, self._fatal, self._written = client, fatal, written

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name.startswith(("get_", "search_", "list_")):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self._written.append(name)
            if len(self._written) > self._fatal:
                raise Crash(name)
            return result

        return call


# --- exactly one ---------------------------------------------------------------------------------


def crashes(
    monkeypatch: pytest.MonkeyPatch, place: Place, saved: Path, act: Callable[[Place], Any]
) -> Iterator[str]:
    """`act` from the same start, dead after its first write, its second, ...: the name of that
    write, and at last "", when it came through."""
    connect = tracking.connect
    shutil.copytree(place.workspace, saved)
    for fatal in range(100):
        died = ""
        monkeypatch.setattr(
            tracking, "connect", lambda uri, f=fatal, s=[]: CrashingClient(connect(uri), f, s)
        )
        try:
            act(place)
        except Crash as crash:
            died = str(crash)
        finally:
            monkeypatch.setattr(tracking, "connect", connect)
        yield died
        if not died:
            return
        shutil.rmtree(place.workspace / "mlartifacts", ignore_errors=True)
        if (saved / "mlartifacts").exists():
            shutil.copytree(saved / "mlartifacts", place.workspace / "mlartifacts")
        with (
            closing(sqlite3.connect(saved / "mlflow.db")) as source,
            closing(sqlite3.connect(place.workspace / "mlflow.db")) as target,
        ):
            source.backup(target)


def test_a_crash_between_every_two_mlflow_calls_leaves_one_version_after_the_rerun(
    place: Place, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[str] = []
    saved = tmp_path_factory.mktemp("saved") / "workspace"
    for died in crashes(monkeypatch, place, saved, Place.register):
        if died:
            reached.append(died)
            assert place.register().version == 1
            place.assert_exactly_one()
            assert place.tags(1)[registry.OUTCOME_TAG] == "champion"
    writes = {
        "create_experiment",
        "create_run",
        "create_logged_model",
        "log_model_artifacts",
        "log_batch",
        "log_outputs",
        "finalize_logged_model",
        "create_registered_model",
        "create_model_version",
        "log_text",
        "set_registered_model_alias",
        "set_model_version_tag",
    }
    assert writes <= set(reached)
    place.assert_exactly_one()  # the last case did not crash at all
    assert place.load().predict({"num_samples": [1]}).shape == (1, 2)


def test_an_upload_cut_short_is_never_taken_for_whole(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = tracking.connect

    class Cut(CrashingClient):
        def __getattr__(self, name: str) -> Any:
            if name != "log_model_artifacts":
                return getattr(self._client, name)

            def half(model_id: str, folder: str) -> None:
                shutil.rmtree(Path(folder) / "artifacts")
                self._client.log_model_artifacts(model_id, folder)
                raise Crash

            return half

    monkeypatch.setattr(tracking, "connect", lambda uri: Cut(connect(uri), 0, []))
    with pytest.raises(Crash):
        place.register()
    monkeypatch.setattr(tracking, "connect", connect)
    assert not registry.verify_registered(place.uri, NAME, 1, "d1")
    place.register()
    place.assert_exactly_one()
    assert len(place.load().predict({"num_samples": [2]})) == 2


def test_a_process_killed_before_the_version_is_made_up_for(place: Place) -> None:
    """os._exit: no finally, no destructors."""
    code = textwrap.dedent(
        """
        import os, sys
        sys.path.insert(0, "tests")
        from pathlib import Path
        from infra import registry
        from test_registry import Place
        registry._create_version = lambda *args: os._exit(9)
        Place(Path(sys.argv[1]), Path(sys.argv[2])).register()
        """
    )
    arguments = [sys.executable, "-c", code, str(place.workspace), str(place.models)]
    assert subprocess.run(arguments, cwd=REPO, env=os.environ).returncode == 9
    place.register()
    place.assert_exactly_one()


def test_the_same_model_twice_is_one_version_and_changes_nothing(place: Place) -> None:
    first, second = place.register(), place.register()
    reason = "version 1 is champion by a proxy: the first one (fd_domain_2k 2.00 %)"
    assert first == Registration(version=1, outcome="champion", decision=reason)
    assert second == first  # as if an attempt that died in between had told it
    assert first.holds_alias
    place.assert_exactly_one()
    # What gave it the alias stays on record.
    assert place.tags(1)[registry.DECISION_TAG] == reason
    record = place.record("d1")
    assert record is not None
    assert record["reason"] == reason


def test_every_run_that_registers_a_version_has_its_record(place: Place) -> None:
    place.register()
    again = place.register(run="another recipe")
    record = place.record("another recipe")
    assert record is not None
    assert record["reason"] == again.decision
    assert place.versions() == [(1, "d1")]


def test_a_lost_race_leaves_the_lower_version(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process registers the same digest after we looked and before we created."""
    original, calls = registry._create_version, iter([True])

    def create(*args: Any) -> Any:
        if next(calls, False):
            assert place.register().version == 1
        return original(*args)

    monkeypatch.setattr(registry, "_create_version", create)
    assert place.register().version == 1
    place.assert_exactly_one()


def test_files_lost_from_the_store_come_back_below_the_same_version(place: Place) -> None:
    place.register()
    (model,) = place.logged_models()
    shutil.rmtree(place.workspace / "mlartifacts" / "models")
    assert not registry.verify_registered(place.uri, NAME, 1, "d1")
    place.register()
    place.assert_exactly_one()
    assert place.logged_models()[0].model_id == model.model_id
    assert place.load().predict({"num_samples": [1]}).shape == (1, 2)


def test_a_version_whose_model_was_deleted_for_good_is_replaced(place: Place) -> None:
    place.register()
    (model,) = place.logged_models()
    tracking.connect(place.uri).delete_logged_model(model.model_id)
    shutil.rmtree(place.workspace / "mlartifacts" / "models")
    assert not registry.verify_registered(place.uri, NAME, 1, "d1")
    again = place.register()
    assert (again.version, again.holds_alias) == (2, True)
    assert place.versions() == [(2, "d1")]
    assert place.load().predict({"num_samples": [1]}).shape == (1, 2)


def test_verify_asks_for_name_version_and_digest(place: Place) -> None:
    assert not registry.verify_registered(place.uri, NAME, 1, "d1")
    place.register()
    client = tracking.connect(place.uri)
    for fast in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not fast:  # the way every other store is asked
                patch.setattr(tracking, "sqlite_path", lambda uri: None)
                patch.setattr(tracking, "connect", lambda uri: client)
            assert registry.verify_registered(place.uri, NAME, 1, "d1")
            assert not registry.verify_registered(place.uri, NAME, 1, "d2")
            assert not registry.verify_registered(place.uri, NAME, 2, "d1")
            assert not registry.verify_registered(place.uri, "other", 1, "d1")
    tracking.connect(place.uri).delete_model_version(NAME, "1")
    assert not registry.verify_registered(place.uri, NAME, 1, "d1")
    (place.workspace / "mlflow.db").unlink()
    assert not registry.verify_registered(place.uri, NAME, 1, "d1")
    assert not (place.workspace / "mlflow.db").exists()


def test_a_server_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"^tracking server http://127\.0\.0\.1:9: ") as caught:
        registry.verify_registered("http://127.0.0.1:9", NAME, 1, "d1")
    assert "\n" not in str(caught.value)


def test_a_server_holds_one_version_that_loads_by_its_alias(template: Path, tmp_path: Path) -> None:
    """Servers check what a database takes as it comes: where a version says it is from."""
    from tests.chaos.served import Registry

    class Served(Place):
        @property
        def uri(self) -> str:
            return server.uri

    with Registry(tmp_path / "server") as server:
        place = Served(tmp_path, template)
        # On the server's own disk, which only it can reach.
        first = place.register(artifact_root=None)
        assert place.register(artifact_root=None) == first
        assert (first.version, first.outcome) == (1, "champion")
        place.assert_exactly_one()
        assert registry.verify_registered(server.uri, NAME, 1, "d1")
        drawn = tracking.predict(server.uri, f"models:/{NAME}@{ALIAS}", 2, {"steps": 1})
        assert len(drawn) == 2


def test_a_moved_workspace_is_refused_before_anything_is_registered(
    place: Place, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place.register()
    moved = tmp_path_factory.mktemp("moved") / "workspace"
    shutil.move(place.workspace, moved)
    assert not registry.verify_registered(Place(moved, place.models).uri, NAME, 1, "d1")
    with pytest.raises(UserError, match="workspace was moved or copied; move it back"):
        Place(moved, place.models).register("d2")
    assert not place.workspace.exists()


# --- what is recorded ----------------------------------------------------------------------------


def test_the_version_carries_what_its_decision_rests_on(place: Place) -> None:
    protocol = {**PROTOCOL, "samples": 50_000, "n_reference": None, "seed_blocks": 2}
    fid = measured(3.5, 3.25, name="fid50k", unit="", protocol=protocol, secondary={"kid": 0.5})
    place.register("d1", measurement=fid)
    tags = place.tags(1)
    assert tags["cmforge.metric"] == "fid50k"
    assert tags["cmforge.gate"] == "fid"
    assert tags["cmforge.unit"] == ""
    assert json.loads(tags["cmforge.values"]) == [3.5, 3.25]
    assert json.loads(tags["cmforge.protocol"]) == protocol
    assert json.loads(tags["cmforge.secondary"]) == {"kid": 0.5}
    assert tags["cmforge.outcome"] == "champion"
    assert tags["cmforge.decision"] == "version 1 is champion: the first one (fid50k 3.375)"
    assert tags["cmforge.recipe"] == "tiny"
    place.register("d2", 3.0, tags={"cmforge.metric": "the caller's"})
    assert place.tags(2)["cmforge.gate"] == "proxy"
    assert place.tags(2)["cmforge.metric"] == "fd_domain_2k"


def test_the_record_holds_both_standings_the_rule_and_the_outcome(place: Place) -> None:
    place.register("d1", 3.0)
    decided = place.register("d2", 2.0, rule=Rule(max_distance=9.0, allow_proxy=True))
    common = {"metric": "fd_domain_2k", "unit": "%", "protocol": PROTOCOL, "secondary": {}}
    assert place.record("d2") == {
        "model": NAME,
        "alias": ALIAS,
        "outcome": "champion",
        "reason": decided.decision,
        "rule": {"max_distance": 9.0, "allow_proxy": True},
        "candidate": {"version": 2, "values": [2.0], **common},
        "champion": {"version": 1, "values": [3.0], **common},
    }
    first = place.record("d1")
    assert first is not None
    assert first["champion"] is None


def test_numbers_that_are_not_finite_are_recorded_as_strict_json(place: Place) -> None:
    bad = measured(float("nan"), float("inf"), secondary={"kid": float("nan")})
    assert place.register("d1", measurement=bad).outcome == "refused"
    record = place.record("d1")
    assert record is not None
    assert record["candidate"]["values"] == [None, None]
    assert json.loads(place.tags(1)["cmforge.values"]) == [None, None]
    assert json.loads(place.tags(1)["cmforge.secondary"]) == {"kid": None}
    # Held by hand: a champion whose values are not finite compares with nothing.
    tracking.connect(place.uri).set_registered_model_alias(NAME, ALIAS, "1")
    better = measured(1.0, 1.0)
    assert "its distance is not finite" in place.register("d2", measurement=better).decision


def test_a_long_protocol_fits_into_the_tags(place: Place) -> None:
    protocols = [{**PROTOCOL, **{f"field {i}": c * 64 for i in range(100)}} for c in "ab"]
    place.register("d1", measurement=measured(3.0, protocol=protocols[0]))
    decided = place.register("d2", measurement=measured(1.0, protocol=protocols[1]))
    assert decided.outcome == "no decision"
    assert "field 99: bbbbbbbbbbbb and aaaaaaaaaaaa" in decided.decision
    assert place.tags(2)[registry.DECISION_TAG] == decided.decision


# --- aliases -------------------------------------------------------------------------------------


def test_the_alias_follows_the_best_model_of_one_protocol(place: Place) -> None:
    strict = Rule(max_distance=2.0, allow_proxy=True)
    assert place.register("d1", 3.0, rule=strict).holds_alias is False
    assert place.aliases() == {}
    assert place.register("d2", 1.5).holds_alias
    assert place.register("d3", 1.6).outcome == "refused"
    assert place.aliases() == {ALIAS: 2}
    other = {"measurement": measured(0.5, protocol=OTHER)}
    undecided = place.register("d4", **other)
    assert undecided.outcome == "no decision"
    assert not undecided.holds_alias
    assert "(samples: 4000 and 2000)" in undecided.decision
    # Only the champion evaluated anew under that protocol makes the two comparable.
    anew = place.register("d2", run="anew", measurement=measured(0.9, protocol=OTHER))
    assert anew.version == 2
    tags = place.tags(2)
    assert json.loads(tags[registry.VALUES_TAG]) == [0.9]
    assert json.loads(tags[registry.PROTOCOL_TAG]) == OTHER
    assert tags[registry.DECISION_TAG] == anew.decision
    assert tags[registry.DECISION_TAG].startswith("version 2 already is champion")
    moved = place.register("d4", **other)
    assert moved.decision.startswith("version 4 is champion by a proxy: fd_domain_2k 0.50 % beats")
    assert place.aliases() == {ALIAS: 4}
    assert place.tags(4)[registry.DECISION_TAG] == moved.decision
    assert place.versions() == [(1, "d1"), (2, "d2"), (3, "d3"), (4, "d4")]


def test_a_proxy_moves_no_alias_unless_the_recipe_allows_it(place: Place) -> None:
    decided = place.register("d1", 1.0, rule=Rule(max_distance=None, allow_proxy=False))
    assert decided.outcome == "no decision"
    assert place.aliases() == {}
    assert place.register("d1", 1.0).outcome == "champion"
    assert place.aliases() == {ALIAS: 1}


def test_the_challenger_alias_follows_the_decisions(place: Place) -> None:
    place.register("d1", 4.0)
    assert place.register("d2", 3.99).outcome == "challenger"
    assert place.aliases() == {ALIAS: 1, "challenger": 2}
    assert place.register("d3", 4.01).outcome == "challenger"  # the last one has it
    assert place.aliases() == {ALIAS: 1, "challenger": 3}
    assert place.register("d4", 9.0).outcome == "refused"
    undecided = measured(1.0, protocol=OTHER)
    assert place.register("d3", measurement=undecided).outcome == "no decision"
    assert place.aliases() == {ALIAS: 1, "challenger": 3}
    assert place.register("d3", 9.0).outcome == "refused"
    assert place.aliases() == {ALIAS: 1}
    assert place.register("d2", 3.98).outcome == "challenger"
    assert place.register("d2", 2.0).outcome == "champion"
    assert place.aliases() == {ALIAS: 2}
    # The old champion and its values stay as they were.
    assert json.loads(place.tags(1)[registry.VALUES_TAG]) == [4.0]


def test_a_recipe_whose_own_alias_is_challenger_has_no_other(place: Place) -> None:
    place.register("d1", 4.0, alias="challenger")
    assert place.register("d2", 3.99, alias="challenger").outcome == "challenger"
    assert place.aliases() == {"challenger": 1}
    assert place.register("d1", 9.0, alias="challenger").holds_alias
    assert place.register("d2", 3.0, alias="challenger").holds_alias
    assert place.aliases() == {"challenger": 2}


def test_a_champion_of_an_earlier_cmforge_has_nothing_to_compare_with(place: Place) -> None:
    place.register("d1", 4.0)
    client = tracking.connect(place.uri)
    for key in place.tags(1):
        if key not in (registry.DIGEST_TAG, registry.METRIC_TAG):
            client.delete_model_version_tag(NAME, "1", key)
    client.set_model_version_tag(NAME, "1", "cmforge.distance", "9.0")
    decided = place.register("d2", 1.0)
    assert decided.outcome == "no decision"
    assert decided.decision == (
        "no decision on version 2, version 1 stays champion: it has no recorded values to compare "
        "with; register version 1 again under this recipe, or compare with: cmforge compare "
        f"models:/{NAME}@champion models:/{NAME}/2"
    )
    place.register("d1", 4.0)
    assert place.register("d2", 1.0).holds_alias


def test_a_version_promoted_by_hand_keeps_the_alias_and_says_so(place: Place) -> None:
    place.register("d1", 4.0)
    place.register("d2", 3.99)
    tracking.connect(place.uri).set_registered_model_alias(NAME, ALIAS, "2")
    again = place.register("d2", 3.99)
    assert again.decision.startswith("version 2 already is champion")
    assert place.tags(2)[registry.DECISION_TAG] == again.decision
    assert place.aliases() == {ALIAS: 2}


def test_a_crash_shows_no_value_under_a_wrong_protocol_and_no_alias_without_its_record(
    place: Place, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A challenger evaluated anew, under another protocol, becomes champion."""
    place.register("d1", 4.0)
    place.register("d2", 3.99)
    place.register("d1", run="other", measurement=measured(4.0, protocol=OTHER))
    assert place.aliases() == {ALIAS: 1, "challenger": 2}

    def act(place: Place) -> Registration:
        return place.register("d2", run="anew", measurement=measured(2.0, protocol=OTHER))

    reached = []
    saved = tmp_path_factory.mktemp("saved") / "workspace"
    for died in crashes(monkeypatch, place, saved, act):
        reached.append(died)
        tags, record = place.tags(2), place.record("anew")
        if tags[registry.VALUES_TAG]:
            found = json.loads(tags[registry.VALUES_TAG]), json.loads(tags[registry.PROTOCOL_TAG])
            assert found in (([3.99], PROTOCOL), ([2.0], OTHER))
            if found[0] == [2.0] and tags[registry.DECISION_TAG]:
                assert "2.00 % beats 4.00 %" in tags[registry.DECISION_TAG]
        if place.aliases()[ALIAS] == 2:
            assert record is not None
            assert record["reason"] == tags[registry.DECISION_TAG]
            assert tags[registry.OUTCOME_TAG] == "champion"
        if died:
            assert act(place).holds_alias
            tags, record = place.tags(2), place.record("anew")
        assert place.aliases() == {ALIAS: 2}
        assert record is not None
        assert (record["outcome"], record["candidate"]["values"]) == ("champion", [2.0])
        assert record["reason"] == tags[registry.DECISION_TAG]
        assert tags[registry.OUTCOME_TAG] == "champion"
        assert json.loads(tags[registry.VALUES_TAG]) == [2.0]
        assert json.loads(tags[registry.PROTOCOL_TAG]) == OTHER
        assert place.versions() == [(1, "d1"), (2, "d2")]
    assert {
        "set_model_version_tag",
        "log_text",
        "set_registered_model_alias",
        "delete_registered_model_alias",
        "",
    } <= set(reached)
