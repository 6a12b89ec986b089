"""The code of a registered model. MLflow runs this file where the model is loaded.

It needs mlflow, torch and the `consistency` package that travels beside it; cmforge need not be
installed there. Input: one row with `num_samples`. Parameters: `steps`, `seed`, `class` (-1: all
classes in turn) and `output` ("png_base64": a table, "uint8": an array [n, H, W, C]).

Edits (docs/editing.md): the parameter `edit` names the task; each row is an image, `image` and for
inpaint `mask` in base64, that gets `num_samples` results. Parameters: `sigmas` ("80,24,5" instead
of the preset for `steps`), `sigma` (denoise), `factor` (superres), `to_seed` (interpolate).
"""

import base64
import struct
import zlib
from collections.abc import Sequence
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

from consistency import image_edits, published
from consistency.edit_presets import TASKS, Task
from consistency.image_files import decode_image, decode_mask

MAX_SAMPLES = 10_000
MAX_STEPS = 1_000
MAX_IMAGES = 1_000  # rows of an edit
MAX_BASE64 = 2**25  # characters of one image
OUTPUTS = ("png_base64", "uint8")
DEFAULTS = {
    **{"steps": 1, "seed": 0, "class": -1, "output": OUTPUTS[0]},
    **{"edit": "", "sigmas": "", "sigma": 0.0, "factor": 0, "to_seed": 1},
}


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
        asked = {**DEFAULTS, **(params or {})}
        if asked["edit"] != "":
            return self.edit(model_input, asked)
        for column in ("image", "mask"):
            if column in model_input and _given(model_input[column].iloc[0]):
                raise _invalid(f"{column}: only an edit has one; name it by the parameter edit")
        if len(model_input) != 1:
            raise _invalid(f"num_samples: give exactly one row, not {len(model_input)}")
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
        return self.answer(images, range(n), picked, asked["output"])

    def edit(
        self, model_input: pd.DataFrame, asked: dict[str, Any]
    ) -> pd.DataFrame | npt.NDArray[np.uint8]:
        """Result j of an image depends on (seed, j) and the settings, not on the other rows."""
        task: Task = asked["edit"]
        if task not in TASKS:
            raise _invalid(f"edit: {task!r} is not one of {', '.join(TASKS)}")
        if asked["output"] not in OUTPUTS:
            raise _invalid(f"output: {asked['output']!r} is not one of {', '.join(OUTPUTS)}")
        counts = [int(count) for count in model_input["num_samples"]]
        if not 1 <= len(counts) <= MAX_IMAGES:
            raise _invalid(f"{len(counts)} rows are not in 1 to {MAX_IMAGES}")
        if min(counts) < 1 or sum(counts) > MAX_SAMPLES:
            raise _invalid(f"num_samples: need at least 1 a row, at most {MAX_SAMPLES} in all")
        if not 1 <= asked["steps"] <= MAX_STEPS:
            raise _invalid(f"steps: {asked['steps']} is not in 1 to {MAX_STEPS}")
        picked = None if asked["class"] == -1 else asked["class"]
        try:
            setting = image_edits.Setting(
                sigmas=image_edits.levels(
                    self.model.description,
                    task,
                    steps=asked["steps"],
                    sigmas=_numbers(asked["sigmas"]) or None,
                    sigma=asked["sigma"] or None,
                ),
                seed=asked["seed"],
                label=picked,
            )
            if len(setting.sigmas) > MAX_STEPS:
                raise ValueError(f"sigmas: {len(setting.sigmas)} are more than {MAX_STEPS}")
            if task == "interpolate":
                (frames,) = counts if len(counts) == 1 else (0,)
                images = image_edits.interpolate(self.model, asked["to_seed"], frames, 1, setting)
                return self.answer(images, [0] * len(images), picked, asked["output"])
            pixels, missing = self.decoded(task, model_input)
            images = image_edits.edit_images(
                self.model,
                task,
                pixels,
                counts,
                setting,
                missing=missing,
                factor=asked["factor"] or None,
            )
        except ValueError as error:
            raise _invalid(str(error)) from error
        indices = [j for count in counts for j in range(count)]
        return self.answer(images, indices, picked, asked["output"])

    def decoded(
        self, task: Task, model_input: pd.DataFrame
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_] | None]:
        """The rows' images [R, H, W, C], and where they are missing [R, H, W] for inpaint."""
        images, masks = [], []
        for row in range(len(model_input)):
            data = _bytes(model_input, "image", row)
            if data is None:
                raise ValueError(f"image: row {row} has none; give a PNG, JPEG or WebP in base64")
            pixels, missing = decode_image(data, self.model.description.channels)
            mask = _bytes(model_input, "mask", row)
            if task != "inpaint" and mask is not None:
                raise ValueError(f"mask: inpaint has one, {task} does not")
            side = self.model.description.size
            if max(pixels.shape[:2]) > side:
                height, width = pixels.shape[:2]
                raise ValueError(f"image: row {row} is {width}x{height}, the model {side}x{side}")
            images.append(pixels)
            masks.append(missing if mask is None else decode_mask(mask))
            if images[row].shape != images[0].shape:
                raise ValueError(f"image: row {row} is of another size than row 0")
            if masks[row].shape != pixels.shape[:2] or (task == "inpaint" and not masks[row].any()):
                raise ValueError(f"mask: row {row} needs one of the image's size with some white")
        return np.stack(images), np.stack(masks) if task == "inpaint" else None

    def answer(
        self, images: npt.NDArray[np.uint8], indices: Sequence[int], label: int | None, output: str
    ) -> pd.DataFrame | npt.NDArray[np.uint8]:
        """As it was asked for; the class of a result follows from its index."""
        if output == "uint8":
            return images
        table = {"png_base64": [base64.b64encode(encode_png(image)).decode() for image in images]}
        labels = self.model.labels(indices, label)
        if labels is not None:
            table["class"] = [self.model.description.class_names[i] for i in labels]
        return pd.DataFrame(table)


def _given(cell: Any) -> bool:
    """An optional column may hold None, NaN or nothing."""
    return isinstance(cell, str) and cell != ""


def _bytes(model_input: pd.DataFrame, column: str, row: int) -> bytes | None:
    if column not in model_input or not _given(model_input[column].iloc[row]):
        return None
    text = model_input[column].iloc[row]
    if len(text) > MAX_BASE64:
        raise ValueError(f"{column}: row {row} has more than {MAX_BASE64} characters")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError(f"{column}: row {row} is not base64") from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"sigmas: {text[:60]!r} is not a list of numbers: 80,24,5") from None


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
