"""Faults of one process: kills, full disks, flipped bytes. Steps run in it one by one (`zygote`).

Each function makes one scenario: some faults on one workspace, then runs to the end. It is told a
seed and nothing else, and returns a `Story`.
"""

import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.invariants import Expected, Watch, all_cached, orphans, tail
from tests.chaos.place import Place, Zygote, seeded

TRIES = 8  # of the same command, until it must have ended well


class Skip(Exception):
    """This machine cannot make such a fault."""


@dataclass
class Story:
    """What was done to one workspace, and what is wrong with it now."""

    kind: str
    seed: int
    faults: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    tries: int = 0  # runs after the last fault
    mended: list[str] = field(default_factory=list)  # by hand, as the message said


@dataclass
class Bench:
    """What all scenarios share."""

    root: Path
    zygote: Zygote
    expected: Expected
    ticks: list[str]  # of the undisturbed run
    template: Path  # an empty registry: making one takes longer than all the rest
    servers: ExitStack = field(default_factory=ExitStack)
    _s3: Any = None

    def s3(self) -> Any:
        """A started S3 server, the same for all scenarios."""
        if self._s3 is None:
            from tests.faults import s3

            self._s3 = self.servers.enter_context(s3.server(self.root / "s3"))
        return self._s3

    @property
    def store(self) -> str | None:
        """What the S3 server is; None where no scenario wanted one."""
        return self._s3 and {"radosgw": "Ceph's radosgw", "moto": "moto"}[self._s3.kind]

    def close(self) -> None:
        self.servers.close()
        self.zygote.close()

    @contextmanager
    def place(self, kind: str, seed: int, **given: Any) -> Iterator[Place]:
        place = Place(self.root / f"{kind}-{seed}", self.zygote, **given)
        try:
            yield place
        finally:
            place.kill_all()

    def with_registry(self, place: Place) -> None:
        place.registry().parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.template, place.registry())


def undisturbed(root: Path, *, twice: bool = True) -> Bench:
    """The bench, with what a run makes that nothing happens to. `twice`: and makes again."""
    from infra import tracking

    template = root / "registry.db"
    tracking.connect(f"sqlite:///{template}")
    bench = Bench(root, Zygote(root), Expected({}, {}), [], template)
    for number in range(1 + twice):
        place = Place(root / f"undisturbed-{number}", bench.zygote)
        bench.with_registry(place)
        assert place.run() == 0, place.log.read_text()
        found = Expected.of(place)
        assert number == 0 or found == bench.expected, "two undisturbed runs differ"
        bench.expected, bench.ticks = found, place.ticks()
        place.remove()
    return bench


def to_the_end(
    place: Place,
    watch: Watch,
    story: Story,
    expected: Expected,
    again: frozenset[str] = frozenset(),
    run: Callable[[], int] | None = None,
) -> None:
    """The same command until it ends well, then every invariant. `again`: damaged steps. `run`:
    how, if not forked."""
    replaced = set(again)
    for _ in range(TRIES):
        story.tries += 1
        begun = place.log.stat().st_size if place.log.exists() else 0
        code = (run or place.run)()
        text = place.log.read_bytes()[begun:].decode(errors="replace")
        if code == 0:
            break
        if (done := mend(place, text)) is not None:
            story.mended.append(done[0])
            replaced |= done[1]
        watch.look(frozenset(replaced))
    else:
        story.wrong.append(f"exit code {code} after {TRIES} tries: {tail(place.log)}")
        story.wrong += watch.wrong
        return
    watch.look(frozenset(replaced))
    story.wrong += watch.close(expected) + all_cached(place) + orphans(place, 5)


def mend(place: Place, text: str) -> tuple[str, set[str]] | None:
    """Do what the message says a person has to do; what that was, and the steps it touches."""
    storage = place.storage()
    said = re.findall(
        r"(\S*/\S+) .*?: delete (?:the (\w+) step's folder|(\S+?)) (?:and run|to train)", text
    )
    for subject, step, url in said:
        if step:
            storage.remove_tree(storage.join(place.workspace, "steps", step))
            return f"deleted the folder of {step}", {step}
        url = subject if url == "it" else url
        storage.remove_tree(url)
        below = url.split("/steps/")[-1].split("/")
        return f"deleted {'/'.join(below[-2:])}", {below[0]} if "/steps/" in url else set()
    for url in re.findall(r"(\S+) is altered [^:]*: run with --force", text):
        step = url.split("/steps/")[-1].split("/")[0]
        storage.remove_tree(storage.join(place.workspace, "steps", step))
        return f"--force {step}", {step}
    return None


# --- kinds ----------------------------------------------------------------------------------------


def killed(bench: Bench, seed: int, faults: int) -> Story:
    """SIGKILL of the driver at changes of files, records and registry, several times over."""
    story, draw = Story("driver killed", seed), seeded("killed", seed)
    with bench.place("killed", seed) as place:
        if seed % 4:  # else the making of the registry is killed, too
            bench.with_registry(place)
        watch = Watch(place)
        for _ in range(2 * faults):
            at = draw.randrange(1, len(bench.ticks) * 2 // 3)
            code = place.run({"at": at, "do": "kill"})
            if code != -signal.SIGKILL:
                if code != 0:
                    story.wrong.append(f"exit code {code}: {tail(place.log)}")
                break
            story.faults.append(f"tick {at}: {place.ticks()[-1]}")
            watch.look()
            if len(story.faults) == faults:
                break
        to_the_end(place, watch, story, bench.expected)
    return story


def killed_at_record(bench: Bench, seed: int, faults: int) -> Story:
    """SIGKILL just before or after a record is put: the instant that decides what is true."""
    story, draw = Story("driver killed at a record", seed), seeded("record", seed)
    records = [t for t in bench.ticks if re.search(r"(COMMIT|record)\.json|sql (INSERT|COMMIT)", t)]
    with bench.place("record", seed) as place:
        bench.with_registry(place)
        watch = Watch(place)
        for _ in range(2 * faults):
            wanted = re.sub(r"[0-9a-f]{6,}[^/]*", "[^/]*", re.escape(draw.choice(records)))
            code = place.run({"match": wanted, "nth": draw.randrange(1, 4), "do": "kill"})
            if code == 0:
                break
            if code != -signal.SIGKILL:
                story.wrong.append(f"exit code {code}: {tail(place.log)}")
                break
            story.faults.append(place.ticks()[-1])
            watch.look()
            if len(story.faults) == faults:
                break
        to_the_end(place, watch, story, bench.expected)
    return story


def terminated(bench: Bench, seed: int, faults: int) -> Story:
    """SIGTERM: what runs is finished or saved, and the exit code says that the rest waits."""
    story, draw = Story("driver asked to stop", seed), seeded("terminated", seed)
    with bench.place("terminated", seed) as place:
        bench.with_registry(place)
        watch = Watch(place)
        for _ in range(faults):
            at = draw.randrange(1, len(bench.ticks) * 2 // 3)
            code = place.run({"at": at, "do": "sigterm"})
            if len(place.ticks()) < at:
                break
            story.faults.append(f"tick {at}: {place.ticks()[at - 1]}: exit code {code}")
            # -15: before the command listens, or when it no longer does.
            if code not in (0, 3, 130, -signal.SIGTERM):
                story.wrong.append(f"exit code {code}: {tail(place.log)}")
            watch.look()
        to_the_end(place, watch, story, bench.expected)
    return story


def full(bench: Bench, seed: int, faults: int) -> Story:
    """The disk of the workspace fills up, is freed, and fills up again."""
    story, draw = Story("disk full", seed), seeded("full", seed)
    with bench.place("full", seed) as place, small_disk(Path(place.workspace), "64m"):
        bench.with_registry(place)
        watch, ballast = Watch(place), Path(place.workspace) / "ballast"
        for _ in range(faults):
            at = draw.randrange(1, len(bench.ticks) * 2 // 3)
            leave = draw.choice((0, 1, 300, 4096, 20_000, 100_000))
            fault = {"at": at, "do": "fill", "ballast": str(ballast), "leave": leave}
            code = place.run(fault)
            if not ballast.exists():
                break
            story.faults.append(f"tick {at}, {leave} bytes left: exit code {code}")
            text = tail(place.log, 30)
            if code not in (0, 1, 2):
                story.wrong.append(f"exit code {code}: {tail(place.log)}")
            elif code != 0 and not re.search("disk full|No space left|disk is full", text):
                story.wrong.append(f"no word of the full disk: {tail(place.log)}")
            ballast.unlink()
            watch.look()
        to_the_end(place, watch, story, bench.expected)
    return story


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    asked = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(asked, capture_output=True).returncode != 0:
        raise Skip("only root may mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


@dataclass(frozen=True)
class Target:
    """What gets damaged: once the tick `after` has come, a file that `path` matches."""

    after: str
    path: str
    damage: Callable[[bytes, random.Random], bytes]
    nth: int = 1
    new_node: bool = False  # staged pixels are gone: the shards are read again


def flip(data: bytes, draw: random.Random) -> bytes:
    """One bit."""
    position = draw.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << draw.randrange(8)]) + data[position + 1 :]


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def zeros(data: bytes, draw: random.Random) -> bytes:
    """What a file system leaves of a file whose blocks were never written."""
    return b"\0" * len(data)


def _commit(step: str) -> str:
    return rf"put_if_absent {step}/\w+/COMMIT.json done"


_CHECKPOINT = r"write_bytes {}/\w+/wor[k]/checkpoints/[^/]+/record.json done"
FLIPS = {
    "shard": Target(_commit("shard"), r"shard/.*\.tar$", flip, new_node=True),
    "manifest": Target(_commit("shard"), r"shard/.*manifest\.json$", flip, new_node=True),
    "staged pixels": Target(_commit("shard"), r"images\.npy$", flip),
    "staged labels": Target(_commit("shard"), r"labels\.npy$", flip),
    "statistics": Target(_commit("reference"), r"reference/.*attempts/.*\.safetensors$", flip),
    "teacher's weights": Target(
        _commit("teacher"), r"teacher/.*attempts/.*weights\.safetensors$", flip
    ),
    "candidate's weights": Target(
        _commit("isolate"), r"isolate/.*attempts/.*weights\.safetensors$", flip
    ),
    "evaluation": Target(_commit("evaluate"), r"evaluate/.*attempts/.*\.(json|png)$", flip),
    "teacher's checkpoint": Target(
        _CHECKPOINT.format("teacher"), r"teacher/.*checkpoints/", flip, nth=3
    ),
    "isolate's checkpoint": Target(
        _CHECKPOINT.format("isolate"), r"isolate/.*checkpoints/", flip, nth=4
    ),
}
CUTS = {
    "record of a commit": Target(
        r"put_if_absent \w+/\w+/COMMIT.json done", r"COMMIT\.json$", cut, nth=4
    ),
    "record of a checkpoint": Target(
        _CHECKPOINT.format("teacher"), r"checkpoints/.*record\.json$", cut, nth=3
    ),
    "checkpoint": Target(_CHECKPOINT.format("distill"), r"distill/.*checkpoints/", cut, nth=2),
    "blank commit": Target(
        r"put_if_absent \w+/\w+/COMMIT.json done", r"COMMIT\.json$", zeros, nth=5
    ),
    "staged pixels": Target(_commit("shard"), r"images\.npy$", cut),
}


def flipped(bench: Bench, seed: int, faults: int) -> Story:
    """One bit of a file changes while no driver runs."""
    return _damaged(bench, seed, "bit flipped", FLIPS)


def truncated(bench: Bench, seed: int, faults: int) -> Story:
    """A file ends early, or is all zeros."""
    return _damaged(bench, seed, "file cut", CUTS)


def flipped_record(bench: Bench, seed: int, faults: int) -> Story:
    """One bit of a commit's record changes."""
    target = Target(r"put_if_absent \w+/\w+/COMMIT.json done", r"COMMIT\.json$", flip, nth=5)
    return _damaged(bench, seed, "record flipped", {"COMMIT.json": target})


def _damaged(bench: Bench, seed: int, kind: str, targets: dict[str, Target]) -> Story:
    story, draw = Story(kind, seed), seeded(kind, seed)
    name = list(targets)[seed % len(targets)]  # every target comes by
    target = targets[name]
    with bench.place(kind.replace(" ", "-"), seed) as place:
        bench.with_registry(place)
        watch = Watch(place)
        code = place.run({"match": target.after, "nth": target.nth, "do": "kill"})
        assert code == -signal.SIGKILL, f"{name}: exit code {code}: {tail(place.log)}"
        watch.look()
        step = _damage(place, target, draw, story, name)
        watch.forget(step)
        to_the_end(place, watch, story, bench.expected, frozenset([step]))
    return story


def _damage(place: Place, target: Target, draw: random.Random, story: Story, name: str) -> str:
    """Returns the step it happened to ("" for a cache)."""
    if target.new_node:
        shutil.rmtree(place.folder / "cache", ignore_errors=True)
    if "staged" in name:
        path = next(
            p for p in (place.folder / "cache").rglob("*") if re.search(target.path, p.name)
        )
        path.chmod(0o644)
        path.write_bytes(target.damage(path.read_bytes(), draw))
        story.faults.append(f"{name}: {path.name}")
        return ""
    found = sorted(path for path in place.files() if re.search(target.path, path))
    newest = max((p.split("/")[5] for p in found if "/checkpoints/" in p), default=None)
    path = draw.choice([p for p in found if newest is None or newest in p])
    before = place.read(path)
    after = target.damage(before, draw)
    pairs = enumerate(zip(before, after, strict=False))
    byte = next((i for i, (a, b) in pairs if a != b), len(after))
    name += f" at byte {byte} of {len(before)}"
    place.write(path, after)
    story.faults.append(f"{name}: {path.removeprefix('steps/')}")
    return path.split("/")[1]
