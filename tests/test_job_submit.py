"""A clone submitted as a job to a cluster of three nodes: killed, stopped, its head lost, resumed.

One story runs everything in a network and process namespace of its own (nothing listens outside
it, nothing outlives it) and writes down what it saw; the tests read it.
"""

import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
RECIPE = "tests/assets/tiny.yaml"
APART = [
    *("unshare", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"),
    *("sh", "-c", 'ip link set lo up && exec "$@"', "sh"),
]
TRAINED = ("teacher", "distill", "isolate")
SEED = 6  # of the moments at which things happen
DEADLINE = 300.0  # of everything that is waited for
DASHBOARD = "http://127.0.0.1:8265"


# --- what happens in the namespace ----------------------------------------------------------------


class Nodes:
    """A head without CPUs and two workers of one CPU each, as `ray start` makes them."""

    def __init__(self, folder):
        self.folder, self.generation = folder, 0
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        self.environment = {
            **kept,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            "RAY_API_SERVER_ADDRESS": DASHBOARD,
            "OMP_NUM_THREADS": "1",
        }

    def start(self):
        """On a busy machine Ray gives up on its own processes now and then: three tries."""
        for left in (2, 1, 0):
            try:
                return self._start_all()
            except subprocess.CalledProcessError:
                if not left:
                    raise
                self.kill_all()

    def _start_all(self):
        self.generation += 1
        head = ("--head", "--port=6379", "--num-cpus=0", "--include-dashboard=true")
        self._start("h", *head, "--dashboard-host=127.0.0.1")
        for name in ("a", "b"):
            self._start(name, "--address=127.0.0.1:6379", "--num-cpus=1")

    def _start(self, name, *options):
        # A folder for each node, as machines have: unpacking a job's package replaces what is
        # there, under the feet of another node's processes. A short one: sockets lie below it.
        place = self.folder / f"{name}{self.generation}"
        common = ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        common.append(f"--temp-dir={place}")
        with open(self.folder / "nodes.log", "a") as log:
            subprocess.run(
                ["ray", "start", *options, *common],
                env=self.environment,
                stdout=log,
                stderr=log,
                check=True,
                timeout=DEADLINE,
            )

    def kill_head(self):
        """Power off: the control store, the dashboard and the first raylet started go at once."""
        head = named("gcs_server") + named("dashboard.py") + named("/raylet/raylet")[:1]
        for process in head:
            process.kill()
        psutil.wait_procs(head, timeout=30)

    def kill_all(self):
        """The workers too: KubeRay makes a new cluster for every retry."""
        mine = psutil.Process()
        others = [
            p for p in psutil.process_iter() if p.pid != mine.pid and p.pid not in ancestors()
        ]
        for process in others:
            process.kill()
        psutil.wait_procs(others, timeout=30)


def ancestors():
    return {1, *(p.pid for p in psutil.Process().parents())}


def named(part):
    """Processes with that in their command line, oldest first."""
    found = []
    for process in psutil.process_iter():
        try:
            if part in " ".join(process.cmdline()) and process.pid != os.getpid():
                found.append((process.create_time(), process.pid, process))
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return [process for *_, process in sorted(found, key=lambda one: one[:2])]


def until(what, ready, every=0.05):
    end = time.monotonic() + DEADLINE
    while not (found := ready()):
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(every)
    return found


def product(workspace):
    """The command of the story. A checkpoint after every step, so that a kill finds some."""
    options = ("--cluster", "auto", "--wait", "cluster.checkpoint_every_seconds=0")
    more = ("teacher.images=1024", "distill.images=1024", "isolate.images=256")
    place = f"cluster.workspace={workspace}"
    return ["python", "-m", "pipelines", "run", RECIPE, *options, place, *more]


class Jobs:
    """`ray job submit` from the clone; its REST API where a command would be too slow."""

    def __init__(self, nodes, clone, workspace):
        self.nodes, self.clone, self.workspace = nodes, clone, workspace

    def submit(self, name, wait):
        done = subprocess.run(
            [
                *("ray", "job", "submit", "--working-dir", str(self.clone)),
                *("--submission-id", name, *([] if wait else ["--no-wait"]), "--"),
                *product(self.workspace),
            ],
            cwd=self.clone,
            env=self.nodes.environment,
            capture_output=True,
            text=True,
            timeout=3 * DEADLINE,
        )
        return {"code": done.returncode, "said": done.stdout + done.stderr}

    def ask(self, path, method="GET", token=None):
        token = self.nodes.environment["RAY_AUTH_TOKEN"] if token is None else token
        request = urllib.request.Request(
            f"{DASHBOARD}/api/jobs/{path}",
            method=method,
            headers={"Authorization": f"Bearer {token}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def end(self, name):
        """Status and output of a job once it is over."""
        over = ("STOPPED", "FAILED", "SUCCEEDED")
        until(f"the end of {name}", lambda: self.ask(name)["status"] in over, every=0.5)
        info = self.ask(name)
        said = self.ask(f"{name}/logs")["logs"]
        return {"status": info["status"], "code": info["driver_exit_code"], "said": said}

    def driver(self):
        """The process of the command itself, not the shell around it."""
        return next(p for p in named(f"workspace={self.workspace}") if "python" in p.name())

    def checkpoints(self, stage):
        """Folders of the finished ones, oldest first; their names begin with the images seen."""
        homes = (self.workspace / "steps" / stage).glob("*")
        found = [path for home in homes for path in home.glob("work/checkpoints/*/record.json")]
        return sorted(path.parent for path in found)

    def reach(self, stage, images):
        """Wait until the stage has a checkpoint of so many images, and a line of its curve."""
        least = f"{images:012d}"
        until(
            f"{stage} at {images}",
            lambda: (
                any(folder.name >= least for folder in self.checkpoints(stage))
                and self.curve(stage)
            ),
        )

    def curve(self, stage):
        """The newest checkpoint's curve: it holds measured rates, so no second one is equal."""
        try:
            text = (self.checkpoints(stage)[-1] / "curve.jsonl").read_text()
        except FileNotFoundError:  # a newer one is there
            return []
        return [json.loads(line) for line in text.splitlines()]


def story(folder):
    rng = random.Random(SEED)
    clone, seen = folder / "clone", {}
    nodes = Nodes(folder)
    began = time.monotonic()

    def note(name, value):
        seen[name] = value
        seen.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
        (folder / "story.json").write_text(json.dumps(seen, indent=1))

    nodes.start()
    listening = {c.laddr.ip for c in psutil.net_connections("inet") if c.status == "LISTEN"}
    note("listening", sorted(listening))
    quiet = Jobs(nodes, clone, folder / "undisturbed")
    try:
        quiet.ask("", token="0" * 64)
    except urllib.error.HTTPError as error:
        note("stranger", error.code)
    note("undisturbed", quiet.submit("undisturbed", wait=True))
    packages = folder.glob("h*/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    note("uploaded", sorted({path.name for package in packages for path in package.glob("*")}))

    jobs = Jobs(nodes, clone, folder / "disturbed")
    jobs.submit("killed", wait=False)
    jobs.reach("teacher", 16 * rng.randint(3, 20))
    jobs.driver().kill()
    note("killed", jobs.end("killed"))
    note("teacher", jobs.curve("teacher"))

    jobs.submit("stopped", wait=False)
    jobs.reach("distill", 16 * rng.randint(3, 20))
    jobs.ask("stopped/stop", method="POST")
    note("stopped", jobs.end("stopped"))
    note("distill", jobs.curve("distill"))

    # Not as a job, to see what the command itself does and says when the head goes.
    with open(folder / "headless.log", "w") as log:
        driver = subprocess.Popen(
            product(jobs.workspace),
            cwd=clone,
            env={**nodes.environment, "RAY_ADDRESS": "127.0.0.1:6379"},
            stdout=log,
            stderr=log,
        )
        evaluating = "steps/evaluate/*/attempts/*"
        until("an evaluation", lambda: list(jobs.workspace.glob(evaluating)))
        time.sleep(rng.uniform(0, 5))
        nodes.kill_head()
        lost = time.monotonic()
        code = driver.wait(timeout=DEADLINE)
    said = (folder / "headless.log").read_text()
    note("headless", {"code": code, "said": said, "seconds": time.monotonic() - lost})
    nodes.kill_all()
    nodes.start()
    note("resumed", jobs.submit("resumed", wait=True))


# --- what is said of it ---------------------------------------------------------------------------


def copy_clone(folder):
    """What git would clone, with the lumber of a working copy beside it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in (".venv/lib/big", "cmforge-workspace/steps/big", ".git/big", "mlruns/0/big"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("not for the cluster")


@pytest.fixture(scope="module")
def told():
    """What the story wrote down. Its folder's path is short: Ray's sockets lie below it."""
    tried = subprocess.run([*APART, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no namespaces here: {tried.stderr.strip()}")
    folder = Path(tempfile.mkdtemp(prefix="cmf", dir="/tmp"))
    try:
        copy_clone(folder / "clone")
        done = subprocess.run(
            [*APART, sys.executable, __file__, str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        log = (folder / "nodes.log").read_text()
        assert done.returncode == 0, f"{done.stderr[-4000:]}\n{log[-4000:]}"
        yield folder, json.loads((folder / "story.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def records(workspace):
    found = {}
    for path in Path(workspace).glob("steps/*/*/COMMIT.json"):
        record = json.loads(path.read_text())
        assert record["step"] not in found, "a step was committed under two fingerprints"
        found[record["step"]] = record
    return found


def outcome(workspace):
    """What must not depend on what happened on the way: weights, scores, data."""
    done = records(workspace)
    rows = done["evaluate"]["value"]["scores"]
    scores = [(row["candidate"], row["protocol"]["steps"], row["values"]) for row in rows]
    weights = {step: done[step]["value"]["weights_sha256"] for step in TRAINED}
    return weights, scores, done["shard"]["value"]["manifest_sha256"]


def test_the_cluster_listens_here_only_and_to_those_with_the_token(told):
    _, seen = told
    assert set(seen["listening"]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert seen["stranger"] in (401, 403)


def test_a_clone_is_uploaded_without_what_belongs_to_the_machine(told):
    _, seen = told
    assert {"pipelines", "consistency", "infra", "configs", "pyproject.toml"} <= set(
        seen["uploaded"]
    )
    assert not {".venv", ".git", "cmforge-workspace", "mlruns"} & set(seen["uploaded"])


def test_a_submitted_clone_goes_from_images_to_a_registered_model(told):
    folder, seen = told
    assert seen["undisturbed"]["code"] == 0, seen["undisturbed"]["said"]
    assert "model   tiny version 1" in seen["undisturbed"]["said"]
    assert len(records(folder / "undisturbed")) == 8


def test_killed_stopped_and_beheaded_it_ends_as_if_undisturbed(told):
    folder, seen = told
    assert seen["resumed"]["code"] == 0, seen["resumed"]["said"]
    assert outcome(folder / "disturbed") == outcome(folder / "undisturbed")
    assert "model   tiny version 1" in seen["resumed"]["said"]


def test_each_try_begins_where_the_one_before_was(told):
    folder, seen = told
    assert "Killed" in seen["killed"]["said"]
    assert seen["killed"]["status"] == "FAILED"
    for name in ("shard", "reference"):
        assert f"{name:<10} cached" in seen["stopped"]["said"]
    for name in ("shard", "reference", "teacher"):
        assert f"{name:<10} cached" in seen["headless"]["said"]
    for name in ("shard", "reference", *TRAINED):
        assert f"{name:<10} cached" in seen["resumed"]["said"]
    for stage in ("teacher", "distill"):
        record = records(folder / "disturbed")[stage]
        home = folder / "disturbed/steps" / stage / record["fingerprint"] / "attempts"
        curve = (home / record["attempt"] / "curve.jsonl").read_text().splitlines()
        # The curve holds measured rates: were the stage trained anew, they would differ.
        before = seen[stage]
        assert before
        assert [json.loads(line) for line in curve[: len(before)]] == before


def test_a_stopped_job_saves_and_says_so(told):
    _, seen = told
    assert seen["stopped"]["status"] == "STOPPED"
    assert "distill    stopped" in seen["stopped"]["said"]
    assert (
        "asked to stop by SIGTERM; the same command goes on where it stopped"
        in (seen["stopped"]["said"])
    )


def test_without_a_head_the_command_ends_and_says_how_to_go_on(told):
    _, seen = told
    assert seen["headless"]["code"] == 1
    assert (
        "the head of the Ray cluster at 127.0.0.1:6379 has not answered"
        in (seen["headless"]["said"])
    )
    assert "the same command goes on once there is a head again" in seen["headless"]["said"]


if __name__ == "__main__":
    story(Path(sys.argv[1]))
