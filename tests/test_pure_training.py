"""`docs/pure_training.py` trains, resumes and samples where nothing but torch and numpy can be
imported."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from consistency import published

ROOT = Path(__file__).parent.parent
ALONE = """
import runpy, sys

for name in ("ray", "mlflow", "webdataset", "fsspec", "s3fs", "yaml", "sklearn", "PIL", "infra",
             "pipelines"):
    sys.modules[name] = None  # importing it raises ImportError
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "methods", [["ect", "cd"], ["ict", "scd"]], ids=lambda methods: "-".join(methods)
)
def test_pure_script_trains_resumes_and_samples(tmp_path: Path, methods: list[str]) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.save(tmp_path / "images.npy", (digits.images * 15).astype(np.uint8)[..., None])
    np.save(tmp_path / "labels.npy", digits.target.astype(np.int64))
    options = "--size tiny --steps 6 --batch 8 --samples 40 --device cpu --peak 1e-6 --methods"
    done = subprocess.run(
        [
            *[sys.executable, "-c", ALONE, ROOT / "docs" / "pure_training.py"],
            *[tmp_path / "images.npy", tmp_path / "out", "--labels", tmp_path / "labels.npy"],
            *options.split(),
            *methods,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["teacher", *methods]
    for line in lines:
        assert len(line["loss"]) == 6  # three steps before the restart, three after
        assert np.isfinite(line["loss"]).all()
        assert line["mfu"] > 0
    for method in methods:
        assert (tmp_path / "out" / f"{method}-checkpoint" / "state.safetensors").exists()
        assert published.load(tmp_path / "out" / method).description.size == 8
        sheet = (tmp_path / "out" / f"{method}-1.ppm").read_bytes()
        assert sheet.startswith(b"P6 80 32 255\n")  # four rows of ten 8x8 digits
        assert len(sheet) == len(b"P6 80 32 255\n") + 80 * 32 * 3
