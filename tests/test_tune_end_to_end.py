"""A sweep as a user runs it: real Ray Tune and MLflow; then killed, extended, used by a run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ASSETS = Path(__file__).parent / "assets"
RECIPE, SWEEP = ASSETS / "tiny.yaml", ASSETS / "tiny-sweep.yaml"
DEADLINE = 240.0


def command(verb, workspace, *more):
    return [
        *(sys.executable, "-m", "pipelines", verb, str(RECIPE), "--workspace", str(workspace)),
        *("--cluster", "laptop", "--sweep", str(SWEEP), *more),
    ]


def environment():
    drop = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI"}
    return {k: v for k, v in os.environ.items() if k not in drop}


def call(verb, workspace, *more):
    return subprocess.run(
        command(verb, workspace, *more),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )


def trials(workspace):
    """Number -> a trial as the one ledger has it."""
    found = {}
    for path in sorted(Path(workspace).glob("sweeps/*/[0-9]*.json")):
        trial = json.loads(path.read_text())
        if path.name.endswith(".state.json"):
            found[trial["number"]] = trial
        else:
            found.setdefault(trial["number"], trial)
    return found


def settings(workspace):
    return {n: (tuple(t["settings"]), t["fingerprint"]) for n, t in trials(workspace).items()}


def values(trial):
    """What a trial measured, without its clock."""
    return [(probe["number"], probe["images"], probe["readings"]) for probe in trial["probes"]]


def committed(workspace, step):
    """Fingerprint -> record of every committed result of a step."""
    records = (
        json.loads(p.read_text()) for p in Path(workspace).glob(f"steps/{step}/*/COMMIT.json")
    )
    return {record["fingerprint"]: record for record in records}


def files_of(workspace, record):
    home = Path(workspace) / "steps" / record["step"] / record["fingerprint"]
    return home / "attempts" / record["attempt"]


def runs(workspace):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments() if e.name == "tiny"]
    return client.search_runs(experiments)


def children(workspace):
    """Trial number -> its runs."""
    found = {}
    for run in runs(workspace):
        if "cmforge.trial" in run.data.tags:
            found.setdefault(int(run.data.params["number"]), []).append(run)
    return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("swept") / "w"
    result = call("tune", workspace)
    assert result.returncode == 0, result.stdout + result.stderr
    return workspace, result


def test_a_sweep_ends_with_a_winner_and_the_command_that_makes_it(swept):
    workspace, result = swept
    (record,) = committed(workspace, "tune-isolate").values()
    found, out = record["value"], files_of(workspace, record)
    told = trials(workspace)
    assert sorted(told) == [0, 1, 2, 3, 4]
    assert told[0]["settings"] == []
    assert {trial["state"] for trial in told.values()} <= {"completed", "stopped"}
    assert any(trial["state"] == "stopped" for trial in told.values())
    assert f"winner  trial {found['winner']} of 5: {found['metric']}" in result.stdout
    assert told[found["winner"]]["state"] == "completed"
    assert set(told[found["winner"]]["settings"]) <= set(found["settings"])
    typed = next(line for line in result.stdout.splitlines() if line.startswith("to run  "))
    assert typed.startswith("to run  cmforge run ")
    assert (out / "delta.yaml").read_text().splitlines()[1] == "# " + typed.removeprefix("to run  ")
    assert (out / "sweep.html").read_text().startswith("<!doctype html>")
    summary = json.loads((out / "summary.json").read_text())
    assert [trial["number"] for trial in summary["trials"]] == [0, 1, 2, 3, 4]
    # Stopped trials cost what they ran for.
    assert found["spent"] == sum(t["probes"][-1]["images"] for t in told.values()) / (5 * 128)


def test_a_sweep_is_one_parent_run_with_a_child_per_trial(swept):
    workspace, _ = swept
    told, found = trials(workspace), children(workspace)
    assert sorted(found) == sorted(told)
    (parent,) = [run for run in runs(workspace) if "cmforge.sweep" in run.data.tags]
    assert parent.info.status == "FINISHED"
    for number, (run,) in found.items():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        named = dict(text.split("=", 1) for text in told[number]["settings"])
        assert named.items() <= run.data.params.items()
        last = told[number]["probes"][-1]
        lowest = min(r["value"] for r in last["readings"] if r["steps"] == 2)
        assert run.data.metrics["distance_2"] == pytest.approx(lowest)
        expected = {"completed": "FINISHED", "stopped": "KILLED"}[told[number]["state"]]
        assert run.info.status == expected


def test_a_finished_sweep_is_not_run_again_and_can_be_extended(swept):
    workspace, _ = swept
    again = call("tune", workspace)
    assert again.returncode == 0
    assert "started" not in again.stdout
    before = trials(workspace)
    more = call("tune", workspace, "--extend", "1")
    assert more.returncode == 0, more.stdout + more.stderr
    after = trials(workspace)
    assert sorted(after) == [0, 1, 2, 3, 4, 5]
    assert {number: after[number] for number in before} == before
    assert all(len(found) == 1 for found in children(workspace).values())
    status = call("tune", workspace, "--status", "sweep.trials=6")
    assert "6 of 6 trials over" in status.stdout


def wait_until(condition, process):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing to kill in time"
        time.sleep(0.02)


def test_killed_at_any_time_it_is_the_same_sweep(swept, tmp_path):
    """SIGKILL as the first trial begins, when some are under way, and while the best are measured
    again; what comes out is what the undisturbed sweep found, trial by trial."""
    workspace = tmp_path / "w"
    kept = shutil.ignore_patterns("trial", "tune-isolate", "sweeps", "mlflow.db*", "mlartifacts")
    shutil.copytree(swept[0], workspace, ignore=kept)

    def over():
        return sum(t["state"] != "running" for t in trials(workspace).values())

    def probed():
        return sum(len(t["probes"]) for t in trials(workspace).values())

    for moment in (lambda: len(trials(workspace)) > 0, lambda: probed() >= 3, lambda: over() == 5):
        process = subprocess.Popen(
            command("tune", workspace),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
            start_new_session=True,
        )
        wait_until(moment, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert committed(workspace, "tune-isolate") == {}
    result = call("tune", workspace)
    assert result.returncode == 0, result.stdout + result.stderr

    first = {n: t for n, t in trials(swept[0]).items() if n < 5}
    found = trials(workspace)
    assert settings(workspace) == {
        n: (tuple(t["settings"]), t["fingerprint"]) for n, t in first.items()
    }
    for number, trial in found.items():
        # Who is stopped when depends on who was quicker; what was seen on the way does not.
        shared = min(len(trial["probes"]), len(first[number]["probes"]))
        assert shared > 0
        assert values(trial)[:shared] == values(first[number])[:shared]
    whole = committed(swept[0], "trial")
    for fingerprint, record in committed(workspace, "trial").items():
        if fingerprint in whole:
            assert (
                record["value"]["weights_sha256"] == whole[fingerprint]["value"]["weights_sha256"]
            )
    assert {number: len(runs) for number, runs in children(workspace).items()} == {
        number: 1 for number in range(5)
    }


def test_one_command_goes_from_images_to_a_tuned_registered_model(swept):
    workspace, _ = swept
    result = call("run", workspace, "--tune")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"tune-isolate +cached", result.stdout)
    tuned = next(
        r for r in committed(workspace, "tune-isolate").values() if r["value"]["trials"] == 5
    )
    (isolate,) = committed(workspace, "isolate").values()
    # The whole budget was the trials' own: the winner's files, its best EMA first.
    trial = committed(workspace, "trial")[tuned["value"]["trained"]]
    assert isolate["value"]["ema"] == tuned["value"]["ema"]
    own = (
        "weights"
        if trial["value"]["ema"] == tuned["value"]["ema"]
        else f"ema/{tuned['value']['ema']}"
    )
    assert (files_of(workspace, isolate) / "weights.safetensors").read_bytes() == (
        files_of(workspace, trial) / f"{own}.safetensors"
    ).read_bytes()
    page = Path(result.stdout.strip().splitlines()[-1].split(maxsplit=1)[1]).read_text()
    assert 'id="sweep-isolate"' in page
    assert "tune-isolate" in page
