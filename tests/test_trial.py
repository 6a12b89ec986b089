"""One setting of a sweep, from its job to its commit, through kills: Ray Tune is stood in for."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
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
from tests.tiny_trials import EMAS, MARKS, Bench, Worker, stand_in, stocked

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


class Whole:
    """The trial of the recipe's own setting, trained without interruption."""

    def __init__(self, folder: Path) -> None:
        self.bench, self.told = stocked(folder), Told()
        job = job_of(self.bench)
        with pytest.MonkeyPatch.context() as patch:
            stand_in(patch)
            run(job, self.told, patch)
        self.weights, self.log = weights(files(job)), logged(job)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def done(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrialJob:
    """A copy of it to do something to, moved to another workspace."""
    stand_in(monkeypatch)
    shutil.copytree(whole.bench.workspace, tmp_path / "done")
    return job_of(Bench(tmp_path / "done"))


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
    """Of those with a record, the images, oldest first."""
    found = Path(job.home, "work", "checkpoints").glob("*/record.json")
    return sorted(path.parent.name.partition("-")[0] for path in found)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("it trains")


# --- to the end ----------------------------------------------------------------------------------


def test_a_trial_trains_to_the_end_tells_every_probe_and_commits(whole, done):
    assert whole.told.probes == [(1, False), (2, False), (3, False)]
    assert [result["of"] for result in whole.told.results] == [3, 3, 3]
    record = read_record(done.home)
    assert (record["step"], record["value"]["images"]) == ("trial", 64)
    assert record["value"]["ema"] == EMAS[0]
    assert set(whole.weights) == {"weights.safetensors", "ema/constant-0.5.safetensors"}
    assert seen(whole.told.results[-1]["lines"]) == whole.log
    assert not Path(done.home, "work").exists()


def test_its_weights_are_those_of_the_stage_that_nobody_looks_at(bench, whole):
    """The probes change nothing, nor does the process that trains: bitwise."""
    from pipelines.training import run_stage

    ctx = bench.context("plain")
    model = run_stage(ctx, bench.stage(), bench.committed("shard"))
    assert not model.watched
    assert weights(ctx.out) == whole.weights
    first = whole.weights["weights.safetensors"]
    assert model.weights_sha256 == hashlib.sha256(first).hexdigest()


def test_it_is_looked_at_exactly_at_its_marks(bench, whole, monkeypatch):
    assert tuple(dict.fromkeys(line["images"] for line in whole.log)) == MARKS
    job = job_of(bench, "isolate.images=107")  # 7 steps in 3 parts
    told = run(job, Told(), monkeypatch)
    assert job.config.marks() == (32, 80, 112)
    assert [result["lines"][-1]["images"] for result in told.results] == [32, 80, 112]
    assert {line["images"] for line in logged(job)} == {32, 80, 112}


def test_every_sampling_ema_is_scored_in_one_and_in_two_steps(whole):
    assert [(line["images"], line["ema"], line["steps"]) for line in whole.log] == [
        (images, ema, steps) for images in MARKS for ema in EMAS for steps in (1, 2)
    ]
    assert len({line["value"] for line in whole.log}) == 12  # and none for another


@pytest.mark.parametrize("steps", [1, 2])
def test_the_distance_is_the_best_emas_in_the_steps_of_the_objective(whole, steps):
    for result in whole.told.results:
        told = probes.report(result["lines"], MARKS, steps)
        images = result["lines"][-1]["images"]
        values = [
            line["value"]
            for line in result["lines"]
            if line["steps"] == steps and line["images"] == images
        ]
        assert len(values) == 2
        assert told["distance"] == min(values)
        assert (told["distance"] == result["distance"]) == (steps == 2)  # the job's own


def test_equal_weights_give_equal_values_in_every_trial(bench, whole, monkeypatch):
    """Common noise: a distance depends on weights alone, whichever trial they are of."""
    turned = "isolate.ema=[{kind: constant, beta: 0.5}, {kind: constant, beta: 0.9}]"
    jobs = [job_of(bench), job_of(bench, turned), job_of(bench, noise_seed=4)]
    assert len({job.fingerprint for job in jobs}) == 3
    first, same, other = (
        {(line["images"], line["ema"], line["steps"]): line["value"] for line in lines}
        for lines in (
            whole.log,
            run(jobs[1], Told(), monkeypatch).results[-1]["lines"],
            run(jobs[2], Told(1), monkeypatch).results[-1]["lines"],
        )
    )
    assert first == same
    assert (len(first), len(other)) == (12, 4)
    assert all(first[key] != value for key, value in other.items())


def test_what_it_tells_a_scheduler_is_always_a_number():
    line = {"images": 32, "ema": "a", "steps": 2, "value": float("nan"), "seconds": 1.0}
    told = probes.report([line, line | {"ema": "b", "value": float("inf")}], MARKS, 2)
    assert told["distance"] == probes.WORST
    better = [line, line | {"ema": "b", "value": 7.0}, line | {"steps": 1, "value": 1.0}]
    assert probes.report(better, MARKS, 2)["distance"] == 7.0


# --- killed and run again ------------------------------------------------------------------------


@pytest.mark.parametrize(("dies_at", "by"), [(1, SystemExit), (2, Killed), (3, SystemExit)])
def test_killed_after_a_probe_it_goes_on_from_there(bench, whole, monkeypatch, dies_at, by):
    job = job_of(bench)
    told = run(job, Told(dies_at, by), monkeypatch)
    assert told.probes == [(n, False) for n in range(1, dies_at + 1)]
    begun: list[int] = []
    real = train_worker._Running.restore

    def restore(self: Any, folder: Path) -> None:
        real(self, folder)
        begun.append(self.stage.state.images)

    monkeypatch.setattr(train_worker._Running, "restore", restore)
    again = run(job, Told(), monkeypatch)
    assert begun == ([MARKS[dies_at - 1]] if dies_at < 3 else [])
    # The last of the known ones may not have been answered, so it is no repetition.
    assert again.probes == [(n, n < dies_at) for n in range(1, 4)]
    for first, second in zip(told.results, again.results, strict=False):
        assert first["lines"] == second["lines"]  # of known ones, the seconds too
        assert first["distance"] == second["distance"]
    assert (weights(files(job)), logged(job)) == (whole.weights, whole.log)
    assert [seen(r["lines"]) for r in again.results] == [
        [line for line in whole.log if line["images"] <= mark] for mark in MARKS
    ]


def test_killed_again_and_again_it_comes_to_the_same_end(bench, whole, monkeypatch):
    job = job_of(bench)
    told = [run(job, Told(n), monkeypatch) for n in (1, 1, 2, 2, 3)]
    assert told[1].probes == [(1, False)]  # before it could train: nothing is lost
    assert told[3].probes == [(1, True), (2, False)]
    assert run(job, Told(), monkeypatch).probes == [(1, True), (2, True), (3, False)]
    assert (weights(files(job)), logged(job)) == (whole.weights, whole.log)


# Every kind of write of a trial: which one it dies at, and what it has written down by then.
WRITES = [
    ("/state.safetensors", 2, 2),
    ("/checkpoints/000000000016", 1, 2),  # is removed
    ("/COMMIT.json", 1, 2),
    ("/work", 1, 3),  # is removed
]


@pytest.mark.parametrize(("file", "nth", "known"), WRITES)
def test_killed_at_any_write_nothing_is_lost(bench, whole, monkeypatch, file, nth, known):
    job = job_of(bench)
    with pytest.MonkeyPatch.context() as patch:
        _kill_at(file, nth, patch)
        patch.setattr(tuning, "report", Told())
        with pytest.raises(Killed):
            trial.run(job, Told())
    again = run(job, Told(), monkeypatch)
    numbers = [number for number, _ in again.probes]
    assert numbers == sorted(numbers)
    assert set(numbers) == {1, 2, 3}
    assert [n for n, repeated in again.probes if repeated] == list(range(1, known))
    assert (weights(files(job)), logged(job)) == (whole.weights, whole.log)


def _kill_at(file: str, nth: int, patch: pytest.MonkeyPatch) -> None:
    """The process dies just before its `nth` write to a file of this name."""
    left = nth

    def killing(real: Any, argument: int) -> Any:
        def write(*arguments: Any) -> Any:
            nonlocal left
            url = re.sub(r"(/checkpoints/\d+)-[0-9a-f]+$", r"\1", arguments[argument])
            left -= url.endswith(file)
            if left == 0:
                raise Killed
            return real(*arguments)

        return write

    targets = {"write_bytes": 0, "put_if_absent": 0, "upload_file": 1, "remove_tree": 0}
    for name, argument in targets.items():
        patch.setattr(storage, name, killing(getattr(storage, name), argument))


# --- nothing is done twice -----------------------------------------------------------------------


def test_one_that_is_over_only_repeats(bench, monkeypatch):
    job = job_of(bench)
    told = run(job, Told(2), monkeypatch)
    monkeypatch.setattr(train_worker, "run", never)
    again = run(replace(job, over=True), Told(), monkeypatch)
    assert again.probes == [(1, True), (2, True)]
    assert [r["lines"] for r in again.results] == [r["lines"] for r in told.results]


def test_one_that_is_over_and_said_nothing_says_nothing(bench, monkeypatch):
    monkeypatch.setattr(train_worker, "run", never)
    assert run(replace(job_of(bench), over=True), Told(), monkeypatch).results == []


@pytest.mark.parametrize("over", [True, False])
def test_a_committed_trial_costs_nothing_and_tells_every_probe(whole, done, monkeypatch, over):
    monkeypatch.setattr(train_worker, "run", never)
    monkeypatch.setattr(yardstick.Yardstick, "at", never)
    before = files(done)
    again = run(replace(done, over=over), Told(), monkeypatch)
    # Nobody may have heard of the last one: then it is what ends the trial.
    assert again.probes == [(1, True), (2, True), (3, over)]
    assert [r["distance"] for r in again.results] == [r["distance"] for r in whole.told.results]
    assert files(done) == before


# --- failures ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_told_once_and_not_tried_again(bench, monkeypatch):
    attempts: list[int] = []
    real = train_worker.run
    monkeypatch.setattr(train_worker, "run", lambda *a: attempts.append(1) or real(*a))
    job = job_of(bench, "isolate.lr=1e30", retries=3, probes=2)
    told = run(job, Told(), monkeypatch)
    assert [key for key in ("failed", "mistake") if key in told.results[-1]] == ["failed"]
    assert told.results[-1]["failed"].startswith("loss is nan at step 1 (16 images)")
    assert len(told.results) == len(attempts) == 1
    assert not Path(job.home, "COMMIT.json").exists()


def test_a_users_mistake_is_told_as_such(bench, monkeypatch):
    job = job_of(bench, retries=3)
    manifest = Path(job.inputs["shard"].url) / "shards" / "manifest.json"
    written = manifest.read_text()
    manifest.write_text(written.replace('"pixel_digest": "', '"pixel_digest": "f'))
    assert manifest.read_text() != written
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


def test_an_error_that_passes_leaves_no_trace(bench, whole, monkeypatch):
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
    assert (weights(files(job)), logged(job)) == (whole.weights, whole.log)


# --- checkpoints ---------------------------------------------------------------------------------


def test_only_the_last_checkpoint_is_kept(bench, monkeypatch):
    job = job_of(bench)
    found: list[list[str]] = []

    def look() -> None:
        if (Path(job.home) / "work").exists():
            found.append(checkpoints(job))
            (newest,) = Path(job.home, "work", "checkpoints").glob(f"{found[-1][-1]}-*")
            assert {"curve.jsonl", LOG} < {path.name for path in newest.iterdir()}

    run(job, Told(2, after=look), monkeypatch)
    first, second = (f"{images:012}" for images in MARKS[:2])
    assert found == [[first], [second]]


def test_a_crash_before_a_checkpoint_has_its_record_keeps_the_one_before(bench, monkeypatch):
    job = job_of(bench)
    with pytest.MonkeyPatch.context() as patch:
        _kill_at("/record.json", 2, patch)
        patch.setattr(tuning, "report", Told())
        with pytest.raises(Killed):
            trial.run(job, Told())
    assert len(list(Path(job.home, "work", "checkpoints").iterdir())) == 2
    assert checkpoints(job) == ["000000000016"]
    again = run(job, Told(), monkeypatch)
    # The second probe was written down, though not told; its checkpoint has to be made anew.
    assert again.probes == [(1, True), (2, False), (2, False), (3, False)]
    assert seen(again.results[1]["lines"]) == seen(again.results[2]["lines"])


def test_asked_to_stop_a_trial_saves_itself_and_says_so(bench, monkeypatch, tmp_path):
    stop = tmp_path / "stop"
    stop.touch()
    job = job_of(bench)
    job = replace(job, settings=replace(job.settings, stop=str(stop)))
    told = run(job, Told(), monkeypatch)
    assert told.results[-1] == {"preempted": True}
    assert checkpoints(job)
    stop.unlink()
    again = run(job, Told(), monkeypatch)
    assert again.probes[-1] == (3, False)


def test_checkpoints_between_the_probes_change_nothing(tmp_path, whole, monkeypatch):
    stand_in(monkeypatch)
    job = job_of(stocked(tmp_path / "two", checkpoint_every_seconds=0))
    assert job.fingerprint == job_of(whole.bench).fingerprint
    assert run(job, Told(), monkeypatch).probes == [(1, False), (2, False), (3, False)]
    assert (weights(files(job)), logged(job)) == (whole.weights, whole.log)


# --- more than one worker ------------------------------------------------------------------------


def test_more_workers_are_ray_trains_and_tell_tune_themselves(tmp_path, monkeypatch):
    """What they report goes through Train, which passes it on: the last probe is the trial's."""
    from infra import cluster

    stand_in(monkeypatch)
    bench = stocked(tmp_path / "two", workers=2)
    told, asked = Told(), []

    class Reporting(Worker):
        def tell(self, report: Mapping[str, Any]) -> None:
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


def test_a_divergence_that_a_probe_sees_first_is_a_failure_like_any_other(bench, monkeypatch):
    attempts = []
    train = train_worker.run

    def counted(*given: Any) -> Any:
        attempts.append(1)
        return train(*given)

    monkeypatch.setattr(train_worker, "run", counted)
    told = run(job_of(bench, "isolate.lr=1e30", retries=3), Told(), monkeypatch)
    assert len(attempts) == 1
    assert "lower lr" in told.results[-1]["failed"]
    assert "traceback" not in told.results[-1]["failed"]
