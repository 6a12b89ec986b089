"""The registry on a real MLflow sqlite store: idempotence, the gate, the served model."""

import base64
import io
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from infra import registry, tracking
from infra.errors import UserError
from infra.registry import Registration, Standing, decide
from pipelines.artifacts import Committed, ShardSet, TrainedModel
from pipelines.recipe import RegisterConfig
from pipelines.steps import register

REPO = Path(__file__).parents[1]
NAME, ALIAS = "tiny.digits", "champion"


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
    """A database with the schema, and two model folders."""
    folder = tmp_path_factory.mktemp("template")
    uri = tracking.default_tracking_uri(str(folder))
    tracking.open_run(uri, "empty", "empty", "empty", None, {}, {})
    write_model(folder / "distill", seed=1)
    write_model(folder / "isolate", seed=2)
    return folder


@dataclass
class Place:
    """One case: a workspace of its own, and `register_model` with everything filled in."""

    workspace: Path
    models: Path

    @property
    def uri(self) -> str:
        return tracking.default_tracking_uri(str(self.workspace))

    def register(self, digest: str = "d1", **changes: Any) -> Registration:
        from consistency.published import ModelDescription

        root = tracking.artifact_root(str(self.workspace))
        run_id = tracking.open_run(self.uri, "tiny", "register", digest, root, {}, {})
        scratch = self.workspace / f"scratch-{len(list(self.workspace.iterdir()))}"
        scratch.mkdir()
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
            "distance": 2.0,
            "eval_digest": "e1",
            "max_distance": None,
            "package": package,
            "tags": {"cmforge.recipe": "tiny"},
            "metrics": {"fd_domain/steps_1": 2.0},
        }
        return registry.register_model(self.uri, **{**given, **changes})

    def versions(self) -> list[tuple[int, str]]:
        found = tracking.connect(self.uri).search_model_versions(f"name = '{NAME}'")
        return sorted((int(v.version), v.tags[registry.DIGEST_TAG]) for v in found)

    def champion(self) -> int | None:
        aliases = tracking.connect(self.uri).get_registered_model(NAME).aliases
        return int(aliases[ALIAS]) if ALIAS in aliases else None

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
        assert self.champion() == 1
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


def test_a_crash_between_every_two_mlflow_calls_leaves_one_version_after_the_rerun(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = tracking.connect
    reached: list[str] = []
    for fatal in range(100):
        workspace = tmp_path / str(fatal)
        workspace.mkdir()
        shutil.copy(template / "mlflow.db", workspace / "mlflow.db")
        place, seen = Place(workspace, template), []
        monkeypatch.setattr(
            tracking,
            "connect",
            lambda uri, f=fatal, s=seen: CrashingClient(connect(uri), f, s),
        )
        try:
            place.register()
            break
        except Crash as crash:
            reached.append(str(crash))
        finally:
            monkeypatch.setattr(tracking, "connect", connect)
        assert place.register().version == 1
        place.assert_exactly_one()
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
        from test_register import Place
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
    assert first.decision == "version 1 is champion: the first one (2.00 %)"
    assert second == Registration(
        version=1, holds_alias=True, decision="version 1 already is champion (2.00 %)"
    )
    place.assert_exactly_one()


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


def test_a_moved_workspace_is_refused_before_anything_is_registered(
    place: Place, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place.register()
    moved = tmp_path_factory.mktemp("moved") / "workspace"
    shutil.move(place.workspace, moved)
    assert not registry.verify_registered(Place(moved, place.models).uri, NAME, 1, "d1")
    with pytest.raises(UserError, match="workspace was moved or copied; move it back"):
        run_step(Place(moved, place.models), PERCENTS)
    assert not place.workspace.exists()


# --- the gate ------------------------------------------------------------------------------------


def standing(version: int, distance: float | None, protocol: str = "e1") -> Standing:
    return Standing(version=version, distance=distance, eval_digest=protocol)


@pytest.mark.parametrize(
    ("candidate", "champion", "bound", "moves", "says"),
    [
        (standing(1, 3.0), None, None, True, "the first one"),
        (standing(2, 1.2), standing(1, 3.0), None, True, "1.20 % beats 3.00 % of version 1"),
        (standing(2, 3.1), standing(1, 3.0), None, False, "version 1 stays champion: 3.10 % does"),
        (standing(2, 3.0), standing(1, 3.0), None, False, "does not beat"),
        (standing(2, 1.2), standing(1, 3.0, "e2"), None, False, "evaluated in another way"),
        (standing(2, 1.2), standing(1, None), None, False, "no recorded distance"),
        (standing(1, 3.0), standing(1, 3.0), None, True, "already is champion"),
        (standing(1, 3.0), standing(1, 9.0, "e2"), 4.0, True, "already is champion (3.00 %)"),
        (
            *(standing(1, 3.0), standing(1, 3.0), 1.0, True),
            "version 1 is still champion, which nothing replaces, although 3.00 % is above",
        ),
        (
            *(standing(1, float("nan")), standing(1, 3.0), None, True),
            "version 1 is still champion, which nothing replaces, although its distance is not",
        ),
        (standing(1, 3.0), None, 2.0, False, "3.00 % is above max_distance 2 %"),
        (standing(1, 2.0), None, 2.0, True, "the first one"),
        (standing(2, 2.5), standing(1, 3.0), 2.0, False, "above max_distance"),
        (standing(1, float("nan")), None, None, False, "not finite"),
        (standing(2, float("inf")), standing(1, 3.0), None, False, "not finite"),
        (standing(2, 1.0), standing(1, float("nan")), None, False, "does not beat"),
    ],
)
def test_the_gate(
    candidate: Standing, champion: Standing | None, bound: float | None, moves: bool, says: str
) -> None:
    holds, decision = decide(candidate, champion, ALIAS, bound)
    assert holds is moves
    assert says in decision


def test_the_alias_follows_the_best_model_of_one_protocol(place: Place) -> None:
    client = tracking.connect(place.uri)
    assert place.register("d1", distance=3.0, max_distance=2.0).holds_alias is False
    assert place.champion() is None
    assert place.register("d2", distance=1.5).holds_alias
    assert not place.register("d3", distance=1.6).holds_alias
    assert place.champion() == 2
    assert not place.register("d4", distance=0.5, eval_digest="e2").holds_alias
    # Only the champion evaluated anew under e2 makes the two comparable.
    assert place.register("d2", distance=0.9, eval_digest="e2").version == 2
    tags = client.get_model_version(NAME, "2").tags
    assert (tags[registry.DISTANCE_TAG], tags[registry.EVAL_TAG]) == ("0.9", "e2")
    moved = place.register("d4", distance=0.5, eval_digest="e2")
    assert moved.decision == "version 4 is champion: 0.50 % beats 0.90 % of version 2"
    assert place.champion() == 4
    assert client.get_model_version(NAME, "4").tags[registry.DECISION_TAG] == moved.decision
    assert place.versions() == [(1, "d1"), (2, "d2"), (3, "d3"), (4, "d4")]


# --- what is served ------------------------------------------------------------------------------


def test_the_served_model_draws_what_the_library_draws(place: Place) -> None:
    from PIL import Image

    from consistency import published

    place.register()
    served = place.load()
    truth = published.load(place.models / "distill")
    for steps, label in ((1, -1), (2, 1)):
        params = {"steps": steps, "seed": 7, "class": label}
        pixels = served.predict({"num_samples": [5]}, params={**params, "output": "uint8"})
        expected = truth.generate(
            range(5), steps=steps, seed=7, label=None if label == -1 else label
        )
        np.testing.assert_array_equal(pixels, expected)
        table = served.predict({"num_samples": [5]}, params=params)
        decoded = [Image.open(io.BytesIO(base64.b64decode(text))) for text in table["png_base64"]]
        np.testing.assert_array_equal(np.stack(decoded), expected[..., 0])
        names = ["zero", "one", "two", "zero", "one"] if label == -1 else ["one"] * 5
        assert list(table["class"]) == names
    assert expected.std() > 2  # images, not a constant


def test_colour_images_become_colour_pngs(place: Place) -> None:
    from PIL import Image

    place.register()
    encode = sys.modules[type(place.load().unwrap_python_model()).__module__].encode_png
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode(image)))), image)


@pytest.mark.parametrize(
    ("rows", "params", "says"),
    [
        ([0], {}, "num_samples: 0 is not in 1 to 10000"),
        ([10_001], {}, "num_samples: 10001 is not in"),
        ([1, 2], {}, "exactly one row, not 2"),
        ([1], {"steps": 0}, "steps: 0 is not in 1 to 1000"),
        ([1], {"class": 3}, r"class: 3 is not a class of this model \(0 to 2, or -1 for all\)"),
        ([1], {"class": -2}, "class: -2"),
        ([1], {"output": "jpeg"}, "output: 'jpeg' is not one of png_base64, uint8"),
        ([1], {"steps": 1.5}, "steps"),
    ],
)
def test_a_wrong_request_is_refused_in_plain_words(
    served: Any, rows: list[int], params: dict[str, Any], says: str
) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=says) as caught:
        served.predict({"num_samples": rows}, params=params)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


@pytest.fixture(scope="module")
def served(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    workspace = tmp_path_factory.mktemp("served")
    shutil.copy(template / "mlflow.db", workspace / "mlflow.db")
    place = Place(workspace, template)
    place.register()
    return place.load()


def test_the_saved_folder_names_nothing_of_this_machine(place: Place) -> None:
    place.register()
    (folder,) = (p.parent for p in place.workspace.rglob("MLmodel"))
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"MLmodel", "README.md", "served_model.py", "artifacts/weights.pt"} <= names
    assert "code/consistency/published.py" in names
    assert not any("__pycache__" in name or name.endswith(".lock") for name in names)
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".pt":
            text = path.read_text()
            for private in (str(REPO), str(place.workspace), str(Path.home()), "/tmp/"):
                assert private not in text or private == "/", (path.name, private)
    listed = (folder / "requirements.txt").read_text().split()
    assert [Requirement(text) for text in listed] == [Requirement(r) for r in register.REQUIREMENTS]


# --- the step ------------------------------------------------------------------------------------


def run_step(
    place: Place,
    percents: dict[tuple[str, int], float],
    prefix: str = "",
    mid_sigma: float = 0.821,
    **wanted: Any,
) -> Any:
    """The register step on the two model folders of the template; `prefix` of the step names."""
    import hashlib

    def committed(step: str, value: Any) -> Any:
        return Committed(step=step, fingerprint=step[0] * 64, url="", seconds=0.0, value=value)

    def trained(name: str) -> TrainedModel:
        data = (place.models / name / "weights.safetensors").read_bytes()
        return TrainedModel(
            kind="consistency",
            images=1,
            steps=1,
            parameters=1,
            final_loss=0.0,
            train_seconds=0.0,
            weights_sha256=hashlib.sha256(data).hexdigest(),
            ema="power-0.1",
        )

    def fetch(source: Any, name: str) -> Path:
        if source.step != "evaluate":
            return place.models / source.step.removeprefix(prefix) / name
        (place.workspace / name).write_bytes(b"png")
        return place.workspace / name

    shard = ShardSet(
        count=10,
        size=8,
        channels=1,
        class_names=("zero", "one", "two"),
        num_shards=1,
        bytes=1,
        pixel_digest="p" * 64,
        manifest_sha256="m" * 64,
    )
    scores = [score(name, steps, value) for (name, steps), value in percents.items()]
    found = evaluation(*scores, mid_sigma=mid_sigma)
    ctx: Any = SimpleNamespace(
        step="register",
        fingerprint="r" * 64,
        workspace=str(place.workspace),
        tracking_uri=place.uri,
        experiment="tiny",
        fetch=fetch,
    )
    return register.run(
        ctx,
        register.RegisterStage(
            register=RegisterConfig(**{"model": NAME, "allow_proxy": True, **wanted}), recipe="tiny", registry="workspace"
        ),
        shard=committed("shard", shard),
        teacher=committed("teacher", trained("distill")),
        evaluate=committed("evaluate", found),
        distill=committed(f"{prefix}distill", trained("distill")),
        isolate=committed(f"{prefix}isolate", trained("isolate")),
    )


PERCENTS = {("distill", 1): 2.5, ("distill", 2): 0.7, ("isolate", 1): 0.9, ("isolate", 2): 0.8}


def test_the_step_registers_the_better_candidate_with_its_lineage(place: Place) -> None:
    value = run_step(place, PERCENTS)
    assert (value.candidate, value.version, value.alias) == ("isolate", 1, ALIAS)
    assert (value.metric, value.value) == ("fd_domain_100", 0.9)
    version = tracking.connect(place.uri).get_model_version(NAME, "1")
    assert version.tags["cmforge.fingerprint.isolate"] == "i" * 64
    assert version.tags["cmforge.dataset_digest"] == "p" * 64
    assert version.tags["cmforge.fd_domain_100/steps_2"] == "0.8000"
    assert version.tags[registry.DIGEST_TAG] == value.digest
    assert "| 1 | 1 | 100 | 0.90 % |  | 0.90 % |" in version.description
    assert registry.verify_registered(place.uri, NAME, 1, value.digest)
    # Two steps as they were evaluated, not as the folder's default has it.
    assert place.load().unwrap_python_model().model.description.mid_sigma == 0.821
    assert run_step(place, PERCENTS).version == 1
    grids = {p.name for p in (place.workspace / "mlartifacts").rglob("*.png")}
    assert grids == {"distill-1.png", "distill-2.png", "isolate-1.png", "isolate-2.png"}


def test_a_selected_average_is_registered_under_its_candidate(place: Place) -> None:
    value = run_step(place, PERCENTS, prefix="select_ema-")
    assert value.candidate == "isolate"
    version = tracking.connect(place.uri).get_model_version(NAME, "1")
    assert version.tags["cmforge.candidate"] == "isolate"
    assert version.tags["cmforge.fingerprint.select_ema-isolate"] == "s" * 64


def test_another_second_level_is_another_model(place: Place) -> None:
    """The same weights sample differently in two steps, so they are not the same thing."""
    digests = {run_step(place, PERCENTS, mid_sigma=sigma).digest for sigma in (0.821, 2.0)}
    assert len(digests) == 2
    assert place.load(2).unwrap_python_model().model.description.mid_sigma == 2.0


def test_the_step_ranks_by_the_asked_for_number_of_steps(place: Place) -> None:
    value = run_step(place, PERCENTS, steps=2, max_distance=0.5)
    assert (value.candidate, value.value, value.alias) == ("distill", 0.7, None)
    assert value.outcome == "refused"
    assert "0.70 % is above max_distance 0.5 %" in value.decision


def test_a_distance_that_is_not_a_number_never_wins() -> None:
    found = evaluation(score("distill", 1, float("nan")), score("isolate", 1, 900.0))
    assert register.best_candidate(found, ("distill", "isolate"), 1) == "isolate"


def test_the_gate_is_given_the_whole_protocol_and_what_was_measured_beside() -> None:
    weighed = register.measurement(
        score("distill", 2, 0.7, 0.8, secondary={"recall": 0.5}, samples=50_000)
    )
    assert (weighed.name, weighed.unit, weighed.values) == ("fd_domain_50k", "%", (0.7, 0.8))
    assert weighed.secondary == {"recall": 0.5, "evaluations": 2.0}
    said = dict(weighed.protocol)
    assert said["steps"] == 2
    assert said["seed_blocks"] == 2
    assert said["reference"] == "aa" * 32
    assert said["weights_sha256"] == DOMAIN.weights_sha256


def test_a_proxy_moves_no_alias_unless_the_recipe_allows_it(place: Place) -> None:
    value = run_step(place, PERCENTS, allow_proxy=False)
    assert (value.outcome, value.alias) == ("no decision", None)
    assert "register.allow_proxy" in value.decision
    assert run_step(place, PERCENTS).alias == ALIAS
