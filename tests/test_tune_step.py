"""From a search to its winner, and from the winner to the stage that takes it: no Ray."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from consistency.config import ConstantEMA
from infra import cluster, storage, tuning
from infra.errors import UserError
from pipelines import sweeping, trial
from pipelines.artifacts import Committed, Tuned, content_of, from_json
from pipelines.config import load_recipe
from pipelines.dag import read_record
from pipelines.ledger import Ledger
from pipelines.scoring import Job
from pipelines.steps import tune as step
from pipelines.strict_yaml import Mark, parse
from pipelines.sweep import SweepConfig
from pipelines.sweep_summary import COMPLETED, FAILED, RUNNING, STOPPED, SweepSummary
from pipelines.training import StageConfig, run_stage
from pipelines.tuned import delta_yaml
from tests.tiny_trials import (
    EMAS,
    Bench,
    Runs,
    choice,
    one_after_the_other,
    stand_in,
    stocked,
    sweep_of,
)

TURNED = "isolate.ema=[{kind: constant, beta: 0.5}, {kind: constant, beta: 0.9}]"
METHODS = sweep_of(
    choice("isolate.method", "ict", "ect"),
    choice("isolate.pairs.levels.s1", "4", "8", when=("isolate.method=ict",)),
    choice("isolate.pairs.q", "2", "4", when=("isolate.method=ect",)),
    fixed=("isolate.lr=1e-3", "isolate.ema=[{kind: constant}, {kind: constant, beta: 0.5}]"),
    trials=4,
    finalists=3,
)
Measure = Callable[..., list[Any]]


@dataclass
class Found:
    """A committed tune step, and what was measured for it."""

    bench: Bench
    committed: Committed[Tuned]
    jobs: list[Job]

    @property
    def value(self) -> Tuned:
        return self.committed.value

    @property
    def summary(self) -> SweepSummary:
        text = self.file("summary.json").read_text()
        found: SweepSummary = from_json(SweepSummary, json.loads(text))
        return found

    def file(self, name: str) -> Path:
        return Path(self.committed.url) / name


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which METHODS was searched, and nothing named yet."""
    bench = stocked(tmp_path_factory.mktemp("searched"))
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        patch.setattr(tuning, "run_trials", one_after_the_other())
        bench.search(METHODS).run()
    return Path(bench.workspace)


@pytest.fixture
def bench(searched: Path, tmp_path: Path) -> Bench:
    """A copy of it to go on with."""
    shutil.copytree(searched, tmp_path / "copy")
    return Bench(tmp_path / "copy")


def tune(
    bench: Bench,
    sweep: SweepConfig,
    measured: Mapping[int, Sequence[float]] | None = None,
    run_trials: Callable[..., None] | None = None,
) -> Found:
    """The step, committed. measured: trial -> what its second measurement finds."""
    jobs: list[Job] = []

    def measure(ctx: Any, yardstick: Any, asked: Sequence[Job]) -> list[Any]:
        jobs.extend(asked)
        names = [int(job.subject.name.removeprefix("trial-")) for job in asked]
        return [SimpleNamespace(values=tuple((measured or {})[number])) for number in names]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "run_trials", run_trials or one_after_the_other())
        if measured is not None:
            patch.setattr(step, "measure_in_step", measure)
        bench.sweep = sweep
        return Found(bench, bench.run(f"tune-{sweep.stage}"), jobs)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("it trains")


def trial_files(found: Found) -> Path:
    assert found.value.trained is not None
    home = trial.home_of(found.bench.workspace, found.value.trained)
    return Path(home) / "attempts" / read_record(home)["attempt"]


def ranks(found: Found) -> list[int]:
    """Completed trials, the best probe first."""
    return [t.number for t in found.summary.ranked() if t.state == COMPLETED]


# --- which one wins ------------------------------------------------------------------------------


def test_the_lowest_mean_of_the_second_measurement_wins(bench):
    order = ranks(tune(bench, METHODS, {n: (1.0, 1.0) for n in range(4)}))
    assert len(order) == 4
    values = {order[0]: (5.0, 5.2), order[1]: (1.0, 6.0), order[2]: (9.0, 1.1)}
    bench.sweep = None
    found = tune(bench, replace(METHODS, name="again"), values)
    assert found.value.winner == order[1]  # 3.5 against 5.1 and 5.05, though not the best probe
    assert found.value.value == 3.5
    assert found.value.metric == "fd_domain_70"
    assert [f.trial for f in found.summary.finalists] == [order[1], order[2], order[0]]
    assert [f.values for f in found.summary.finalists] == [values[n] for n in order[1:3]] + [
        values[order[0]]
    ]
    assert found.value.trained == found.summary.trial(order[1]).fingerprint


def test_the_best_are_measured_with_the_protocol_of_finalists_and_their_best_weights(bench):
    sweep = replace(METHODS, finalists=2, finalist_seed=7, name="protocol")
    found = tune(bench, sweep, {n: (1.0, 2.0) for n in range(4)})
    order = ranks(found)[:2]
    assert [job.subject.name for job in found.jobs] == [f"trial-{n}" for n in order]
    for job in found.jobs:
        asked = job.protocol
        assert (asked.samples, asked.seed_blocks, asked.seed, asked.steps) == (70, 2, 7, 2)
        assert json.loads(job.subject.description)["mid_sigma"] == 0.821
    for finalist, job in zip(found.summary.finalists, found.jobs, strict=True):
        ended = found.summary.trial(finalist.trial)
        lowest = ended.probes[-1].lowest(2)
        assert lowest is not None
        assert finalist.ema == lowest.ema
        name = "weights" if lowest.ema == "constant-0.9999" else f"ema/{lowest.ema}"
        home = trial.home_of(bench.workspace, ended.fingerprint)
        path = Path(home, "attempts", read_record(home)["attempt"], f"{name}.safetensors")
        assert job.subject.weights_url == str(path)
        assert job.subject.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_measured_for_real_the_means_are_those_of_the_evaluators(bench):
    found = tune(bench, replace(METHODS, finalists=2))
    finalists = found.summary.finalists
    assert [len(finalist.values) for finalist in finalists] == [2, 2]
    assert [f.value for f in finalists] == sorted(f.value for f in finalists)
    assert found.value.winner == finalists[0].trial
    assert len({value for finalist in finalists for value in finalist.values}) == 4


def test_finalists_without_a_finite_mean_do_not_win(bench):
    first = tune(bench, METHODS, {n: (1.0, 1.0) for n in range(4)})
    order = ranks(first)
    nan, inf = float("nan"), float("inf")
    values = {order[0]: (nan, 1.0), order[1]: (inf, 1.0), order[2]: (4.0, 4.0)}
    assert tune(bench, replace(METHODS, name="b"), values).value.winner == order[2]
    # With none left, the last probe decides; but nothing is taken for what was not measured.
    values[order[2]] = (nan, nan)
    found = tune(bench, replace(METHODS, name="c"), values)
    assert (found.value.winner, found.value.trained) == (order[0], None)
    assert found.value.value == found.summary.trial(order[0]).objective(2)


# --- what is written down ------------------------------------------------------------------------


def test_the_settings_make_the_winner_with_its_best_ema_first(bench):
    found = tune(bench, METHODS, {n: (float(n != 2), 1.0) for n in range(4)})
    assert found.value.winner == 2
    settings = found.value.settings
    ended = found.summary.trial(2)
    assert found.value.ema == "constant-0.5"  # of 4 steps 0.9999 has hardly seen any
    assert settings[:-1] == ("isolate.lr=1e-3", *ended.settings)
    assert settings[-1].startswith("isolate.ema=")
    recipe = bench.source.recipe(settings)
    assert recipe.isolate.ema == (ConstantEMA(beta=0.5), ConstantEMA(beta=0.9999))
    tried = bench.source.recipe((*METHODS.fixed, *ended.settings))
    assert replace(recipe.isolate, ema=tried.isolate.ema) == tried.isolate
    assert replace(recipe, isolate=tried.isolate) == tried  # and nothing else


def test_the_written_recipe_and_the_delta_say_the_same(bench):
    found = tune(bench, METHODS, {n: (float(n), 1.0) for n in range(4)})
    recipe = bench.source.recipe(found.value.settings)
    assert load_recipe(str(found.file("recipe.yaml"))) == recipe
    delta = found.file("delta.yaml").read_text()
    problems: list[Any] = []
    parse(delta, Mark(0, "delta.yaml", 1, 1), problems)
    assert problems == []
    assert leaves(yaml.load(delta, yaml.BaseLoader)) == {
        key: yaml.load(value, yaml.BaseLoader)
        for key, _, value in (text.partition("=") for text in found.value.settings)
    }
    assert delta.splitlines()[0] == f"# Winner of sweep mine: trial {found.value.winner} of 4."
    assert delta.splitlines()[1] == f"# {found.summary.command}"
    assert all(text.partition("=")[0] in found.summary.command for text in found.value.settings)
    names = {path.name for path in Path(found.committed.url).iterdir()}
    assert names == {"recipe.yaml", "delta.yaml", "summary.json", "sweep.html"}
    ((summary, logged),) = Runs.last.finished
    assert logged == ["delta.yaml", "summary.json", "sweep.html"]
    assert summary == found.summary


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> what stands there, lists as they are."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}.{key}" if prefix else key)
    return found


def test_a_delta_keeps_values_as_they_are_written():
    settings = [
        "a.lr=1e-3",
        "a.pairs.levels.s1=1_280",
        "a.flip=true",
        "a.pairs.q=2",
        "b.x=[{k: 1}]",
    ]
    assert delta_yaml(settings) == (
        "a:\n  lr: 1e-3\n  pairs:\n    levels:\n      s1: 1_280\n    q: 2\n  flip: true\n"
        "b:\n  x: [{k: 1}]\n"
    )
    assert delta_yaml([]) == ""


def test_the_schedules_of_the_best_and_the_worst_are_in_the_summary(bench):
    found = tune(bench, METHODS, {n: (1.0, 1.0) for n in range(4)})
    assert {s.trial for s in found.summary.schedules} == {0, 1, 2, 3}
    for schedule in found.summary.schedules:
        ect = "isolate.method=ect" in found.summary.trial(schedule.trial).settings
        assert (schedule.N is None) == ect
    assert found.summary.images == 64
    assert found.value.spent == 1.0
    assert found.summary.spent_images == found.summary.full_images == 4 * 64


# --- the stage that takes it ---------------------------------------------------------------------


def test_of_a_whole_budget_the_stage_takes_the_winners_own_files(bench, monkeypatch):
    found = tune(bench, METHODS, {n: (float(n != 1), 1.0) for n in range(4)})
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "train_workers", never)
        patch.setattr(trial, "in_this_process", never)
        adopted = bench.run("isolate")
    own, model = trial_files(found), adopted.value
    assert (model.ema, model.emas) == ("constant-0.5", ("constant-0.9999",))
    home = Path(adopted.url)
    pairs = {
        "weights.safetensors": "ema/constant-0.5.safetensors",
        "ema/constant-0.9999.safetensors": "weights.safetensors",
        **{name: name for name in ("config.json", "curve.jsonl", "watch.jsonl")},
    }
    for mine, its in pairs.items():
        assert (home / mine).read_bytes() == (own / its).read_bytes()
    assert {str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()} == set(pairs)
    data = (home / "weights.safetensors").read_bytes()
    assert model.weights_sha256 == hashlib.sha256(data).hexdigest()
    assert data != (own / "weights.safetensors").read_bytes()

    # And training with the winner's settings makes the very same model.
    recipe = load_recipe(str(found.file("recipe.yaml")))
    ctx = bench.context("anew")
    given = bench.committed("teacher") if recipe.isolate.init == "teacher" else None
    anew = run_stage(ctx, StageConfig.of(recipe, "isolate"), bench.committed("shard"), given)
    assert content_of(anew) == content_of(model)
    for name in ("weights.safetensors", "ema/constant-0.9999.safetensors", "config.json"):
        assert (ctx.out / name).read_bytes() == (home / name).read_bytes()


def test_a_winner_whose_best_ema_is_its_first_is_taken_as_it_is(bench, monkeypatch):
    sweep = replace(METHODS, fixed=(TURNED,), trials=1)
    found = tune(bench, sweep, {0: (1.0, 1.0)})
    monkeypatch.setattr(cluster, "train_workers", never)
    adopted = bench.run("isolate")
    assert (adopted.value.ema, adopted.value.emas) == (EMAS[1], EMAS[:1])
    for path in trial_files(found).rglob("*.safetensors"):
        name = path.relative_to(trial_files(found))
        assert (Path(adopted.url) / name).read_bytes() == path.read_bytes()


def test_when_the_trials_files_are_gone_the_stage_trains_to_the_same_weights(bench, monkeypatch):
    found = tune(bench, METHODS, {n: (float(n != 3), 1.0) for n in range(4)})
    first = bench.run("isolate")
    storage.remove_tree(f"{bench.workspace}/steps/trial")
    storage.remove_tree(str(Path(first.url).parent.parent))
    trained: list[int] = []
    real = cluster.train_workers
    monkeypatch.setattr(
        cluster, "train_workers", lambda *a, **k: trained.append(1) or real(*a, **k)
    )
    again = bench.run("isolate")
    assert trained == [1]
    assert found.value.trained is not None
    assert again.value.weights_sha256 == first.value.weights_sha256
    assert content_of(again.value) == content_of(first.value)


def test_distillation_takes_its_winner_too(tmp_path, monkeypatch):
    sweep = sweep_of(choice("distill.lr", "1e-3", "1e-2"), stage="distill", trials=2, probes=2)
    found = tune(stocked(tmp_path / "d"), sweep, {0: (2.0, 2.0), 1: (1.0, 1.0)})
    assert (found.value.stage, found.value.winner) == ("distill", 1)
    monkeypatch.setattr(cluster, "train_workers", never)
    adopted = found.bench.run("distill")
    first = adopted.value.ema
    assert first == found.value.ema
    its = "weights" if first == EMAS[0] else f"ema/{first}"
    data = (Path(adopted.url) / "weights.safetensors").read_bytes()
    assert data == (trial_files(found) / f"{its}.safetensors").read_bytes()
    assert adopted.value.weights_sha256 == hashlib.sha256(data).hexdigest()
    assert set(adopted.value.emas) | {first} == set(EMAS)


def test_of_a_smaller_budget_the_stage_trains_with_the_settings_in_full(tmp_path, monkeypatch):
    sweep = sweep_of(choice("isolate.lr", "1e-3", "1e-2"), trials=2, probes=2, budget=0.5)
    found = tune(stocked(tmp_path / "h"), sweep, {0: (2.0, 2.0), 1: (1.0, 1.0)})
    assert found.value.trained is None
    assert {t.images for t in found.summary.trials} == {32}
    assert "images" not in found.file("delta.yaml").read_text()
    bench = found.bench
    model = bench.run("isolate")
    assert (model.value.images, model.value.steps) == (64, 4)
    recipe = bench.source.recipe(found.value.settings)
    assert recipe.isolate.images == 64
    assert found.value.settings[:-1] == found.summary.trial(1).settings
    ctx = bench.context("anew")
    anew = run_stage(ctx, StageConfig.of(recipe, "isolate"), bench.committed("shard"))
    assert anew.weights_sha256 == model.value.weights_sha256
    assert model.value.ema == found.value.ema


# --- no clear winner -----------------------------------------------------------------------------


def test_without_a_finite_distance_there_is_no_winner_but_reasons(tmp_path):
    wild = choice("isolate.lr", "1e30", "1e31")
    sweep = sweep_of(wild, trials=2, probes=2, fixed=("isolate.dropout=0.0",))
    bench = stocked(tmp_path / "w", "isolate.lr=1e29")
    with pytest.raises(UserError) as error:
        tune(bench, sweep)
    assert str(error.value) == (
        "sweep mine: none of 2 trials gave a finite distance; "
        + Ledger(bench.search(sweep).ledger.home).trials()[0].reason
    )
    assert "loss is nan at step 1 (16 images)" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def fake_trials(*trials: tuple[Sequence[float], str]) -> Callable[..., None]:
    """Trials that report these distances in two steps (+1 in one), and then this: a verdict."""

    def run_trials(trial: Any, sweep: Any, **_: Any) -> None:
        for values, verdict in trials:
            number, payload = sweep.next()
            marks = payload["job"].config.marks()
            lines: list[dict[str, Any]] = []
            for at, value in enumerate(values):
                lines += [
                    {
                        "images": marks[at],
                        "ema": EMAS[1],
                        "steps": steps,
                        "value": value + 2 - steps,
                        "seconds": 1.0,
                    }
                    for steps in (1, 2)
                ]
                told = sweeping.probes.report(lines, marks, 2)
                sweep.heard(number, told, verdict == STOPPED and at == len(values) - 1)
            if verdict == FAILED:
                sweep.heard(number, {"failed": f"loss is nan in {number}"}, False)

    return run_trials


def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock takes a minute."""
    clock = iter(range(0, 60_000, 60))
    monkeypatch.setattr(sweeping, "time", SimpleNamespace(monotonic=lambda: next(clock)))


LRS = choice("isolate.lr", "1e-3", "2e-3", "4e-3")


def test_when_the_time_is_over_the_furthest_and_then_the_best_wins(tmp_path, monkeypatch):
    timed(monkeypatch)
    run_trials = fake_trials(
        ([5.0, 4.0], RUNNING), ([5.0, 3.0], RUNNING), ([1.0], STOPPED), ([0.5], FAILED)
    )
    sweep = sweep_of(LRS, trials=4, minutes=0.5)
    found = tune(stocked(tmp_path / "t"), sweep, {}, run_trials)
    assert found.jobs == []  # none came to its end, so there is nothing to measure again
    assert [t.state for t in found.summary.trials] == [STOPPED, STOPPED, STOPPED, FAILED]
    assert (found.value.winner, found.value.value, found.value.trained) == (1, 3.0, None)
    assert found.value.ema == EMAS[1]
    assert found.value.metric == "fd_domain"
    assert found.value.spent == round((48 + 48 + 16 + 16) / (4 * 64), 4)
    # The stage then trains with its settings, as long as the recipe says.
    model = found.bench.run("isolate")
    assert (model.value.images, model.value.ema) == (64, EMAS[1])
    ledger = found.bench.search(sweep).ledger
    assert [t.state for t in ledger.trials()] == [
        RUNNING,
        RUNNING,
        STOPPED,
        FAILED,
    ]  # they can go on


def test_one_that_came_to_its_end_wins_over_better_ones_that_did_not(tmp_path):
    bench = stocked(tmp_path / "e")
    stopped = one_after_the_other(lambda number, result: number == 1)
    sweep = sweep_of(LRS, trials=2, probes=2, finalists=5)
    found = tune(bench, sweep, {0: (9.0, 9.0)}, stopped)
    assert [t.state for t in found.summary.trials] == [COMPLETED, STOPPED]
    assert (found.value.winner, found.value.value) == (0, 9.0)
    assert [job.subject.name for job in found.jobs] == ["trial-0"]


def test_trained_weights_of_different_settings_differ(searched):
    """Else the tests above could not tell them apart."""
    bench = Bench(searched)
    trials = bench.search(METHODS).all()
    assert [t.state for t in trials] == [COMPLETED] * 4
    assert {t.setting("isolate.method") for t in trials} == {"ict", "ect"}
    seen = []
    for one in trials:
        home = trial.home_of(str(searched), one.fingerprint)
        folder = Path(home, "attempts", read_record(home)["attempt"])
        arrays = load_file(folder / "ema" / "constant-0.5.safetensors")
        seen.append(b"".join(arrays[name].tobytes() for name in sorted(arrays)))
    assert len(set(seen)) == 4


def test_a_failed_trial_does_not_win_however_far_it_came(tmp_path, monkeypatch):
    timed(monkeypatch)
    run_trials = fake_trials(([5.0], RUNNING), ([2.0, 1.0], FAILED))
    sweep = sweep_of(LRS, trials=2, minutes=0.5)
    assert tune(stocked(tmp_path / "t"), sweep, {}, run_trials).value.winner == 0


def test_a_delta_opens_a_mapping_of_which_a_key_is_set():
    text = delta_yaml(["isolate.target={kind: ema, mu: 0.9}", "isolate.target.mu=0.5"])
    assert yaml.safe_load(text) == {"isolate": {"target": {"kind": "ema", "mu": 0.5}}}


def test_a_delta_does_not_mind_spaces_around_keys(tmp_path):
    emas = "isolate.ema = [{kind: constant, beta: 0.3}, {kind: constant, beta: 0.2}]"
    fixed = (emas, "isolate.dropout = 0.2")
    sweep = sweep_of(choice("isolate.lr", "1e-3", "2e-3"), fixed=fixed, trials=2, probes=1)
    found = tune(stocked(tmp_path / "t"), sweep)
    problems: list[Any] = []
    parse(found.file("delta.yaml").read_text(), Mark(0, "delta.yaml", 1, 1), problems)
    assert problems == []
    assert sum("ema" in text.partition("=")[0] for text in found.value.settings) == 1


def test_adopted_snapshots_are_named_as_training_names_them(tmp_path):
    emas = "isolate.ema=[{kind: power, sigma_rel: 0.2}, {kind: power, sigma_rel: 0.05}]"
    fixed = (emas, "isolate.snapshots=2")
    sweep = sweep_of(choice("isolate.lr", "1e-3", "2e-3"), fixed=fixed, trials=2, probes=2)
    found = tune(stocked(tmp_path / "t"), sweep)
    adopted = found.bench.run("isolate").value
    recipe = load_recipe(str(found.file("recipe.yaml")))
    config = StageConfig.of(recipe, "isolate")
    anew = run_stage(found.bench.context("anew"), config, found.bench.committed("shard"))
    assert content_of(anew) == content_of(adopted)
