"""The code of a registered model. MLflow runs this file where the model is loaded.

It needs mlflow, torch and the `consistency` package that travels beside it; cmforge need not be
installed there. Input: one row with `num_samples`. Parameters: `steps`, `seed`, `class` (-1: all
classes in turn) and `output` ("png_base64": a table, "uint8": an array [n, H, W, C]).
"""

import base64
import struct
import zlib
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from consistency import published

MAX_SAMPLES = 10_000
MAX_STEPS = 1_000
OUTPUTS = ("png_base64", "uint8")


class FewStepGenerator(PythonModel):
    """Images from noise in a few network calls; the same seed gives the same images."""

    def load_context(self, context: PythonModelContext) -> None:
        config = Path(context.artifacts["config"]).read_text()
        weights = torch.load(context.artifacts["weights"], map_location="cpu", weights_only=True)
        self.model = published.build(published.ModelDescription.from_json(config), weights)
        if torch.cuda.is_available():
            self.model.function.to("cuda")

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame | npt.NDArray[np.uint8]:
        """Image i depends on (seed, i, steps, class) alone, not on how many are asked for."""
        if len(model_input) != 1:
            raise _invalid(f"num_samples: give exactly one row, not {len(model_input)}")
        asked = {"steps": 1, "seed": 0, "class": -1, "output": OUTPUTS[0], **(params or {})}
        n, steps, seed, label = (
            int(value)
            for value in (
                model_input["num_samples"].iloc[0],
                asked["steps"],
                asked["seed"],
                asked["class"],
            )
        )
        about = self.model.description
        if not 1 <= n <= MAX_SAMPLES:
            raise _invalid(f"num_samples: {n} is not in 1 to {MAX_SAMPLES}")
        if not 1 <= steps <= MAX_STEPS:
            raise _invalid(f"steps: {steps} is not in 1 to {MAX_STEPS}")
        if not -1 <= label < about.num_classes:
            known = f"0 to {about.num_classes - 1}, or -1 for all" if about.num_classes else "none"
            raise _invalid(f"class: {label} is not a class of this model ({known})")
        if asked["output"] not in OUTPUTS:
            raise _invalid(f"output: {asked['output']!r} is not one of {', '.join(OUTPUTS)}")

        picked = None if label == -1 else label
        images = self.model.generate(range(n), steps=steps, seed=seed, label=picked)
        if asked["output"] == "uint8":
            return images
        table = {"png_base64": [base64.b64encode(encode_png(image)).decode() for image in images]}
        labels = self.model.labels(range(n), picked)
        if labels is not None:
            table["class"] = [about.class_names[i] for i in labels]
        return pd.DataFrame(table)


def encode_png(image: npt.NDArray[np.uint8]) -> bytes:
    """[H, W, 1 or 3] uint8 to a PNG file, without an imaging library."""
    height, width, channels = image.shape
    lines = b"".join(b"\0" + row.tobytes() for row in image)  # filter 0 before each line
    colour = {1: 0, 3: 2}[channels]  # greyscale, truecolour
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def _invalid(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


mlflow.models.set_model(FewStepGenerator())
