"""The rules of the house, as tests: imports, lengths, what an installed wheel holds."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("consistency", "pipelines", "infra")
LONGEST = 410  # lines; a file past this wants to be two


def imported_by(statement):
    """Top-level modules a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(' '.join({{n.split('.')[0] for n in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_consistency_is_pure_math():
    everything = "\n".join(
        f"import {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
        for path in sorted((ROOT / "consistency").rglob("*.py"))
        if path.name != "__init__.py"
    )
    loaded = imported_by(everything)
    assert "torch" in loaded  # the statement did import the package
    assert not loaded & {"ray", "mlflow", "fsspec", "webdataset", "yaml", "infra", "pipelines"}


@pytest.mark.parametrize(
    "module", ["dag", "execution", "artifacts", "config", "graph", "cli", "progress", "recipe"]
)
def test_planning_modules_import_nothing_heavy(module):
    loaded = imported_by(f"import pipelines.{module}")
    assert not loaded & {"torch", "ray", "mlflow", "webdataset"}


def test_only_two_files_import_ray():
    importers = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if any(
            line.split()[:1] in (["import"], ["from"]) and line.split()[1].split(".")[0] == "ray"
            for line in path.read_text().splitlines()
        )
    }
    assert importers == {"infra/cluster.py", "infra/tuning.py"}


def test_no_file_grows_past_what_one_reads_in_a_sitting():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def test_no_committed_file_names_a_machine():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    texts = {name for name in listed.stdout.split("\0") if name.endswith((".py", ".md", ".yaml"))}
    assert texts
    own = re.compile("(?<![\\w}.])/wo" + "rk/")
    assert [name for name in texts if own.search((ROOT / name).read_text())] == []


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_the_recipes_and_nothing_else(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert "pipelines/presets/recipes/quickstart.yaml" in names
    assert "pipelines/report.css" in names
    # From the wheel alone, without the checkout: the recipe is found and its plan printed.
    planned = subprocess.run(
        [sys.executable, "-P", "-m", "pipelines", "plan", "quickstart", "--workspace", "w"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "8 to run" in planned.stdout
