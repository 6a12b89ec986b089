"""What is collected, what never is, and when: nothing a record names, nothing in the making."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from infra import ages, storage
from pipelines import cli, dag, gc, lease
from pipelines.ledger import Ledger
from pipelines.sweep_summary import COMPLETED, FAILED, RUNNING, STOPPED, Trial

A, B, C, D = (letter * 16 for letter in "abcd")
OLD = time.time() - 100_000
DAY_AGO = time.time() - 86_400


class Place:
    """A workspace made by hand; what is put there is old unless said otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, str(folder)
        self.young: list[Path] = []

    def put(self, path: str, data: bytes = b"12345", *, young: bool = False) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        if young:
            self.young.append(file)

    def commit(self, step: str, fingerprint: str, attempt: str, changes: Any = None) -> None:
        self.put(f"steps/{step}/{fingerprint}/attempts/{attempt}/value.txt")
        record = {
            "format": dag.FORMAT,
            "attempt": attempt,
            "files": [{"path": "value.txt", "bytes": 5, "sha256": "0"}],
            **dict.fromkeys(dag.RECORD_KEYS - {"attempt", "files"}, ""),
            **(changes or {}),
        }
        name = f"steps/{step}/{fingerprint}/COMMIT.json"
        self.put(name, json.dumps(record).encode())

    def age(self) -> None:
        """Everything becomes old, but for what is young."""
        for above, _, files in os.walk(self.folder):
            for name in [".", *files]:
                os.utime(Path(above) / name, (OLD, OLD))
        for file in self.young:
            os.utime(file)

    def found(self, before: float = DAY_AGO) -> dict[str, list[str]]:
        """Paths by kind."""
        self.age()
        by_kind: dict[str, list[str]] = {}
        for one in gc.find(self.url, before)[0]:
            by_kind.setdefault(one.kind, []).append(one.path)
        return by_kind

    def collect(self) -> None:
        self.age()
        assert cli.main(["gc", "--workspace", self.url, "--delete"]) == 0

    def files(self) -> list[str]:
        return [path for path, _ in storage.list_files(self.url) if path not in (".lock",)]


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path / "w")
    place.folder.mkdir()
    place.put("recipe.yaml")
    return place


def test_attempts_that_no_record_names_go_and_the_named_one_stays(place):
    place.commit("teacher", A, "two")
    for attempt in ("one", "three"):
        place.put(f"steps/teacher/{A}/attempts/{attempt}/sub/weights.bin", bytes(1_000))
    place.put(f"steps/teacher/{B}/attempts/lonely/x")  # killed before it was committed
    (place.folder / f"steps/shard/{C}/attempts/empty").mkdir(parents=True)
    assert place.found() == {
        "attempts": [
            f"steps/shard/{C}/attempts/empty",
            f"steps/teacher/{A}/attempts/one",
            f"steps/teacher/{A}/attempts/three",
            f"steps/teacher/{B}/attempts/lonely",
        ]
    }
    place.collect()
    assert place.files() == [
        "recipe.yaml",
        f"steps/teacher/{A}/COMMIT.json",
        f"steps/teacher/{A}/attempts/two/value.txt",
    ]
    assert os.listdir(place.folder / f"steps/shard/{C}/attempts") == []


def test_the_checkpoints_of_what_is_not_committed_stay_and_those_of_what_is_go(place):
    place.commit("teacher", A, "one")
    place.put(f"steps/teacher/{A}/work/checkpoints/000-a/state.safetensors")
    place.put(f"steps/teacher/{B}/work/checkpoints/000-a/state.safetensors")
    assert place.found() == {"work": [f"steps/teacher/{A}/work"]}
    place.collect()
    assert f"steps/teacher/{B}/work/checkpoints/000-a/state.safetensors" in place.files()
    assert not (place.folder / f"steps/teacher/{A}/work").exists()


def test_nothing_that_was_written_lately_goes(place):
    place.commit("teacher", A, "two")
    place.put(f"steps/teacher/{A}/attempts/one/old")
    place.put(f"steps/teacher/{A}/attempts/one/sub/young", young=True)
    place.put(f"steps/teacher/{A}/work/old")
    place.put(f"steps/teacher/{A}/work/young", young=True)
    place.put("stops/run", young=True)
    place.put(".tmp-1/young", young=True)
    assert place.found() == {}
    assert set(place.found(before=time.time() + 1)) == {"attempts", "work", "stops", "unfinished"}


def test_an_attempt_stays_while_its_training_writes_checkpoints(place):
    (place.folder / f"steps/teacher/{A}/attempts/now").mkdir(parents=True)
    place.put(f"steps/teacher/{A}/work/checkpoints/000-a/state", young=True)
    assert place.found() == {}
    place.young.clear()
    assert place.found() == {"attempts": [f"steps/teacher/{A}/attempts/now"]}


def test_a_new_empty_attempt_is_not_old(place):
    place.commit("teacher", A, "two")
    empty = place.folder / f"steps/teacher/{A}/attempts/now"
    empty.mkdir()
    place.young.append(empty)
    assert place.found() == {}


def test_a_result_set_aside_goes_with_its_attempt_when_it_is_old(place):
    def aside(number: int, attempt: str, **more: Any) -> None:
        text = json.dumps({"attempt": attempt}).encode()
        place.put(f"steps/teacher/{A}/COMMIT.bad-{number}.json", text, **more)
        place.put(f"steps/teacher/{A}/attempts/{attempt}/x")

    place.commit("teacher", A, "now")
    aside(1, "first")
    aside(2, "second", young=True)
    aside(3, "now")  # damaged, then committed again from the same attempt
    assert place.found() == {
        "set-aside": [
            f"steps/teacher/{A}/COMMIT.bad-1.json",
            f"steps/teacher/{A}/COMMIT.bad-3.json",
            f"steps/teacher/{A}/attempts/first",
        ]
    }
    place.collect()
    assert [p for p in place.files() if "attempts" in p] == [
        f"steps/teacher/{A}/attempts/now/value.txt",
        f"steps/teacher/{A}/attempts/now/x",
        f"steps/teacher/{A}/attempts/second/x",
    ]


def test_a_young_record_set_aside_that_is_unreadable_spares_every_attempt(place):
    place.put(f"steps/teacher/{A}/attempts/one/x")
    place.put(f"steps/teacher/{A}/COMMIT.bad-1.json", b"{", young=True)
    assert place.found() == {}
    place.young.clear()
    assert place.found() == {
        "attempts": [f"steps/teacher/{A}/attempts/one"],
        "set-aside": [f"steps/teacher/{A}/COMMIT.bad-1.json"],
    }


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 99}', '{"format": 1}', "attempt", "files", "paths"],
)
def test_a_home_whose_record_is_unreadable_is_left_alone_and_said(place, capsys, text):
    place.put(f"steps/teacher/{A}/attempts/one/x")
    place.put(f"steps/teacher/{A}/work/x")
    bad = {"attempt": {"attempt": []}, "files": {"files": 7}, "paths": {"files": [{"path": 7}]}}
    if text in bad:
        place.commit("teacher", A, "one", bad[text])
    else:
        place.put(f"steps/teacher/{A}/COMMIT.json", text.encode())
    before = place.files()
    place.collect()
    assert place.files() == before
    said = capsys.readouterr().out
    assert f"steps/teacher/{A}: left alone, its record is unreadable" in said


# --- trials ---------------------------------------------------------------------------------------


def sweep(place: Place, key: str, **states: str) -> list[Trial]:
    """A ledger of trials by fingerprint."""
    ledger = Ledger(f"{place.url}/sweeps/{key}")
    trials = []
    for number, (fingerprint, state) in enumerate(states.items()):
        trial = Trial(
            number=number, settings=(), origin="random", fingerprint=fingerprint, state=state
        )
        ledger.begin(trial)
        ledger.update(trial)
        trials.append(trial)
        place.put(f"steps/trial/{fingerprint}/work/checkpoints/000-a/state")
        place.put(f"steps/trial/{fingerprint}/work/watch.jsonl")
    return trials


def committed_sweep(place: Place, trials: list[Trial]) -> None:
    place.commit("tune-isolate", D, "one")
    told = {"trials": [{"fingerprint": trial.fingerprint} for trial in trials]}
    place.put(f"steps/tune-isolate/{D}/attempts/one/summary.json", json.dumps(told).encode())


def test_checkpoints_of_a_committed_sweeps_trials_go_and_their_readings_stay(place):
    trials = sweep(place, "k", **{A: STOPPED, B: FAILED, C: RUNNING})
    sweep(place, "another", **{"e" * 16: STOPPED})
    assert place.found() == {}  # the sweep may go on
    committed_sweep(place, trials)
    assert place.found() == {
        "trials": [f"steps/trial/{name}/work/checkpoints" for name in (A, B)]  # C may be extended
    }
    place.collect()
    for name in (A, B, C):
        assert f"steps/trial/{name}/work/watch.jsonl" in place.files()
    assert f"steps/trial/{C}/work/checkpoints/000-a/state" in place.files()
    assert f"steps/trial/{'e' * 16}/work/checkpoints/000-a/state" in place.files()


def test_a_trial_that_another_sweep_goes_on_with_keeps_its_checkpoints(place):
    committed_sweep(place, sweep(place, "k", **{A: STOPPED}))
    sweep(place, "l", **{A: RUNNING})
    assert place.found() == {}


def test_a_trials_own_result_is_a_result(place):
    committed_sweep(place, sweep(place, "k", **{A: COMPLETED}))
    place.commit("trial", A, "one")
    assert place.found() == {"work": [f"steps/trial/{A}/work"]}


def test_a_ledger_that_is_unreadable_spares_every_trial(place):
    committed_sweep(place, sweep(place, "k", **{A: STOPPED}))
    place.put("sweeps/k/0000.state.json", b"{")
    assert place.found() == {}
    assert "trials are all kept: " in gc.find(place.url, DAY_AGO)[1][0]


# --- the rest -------------------------------------------------------------------------------------


def test_unfinished_files_go_wherever_they_are_once(place):
    place.commit("shard", A, "one")
    place.put(".tmp-1-a")
    place.put(f"steps/shard/{A}/attempts/one/.tmp-x/pixels.raw", bytes(300))
    place.put(f"steps/shard/{A}/attempts/one/.tmp-x/.tmp-y")
    place.put(f"steps/shard/{A}/attempts/two/.tmp-z")
    assert place.found() == {
        "attempts": [f"steps/shard/{A}/attempts/two"],
        "unfinished": [".tmp-1-a", f"steps/shard/{A}/attempts/one/.tmp-x"],
    }
    place.collect()
    assert place.files() == [
        "recipe.yaml",
        f"steps/shard/{A}/COMMIT.json",
        f"steps/shard/{A}/attempts/one/value.txt",
    ]


def test_requests_to_stop_of_dead_runs_go(place):
    place.put("stops/20260101T000000-aa")
    assert place.found() == {"stops": ["stops/20260101T000000-aa"]}


def test_a_list_is_all_there_is_without_delete(place, capsys):
    place.commit("teacher", A, "two")
    place.put(f"steps/teacher/{A}/attempts/one/x", bytes(1_500))
    place.put(f"steps/teacher/{A}/work/x", bytes(2_000_000))
    place.age()
    before = place.files()
    outputs = []
    for _ in range(2):
        assert cli.main(["gc", "--workspace", place.url]) == 0
        outputs.append(capsys.readouterr().out)
    assert place.files() == before
    assert outputs[0] == outputs[1]
    assert outputs[0].splitlines() == [
        "attempts that no record names: 1, 1.5 kB",
        f"  steps/teacher/{A}/attempts/one  1.5 kB",
        "checkpoints of committed steps: 1, 2.0 MB",
        f"  steps/teacher/{A}/work  2.0 MB",
        f"to remove from {place.url}: 2.0 MB; nothing was, add --delete",
    ]
    place.collect()
    assert capsys.readouterr().out.endswith(f"removed from {place.url}: 2.0 MB\n")
    assert cli.main(["gc", "--workspace", place.url]) == 0
    assert capsys.readouterr().out == f"nothing older than 24h to remove from {place.url}\n"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("30s", 30), ("30m", 1_800), ("24h", 86_400), ("1.5d", 129_600)],
)
def test_ages_are_read(text, seconds):
    assert gc.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "day", "-1h", "1w", "h", "1h30m", "nan"])
def test_what_is_no_age_is_one_line(place, capsys, text):
    assert cli.main(["gc", "--workspace", place.url, f"--older-than={text}"]) == 2
    assert capsys.readouterr().err.startswith("--older-than: ")


def test_nothing_is_too_young_for_an_age_of_nothing(place):
    place.put("stops/now", young=True)
    assert cli.main(["gc", "--workspace", place.url, "--older-than", "0", "--delete"]) == 0
    assert place.files() == ["recipe.yaml"]


def test_while_a_driver_is_at_work_nothing_is_even_listed(place, capsys):
    place.put("stops/old")
    place.age()
    with lease.hold(place.url):
        assert cli.main(["gc", "--workspace", place.url, "--delete"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is in use by pid" in captured.err
    assert captured.err.count("\n") == 1
    assert "stops/old" in place.files()


def test_a_workspace_that_is_not_there_is_not_made(tmp_path, capsys):
    assert cli.main(["gc", "--workspace", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# --- what happens between the look and the removal ------------------------------------------------


def between(place: Place, monkeypatch: pytest.MonkeyPatch, happens: Any) -> None:
    plain = gc.find

    def find(*arguments: Any) -> Any:
        found = plain(*arguments)
        happens()
        return found

    monkeypatch.setattr(gc, "find", find)


def test_an_attempt_that_is_committed_meanwhile_stays(place, monkeypatch, capsys):
    place.put(f"steps/teacher/{A}/attempts/one/value.txt")

    def commit() -> None:
        place.commit("teacher", A, "one")
        place.age()

    between(place, monkeypatch, commit)
    place.collect()
    assert f"steps/teacher/{A}/attempts/one/value.txt" in place.files()
    assert "attempts/one: kept, it was committed meanwhile" in capsys.readouterr().out


def test_an_attempt_that_is_written_meanwhile_stays(place, monkeypatch, capsys):
    place.put(f"steps/teacher/{A}/attempts/one/x")
    between(place, monkeypatch, lambda: place.put(f"steps/teacher/{A}/attempts/one/y"))
    place.collect()
    assert f"steps/teacher/{A}/attempts/one/x" in place.files()
    assert "attempts/one: kept, it was written meanwhile" in capsys.readouterr().out


def test_a_record_that_is_damaged_meanwhile_spares_what_lies_beside_it(place, monkeypatch):
    place.commit("teacher", A, "two")
    place.put(f"steps/teacher/{A}/attempts/one/x")
    between(place, monkeypatch, lambda: place.put(f"steps/teacher/{A}/COMMIT.json", b"{"))
    place.collect()
    assert f"steps/teacher/{A}/attempts/one/x" in place.files()


def test_a_workspace_that_is_taken_over_meanwhile_is_left(place, monkeypatch, capsys):
    place.put("stops/old")
    plain = lease.Lease

    def lost() -> lease.Lease:
        held = plain()
        held.lost = "pid 7 on elsewhere"
        return held

    monkeypatch.setattr(lease, "Lease", lost)
    place.age()
    assert cli.main(["gc", "--workspace", place.url, "--delete"]) == 2
    assert "was taken over by pid 7 on elsewhere" in capsys.readouterr().err
    assert "stops/old" in place.files()


# --- elsewhere than on a local disk ---------------------------------------------------------------


@pytest.fixture
def bucket():
    url = "memory://gc-test"
    yield url
    storage.remove_tree(url)


def test_an_object_store_is_collected_as_a_disk_is(bucket, tmp_path):
    place = Place(tmp_path)
    place.commit("teacher", A, "two")
    place.put(f"steps/teacher/{A}/attempts/one/x")
    place.put(f"steps/teacher/{A}/work/x")
    place.put("stops/old")
    storage.upload_dir(place.url, bucket)
    now = time.time()
    assert gc.find(bucket, now - 60)[0] == []
    found, notes = gc.find(bucket, now + 60)
    assert [(one.kind, one.path, one.bytes) for one in found] == [
        ("attempts", f"steps/teacher/{A}/attempts/one", 5),
        ("work", f"steps/teacher/{A}/work", 5),
        ("stops", "stops/old", 5),
    ]
    assert notes == []
    time.sleep(0.01)
    assert gc.show(bucket, "0", delete=True) == 0
    left = [path for path, _ in storage.list_files(bucket) if path != lease.FILE]
    assert left == [
        f"steps/teacher/{A}/COMMIT.json",
        f"steps/teacher/{A}/attempts/two/value.txt",
    ]


def test_the_age_of_a_folder_is_that_of_its_newest_file(tmp_path):
    assert ages.newest(str(tmp_path / "none")) is None
    (tmp_path / "sub").mkdir()
    for name, seconds in (("a", 1_000), ("sub/b", 3_000), ("sub/.tmp-c", 2_000)):
        (tmp_path / name).write_bytes(b"123")
        os.utime(tmp_path / name, (seconds, seconds))
    (tmp_path / "link").symlink_to("/etc")
    os.utime(tmp_path / "link", (500, 500), follow_symlinks=False)
    for folder in (tmp_path / "sub", tmp_path):
        os.utime(folder, (1_500, 1_500))
    assert ages.newest(str(tmp_path)) == 3_000
    assert ages.newest(str(tmp_path / "a")) == 1_000
    extent = ages.extent(str(tmp_path / "sub"))
    assert extent == ages.Extent(bytes=6, newest=3_000)


def test_a_store_that_does_not_say_when_has_nothing_old(bucket, monkeypatch):
    storage.write_bytes(f"{bucket}/stops/x", b"")
    assert ages.newest(f"{bucket}/stops") == pytest.approx(time.time(), abs=60)
    assert ages.newest(f"{bucket}/nothing") is None
    monkeypatch.setattr(ages, "_CHANGED", ())
    assert gc.find(bucket, time.time() + 1e9)[0] == []


def test_an_s3_bucket_gives_back_uploads_that_never_ended(tmp_path, monkeypatch, capsys):
    pytest.importorskip("moto")
    from infra import remote
    from tests.faults import s3

    with s3.server(tmp_path / "server") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        workspace = f"s3://{server.bucket}/w"
        record = {"format": dag.FORMAT, "attempt": "two", "files": []}
        record |= dict.fromkeys(dag.RECORD_KEYS - record.keys(), "")
        home = f"{workspace}/steps/teacher/{A}"
        storage.write_bytes(f"{home}/COMMIT.json", json.dumps(record).encode())
        for name in ("attempts/one/x", "attempts/two/x", "work/checkpoints/000-a/state"):
            storage.write_bytes(f"{home}/{name}", b"12345")
        for url in (f"{home}/attempts/one/y", f"s3://{server.bucket}/elsewhere"):
            at = remote.place(url)
            at.fs.call_s3("create_multipart_upload", **at.object)
        time.sleep(1.1)  # S3 tells whole seconds
        young = gc.find(workspace, time.time() - 3_600)[0]
        assert {one.kind for one in young} <= {"uploads"}  # moto's all began in 2010
        assert gc.show(workspace, "0", delete=True) == 0
        assert "uploads that were never finished: 1, " in capsys.readouterr().out
        left = [path for path, _ in storage.list_files(workspace) if path != lease.FILE]
        assert left == [f"steps/teacher/{A}/COMMIT.json", f"steps/teacher/{A}/attempts/two/x"]
        assert list(remote.unfinished(remote.place(workspace))) == []
        assert len(list(remote.unfinished(remote.place(f"s3://{server.bucket}")))) == 1
