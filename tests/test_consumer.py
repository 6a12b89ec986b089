"""A registered model in an environment that holds mlflow and torch, and nothing of cmforge."""

import json
import os
import subprocess
import sys
import textwrap
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[1]

PRODUCER = """
import sys
from pathlib import Path

sys.path.insert(0, "tests")
from test_register import PERCENTS, Place, run_step, write_model

workspace, models = Path(sys.argv[1]), Path(sys.argv[2])
workspace.mkdir()
for seed, name in enumerate(("distill", "isolate")):
    write_model(models / name, seed)
place = Place(workspace, models)
print(place.uri)
run_step(place, PERCENTS)
"""

CONSUMER = """
import hashlib, importlib.util, json, sys, warnings

absent = [n for n in ("consistency", "infra", "pipelines", "safetensors", "ray", "PIL")
          if importlib.util.find_spec(n) is None]

import mlflow, pandas as pd
from mlflow.exceptions import MlflowException

model = mlflow.pyfunc.load_model("models:/tiny.digits@champion")

def draw(**params):
    return model.predict(pd.DataFrame({"num_samples": [2]}), params={**params, "output": "uint8"})

def refused(**params):
    try:
        draw(**params)
    except MlflowException as error:
        return error.message
    return "accepted"

def edited():
    image = model.predict(pd.DataFrame({"num_samples": [1]}))["png_base64"][0]
    rows = pd.DataFrame({"num_samples": [3], "image": [image]})
    return model.predict(rows, params={"edit": "stroke", "steps": 2, "output": "uint8"})

import consistency
print(json.dumps({
    "absent": absent,
    "home": consistency.__file__,
    "shapes": [list(draw(steps=s).shape) for s in (1, 2)],
    "type": str(draw().dtype),
    "digests": [hashlib.sha256(draw(steps=s, seed=k).tobytes()).hexdigest()
                for s, k in ((1, 0), (1, 0), (1, 1), (2, 0))],
    "png": model.predict(pd.DataFrame({"num_samples": [2]}))["png_base64"][1],
    "edited": list(edited().shape),
    "refused": [refused(steps=0), refused(**{"class": 9}), refused(steps="many")],
}))
"""


def python(executable: Path, code: str, *arguments: str, cwd: Path, **extra: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW"))}
    done = subprocess.run(
        [str(executable), "-c", textwrap.dedent(code), *arguments],
        cwd=cwd,
        env={**environment, **extra},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_clean_environment_with_mlflow_and_torch_draws_from_the_registered_model(
    tmp_path: Path,
) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    constraints = REPO / "constraints.txt"
    wanted = [f"{name}=={version(name).split('+')[0]}" for name in ("mlflow", "torch", "pillow")]
    limits = ["-c", str(constraints)] if constraints.exists() else []
    clean = home / "bin" / "python"
    subprocess.run([clean, "-m", "pip", "install", "-q", *limits, *wanted], check=True)

    uri = python(
        Path(sys.executable),
        PRODUCER,
        str(tmp_path / "workspace"),
        str(tmp_path / "models"),
        cwd=REPO,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    seen: dict[str, Any] = json.loads(
        python(clean, CONSUMER, cwd=elsewhere, MLFLOW_TRACKING_URI=uri)
    )

    assert {"consistency", "infra", "pipelines", "safetensors", "ray"} <= set(seen["absent"])
    assert "mlartifacts" in seen["home"]  # the copy that travelled
    assert seen["shapes"] == [[2, 8, 8, 1], [2, 8, 8, 1]]
    assert seen["type"] == "uint8"
    again, other_seed, two_steps = seen["digests"][1:]
    assert again == seen["digests"][0]
    assert len({again, other_seed, two_steps}) == 3
    assert seen["png"].startswith("iVBORw0KGgo")
    assert seen["edited"] == [3, 8, 8, 1]
    assert "steps: 0 is not in 1 to 1000" in seen["refused"][0]
    assert "class: 9 is not a class of this model" in seen["refused"][1]
    assert "steps" in seen["refused"][2]
