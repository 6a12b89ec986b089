"""Seeded faults against the product, and whether it survives: `make chaos`.

    python tests/chaos/run.py --seed 0 --faults 200 --out docs/chaos.json

Works on a copy of the product made at the start, so that edits made meanwhile (minutes) neither
break a run under way nor mix two states of the code in one result. Prints a line per fault, ends
with a table, and writes it beside `--out` as Markdown. Exit code 1 when anything was wrong, with
the command that repeats it.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.chaos.forked import Bench, Story

COPIED = ("consistency", "infra", "pipelines", "configs", "tests", "pyproject.toml")
SNAPSHOT = "CMFORGE_CHAOS_SNAPSHOT"  # set for the process that runs from the copy


@dataclass(frozen=True)
class Kind:
    """One way to harm. `share`: of the faults asked for, in percent; `each`: per scenario."""

    name: str
    what: str
    scenario: "Callable[[Bench, int, int], Story]"
    share: float
    each: int


def kinds() -> list[Kind]:
    from tests.chaos import forked, rays, served

    return [
        Kind(
            "killed",
            "driver SIGKILLed at a change of a file, a record or the registry",
            forked.killed,
            24,
            5,
        ),
        Kind(
            "record",
            "driver SIGKILLed in the call that puts a record, a checkpoint or a registry row",
            forked.killed_at_record,
            12,
            4,
        ),
        Kind("stopped", "driver asked to stop (SIGTERM)", forked.terminated, 5, 3),
        Kind("full", "disk full (tmpfs, 0 to 100,000 bytes left), then freed", forked.full, 6, 3),
        Kind(
            "flipped",
            "one bit flipped in a shard, a staged cache, weights, statistics or a checkpoint",
            forked.flipped,
            6,
            1,
        ),
        Kind("cut", "a record, a checkpoint or a staged cache cut short", forked.truncated, 4, 1),
        Kind("bad-record", "one bit flipped in COMMIT.json", forked.flipped_record, 2, 1),
        Kind(
            "s3-line",
            "S3: connections cut at byte N, up or down, refused or stalled (proxy)",
            served.line,
            14,
            4,
        ),
        Kind("s3-killed", "S3: driver SIGKILLed between requests", served.killed, 6, 3),
        Kind("s3-server", "S3 server SIGKILLed and started again", served.server, 4, 2),
        Kind("mlflow", "MLflow server SIGKILLed and started again", served.mlflow, 4, 2),
        Kind("ray-driver", "Ray: driver SIGKILLed, alone or with its group", rays.driver, 4, 4),
        Kind("ray-worker", "Ray: training worker SIGKILLed", rays.worker, 3, 3),
        Kind("ray-step", "Ray: process of a step or an evaluator SIGKILLed", rays.step, 3, 3),
        Kind("ray-stop", "Ray: driver asked to stop (SIGTERM)", rays.stop, 1, 2),
        Kind("ray-node", "Ray: raylet of one of three nodes SIGKILLed", rays.node, 1, 1),
        Kind("ray-head", "Ray: GCS (head) SIGKILLed, cluster started again", rays.head, 1, 1),
    ]


def main() -> int:
    arguments = parse()
    if SNAPSHOT not in os.environ:
        return from_copy()
    from tests.chaos.forked import Skip, undisturbed

    chosen = [kind for kind in kinds() if not arguments.only or kind.name in arguments.only]
    whole = sum(kind.share for kind in chosen)
    root = Path(os.environ[SNAPSHOT]) / "runs"
    root.mkdir()
    begun = time.monotonic()
    bench = undisturbed(root)
    say(f"undisturbed: {len(bench.ticks)} moments, {time.monotonic() - begun:.0f} s")
    rows: list[dict[str, Any]] = []
    stories: list[dict[str, Any]] = []
    for kind in chosen:
        wanted = max(1, round(arguments.faults * kind.share / whole))
        row = {"kind": kind.name, "what": kind.what, "faults": 0, "survived": 0}
        row |= {"scenarios": 0, "tries": 0, "mended": 0, "wrong": 0, "seconds": 0.0, "skipped": ""}
        start, seed = time.monotonic(), arguments.seed * 1000
        last = seed + wanted + 5  # some strike nothing: what was to be hit was over
        if arguments.scenario is not None:
            seed, last = arguments.scenario, arguments.scenario + 1
        while row["faults"] < wanted and seed < last:
            try:
                story = kind.scenario(bench, seed, kind.each)
            except Skip as reason:
                row["skipped"] = str(reason)
                say(f"{kind.name:<11} skipped: {reason}")
                break
            except Exception:
                from tests.chaos.forked import Story

                story = Story(kind.name, seed, wrong=[traceback.format_exc()])
            tell(kind, story)
            row["scenarios"] += 1
            row["faults"] += len(story.faults)
            row["survived"] += 0 if story.wrong else len(story.faults)
            row["tries"] = max(row["tries"], story.tries)
            row["mended"] += len(story.mended)
            row["wrong"] += len(story.wrong)
            faults = [fault.replace(f"{os.environ[SNAPSHOT]}/", "") for fault in story.faults]
            stories.append({"of": kind.name, **asdict(story), "faults": faults})
            if not story.wrong and not arguments.keep:
                for folder in root.glob(f"*-{seed}"):
                    shutil.rmtree(folder, ignore_errors=True)
            seed += 1
        row["seconds"] = round(time.monotonic() - start, 1)
        rows.append(row)
    bench.close()
    found = {
        "seed": arguments.seed,
        "machine": f"{os.cpu_count()} CPUs, Python {platform.python_version()}",
        "store": bench.store,
        "seconds": round(time.monotonic() - begun, 1),
        "kinds": rows,
        "scenarios": stories,
    }
    if arguments.only and arguments.out and Path(arguments.out).exists():
        found = joined(json.loads(Path(arguments.out).read_text()), found)
    text = table(found)
    say("\n" + text)
    if arguments.out:
        out = Path(arguments.out)
        out.write_text(json.dumps(found, indent=1) + "\n")
        out.with_suffix(".md").write_text(text)
    bad = any(row["wrong"] for row in rows)
    if bad:
        say(f"what went wrong is kept in {root}")
    elif not arguments.keep:
        shutil.rmtree(os.environ[SNAPSHOT], ignore_errors=True)
    return 1 if bad else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=200, help="over all kinds (default 200)")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="KIND",
        help="repeatable; in an --out that is there, these alone are replaced",
    )
    parser.add_argument("--scenario", type=int, metavar="SEED", help="that one again, of --only")
    parser.add_argument("--out", metavar="FILE.json", help="and the table beside it, as .md")
    parser.add_argument("--keep", action="store_true", help="keep the workspaces")
    arguments = parser.parse_args()
    if arguments.out:
        arguments.out = os.path.abspath(arguments.out)
    return arguments


def from_copy() -> int:
    """The same command from a copy of the product; never returns."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    root = Path(__file__).resolve().parents[2]
    leave = shutil.ignore_patterns("__pycache__", ".pytest_cache")
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / "product" / name, ignore=leave)
        else:
            shutil.copy2(source, folder / "product" / name)
    more = sys.argv[1:]
    if "--out" in more:  # the copy is elsewhere
        place = more.index("--out") + 1
        more[place] = os.path.abspath(more[place])
    environment = {**os.environ, SNAPSHOT: str(folder), "PYTHONPATH": str(folder / "product")}
    os.chdir(folder / "product")
    os.execve(sys.executable, [sys.executable, "-m", "tests.chaos.run", *more], environment)


def say(text: str) -> None:
    print(text, flush=True)


def tell(kind: Kind, story: "Story") -> None:
    """A line per fault, and what is wrong."""
    for fault in story.faults:
        end = "WRONG" if story.wrong else f"survived, {story.tries} more"
        say(f"{kind.name:<11} seed {story.seed:<5} {fault[:110]:<110} {end}")
    for done in story.mended:
        say(f"{'':<11} seed {story.seed:<5} mended as told: {done}")
    for wrong in story.wrong:
        say(f"{'':<11} seed {story.seed:<5} WRONG: {wrong}")
    if story.wrong:
        again = f"--only {kind.name} --scenario {story.seed}"
        say(f"{'':<11} again: python tests/chaos/run.py {again}")


def joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """An earlier result with the kinds of this run in place of its own."""
    names = {row["kind"] for row in now["kinds"]}
    rows = {row["kind"]: row for row in (*before["kinds"], *now["kinds"])}
    kept = [story for story in before["scenarios"] if story["of"] not in names]
    return {
        **now,
        "store": now["store"] or before["store"],
        "seconds": sum(row["seconds"] for row in rows.values()),
        "kinds": [rows[kind.name] for kind in kinds() if kind.name in rows],
        "scenarios": [*kept, *now["scenarios"]],
    }


def table(found: dict[str, Any]) -> str:
    """Markdown, made of the run's own numbers."""
    rows = found["kinds"]
    faults = sum(row["faults"] for row in rows)
    survived = sum(row["survived"] for row in rows)
    lines = [
        "# Faults tried, and survived",
        "",
        f"{faults} faults, {survived} survived; seed {found['seed']}, {found['seconds']:.0f} s on "
        f"{found['machine']}. Written by `make chaos`; every fault is in `chaos.json`.",
        "",
        "After each scenario the same command is run until it ends well. Then: weights, scores, "
        "images and shards are those of an undisturbed run, bit by bit; the registry has one "
        "version with the alias; every file of every record has its recorded hash; the plan says "
        "that all is cached; no record that was there is lost or changed; no training began again "
        "below its last checkpoint; no process is left.",
        "",
        "| kind | fault | faults | survived | scenarios | most runs to the end | mended by hand | "
        "seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {r['kind']} | {r['what']}"
            + (f" (skipped: {r['skipped']})" if r["skipped"] else "")
            + f" | {r['faults']} | {r['survived']} | {r['scenarios']} | {r['tries']} "
            f"| {r['mended']} | {r['seconds']:.0f} |"
            for r in rows
        ),
        "",
        "*Mended by hand*: the command stopped with one line that said what to delete; that was "
        "done, and nothing else. The driver, disk, file and S3 kinds run the command line with its "
        "steps in one process; the Ray kinds run it as a user does."
        + (f" S3 is {found['store']}." if found["store"] else ""),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
