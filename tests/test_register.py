"""The register step and the served model, on a real MLflow sqlite store."""

import base64
import io
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from consistency import published
from infra import registry, tracking
from pipelines.artifacts import Committed, ShardSet, TrainedModel
from pipelines.recipe import RegisterConfig
from pipelines.steps import register
from tests.scores import DOMAIN, evaluation, score
from tests.test_registry import ALIAS, NAME, Place, write_model

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the schema, and two model folders."""
    folder = tmp_path_factory.mktemp("template")
    uri = tracking.default_tracking_uri(str(folder))
    tracking.open_run(uri, "empty", "empty", "empty", None, {}, {})
    write_model(folder / "distill", seed=1)
    write_model(folder / "isolate", seed=2)
    return folder


@pytest.fixture
def place(template: Path, tmp_path: Path) -> Place:
    shutil.copy(template / "mlflow.db", tmp_path / "mlflow.db")
    return Place(tmp_path, template)


# --- what is served ------------------------------------------------------------------------------


def test_the_served_model_draws_what_the_library_draws(place: Place) -> None:
    from PIL import Image

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
    searched: tuple[tuple[float, ...], ...] = (),
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
            own = place.models / source.step.removeprefix(prefix) / name
            if name != "config.json":
                return own
            about = published.ModelDescription.from_json(own.read_text())
            (place.workspace / name).write_text(replace(about, searched=searched).to_json())
            return place.workspace / name
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
            register=RegisterConfig(**{"model": NAME, "allow_proxy": True, **wanted}),
            recipe="tiny",
            registry="workspace",
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


def test_searched_levels_are_registered_and_served_by_default(place: Place) -> None:
    """Whatever second level the evaluation has for models without any."""
    found = ((80.0, 3.5), (80.0, 3.5, 0.25))
    plain = run_step(place, PERCENTS, mid_sigma=2.0)
    value = run_step(place, PERCENTS, prefix="search_sigmas-", mid_sigma=2.0, searched=found)
    assert (plain.version, value.version) == (1, 2)
    assert plain.digest != value.digest
    model = place.load(2)
    about = model.unwrap_python_model().model.description
    assert (about.mid_sigma, about.searched) == (2.0, found)
    asked = {"num_samples": [4]}
    for levels in found:
        params = {"steps": len(levels), "seed": 0, "output": "uint8"}
        own = published.load(place.models / "isolate").generate(
            range(4), steps=len(levels), seed=0, levels=levels
        )
        assert (np.asarray(model.predict(asked, params=params)) == own).all()


def test_the_card_says_the_levels_of_each_number_of_steps(place: Place) -> None:
    run_step(place, PERCENTS)
    card = tracking.connect(place.uri).get_model_version(NAME, "1").description
    assert "| 1 | 1 | 100 | 0.90 % |  | 0.90 % | 80 |" in card
    assert "| 2 | 2 | 100 | 0.80 % |  | 0.80 % | 80, 0.821 |" in card


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
