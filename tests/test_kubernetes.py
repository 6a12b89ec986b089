"""Manifest, image and compose file, without a cluster and without an engine.

The fields are an allow-list written by hand from KubeRay 1.7's and Kubernetes' references: what is
not in it fails, as the API server would drop it without a word.
"""

import copy
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from pipelines import cli, config
from pipelines.arguments import load

ROOT = Path(__file__).parents[1]
MANIFEST = ROOT / "infra/kubernetes/rayjob.yaml"
COMPOSE = ROOT / "infra/docker/compose.yaml"
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)
SECRET = re.compile(r"KEY|SECRET|PASSWORD|TOKEN|CREDENTIAL", re.IGNORECASE)

# --- the allow-list -------------------------------------------------------------------------------
# A dict is an object with these fields ("!": must be there), a one-element list a list, a frozenset
# one of these values, a compiled pattern a string that matches, a type itself.

QUANTITY = re.compile(r"[1-9][0-9]*(m|Mi|Gi|Ti)?")
LABELS = {"app.kubernetes.io/name!": str}
RESOURCES = {"cpu": QUANTITY, "memory!": QUANTITY, "nvidia.com/gpu": QUANTITY}
METADATA = {"name!": str, "labels!": LABELS}
CONTAINER = {
    "name!": str,
    "image!": str,
    "command": [str],
    "env": [
        {
            "name!": str,
            "value": str,
            "valueFrom": {"secretKeyRef!": {"name!": str, "key!": str, "optional": bool}},
        }
    ],
    "lifecycle": {"preStop!": {"exec!": {"command!": [str]}}},
    "ports": [{"name!": str, "containerPort!": int}],
    "resources!": {"requests!": {**RESOURCES, "cpu!": QUANTITY}, "limits!": RESOURCES},
    "securityContext!": {
        "allowPrivilegeEscalation!": bool,
        "readOnlyRootFilesystem!": bool,
        "capabilities!": {"drop!": [frozenset({"ALL"})]},
    },
    "volumeMounts!": [{"name!": str, "mountPath!": re.compile("/.+")}],
}
POD = {
    "restartPolicy": frozenset({"Never"}),
    "serviceAccountName!": str,
    "automountServiceAccountToken!": bool,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {},
    "securityContext!": {
        "runAsNonRoot!": bool,
        "runAsUser!": int,
        "runAsGroup!": int,
        "fsGroup!": int,
        "seccompProfile!": {"type!": frozenset({"RuntimeDefault"})},
    },
    "tolerations": [
        {
            "key!": str,
            "operator!": frozenset({"Exists", "Equal"}),
            "effect!": frozenset({"NoSchedule", "NoExecute"}),
        }
    ],
    "containers!": [CONTAINER],
    "volumes!": [
        {"name!": str, "emptyDir!": {"medium": frozenset({"Memory"}), "sizeLimit": QUANTITY}}
    ],
}
TEMPLATE = {"metadata!": {"labels!": LABELS}, "spec!": POD}
KINDS = {
    "ServiceAccount": {
        "apiVersion!": frozenset({"v1"}),
        "kind!": str,
        "metadata!": METADATA,
        "automountServiceAccountToken": bool,
    },
    "NetworkPolicy": {
        "apiVersion!": frozenset({"networking.k8s.io/v1"}),
        "kind!": str,
        "metadata!": METADATA,
        "spec!": {
            "podSelector!": {"matchLabels!": LABELS},
            "policyTypes!": [frozenset({"Ingress", "Egress"})],
            "ingress!": [
                {
                    "from!": [
                        {
                            "podSelector": {"matchLabels!": LABELS},
                            "namespaceSelector": {
                                "matchLabels!": {"kubernetes.io/metadata.name!": str}
                            },
                        }
                    ],
                    "ports": [{"port!": int, "protocol!": frozenset({"TCP"})}],
                }
            ],
        },
    },
    "RayJob": {
        "apiVersion!": frozenset({"ray.io/v1"}),
        "kind!": str,
        "metadata!": METADATA,
        "spec!": {
            "submissionMode!": frozenset(
                {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}
            ),
            "entrypoint!": str,
            "backoffLimit!": int,
            "submitterConfig": {"backoffLimit!": int},
            "preRunningDeadlineSeconds": int,
            "activeDeadlineSeconds!": int,
            "shutdownAfterJobFinishes!": bool,
            "ttlSecondsAfterFinished": int,
            "submitterPodTemplate": TEMPLATE,
            "rayClusterSpec!": {
                "rayVersion!": str,
                "authOptions!": {"mode!": frozenset({"token", "disabled"})},
                "headGroupSpec!": {
                    "serviceType": frozenset({"ClusterIP"}),
                    "rayStartParams!": {"num-cpus!": str, "dashboard-host": str},
                    "template!": TEMPLATE,
                },
                "workerGroupSpecs!": [
                    {
                        "groupName!": str,
                        "replicas!": int,
                        "minReplicas!": int,
                        "maxReplicas!": int,
                        "rayStartParams!": {},
                        "template!": TEMPLATE,
                    }
                ],
            },
        },
    },
}


def problems(value, allowed, path=""):
    """What of `value` is not as allowed, each with its path."""
    if isinstance(allowed, dict):
        if not isinstance(value, dict):
            return [f"{path}: not an object"]
        required = {key[:-1] for key in allowed if key.endswith("!")}
        fields = {key.removesuffix("!"): inner for key, inner in allowed.items()}
        found = [f"{path}.{key}: missing" for key in sorted(required - set(value))]
        for key, inner in value.items():
            if key in fields:
                found += problems(inner, fields[key], f"{path}.{key}")
            else:
                found.append(f"{path}.{key}: unknown field")
        return found
    if isinstance(allowed, list):
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        return [p for i, one in enumerate(value) for p in problems(one, allowed[0], f"{path}[{i}]")]
    if isinstance(allowed, frozenset):
        good = isinstance(value, str) and value in allowed
        return [] if good else [f"{path}: {value!r} is none of {sorted(allowed)}"]
    if isinstance(allowed, re.Pattern):
        good = isinstance(value, str) and allowed.fullmatch(value)
        return [] if good else [f"{path}: {value!r}"]
    return [] if type(value) is allowed else [f"{path}: {value!r} is no {allowed.__name__}"]


def all_problems(documents):
    return [p for one in documents for p in problems(one, KINDS[one["kind"]], one["kind"])]


@pytest.fixture
def documents():
    # A copy without YAML's shared anchors: what is changed in one place changes there only.
    text = yaml.safe_load_all(MANIFEST.read_text())
    return [yaml.safe_load(yaml.dump(one, Dumper=NoAliases)) for one in text]


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


def of_kind(documents, kind):
    return next(one for one in documents if one["kind"] == kind)


@pytest.fixture
def job(documents):
    return of_kind(documents, "RayJob")["spec"]


@pytest.fixture
def pods(job):
    """Name -> template of each kind of pod."""
    cluster = job["rayClusterSpec"]
    groups = {one["groupName"]: one["template"] for one in cluster["workerGroupSpecs"]}
    head = cluster["headGroupSpec"]["template"]
    return {"submitter": job["submitterPodTemplate"], "head": head, **groups}


def nodes(value, at=()):
    """Each (path, value) of a tree."""
    yield at, value
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, one in inner:
        yield from nodes(one, (*at, key))


def parent_of(tree, at):
    for key in at[:-1]:
        tree = tree[key]
    return tree


# --- the manifest ---------------------------------------------------------------------------------


def test_every_field_of_the_manifest_is_one_that_kubernetes_knows(documents):
    assert {one["kind"] for one in documents} == set(KINDS)
    assert all_problems(documents) == []


def test_a_misspelt_field_is_found_wherever_it_is(documents):
    fields = [at for at, _ in nodes(documents) if at and isinstance(at[-1], str)]
    assert len(fields) > 300
    assert {"shutdownAfterJobFinishes", "secretKeyRef", "runAsNonRoot"} <= {at[-1] for at in fields}
    for at in fields:
        if at[-1] == "kind" and len(at) == 2:
            continue  # chooses the list to hold it against
        holder = parent_of(documents, at)
        holder[at[-1][:-1]] = holder.pop(at[-1])
        found = all_problems(documents)
        assert any(f".{at[-1][:-1]}: unknown field" in one for one in found), at
        holder[at[-1]] = holder.pop(at[-1][:-1])
    assert all_problems(documents) == []


def test_a_value_of_another_type_is_found_wherever_it_is(documents):
    leaves = [at for at, value in nodes(documents) if isinstance(value, (bool, int, str))]
    for at in leaves:
        if at[-1] == "kind" and len(at) == 2:
            continue
        holder = parent_of(documents, at)
        right = holder[at[-1]]
        for wrong in (None, [right], str(right) if isinstance(right, int) else 4):
            holder[at[-1]] = wrong
            assert all_problems(documents), (at, wrong)
        holder[at[-1]] = right


def test_ray_is_the_same_in_manifest_image_and_constraints(job):
    assert job["rayClusterSpec"]["rayVersion"] == CONSTRAINTS["ray"]
    assert "PIP_CONSTRAINT=/src/constraints.txt" in DOCKERFILE.read_text()
    assert not re.search(r"\bray\W*==", DOCKERFILE.read_text())


def test_images_are_ours_of_this_version_and_no_tag_moves(pods):
    images = {name: pod["spec"]["containers"][0]["image"] for name, pod in pods.items()}
    ours = f"REGISTRY/cmforge:{PROJECT['version']}"
    cpu = dict.fromkeys(("submitter", "head", "cpu"), f"{ours}-cpu")
    assert images == {**cpu, "gpu": f"{ours}-cuda"}


def test_no_pod_runs_as_root_or_can_become_it_or_writes_its_image(pods):
    user = int(instructions()[-2][1].split(":")[0])  # USER comes before CMD
    for name, pod in pods.items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] == user > 0, name
        assert spec["automountServiceAccountToken"] is False, name
        (container,) = spec["containers"]
        allowed = container["securityContext"]
        assert allowed["allowPrivilegeEscalation"] is False, name
        assert allowed["readOnlyRootFilesystem"] is True, name
        assert allowed["capabilities"]["drop"] == ["ALL"], name


def test_what_is_written_has_a_volume(pods):
    for name, pod in pods.items():
        (container,) = pod["spec"]["containers"]
        volumes = {one["name"]: one["emptyDir"] for one in pod["spec"]["volumes"]}
        mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
        assert set(mounts.values()) == set(volumes), name
        assert {"/tmp", "/home/cmforge"} <= set(mounts), name
        if name != "submitter":  # Ray's object store; 64 MiB else
            assert volumes[mounts["/dev/shm"]]["medium"] == "Memory", name


def exposed(text, documents):
    """Names of what looks like a secret and is no reference to one; and URLs that hold one."""
    found = re.findall(r"\b(?:AKIA[0-9A-Z]{16}|[a-z0-9+]+://[^\s/@\"']+:[^\s/@\"']+@)", text)
    for at, value in nodes(documents):
        if isinstance(value, dict) and SECRET.search(str(value.get("name", ""))):
            reference = value.get("valueFrom", {}).get("secretKeyRef")
            if "mountPath" not in value and at[-2:-1] == ("env",) and reference is None:
                found.append(value["name"])
    return found


def test_secrets_are_references_only(documents):
    assert exposed(MANIFEST.read_text(), documents) == []
    names = {v["name"] for at, v in nodes(documents) if at[-2:-1] == ("env",)}
    assert {"AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"} <= names


def test_a_secret_written_into_the_manifest_is_found(documents):
    for at, value in list(nodes(documents)):
        if at[-2:-1] == ("env",) and "valueFrom" in value:
            leaked = copy.deepcopy(documents)
            parent_of(leaked, at)[at[-1]] = {"name": value["name"], "value": "x"}
            assert exposed("", leaked) == [value["name"]]
    for line in ("value: AKIAABCDEFGHIJKLMNOP", "url: http://me:pass@mlflow:5000"):
        assert exposed(line, [])


def test_the_command_parses_and_plans_and_fits_the_cluster(job, tmp_path, capsys):
    words = shlex.split(job["entrypoint"].replace("s3://BUCKET", str(tmp_path)))
    (data,) = [word.partition("=")[2] for word in words if word.startswith("data.path=")]
    Path(data).mkdir(parents=True)
    assert words.pop(0) == "cmforge"
    assert cli.main([*words, "--dry-run"]) == 0
    assert "0 cached, 10 to run" in capsys.readouterr().out

    arguments, rest = cli._parser().parse_known_args(words)
    arguments.overrides += rest
    assert arguments.wait  # a retry may find the driver before it still at work
    _, cluster = load(arguments)
    assert config.load_cluster("auto", []).address == cluster.address == "auto"
    groups = {one["groupName"]: one for one in job["rayClusterSpec"]["workerGroupSpecs"]}
    limits = groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert cluster.workers == groups["gpu"]["replicas"]
    assert cluster.gpus_per_worker == int(limits["nvidia.com/gpu"])
    assert cluster.cpus_per_worker + cluster.cpus_per_evaluator <= int(limits["cpu"])


def test_data_and_workspace_survive_the_cluster(job):
    words = dict(w.split("=", 1) for w in shlex.split(job["entrypoint"]) if "=" in w)
    assert words["cluster.workspace"].startswith("s3://")
    assert words["data.path"].startswith("s3://")
    uris = [v for at, v in nodes(job) if isinstance(v, dict) and v.get("name") == TRACKING]
    assert uris
    assert all(one["value"].startswith("http") for one in uris)  # SQLite cannot live in a bucket


TRACKING = "MLFLOW_TRACKING_URI"


def test_a_lost_try_is_tried_again_and_nothing_runs_for_ever(job):
    assert job["submissionMode"] == "K8sJobMode"
    assert job["backoffLimit"] >= 3
    assert job["shutdownAfterJobFinishes"] is True
    assert job["activeDeadlineSeconds"] > job["preRunningDeadlineSeconds"] > 0
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    head = job["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_who_is_asked_to_stop_has_time_to_save(job, pods):
    head = pods["head"]["spec"]
    (container,) = head["containers"]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    grace = re.search(r"cluster\.grace_seconds=(\d+)", job["entrypoint"])[1]
    patience = int(environment["RAY_JOB_STOP_WAIT_TIME_S"])
    assert int(grace) < patience < head["terminationGracePeriodSeconds"]


def test_the_hook_finds_the_driver_and_not_itself(pods):
    (container,) = pods["head"]["spec"]["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    patterns = re.findall(r"-f '([^']+)'", command[-1])
    assert len(patterns) == 2
    for pattern in patterns:
        driver = "/usr/local/bin/python3.11 /usr/local/bin/cmforge run cifar10 --cluster auto"
        assert re.search(pattern, driver)
        assert not re.search(pattern, " ".join(command))
        assert not re.search(pattern, "/bin/sh -c cmforge run cifar10 --cluster auto")
        assert not re.search(pattern, "ray::JobSupervisor.run")


def test_the_policy_names_the_pods(documents, pods):
    policy = of_kind(documents, "NetworkPolicy")["spec"]
    selected = policy["podSelector"]["matchLabels"]
    assert all(pod["metadata"]["labels"] == selected for pod in pods.values())
    account = of_kind(documents, "ServiceAccount")["metadata"]["name"]
    assert {pod["spec"]["serviceAccountName"] for pod in pods.values()} == {account}


# --- the image ------------------------------------------------------------------------------------


def instructions(text=None):
    """(instruction, its text) of each, continued lines joined, comments gone."""
    lines = (DOCKERFILE.read_text() if text is None else text).splitlines()
    joined = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = joined.replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def image_mistakes(text):
    found = []
    steps = instructions(text)
    bases = {word.split("=")[0]: word.split("=")[1] for name, word in steps if name == "ARG"}
    for name, rest in steps:
        if name == "ADD":
            found.append("ADD")  # fetches URLs, unpacks archives
        if name in ("ARG", "ENV") and any(map(SECRET.search, re.findall(r"(\w+)=", rest))):
            found.append(f"{name} of a secret")
        if name == "FROM":
            image = re.sub(r"\$\{(\w+)\}", lambda m: bases[m[1]], rest.split()[0])
            if not re.fullmatch(r"[\w/.-]+:\d+\.\d+\.\d+-[\w-]+(@sha256:[0-9a-f]{64})?", image):
                found.append(f"moving base {image}")
        if name == "RUN" and re.search(r"curl|wget https?:|git clone|chmod 777|sudo", rest):
            found.append("RUN")
    last = len(steps) - 1 - next(i for i, (name, _) in enumerate(steps[::-1]) if name == "FROM")
    users = [rest for name, rest in steps[last:] if name == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        found.append("root, or a user without a number")
    if [name for name, _ in steps[-2:]] != ["USER", "CMD"]:
        found.append("something after USER")
    return found


def test_the_image_ends_as_a_numbered_user_on_a_fixed_base_without_secrets():
    assert image_mistakes(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("USER 1000:1000", "USER cmforge"),
        ("USER 1000:1000", "USER 0:0"),
        ("USER 1000:1000\n", ""),
        ('CMD ["', 'USER 0:0\nCMD ["'),
        ("3.11.13-slim-bookworm", "latest"),
        ("3.11.13-slim-bookworm", "3.11-slim"),
        ("COPY configs configs", "ADD https://example.org/configs.tar configs"),
        ("ARG VARIANT=cpu", "ARG VARIANT=cpu\nARG AWS_SECRET_ACCESS_KEY=x"),
        ("PYTHONUNBUFFERED=1", "MLFLOW_TRACKING_PASSWORD=x"),
    ],
)
def test_a_bad_image_is_told_from_a_good_one(right, wrong):
    text = DOCKERFILE.read_text()
    assert right in text
    assert image_mistakes(text.replace(right, wrong, 1))


def test_the_image_gets_what_it_copies_and_nothing_more():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = {
        source
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    assert {source.split("/")[0] for source in copied} == let_in
    assert all((ROOT / source).exists() for source in copied)
    # Everything that the build backend wants is among them.
    assert {"consistency", "pipelines", "infra", "configs"} <= copied
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= copied


def test_what_the_image_installs_is_pinned():
    (install,) = re.findall(r"pip install -r requirements\.txt ([^&\n]+)", DOCKERFILE.read_text())
    declared = [re.split(r"[\[<>=]", line)[0] for line in PROJECT["dependencies"]]
    assert set(install.split()) == {"boto3", "hatchling"}
    assert {*install.split(), *declared} <= set(CONSTRAINTS)


def test_the_image_has_the_python_of_the_constraints():
    python = re.search(r"Python (\d+\.\d+)", (ROOT / "constraints.txt").read_text())[1]
    assert f"BASE=python:{python}." in DOCKERFILE.read_text()


# --- the development stack ------------------------------------------------------------------------


@pytest.fixture
def services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


def test_published_ports_are_the_machines_own(services):
    ports = [port for one in services.values() for port in one.get("ports", [])]
    assert len(ports) == 2
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in ports)


def test_secrets_of_the_stack_come_from_the_environment_and_must_be_set(services):
    secrets = {
        (name, key): value
        for name, one in services.items()
        for key, value in one.get("environment", {}).items()
        if SECRET.search(key)
    }
    assert len(secrets) == 5  # the store's one, and two of each of its users
    assert all(re.fullmatch(r"\$\{\w+:\?[^}]*\}", value) for value in secrets.values()), secrets


def test_mlflow_answers_to_the_names_that_are_used_for_it(services):
    command = services["mlflow"]["command"]
    hosts = next(word for word in command if word.startswith("--allowed-hosts="))
    allowed = hosts.partition("=")[2].split(",")
    published = [port.rpartition(":")[0] for port in services["mlflow"]["ports"]]
    probed = re.search(r"http://([^/]+)/", services["mlflow"]["healthcheck"]["test"][-1])[1]
    assert {probed, *published, "localhost:5000"} == set(allowed)  # the list replaces MLflow's
    assert all(":" in host for host in allowed)  # without its port, a host is another
    assert "/health" not in services["mlflow"]["healthcheck"]["test"][-1]


def test_services_are_locked_down_pinned_and_watched(services):
    for name, one in services.items():
        assert one["cap_drop"] == ["ALL"], name
        assert one["security_opt"] == ["no-new-privileges:true"], name
        tag = one["image"].rpartition(":")[2]
        assert tag not in ("", "latest"), name
        assert "healthcheck" in one or one["restart"] == "no", name
