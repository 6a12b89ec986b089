"""One setting of a sweep, from its job to its commit, through kills: Ray Tune is stood in for."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra import storage, tuning
from infra.errors import UserError
from pipelines import probes, train_worker, trial, yardstick
from pipelines.dag import read_record
from pipelines.steps.trial import TrialConfig
from pipelines.trial import TrialJob
from pipelines.watch import LOG
from tests.tiny_trials import EMAS, Bench, Worker, stand_in, stocked

MARKS = (32, 64, 96)
Result = dict[str, Any]


class Killed(BaseException):
    """The process is gone."""


class Told:
    """What a trial reports; the report `dies_at` (the first is 1) is its last."""

    def __init__(
        self, dies_at: int | None = None, by: type[BaseException] = SystemExit, after: Any = None
    ) -> None:
        self.results: list[Result] = []
        self.dies_at, self.by, self.after = dies_at, by, after

    def __call__(self, result: Mapping[str, Any]) -> None:
        self.results.append(dict(result))
        if self.after is not None:
            self.after()
        if len(self.results) == self.dies_at:
            raise self.by(0)

    @property
    def probes(self) -> list[tuple[int, bool]]:
        """Number, and whether it was only repeated."""
        return [(r["probe"], bool(r.get("repeated"))) for r in self.results]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    stand_in(monkeypatch)
    return stocked(tmp_path / "one")


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    """To be undone before the test is over."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def job_of(bench: Bench, *settings: str, retries: int = 0, **changes: Any) -> TrialJob:
    fields: dict[str, Any] = {
        "stage": bench.stage(*settings),
        "probes": 3,
        "steps": 2,
        "samples": 40,
        "noise_seed": 3,
        "mid_sigma": 0.821,
        "allow_rank_deficient": True,
    }
    return TrialJob(
        config=TrialConfig(**(fields | changes)),
        inputs={name: bench.committed(name) for name in ("shard", "reference")},
        settings=bench.settings,
        over=False,
        retries=retries,
    )


def run(job: TrialJob, told: Told, monkeypatch: pytest.MonkeyPatch) -> Told:
    """An attempt in one process of its own: `told` hears what Tune would."""
    monkeypatch.setattr(tuning, "report", told)
    try:
        trial.run(job, told)
    except (SystemExit, Killed, KeyboardInterrupt):
        assert len(told.results) == told.dies_at
    return told


def files(job: TrialJob) -> Path:
    """Of the committed attempt."""
    return Path(job.home) / "attempts" / read_record(job.home)["attempt"]


def weights(folder: Path) -> dict[str, bytes]:
    found = folder.rglob("*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def seen(lines: list[Mapping[str, Any]]) -> list[Result]:
    """Lines of a watch log, but for the seconds."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def logged(job: TrialJob) -> list[Result]:
    text = (files(job) / LOG).read_text()
    return seen([json.loads(line) for line in text.splitlines()])


def checkpoints(job: TrialJob) -> list[str]:
    return sorted(p.name for p in Path(job.home, "work").glob("checkpoint-*"))


def latest(job: TrialJob) -> str:
    return str(json.loads(Path(job.home, "work", "latest.json").read_text())["name"])


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("it trains")


# --- to the end ----------------------------------------------------------------------------------


def test_a_trial_trains_to_the_end_tells_every_probe_and_commits(bench, monkeypatch):
    job = job_of(bench)
    told = run(job, Told(), monkeypatch)
    assert told.probes == [(1, False), (2, False), (3, False)]
    assert [result["of"] for result in told.results] == [3, 3, 3]
    record = read_record(job.home)
    assert (record["step"], record["value"]["images"]) == ("trial", 96)
    assert record["value"]["ema"] == EMAS[0]
    assert set(weights(files(job))) == {"weights.safetensors", "ema/constant-0.5.safetensors"}
    assert seen(told.results[-1]["lines"]) == logged(job)
    assert not (Path(job.home) / "work").exists()


def test_its_weights_are_those_of_the_stage_that_nobody_looks_at(bench, monkeypatch):
    """The probes change nothing, nor does the process that trains: bitwise."""
    from pipelines.training import run_stage

    job = job_of(bench)
    run(job, Told(), monkeypatch)
    ctx = bench.context("plain")
    model = run_stage(ctx, job.config.stage, bench.committed("shard"))
    assert not model.watched
    assert weights(ctx.out) == weights(files(job))
    assert model.weights_sha256 == read_record(job.home)["value"]["weights_sha256"]


def test_it_is_looked_at_exactly_at_its_marks(bench, monkeypatch):
    told = run(job_of(bench, "isolate.images=107"), Told(), monkeypatch)  # 7 steps in 3 parts
    assert [result["lines"][-1]["images"] for result in told.results] == [32, 80, 112]
    job = job_of(bench, "isolate.lr=1e-3")
    run(job, Told(), monkeypatch)
    assert tuple(dict.fromkeys(line["images"] for line in logged(job))) == job.config.marks()
    assert job.config.marks() == MARKS


def test_every_sampling_ema_is_scored_in_one_and_in_two_steps(bench, monkeypatch):
    job = job_of(bench)
    run(job, Told(), monkeypatch)
    assert [(line["images"], line["ema"], line["steps"]) for line in logged(job)] == [
        (images, ema, steps) for images in MARKS for ema in EMAS for steps in (1, 2)
    ]
    assert len({line["value"] for line in logged(job)}) == 12  # and none for another


@pytest.mark.parametrize("steps", [1, 2])
def test_the_distance_is_the_best_emas_in_the_steps_of_the_objective(bench, monkeypatch, steps):
    told = run(job_of(bench, steps=steps), Told(), monkeypatch)
    for result in told.results:
        images = result["lines"][-1]["images"]
        values = [
            line["value"]
            for line in result["lines"]
            if line["steps"] == steps and line["images"] == images
        ]
        assert len(values) == 2
        assert result["distance"] == min(values)


def test_equal_weights_give_equal_values_in_every_trial(bench, monkeypatch):
    """Common noise: a distance depends on weights alone, whichever trial they are of."""
    turned = "isolate.ema=[{kind: constant, beta: 0.5}, {kind: constant, beta: 0.9}]"
    jobs = [job_of(bench), job_of(bench, turned), job_of(bench, noise_seed=4)]
    assert len({job.fingerprint for job in jobs}) == 3
    values = []
    for job in jobs:
        run(job, Told(), monkeypatch)
        values.append({(d["images"], d["ema"], d["steps"]): d["value"] for d in logged(job)})
    assert values[0] == values[1]
    assert len(values[0]) == 12
    assert all(values[2][key] != value for key, value in values[0].items())


def test_what_it_tells_a_scheduler_is_always_a_number():
    line = {"images": 32, "ema": "a", "steps": 2, "value": float("nan"), "seconds": 1.0}
    told = probes.report([line, line | {"ema": "b", "value": float("inf")}], MARKS, 2)
    assert told["distance"] == probes.WORST
    better = [line, line | {"ema": "b", "value": 7.0}, line | {"steps": 1, "value": 1.0}]
    assert probes.report(better, MARKS, 2)["distance"] == 7.0


# --- killed and run again ------------------------------------------------------------------------


@pytest.mark.parametrize("by", [SystemExit, Killed])
@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_killed_after_a_probe_it_goes_on_from_there(bench, tmp_path, monkeypatch, dies_at, by):
    job = job_of(bench)
    told = run(job, Told(dies_at, by), monkeypatch)
    assert told.probes == [(n, False) for n in range(1, dies_at + 1)]
    trained: list[int] = []
    real = train_worker.run
    monkeypatch.setattr(train_worker, "run", lambda *a: trained.append(1) or real(*a))
    again = run(job, Told(), monkeypatch)
    # The last of the known ones may not have been answered, so it is no repetition.
    expected = [(n, n < dies_at) for n in range(1, 4)]
    assert again.probes == expected
    assert len(trained) == (dies_at < 3)
    for first, second in zip(told.results, again.results, strict=False):
        assert first["lines"] == second["lines"]  # of known ones, the seconds too
        assert first["distance"] == second["distance"]
    whole = job_of(stocked(tmp_path / "two"))
    run(whole, Told(), monkeypatch)
    assert weights(files(job)) == weights(files(whole))
    assert logged(job) == logged(whole)
    assert [seen(r["lines"]) for r in again.results] == [
        [line for line in logged(whole) if line["images"] <= mark] for mark in MARKS
    ]


def test_killed_again_and_again_it_comes_to_the_same_end(bench, tmp_path, monkeypatch):
    job = job_of(bench)
    told = [run(job, Told(n), monkeypatch) for n in (1, 1, 2, 2, 3)]
    assert told[1].probes == [(1, False)]  # before it could train: nothing is lost
    assert told[3].probes == [(1, True), (2, False)]
    assert run(job, Told(), monkeypatch).probes == [(1, True), (2, True), (3, False)]
    whole = job_of(stocked(tmp_path / "two"))
    run(whole, Told(), monkeypatch)
    assert weights(files(job)) == weights(files(whole))


def test_it_goes_on_from_its_checkpoint_not_from_the_start(bench, monkeypatch):
    job = job_of(bench)
    run(job, Told(2), monkeypatch)
    begun: list[int] = []
    real = train_worker._Running.restore

    def restore(self: Any, folder: Path) -> None:
        real(self, folder)
        begun.append(self.stage.state.images)

    monkeypatch.setattr(train_worker._Running, "restore", restore)
    run(job, Told(), monkeypatch)
    assert begun == [64]


@pytest.mark.parametrize("at", range(1, 40, 2))
def test_killed_at_any_write_nothing_is_lost(bench, monkeypatch, patch, at):
    """Just before and just after it: of the log, a checkpoint, what names it, the commit."""
    reference = test_killed_at_any_write_nothing_is_lost.__dict__
    job = job_of(bench)
    if "whole" not in reference:
        other = job_of(stocked(Path(bench.workspace).parent / "two"))
        run(other, Told(), monkeypatch)
        reference["whole"] = weights(files(other)), logged(other)
    for before in (True, False):
        _kill_at(at, before, patch)
        said = Told()
        try:
            monkeypatch.setattr(tuning, "report", said)
            trial.run(job, said)
            over = True
        except Killed:
            over = False
        patch.undo()
        known = len(said.probes)
        again = run(job, Told(), monkeypatch)
        numbers = [number for number, _ in again.probes]
        assert sorted(set(numbers)) == [1, 2, 3]
        assert numbers == sorted(numbers)
        assert all(repeated for number, repeated in again.probes if number < min(known, 3))
        assert (weights(files(job)), logged(job)) == reference["whole"]
        storage.remove_tree(job.home)
    if at > 35:
        assert over, "more writes than were tried"


def _kill_at(at: int, before: bool, patch: pytest.MonkeyPatch) -> None:
    """The process dies at its `at`th write, before it or after."""
    count = 0

    def killing(real: Any) -> Any:
        def write(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and before:
                raise Killed
            result = real(*arguments)
            if count == at:
                raise Killed
            return result

        return write

    for name in ("write_bytes", "put_if_absent", "upload_file", "remove_tree"):
        patch.setattr(storage, name, killing(getattr(storage, name)))


# --- nothing is done twice -----------------------------------------------------------------------


@pytest.mark.parametrize("known", [1, 2, 3])
def test_one_that_is_over_only_repeats(bench, monkeypatch, known):
    job = job_of(bench)
    told = run(job, Told(known), monkeypatch)
    monkeypatch.setattr(train_worker, "run", never)
    again = run(replace(job, over=True), Told(), monkeypatch)
    assert again.probes == [(n, True) for n in range(1, known + 1)]
    assert [r["lines"] for r in again.results] == [r["lines"] for r in told.results]


def test_one_that_is_over_and_said_nothing_says_nothing(bench, monkeypatch):
    monkeypatch.setattr(train_worker, "run", never)
    assert run(replace(job_of(bench), over=True), Told(), monkeypatch).results == []


@pytest.mark.parametrize("over", [True, False])
def test_a_committed_trial_costs_nothing_and_tells_every_probe(bench, monkeypatch, over):
    job = job_of(bench)
    told = run(job, Told(), monkeypatch)
    before = files(job)
    monkeypatch.setattr(train_worker, "run", never)
    monkeypatch.setattr(yardstick.Yardstick, "at", never)
    again = run(replace(job, over=over), Told(), monkeypatch)
    # Nobody may have heard of the last one: then it is what ends the trial.
    assert again.probes == [(1, True), (2, True), (3, over)]
    assert [r["distance"] for r in again.results] == [r["distance"] for r in told.results]
    assert files(job) == before


# --- failures ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_told_once_and_not_tried_again(bench, monkeypatch):
    attempts: list[int] = []
    real = train_worker.run
    monkeypatch.setattr(train_worker, "run", lambda *a: attempts.append(1) or real(*a))
    job = job_of(bench, "isolate.lr=1e30", retries=3)
    told = run(job, Told(), monkeypatch)
    assert [key for key in ("failed", "mistake") if key in told.results[-1]] == ["failed"]
    assert "finite" in told.results[-1]["failed"]
    assert sum("failed" in result for result in told.results) == len(attempts) == 1
    assert not Path(job.home, "COMMIT.json").exists()


def test_a_users_mistake_is_told_as_such(bench, monkeypatch):
    job = job_of(bench, retries=3)
    shards = Path(job.inputs["shard"].url) / "shards" / "manifest.json"
    shards.write_text(shards.read_text() + " ")
    (result,) = run(job, Told(), monkeypatch).results
    assert list(result) == ["mistake"]
    assert "manifest.json" in result["mistake"]
    assert "\n" not in result["mistake"]


@pytest.mark.parametrize("retries", [0, 2])
def test_any_other_error_is_tried_again_and_then_told_with_its_place(bench, monkeypatch, retries):
    attempts: list[int] = []

    def broken(*_: Any) -> None:
        attempts.append(1)
        raise ZeroDivisionError(f"in attempt {len(attempts)}\nand a second line")

    monkeypatch.setattr(train_worker, "run", broken)
    (result,) = run(job_of(bench, retries=retries), Told(), monkeypatch).results
    assert len(attempts) == retries + 1
    assert list(result) == ["failed"]
    said, _, place = result["failed"].removesuffix(")").partition(" (traceback: ")
    assert said == f"ZeroDivisionError: in attempt {retries + 1}"
    assert "in broken" in Path(place).read_text()


def test_an_error_that_passes_leaves_no_trace(bench, tmp_path, monkeypatch):
    """In its second probe; the retry goes on from the first one's checkpoint."""
    from pipelines.watch import Watch

    real, left = Watch.probe, [0, 1, 0, 0]

    def probe(self: Any, *arguments: Any) -> Any:
        if left.pop(0):
            raise MemoryError("just now")
        return real(self, *arguments)

    monkeypatch.setattr(Watch, "probe", probe)
    job = job_of(bench, retries=1)
    assert run(job, Told(), monkeypatch).probes == [(1, False), (2, False), (3, False)]
    assert left == []
    monkeypatch.setattr(Watch, "probe", real)
    whole = job_of(stocked(tmp_path / "two"))
    run(whole, Told(), monkeypatch)
    assert weights(files(job)) == weights(files(whole))


# --- checkpoints ---------------------------------------------------------------------------------


def test_only_the_last_checkpoint_is_kept(bench, monkeypatch):
    job = job_of(bench)
    found: list[list[str]] = []

    def look() -> None:
        if (Path(job.home) / "work").exists():
            found.append(checkpoints(job))
            assert found[-1] == [latest(job)]
            folder = Path(job.home, "work", latest(job))
            assert {"curve.jsonl", LOG} < {path.name for path in folder.iterdir()}

    run(job, Told(after=look), monkeypatch)
    assert [[name[: len("checkpoint-000000000032")] for name in names] for names in found] == [
        [f"checkpoint-{images:012}"] for images in MARKS[:2]
    ]


def test_a_crash_before_a_checkpoint_is_named_keeps_the_one_before(bench, monkeypatch, patch):
    job = job_of(bench)
    real, named = storage.write_bytes, []

    def write(url: str, data: bytes) -> None:
        if url.endswith("latest.json"):
            named.append(url)
            if len(named) == 2:
                raise Killed
        real(url, data)

    patch.setattr(storage, "write_bytes", write)
    monkeypatch.setattr(tuning, "report", Told())
    with pytest.raises(Killed):
        trial.run(job, Told())
    patch.undo()
    assert latest(job).startswith("checkpoint-000000000032-")
    here = trial._Here(f"{job.home}/work")
    with here.latest_checkpoint() as folder:
        assert folder is not None
        images = [json.loads(line)["images"] for line in (folder / LOG).read_text().splitlines()]
        assert set(images) == {32}
    again = run(job, Told(), monkeypatch)
    # The second probe was written down, though not told; its checkpoint has to be made anew.
    assert again.probes == [(1, True), (2, False), (2, False), (3, False)]
    assert seen(again.results[1]["lines"]) == seen(again.results[2]["lines"])


def test_without_a_checkpoint_there_is_none(tmp_path):
    with trial._Here(str(tmp_path)).latest_checkpoint() as folder:
        assert folder is None


def test_a_checkpoint_that_is_no_probe_tells_nothing(bench, tmp_path, monkeypatch):
    """The stage's own cadence makes checkpoints between the probes."""
    told = Told()
    monkeypatch.setattr(tuning, "report", told)
    here = trial._Here(str(tmp_path / "work"))
    for images in (16, 32):
        folder = tmp_path / f"made-{images}"
        folder.mkdir()
        (folder / "state").write_text(str(images))
        here.publish(folder, {"images": images, **({"distance": 1.0} if images == 32 else {})})
        with here.latest_checkpoint() as found:
            assert found is not None
            assert (found / "state").read_text() == str(images)
    assert [result["images"] for result in told.results] == [32]


def test_checkpoints_between_the_probes_change_nothing(bench, tmp_path, monkeypatch):
    often = stocked(tmp_path / "two", checkpoint_every_seconds=0)
    first, second = job_of(bench), job_of(often)
    run(first, Told(), monkeypatch)
    told = run(second, Told(2), monkeypatch)
    assert told.probes == [(1, False), (2, False)]
    run(second, Told(), monkeypatch)
    assert first.fingerprint == second.fingerprint
    assert weights(files(first)) == weights(files(second))
    assert logged(first) == logged(second)


# --- more than one worker ------------------------------------------------------------------------


def test_more_workers_are_ray_trains_and_tell_tune_themselves(tmp_path, monkeypatch):
    """What they report goes through Train, which passes it on: the last probe is the trial's."""
    from infra import cluster

    stand_in(monkeypatch)
    bench = stocked(tmp_path / "two", workers=2)
    told, asked = Told(), []

    class Reporting(Worker):
        def publish(self, folder: Path | None, report: Mapping[str, Any]) -> None:
            if "distance" in report:
                told(report)

    def workers(function: Any, payload: Any, **options: Any) -> Any:
        asked.append((options["workers"], options["reports_to_tune"]))
        return function(payload)

    monkeypatch.setattr(cluster, "TrainWorker", Reporting)
    monkeypatch.setattr(cluster, "train_workers", workers)
    job = job_of(bench)
    trial.run(job, told)
    assert asked == [(2, True)]
    assert told.probes == [(1, False), (2, False), (3, False)]


def test_a_mistake_of_the_training_is_not_taken_for_a_failure(bench, monkeypatch):
    def wrong(*_: Any) -> None:
        raise UserError("isolate.batch: is wrong; mend it")

    monkeypatch.setattr(train_worker, "run", wrong)
    assert run(job_of(bench), Told(), monkeypatch).results == [
        {"mistake": "isolate.batch: is wrong; mend it"}
    ]
