"""The command line: what it accepts, what it says, how it exits.

Runs go through the real commands with a graph of instant steps and an executor in this process.
"""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from consistency.config import NetworkConfig, NoiseConfig
from consistency.evaluation.protocol import FeatureProtocol, Protocol
from infra.errors import UserError, WorkerLost
from infra.resources import Resources
from pipelines import arguments, cli, commands, config, dag, execution, graph, lease, progress
from pipelines.artifacts import (
    Evaluation,
    ReferenceStats,
    RegisteredModel,
    Report,
    Score,
    SearchedModel,
    ShardSet,
    TrainedModel,
    to_json,
)
from pipelines.dag import Planned, Step, StepContext
from pipelines.execution import Event
from pipelines.yardstick import STATS

COMMANDS = [
    *("run", "plan", "status", "report", "sample", "estimate", "compare", "doctor"),
    *("import", "export", "reference", "reference export"),
    *("edit", "edit inpaint", "edit superres", "edit denoise", "edit interpolate"),
    *("weights", "weights list", "weights fetch", "weights import"),
]
STEPS = ["shard", "reference", "teacher", "distill", "isolate", "evaluate", "register", "report"]
ROOT = Path(cli.__file__).parent.parent

RAN: list[str] = []
FAILING: dict[str, BaseException] = {}

FEATURES = FeatureProtocol(
    extractor="domain",
    weights_sha256="0" * 64,
    layer="hidden",
    dim=4,
    resize="none",
    size=8,
    channels="native",
)
PROTOCOL = Protocol(
    features=FEATURES, reference="0" * 16, n_reference=1, samples=10, seed=0, seed_blocks=1, steps=1
)
SCORE = Score(
    candidate="distill",
    protocol=PROTOCOL,
    values=(0.5,),
    sampler="multistep",
    evaluations=1,
    levels=(80.0,),
    ema="power-0.1",
    weights_sha256="0" * 64,
    images_sha256="0" * 64,
    code="",
    agreement=None,
    secondary={},
    grid="distill-1.png",
)
TWO_STEPS = replace(
    SCORE,
    protocol=replace(PROTOCOL, steps=2, seed_blocks=2),
    values=(0.3, 0.5),
    evaluations=2,
    levels=(80.0, 0.8),
)
MODEL = TrainedModel(
    kind="denoiser",
    images=1,
    steps=1,
    parameters=1,
    final_loss=0.1,
    train_seconds=0.0,
    weights_sha256="0" * 64,
    ema="power-0.1",
)
VALUES: dict[str, Any] = {
    "shard": ShardSet(
        count=1,
        size=8,
        channels=1,
        class_names=("0",),
        num_shards=1,
        bytes=1,
        pixel_digest="",
        manifest_sha256="",
    ),
    "reference": ReferenceStats(
        protocol=FEATURES,
        extractor_file="features.safetensors",
        digest="0" * 16,
        count=1,
        total_variance=1.0,
        halves=0.1,
        accuracy=1.0,
    ),
    "teacher": MODEL,
    "distill": MODEL,
    "isolate": MODEL,
    "truncate": MODEL,
    "evaluate": Evaluation(features=FEATURES, mid_sigma=0.8, floor=0.1, scores=(SCORE, TWO_STEPS)),
    "register": RegisteredModel(
        name="tiny",
        version=3,
        alias="champion",
        candidate="distill",
        digest="",
        metric="fd_domain_10",
        value=0.5,
        outcome="champion",
        decision="champion: the first",
    ),
    "report": Report(file="report.html", bytes=6),
}


def body(ctx: StepContext, config: Any, **inputs: Any) -> Any:
    """Instant stand-in of every stage."""
    RAN.append(ctx.step)
    if ctx.step in FAILING:
        raise FAILING[ctx.step]
    (ctx.out / "report.html").write_text("<html>")
    if ctx.step.startswith("search_sigmas-"):
        return SearchedModel(**to_json(MODEL), searched=((80.0, 1.5),))
    return VALUES[ctx.step.removeprefix("select_ema-")]


class InProcess:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.closed = False

    def capacity(self) -> Resources:
        return Resources(2.0)

    def submit(self, function: Any, *args: Any, needs: Resources, name: str) -> int:
        self.calls.append((function, args))
        return len(self.calls) - 1

    def wait(self, handles: Sequence[int], timeout: float) -> list[int]:
        return list(handles)

    def result(self, handle: int) -> Any:
        function, args = self.calls[handle]
        return function(*args)

    def cancel(self, handles: Sequence[int]) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    RAN.clear()
    FAILING.clear()


@pytest.fixture
def addresses(monkeypatch):
    """The real graph with instant bodies; the addresses at which "Ray" was started."""
    build, started = graph.build, []

    def fake(recipe: Any, cluster: Any, source: Any = None) -> list[Step]:
        made: dict[str, Step] = {}
        for step in build(recipe, cluster, source):
            made[step.name] = Step(
                name=step.name,
                run=body,
                config=step.config,
                returns=step.returns,
                inputs={alias: made[needed.name] for alias, needed in step.inputs.items()},
                gang=step.gang,
            )
        return list(made.values())

    def ray(address: str) -> InProcess:
        started.append(address)
        return InProcess()

    monkeypatch.setattr(graph, "build", fake)
    monkeypatch.setattr(commands, "_ray", ray)
    return started


def command(*argv: str) -> int:
    """Exit code of a command line, whether argparse or the command decides."""
    try:
        return cli.main(argv)
    except SystemExit as stop:
        return int(str(stop.code))


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err


# --- help and imports ----------------------------------------------------------------------------


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


def test_help_of_every_command_imports_nothing_heavy():
    done = run_python(
        "import sys\n"
        "from pipelines.cli import main\n"
        f"for command in [[], *(c.split() for c in {COMMANDS})]:\n"
        "    try:\n"
        "        main([*command, '--help'])\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'yaml', 'rich', 'fsspec'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exit codes:") == 1 + len(COMMANDS)


def test_a_plan_imports_neither_torch_nor_ray_nor_mlflow():
    done = run_python(
        "import sys\n"
        "from pipelines.cli import main\n"
        "assert main(['plan', 'quickstart', '--workspace', 'nowhere']) == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert done.returncode == 0, done.stderr
    assert "0 cached, 8 to run" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_each_exit_code_means(name, capsys):
    assert command(*name.split(), "--help") == 0
    text = capsys.readouterr().out
    for code in ("0 ", "1 ", "2 ", "130", "141"):
        assert f"\n  {code}" in text


# --- arguments -----------------------------------------------------------------------------------


def plan_of(capsys, *argv: str) -> list[str]:
    assert command("plan", *argv) == 0
    return capsys.readouterr().out.splitlines()


def test_overrides_may_stand_anywhere_after_the_recipe(capsys):
    expected = plan_of(capsys, "quickstart", "teacher.images=1280", "seed=3", "--cluster", "laptop")
    assert expected != plan_of(capsys, "quickstart", "--cluster", "laptop")
    for argv in (
        ["quickstart", "--cluster", "laptop", "teacher.images=1280", "seed=3"],
        ["--cluster", "laptop", "quickstart", "teacher.images=1280", "seed=3"],
        ["quickstart", "teacher.images=1280", "--cluster", "laptop", "seed=3"],
        ["quickstart", "seed=3", "--cluster=laptop", "teacher.images=1_280"],
        ["quickstart", "seed=4", "teacher.images=1", "--cluster", "laptop", "--workspace",
         "cmforge-workspace", "teacher.images=1280", "seed=3"],
    ):  # fmt: skip
        assert plan_of(capsys, *argv) == expected


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["dance"],
        ["run"],
        ["plan"],
        ["run", "quickstart", "--fast"],
        ["run", "quickstart", "--fast=1"],
        ["run", "quickstart", "--cluster"],
        ["run", "quickstart", "--cluster", "laptop", "loose"],
        ["doctor", "loose"],
        ["doctor", "a=1"],
        ["sample", "teacher", "another"],
        ["sample", "--num", "many"],
        ["sample", "--class", "cat"],
        ["sample", "--seed", "1.5"],
        ["sample", "--guidance", "strong"],
        ["compare", "one"],
        ["compare", "one", "two", "--samples", "many"],
        ["reference"],
        ["reference", "export"],
        ["weights"],
        ["weights", "steal"],
        ["weights", "fetch"],
        ["weights", "list", "--workspace", "w"],
    ],
)
def test_a_command_line_that_cannot_be_read_exits_2_with_its_usage(argv, capsys):
    assert command(*argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("usage: cmforge")
    assert "error: " in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["plan", "quikstart"], "unknown recipe 'quikstart', did you mean 'quickstart'?"),
        (["plan", "nowhere/my.yaml"], "nowhere/my.yaml: cannot read the recipe"),
        (["plan", "quickstart", "loose"], "override 'loose': expected key=value"),
        (["plan", "quickstart", "=1"], "override '=1': expected key=value"),
        (["plan", "quickstart", "--cluster", "laptpo"], "unknown cluster 'laptpo', did you mean"),
        (["plan", "quickstart", "cluster.wrokers=2"], "did you mean 'workers'?"),
        (["plan", "quickstart", "cluster.workers=0"], "workers: 0 must be >= 1"),
        (["plan", "quickstart", "--workspace", ""], "workspace: empty; name a folder"),
        (["plan", "quickstart", "--workspace", "pipe:x"], "pipes and chained URLs are refused"),
        (["plan", "quickstart", "--workspace", "nofs://x/y"], "nofs://x/y"),
        (["run", "quickstart", "--force", "teach"], "--force teach: no such step; the steps are"),
        (["status"], "nothing has run in workspace"),
        (["status", "teacher.images=5"], "nothing has run in workspace"),
        (["report"], "nothing has run in workspace"),
        (["report", "quickstart"], "no report yet: never run; run: cmforge run quickstart"),
        (["sample"], "no model in workspace"),
        (["sample", "teacher"], "step teacher has no result in workspace"),
        (["sample", "nowhere"], "nowhere: no such model; give models:/NAME@ALIAS"),
        (["sample", "--num", "0"], "--num: 0 must be between 1 and"),
        (["sample", "--num", "-4"], "--num: -4 must be between 1 and"),
        (["sample", "--num", "1000000"], "--num: 1000000 must be between 1 and"),
        (["sample", "--steps", "0"], "--steps: 0 must be at least 1"),
        (["sample", "--levels", "80,x"], "--levels: '80,x' is not a list of numbers, such as 80,0"),
        (["sample", "--levels", ""], "--levels: '' is not a list of numbers"),
        (["sample", "--levels", "80,"], "--levels: '80,' is not a list of numbers"),
        (["sample", "--levels", "80", "--steps", "2"], "--levels: one evaluation at each of them"),
        (["sample", "--guidance", "nan"], "--guidance: nan must be a finite number"),
        (["sample", "models:/m@a", "--levels", "80"], "--levels: a registered model has none"),
        (["sample", "models:/m@a", "--guidance", "2"], "--guidance: a registered model has none"),
        (["compare", "a", "b", "--samples", "1"], "--samples: 1 must be at least 2"),
        (["reference", "export", "x.npz"], "nothing has run in workspace"),
        (["weights", "fetch", "inceptoin_fid"], "did you mean 'inception_fid'?"),
        (["weights", "import", "nowhere"], "nowhere: no such file"),
        (["plan", "quickstart", "reference.extractor=[dinov2]"], "did you mean 'dinov2_vitl14'?"),
        (["sample", "truncate"], "step truncate has no result in workspace"),
        (["sample", "select_ema-isolate"], "step select_ema-isolate has no result in workspace"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_nothing(argv, said, capsys, tmp_path):
    assert command(*argv) == 2
    assert said in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_the_workspace_in_the_message_is_absolute(capsys, tmp_path):
    assert command("status", "--workspace", "here") == 2
    assert f"workspace {tmp_path / 'here'};" in one_line(capsys)


# --- which cluster, which registry ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "argv", "address"),
    [
        (None, [], "local"),
        ("10.0.0.1:6379", [], "auto"),
        ("10.0.0.1:6379", ["--cluster", "laptop"], "local"),
        (None, ["--cluster", "auto"], "auto"),
        (None, ["cluster.address=10.0.0.1:6379"], "10.0.0.1:6379"),
    ],
)
def test_ray_is_started_where_the_cluster_says(addresses, monkeypatch, variable, argv, address):
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert command("run", "quickstart", *argv) == 0
    assert addresses == [address]


def seen_settings(monkeypatch, *argv: str) -> dag.Settings:
    """The settings with which a run would begin."""
    seen = []

    def execute(steps: Any, settings: dag.Settings, *_: Any) -> Any:
        seen.append(settings)
        raise UserError("stop here")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(execution, "execute", execute)
        assert command("run", "quickstart", *argv) == 2
    return seen[0]


def test_the_registry_is_the_cluster_files_then_the_environments_then_the_workspaces(
    addresses, monkeypatch, tmp_path
):
    settings = seen_settings(monkeypatch, "--workspace", "w")
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/w/mlflow.db"
    assert settings.workspace == str(tmp_path / "w")
    assert settings.experiment == "quickstart"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert seen_settings(monkeypatch).tracking_uri == "http://mlflow:5000"
    settings = seen_settings(monkeypatch, "cluster.tracking_uri=http://other:5000")
    assert settings.tracking_uri == "http://other:5000"


def test_cluster_overrides_reach_the_cluster_and_not_the_recipe(addresses, monkeypatch, capsys):
    expected = plan_of(capsys, "quickstart")
    settings = seen_settings(
        monkeypatch, "cluster.workers=2", "--cluster", "laptop", "cluster.retries=5"
    )
    assert (settings.cluster.workers, settings.cluster.retries) == (2, 5)
    capsys.readouterr()
    argv = ["quickstart", "cluster.workers=2", "cluster.checkpoint_every_seconds=1"]
    assert plan_of(capsys, *argv) == expected  # where it runs is no part of any fingerprint


def test_the_workspace_option_wins_over_the_clusters(addresses, monkeypatch, tmp_path):
    settings = seen_settings(monkeypatch, "cluster.workspace=one", "--workspace", "two")
    assert settings.workspace == str(tmp_path / "two")
    settings = seen_settings(monkeypatch, "cluster.workspace=one")
    assert settings.workspace == str(tmp_path / "one")


# --- a run from end to end -----------------------------------------------------------------------


def test_a_run_ends_with_the_model_and_the_report_and_a_second_starts_nothing(
    addresses, capsys, tmp_path
):
    assert command("run", "quickstart") == 0
    first = capsys.readouterr()
    assert first.err == ""
    assert RAN[0] == "shard"
    assert set(RAN) == set(STEPS)
    lines = first.out.splitlines()
    assert "model   tiny version 3 (from distill): champion: the first" in lines
    page = Path(lines[-1].removeprefix("report  "))
    assert page.read_text() == "<html>"
    unit = "of the variance of the real images"
    assert f"  distill  1 evaluation    fd_domain_10 0.50 % {unit}" in lines
    assert f"  distill  2 evaluations   fd_domain_10 0.40 % ± 0.14 % {unit}" in lines

    RAN.clear()
    assert command("run", "quickstart") == 0
    assert RAN == []
    assert addresses == ["local"]
    assert capsys.readouterr().out.splitlines()[-1] == lines[-1]

    assert command("plan", "quickstart") == 0
    assert "8 cached, 0 to run" in capsys.readouterr().out
    assert command("status") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"quickstart in {tmp_path / 'cmforge-workspace'}\n")
    assert out.count(" done ") == 8
    assert command("report") == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert command("report", "--out", "sub/copy.html", "quickstart") == 0
    assert Path("sub/copy.html").read_text() == "<html>"


def test_status_and_report_remember_the_overrides_of_the_last_run(addresses, capsys):
    assert command("run", "quickstart", "seed=5") == 0
    capsys.readouterr()
    assert command("status") == 0
    assert capsys.readouterr().out.count(" done ") == 8
    assert command("status", "seed=6") == 0
    assert capsys.readouterr().out.count(" open ") == 6  # shards and reference have their own
    assert command("report", "quickstart") == 2  # without the override: another result
    assert "no report yet: " in one_line(capsys)


def test_the_recipe_of_a_remote_workspace_is_remembered_too(monkeypatch, capsys, addresses):
    from infra import storage

    where = ["--workspace", "memory://cli-test", "cluster.tracking_uri=http://mlflow:5000"]
    try:
        assert command("run", "quickstart", *where) == 0
        capsys.readouterr()
        assert command("status", *where) == 0
        assert capsys.readouterr().out.count(" done ") == 8
    finally:
        storage.remove_tree("memory://cli-test")


def test_a_relative_data_path_is_the_shells_for_all_later_commands(
    addresses, capsys, tmp_path, monkeypatch
):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"not read here")
    argv = ["data.source=folder", "data.path=images", "data.size=8"]
    workspace = ["--workspace", str(tmp_path / "w")]
    assert command("run", "quickstart", *argv, *workspace) == 0
    capsys.readouterr()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command("status", *workspace) == 0
    assert capsys.readouterr().out.count(" done ") == 8


def test_paths_of_the_reference_are_the_shells_too(tmp_path):
    def reference(*overrides: str) -> Any:
        recipe = config.load_recipe("quickstart", overrides)
        return arguments._at_absolute_paths(recipe).reference

    assert reference() == config.load_recipe("quickstart", ()).reference
    keys = ["reference.weights=w", "reference.statistics=s.npz"]
    found = reference(*keys, "reference.extractor=[own.pt2,squeezenet11]")
    assert found.weights == str(tmp_path / "w")
    assert found.statistics == str(tmp_path / "s.npz")
    assert found.extractor == (str(tmp_path / "own.pt2"), "squeezenet11")


def test_force_runs_one_step_again_and_the_dry_run_shows_it(addresses, capsys):
    assert command("run", "quickstart") == 0
    RAN.clear()
    assert command("run", "quickstart", "--force", "teacher", "--dry-run") == 0
    assert "7 cached, 1 to run" in capsys.readouterr().out
    assert RAN == []
    assert command("run", "quickstart", "--force", "teacher") == 0
    assert RAN == ["teacher"]


def test_steps_of_the_new_stages_line_up_and_can_be_forced(addresses, capsys):
    two = "[{kind: power, sigma_rel: 0.05}, {kind: power, sigma_rel: 0.10}]"
    keys = [
        *("isolate.method=ect", "truncate.method=tcm", "truncate.images=12_800"),
        *("truncate.batch=128", "select_ema.samples=100"),
        *(f"{stage}.ema={two}" for stage in ("distill", "isolate", "truncate")),
    ]
    assert command("run", "quickstart", *keys) == 0
    order = [name for name in RAN if name not in STEPS]
    assert sorted(order) == [
        *("select_ema-distill", "select_ema-isolate", "select_ema-truncate", "truncate")
    ]
    assert order.index("truncate") < order.index("select_ema-truncate")
    capsys.readouterr()
    assert command("status") == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 12
    assert {line.index(" done ") for line in lines} == {2 + len("select_ema-truncate")}
    RAN.clear()
    assert command("run", "quickstart", *keys, "--force", "select_ema-isolate") == 0
    assert RAN == ["select_ema-isolate"]  # the same result, so no one after it runs
    capsys.readouterr()
    capsys.readouterr()
    searched = [*keys, "search_sigmas.steps=3"]
    RAN.clear()
    assert command("run", "quickstart", *searched) == 0
    searches = [f"search_sigmas-{c}" for c in ("distill", "isolate", "truncate")]
    assert sorted(RAN) == [*sorted(("evaluate", "register", "report")), *searches]
    capsys.readouterr()
    assert command("run", "quickstart", "--force", "select_ema-isolate") == 2
    assert "--force select_ema-isolate: no such step" in one_line(capsys)


def test_a_dry_run_touches_nothing(addresses, capsys, tmp_path):
    assert command("run", "quickstart", "--dry-run") == 0
    assert "0 cached, 8 to run" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert addresses == []


def test_drift_is_said_once_at_a_run(addresses, capsys, monkeypatch):
    assert command("run", "quickstart") == 0
    capsys.readouterr()
    record = next(Path().glob("cmforge-workspace/steps/teacher/*/COMMIT.json"))
    fields = json.loads(record.read_text())
    record.write_text(json.dumps({**fields, "code": {"consistency/loop.py": "0" * 16}}))
    said = "warning: teacher is reused, but its code has changed since: consistency/loop.py; "
    for name in ("plan", "run"):
        assert command(name, "quickstart") == 0
        assert one_line(capsys).startswith(said)


# --- how it ends ---------------------------------------------------------------------------------


def test_a_stage_that_fails_exits_1_and_names_the_traceback(addresses, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cmforge", "run", "quickstart"])
    FAILING["reference"] = RuntimeError("no\nluck")
    assert command("run", "quickstart") == 1
    err = capsys.readouterr().err
    node = platform.node()
    assert err.startswith(f"step reference failed on {node}: RuntimeError: no (traceback: ")
    assert err.endswith("what is done is kept; go on with: cmforge run quickstart\n")
    log = Path(err.split("(traceback: ")[1].split(")")[0])
    assert "luck" in log.read_text()
    FAILING.clear()
    RAN.clear()
    assert command("run", "quickstart") == 0
    assert set(RAN) == {"reference", "evaluate", "register", "report"}


def test_a_users_mistake_in_a_stage_exits_2_with_its_line_alone(addresses, capsys):
    FAILING["shard"] = UserError("data.path: x.png is damaged; replace it")
    assert command("run", "quickstart") == 2
    assert one_line(capsys) == "data.path: x.png is damaged; replace it\n"


def test_a_mistake_and_a_failure_together_exit_1(addresses, capsys):
    FAILING["reference"] = UserError("mend this")
    FAILING["teacher"] = RuntimeError("boom")
    assert command("run", "quickstart") == 1
    err = capsys.readouterr().err
    assert "mend this\n" in err
    assert f"step teacher failed on {platform.node()}: RuntimeError: boom" in err


def test_a_lost_worker_exits_1(addresses, capsys, monkeypatch):
    class Losing(InProcess):
        def result(self, handle: int) -> Any:
            raise WorkerLost("node died")

    monkeypatch.setattr(commands, "_ray", lambda address: Losing())
    monkeypatch.setattr(execution, "FIRST_PAUSE_SECONDS", 0)
    assert command("run", "quickstart") == 1
    captured = capsys.readouterr()
    assert "step shard failed: node died\n" in captured.err
    assert "shard      retry  node died" in captured.out


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT as in a terminal: processes that a shell starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signalled(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    """Exit code and words of a run that gets a signal while its first step is at work; the
    workspace is free again after it."""

    class Interrupted(InProcess):
        def wait(self, handles: Sequence[int], timeout: float) -> list[int]:
            os.kill(os.getpid(), number)
            return []

        def cancel(self, handles: Sequence[int]) -> None:
            cancelled.extend(handles)

    cancelled: list[int] = []
    executor = Interrupted()
    monkeypatch.setattr(commands, "_ray", lambda address: executor)
    before = signal.getsignal(signal.SIGTERM)
    code, err = command("run", "quickstart"), capsys.readouterr().err
    assert cancelled == [0]
    assert executor.closed
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(commands, "_ray", lambda address: InProcess())
    assert command("run", "quickstart") == 0
    return code, err


def test_an_interrupt_stops_cleanly_says_how_to_go_on_and_exits_130(
    addresses, capsys, monkeypatch, interrupts
):
    code, err = signalled(signal.SIGINT, capsys, monkeypatch)
    assert code == 130
    assert err == "\ninterrupted; the same command goes on where it stopped\n"


def test_a_polite_kill_leaves_when_all_is_saved_and_exits_3(
    addresses, capsys, monkeypatch, interrupts
):
    code, err = signalled(signal.SIGTERM, capsys, monkeypatch)
    assert code == 3
    assert err == "asked to stop by SIGTERM; the same command goes on where it stopped\n"
    assert list(Path("cmforge-workspace", "stops").iterdir()) == []


def test_a_second_run_in_the_same_workspace_is_refused(addresses, capsys):
    with lease.hold("cmforge-workspace"):
        assert command("run", "quickstart") == 2
    assert f"is in use by pid {os.getpid()} on " in one_line(capsys)


def test_a_ray_that_does_not_answer_is_one_line_and_frees_the_workspace(
    addresses, capsys, monkeypatch
):
    def ray(address: str) -> Any:
        raise UserError(f"no Ray cluster at address {address!r}; start one")

    monkeypatch.setattr(commands, "_ray", ray)
    for _ in range(2):
        assert command("run", "quickstart", "--cluster", "auto") == 2
        assert one_line(capsys) == "no Ray cluster at address 'auto'; start one\n"


def test_a_closed_pipe_ends_quietly_with_141():
    read, write = os.pipe()
    os.close(read)
    buffered = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment = {**buffered, "PYTHONPATH": str(ROOT)}
    with contextlib.closing(os.fdopen(write, "wb")) as pipe:
        argv = [sys.executable, "-m", "pipelines", "plan", "quickstart", "--workspace", "nowhere"]
        done = subprocess.run(argv, stdout=pipe, stderr=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stderr) == (141, b"")


# --- progress ------------------------------------------------------------------------------------


def planned(tmp_path: Path, *names: str) -> list[Planned]:
    step = Step(name="", run=body, config=None, returns=Report)
    return [
        Planned(Step(**{**vars(step), "name": name}), "f" * 16, "to run", "never run", None)
        for name in names
    ]


def write_progress(tmp_path: Path, text: str) -> str:
    work = tmp_path / "steps" / "teacher" / ("f" * 16) / "work"
    work.mkdir(parents=True, exist_ok=True)
    (work / "progress.json").write_text(text)
    return str(work)


POINT = {"images": 250, "total": 1000, "images_per_second": 10.0, "loss": 0.12345}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, "25 %  10 img/s  loss 0.1235  ETA 1:15"),
        ({"images_per_second": 0.1}, "25 %  0 img/s  loss 0.1235  ETA 2:05:00"),
        ({"images_per_second": 0.0}, "25 %  0 img/s  loss 0.1235  ETA ?"),
        ({"images": 1010}, "100 %  10 img/s  loss 0.1235  ETA 0:00"),
        ({"loss": float("nan")}, "25 %  10 img/s  loss nan  ETA 1:15"),
    ],
)
def test_the_progress_line_shows_share_rate_loss_and_time_left(tmp_path, change, line):
    work = write_progress(tmp_path, json.dumps({**POINT, **change}))
    assert progress.progress_line(work) == line


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"images": "x"}', "null"])
def test_a_progress_file_that_cannot_be_understood_shows_nothing(tmp_path, text):
    assert progress.progress_line(write_progress(tmp_path, text)) == ""
    assert progress.progress_line(str(tmp_path / "nowhere")) == ""


def test_without_a_terminal_there_is_a_line_per_event_and_one_now_and_then(
    tmp_path, capsys, monkeypatch
):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    write_progress(tmp_path, json.dumps(POINT))
    with progress.Progress(planned(tmp_path, "shard", "teacher"), str(tmp_path)) as shown:
        shown.show(Event("shard", "cached", seconds=1.5))
        shown.show(Event("teacher", "started"))
        for _ in range(100):  # fifty seconds of waiting
            clock[0] += 0.5
            shown.show(None)
        shown.show(Event("teacher", "retry", "node died"))
        shown.show(Event("teacher", "done", seconds=70.0))
    lines = [line[9:] for line in capsys.readouterr().out.splitlines()]  # without the time of day
    assert lines == [
        "shard      cached 1.5 s",
        "teacher    started  25 %  10 img/s  loss 0.1235  ETA 1:15",
        "teacher    running  25 %  10 img/s  loss 0.1235  ETA 1:15",
        "teacher    retry  node died",
        "teacher    done 70.0 s",
    ]


def test_on_a_terminal_the_table_shows_every_state(tmp_path, monkeypatch):
    from rich.console import Console

    kinds = ["cached", "started", "retry", "done", "failed", "skipped"]
    shown = progress.Progress(planned(tmp_path, *kinds, "waiting"), str(tmp_path))
    shown.live = type("Live", (), {"update": lambda self, table: None})()
    for kind in kinds:
        shown.show(Event(kind, kind, "why" if kind in ("failed", "skipped", "retry") else "", 2.0))
    console = Console(width=100)
    with console.capture() as captured:
        console.print(shown.table())
    rows = [line.split() for line in captured.get().splitlines()]
    assert [row[:3] for row in rows] == [
        ["✓", "cached", "cached"],
        ["▶", "started", "running"],
        ["▶", "retry", "running"],
        ["✓", "done", "done"],
        ["✗", "failed", "failed"],
        ["–", "skipped", "skipped"],
        ["·", "waiting", "waiting"],
    ]
    assert [row[-1] for row in rows if row[1] in ("retry", "failed", "skipped")] == ["why"] * 3


# --- reference and compare -----------------------------------------------------------------------


def test_the_statistics_of_the_real_images_are_written_for_others(addresses, capsys, tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    from consistency.evaluation.npz import read_npz

    assert command("run", "quickstart") == 0
    (folder,) = Path().glob("cmforge-workspace/steps/reference/*/attempts/*")
    mean, covariance = np.arange(4.0), np.diag([1.0, 2.0, 3.0, 4.0])
    save_file({"n": np.asarray(7), "mean": mean, "covariance": covariance}, folder / STATS)
    capsys.readouterr()
    assert command("reference", "export", "new/real.npz") == 0
    file = tmp_path / "new" / "real.npz"
    assert capsys.readouterr().out == f"{file}\n"
    gaussian, protocol = read_npz(file)
    assert protocol == FEATURES
    assert gaussian.n == 7
    assert np.array_equal(gaussian.mean, mean)
    assert np.array_equal(gaussian.covariance, covariance)
    assert command("reference", "export", "new") == 2
    assert "a folder stands where a file is needed" in one_line(capsys)


def test_statistics_not_computed_yet_cannot_be_exported(addresses, capsys):
    FAILING["reference"] = UserError("mend this")
    assert command("run", "quickstart") == 2
    capsys.readouterr()
    assert command("reference", "export", "x.npz") == 2
    said = "no statistics of real images yet: interrupted: runs again; run: cmforge run quickstart"
    assert one_line(capsys) == f"{said}\n"


def test_compare_is_handed_both_models_and_the_workspaces_yardstick(
    addresses, monkeypatch, capsys, tmp_path
):
    from pipelines import compare

    seen: list[Any] = []
    monkeypatch.setattr(compare, "show", lambda *given, **named: seen.append((given, named)))
    argv = ["compare", "models:/m@a", "folder"]
    assert command(*argv) == 2
    assert "nothing has run in workspace" in one_line(capsys)
    assert command("run", "quickstart", "evaluate.samples=100") == 0
    assert command(*argv, "--samples", "90", "--out", "sheet.png") == 0
    assert command(*argv) == 0
    ((names, recipe, yardstick), named), (_, defaults) = seen
    assert names == ("models:/m@a", "folder")
    assert recipe.evaluate.samples == 100
    assert yardstick.reference == VALUES["reference"]
    where = tmp_path / "cmforge-workspace"
    uri = f"sqlite:///{where}/mlflow.db"
    assert named == dict(workspace=str(where), tracking_uri=uri, samples=90, out=Path("sheet.png"))
    assert (defaults["samples"], defaults["out"]) == (None, Path("compare.png"))


# --- sample --------------------------------------------------------------------------------------


def model_folder(folder, kind):
    """A model folder: untrained, of 8x8 images in three classes."""
    import torch
    from safetensors.torch import save_file

    from consistency.published import ModelDescription, build_network

    about = ModelDescription(
        kind=kind,
        network=NetworkConfig(
            channels=8, channel_mult=(1,), num_blocks=1, attention=(), class_conditional=True
        ),
        noise=NoiseConfig(),
        size=8,
        channels=1,
        class_names=("a", "b", "c"),
    )
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: 0.2 * torch.randn(value.shape, generator=generator)
        for key, value in build_network(about).state_dict().items()
    }
    save_file(weights, folder / "weights.safetensors")
    (folder / "config.json").write_text(about.to_json())
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"), "consistency")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("teacher"), "denoiser")


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("flow"), "mean_flow")


def test_sample_draws_a_grid_and_prints_where_it_is(model, capsys):
    from PIL import Image

    assert command("sample", str(model), "--num", "4", "--out", "new/folder/grid.png") == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == Path("new/folder/grid.png").resolve()
    with Image.open(path) as image:
        assert image.width > image.height  # four in a row


def test_the_same_seed_gives_the_same_file_and_another_another(model):
    for name, *more in (["a"], ["b"], ["c", "--seed", "1"], ["d", "--steps", "2"]):
        assert command("sample", str(model), "--num", "3", "--out", name, *more) == 0
    a, b, c, d = (Path(name).read_bytes() for name in "abcd")
    assert a == b
    assert a != c
    assert a != d


def drawn(*argv):
    assert command("sample", *argv, "--num", "3", "--out", "drawn.png") == 0
    return Path("drawn.png").read_bytes()


def test_levels_are_those_asked_for(model, flow):
    folder = str(model)
    assert drawn(folder, "--levels", "80") == drawn(folder, "--steps", "1")
    assert drawn(folder, "--levels", "80,0.821") == drawn(folder, "--steps", "2")
    assert drawn(folder, "--levels", "80, 8e-1") != drawn(folder, "--steps", "2")
    assert drawn(folder, "--levels", "80,20,5,0.8") != drawn(folder, "--levels", "80,20,5,0.7")
    times = str(flow)
    assert drawn(times, "--levels", "1") == drawn(times)
    assert drawn(times, "--levels", "1,0.5") != drawn(times)


def test_guidance_is_the_teachers(teacher):
    folder = str(teacher)
    plain = drawn(folder, "--steps", "3")
    assert drawn(folder, "--steps", "3", "--guidance", "1") == plain
    assert drawn(folder, "--steps", "3", "--guidance", "2") != plain


@pytest.mark.parametrize(
    ("kind", "argv", "said"),
    [
        ("model", ["--levels", "0.8"], "sampling levels must start at sigma_max = 80: [0.8]"),
        ("model", ["--levels", "80,90"], "sampling levels must decrease: [80, 90]"),
        ("model", ["--levels", "80,nan"], "sampling levels must decrease: [80, nan]"),
        ("model", ["--levels", "80,0.001"], "must not fall below sigma_min = 0.002: [80, 0.001]"),
        ("model", ["--guidance", "2"], "guidance and churn are a diffusion model's"),
        ("flow", ["--levels", "80,0.8"], "MeanFlow's times must start at 1"),
        ("flow", ["--levels", "1,0"], "MeanFlow's times must start at 1 and stay above 0: [1, 0]"),
        ("flow", ["--guidance", "2"], "guidance and churn are a diffusion model's"),
        ("teacher", ["--levels", "80"], "levels: a diffusion model takes Heun steps; give steps"),
    ],
)
def test_levels_and_guidance_that_a_model_cannot_do_are_one_line(request, capsys, kind, argv, said):
    folder = request.getfixturevalue(kind)
    assert command("sample", str(folder), *argv) == 2
    assert said in one_line(capsys)
    assert not Path("samples.png").exists()


def test_a_teacher_without_a_null_class_is_not_guided(addresses, capsys, teacher):
    """Its answer without a class is noise that nobody trained."""
    for dropout, code in (("0.1", 0), ("0.0", 2)):
        assert command("run", "quickstart", f"teacher.label_dropout={dropout}") == 0
        folder = max(
            Path().resolve().glob("cmforge-workspace/steps/teacher/*/attempts/*"),
            key=lambda path: path.stat().st_mtime_ns,
        )
        for path in teacher.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        record_again(folder.parents[1])
        capsys.readouterr()
        assert command("sample", "teacher", "--num", "1", "--guidance", "2") == code
    assert "--guidance: this teacher learned no null class; train it with" in one_line(capsys)
    assert command("sample", "teacher", "--num", "1") == 0


def record_again(home):
    """Make a record the newest one of its step, which a test cannot wait a second for."""
    record = json.loads((home / "COMMIT.json").read_text())
    record["ended"] = f"9999-01-01T00:00:{len(list(home.parent.iterdir())):02}Z"
    (home / "COMMIT.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--class", "3"], "class: 3 is not one of this model's 3 classes"),
        (["--class", "-1"], "class: -1 is not one of this model's 3 classes"),
        (["--steps", "-2"], "--steps: -2 must be at least 1"),
        (["--num", "0"], "--num: 0 must be between 1 and 10000"),
        (["--out", "."], "a folder stands where a file is needed"),
    ],
)
def test_what_a_model_does_not_have_is_one_line(model, capsys, argv, said):
    assert command("sample", str(model), *argv) == 2
    assert said in one_line(capsys)


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"network": {}}'),
        ("weights.safetensors", b""),
        ("weights.safetensors", b"\xff" * 100),
    ],
)
def test_a_damaged_model_folder_is_one_line(model, capsys, tmp_path, file, data):
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if data is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(data)
    assert command("sample", str(tmp_path)) == 2
    assert f"{tmp_path} is not a whole model: " in one_line(capsys)


def test_weights_of_another_network_are_one_line(model, capsys, tmp_path):
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["network"]["channels"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert command("sample", str(tmp_path)) == 2
    assert "is not a whole model: " in one_line(capsys)


def test_sample_finds_the_registered_candidate_of_the_workspace(model, addresses, capsys):
    assert command("run", "quickstart") == 0
    capsys.readouterr()
    argv = ["sample", "--num", "2"]
    assert command(*argv) == 2  # the stand-in stages write no weights
    folder = next(Path().resolve().glob("cmforge-workspace/steps/distill/*/attempts/*"))
    assert one_line(capsys).startswith(f"{folder} is not a whole model: ")
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert command(*argv) == 0
    assert command("sample", "distill", "--num", "2", "--out", "again.png") == 0
    assert Path("samples.png").read_bytes() == Path("again.png").read_bytes()


def test_sample_takes_the_average_that_was_selected(addresses, capsys, tmp_path):
    two = "[{kind: power, sigma_rel: 0.05}, {kind: power, sigma_rel: 0.10}]"
    keys = ["select_ema.samples=100", f"distill.ema={two}", f"isolate.ema={two}"]
    assert command("run", "quickstart", *keys) == 0
    for step in ("distill", "select_ema-distill"):
        (folder,) = Path().glob(f"cmforge-workspace/steps/{step}/*/attempts/*")
        model_folder(folder, "consistency")
    config = json.loads((folder / "config.json").read_text())
    config["noise"]["sigma_data"] = 0.6  # tells the selected one from the trained one
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert drawn() == drawn("select_ema-distill") != drawn("distill")
    shutil.rmtree(folder.parents[1])
    assert command("sample") == 2
    assert "the distill registered last is gone from workspace" in one_line(capsys)


def test_sample_takes_the_levels_that_were_searched(addresses, capsys, tmp_path):
    assert command("run", "quickstart", "search_sigmas.steps=2") == 0
    for step in ("distill", "search_sigmas-distill"):
        (folder,) = Path().glob(f"cmforge-workspace/steps/{step}/*/attempts/*")
        model_folder(folder, "consistency")
    config = json.loads((folder / "config.json").read_text())
    config["searched"] = [[80.0, 5.0]]
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    two, by_hand = ("--steps", "2"), ("--levels", "80,5")
    assert drawn(*two) == drawn("search_sigmas-distill", *two) == drawn("distill", *by_hand)
    assert drawn(*two) != drawn("distill", *two)
    assert drawn(*by_hand[:1], "80,0.8") == drawn("distill", *by_hand[:1], "80,0.8")  # overrides
    assert drawn("--steps", "1") == drawn("distill", "--steps", "1")


def test_a_workspace_of_another_version_is_one_line(addresses, capsys):
    assert command("run", "quickstart") == 0
    (file,) = Path().glob("cmforge-workspace/steps/evaluate/*/COMMIT.json")
    record = json.loads(file.read_text())
    del record["value"]["mid_sigma"]
    file.write_text(json.dumps(record))
    capsys.readouterr()
    assert command("sample") == 2
    assert "is another version's; run the recipe again, or name a model" in one_line(capsys)


# --- doctor --------------------------------------------------------------------------------------


def test_doctor_names_every_check_and_fails_on_a_bad_one(capsys, monkeypatch, tmp_path):
    from pipelines import doctor

    file = tmp_path / "file"
    file.write_text("")
    checks = [check.name for check in doctor.examine(str(tmp_path / "w"), None)]
    assert len(set(checks)) == len(checks) >= 8
    bad = {check.name: check for check in doctor.examine(str(file), None)}["workspace"]
    assert not bad.ok
    assert "a file stands where a folder is needed" in bad.detail
    monkeypatch.setattr(
        doctor, "examine", lambda workspace, uri: [doctor.Check("thing", False, "is broken")]
    )
    assert command("doctor") == 1
    assert capsys.readouterr().out == "FAIL  thing          is broken\n"
