"""The product as a user runs it: one process, real Ray, real MLflow; then killed at every stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

RECIPE = Path(__file__).parent / "assets" / "tiny.yaml"
FAMILY = RECIPE.with_name("tiny-family.yaml")
STAGES = ["shard", "reference", "teacher", "distill", "isolate", "evaluate", "register", "report"]
TRAINING = {"teacher", "distill", "isolate"}
DEADLINE = 180.0


def command(workspace, *more, recipe=RECIPE):
    # A checkpoint as often as Ray Train takes one, so that a kill always finds one.
    return [
        *(sys.executable, "-m", "pipelines", "run", str(recipe), "--workspace", str(workspace)),
        *("--cluster", "laptop", "cluster.checkpoint_every_seconds=0", *more),
    ]


def environment():
    drop = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI"}
    return {k: v for k, v in os.environ.items() if k not in drop}


def run(workspace, *more, recipe=RECIPE):
    return subprocess.run(
        command(workspace, *more, recipe=recipe),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )


def records(workspace):
    """Step -> its one COMMIT.json."""
    found = {}
    for path in Path(workspace).glob("steps/*/*/COMMIT.json"):
        record = json.loads(path.read_text())
        assert record["step"] not in found, "a step was committed under two fingerprints"
        found[record["step"]] = record
    return found


def files_of(workspace, record):
    home = Path(workspace) / "steps" / record["step"] / record["fingerprint"]
    return home / "attempts" / record["attempt"]


def versions(workspace, name="tiny"):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    return client.search_model_versions(f"name='{name}'")


def outcome(workspace):
    """What must not depend on interruptions: weights, scores, pixels."""
    done = records(workspace)
    rows = done["evaluate"]["value"]["scores"]
    scores = [(row["candidate"], row["protocol"]["steps"], row["values"]) for row in rows]
    weights = {step: done[step]["value"]["weights_sha256"] for step in TRAINING}
    return weights, scores, done["shard"]["value"]["manifest_sha256"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("undisturbed")
    result = run(workspace)
    assert result.returncode == 0, result.stdout + result.stderr
    return workspace, result


def test_one_command_goes_from_images_to_a_registered_model_and_its_report(undisturbed):
    workspace, result = undisturbed
    done = records(workspace)
    assert set(done) == set(STAGES)
    (version,) = versions(workspace)
    assert f"model   tiny version {version.version}" in result.stdout
    page = Path(result.stdout.strip().splitlines()[-1].split(maxsplit=1)[1])
    assert page.read_text().startswith("<!doctype html>") or page.stat().st_size > 10_000
    for record in done.values():
        assert str(workspace) not in json.dumps(record["value"])  # workspaces can be moved


def test_the_registered_model_draws_the_evaluated_images(undisturbed):
    import mlflow
    import numpy as np

    workspace, _ = undisturbed
    mlflow.set_tracking_uri(f"sqlite:///{workspace}/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/tiny@champion")
    done = records(workspace)
    candidate = done["register"]["value"]["candidate"]
    evaluate = done["evaluate"]
    home = Path(workspace) / "steps" / "evaluate" / evaluate["fingerprint"] / "attempts"
    sheets = np.load(home / evaluate["attempt"] / "samples.npz")
    for steps in (1, 2):
        images = model.predict(
            {"num_samples": [40]}, params={"steps": steps, "seed": 0, "output": "uint8"}
        )
        assert np.array_equal(np.asarray(images), sheets[f"{candidate}-{steps}"])


def test_a_second_run_does_nothing_and_starts_no_ray(undisturbed):
    workspace, _ = undisturbed
    before = {p: p.stat().st_mtime_ns for p in Path(workspace).rglob("COMMIT.json")}
    result = subprocess.run(
        [
            *(sys.executable, "-X", "importtime", "-m", "pipelines", "run", str(RECIPE)),
            *("--workspace", str(workspace)),
        ],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("cached") >= len(STAGES)
    assert "started" not in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert not imported & {"ray", "torch", "mlflow"}
    assert {p: p.stat().st_mtime_ns for p in Path(workspace).rglob("COMMIT.json")} == before
    assert len(versions(workspace)) == 1


def kill_driver_when(workspace, ready):
    """Start a run, SIGKILL its driver as soon as `ready()`; False if the run ended before."""
    log = open(Path(workspace) / "killed.log", "a")  # noqa: SIM115
    driver = subprocess.Popen(
        command(workspace), stdout=log, stderr=log, env=environment(), start_new_session=True
    )
    end = time.monotonic() + DEADLINE
    try:
        while time.monotonic() < end:
            if ready():
                driver.send_signal(signal.SIGKILL)
                return True
            if driver.poll() is not None:
                return False
            time.sleep(0.05)
        raise AssertionError(f"nothing to kill within {DEADLINE} s: {log.name}")
    finally:
        driver.kill()
        driver.wait()
        log.close()


def started(workspace, stage):
    """Whether a stage is at work: its attempt is open, and a training stage has a checkpoint."""
    if not (Path(workspace) / "steps" / stage).exists():
        return False
    homes = list((Path(workspace) / "steps" / stage).glob("*"))
    if stage in TRAINING:
        return all(list(home.glob("work/checkpoints/*/record.json")) for home in homes)
    return any(list(home.glob("attempts/*")) for home in homes)


def test_killed_at_every_stage_it_ends_as_if_undisturbed(undisturbed, tmp_path):
    reference, _ = undisturbed
    killed = []
    for stage in STAGES:
        if stage in records(tmp_path):
            continue  # ran beside an earlier one and was done before the kill
        if kill_driver_when(tmp_path, lambda stage=stage: started(tmp_path, stage)):
            killed.append(stage)
    assert {"shard", "teacher", "distill", "evaluate"} <= set(killed)

    kept = {
        stage: [
            json.loads(line)
            for line in sorted(home.glob("work/checkpoints/*/curve.jsonl"))[-1]
            .read_text()
            .splitlines()
        ]
        for stage in TRAINING
        for home in (tmp_path / "steps" / stage).glob("*")
        if list(home.glob("work/checkpoints/*/curve.jsonl"))
    }
    result = run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert outcome(tmp_path) == outcome(reference)
    assert len(versions(tmp_path)) == 1
    for stage, points in kept.items():
        record = records(tmp_path)[stage]
        home = tmp_path / "steps" / stage / record["fingerprint"]
        curve = (home / "attempts" / record["attempt"] / "curve.jsonl").read_text().splitlines()
        # The curve holds measured rates: were the stage trained anew, they would differ.
        assert [json.loads(line) for line in curve[: len(points)]] == points


def test_a_polite_kill_and_ctrl_c_stop_cleanly_say_how_to_go_on_and_leave_no_process(tmp_path):
    import psutil

    space, out = tmp_path / "space", tmp_path / "out.log"
    for stage, code, words in (
        ("teacher", 3, "asked to stop by SIGTERM"),
        ("distill", 130, "interrupted"),
    ):
        with out.open("w") as log:
            driver = subprocess.Popen(
                command(space),
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
                # As in a terminal: what a shell starts in the background ignores Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            end = time.monotonic() + DEADLINE
            while not started(space, stage):
                assert driver.poll() is None, out.read_text()
                assert time.monotonic() < end
                time.sleep(0.1)
            family = psutil.Process(driver.pid).children(recursive=True)
            if code == 3:
                driver.terminate()  # what a batch system does to the process it began
            else:
                os.killpg(driver.pid, signal.SIGINT)  # what a terminal does
            assert driver.wait(timeout=60) == code, out.read_text()
        text = out.read_text()
        assert f"{words}; the same command goes on where it stopped" in text
        assert "Traceback" not in text
        _, alive = psutil.wait_procs(family, timeout=20)
        assert alive == []
        saved = list((space / "steps" / stage).rglob("checkpoints/*/record.json"))
        assert saved or stage in records(space)
        assert list((space / "stops").glob("*")) == []
    assert "register" not in records(space)


def test_a_polite_kill_while_ray_starts_ends_like_any_other(tmp_path):
    """Ray has a handler of its own then, which would exit with 15."""
    import psutil

    def family():
        return psutil.Process(driver.pid).children(recursive=True)

    out = tmp_path / "out.log"
    with out.open("w") as log:
        driver = subprocess.Popen(
            command(tmp_path / "space"), stdout=log, stderr=log, env=environment()
        )
        end = time.monotonic() + DEADLINE
        while not any("gcs_server" in process.name() for process in family()):
            assert driver.poll() is None, out.read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        started_by_it = family()
        driver.terminate()
        assert driver.wait(timeout=60) == 3, out.read_text()
    assert "Ray started; the same command goes on where it stopped" in out.read_text()
    _, alive = psutil.wait_procs(started_by_it, timeout=20)
    assert alive == []


def test_every_stage_there_is_runs_once_and_a_new_selection_trains_nothing(tmp_path):
    import mlflow
    import numpy as np

    result = run(tmp_path, recipe=FAMILY)
    assert result.returncode == 0, result.stdout + result.stderr
    done = records(tmp_path)
    candidates = ("distill", "isolate", "truncate")
    assert set(done) == {*STAGES, "truncate", *(f"select_ema-{name}" for name in candidates)}
    kinds = {name: done[name]["value"]["kind"] for name in ("teacher", *candidates)}
    assert kinds == dict(
        teacher="denoiser", distill="consistency", isolate="mean_flow", truncate="consistency"
    )

    # Each selection scored what it had, and what it could rebuild.
    tables = {
        name: json.loads((files_of(tmp_path, done[f"select_ema-{name}"]) / "ema.json").read_text())
        for name in candidates
    }
    assert {name: [row["name"] for row in rows] for name, rows in tables.items()} == {
        "distill": ["constant-0.9", "constant-0.5"],
        "isolate": ["power-0.05", "power-0.1", "power-0.2"],
        "truncate": ["power-0.1", "constant-0.5"],
    }
    for name, rows in tables.items():
        (chosen,) = (row["name"] for row in rows if row["chosen"])
        assert done[f"select_ema-{name}"]["value"]["ema"] == chosen
        assert min(row["value"] for row in rows) == next(
            row["value"] for row in rows if row["chosen"]
        )

    levels = {
        (row["candidate"], row["protocol"]["steps"]): (row["sampler"], row["levels"])
        for row in done["evaluate"]["value"]["scores"]
    }
    assert levels["distill", 2] == levels["truncate", 2] == ("multistep", [80.0, 1.2])
    assert levels["isolate", 2] == ("mean_flow", [1.0, 1.2 / 2.2])
    assert levels["teacher", 4] == ("heun", [])

    # What is registered, whichever it is, draws what was evaluated.
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/tiny-family@champion")
    candidate = done["register"]["value"]["candidate"]
    sheets = np.load(files_of(tmp_path, done["evaluate"]) / "samples.npz")
    for steps in (1, 2):
        params = {"steps": steps, "seed": 0, "output": "uint8"}
        images = model.predict({"num_samples": [40]}, params=params)
        assert np.array_equal(np.asarray(images), sheets[f"{candidate}-{steps}"])

    # Another selection, and a search of levels, train nothing: what is before is taken as it is.
    keys = "steps: 2, samples: 40, confirm_samples: 40, grid: 3, evaluations: 5"
    searching = f"search_sigmas={{{keys}, allow_rank_deficient: true}}"
    result = run(tmp_path, "select_ema.samples=41", searching, recipe=FAMILY)
    assert result.returncode == 0, result.stdout + result.stderr
    cached = {line.split()[1] for line in result.stdout.splitlines() if " cached" in line}
    assert cached == {"shard", "reference", "teacher", *candidates}

    # What was searched is what is evaluated, and what the registered model does by itself.
    homes = {
        name: next(tmp_path.glob(f"steps/search_sigmas-{name}/*/attempts/*/config.json"))
        for name in candidates
    }
    found = {name: json.loads(home.read_text()).get("searched") for name, home in homes.items()}
    evaluate, register = (
        record["value"]
        for step in ("evaluate", "register")
        for path in tmp_path.glob(f"steps/{step}/*/COMMIT.json")
        if (record := json.loads(path.read_text()))["fingerprint"] != done[step]["fingerprint"]
    )
    for row in evaluate["scores"]:
        name, steps = row["candidate"], row["protocol"]["steps"]
        if steps == 2 and found.get(name):
            sigmas = found[name][0]
            times = [1.0, sigmas[1] / (1 + sigmas[1])]
            assert row["levels"] == (times if name == "isolate" else sigmas)
        elif name != "teacher":
            assert row["levels"] == levels[name, steps][1]
    model = mlflow.pyfunc.load_model(f"models:/tiny-family/{register['version']}")
    about = model.unwrap_python_model().model.description
    assert [list(one) for one in about.searched] == (found[register["candidate"]] or [])
