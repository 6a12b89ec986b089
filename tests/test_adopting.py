"""Models from outside in a recipe (`teacher.from`): keys, plan, identity, errors, runs."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from consistency import published
from consistency.config import NetworkConfig, NoiseConfig
from infra import cluster, storage, tuning
from infra.errors import UserError
from pipelines import (
    adopted,
    cli,
    commands,
    config,
    dag,
    estimate,
    graph,
    importing,
    model_record,
)
from pipelines.adopting import overrides as brought
from pipelines.arguments import _at_absolute_paths
from pipelines.config import RecipeSource, load_recipe, resolved_yaml
from pipelines.recipe import Cluster, Recipe
from tests import tiny_trials
from tests.test_security import InProcess

# As OpenAI's: another label of the noise, another range, groups of its own.
NOISE = NoiseConfig(sigma_min=0.004, sigma_max=60.0, c_noise="log_sigma_1000")
NETWORK = NetworkConfig(
    channels=8, channel_mult=(1, 1), num_blocks=1, attention=(4,), class_conditional=True, groups=2
)
DIGITS = tuple("0123456789")
STAGES = ("teacher", "distill", "isolate")
SOURCE = "edm-digits.pkl (edm, sha256 0a0a0a0a0a0a)"  # as `record` says it
LAST = "dec.8x8_aux_conv"
FOREIGN = b"of another project"
JUDGED = ["evaluate", "register", "report"]


def write(folder: Path, kind: str = "denoiser", seed: int = 0, **changes: Any) -> Path:
    """A model folder with random weights."""
    fields: dict[str, Any] = {
        **dict(kind=kind, network=NETWORK, noise=NOISE, size=8, channels=1, class_names=DIGITS),
        **changes,
    }
    fields.setdefault("boundary", fields["noise"].sigma_min)
    about = published.ModelDescription(**fields)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in published.build_network(about).state_dict().items()
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "weights.safetensors")
    (folder / "config.json").write_text(about.to_json())
    return folder


def record(folder: Path, **source: str) -> Path:
    """As `cmforge import` leaves it, written last."""
    its = {"layout": "edm", "name": "edm-digits.pkl", "sha256": "0a" * 32, **source}
    made_from = model_record.Source(bytes=7, **its)
    files = storage.describe_dir(str(folder))
    (folder / "model.json").write_bytes(model_record.compose(made_from, files))
    return folder


def recipe(*overrides: str) -> Recipe:
    return RecipeSource("tiny.yaml", tiny_trials.TEXT, overrides).recipe()


def steps(*overrides: str) -> dict[str, dag.Step]:
    return {step.name: step for step in graph.build(recipe(*overrides), Cluster())}


def inputs(step: dag.Step) -> dict[str, str]:
    return {alias: needed.name for alias, needed in step.inputs.items()}


def changed(before: dict[str, dag.Step], after: dict[str, dag.Step]) -> list[str]:
    prints = {name: step.fingerprint for name, step in before.items()}
    return [name for name, step in after.items() if prints.get(name) != step.fingerprint]


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        steps(*overrides)
    (line,) = str(error.value).splitlines()
    return line


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind, on the network of the teacher."""
    home = tmp_path_factory.mktemp("models")
    kinds = {"teacher": "denoiser", "distill": "consistency", "isolate": "mean_flow"}
    return {
        stage: write(home / stage, kind, seed) for seed, (stage, kind) in enumerate(kinds.items())
    }


def keys(models: dict[str, Path], *stages: str) -> list[str]:
    return [f"{stage}.from={models[stage]}" for stage in stages or STAGES]


# --- the key -------------------------------------------------------------------------------------


def test_the_key_is_from_wherever_it_is_read_or_said(tmp_path):
    found = recipe("teacher.from=s3://bucket/model", "isolate.from=some/folder")
    assert (found.teacher.from_, found.distill.from_) == ("s3://bucket/model", None)
    text = resolved_yaml(found)
    assert text.count("\n  from: ") == 3
    assert "from_" not in text
    assert "  from: s3://bucket/model\n" in text
    assert RecipeSource("again", text).recipe() == found
    for wrong in ("teacher.form=x", "teacher.from_=x"):
        with pytest.raises(UserError, match=r"unknown key, did you mean 'from'\?$"):
            recipe(wrong)
    with pytest.raises(UserError, match=r"teacher\.from: is empty; name a model"):
        recipe("teacher.from=''")
    with pytest.raises(UserError, match=r"truncate\.from: unknown key"):
        recipe("isolate.method=ect", "truncate.method=tcm", "truncate.from=x")


def test_another_method_leaves_it_and_null_takes_it_away():
    text = tiny_trials.TEXT.replace("isolate:\n", "isolate:\n  from: x\n")
    assert RecipeSource("a", text, ("isolate.method=sct",)).recipe().isolate.from_ == "x"
    assert RecipeSource("a", text, ("isolate.from=null",)).recipe().isolate.from_ is None


def test_a_relative_path_is_the_shells_for_all_later_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = _at_absolute_paths(recipe(*(f"{stage}.from=a/{stage}" for stage in STAGES)))
    places = [getattr(found, stage).from_ for stage in STAGES]
    assert places == [str(tmp_path / "a" / stage) for stage in STAGES]
    for url in ("s3://bucket/model", "models:/x@champion"):
        assert _at_absolute_paths(recipe(f"teacher.from={url}")).teacher.from_ == url


# --- the plan ------------------------------------------------------------------------------------


def test_an_adopted_stage_is_copied_and_keeps_its_name_for_what_comes_after(models):
    plain, built = steps(), steps(*keys(models, "teacher"))
    assert list(built) == list(plain)
    assert inputs(built["teacher"]) == {"shard": "shard"}
    assert (built["teacher"].gang, plain["teacher"].gang) == (None, "workers")
    assert {n: inputs(s) for n, s in built.items()} == {n: inputs(s) for n, s in plain.items()}
    assert inputs(steps(*keys(models, "distill"))["distill"]) == {"shard": "shard"}
    every = steps(*keys(models))
    assert [s.name for s in every.values() if s.gang == "workers"] == []
    assert inputs(every["evaluate"]) == inputs(plain["evaluate"])


def test_network_and_noise_axis_are_the_teachers_for_every_stage_that_trains(models):
    built = steps(*keys(models, "teacher"), "isolate.method=ect")
    for stage in ("distill", "isolate"):
        assert built[stage].config.network == NETWORK
        assert built[stage].config.noise == NOISE
    said = RecipeSource("a", built["report"].config.recipe_yaml).recipe()
    assert (said.network, said.noise) == (NETWORK, NOISE)
    # What the recipe says of its own network, or of training the teacher, means nothing then.
    same = steps(
        *keys(models, "teacher"), "isolate.method=ect", "teacher.lr=1", "network.channels=8"
    )
    assert changed(built, same) == []


def test_a_student_that_begins_with_an_adopted_student_takes_that_ones_network(models):
    built = steps(*keys(models, "distill"), "isolate.init=distilled")
    assert built["isolate"].config.network == NETWORK
    assert built["teacher"].config.network == recipe().network
    built = steps(*keys(models, "distill"))  # from scratch: the recipe's own
    assert built["isolate"].config.network == recipe().network


def test_a_model_is_known_by_its_content_and_not_by_its_place(models, tmp_path, monkeypatch):
    first = steps(*keys(models, "teacher"))
    for place in ("elsewhere", "recorded"):
        shutil.copytree(models["teacher"], tmp_path / place)
    record(tmp_path / "recorded")
    url = "memory://bucket/model"
    for name in ("weights.safetensors", "config.json"):
        storage.write_bytes(f"{url}/{name}", (models["teacher"] / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "elsewhere", "elsewhere", tmp_path / "recorded", url):
        assert changed(first, steps(f"teacher.from={place}")) == []
    about = (tmp_path / "elsewhere" / "config.json").read_text()
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(json.loads(about)))
    assert changed(first, steps("teacher.from=elsewhere")) == []  # the same, in one line


@pytest.mark.parametrize(
    ("stage", "rerun"),
    [
        ("teacher", ["teacher", "distill", *JUDGED]),
        ("distill", ["distill", *JUDGED]),
        ("isolate", ["isolate", *JUDGED]),
    ],
)
def test_other_content_at_the_same_place_runs_again_what_depends_on_it(tmp_path, stage, rerun):
    kind = "denoiser" if stage == "teacher" else "consistency"
    place = f"{stage}.from={tmp_path / 'model'}"
    write(tmp_path / "model", kind)
    first = steps(place)
    weights = load_file(tmp_path / "model" / "weights.safetensors")
    weights[f"{LAST}.bias"] = weights[f"{LAST}.bias"] + 1
    save_file(weights, tmp_path / "model" / "weights.safetensors")
    assert changed(first, steps(place)) == rerun
    write(tmp_path / "other", kind, noise=dataclasses.replace(NOISE, rho=5.0))
    every = [name for name in first if name in {*rerun, "isolate"}]  # trained on the teacher's axis
    again = steps(f"{stage}.from={tmp_path / 'other'}")
    assert changed(first, again) == (every if stage == "teacher" else rerun)


def test_a_record_spares_the_plan_to_read_the_weights(tmp_path, monkeypatch):
    record(write(tmp_path / "model"))

    def never(*_: Any) -> str:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(adopted, "_sha256", never)
    assert len(steps(f"teacher.from={tmp_path / 'model'}")["teacher"].config.sha256) == 64


def test_planning_with_a_model_of_ours_takes_neither_torch_nor_ray(models, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny_trials.TEXT)
    done = subprocess.run(
        [
            *(sys.executable, "-X", "importtime", "-m", "pipelines", "plan"),
            *(str(tmp_path / "tiny.yaml"), *keys(models), "--workspace", str(tmp_path / "w")),
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert "0 cached, 8 to run" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "pipelines.adopted" in imported
    assert not imported & {"ray", "torch", "mlflow"}


def test_a_selection_leaves_out_what_has_one_set_of_weights(models):
    two = "[{kind: power, sigma_rel: 0.05}, {kind: power, sigma_rel: 0.10}]"
    built = steps(*keys(models, "distill"), "select_ema.samples=100", f"isolate.ema={two}")
    assert "select_ema-distill" not in built
    assert inputs(built["evaluate"])["distill"] == "distill"
    assert inputs(built["evaluate"])["isolate"] == "select_ema-isolate"
    assert "select_ema-isolate" in inputs(built["report"])
    assert list(steps(*keys(models), "select_ema.samples=100")) == list(steps())


def test_a_second_stage_may_follow_an_adopted_first_one(models):
    second = ("truncate.method=tcm", "truncate.images=64", "truncate.batch=16")
    built = steps(
        *keys(models, "distill"), *second, "truncate.of=distill", "truncate.boundary=null"
    )
    assert inputs(built["truncate"]) == {"shard": "shard", "first": "distill"}
    assert (built["truncate"].config.network, built["truncate"].config.noise) == (NETWORK, NOISE)


def test_an_estimate_counts_nothing_for_it_and_its_network_for_the_others(models):
    plain = estimate.estimate(recipe())
    found = estimate.estimate(recipe(*keys(models, "teacher", "isolate")))
    assert [stage.name for stage in found.stages] == ["distill"]
    assert (found.size, found.channels, found.classes) == (8, 1, 10)
    assert found.parameters != plain.parameters
    unknown = ["data.source=folder", "data.path=somewhere", "data.size=8"]
    assert estimate.estimate(recipe(*keys(models), *unknown)).assumed == ()


# --- what is refused -----------------------------------------------------------------------------


def spoil(folder: Path, **changes: Any) -> Path:
    """A model whose description says something else."""
    about = json.loads((write(folder) / "config.json").read_text())
    for key, value in changes.items():
        (about["network"] if key in about["network"] else about)[key] = value
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def test_a_model_of_the_wrong_kind_is_refused(models):
    for stage, of, said in (
        ("teacher", "distill", "is a consistency model, and teacher must be denoiser"),
        ("distill", "isolate", "is a mean_flow model, and distill must be consistency"),
        ("isolate", "teacher", "is a denoiser model, and isolate must be consistency or mean_flow"),
    ):
        line = refused(f"{stage}.from={models[of]}")
        assert line.startswith(f"{stage}.from: ")
        assert line.endswith(said)


def test_a_place_without_a_model_is_one_line_that_says_what_to_do(models, tmp_path):
    assert "teacher.from: /nowhere does not exist; check" in refused("teacher.from=/nowhere")
    assert f"cmforge import {tmp_path} --out DIR" in refused(f"teacher.from={tmp_path}")
    assert "cmforge export models:/x@champion" in refused("teacher.from=models:/x@champion")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert "config.json is not there" in refused(f"teacher.from={tmp_path}")
    (tmp_path / "config.json").write_bytes(b"x" * 1_000_001)
    assert "is larger than 1,000,000 bytes" in refused(f"teacher.from={tmp_path}")
    (tmp_path / "config.json").write_bytes(b"\xff")
    assert "is not UTF-8 text" in refused(f"teacher.from={tmp_path}")
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refused(f"teacher.from={tmp_path}")
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "config.json: not valid JSON" in refused(f"teacher.from={tmp_path}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "gan"}, "kind: expected one of denoiser, consistency, mean_flow, got 'gan'"),
        ({"architecture": "vit"}, "network.architecture: expected one of ddpmpp, ncsnpp, adm"),
        ({"channels": "many"}, "network.channels: expected an integer, got 'many'"),
        ({"channels": 3}, "network.channels: 3 must be even"),
        ({"noise": {"c_noise": "linear"}}, "noise.c_noise: expected one of log_sigma"),
        ({"noise": {"sigma_max": float("nan")}}, "noise.sigma_max: expected a finite number"),
        ({"size": 8.5}, "size: expected an integer, got 8.5"),
        ({"size": None}, "size: expected an integer, got nothing"),
    ],
)
def test_a_description_is_read_as_strictly_as_a_recipe(tmp_path, changes, said):
    line = refused(f"teacher.from={spoil(tmp_path / 'model', **changes)}")
    assert line.startswith(f"teacher.from: {tmp_path}/model/config.json: {said}")


def test_a_model_that_is_no_longer_what_its_record_says_is_refused(tmp_path):
    place = record(write(tmp_path / "model"))
    with (place / "weights.safetensors").open("ab") as file:
        file.write(b"more")
    assert "has not the" in refused(f"teacher.from={place}")
    for text in ("{}", "[]", "[" * 100_000, '{"files": [{"path": "weights.safetensors"}]}'):
        (place / "model.json").write_text(text)
        line = refused(f"teacher.from={place}")
        assert "model.json: not a model's record; import the model again" in line


def test_what_does_not_go_with_an_adopted_model_is_one_line(models, tmp_path):
    teacher = keys(models, "teacher")
    line = refused(*teacher, "data.size=16")
    assert "draws images of 8 pixels, the data have 16; set data.size=8" in line
    for stage in STAGES:
        line = refused(*keys(models, stage), "evaluate.mid_sigma=70")
        assert line.startswith("evaluate.mid_sigma: 70.0 must lie between 0.004 and 60, the noise")
        assert line.endswith(f"of {stage}.from, {models[stage]}")
    second = ["truncate.method=tcm", "truncate.images=64", "truncate.batch=16"]
    line = refused(*keys(models, "distill"), *second, "truncate.of=distill")
    assert line.startswith("truncate.boundary: 0 must be that of")
    line = refused(*keys(models, "isolate"), *second)
    assert line.startswith("truncate.of: ")
    assert "is a mean_flow model, which has no f to truncate" in line
    lower = ["truncate.of=distill", "truncate.boundary=null", "truncate.sigma_prime=70"]
    line = refused(*keys(models, "distill"), *second, *lower)
    assert line.startswith("truncate.sigma_prime: 70 must lie between sigma_min and sigma_max of")
    network = dataclasses.replace(NETWORK, class_conditional=False)
    classless = write(tmp_path / "classless", network=network, class_names=())
    line = refused(f"teacher.from={classless}", "teacher.label_dropout=0.1")
    assert line.startswith("teacher.label_dropout: hides classes, but the model of teacher.from")


def test_guidance_of_an_adopted_teacher_wants_a_word_that_it_learned_the_null_class(models):
    guided = [*keys(models, "teacher"), "distill.guidance=2"]
    with pytest.raises(UserError, match=r"set teacher.label_dropout to 0.1 \(if the adopted model"):
        recipe(*guided)
    # tiny's own network has no classes; the adopted one has.
    assert steps(*guided, "teacher.label_dropout=0.1")["distill"].config.training.guidance == 2
    recipe(*keys(models, "distill"), "distill.guidance=2")  # of a stage that is not trained


def test_there_is_nothing_to_search_in_an_adopted_stage(models, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_trials.TEXT)
    assert cli.main(["tune", "tiny.yaml", *keys(models, "isolate"), "--dry-run"]) == 2
    assert capsys.readouterr().err == (
        "tune: isolate is adopted (isolate.from), so there is nothing to search; leave one of the "
        "two out\n"
    )


def test_an_override_that_contradicts_the_adopted_network_is_refused(models, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_trials.TEXT)
    plan = ["plan", "tiny.yaml", "--workspace", "w", *keys(models, "teacher")]
    assert cli.main([*plan, "network.channels=8", "noise={sigma_max: 60, sigma_min: 0.004}"]) == 2
    assert cli.main([*plan, "network.channels=8", "noise.sigma_max=60"]) == 0
    assert cli.main([*plan, "network.channels=16"]) == 2


def test_the_line_of_a_contradiction_names_key_and_value(models, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_trials.TEXT)
    cli.main(["plan", "tiny.yaml", *keys(models, "teacher"), "network.channels=16"])
    assert capsys.readouterr().err == (
        "override network.channels: is 8 of the model that teacher.from names; leave it out\n"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 16}, "draws images of 16 pixels, the data have 8; set data.size=16"),
        ({"channels": 3}, "draws images of 3 channels, the data have 1 (grey is 1, colour 3)"),
        ({"class_names": DIGITS[:9]}, "knows 9 classes, the data have 10"),
        ({"class_names": DIGITS[::-1]}, "has the data's classes in another order (9, 8, 7, ..."),
    ],
)
def test_a_model_of_other_images_is_refused_once_the_data_are_known(tmp_path, changes, said):
    network = dataclasses.replace(NETWORK, attention=())
    place = write(tmp_path / "m", network=network, **changes)
    model = adopted.look("teacher.from", str(place), ("denoiser",))
    with pytest.raises(UserError) as error:
        adopted.check_fit("teacher.from", model, 8, 1, DIGITS)
    assert said in str(error.value)
    named = dataclasses.replace(model.about, class_names=tuple("abcdefghij"), size=8, channels=1)
    adopted.check_fit(
        "k", dataclasses.replace(model, about=named), 8, 1, DIGITS
    )  # just other words


# --- where it is from ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("edm.pkl", "edm.pkl (edm, sha256 0a0a0a0a0a0a)"),
        ("/home/me/models/edm.pkl", "edm.pkl (edm, sha256 0a0a0a0a0a0a)"),
        (
            "https://me:secret@host/edm.pkl?token=1",
            "https://host/edm.pkl (edm, sha256 0a0a0a0a0a0a)",
        ),
        ("a\nb" + "c" * 500, "a b" + "c" * 197),
    ],
)
def test_the_source_is_one_short_line_without_secrets_or_this_machine(tmp_path, source, said):
    place = record(write(tmp_path / "model"), name=source)
    assert adopted.look("k", str(place), ("denoiser",)).source == said


# --- runs, in this process -----------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Commands run here, with real MLflow and no Ray."""
    tiny_trials.stand_in(monkeypatch)
    monkeypatch.setattr(commands, "_ray", lambda address: InProcess())
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_trials.TEXT)
    return tmp_path


def run(*more: str, code: int = 0) -> None:
    # In the product each step has a process of its own; here MLflow leaves it in this one's.
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    options = ("--workspace", "work", "--cluster", "laptop")
    assert cli.main(["run", "tiny.yaml", *more, *options]) == code


def tags() -> dict[str, str]:
    """Of the only version there is."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{Path('work').resolve()}/mlflow.db")
    (version,) = client.search_model_versions("name='tiny'")
    return {**version.tags, "card": version.description or ""}


def home(step: str) -> Path:
    done = dag.latest_record(step, "work")
    assert done is not None
    return Path("work", "steps", step, done["fingerprint"], "attempts", done["attempt"])


def value(step: str) -> dict[str, Any]:
    done = dag.latest_record(step, "work")
    assert done is not None
    found: dict[str, Any] = done["value"]
    return found


def fresh(capfd: pytest.CaptureFixture[str]) -> set[str]:
    """Steps that the last command ran."""
    lines = (line.split() for line in capfd.readouterr().out.splitlines())
    return {words[1] for words in lines if words[2:3] == ["done"]}


def test_a_teacher_from_outside_is_distilled_evaluated_registered_and_never_read_again(
    here, models, capfd
):
    place = record(write(here / "mine"))
    run(f"teacher.from={place}")
    assert fresh(capfd) == set(steps())
    teacher = value("teacher")
    assert (teacher["kind"], teacher["images"], teacher["ema"]) == ("denoiser", 0, "adopted")
    assert teacher["source"] == SOURCE
    assert (home("teacher") / "weights.safetensors").read_bytes() == (
        place / "weights.safetensors"
    ).read_bytes()
    for stage in ("distill", "isolate"):
        about = published.load(home(stage)).description
        assert (about.network, about.noise) == (NETWORK, NOISE)
    levels = {(s["candidate"], s["protocol"]["steps"]): s for s in value("evaluate")["scores"]}
    assert levels["distill", 1]["levels"] == [60.0]
    assert levels["teacher", 4]["sampler"] == "heun"

    page = (home("report") / "report.html").read_text()
    assert page.count(SOURCE) == 2  # beside the training, and in lineage
    assert "c_noise: log_sigma_1000" in page
    assert tags()["cmforge.adopted.teacher"] == SOURCE
    assert f"cmforge.adopted.{value('register')['candidate']}" not in tags()

    run(f"teacher.from={place}")
    assert fresh(capfd) == set()
    run("teacher.from=mine")  # the same by another name
    assert fresh(capfd) == set()
    # What was killed in the middle of the copy is copied again, and nothing after it.
    storage.remove_tree(str(home("teacher").parents[1] / "COMMIT.json"))
    run("teacher.from=mine")
    assert fresh(capfd) == {"teacher"}
    # Another model at the same place.
    storage.remove_tree(str(place))
    write(place, seed=5)
    run("teacher.from=mine", "--dry-run")
    assert "teacher    to run" in (out := capfd.readouterr().out)
    assert "sha256 changed" in out
    run("teacher.from=mine")
    assert fresh(capfd) == {"teacher", "distill", *JUDGED}
    # The workspace remembers the absolute place.
    assert cli.main(["status", "--workspace", "work"]) == 0
    assert "open" not in capfd.readouterr().out


def test_who_never_trains_gets_scores_a_registered_model_and_a_report(
    here, models, capfd, monkeypatch
):
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was trained")

    monkeypatch.setattr(cluster, "train_workers", never)
    run(*keys(models))
    assert fresh(capfd) == set(steps())
    candidate = value("register")["candidate"]
    assert candidate in ("distill", "isolate")
    sources = {k: v for k, v in tags().items() if k.startswith("cmforge.adopted.")}
    assert sources == {f"cmforge.adopted.{stage}": stage for stage in STAGES}
    assert "not trained here but adopted" in tags()["card"]
    page = (home("report") / "report.html").read_text()
    assert page.count("Not trained here") == 3
    assert "adopted as it was, measured against" in page
    assert str(models["teacher"]) not in page.split('id="recipe"')[0]
    wide = page.split('class="dag wide"')[1].split("</svg>")[0]
    places = re.findall(r'<g transform="translate\(([^)]*)\)"><title>(\w+)', wide)
    assert len({place for place, _ in places}) == len(places) == 8

    run(*keys(models))
    assert fresh(capfd) == set()
    # A stage that is trained instead: only it, and what judges.
    assert cli.main(["plan", "--workspace", "work", "distill.from=null"]) == 0
    out = capfd.readouterr().out
    assert "distill    to run" in out
    assert "kind: adopted -> null" in out
    assert "4 cached, 4 to run" in out


def test_what_only_the_data_tell_fails_the_step_in_one_line(here, capfd):
    write(here / "model", class_names=DIGITS[:9])
    run("teacher.from=model", code=2)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"teacher.from: {here}/model knows 9 classes, the data have 10")


def test_weights_of_another_network_are_refused_key_by_key(here):
    place = write(here / "model")
    weights = load_file(place / "weights.safetensors")
    weights["more"] = weights.pop(f"{LAST}.bias")
    weights[f"{LAST}.weight"] = torch.zeros(1, 8, 3, 4)
    save_file(weights, place / "weights.safetensors")
    bench = tiny_trials.stocked(here / "work", f"teacher.from={place}")
    with pytest.raises(UserError) as error:
        bench.run("teacher")
    assert str(error.value) == (
        f"teacher.from: the weights of {place} are not of the network it describes: {LAST}.bias "
        f"is missing, more is unknown, {LAST}.weight is [1, 8, 3, 4], not [1, 8, 3, 3]"
    )


def test_weights_that_are_altered_behind_their_record_are_not_copied(here, capfd):
    place = record(write(here / "model"))
    data = bytearray((place / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (place / "weights.safetensors").write_bytes(data)
    run("teacher.from=model", code=2)
    assert "as planned: it is damaged, or has just been changed" in capfd.readouterr().err
    assert dag.latest_record("teacher", "work") is None


def test_a_single_foreign_file_is_read_by_the_importer(here, monkeypatch):
    place = write(here / "model")
    Path("edm.pkl").write_bytes(FOREIGN)
    real, read = importing.read, []

    def stand_in(source: str, **options: Any) -> importing.Imported:
        read.append(source)
        return real(str(place))

    monkeypatch.setattr(importing, "read", stand_in)
    bench = tiny_trials.stocked(here / "work", f"teacher.from={here / 'edm.pkl'}")
    made = bench.run("teacher").value
    assert read == [str(here / "edm.pkl")] * 2  # for the plan, and to copy
    assert (made.kind, made.source) == ("denoiser", "edm.pkl")
    assert bench.steps()["teacher"].config.sha256 == hashlib.sha256(FOREIGN).hexdigest()
    assert len(read) == 2


def test_a_foreign_file_that_does_not_say_everything_is_to_be_imported_first(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(b"weights")

    def asks(source: str, **options: Any) -> importing.Imported:
        raise UserError(f"{source}: its size is not in the file; say --size")

    monkeypatch.setattr(importing, "read", asks)
    line = refused(f"teacher.from={tmp_path / 'a.pt'}")
    assert line.startswith(f"teacher.from: {tmp_path}/a.pt: its size is not in the file")
    assert line.endswith(f"cmforge import {tmp_path}/a.pt --out DIR, and name DIR")


# --- students of every method on the adopted noise axis ------------------------------------------


@pytest.fixture
def bench(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    tiny_trials.stand_in(monkeypatch)
    made = tiny_trials.stocked(tmp_path, *keys(models, "teacher"))
    made.run("teacher")
    return made


def with_settings(bench: Any, *settings: str) -> Any:
    overrides = (*bench.source.overrides, *settings)
    bench.source = RecipeSource("tiny.yaml", tiny_trials.TEXT, overrides)
    return bench


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("distill", []),
        ("distill", ["distill.method=scd"]),
        ("distill", ["distill.guidance=2", "teacher.label_dropout=0.1"]),
        ("isolate", ["isolate.method=ect"]),
        ("isolate", ["isolate.method=sct", "isolate.init=teacher"]),
    ],
    ids=["cd", "scd", "guided", "ect", "sct"],
)
def test_every_method_starts_from_an_adopted_teacher(bench, models, stage, settings):
    made = with_settings(bench, *settings, f"{stage}.lr=1e-12", f"{stage}.dropout=0").run(stage)
    model = published.load(Path(made.url))
    assert (model.description.network, model.description.noise) == (NETWORK, NOISE)
    # Hardly trained, so F is the teacher's: also told of the noise as it was there.
    teacher = published.load(models["teacher"]).function.net.state_dict()
    for name, tensor in model.function.net.state_dict().items():
        torch.testing.assert_close(tensor, teacher[name], atol=1e-6, rtol=0)


def test_an_adopted_student_lends_weights_and_a_first_stage(bench, tmp_path):
    network = dataclasses.replace(NETWORK, channels=12)
    place = write(tmp_path / "student", "consistency", network=network)
    second = ["truncate.method=tcm", "truncate.images=32", "truncate.batch=16"]
    second += ["truncate.of=distill", "truncate.boundary=null"]
    with_settings(bench, f"distill.from={place}", "isolate.init=distilled", *second)
    for stage in ("distill", "isolate", "truncate"):
        about = published.load(Path(bench.run(stage).url)).description
        assert (about.network, about.noise) == (network, NOISE)
    assert about.lowest_sigma == 1.0


def test_trials_of_a_sweep_start_from_an_adopted_teacher(bench, monkeypatch):
    monkeypatch.setattr(tuning, "run_trials", tiny_trials.one_after_the_other())
    axis = tiny_trials.choice("isolate.init", "scratch", "teacher", "distilled")
    bench.sweep = tiny_trials.sweep_of(axis, fixed=("isolate.dropout=0",))
    with_settings(bench, "isolate.method=ect")
    for name in ("distill", "tune-isolate"):
        tuned = bench.run(name)
    assert tuned.value.trials == 3
    for path in Path(bench.workspace).glob("steps/trial/*/attempts/*"):
        about = published.load(path).description
        assert (about.network, about.noise) == (NETWORK, NOISE)
    won = load_recipe(str(Path(tuned.url) / "recipe.yaml"))
    assert (won.network, won.noise) == (NETWORK, NOISE)
    assert won.teacher.from_ is not None
    delta = (Path(tuned.url) / "delta.yaml").read_text()
    assert "network" not in delta  # which the teacher says
    assert published.load(Path(bench.run("isolate").url)).description.noise == NOISE


def test_what_a_teacher_brings_along_survives_as_text():
    changed = dataclasses.replace(
        recipe(), network=NETWORK, noise=dataclasses.replace(NOISE, sigma_min=1e-5)
    )
    again = config.RecipeSource("a", tiny_trials.TEXT, adopted=brought(changed)).recipe()
    assert (again.network, again.noise) == (changed.network, changed.noise)
